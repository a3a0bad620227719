"""Epochs and fits of mnist-train compared with what else one could run."""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import mnist_cnn
from benchmarks.limits import training
from benchmarks.turns import PRECISIONS, RECIPES, ROOT, TURNS, contestant, ours, ratio, spread, take_turns
from mnist_cnn.data.datamodule import MNISTDataModule
from mnist_cnn.inference.classifier import load_classifier
from mnist_cnn.models.convnet import ConvNet
from mnist_cnn.runs.folder import read_run
from mnist_cnn.training.optimizers import instantiate

TORCH_DROPOUT = (str(ROOT / "scripts" / "benchmarks" / "torch_dropout.py"),)

EXAMPLE = [  # the network and settings of PyTorch's own MNIST example
    "architecture.blocks=[{filters:32,kernel:3},{filters:64,kernel:3,pool:2,dropout:0.25}]",
    "architecture.dense=[{units:128,dropout:0.5}]",
    "optimizer=adadelta",
    "data.validation=0",
    "data.batch_size=64",
]
RUN_BY = {
    "keras": "Keras on TensorFlow",
    "stock": "the Lightning habit",
    "example": "PyTorch's example",
    "float32": "ours, float32",
    "bfloat16": "ours, bfloat16",
}


def compare_with_bare(recipe, value):
    """Seconds of mnist-train's epochs and of a bare loop's, and their ratio."""
    commands = {
        "bare": contestant("bare", recipe, TURNS + 1, value),
        "ours": ours(recipe, TURNS + 1, value),
    }
    seconds, _ = take_turns(commands, TURNS + 1)
    row = {"recipe": recipe, "seconds": seconds, "ratio": ratio(seconds["ours"], seconds["bare"])}
    print("tax", recipe, value, spread(row["ratio"]), file=sys.stderr)
    return row


def tax_table(rows):
    table = [
        "| recipe | precision | bare loop, s an epoch | mnist-train | ratio (lowest–highest) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        epoch = [f"{statistics.median(values[1:]):.2f}" for values in row["seconds"].values()]
        table.append(f"| `{row['recipe']}` | {row['precision']} | {' | '.join(epoch)} | {spread(row['ratio'])} |")
    return table


def tax(recipes=(*RECIPES, "mlp"), precisions=PRECISIONS):
    rows = [
        {"precision": precision, **compare_with_bare(recipe, value)}
        for precision, value in precisions.items()
        for recipe in recipes
    ]
    return rows, tax_table(rows)


def dropout(recipe="conv32_32_dropout"):
    """Epochs of mnist-train as it is, and with torch's nn.Dropout in place of ours."""
    rows = []
    for precision, value in PRECISIONS.items():
        commands = {
            "torch": ours(recipe, TURNS + 1, value, program=TORCH_DROPOUT),
            "ours": ours(recipe, TURNS + 1, value),
        }
        seconds, _ = take_turns(commands, TURNS + 1)
        rows.append({"precision": precision, "seconds": seconds, "ratio": ratio(seconds["torch"], seconds["ours"])})
        print("dropout", precision, spread(rows[-1]["ratio"]), file=sys.stderr)
    table = [f"| `{recipe}` | nn.Dropout, s an epoch | ours | nn.Dropout / ours |", "| --- | --- | --- | --- |"]
    for row in rows:
        medians = [f"{statistics.median(values[1:]):.2f}" for values in row["seconds"].values()]
        table.append(f"| {row['precision']} | {' | '.join(medians)} | {spread(row['ratio'])} |")
    return rows, table


def cuda():
    """An epoch of mnist-train and one of a bare loop, in one process: a process starts longer than it would train."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("error: cuda: torch finds no CUDA device here")
    rows = []
    for recipe in RECIPES:
        for precision, value in {"float32": "32-true", "bfloat16": "bf16-mixed"}.items():
            folder = tempfile.mkdtemp(prefix="benchmark-")
            words = [f"experiment={recipe}", "accelerator=cuda", f"accelerator.precision={value}", "plots=false"]
            run = mnist_cnn.train([*words, "epochs=3", f"hydra.run.dir={folder}/run"], verbose=False)
            config, _ = read_run(Path(folder, "run"))
            history = load_classifier(Path(folder, "run"), "cpu").description.history
            epochs = [float(row["seconds"]) for row in history]
            rows.append({"recipe": recipe, "precision": precision, "batch": config.data.batch_size, "ours": epochs})
            rows[-1] |= {"bare": bare_epoch(config, precision), "accuracy": run.metrics["test/accuracy"]}
            print("cuda", recipe, precision, f"{min(epochs[1:]):.3f} s, bare {rows[-1]['bare']:.3f} s", file=sys.stderr)
    table = [
        f"| on {torch.cuda.get_device_name()} | precision | batch | bare loop, s an epoch | mnist-train | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        own = statistics.median(row["ours"][1:])
        cells = [f"`{row['recipe']}`", row["precision"], row["batch"]]
        cells += [f"{row['bare']:.2f}", f"{own:.2f}", f"{own / row['bare']:.2f}"]
        table.append(f"| {' | '.join(map(str, cells))} |")
    return rows, table


def bare_epoch(config, precision, steps=150):
    """Seconds of an epoch by a bare loop on CUDA, from 150 of its steps."""
    import torch

    data = MNISTDataModule(**config.data.model_dump(), seed=config.seed)
    data.setup()
    images, labels = (part.cuda() for part in data.train)
    network, optimizer = ConvNet(config.architecture).cuda(), instantiate(config.optimizer, "optimizer")
    order = torch.randperm(len(labels), device="cuda").split(config.data.batch_size)
    for part in (order[:20], order[20 : 20 + steps]):  # the first to warm up
        batches = ((images[chosen], labels[chosen]) for chosen in part)
        seconds = training(network, batches, precision, optimizer, "cuda")
    return seconds / steps * len(order)


def tensorflow():
    """The Python of an environment with Keras on TensorFlow, made on first use."""
    folder = ROOT / ".venv-keras"
    python = folder / "bin" / "python"
    if not python.exists():
        print("making .venv-keras with tensorflow-cpu 2.21 and keras 3.15 ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "tensorflow-cpu==2.21.*", "keras==3.15.*"], check=True)
    return python


def compare_with(other, recipe, fit, *overrides, python=sys.executable):
    """A fit by another and by us, an epoch each in turn."""
    epochs = max(fit, TURNS + 1)  # a fit of fewer gives too few pairs: it goes on
    commands = {other: contestant(other, recipe, epochs, python=python)}
    commands |= {name: ours(recipe, epochs, value, *overrides) for name, value in PRECISIONS.items()}
    seconds, accuracy = take_turns(commands, epochs)
    ratios = {f"{mine} / {other}": ratio(seconds[mine], seconds[other]) for mine in PRECISIONS}
    print(recipe, {name: spread(value) for name, value in ratios.items()}, file=sys.stderr)
    return {
        "recipe": f"`{recipe}`" if recipe else "PyTorch's example",
        "epochs": epochs,
        "fit": fit,
        "seconds": seconds,
        "accuracy": accuracy,
        "ratios": ratios,
    }


def fits_table(rows):
    table = [
        "| recipe | run by | fit, s (epochs) | test accuracy, % (epochs) | our float32 / it | our bfloat16 / it |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        for name, title in RUN_BY.items():
            if name not in row["seconds"]:
                continue
            figures = [row["ratios"].get(f"{mine} / {name}") for mine in ("float32", "bfloat16")]
            own = " | ".join(spread(figure) if figure else "" for figure in figures)
            total = sum(row["seconds"][name][: row["fit"]])
            accuracy = f"{100 * row['accuracy'][name]:.2f} ({row['epochs']})"
            table.append(f"| {row['recipe']} | {title} | {total:.1f} ({row['fit']}) | {accuracy} | {own} |")
    note = (
        "Fits from the first batch to the last, warming up included; accuracies of one seed. In brackets the epochs: "
        "where a fit has fewer than six, the turns went on to six. Ratios are of single epochs, in turn."
    )
    return [*table, "", note]


def keras():
    rows = [compare_with("keras", recipe, fit, python=tensorflow()) for recipe, fit in RECIPES.items()]
    *table, note = fits_table(rows)
    validates = (
        "Keras validates on the test digits where the tutorial does so (`conv32_32_dropout`, `conv10`), we do not."
    )
    return rows, [*table, f"{note} {validates}"]


def habit():
    rows = [compare_with("stock", recipe, fit) for recipe, fit in RECIPES.items()]
    rows.append(compare_with("example", None, 3, *EXAMPLE))
    return rows, fits_table(rows)
