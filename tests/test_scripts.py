"""scripts/: tables as recorded, records that count every seed, disturbed runs, fuzzing, epochs in turns."""

import io
import json
import re
import runpy
import shutil
import statistics
import subprocess
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import CONF, REPOSITORY, TUTORIALS, metrics
from PIL import Image

from benchmarks import communication, predict, turns
from fuzzing import files
from fuzzing import survey as fuzz
from mnist_cnn import load_classifier
from mnist_cnn.data import datasets
from mnist_cnn.pictures.digit_image import mnist_form
from mnist_cnn.pictures.image_files import read_picture
from recording import recipes, record_runs, record_tables, tables

SCRIPTS = REPOSITORY / "scripts"


def script(name, *words):
    """The exit status of a script in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    return ended.value.code


@pytest.mark.parametrize("name", ["benchmark", "chaos", "chaos sweep", "fuzz", "records", "robustness", "tables"])
def test_each_script_says_how_it_is_used(capsys, name):
    assert script(*name.split(), "--help") == 0
    assert f"usage: scripts/{name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("benchmark nothing", "usage: scripts/benchmark"),
        ("benchmark tax --hosts", "usage: scripts/benchmark"),
        ("records speed_98", "usage: scripts/records"),
        ("records seeds=0", "usage: scripts/records"),
        ("records speed_99 seeds=x", "usage: scripts/records"),
        ("records ablate", "usage: scripts/records"),
        ("records speed_99 epoch=3", "error: unknown key epoch; did you mean epochs?"),
        ("tables nowhere", "error: nowhere is no folder"),
        ("fuzz pixels", "pixels: expected 'configurations'"),
        ("robustness", "give a checkpoint, or --pictures FOLDER"),
        ("chaos --killed 3", "unrecognized arguments: --killed 3"),
    ],
)
def test_a_wrong_command_says_what_is_right(capsys, monkeypatch, tmp_path, words, said):
    monkeypatch.chdir(tmp_path)
    assert script(*words.split()) == 2
    assert said in capsys.readouterr().err


# --- tables --------------------------------------------------------------------------------------------------


def test_the_tables_are_the_recorded_figures(capsys):
    assert tables.main(["--check"], "") == 0, capsys.readouterr().err


def test_a_figure_that_was_typed_and_a_missing_section_are_found(capsys, monkeypatch, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text((REPOSITORY / "README.md").read_text().replace("99.08", "99.98").replace("records: wri", "wri"))
    texts = tables.sections()[tables.FRONT]
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "sections", lambda: {readme: texts})
    monkeypatch.setattr(tables, "claims", dict)
    assert tables.main(["--check"], "") == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: README.md has no <!-- records: written by scripts/tables --> … <!-- end --> around a table",
        "error: README.md: not as recorded; run scripts/tables",
    ]


def test_everything_recorded_is_in_one_folder():
    found = {path.name for path in (SCRIPTS / "results").iterdir()}
    pictures = {"draw.png", "pictures.png", "sheet.png", "study.png", "records_curves.png", "records_missed.png"}
    assert found == {"benchmark.json", "chaos.json", "recipes.json", "records.json", "sweep.json"} | pictures
    for folder in (SCRIPTS, REPOSITORY / "tests"):
        assert not [*folder.glob("*.json"), *folder.glob("*.png")]


def test_each_recipe_is_recorded_on_five_seeds_and_as_good_as_keras():
    """Each mean above Keras's own, or within two standard errors of the difference below it."""
    recorded = json.loads(tables.RECIPES.read_text())
    for name in TUTORIALS:
        ours = recipes.accuracies(recorded, name)
        assert len(ours) == 5, name
        keras = recorded["tutorials"][name]["keras"]
        error = (statistics.variance(ours) / 5 + keras["sd"] ** 2 / 4) ** 0.5
        assert statistics.mean(ours) >= keras["mean"] - 2 * error, name


def test_what_a_folder_has_is_recorded(monkeypatch, tmp_path):
    """Runs of a recipe as it is, and parts of scripts/benchmark; what is not there stays as it was."""
    for name in ("RECIPES", "BENCHMARK", "CHAOS", "SWEEP"):
        target = tmp_path / getattr(tables, name).name
        target.write_text(getattr(tables, name).read_text())
        monkeypatch.setattr(tables, name, target)
    monkeypatch.setattr(record_tables, "RECORDS", tmp_path / "records.json")
    before = json.loads(tables.RECIPES.read_text())
    about = {"started": "now", "git_commit": "x", "machine": "y", "versions": {"torch": "1"}}
    for seed, words in ((98, []), (99, ["optimizer.lr=1"])):
        folder = tmp_path / "new" / str(seed)
        folder.mkdir(parents=True)
        run = {**about, "choices": {"experiment": "conv10"}, "overrides": ["experiment=conv10", f"seed={seed}", *words]}
        config = {"seed": seed, "accelerator": {"precision": "32-true"}, "run": run}
        (folder / "config.yaml").write_text(json.dumps(config))
        (folder / "metrics.json").write_text('{"test/accuracy": 0.5}')
    part = {"machine": {"cores": 3}, "figures": [], "table": ["| a |", "| --- |", "| 1 |"]}
    (tmp_path / "new" / "dropout.json").write_text(json.dumps(part))
    tables.record(tmp_path / "new")
    recorded = json.loads(tables.RECIPES.read_text())
    assert recorded["runs"].keys() - before["runs"].keys() == {"conv10 seed 98"}
    assert tables.benchmark_text("dropout") == "| a |\n| --- |\n| 1 |\n\nMeasured on: cores 3."
    assert "mnist-train" in tables.benchmark_text("tax")


# --- tutorials -----------------------------------------------------------------------------------------------


def test_runs_are_compared_in_one_picture(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "other")
    command = [sys.executable, REPOSITORY / "scripts" / "compare", trained, "other", "output=both.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 4
    assert f"{metrics(trained)['test/accuracy']:.2%}" in done.stdout
    assert Image.open(tmp_path / "both.png").width > 600
    done = subprocess.run([*command[:2], tmp_path], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    done = subprocess.run([*command[:2], "nowhere"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


@pytest.mark.parametrize("name", sorted(path.stem for path in (SCRIPTS / "tutorials").glob("*.py")))
def test_a_tutorial_is_told(monkeypatch, tmp_path, capsys, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "data=digits", "epochs=1"])
    runpy.run_path(str(SCRIPTS / "tutorials" / f"{name}.py"))
    assert re.search(r"\d\d\.\d\d%", capsys.readouterr().out)
    assert list(tmp_path.glob("outputs/train/*/metrics.json"))


# --- records -------------------------------------------------------------------------------------------------

WORDS = ("data=digits", "epochs=1", "accelerator.precision=32-true", "accelerator=cpu")


def records(*words):
    return record_runs.main(list(words), "")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a few records' runs, with 100 validation digits and ensembles of three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_runs, "OUT", tmp_path_factory.mktemp("records"))
        patch.setattr(record_runs, "VALIDATION", 100)
        patch.setattr(record_runs, "product", lambda dtype: 1.0)  # takes a second
        patch.setattr(record_runs, "MEMBERS", {"record_ensemble": {"record_ensemble": 2, "record_single": 1}})
        assert records("speed_99", "seeds=2", *WORDS, "tta=5") == 0
        assert records("ablation", "speed_99", "seeds=1", *WORDS, "tta=5") == 0
        assert records("record_ensemble", "seeds=2", *WORDS, "tta=1", "architecture.blocks=[]") == 0
        yield record_runs.OUT


def figures(folder, name):
    return {int(file.stem[5:]): json.loads(file.read_text()) for file in (folder / name).glob("seed_*.json")}


def test_every_record_is_a_recipe_that_mnist_train_takes():
    for name in record_runs.SEEDS:
        config = record_runs.settings_of([f"experiment={name}"])
        assert (config.selection, config.data.validation) == ("last", 0), name
        assert (CONF / "experiment" / f"{name}.yaml").exists()


def test_a_records_figures_are_those_of_its_checkpoints(runs):
    test = datasets.load("digits", "unused")[1]
    for seed, run in figures(runs, "speed_99").items():
        classifier = load_classifier(runs / "speed_99" / f"seed_{seed}", tta=5)
        wrong = (classifier.logits(test.images).argmax(1) != test.labels).nonzero().flatten().tolist()
        assert run["incorrect"] == wrong
        assert run["accuracy"] == pytest.approx(1 - len(wrong) / 360)
        assert run["train_seconds"] > 0
        assert run["test_seconds"] > 0
        assert classifier.description.data.seed == seed
        assert run["temperature"] != 1
    layers = 12 * 12 * 16 * 25, 4 * 4 * 32 * 144, 2 * 2 * 96 * 288, 384 * 10
    assert run["scoring_multiply_adds"] == 5 * 360 * sum(layers)
    assert run["training_multiply_adds"] == 1437 * (2 * layers[0] + 3 * sum(layers[1:]))


def test_what_is_there_is_kept_and_what_was_cut_short_begins_again(runs, capsys):
    first = figures(runs, "speed_99")
    (runs / "speed_99" / "seed_2.json").unlink()
    capsys.readouterr()
    assert records("speed_99", "seeds=3", *WORDS, "tta=5") == 0
    again = figures(runs, "speed_99")
    assert sorted(again) == [1, 2, 3]
    assert again[1] == first[1]
    assert again[2]["accuracy"] == first[2]["accuracy"]
    assert "seed_1.json" not in capsys.readouterr().out


def test_runs_of_another_recipe_are_not_mixed_with_them(runs, capsys):
    before = figures(runs, "speed_99")
    assert records("speed_99", "seeds=4", *WORDS) == 2
    assert "has runs of another recipe: move it away" in capsys.readouterr().err
    assert figures(runs, "speed_99") == before


def test_an_ensemble_is_the_mean_of_its_networks_with_seeds_of_their_own(runs):
    ensembles = figures(runs, "record_ensemble")
    assert sorted(ensembles) == [1, 2]
    test = datasets.load("digits", "unused")[1]
    for number, run in ensembles.items():
        seeds = [2 * number - 1, 2 * number]
        folders = [runs / "record_ensemble" / f"seed_{number}" / f"record_ensemble_{seed}" for seed in seeds]
        folders.append(runs / "record_single" / f"seed_{number}")  # the other record's own run
        each = [load_classifier(folder).logits(test.images).softmax(1) for folder in folders]
        wrong = (torch.stack(each).mean(0).argmax(1) != test.labels).nonzero().flatten().tolist()
        assert run["incorrect"] == wrong
        members = [json.loads(folder.with_suffix(".json").read_text()) for folder in folders]
        assert run["train_seconds"] == pytest.approx(sum(member["train_seconds"] for member in members))
        assert run["parameters"] == 3 * 7850
        assert [load_classifier(folder).description.data.seed for folder in folders] == [*seeds, number]


def test_an_ablation_changes_one_part_each(runs):
    folder = runs / "speed_99" / "ablation"
    assert {path.name for path in folder.iterdir()} == {
        "all",
        "without label smoothing",
        "AdamW instead of Muon",
        "without warm-up and decay",
        "without batch norm",
        "with weight averaging",
        "with a fifth of the last block dropped out",
    }
    parts = {path.name: json.loads((path / "seed_1.json").read_text()) for path in folder.iterdir()}
    assert len({run["parameters"] for part, run in parts.items() if part != "without batch norm"}) == 1
    assert parts["without batch norm"]["parameters"] == parts["all"]["parameters"] - (16 + 32 + 96)
    assert parts["all"]["test_seconds"] is None


def test_the_tables_and_pictures_have_every_seed(runs, monkeypatch, tmp_path):
    for name in ("RECORDS", "CURVES", "MISSED"):
        monkeypatch.setattr(record_tables, name, tmp_path / f"{name}.png")
    assert record_tables.sections({})["records"] == "Not recorded yet."
    record_tables.update(record_tables.collected(runs))
    recorded = record_tables.recorded()
    values = [100 * run["accuracy"] for run in figures(runs, "speed_99").values()]
    mean = f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
    sections = record_tables.sections(recorded)
    assert f"| `speed_99` | {len(values)} | {mean} |" in sections["records"]
    assert f"| `speed_99` | {len(values)} | {mean} |" in "\n".join(record_tables.front_table(recorded))
    assert "23,550 in 3" in sections["records"]
    assert "| `speed_99` | without label smoothing | 1 |" in sections["ablations"]
    assert "| `speed_99` | without test-time augmentation | 1 |" in sections["ablations"]
    assert mean in record_tables.claim(recorded, "speed_99")

    read = datasets.load
    monkeypatch.setattr(datasets, "load", lambda name, root: read("digits", root))
    assert records("pictures") == 0
    for name in ("CURVES", "MISSED"):
        picture = (tmp_path / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) < 200_000


def test_the_interval_of_a_mean():
    """Student's t for three values: 4.303 standard errors."""
    low, high = map(float, record_tables.interval([1.0, 2.0, 3.0]).split(" to "))
    assert (low, high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)


# --- disturbed runs ------------------------------------------------------------------------------------------

SMALL_CHAOS = """
import sys
from disturbances import runs
runs.SETTINGS = ["data=digits", "seed=3", "plots=false", "epochs=3", "accelerator=cpu", "accelerator.threads=1"]
runs.SETTINGS += ["data.batch_size=32", "architecture.dense=[8]", "schedule=onecycle", "checkpoint.every_seconds=0.1"]
raise SystemExit(runs.main(sys.argv[1:], ""))
"""


def test_disturbed_runs_end_as_undisturbed_ones(tmp_path):
    counts = {"kill": 2, "terminate": 0, "interrupt": 0, "full": 1}
    words = [*(f"--{kind}={count}" for kind, count in counts.items()), "--networks=conv10"]
    command = [sys.executable, "-c", SMALL_CHAOS, *words]
    environment = {"PATH": "", "PYTHONPATH": str(SCRIPTS), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended
    (record,) = tmp_path.glob("outputs/chaos/*/chaos.json")
    disturbed = json.loads(record.read_text())["runs"]
    assert len(disturbed) == sum(counts.values())
    assert all(run["disturbances"] for run in disturbed)
    assert "| SIGKILL | `conv10` | plain | 1 |" in ended.stdout
    assert "| SIGKILL | `conv10` | Muon, EMA, augmentation | 1 |" in ended.stdout


# --- fuzzing -------------------------------------------------------------------------------------------------

COUNTS = {"configurations": 100, "idx files": 500, "pictures": 500, "checkpoints": 200}
COUNTS |= {"folders": 200, "lists": 100, "npz files": 200, "ONNX files": 40, "HDF5 files": 80}


@pytest.mark.parametrize("what", COUNTS)
def test_whatever_comes_is_taken_or_refused(what):
    failures, _, _ = fuzz.survey(what, COUNTS[what], seed=1)
    assert not failures, "\n".join(failures)


def fails(example):
    raise ValueError("a bug")


def takes_long(example):
    sum(range(4 * 10**6))


def takes_memory(example):
    return b"1" * 700 * 2**20


def crashes(example):
    import ctypes

    ctypes.string_at(0)


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (fails, "a bug"),
        (takes_long, "AssertionError: [0-9.]+ s"),
        (takes_memory, "[0-9]+ MiB"),
        (crashes, "ended with -11"),
    ],
)
def test_what_is_not_allowed_is_seen(monkeypatch, check, words):
    """A traceback, a hang, memory, a crash: the survey above would find each."""
    monkeypatch.setitem(fuzz.PROPERTIES, "pictures", (check, files.mutations()))
    monkeypatch.setattr(fuzz, "SECONDS", 0.01 if check is takes_long else 60)
    failures, _, _ = fuzz.survey("pictures", 2, seed=1, processes=1)
    assert re.search(words, failures[0])


@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16"])
def test_a_large_picture_takes_little_memory_and_time(monkeypatch, mode):
    """36 million pixels in a file of some kilobytes; float channels of all of them would take gigabytes."""
    picture = Image.new("L", (6000, 6000), 255)
    picture.paste(0, (2800, 2000, 3000, 4000))
    picture = picture.convert("I").convert(mode) if mode == "I;16" else picture.convert(mode)
    if mode == "RGBA":
        picture.putpixel((0, 0), (255, 255, 255, 0))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    content = buffer.getvalue()

    def check(_):
        form = mnist_form(read_picture(io.BytesIO(content)))
        assert form[6:22, 14].min() > 200  # an upright stroke

    monkeypatch.setitem(fuzz.PROPERTIES, "pictures", (check, st.just(None)))
    failures, _, _ = fuzz.survey("pictures", 1, seed=1, processes=1)
    assert not failures, failures[0]


# --- benchmarks ----------------------------------------------------------------------------------------------


def test_epochs_are_measured_in_turns():
    """Of a bare loop, and of mnist-train with torch's dropout."""
    words = ("conv32_32_dropout", 2, "32-true", "data=digits", "data.batch_size=32", "architecture.dense=[8]")
    program = (str(SCRIPTS / "benchmarks" / "torch_dropout.py"),)
    commands = {"bare": turns.contestant("bare", *words), "torch": turns.ours(*words, program=program)}
    seconds, accuracy = turns.take_turns(commands, 2)
    assert all(len(each) == 2 and min(each) > 0 for each in seconds.values())
    assert all(0.05 < each < 1 for each in accuracy.values()), accuracy
    assert len(set(accuracy.values())) > 1
    assert turns.ratio([9, 2, 4, 6], [1, 1, 1, 2]) == {"median": 3, "lowest": 2, "highest": 4, "pairs": 3}


def test_prediction_is_measured_as_mnist_predict_works(tmp_path):
    np.save(tmp_path / "digits.npy", np.zeros((3, 28, 28), np.uint8))
    predict.classified("pretrained", str(tmp_path / "digits.npy"), "exact", str(tmp_path / "answers.csv"))
    assert len((tmp_path / "answers.csv").read_text().splitlines()) == 1 + 3


def test_communication_counts_every_parameter():
    assert communication.parameters("conv10") == 145_370
