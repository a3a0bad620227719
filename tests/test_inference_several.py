"""Pictures of several digits: each is found, in reading order."""

import csv

import numpy as np
import pytest
from PIL import Image

from mnist_cnn import load_classifier
from mnist_cnn.config.schema import UserError
from mnist_cnn.data.datasets import load

HELD_OUT = load("digits", "unused")[1]
HEIGHT = 60


def glyph(index):
    """A test digit of scikit-learn's, ink 0–1, 60 pixels high, and its label."""
    image = HELD_OUT.images[index, 0].numpy()
    rows, columns = (np.flatnonzero((image > 100).any(axis)) for axis in (1, 0))
    image = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    size = max(4, round(HEIGHT * image.shape[1] / image.shape[0])), HEIGHT
    digit = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) / 255
    return digit * (digit > 0.4), int(HELD_OUT.labels[index])


def number(indices, gap=16, margin=30):
    """Digits side by side, ink 0–1 (H, W), their labels, and their boxes."""
    page = np.zeros((HEIGHT + 2 * margin, 2 * margin + len(indices) * (2 * HEIGHT + gap)))
    left, labels, boxes = margin, "", []
    for index in indices:
        digit, label = glyph(index)
        region = page[margin : margin + HEIGHT, left : left + digit.shape[1]]
        np.maximum(region, digit, out=region)
        boxes.append((left, margin, left + digit.shape[1], margin + HEIGHT))
        left += digit.shape[1] + gap
        labels += str(label)
    return page[:, : left - gap + margin], labels, boxes


def dark_on_light(ink):
    return np.rint(255 * (1 - ink)).astype(np.uint8)


def coloured(ink):
    return np.rint(np.array([60, 130, 60]) + np.array([140, -70, 0]) * ink[..., None]).astype(np.uint8)


def photo(ink):
    y, x = np.mgrid[-1 : 1 : ink.shape[0] * 1j, -1 : 1 : ink.shape[1] * 1j]
    light = (1 + 0.2 * x - 0.15 * y) * (1 - 0.25 / (1 + np.exp(-6 * (x + y))))  # a shadow with soft edges
    noise = np.random.default_rng(0).normal(0, 4, (*ink.shape, 3))
    return ((210 - 160 * ink[..., None]) * light[..., None] + noise).clip(0, 255).astype(np.uint8)


def on_a_large_canvas(ink):
    return np.pad(dark_on_light(ink), ((700, 200), (300, 900)), constant_values=255)


@pytest.fixture(scope="module")
def classifier():
    return load_classifier("pretrained", "cpu")


KINDS = {
    "dark on light": dark_on_light,
    "light on dark": lambda ink: np.rint(255 * ink).astype(np.uint8),
    "coloured": coloured,
    "photo": photo,
    "large canvas": on_a_large_canvas,
}


def labels_of(classifier, picture):
    return "".join(digit.label for digit in classifier.read(picture))


def agreement(pairs):
    """The fraction of digits that are right; each number has as many as it should."""
    assert [len(found) for found, _ in pairs] == [len(labels) for _, labels in pairs]
    hits = [a == b for found, labels in pairs for a, b in zip(found, labels, strict=True)]
    return sum(hits) / len(hits)


@pytest.mark.parametrize("kind", KINDS)
def test_the_digits_of_a_number(classifier, kind):
    pairs = []
    for first in range(0, 40, 5):
        ink, labels, _ = number(range(first, first + 5))
        pairs.append((labels_of(classifier, KINDS[kind](ink)), labels))
    assert agreement(pairs) >= 0.8


def test_lines_are_read_from_the_top_down_and_dots_and_dashes_left_out(classifier):
    first, upper, _ = number([0, 1, 2, 3], gap=40)
    second, lower, _ = number([4, 5, 6], gap=40)
    first[80:90, 100 + np.flatnonzero(first.max(0)[100:] == 0)[:8]] = 1  # a dot in the gap after the second digit
    second[55:62, 100 + np.flatnonzero(second.max(0)[100:] == 0)[8:30]] = 1
    width = max(first.shape[1], second.shape[1])
    page = np.concatenate([np.pad(one, ((0, 0), (0, width - one.shape[1]))) for one in (first, second)])
    assert agreement([(labels_of(classifier, dark_on_light(page)), upper + lower)]) >= 0.8


def test_each_digit_has_its_box(classifier):
    ink, _, boxes = number([0, 1, 2])
    found = [digit.box for digit in classifier.read(on_a_large_canvas(ink))]
    np.testing.assert_allclose(found, np.add(boxes, (300, 700, 300, 700)), atol=10)


def test_a_box_is_in_the_pixels_of_a_picture_that_was_scaled_down(classifier, tmp_path):
    ink, _, boxes = number([0, 1, 2])
    page = np.pad(np.kron(dark_on_light(ink), np.ones((12, 12), np.uint8)), ((900, 2900), (0, 0)), constant_values=255)
    assert page.size > 12_000_000
    Image.fromarray(page).save(tmp_path / "large.png", compress_level=1)
    found = [digit.box for digit in classifier.read(tmp_path / "large.png")]
    np.testing.assert_allclose(found, np.add(np.multiply(12, boxes), (0, 900, 0, 900)), atol=40)


def test_digits_that_touch_are_parted(classifier):
    pairs = [number([index, index + 1], gap=-2) for index in range(0, 40, 2)]
    counts = [len(labels_of(classifier, dark_on_light(ink))) for ink, *_ in pairs]
    assert np.mean(np.array(counts) == 2) >= 0.5


def test_a_broken_stroke_parts_no_digit(classifier):
    counts = []
    for index in range(0, 40, 2):
        ink, _, boxes = number([index, index + 1])
        ink[60:63, : boxes[0][2]] = 0
        counts.append(len(classifier.read(dark_on_light(ink))))
    assert np.mean(np.array(counts) == 2) >= 0.9


def test_one_digit_is_one(classifier):
    counts = [len(classifier.read(dark_on_light(number([index])[0]))) for index in range(40)]
    assert np.mean(np.array(counts) == 1) >= 0.95


def test_a_picture_without_a_digit_is_an_error(classifier):
    random = np.random.default_rng(0)
    for picture in (np.full((60, 60), 255, np.uint8), random.integers(0, 256, (90, 90)).astype(np.uint8)):
        with pytest.raises(UserError, match="there is no digit in it"):
            classifier.read(picture)


# --- the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """One of a single digit, one of three, and one of none."""
    Image.fromarray(dark_on_light(number([0])[0])).save(tmp_path / "1.png")
    Image.fromarray(dark_on_light(number([0, 1, 2])[0])).save(tmp_path / "2.png")
    Image.new("L", (60, 60), 255).save(tmp_path / "3.png")
    return tmp_path


def test_a_row_for_each_digit_with_its_box_and_the_number(run, trained, pictures):
    words = (f"checkpoint={trained}", "images='?.png'", "digits=several")
    ended = run("mnist-predict", *words, "output=out.csv", "grid=grid.png")
    assert (ended.status, ended.err) == (1, "error: 3.png there is no digit in it: the picture is blank\n")
    rows = list(csv.DictReader((pictures / "out.csv").open()))
    assert [row["path"] for row in rows] == ["1.png", "2.png", "2.png", "2.png", "3.png"]
    three = "".join(row["label"] for row in rows[1:4])
    assert [row["number"] for row in rows] == [rows[0]["label"], three, three, three, ""]
    assert [len(row["box"].split()) for row in rows] == [4, 4, 4, 4, 0]
    grid = np.asarray(Image.open(pictures / "grid.png").convert("RGB")).astype(int)
    assert (grid[..., 0] - grid[..., 1] > 150).any()  # red boxes
    lines = run("mnist-predict", *words).out.splitlines()
    assert lines[3].split() == ["2.png", three]
    assert all(line.endswith(f"at {row['box']}") for line, row in zip(lines[4:7], rows[1:4], strict=True))


def test_one_digit_a_picture_is_the_default(run, trained, pictures):
    ended = run("mnist-predict", f"checkpoint={trained}", "images=1.png", "output=out.csv")
    assert ended.status == 0
    assert "box" not in next(csv.DictReader((pictures / "out.csv").open()))


def test_what_cannot_be_several(run, trained, pictures):
    ended = run("mnist-predict", f"checkpoint={trained}", "images=1.png", "digits=several", "mode=exact")
    assert (ended.status, ended.err.count("\n"), "digits=several" in ended.err) == (2, 1, True)
    ended = run("mnist-predict", f"checkpoint={trained}", "images=1.png", "digits=severl")
    assert (ended.status, ended.err.count("\n"), "several" in ended.err) == (2, 1, True)
