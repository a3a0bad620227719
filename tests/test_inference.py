"""Pictures of every kind to predictions: the form, the sources, the files, ensembles, calibration, export, import."""

import csv
import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_messages import said

from mnist_cnn import load_classifier
from mnist_cnn.config.schema import UserError
from mnist_cnn.data.datasets import load
from mnist_cnn.inference.digit_image import in_mnist_form, mnist_form


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
    share = np.zeros((side + room, side + room, 1))
    digit = Image.fromarray(SEVEN).resize((side, side), Image.Resampling.BICUBIC)
    share[at[0] : at[0] + side, at[1] : at[1] + side, 0] = np.asarray(digit) / 255
    return np.rint(np.array(paper) * (1 - share) + np.array(ink) * share).astype(np.uint8)


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
    from PIL import ImageDraw

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


def test_the_camera_says_which_way_is_up(tmp_path):
    picture = Image.fromarray(on_page([0], [255])[..., 0])
    turned = picture.transpose(Image.Transpose.ROTATE_90)  # orientation 6 turns it back
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(mnist_form(Image.open(tmp_path / "turned.png")), mnist_form(picture))


def test_what_is_in_mnists_form_comes_through_unchanged(mnist_root):
    train, _ = load("mnist", mnist_root)
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


def test_calibration_writes_one_temperature_into_a_new_checkpoint(run, trained, tmp_path):
    from mnist_cnn.inference.metrics import score

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
    test = load("digits", "unused")[1]
    old = load_classifier(tmp_path / "sure.ckpt")
    warm, cold = (score(classifier.logits(test.images), test.labels) for classifier in (new, old))
    assert (warm.accuracy, warm.loss < cold.loss) == (cold.accuracy, True)
    said(run("mnist-evaluate", "checkpoint=sure.ckpt", "calibrate=true"), "calibrate=true", "split=validation")


@pytest.mark.parametrize(
    ("kind", "ending"), [("onnx", "onnx"), ("torch_export", "pt2"), ("safetensors", "safetensors")]
)
def test_export_gives_the_checkpoints_probabilities(run, trained, folder, kind, ending):
    if kind == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    ended = run("mnist-export", f"checkpoint={trained}", f"format={kind}", f"output=x.{ending}")
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
