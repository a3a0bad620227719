"""Pictures of every kind to predictions: the form, sources, files, evaluation, ensembles, calibration, export."""

import csv
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import said
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage
from torch.nn import functional as F

from mnist_cnn import load_classifier
from mnist_cnn.config.schema import UserError
from mnist_cnn.data.corruptions import CORRUPTIONS
from mnist_cnn.data.datasets import load
from mnist_cnn.inference.classifier import mean_logits, shifted
from mnist_cnn.inference.metrics import fit_temperature, score, sure_from, wilson_interval
from mnist_cnn.inference.robustness import score_corruptions
from mnist_cnn.models.checkpoint import read_checkpoint
from mnist_cnn.pictures.digit_image import in_mnist_form, mnist_form, readings


@pytest.fixture(scope="module")
def held_out():
    """scikit-learn's 360 test digits."""
    return load("digits", "unused")[1]


# --- a picture becomes 28×28 -------------------------------------------------------------------------------


def drawn():
    """A seven in MNIST's form, drawn here: a bar and a slanting stroke."""
    page = np.zeros((200, 200), np.uint8)
    page[40:60, 50:150] = 255
    for row in range(60, 170):
        left = 130 - (row - 60) // 2
        page[row, left : left + 20] = 255
    return mnist_form(page)


SEVEN = drawn()


def on_page(ink, paper, side=84, room=40, at=(9, 21)):
    """The seven in a colour on paper of another, uint8 (H, W, channels)."""
    ink_fraction = np.zeros((side + room, side + room, 1))
    digit = Image.fromarray(SEVEN).resize((side, side), Image.Resampling.BICUBIC)
    ink_fraction[at[0] : at[0] + side, at[1] : at[1] + side, 0] = np.asarray(digit) / 255
    return np.rint(np.array(paper) * (1 - ink_fraction) + np.array(ink) * ink_fraction).astype(np.uint8)


def rgba(ink=(20, 60, 200)):
    alpha = on_page([255], [0])
    return np.dstack([np.broadcast_to(np.array(ink, np.uint8), (*alpha.shape[:2], 3)), alpha])


def uneven():
    picture = on_page([40], [240])[..., 0].astype(float)
    return (picture * np.linspace(1, 0.5, picture.shape[1])).astype(np.uint8)


def palette():
    return Image.fromarray(on_page((200, 30, 30), (250, 250, 200))).convert("P", palette=Image.Palette.ADAPTIVE)


def jpeg():
    file = io.BytesIO()
    Image.fromarray(on_page([10], [250])[..., 0]).save(file, "JPEG", quality=30)
    return Image.open(file)


PICTURES = {
    "dark on light": lambda: on_page([0], [255])[..., 0],
    "light on dark": lambda: on_page([255], [0])[..., 0],
    "little contrast": lambda: on_page([140], [100])[..., 0],
    "colours of one brightness": lambda: on_page((200, 60, 60), (60, 130, 60)),
    "palette": palette,
    "16 bit": lambda: Image.fromarray(on_page([0], [255])[..., 0].astype(np.uint16) * 257),
    "float": lambda: on_page([0], [255])[..., 0] / 255,
    "one bit": lambda: Image.fromarray(on_page([0], [255])[..., 0]).convert("1", dither=Image.Dither.NONE),
    "transparent": rgba,
    "white on transparent": lambda: rgba((255, 255, 255)),
    "uneven light": uneven,
    "JPEG": jpeg,
    "small": lambda: np.asarray(Image.fromarray(on_page([0], [255], 28, 0, (0, 0))[..., 0])),
    "on a large canvas": lambda: np.pad(on_page([0], [255])[..., 0], ((900, 100), (10, 1500)), constant_values=255),
    "large": lambda: np.kron(on_page([0], [255])[..., 0], np.ones((12, 12), np.uint8)),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_any_picture_comes_to_the_same_form(kind):
    form = mnist_form(PICTURES[kind]())
    assert (form.shape, form.dtype) == ((28, 28), np.uint8)
    # The centre of mass may round to the next pixel: the same digit, one row or column aside.
    moved = [np.roll(form, shift, (0, 1)).astype(float) for shift in ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))]
    assert min(np.abs(one - SEVEN).mean() for one in moved) < 9
    assert in_mnist_form(form)


def test_the_table_beside_a_photographed_page_is_not_the_digit():
    """Pen strokes on a page lit unevenly, once alone and once with the dark table's corner in the picture."""
    random = np.random.default_rng(0)
    page = Image.new("L", (600, 800), 255)
    draw = ImageDraw.Draw(page)
    draw.line([(240, 300), (360, 300), (280, 480)], fill=40, width=16, joint="curve")
    y, x = np.mgrid[:800, :600]
    light = 0.6 + 0.35 * np.exp(-(((x - 450) / 500) ** 2) - ((y - 200) / 600) ** 2)
    photo = np.asarray(page) * light + random.normal(0, 4, light.shape)
    table = np.where((x < 25) | (y < 18) | (x + y > 1300), 70.0, photo)
    alone, beside = (mnist_form(picture.clip(0, 255).astype(np.uint8)).astype(float) for picture in (photo, table))
    assert np.corrcoef(alone.ravel(), beside.ravel())[0, 1] > 0.9


def stroke(points, width, side=120, blur=0):
    """Ink 0–1 of a pen that goes through points, each in 0–1 as (x, y)."""
    page = Image.new("L", (side, side))
    draw = ImageDraw.Draw(page)
    at = [(x * side, y * side) for x, y in points]
    draw.line(at, fill=255, width=width, joint="curve")
    return np.asarray(page.filter(ImageFilter.GaussianBlur(blur))) / 255


def alike(one, other):
    return np.corrcoef(one.astype(float).ravel(), other.astype(float).ravel())[0, 1]


TWO = [(0.2, 0.25), (0.5, 0.12), (0.8, 0.3), (0.2, 0.85), (0.85, 0.85)]
FOUR = [(0.7, 0.9), (0.7, 0.1), (0.2, 0.6), (0.9, 0.6)]


def test_broad_strokes_that_fill_a_photo_stay_ink():
    ink = stroke(TWO, 26, blur=1)
    rows, columns = (np.flatnonzero(ink.max(axis) > 0.5) for axis in (1, 0))
    cut = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    light = np.linspace(150, 200, cut.shape[1]) + np.random.default_rng(0).normal(0, 3, cut.shape)
    forms = readings(light * (1 - 0.8 * cut))
    assert max(alike(form, mnist_form(1 - ink)) for form in forms) > 0.95


@pytest.mark.parametrize(("angle", "soft"), [(1.5, 0), (2.2, 0), (4.0, 6)])
def test_a_shadow_with_an_edge_is_not_the_digit(angle, soft):
    """Where it is half as bright; without grain, so that most of the border has one colour."""
    y, x = np.mgrid[-1:1:300j, -1:1:300j]
    shade = ndimage.gaussian_filter((np.cos(angle) * x + np.sin(angle) * y > 0.5).astype(float), soft)
    ink = np.pad(stroke(FOUR, 12, 200, blur=1), 50)
    forms = readings((230 * (1 - 0.5 * shade) * (1 - 0.8 * ink)).astype(np.uint8))
    assert max(alike(form, mnist_form(1 - ink)) for form in forms) > 0.9


@pytest.mark.parametrize("background", [0, 255])
def test_the_axes_of_a_plot_are_not_the_digit(background):
    """As matplotlib saves it: white, black axes with ticks and their numbers, and a picture of a digit in them."""
    plot = Image.new("L", (240, 240), 255)
    draw = ImageDraw.Draw(plot)
    draw.rectangle((39, 29, 190, 180), outline=0)
    for tick in range(45, 180, 25):
        draw.line((34, tick, 39, tick), fill=0)
        draw.line((tick, 180, tick, 185), fill=0)
        draw.text((20, tick - 5), str(tick // 9), fill=0)
        draw.text((tick - 4, 190), str(tick // 9), fill=0)
    ink = np.pad(stroke(FOUR, 10), 15)
    plot.paste(Image.fromarray(np.abs(background - 255 * ink).astype(np.uint8)), (40, 30))
    assert alike(mnist_form(plot), mnist_form(1 - ink)) > 0.9


def test_a_broken_stroke_is_no_noise():
    ink = stroke(FOUR, 8, 190, blur=1)
    broken = ink.copy()
    broken[::24] = broken[1::24] = broken[:, ::24] = broken[:, 1::24] = 0
    assert alike(mnist_form(1 - broken), mnist_form(1 - ink)) > 0.85


def test_ink_may_have_two_colours():
    ink = stroke(TWO, 12)[..., None]
    colours = np.where(np.arange(120)[:, None, None] < 50, (0, 255, 255), (255, 0, 0))
    assert alike(mnist_form(255 - ink * (255 - colours)), mnist_form(255 - ink[..., 0] * 255)) > 0.95
    assert mnist_form(np.where(np.arange(60)[:, None, None] < 30, (0, 255, 255), (255, 0, 0))).any()  # at right angles


def test_specks_are_not_noise_and_noise_is():
    random = np.random.default_rng(0)
    chance = random.random((28, 28))
    digit = np.roll(SEVEN, 1, 0)
    specks = np.where(chance < 0.1, 0, np.where(chance < 0.2, 255, digit)).astype(np.uint8)
    assert alike(readings(specks)[0], SEVEN) > 0.6
    with pytest.raises(UserError, match="only noise"):
        readings(np.where(chance < 0.2, 255, 0).astype(np.uint8))


def test_the_network_takes_the_reading_that_it_is_surest_of(trained):
    """A white border is paper to the form; the picture as it is has the digit where MNIST has it."""
    classifier = load_classifier(trained)
    assert len(readings(SEVEN)) == 1
    bordered = np.pad(SEVEN[2:-2, 2:-2], 2, constant_values=255)
    assert any(np.array_equal(one, bordered) for one in readings(bordered))
    both = readings(np.roll(SEVEN, (3, 4), (0, 1)))
    assert len(both) == 2
    sure = classifier.probabilities(np.stack(both), mode="exact").max(1)
    seen, probabilities = classifier.surest([both, [SEVEN]])
    np.testing.assert_array_equal(seen[:, 0], [both[sure.argmax()], SEVEN])
    assert probabilities.shape == (2, 10)


def test_the_camera_says_which_way_is_up(tmp_path):
    picture = Image.fromarray(on_page([0], [255])[..., 0])
    turned = picture.transpose(Image.Transpose.ROTATE_90)  # orientation 6 turns it back
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(mnist_form(Image.open(tmp_path / "turned.png")), mnist_form(picture))


def test_what_is_in_mnists_form_comes_through_unchanged(mnist_root):
    train = load("mnist", mnist_root).train
    for digit in train.images[:500, 0].numpy():
        np.testing.assert_array_equal(mnist_form(digit), digit)
        np.testing.assert_array_equal(mnist_form(255 - digit), digit)


RANDOM = np.random.default_rng(0)
NO_DIGITS = {
    "white": np.full((60, 60), 255, np.uint8),
    "black": np.zeros((28, 28), np.uint8),
    "one by one": np.zeros((1, 1), np.uint8),
    "slope": np.add.outer(np.arange(100), np.arange(100)).astype(np.uint8),
    **{f"noise {side}": RANDOM.integers(0, 256, (side, side)).astype(np.uint8) for side in (28, 90, 500)},
    "colour noise": RANDOM.integers(0, 256, (90, 90, 3)).astype(np.uint8),
    "paper": RANDOM.normal(230, 8, (90, 90)).clip(0, 255).astype(np.uint8),
}


@pytest.mark.parametrize("kind", NO_DIGITS)
def test_a_picture_without_a_digit_is_an_error(kind):
    with pytest.raises(UserError, match="there is no digit in it"):
        mnist_form(NO_DIGITS[kind])


@pytest.mark.parametrize(
    "wrong", [np.zeros((3, 4, 5, 6)), np.zeros((0, 9)), np.full((9, 9), np.nan), np.array([["a"]])]
)
def test_what_is_no_picture_is_an_error(wrong):
    with pytest.raises(UserError):
        mnist_form(wrong)


# --- what images= names, and where the answers go -----------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Three pictures of digits, as files of three kinds and as arrays."""
    digits = load("digits", "unused")[1].images[:3, 0].numpy()
    for number, ending in enumerate(["png", "bmp", "tif"]):
        Image.fromarray(digits[number]).save(tmp_path / f"{number}.{ending}")
    np.save(tmp_path / "all.npy", digits)
    np.savez(tmp_path / "all.npz", first=digits[:1], rest=digits[1:])
    header = np.array([0x803, 3, 28, 28], ">i4").tobytes()
    (tmp_path / "all-idx3-ubyte").write_bytes(header + digits.tobytes())
    (tmp_path / "list.txt").write_text("0.png\n1.bmp\n\n2.tif\n")
    return tmp_path


WAYS = ["[0.png,1.bmp,2.tif]", "@list.txt", "[?.*]", "all.npy", "all.npz", "all-idx3-ubyte", "-"]


@pytest.mark.parametrize("words", WAYS)
def test_every_way_to_name_pictures(run, trained, folder, monkeypatch, words):
    monkeypatch.setattr(sys, "stdin", io.StringIO("0.png\n1.bmp\n2.tif\n"))
    given = words if words.startswith("[0") else f"'{words.strip('[]')}'"
    ended = run("mnist-predict", f"checkpoint={trained}", f"images={given}", "output=out.csv")
    assert (ended.status, ended.err) == (0, "")
    rows = list(csv.DictReader((folder / "out.csv").open()))
    expected = load_classifier(trained).probabilities(np.load(folder / "all.npy"))
    assert [row["label"] for row in rows] == [str(index) for index in expected.argmax(1)]
    found = [[float(row[f"probability {name}"]) for name in range(10)] for row in rows]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_pictures_bytes_on_standard_input(run, trained, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO((folder / "0.png").read_bytes())))
    ended = run("mnist-predict", f"checkpoint={trained}", "images=-", "input=bytes", "top_k=2")
    assert (ended.status, ended.err) == (0, "")
    assert len(ended.out.splitlines()) == 2


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "parquet"])
def test_each_kind_of_file_has_one_row_a_picture_in_order(run, trained, folder, ending):
    (folder / "1.bmp").write_text("not a picture")
    words = (f"checkpoint={trained}", "images=@list.txt", "top_k=3", f"output=out.{ending}", "grid=grid.png")
    ended = run("mnist-predict", *words)
    assert (ended.status, ended.err.count("error: 1.bmp is not a picture")) == (1, 1)
    assert run("mnist-predict", *words, "skip_errors=true").status == 0
    path = folder / f"out.{ending}"
    if ending == "parquet":
        rows = pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
    elif ending == "csv":
        rows = [{key: value or None for key, value in row.items()} for row in csv.DictReader(path.open())]
    else:
        text = path.read_text()
        rows = json.loads(text if ending == "json" else f"[{','.join(text.splitlines())}]")
    assert [row["path"] for row in rows] == ["0.png", "1.bmp", "2.tif"]
    assert [bool(row["error"]) for row in rows] == [False, True, False]
    assert [row["label"] is None for row in rows] == [False, True, False]
    assert rows[0]["top 1 label"] == rows[0]["label"]
    assert float(rows[0]["top 1 probability"]) >= float(rows[0]["top 2 probability"])
    assert np.asarray(Image.open(folder / "grid.png").convert("L")).std() > 5


def test_a_name_may_have_any_letters_and_signs(run, trained, folder, monkeypatch):
    (folder / "七 =1.png").write_bytes((folder / "0.png").read_bytes())
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes((folder / "0.png").read_bytes())
    (folder / "back\\slash").symlink_to(trained)
    monkeypatch.setenv("HOME", str(folder))
    words = ("images='*.png'", "output=数字=1, é.csv", "grid=~/out/图.png")
    for checkpoint in ("~/back\\slash", "back\\slash"):
        ended = run("mnist-predict", f"checkpoint={checkpoint}", *words)
        assert (ended.status, ended.err) == (0, "")
    rows = list(csv.DictReader((folder / "数字=1, é.csv").open(encoding="utf-8")))
    assert [row["path"] for row in rows] == ["0.png", "caf\\xe9.png", "七 =1.png"]
    ended = run("mnist-predict", "checkpoint=[~/back\\slash,back\\slash]", "images=[七 =1.png, ~/0.png]")
    assert (ended.status, ended.err) == (0, "")
    assert run("mnist-predict", "checkpoint=back\\slash", "images=七*.png").out.count("png") == 1
    assert (folder / "out" / "图.png").is_file()


def test_a_folders_hidden_files_are_left_out_and_others_counted(run, trained, folder):
    picture = Image.open(folder / "0.png")
    formats = {"1.jfif": "JPEG", "2.pgm": "PPM", "3.jp2": "JPEG2000", "noending": "JPEG"}
    hidden = ("._0.png", "__MACOSX/1.png", ".ipynb_checkpoints/2.png")
    for name in ("0.png", *formats, *hidden, "seven.heic"):
        place = folder / "photos" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        picture.save(place, formats.get(name, "PNG"))
    (folder / "photos" / "LICENSE").write_text("no picture")
    ended = run("mnist-predict", f"checkpoint={trained}", "images=photos", "output=out.csv")
    assert ended.status == 0
    assert ended.err == "warning: left out as no picture: 2 files (.heic, no ending), such as photos/LICENSE\n"
    read = [row["path"] for row in csv.DictReader((folder / "out.csv").open())]
    assert read == [f"photos/{name}" for name in ("0.png", *formats)]


def test_the_terminal_shows_an_error_once(run, trained, folder):
    (folder / "1.bmp").write_text("not a picture")
    ended = run("mnist-predict", f"checkpoint={trained}", "images=[0.png,1.bmp]")
    assert (ended.status, (ended.out + ended.err).count("is not a picture")) == (1, 1)


def test_the_latest_finished_run(run, trained, folder):
    for number, name in enumerate(("train/old", "multirun/sweep/0_new", "train/unfinished")):
        shutil.copytree(trained, folder / "outputs" / name)
        os.utime(folder / "outputs" / name / "metrics.json", (number, number))
    (folder / "outputs" / "train" / "unfinished" / "metrics.json").unlink()
    (folder / "outputs" / "train" / "old" / "checkpoints" / "best.ckpt").unlink()
    ended = run("mnist-predict", "checkpoint=latest", "images=0.png")
    assert (ended.status, ended.err) == (0, "")


def test_python_takes_paths_pictures_and_arrays(trained, folder):
    classifier = load_classifier(trained, "cpu")
    digits = np.load(folder / "all.npy")
    expected = classifier.probabilities(digits)
    assert (expected.shape, expected.dtype) == ((3, 10), np.float32)
    paths = [folder / "0.png", folder / "1.bmp", folder / "2.tif"]
    given = [paths, [str(p) for p in paths], [Image.open(p) for p in paths], list(digits), torch.from_numpy(digits)]
    for pictures in [*given, digits[:, None], torch.from_numpy(digits[:, None])]:
        np.testing.assert_allclose(classifier.probabilities(pictures), expected, atol=1e-6)
    assert classifier.predict(paths[0]) == classifier.predict(digits[:1])
    with pytest.raises(UserError, match=r"none\.png: does not exist"):
        classifier.predict([paths[0], "none.png"])


def test_an_ensemble_is_the_mean_of_its_probabilities(run, trained, folder):
    content = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    content["mnist_cnn"]["temperature"] = 3.0
    torch.save(content, folder / "warm.ckpt")
    digits = np.load(folder / "all.npy")
    one, other = (load_classifier(path).probabilities(digits) for path in (trained, folder / "warm.ckpt"))
    assert np.abs(one - other).max() > 1e-3
    both = load_classifier([trained, folder / "warm.ckpt"])
    np.testing.assert_allclose(both.probabilities(digits), (one + other) / 2, atol=1e-6)
    assert run("mnist-predict", f"checkpoint=[{trained},warm.ckpt]", "images=0.png").status == 0
    assert run("mnist-evaluate", f"checkpoint=[{trained},warm.ckpt]", "plots=false").status == 0


# --- mnist-evaluate -----------------------------------------------------------------------------------------


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


def test_the_error_on_each_corruption(run, trained, held_out):
    ended = run("mnist-evaluate", f"checkpoint={trained}", "corruptions=mnist_c")
    figures = json.loads((ended.folder() / "evaluation.json").read_text())["corruptions"]
    assert [*figures] == [*CORRUPTIONS, "mean"]
    assert re.search(r"^fog +\d+\.\d\d +\d+\.\d\d +0$", ended.out, flags=re.MULTILINE)
    assert (ended.folder() / "plots" / "corruptions.png").exists()
    labels = held_out.labels.numpy()
    classifier = load_classifier(trained)
    zigzag = classifier.probabilities(CORRUPTIONS["zigzag"](held_out.images[:, 0].numpy()), mode="exact")
    assert figures["zigzag"]["error"] == pytest.approx((zigzag.argmax(1) != labels).mean())
    each = [row["error"] for name, row in figures.items() if name != "mean"]
    assert figures["mean"]["error"] == pytest.approx(sum(each) / 15)


def test_a_corrupted_digit_that_the_form_refuses_is_wrong(trained, held_out):
    """A network of MNIST's digits reads pictures through the form, which finds none in blank ones."""
    classifier = load_classifier(trained)
    member = classifier.members[0]
    data = member.description.data.model_copy(update={"name": "mnist"})
    classifier.members = [member._replace(description=member.description.model_copy(update={"data": data}))]
    images, labels = held_out.images[:8, 0].numpy().copy(), held_out.labels[:8].numpy()
    images[:4] = 0
    row = score_corruptions(classifier, images, labels)["scale"]
    assert row["refused"] == 4
    assert row["form_error"] >= 0.5
    assert row["form_error"] < 1


def test_incorrect_digits_are_listed_with_their_probabilities(run, trained, held_out):
    folder = run("mnist-evaluate", f"checkpoint={trained}", "plots=false").folder()
    rows = list(csv.DictReader((folder / "incorrect.csv").open()))
    predicted = load_classifier(trained).predict(held_out.images)
    wrong = [i for i, label in enumerate(held_out.labels.tolist()) if predicted[i] != str(label)]
    assert [int(row["index"]) for row in rows] == wrong
    for row in rows:
        probabilities = [float(row[f"probability {name}"]) for name in range(10)]
        assert sum(probabilities) == pytest.approx(1)
        assert int(row["predicted"]) == int(np.argmax(probabilities))
        assert int(row["expected"]) == int(held_out.labels[int(row["index"])])


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


def test_predict_reads_folders_and_leaves_nothing(run, trained, tmp_path, held_out):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for index, place in enumerate(["b.png", "a.bmp", "deep/c.gif", "deep/d.tif"]):
        Image.fromarray(held_out.images[index, 0].numpy()).save(tmp_path / "in" / place)
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


def test_classifier_takes_any_of_the_shapes(trained, held_out):
    classifier = load_classifier(trained, device="cpu")
    images = held_out.images[:5]
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


def test_pictures_can_be_read(trained):
    for picture in (trained / "plots").glob("*.png"):
        with Image.open(picture) as opened:
            pixels = np.asarray(opened.convert("L"))
            assert min(pixels.shape) >= 300, picture
            assert pixels.std() > 5, picture  # not blank


def test_calibration_writes_one_temperature_into_a_new_checkpoint(run, trained, tmp_path):
    content = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    for part in ("weight", "bias"):
        content["state_dict"][f"network.logits.{part}"] *= 4  # an overconfident network
    torch.save(content, tmp_path / "sure.ckpt")
    before = (tmp_path / "sure.ckpt").read_bytes()
    words = ("checkpoint=sure.ckpt", "split=validation", "calibrate=true", "plots=false")
    ended = run("mnist-evaluate", *words)
    assert ended.status == 0, ended
    assert "calibration error before" in ended.out
    assert (tmp_path / "sure.ckpt").read_bytes() == before
    new = load_classifier(tmp_path / "sure_calibrated.ckpt")
    assert new.description.temperature > 1.5
    assert 0.5 < new.description.unsure_below <= 1
    test = load("digits", "unused")[1]
    old = load_classifier(tmp_path / "sure.ckpt")
    warm, cold = (score(classifier.logits(test.images), test.labels) for classifier in (new, old))
    assert (warm.accuracy, warm.loss < cold.loss) == (cold.accuracy, True)
    said(run("mnist-evaluate", "checkpoint=sure.ckpt", "calibrate=true"), "calibrate=true", "split=validation")


# --- test-time augmentation ---------------------------------------------------------------------------------


def test_the_shifts_are_the_digit_and_its_neighbours(held_out):
    digits = held_out.images[:20]
    copies = shifted(digits, 9)
    assert torch.equal(copies[0], digits)
    rolled = {(y, x): digits.roll((y, x), (2, 3)) for y in (-1, 0, 1) for x in (-1, 0, 1)}
    found = [next(step for step, image in rolled.items() if torch.equal(copy, image)) for copy in copies]
    assert sorted(found) == sorted(rolled)
    assert sorted(found[:5]) == sorted([(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)])
    assert all(torch.equal(a, b) for a, b in zip(shifted(digits, 5), copies, strict=False))


@pytest.mark.parametrize("tta", [5, 9])
def test_the_mean_over_shifts_in_every_command(run, trained, tmp_path, tta):
    test = load("digits", "unused")[1]
    plain, several = load_classifier(trained), load_classifier(trained, tta=tta)
    expected = torch.stack([plain.logits(copy).softmax(1) for copy in shifted(test.images, tta)]).mean(0)
    assert torch.allclose(several.logits(test.images).softmax(1), expected, atol=1e-6)
    assert not torch.allclose(plain.logits(test.images).softmax(1), expected, atol=1e-3)
    accuracy = (expected.argmax(1) == test.labels).double().mean().item()
    evaluated = run("mnist-evaluate", f"checkpoint={trained}", f"tta={tta}", "plots=false")
    assert f"accuracy {accuracy:.2%}" in evaluated.out
    np.save(tmp_path / "digits.npy", test.images[:7, 0].numpy())
    words = ("images=digits.npy", "mode=exact", "output=labels.csv", f"tta={tta}")
    assert run("mnist-predict", f"checkpoint={trained}", *words).status == 0
    rows = list(csv.DictReader((tmp_path / "labels.csv").open()))
    shown = [[float(row[f"probability {name}"]) for name in plain.classes] for row in rows]
    assert torch.allclose(torch.tensor(shown), expected[:7], atol=1e-5)


def test_mnist_train_tests_by_tta(run):
    words = ("data=digits", "epochs=1", "plots=false", "architecture=conv10", "tta=5")
    folder = run("mnist-train", *words).folder()
    test = load("digits", "unused")[1]
    logits = load_classifier(folder, tta=5).logits(test.images)
    figures = json.loads((folder / "metrics.json").read_text())
    assert figures["test/loss"] == pytest.approx(F.cross_entropy(logits, test.labels).item(), rel=1e-6)


def test_shifts_and_several_networks_are_one_mean(trained, held_out):
    digits = held_out.images[:20]
    one, two = load_classifier(trained, tta=5), load_classifier([trained, trained], tta=5)
    assert two.member_logits(digits).shape == (10, 20, 10)
    assert torch.allclose(one.logits(digits), two.logits(digits), atol=1e-5)


def test_a_temperature_of_shifts_divides_each_before_the_mean():
    torch.manual_seed(0)
    labels = torch.randint(0, 10, (500,))
    each = 6 * (F.one_hot(labels, 10) + 0.5 * torch.randn(3, 500, 10))
    found = fit_temperature(each, labels)
    loss = [F.nll_loss(mean_logits(each / t), labels).item() for t in (0.9 * found, found, 1.1 * found)]
    assert loss[1] == min(loss)
    assert fit_temperature(each[0], labels) == fit_temperature(each[:1], labels)
    assert fit_temperature(each[0], each[0].argmax(1)) == 1  # where none is wrong, none is found


def test_from_a_sure_probability_on_answers_are_right():
    torch.manual_seed(0)
    labels = torch.randint(0, 10, (5000,))
    logits = 3 * F.one_hot(labels, 10) + torch.randn(5000, 10)
    probabilities, predicted = torch.softmax(logits.double(), 1).max(1)
    sure = sure_from(logits, labels, 0.99)
    assert (predicted == labels).double().mean() < 0.97
    assert (predicted == labels)[probabilities >= sure].double().mean() >= 0.99
    assert (probabilities >= sure).double().mean() > 0.5  # and it is the least such
    assert sure_from(-logits, labels) == 1


def test_rows_below_the_sure_probability_are_marked(run, trained, tmp_path):
    content = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    np.save("digits.npy", load("digits", "unused")[1].images[:40, 0].numpy())
    sure = load_classifier(trained).probabilities(np.load("digits.npy")).max(1)
    content["mnist_cnn"]["unsure_below"] = float(np.median(sure))
    torch.save(content, "tested.ckpt")
    assert run("mnist-predict", "checkpoint=tested.ckpt", "images=digits.npy", "output=rows.csv").status == 0
    with Path("rows.csv").open() as file:
        marks = [row["unsure"] for row in csv.DictReader(file)]
    assert marks == ["unsure" if each < np.float32(np.median(sure)) else "" for each in sure]
    ended = run("mnist-predict", f"checkpoint={trained}", "images=digits.npy")
    assert ended.out.count("unsure") == (sure < 0.5).sum()  # not tested
    assert "unsure" in run("mnist-predict", "checkpoint=tested.ckpt", "images=digits.npy").out


def test_calibrating_with_tta(run, trained):
    words = (f"checkpoint={trained}", "split=validation", "tta=5", "plots=false")
    before = run("mnist-evaluate", *words, "calibrate=true")
    new = trained / "checkpoints" / "best_calibrated.ckpt"
    try:
        assert read_checkpoint(new)[1].temperature != 1
        after = run("mnist-evaluate", f"checkpoint={new}", *words[1:])
        assert after.status == before.status == 0
        loss = [float(ended.out.rpartition("loss ")[2].split(",")[0]) for ended in (before, after)]
        assert loss[1] < loss[0]
    finally:
        new.unlink(missing_ok=True)


# --- export, and packages that are missing ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "ending"), [("onnx", "onnx"), ("torch_export", "pt2"), ("safetensors", "safetensors")]
)
def test_export_gives_the_checkpoints_probabilities(run, trained, folder, kind, ending):
    if kind == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    ended = run("mnist-export", f"checkpoint={trained}", f"output=x.{ending}")
    assert ended.status == 0, ended
    digits = np.load(folder / "all.npy")
    expected = load_classifier(trained).probabilities(digits)
    if kind == "torch_export":
        exported = torch.export.load(folder / "x.pt2").module()(torch.from_numpy(digits[:, None])).detach().numpy()
    else:
        exported = load_classifier(folder / f"x.{ending}").probabilities(digits)
        assert run("mnist-predict", f"checkpoint=x.{ending}", "images=0.png").status == 0
    np.testing.assert_allclose(exported, expected, atol=1e-5)


def test_export_leaves_no_file_that_differs(run, trained, tmp_path, monkeypatch):
    from mnist_cnn import export

    monkeypatch.setattr(export, "largest_difference", lambda *_: 1e-3)
    said(run("mnist-export", f"checkpoint={trained}", "format=safetensors", "output=x.safetensors"), "not written")
    assert not list(tmp_path.glob("*x.safetensors"))
    said(run("mnist-export", f"checkpoint={trained}", "format=onnx", "output=x.pt2"), "must end in .onnx")


def test_a_missing_package_names_its_extra(run, trained, tmp_path, monkeypatch):
    for name in ("onnxruntime", "pyarrow.parquet", "h5py"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "model.h5").write_bytes(b"")
    said(run("mnist-export", f"checkpoint={trained}", "output=x.onnx"), "pip install 'mnist-cnn[export]'")
    said(run("mnist-import", "keras=model.h5", "output=x.ckpt"), "pip install 'mnist-cnn[keras]'")
    np.save(tmp_path / "a.npy", SEVEN)
    words = (f"checkpoint={trained}", "images=a.npy", "output=x.parquet")
    said(run("mnist-predict", *words), "pip install 'mnist-cnn[parquet]'")
