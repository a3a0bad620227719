"""Pictures and data of one's own, and data sets that torchvision reads."""

import bz2
import csv
import json
import os
import shutil

import numpy as np
import pytest
import torch
import torchvision
from conftest import QUICK, said
from PIL import Image

from mnist_cnn.data import image_folder
from mnist_cnn.data.datasets import load
from mnist_cnn.models.checkpoint import read_checkpoint
from mnist_cnn.pictures.digit_image import in_mnist_form


def written(folder, part=slice(0, 200), classes="0123456789"):
    """Digits of scikit-learn's as PNGs in a folder for each class."""
    digits = load("digits", "unused").train
    for number, (image, label) in enumerate(zip(digits.images[part], digits.labels[part], strict=True)):
        place = folder / classes[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 - image[0].numpy()).resize((60, 60)).save(place / f"{number:03}.png")


def test_a_folder_of_pictures_is_read_once(tmp_path, monkeypatch):
    written(tmp_path / "mine")
    (tmp_path / "mine" / ".hidden").mkdir()
    train, test, classes = load("folder", tmp_path / "mine", 0.2)
    assert classes == list("0123456789")
    assert len(train.labels) + len(test.labels) == 200
    assert 36 <= len(test.labels) <= 44  # each class is rounded
    assert train.images.shape[1:] == (1, 28, 28)
    assert train.images.dtype == torch.uint8
    assert in_mnist_form(train.images[0, 0].numpy())
    assert test.labels.bincount(minlength=10).min() >= 3  # stratified
    (tmp_path / "mine" / "3" / "again.png").write_bytes(next((tmp_path / "mine" / "3").iterdir()).read_bytes())
    more = load("folder", tmp_path / "mine", 0.2)
    known = {bytes(image.numpy()) for image in train.images}
    assert len(more.train.labels) + len(more.test.labels) == 201
    assert sum(bytes(image.numpy()) in known for image in more.test.images) <= 2  # pictures keep their part
    (tmp_path / "mine" / "3" / "again.png").unlink()
    monkeypatch.setattr(image_folder, "mnist_form", lambda _: pytest.fail("read again"))
    again = load("folder", tmp_path / "mine", 0.2)
    assert torch.equal(again.train.images, train.images)
    assert torch.equal(again.test.labels, test.labels)
    os.utime(next((tmp_path / "mine" / "3").iterdir()), (1, 1))
    with pytest.raises(pytest.fail.Exception, match="read again"):
        load("folder", tmp_path / "mine", 0.2)


def test_a_class_is_one_line(run, tmp_path):
    written(tmp_path / "mine")
    (tmp_path / "mine" / "9").rename(tmp_path / "mine" / "9\nssh-ed25519 AAAA")
    said(
        run("mnist-train", "data=folder", "data.root=mine"), r"'9\nssh-ed25519 AAAA'", "the name of a class is one line"
    )


def test_a_network_learns_ones_own_hand(run, tmp_path, trained, monkeypatch):
    """As the README has it: 200 pictures of one's own, from a network that knows digits."""
    written(tmp_path / "mine")
    words = ("data=folder", "data.root=mine", "epochs=2", "plots=false", f"initialize={trained}", "data.validation=0")
    ended = run("mnist-train", *words, "data.test=0.25", "freeze=blocks", "optimizer.lr=1e-4")
    assert ended.status == 0
    assert "(150, 1, 28, 28)" in ended.out
    assert read_checkpoint(ended.folder())[1].data.test == 0.25
    evaluated = run("mnist-evaluate", f"checkpoint={ended.folder()}", "data.root=mine", "plots=false")
    assert evaluated.status == 0
    assert "50 digits" in evaluated.out or "of 50" in evaluated.out
    monkeypatch.setenv("MNIST_CNN_DATA", "nowhere")
    said(run("mnist-evaluate", f"checkpoint={ended.folder()}", "plots=false"), "data.root=nowhere is no folder")


def test_a_folder_scores_a_network_that_never_saw_it(run, tmp_path, trained):
    """All its pictures do, by the names of their folders, though one class is missing."""
    written(tmp_path / "mine")
    shutil.rmtree(tmp_path / "mine" / "4")
    (tmp_path / "mine" / "3" / "notes.txt").write_text("no picture")
    count = len(list((tmp_path / "mine").rglob("*.png")))
    ended = run("mnist-evaluate", f"checkpoint={trained}", "data=folder", "data.root=mine", "plots=false")
    assert ended.status == 0, ended.err
    assert ended.err == "warning: left out as no picture: 1 file (.txt), such as mine/3/notes.txt\n"
    found = list(csv.DictReader((ended.folder() / "incorrect.csv").open()))
    accuracy = json.loads((ended.folder() / "evaluation.json").read_text())["accuracy"]
    assert accuracy == pytest.approx(1 - len(found) / count)
    assert accuracy > 0.5  # the network learned another rendering of these digits


def test_a_folder_with_a_test_part_of_its_own(run, tmp_path):
    written(tmp_path / "mine" / "train", slice(0, 120), "abcdefghij")
    written(tmp_path / "mine" / "test", slice(120, 160), "abcdefghij")
    train, test, classes = load("folder", tmp_path / "mine")
    assert classes == list("abcdefghij")
    assert (len(train.labels), len(test.labels)) == (120, 40)
    (tmp_path / "mine" / "test" / "z").mkdir()
    said(run("mnist-train", "data=folder", "data.root=mine"), "mine/test has the class z")


def test_what_is_wrong_in_a_folder_is_named(run, tmp_path):
    said(run("mnist-train", "data=folder"), "data.root is missing; give data.root=")
    said(run("mnist-train", "data=folder", "data.root=nowhere"), "nowhere")
    (tmp_path / "mine" / "a").mkdir(parents=True)
    said(run("mnist-train", "data=folder", "data.root=mine"), "mine has 1 folders of classes", "mine/<class>/*.png")
    (tmp_path / "both" / "test").mkdir(parents=True)
    said(run("mnist-train", "data=folder", "data.root=both"), "both has a folder test and none called train")
    written(tmp_path / "mine", slice(0, 60))
    said(run("mnist-train", "data=folder", "data.root=mine"), "mine/a has 0 pictures")
    (tmp_path / "mine" / "a").rmdir()
    (tmp_path / "mine" / "3" / "gone.png").symlink_to("nowhere.png")
    said(run("mnist-train", "data=folder", "data.root=mine"), "mine/3/gone.png cannot be read")
    (tmp_path / "mine" / "3" / "gone.png").unlink()
    (tmp_path / "mine" / "3" / "._000.png").write_bytes(b"what macOS leaves")
    (tmp_path / "mine" / "5" / "blank.png").write_bytes(b"not a picture")
    said(run("mnist-train", "data=folder", "data.root=mine"), "mine/5/blank.png", "take it out")


def test_a_run_is_not_continued_with_other_classes(run, tmp_path):
    written(tmp_path / "mine", slice(0, 60))
    folder = run("mnist-train", "data=folder", "data.root=mine", *QUICK[1:]).folder()
    (tmp_path / "mine" / "3").rename(tmp_path / "mine" / "three")
    said(run("mnist-train", f"resume={folder}", "epochs=2"), "was trained on the classes 0, 1, 2, 3, 4", "8, 9, three")


OWN_DATA = """
import numpy
from sklearn.datasets import load_digits

def halves():
    small = load_digits()
    images = numpy.zeros((1797, 28, 28), numpy.uint8)
    images[:, 6:22, 6:22] = numpy.kron(small.images * 15, numpy.ones((2, 2)))
    first = small.target < 5
    return (images[:1500], first[:1500]), (images[1500:], first[1500:]), ["5 to 9", "0 to 4"]

def same():
    return *halves()[:2], "aa"

def ends():
    raise SystemExit(0)

def torn():
    return (numpy.zeros((4, 28, 28), numpy.uint8), [0, 1, 2, 9]), (numpy.zeros((4, 28, 28), numpy.uint8), [0] * 4), "ab"
"""


def test_data_of_ones_own_function(run, tmp_path, monkeypatch):
    (tmp_path / "my_digits.py").write_text(OWN_DATA)
    monkeypatch.syspath_prepend(tmp_path)
    words = ("epochs=1", "plots=false", "architecture=conv10")
    ended = run("mnist-train", "data._target_=my_digits.halves", *words)
    assert ended.status == 0, ended.err
    assert "5 to 9: " in ended.out
    folder = ended.folder()
    assert read_checkpoint(folder)[1].classes == ["5 to 9", "0 to 4"]
    said(run("mnist-evaluate", f"checkpoint={folder}", "plots=false"), "my_digits.halves", "name it again")
    own = ("data=mnist", "data._target_=my_digits.halves")
    assert run("mnist-evaluate", f"checkpoint={folder}", *own, "plots=false").status == 0
    said(run("mnist-train", "data._target_=my_digits.torn", *words), "my_digits.torn", "each from 0 to 1")
    said(run("mnist-train", "data._target_=my_digits.same", *words), "two classes have one name")
    said(run("mnist-train", "data._target_=my_digits.ends", *words), "my_digits.ends gives no data")
    said(run("mnist-train", "data._target_=my_digit.halves", *words), "my_digit.halves", "No module named")
    said(run("mnist-train", "data._target_=halves", *words), "data.name=halves: expected one of")


def idx(array):
    kinds = {"uint8": 8, ">i4": 12}
    kind = next(code for name, code in kinds.items() if array.dtype == np.dtype(name))
    return bytes([0, 0, kind, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (6, 28, 28)).astype(np.uint8)


@pytest.mark.parametrize(("split", "first", "classes"), [("balanced", 0, 47), ("letters", 1, 26), ("digits", 0, 10)])
def test_emnist_in_the_files_that_it_has(tmp_path, split, first, classes):
    """No download is possible in a test: small files in the published layout stand for the large ones."""
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    labels = np.array([first, first + 1, first + 2, first + 3, first + 4, classes - 1 + first], np.uint8)
    for part in ("train", "test"):
        (raw / f"emnist-{split}-{part}-images-idx3-ubyte").write_bytes(idx(PIXELS))
        (raw / f"emnist-{split}-{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    train, test, names = load(f"emnist_{split}", tmp_path)
    assert len(names) == len(set(names)) == classes
    assert names == [name for name in torchvision.datasets.EMNIST.classes_split_dict[split] if name != "N/A"]
    assert train.labels.tolist() == [0, 1, 2, 3, 4, classes - 1]
    assert torch.equal(test.images[0, 0], torch.from_numpy(PIXELS[0].T.copy()))  # stored transposed


def test_qmnist_in_the_files_that_it_has(tmp_path):
    raw = tmp_path / "QMNIST" / "raw"
    raw.mkdir(parents=True)
    labels = np.tile(np.arange(6)[:, None], (1, 8)).astype(">i4")
    for part in ("train", "test"):
        (raw / f"qmnist-{part}-images-idx3-ubyte").write_bytes(idx(PIXELS))
        (raw / f"qmnist-{part}-labels-idx2-int").write_bytes(idx(labels))
    train, _, names = load("qmnist", tmp_path)
    assert torch.equal(train.images[:, 0], torch.from_numpy(PIXELS))
    assert (train.labels.tolist(), names) == ([0, 1, 2, 3, 4, 5], list("0123456789"))


def test_usps_in_the_files_that_it_has(tmp_path):
    """16×16, written as numbers from -1 to 1, labels from 1."""
    small = RANDOM.uniform(-1, 1, (4, 256))
    text = "\n".join(
        f"{label + 1} " + " ".join(f"{i + 1}:{v:.4f}" for i, v in enumerate(row)) for label, row in enumerate(small)
    )
    (tmp_path / "USPS").mkdir()
    for name in ("usps.bz2", "usps.t.bz2"):
        (tmp_path / "USPS" / name).write_bytes(bz2.compress(text.encode()))
    train, test, _ = load("usps", tmp_path)
    assert train.images.shape == (4, 1, 28, 28)
    assert test.labels.tolist() == [0, 1, 2, 3]
    assert not train.images[:, :, :4].any()
    assert train.images[0, 0, 4:24, 4:24].float().mean() == pytest.approx(127.5 * (small[0].mean() + 1), abs=3)
