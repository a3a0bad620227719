"""mnist-evaluate, mnist-predict and the Python interface, from a checkpoint alone."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from mnist_cnn import load_classifier
from mnist_cnn.config.schema import UserError
from mnist_cnn.data.datamodule import MNISTDataModule
from mnist_cnn.data.datasets import load
from mnist_cnn.inference.metrics import score, wilson_interval


@pytest.fixture(scope="module")
def test_digits():
    return load("digits", "unused")[1]


def test_evaluate_repeats_the_figures_of_the_run(run, trained):
    ended = run("mnist-evaluate", f"checkpoint={trained}")
    assert (ended.status, ended.err) == (0, "")
    figures = json.loads((ended.folder() / "evaluation.json").read_text())
    recorded = json.loads((trained / "metrics.json").read_text())
    assert figures["accuracy"] == recorded["test/accuracy"]
    assert figures["loss"] == pytest.approx(recorded["test/loss"])
    assert figures["accuracy_low"] < figures["accuracy"] < figures["accuracy_high"]
    assert "calibration error" in ended.out
    assert re.search(r"^class +precision +recall +F1 +digits$", ended.out, flags=re.MULTILINE)
    assert {file.name for file in (ended.folder() / "plots").iterdir()} == {
        "confusion_matrix.png",
        "incorrect_digits.png",
    }


def test_evaluate_on_the_digits_that_the_run_held_out(run, trained):
    ended = run("mnist-evaluate", f"checkpoint={trained}", "split=validation", "plots=false")
    figures = json.loads((ended.folder() / "evaluation.json").read_text())
    assert figures["accuracy"] == json.loads((trained / "metrics.json").read_text())["val/accuracy"]
    assert "144 digits" in ended.out


def test_evaluate_on_other_data(run, trained, mnist_root):
    ended = run("mnist-evaluate", f"checkpoint={trained}", "data=mnist", f"data.root={mnist_root}", "plots=false")
    assert "10,000 digits" in ended.out


def test_incorrect_digits_are_listed_with_their_probabilities(run, trained, test_digits):
    folder = run("mnist-evaluate", f"checkpoint={trained}", "plots=false").folder()
    rows = list(csv.DictReader((folder / "incorrect.csv").open()))
    predicted = load_classifier(trained).predict(test_digits.images)
    wrong = [i for i, label in enumerate(test_digits.labels.tolist()) if predicted[i] != str(label)]
    assert [int(row["index"]) for row in rows] == wrong
    for row in rows:
        probabilities = [float(row[f"probability {name}"]) for name in range(10)]
        assert sum(probabilities) == pytest.approx(1)
        assert int(row["predicted"]) == int(np.argmax(probabilities))
        assert int(row["expected"]) == int(test_digits.labels[int(row["index"])])


def test_probabilities_of_single_digits_to_ten_decimals(run, trained):
    out = run("mnist-evaluate", f"checkpoint={trained}", "probabilities=[3,359]", "plots=false").out
    assert re.search(r"^digit 3, expected \d$", out, flags=re.MULTILINE)
    lines = re.findall(r"^(\d): (\d+\.\d{10})%$", out, flags=re.MULTILINE)
    assert [name for name, _ in lines] == list("0123456789") * 2
    assert sum(float(value) for _, value in lines[:10]) == pytest.approx(100)


def test_predict_prints_label_and_probability(run, trained, digit):
    ended = run("mnist-predict", f"checkpoint={trained}", f"images={digit}")
    assert (ended.status, ended.err) == (0, "")
    expected = load_classifier(trained).probabilities(np.asarray(Image.open(digit)))[0]
    assert re.search(
        rf"digit 0 \(first\)\.png +{expected.argmax()} +{expected.max():.4f} ", ended.out, flags=re.MULTILINE
    )


def test_predict_reads_folders_and_leaves_nothing(run, trained, tmp_path, test_digits):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for index, place in enumerate(["b.png", "a.bmp", "deep/c.gif", "deep/d.tif"]):
        Image.fromarray(test_digits.images[index, 0].numpy()).save(tmp_path / "in" / place)
    (tmp_path / "in" / "notes.txt").write_text("not a picture")
    before = set(tmp_path.rglob("*"))
    out = run("mnist-predict", f"checkpoint={trained}/checkpoints/last.ckpt", "images=in").out
    assert [line.split()[0] for line in out.splitlines()[1:]] == [
        "in/a.bmp",
        "in/b.png",
        "in/deep/c.gif",
        "in/deep/d.tif",
    ]
    assert set(tmp_path.rglob("*")) == before


def test_classifier_takes_any_of_the_shapes(trained, test_digits):
    classifier = load_classifier(trained, device="cpu")
    images = test_digits.images[:5]
    expected = classifier.probabilities(images)
    assert expected.shape == (5, 10)
    assert expected.dtype == np.float32
    np.testing.assert_allclose(expected.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(classifier.probabilities(images[:, 0].numpy()), expected)
    np.testing.assert_allclose(classifier.probabilities(images[2, 0])[0], expected[2], atol=1e-6)
    assert classifier.predict(images) == [str(index) for index in expected.argmax(1)]
    for wrong in (np.zeros((3, 20, 20), np.uint8), np.zeros((28, 28))):
        with pytest.raises(UserError, match="expects uint8"):
            classifier.probabilities(wrong, mode="exact")
        with pytest.raises(UserError, match="picture 0: there is no digit in it: the picture is blank"):
            classifier.probabilities(wrong)


def test_the_figures_are_those_of_the_textbook():
    logits = torch.tensor([[4.0, 0, 0], [0, 4, 0], [0, 4, 0], [0, 0, 4]])
    scores = score(logits, torch.tensor([0, 1, 2, 2]))
    assert scores.accuracy == 0.75
    np.testing.assert_array_equal(scores.confusion, [[1, 0, 0], [0, 1, 0], [0, 1, 1]])
    np.testing.assert_allclose(scores.per_class[:, 0], [1, 0.5, 1])  # precision
    np.testing.assert_allclose(scores.per_class[:, 1], [1, 1, 0.5])  # recall
    np.testing.assert_allclose(scores.per_class[:, 2], [1, 2 / 3, 2 / 3])  # F1
    confidence = torch.softmax(logits, 1).max().item()
    assert scores.calibration_error == pytest.approx(abs(confidence - 0.75), abs=1e-6)
    # Newcombe (1998), Statistics in Medicine 17, table I: 81 of 263.
    np.testing.assert_allclose(wilson_interval(81, 263), (0.2553, 0.3662), atol=5e-5)


def test_lightnings_own_test_loop_scores_every_digit_once(trained, test_digits):
    """The LightningModule and DataModule are public: a Trainer of the user's own gets the same figures."""
    import pytorch_lightning as pl

    from mnist_cnn.models.checkpoint import rebuild
    from mnist_cnn.training.module import DigitClassifier

    network, _ = rebuild(trained)
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    (figures,) = trainer.test(DigitClassifier(network), MNISTDataModule("digits"), verbose=False)
    assert figures["test/accuracy"] == pytest.approx(
        json.loads((trained / "metrics.json").read_text())["test/accuracy"]
    )


def test_pictures_can_be_read(trained):
    for picture in (trained / "plots").glob("*.png"):
        with Image.open(picture) as opened:
            pixels = np.asarray(opened.convert("L"))
            assert min(pixels.shape) >= 300, picture
            assert pixels.std() > 5, picture  # not blank
