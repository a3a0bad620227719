"""Runs of the records' recipes over seeds, their temperatures, and ablations; scripts/records is the command."""

import json
import logging
import shutil
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

import mnist_cnn
from benchmarks.limits import multiply_adds, product, yardstick
from mnist_cnn.config.schema import RunError, UserError, validated
from mnist_cnn.config.settings import Train
from mnist_cnn.data.augmentation import Augment
from mnist_cnn.data.datamodule import MNISTDataModule
from mnist_cnn.data.datasets import ACCELERATOR_BATCH, CPU_BATCH
from mnist_cnn.inference.classifier import load_classifier, mean_logits
from mnist_cnn.inference.metrics import fit_temperature, score
from mnist_cnn.models.convnet import ConvNet
from mnist_cnn.models.device import find_device
from mnist_cnn.runs.files import write_whole
from mnist_cnn.runs.folder import read_run
from mnist_cnn.runs.hydra_app import plain_job
from mnist_cnn.train import composed_of
from mnist_cnn.training.optimizers import instantiate
from recording.ablations import changes
from recording.record_tables import DISPUTED, SEEDS, draw

OUT = Path("outputs/records").absolute()
MEMBERS = {"record_ensemble": {"record_ensemble": 2, "record_single": 2}}  # how many networks of which recipe
VALIDATION = 10_000  # the last training digits
HALF = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
TTA = {"": None, "_tta_1": 1, "_tta_5": 5}  # of validation digits: the recipe's number, and others


def settings_of(words):
    return validated(Train, plain_job(composed_of(words)))


def warm_up(config):
    """A step and a scoring of noise, in the recipe's shapes: what a process does for the first time takes longer."""
    device, size = find_device(config.accelerator.name), config.data.batch_size
    network = ConvNet(config.architecture).to(device)
    network.onednn = True
    optimizer = instantiate(config.optimizer, "optimizer")(list(network.parameters()))
    half = HALF[config.accelerator.precision]
    for count in (size, (60_000 - int(config.data.validation)) % size):  # the last batch of an epoch is a shorter one
        images = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, device=device)
        labels = torch.randint(0, 10, (count,), device=device)
        with torch.autocast(device.type, half, enabled=half is not None):
            images = Augment(config.augmentation)(images, labels) if config.augmentation.changes() else images
            loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        count = CPU_BATCH if device.type == "cpu" else ACCELERATOR_BATCH
        network.eval()(torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, device=device)).sum().item()


def folder_of(name, words):
    """Where a recipe's runs are. Figures of another recipe are not kept among them.

    Raises:
        UserError: there are such.
    """
    configs = [settings_of([f"experiment={kind}", *words]) for kind in MEMBERS.get(name, [name])]
    root = OUT / (f"{name}_cuda" if configs[0].accelerator.name == "cuda" else name)
    own = {"seed": True, "data": {"root"}}
    file, recipe = root / "recipe.json", "\n".join(each.model_dump_json(exclude=own, indent=1) for each in configs)
    if any(root.rglob("seed_*.json")) and file.read_text() != recipe:
        raise UserError(f"{root} has runs of another recipe: move it away, or set the recipe back")
    root.mkdir(parents=True, exist_ok=True)
    write_whole(file, recipe)
    return root


def cached(file, measure):
    """The figures in a file, measured where it is not there yet."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        figures = measure(file.with_suffix(""))
        write_whole(file, json.dumps(figures, indent=1) + "\n")
        shown = {key: value for key, value in figures.items() if isinstance(value, float)}
        print(file.relative_to(OUT), *(f"{key} {value:.5g}" for key, value in shown.items()), flush=True)
    return json.loads(file.read_text())


def train_run(folder, words):
    """The figures of a run, whose checkpoint stays in its folder."""
    shutil.rmtree(folder, ignore_errors=True)  # cut short
    metrics = mnist_cnn.train([*words, "plots=false", f"hydra.run.dir={folder}"], verbose=False).metrics
    config, about = read_run(folder)
    network, image = ConvNet(config.architecture), torch.zeros(1, 1, 28, 28)
    data = MNISTDataModule(**config.data.model_dump(), seed=config.seed)
    data.setup()
    seen = load_classifier(folder, "cpu").description.history[-1]["step"] * config.data.batch_size
    seen = min(int(seen), len(data.train.labels) * config.epochs)  # the last batch of an epoch is a shorter one
    counts = {part: multiply_adds(network, image, part == "training") for part in ("training", "scoring")}
    return {
        **{key: metrics[key] for key in ("parameters", "epochs", "train_seconds", "test_seconds")},
        "training_multiply_adds": counts["training"] * seen,
        "scoring_multiply_adds": counts["scoring"] * len(data.test.labels) * config.tta,
        "precision": config.accelerator.precision,
        "threads": torch.get_num_threads(),
        **{key: about[key] for key in ("versions", "git_commit", "started")},
    }


def machine_of(folder):
    """The machine that a run was made on just now, and how fast it is."""
    config, about = read_run(folder)
    if find_device(config.accelerator.name).type == "cuda":
        return {"machine": f"{about['machine']}, {torch.cuda.get_device_name()}"}
    rate = product(HALF[config.accelerator.precision] or torch.float32)
    return {"machine": about["machine"], "product_rate": rate, "yardstick": yardstick()}


def logits_of(folders, part, tta=None):
    """Logarithms of the mean probabilities of validation or test digits by the networks in `folders`, and labels."""
    each = []
    for folder in folders:
        config, _ = read_run(folder)
        data = MNISTDataModule(**config.data.model_dump(), seed=config.seed)
        data.setup()
        digits = getattr(data, part)
        each.append(load_classifier(folder, config.accelerator.name, tta or config.tta).logits(digits.images))
    return mean_logits(torch.stack(each)), digits.labels


def networks(name, number):
    """The experiments and seeds of a record's networks: no two of its runs have one in common."""
    kinds = MEMBERS.get(name, {name: 1})
    return [(kind, (number - 1) * count + one + 1) for kind, count in kinds.items() for one in range(count)]


def words_of(network, words):
    return [f"experiment={network[0]}", f"seed={network[1]}", *words]


def temperature(name, words, root):
    """Fitted to validation digits, by as many networks as the record has."""

    def calibrated(folder):
        members = networks(name, 1)
        folders = [folder / f"{kind}_{seed}" for kind, seed in members]
        for place, member in zip(folders, members, strict=True):
            cached(
                place.with_suffix(".json"), lambda place, member=member: validation_run(place, words_of(member, words))
            )
        logits, labels = logits_of(folders, "validation")
        rows = [[float(row["val/accuracy"]) for row in load_classifier(place).description.history] for place in folders]
        return {"temperature": fit_temperature(logits, labels), "curves": rows}

    return cached(root / "calibration.json", calibrated)["temperature"]


def validation_run(folder, words):
    """A run that trains on 50,000 digits and never sees the test set; its accuracy on the other 10,000."""
    figures = train_run(folder, [f"data.validation={VALIDATION}", "data.validation_from=last", "test=false", *words])
    return figures | {f"accuracy{key}": accuracy_of(folder, tta) for key, tta in TTA.items()}


def accuracy_of(folder, tta):
    logits, labels = logits_of([folder], "validation", tta)
    return (logits.argmax(1) == labels).double().mean().item()


def figures_of(logits, labels, divisor):
    before, after = score(logits, labels), score(logits / divisor, labels)
    right = logits.argmax(1) == labels
    sure = torch.ones(len(labels), dtype=torch.bool)
    sure[[index for index in DISPUTED if index < len(labels)]] = False
    return {
        "accuracy": before.accuracy,
        "accuracy_undisputed": right[sure].double().mean().item(),
        **{"loss": before.loss, "calibration_error": before.calibration_error, "temperature": divisor},
        **{"calibrated_loss": after.loss, "calibrated_calibration_error": after.calibration_error},
        "incorrect": (~right).nonzero().flatten().tolist(),
    }


def record(name, count, words):
    """Make the record's runs, with seeds from 1 on, and tell their folder."""
    root = folder_of(name, words)
    divisor = temperature(name, words, root)
    for number in range(1, count + 1):
        cached(
            root / f"seed_{number}.json", lambda folder, number=number: test_run(folder, name, number, divisor, words)
        )
    return root


def test_run(folder, name, number, divisor, words):
    members = networks(name, number)
    if len(members) == 1:
        folders = [folder]
        runs = [train_run(folder, words_of(members[0], words))]
    else:
        folders = [
            folder / f"{kind}_{seed}" if kind == name else record(kind, seed, words) / f"seed_{seed}"
            for kind, seed in members
        ]
        runs = [
            cached(place.with_suffix(".json"), lambda place, member=member: train_run(place, words_of(member, words)))
            for place, member in zip(folders, members, strict=True)
        ]
    sums = {key: sum(run[key] for run in runs) for key in runs[0] if key.endswith(("_seconds", "_adds"))}
    sums |= {key: sum(run[key] for run in runs) for key in ("parameters", "epochs")}
    figures = figures_of(*logits_of(folders, "test"), divisor)
    return {**runs[-1], **sums, **machine_of(folders[-1]), "members": len(runs), **figures}


def ablate(name, count, words):
    root = folder_of(name, words)

    def attempt(place, seed, own):
        try:
            return validation_run(place, words_of((name, seed), own))
        except RunError as error:  # a rate that is too high without the part
            return {"error": str(error)}

    parts = changes(name, lambda off: settings_of([f"experiment={name}", *off, *words]))
    for part, off in {"all": [], **parts}.items():
        warm_up(settings_of([f"experiment={name}", *off, *words]))
        for seed in range(1, count + 1):
            file = root / "ablation" / part / f"seed_{seed}.json"
            cached(file, lambda place, seed=seed, own=(*off, *words): attempt(place, seed, own))


def main(arguments, usage):
    if arguments in (["--help"], ["-h"]):
        print(usage)
        return 0
    names = [word for word in arguments if word in SEEDS]
    words = [word for word in arguments if "=" in word and not word.startswith("seeds=")]
    seeds = next((word.partition("=")[2] for word in arguments if word.startswith("seeds=")), "")
    verbs = [word for word in arguments if "=" not in word and word not in SEEDS]
    if verbs not in ([], ["ablation"], ["pictures"]) or (seeds and not (seeds.isdigit() and int(seeds))):
        print(usage, file=sys.stderr)
        return 2
    logging.getLogger("mnist_cnn").addHandler(logging.NullHandler())
    try:
        if verbs == ["pictures"]:
            return draw()
        # Recipes for a GPU are recorded on one, all others on a CPU.
        for name in names or [name for name in SEEDS if name.endswith("_gpu") == torch.cuda.is_available()]:
            for kind in MEMBERS.get(name, [name]):
                warm_up(settings_of([f"experiment={kind}", *words]))
            (ablate if verbs else record)(name, int(seeds or SEEDS[name]), words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
