"""scripts/records counts every seed, keeps what is there, and its figures are those of the checkpoints."""

import json
import statistics
import sys
from importlib.machinery import SourceFileLoader

import pytest
import torch
from conftest import CONF, REPOSITORY

from mnist_cnn import load_classifier
from mnist_cnn.data.datasets import load

sys.path.insert(0, str(REPOSITORY / "scripts"))
import record_tables

WORDS = ("data=digits", "epochs=1", "accelerator.precision=32-true", "accelerator=cpu")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """The script, with 100 validation digits and ensembles of three, after a few runs in a folder of its own."""
    script = SourceFileLoader("records", str(REPOSITORY / "scripts" / "records")).load_module()
    script.OUT = tmp_path_factory.mktemp("records")
    script.VALIDATION, script.MEMBERS = 100, {"record_ensemble": {"record_ensemble": 2, "record_single": 1}}
    assert script.main(["speed_99", "seeds=2", *WORDS, "views=5"]) == 0
    assert script.main(["ablation", "speed_99", "seeds=1", *WORDS, "views=5"]) == 0
    assert script.main(["record_ensemble", "seeds=2", *WORDS, "views=1", "architecture.blocks=[]"]) == 0
    return script


def figures(records, name):
    return {int(file.stem[5:]): json.loads(file.read_text()) for file in (records.OUT / name).glob("seed_*.json")}


def test_every_recipe_is_one_that_mnist_train_takes(records):
    for name in records.SEEDS:
        config = records.settings_of([f"experiment={name}"])
        assert (config.selection, config.data.validation) == ("last", 0), name
        assert (CONF / "experiment" / f"{name}.yaml").exists()


def test_a_record_over_seeds(records):
    runs = figures(records, "speed_99")
    assert {1, 2} <= runs.keys()
    test = load("digits", "unused")[1]
    for seed, run in runs.items():
        classifier = load_classifier(records.OUT / "speed_99" / f"seed_{seed}", views=5)
        logits = classifier.logits(test.images)
        wrong = (logits.argmax(1) != test.labels).nonzero().flatten().tolist()
        assert run["incorrect"] == wrong
        assert run["accuracy"] == pytest.approx(1 - len(wrong) / 360)
        assert run["train_seconds"] > 0
        assert run["test_seconds"] > 0
        assert classifier.description.data.seed == seed
        assert run["temperature"] != 1
    layers = 12 * 12 * 16 * 25, 5 * 5 * 32 * 144, 3 * 3 * 96 * 288, 864 * 10
    assert runs[1]["scoring_multiply_adds"] == 5 * 360 * sum(layers)
    assert runs[1]["training_multiply_adds"] == 1437 * (2 * layers[0] + 3 * sum(layers[1:]))


def test_what_is_there_is_kept_and_what_was_cut_short_begins_again(records, capsys):
    first = figures(records, "speed_99")
    (records.OUT / "speed_99" / "seed_2.json").unlink()
    capsys.readouterr()
    assert records.main(["speed_99", "seeds=3", *WORDS, "views=5"]) == 0
    again = figures(records, "speed_99")
    assert sorted(again) == [1, 2, 3]
    assert again[1] == first[1]
    assert again[2]["accuracy"] == first[2]["accuracy"]
    assert "seed_1.json" not in capsys.readouterr().out


def test_runs_of_another_recipe_are_not_mixed_with_them(records, capsys):
    before = figures(records, "speed_99")
    assert records.main(["speed_99", "seeds=4", *WORDS]) == 2
    assert "has runs of another recipe: move it away" in capsys.readouterr().err
    assert figures(records, "speed_99") == before


def test_an_ensemble_is_the_mean_of_its_networks_with_seeds_of_their_own(records):
    runs = figures(records, "record_ensemble")
    assert sorted(runs) == [1, 2]
    test = load("digits", "unused")[1]
    for number, run in runs.items():
        own = [f"seed_{number}/record_ensemble_{seed}" for seed in (2 * number - 1, 2 * number)]
        folders = [records.OUT / "record_ensemble" / name for name in own]
        folders.append(records.OUT / "record_single" / f"seed_{number}")  # the other record's own run
        each = [load_classifier(folder).logits(test.images).softmax(1) for folder in folders]
        wrong = (torch.stack(each).mean(0).argmax(1) != test.labels).nonzero().flatten().tolist()
        assert run["incorrect"] == wrong
        members = [json.loads(folder.with_suffix(".json").read_text()) for folder in folders]
        assert run["train_seconds"] == pytest.approx(sum(member["train_seconds"] for member in members))
        assert run["parameters"] == 3 * 7850
        assert [load_classifier(folder).description.data.seed for folder in folders] == [
            *(2 * number - 1, 2 * number),
            number,
        ]


def test_an_ablation_changes_one_part_each(records):
    parts = {path.name for path in (records.OUT / "speed_99" / "ablation").iterdir()}
    assert parts == {
        "all",
        "without label smoothing",
        "AdamW instead of Muon",
        "without warm-up and decay",
        "without batch norm",
        "with weight averaging",
        "with a fifth of the last block dropped out",
    }
    runs = {
        part: json.loads((records.OUT / "speed_99" / "ablation" / part / "seed_1.json").read_text()) for part in parts
    }
    assert len({run["parameters"] for part, run in runs.items() if part != "without batch norm"}) == 1
    assert runs["without batch norm"]["parameters"] == runs["all"]["parameters"] - (16 + 32 + 96)
    assert runs["all"]["test_seconds"] is None


def test_the_tables_have_every_seed(records, monkeypatch, tmp_path):
    monkeypatch.setattr(record_tables, "RECORDS", tmp_path / "records.json")
    record_tables.written(record_tables.collected(records.OUT))
    recorded = record_tables.recorded()
    text = record_tables.tables(recorded)
    values = [100 * run["accuracy"] for run in figures(records, "speed_99").values()]
    assert f"| `speed_99` | {len(values)} | {statistics.mean(values):.3f} ± {statistics.stdev(values):.3f} |" in text
    assert "23,550 in 3" in text
    assert "| `speed_99` | without label smoothing | 1 |" in text
    assert "| `speed_99` | without several views | 1 |" in text
    assert f"{statistics.mean(values):.3f} ±" in record_tables.claim(recorded, "speed_99")
    assert record_tables.tables({}) == "Not recorded yet."


def test_the_pictures_are_drawn_of_what_is_recorded(records, monkeypatch, tmp_path):
    from mnist_cnn.data import datasets

    for name in ("RECORDS", "CURVES", "MISSED"):
        monkeypatch.setattr(record_tables, name, tmp_path / f"{name}.png")
    read = datasets.load
    monkeypatch.setattr(datasets, "load", lambda name, root: read("digits", root))
    record_tables.written(record_tables.collected(records.OUT))
    assert records.main(["pictures"]) == 0
    for name in ("CURVES", "MISSED"):
        picture = (tmp_path / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) < 200_000


def test_the_interval_of_a_mean():
    """Student's t for three values: 4.303 standard errors."""
    low, high = map(float, record_tables.interval([1.0, 2.0, 3.0]).split(" to "))
    assert (low, high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)


@pytest.mark.parametrize("words", [["speed_98"], ["seeds=0"], ["seeds=x", "speed_99"], ["ablate"]])
def test_a_wrong_command_shows_the_usage(records, capsys, words):
    assert records.main(words) == 2
    assert "usage: scripts/records" in capsys.readouterr().err


def test_a_wrong_override_is_one_line(records, capsys):
    assert records.main(["speed_99", "epoch=3"]) == 2
    assert capsys.readouterr().err == "error: unknown key epoch; did you mean epochs?\n"
