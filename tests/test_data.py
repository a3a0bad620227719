"""The digits: splits, normalisation, batches and their order, warped digits, and files that mirrors may not give."""

import gzip
import hashlib
import http.server
import math
import multiprocessing
import os
import re
import shutil
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from conftest import PATIENCE, REPOSITORY, metrics, said
from PIL import Image
from torch.nn import functional as F

from mnist_cnn import MNISTDataModule, load_classifier
from mnist_cnn.config.data_settings import Augmentation
from mnist_cnn.config.schema import UserError
from mnist_cnn.config.settings import CONF
from mnist_cnn.data import augmentation, datasets, download
from mnist_cnn.data.augmentation import HANDS, Augment, damaged, other_hand, warped
from mnist_cnn.data.corruptions import CORRUPTIONS
from mnist_cnn.data.datamodule import DigitLoader
from mnist_cnn.data.datasets import Digits, load


def ready(**settings):
    data = MNISTDataModule(**{"name": "digits", **settings})
    data.setup()
    return data


def test_digits_are_scikit_learns_in_mnists_form():
    data = ready(validation=0)
    assert data.train.images.shape == (1437, 1, 28, 28)
    assert data.test.images.shape == (360, 1, 28, 28)
    assert data.train.images.dtype == torch.uint8
    both = torch.cat([data.train.images, data.test.images])
    assert both.max() == 255
    ink = both.amax(dim=(0, 1)).nonzero()
    assert ink.min() >= 4
    assert ink.max() <= 23
    counts = torch.bincount(data.test.labels)
    assert counts.min() >= 34
    assert counts.max() <= 38
    assert torch.equal(ready(validation=0, seed=99).test.images, data.test.images)


@pytest.mark.parametrize(("validation", "count"), [(0, 0), (0.0, 0), (0.1, 144), (100, 100), (0.5, 719)])
def test_validation_is_the_last_training_digits(validation, count):
    """Keras: floor of the training fraction, the last ones, before any shuffling."""
    whole, data = ready(validation=0).train, ready(validation=validation)
    assert len(data.validation.labels) == count
    cut = 1437 - count
    assert torch.equal(data.train.images, whole.images[:cut])
    assert torch.equal(data.validation.images, whole.images[cut:])
    assert len(data.test.labels) == 360


def test_a_random_validation_part_is_stratified_and_follows_the_seed():
    first, again, other = (ready(validation=300, validation_from="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.validation.images, again.validation.images)
    assert not torch.equal(first.validation.images, other.validation.images)
    counts = torch.bincount(first.validation.labels)
    assert counts.max() - counts.min() <= 2
    assert len(first.train.labels) + len(first.validation.labels) == 1437


@pytest.mark.parametrize("settings", [{"validation": 1437}, {"validation": 5, "validation_from": "random"}])
def test_a_validation_part_that_cannot_be_is_refused(settings):
    with pytest.raises(UserError, match=f"data.validation={settings['validation']}"):
        ready(**settings)


def test_standard_normalisation_is_of_the_training_part():
    data = ready(normalization="standard", validation=437)
    pixels = data.train.images.double()
    normalised = (pixels - data.mean) / data.std
    assert abs(normalised.mean()) < 1e-9
    assert abs(normalised.std(correction=0) - 1) < 1e-9
    assert (ready().mean, ready().std) == (0.0, 255.0)


def test_batches_are_whole_and_the_last_short_one_is_kept():
    data = ready(batch_size=100, validation=37)
    batches = list(data.train_dataloader())
    assert [len(labels) for _, labels in batches] == [100] * 14
    assert batches[0][0].shape == (100, 1, 28, 28)
    assert batches[0][0].dtype == torch.uint8
    assert batches[0][1].dtype == torch.int64
    data = ready(batch_size=64, validation=0)
    assert [len(labels) for _, labels in data.train_dataloader()] == [64] * 22 + [29]
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 360
    seen = torch.cat([labels for _, labels in data.train_dataloader()])
    assert torch.equal(torch.bincount(seen), torch.bincount(data.train.labels))


def test_the_order_depends_on_seed_and_epoch_alone():
    class Epoch:
        """What the data module asks of its trainer."""

        overfit_batches, global_rank, world_size = 0, 0, 1

        def __init__(self, number):
            self.current_epoch = number
            self.strategy = self
            self.root_device = torch.device("cpu")

    def order(seed, epoch):
        data = ready(seed=seed)
        data.trainer = Epoch(epoch)
        torch.manual_seed(torch.seed())
        return torch.cat([labels for _, labels in data.train_dataloader()])

    assert torch.equal(order(1, 0), order(1, 0))
    assert torch.equal(order(1, 3), order(1, 3))
    assert not torch.equal(order(1, 0), order(1, 1))
    assert not torch.equal(order(1, 0), order(2, 0))


def test_a_loader_goes_on_where_another_was():
    """Within an epoch, at its end, and with the order of the epoch after it."""
    numbered = Digits(torch.zeros(10, 1, 28, 28, dtype=torch.uint8), torch.arange(10))
    loader = DigitLoader(numbered, 3, lambda: torch.arange(9, -1, -1))
    assert len(loader) == 4
    batches = iter(loader)
    assert [next(batches)[1].tolist() for _ in range(2)] == [[9, 8, 7], [6, 5, 4]]
    assert loader.state_dict() == {"position": 2}
    again = DigitLoader(numbered, 3, lambda: torch.arange(9, -1, -1))
    again.load_state_dict(loader.state_dict())
    assert [labels.tolist() for _, labels in again] == [[3, 2, 1], [0]]
    assert again.state_dict() == {"position": 4}
    assert len(list(again)) == 4  # the next epoch has all again
    ended = DigitLoader(numbered, 3)
    ended.load_state_dict(again.state_dict())
    assert next(iter(ended))[1].tolist() == [0, 1, 2]


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize(("count", "size"), [(1293, 64), (65, 64), (64, 64), (7, 16), (1, 1)])
def test_ranks_take_each_digit_once_in_as_many_batches(ranks, count, size):
    """A rank that has none of a short batch takes one with weight 0; the weights make a mean over ranks the batch's."""
    numbered = Digits(torch.zeros(count, 1, 28, 28, dtype=torch.uint8), torch.arange(count))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    loaders = [list(DigitLoader(numbered, size, lambda: order, rank, ranks)) for rank in range(ranks)]
    for parts, whole in zip(zip(*loaders, strict=True), order.split(size), strict=True):
        assert torch.cat([labels for _, labels, weight in parts if weight]).equal(whole)
        assert all(len(labels) >= 1 for _, labels, _ in parts)
        means = sum(weight * labels.double().mean() for _, labels, weight in parts) / ranks
        assert means.item() == pytest.approx(whole.double().mean().item())


def test_real_mnist(mnist_root):
    data = MNISTDataModule("mnist", str(mnist_root), validation=0.1)
    data.setup()
    assert (len(data.train.labels), len(data.validation.labels), len(data.test.labels)) == (54_000, 6_000, 10_000)
    raw = torchvision.datasets.MNIST(str(mnist_root), train=False)
    assert torch.equal(data.test.images[:, 0], raw.data)
    assert torch.equal(data.test.labels, raw.targets)
    assert int(data.test.labels[0]) == 7  # as tutorial 002 says
    assert "(54000, 1, 28, 28)" in data.shapes()


def test_no_mnist_is_in_the_repository():
    assert not list(REPOSITORY.glob("[!.]*/**/*idx3-ubyte*"))


def test_a_file_that_changes_is_read_again(mnist_root, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (mnist_root / "MNIST" / "raw").glob("*-ubyte"):
        (raw / file.name).write_bytes(file.read_bytes())
    first = load("mnist", tmp_path)
    assert load("mnist", tmp_path)[0].images is first[0].images
    labels = raw / "t10k-labels-idx1-ubyte"
    os.utime(labels, (1, 1))
    again = load("mnist", tmp_path)
    assert again[0].images is not first[0].images
    assert torch.equal(again[1].labels, first[1].labels)


# --- warped digits - ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    """uint8 (20, 1, 28, 28) with a margin, so that small movements keep all ink."""
    return F.pad(load("digits", "unused")[1].images[:20, :, 4:-4, 4:-4], (4, 4, 4, 4))


def amounts(count, rotation=0.0, shear=0.0, scale=0.0, right=0.0, down=0.0):
    return torch.tensor([rotation, shear, scale, right, down])[:, None].repeat(1, count)


def test_no_movement_is_the_digit_itself(digits):
    assert torch.allclose(warped(digits, amounts(20)), digits.float(), atol=1e-2)


def test_a_shift_of_whole_pixels_is_a_roll(digits):
    moved = warped(digits, amounts(20, right=2, down=-1))
    assert torch.allclose(moved, digits.float().roll((-1, 2), (2, 3)), atol=1e-2)


def test_a_quarter_turn_and_twice_the_size(digits):
    turned = warped(digits, amounts(20, rotation=math.pi / 2))
    assert torch.allclose(turned, torch.rot90(digits.float(), 1, (2, 3)), atol=2e-2)
    large = warped(digits, amounts(20, scale=1.0))
    assert large[:, :, 10:18, 10:18].mean().item() == pytest.approx(
        digits[:, :, 12:16, 12:16].float().mean().item(), rel=0.1
    )


def test_shear_and_shift_follow_a_turn(digits):
    """All at once is one after the other, but for the blur of drawing it four times."""
    once = warped(digits, amounts(20, rotation=0.2, shear=0.1, scale=0.1, right=1, down=2))
    steps = warped(warped(digits, amounts(20, shear=0.1)), amounts(20, rotation=0.2))
    steps = warped(warped(steps, amounts(20, scale=0.1)), amounts(20, right=1, down=2))
    assert (once - steps).abs().mean() < 4
    assert (once - digits).abs().mean() > 8


def test_the_grid_is_torchs_own(digits):
    """A map drawn by hand, and by F.affine_grid."""
    maps = torch.eye(2, 3).repeat(20, 1, 1)
    maps[:, :, 2] = torch.tensor([-4 / 28, 2 / 28])  # from two pixels to the left, and one below
    expected = F.grid_sample(
        digits.float(), F.affine_grid(maps, [20, 1, 28, 28], align_corners=False), align_corners=False
    )
    assert torch.allclose(warped(digits, amounts(20, right=2, down=-1)), expected, atol=1e-3)


@pytest.mark.parametrize("option", ["affine", "robust"])
def test_each_digit_is_changed_by_draws_of_its_own_that_a_seed_fixes(digits, option):
    augment = Augment(Augmentation(**yaml.safe_load((CONF / f"augmentation/{option}.yaml").read_text())))
    one, labels = digits[:1].expand(20, -1, -1, -1), torch.zeros(20, dtype=torch.int64)
    torch.manual_seed(3)
    first, second = augment(one, labels), augment(one, labels)
    assert len({tuple(image.flatten().tolist()) for image in torch.cat([first, second])}) == 40
    torch.manual_seed(3)
    assert torch.equal(augment(one, labels), first)
    with torch.autocast("cpu", torch.bfloat16):  # no pixel moves for want of precision
        torch.manual_seed(3)
        assert torch.equal(augment(one, labels), first)


def test_draws_stay_within_their_bounds_and_reach_them(digits, monkeypatch):
    seen = []
    monkeypatch.setattr(augmentation, "warped", lambda images, amounts: seen.append(amounts))
    augment = Augment(Augmentation(rotation=90, shift=3, scale=0.2, shear=45))
    augment(digits[:1].expand(2000, -1, -1, -1), torch.zeros(2000))
    bounds = torch.tensor([math.pi / 2, math.pi / 4, 0.2, 3, 3])
    assert torch.allclose(seen[0].abs().amax(1), bounds, rtol=0.01)
    assert (seen[0].abs().amax(1) <= bounds).all()
    assert torch.allclose(seen[0].mean(1), torch.zeros(5), atol=0.06 * 3)


def upright(label):
    """50 digits that are one straight stroke, float (50, 1, 28, 28), and their labels."""
    images = torch.zeros(50, 1, 28, 28)
    images[..., 4:24, 13:15] = 255.0
    return images, torch.full((50,), label)


@pytest.mark.parametrize("label", [label for label in range(10) if label != 4])
def test_another_hand_adds_strokes_to_the_digits_that_have_such(label):
    images, labels = upright(label)
    drawn = other_hand(images, labels)
    assert (drawn >= images).all()  # the digit itself stays
    changed = (drawn != images).flatten(1).any(1)
    assert changed.any() == (label in {hand[0] for hand in HANDS})
    assert not changed.all()  # half of them, each on its own
    if label == 7:
        left, right = drawn[..., 8:20, :12].amax((1, 2, 3)), drawn[..., 8:20, 16:].amax((1, 2, 3))
        assert ((left > 0) == (right > 0)).all()  # crossed: on both sides of the middle


def test_a_4_is_closed_at_its_top():
    images = torch.zeros(50, 1, 28, 28)
    images[..., 4:14, 8:10] = images[..., 4:24, 18:20] = images[..., 13:15, 8:20] = 255.0
    drawn = other_hand(images, torch.full((50,), 4))
    closed = drawn[:, 0, 3:6, 13].amax(1) > 200
    assert closed.any()
    assert torch.equal(drawn[~closed], images[~closed])


def test_damage_leaves_pixels_in_their_range_and_digits_for_the_greater_part(digits):
    torch.manual_seed(0)
    images = digits.float().repeat(20, 1, 1, 1)
    changed = damaged(images)
    assert changed.isfinite().all()
    assert changed.min() >= 0
    assert changed.max() <= 255.01
    untouched = ((changed - images).abs() < 0.01).flatten(1).all(1).float().mean().item()
    assert 0.1 < untouched < 0.35  # 0.85 ** 10 = 0.2
    similar = torch.nn.functional.cosine_similarity(changed.flatten(1), images.flatten(1))
    assert similar.median() > 0.6


def test_hands_are_for_digits_only(run):
    for label in "ab":
        picture = Image.fromarray(load("digits", "unused")[1].images[0, 0].numpy())
        for number in range(10):
            path = Path("letters", label, f"{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    ended = run("mnist-train", "data=folder", "data.root=letters", "experiment=robust", "data.validation=0")
    said(ended, "augmentation.hands=0.5 draws strokes of the digits 0 to 9, and data=folder has other classes")


def test_warped_digits_are_the_digits_of_training_alone(run, tmp_path):
    """data=digits brings them: the test scores digits as they are, and a network learns from warped ones."""
    words = ("data=digits", "epochs=2", "plots=false", "architecture=conv10", "selection=last", "data.batch_size=64")
    words += ("optimizer.lr=0.003",)
    plain = metrics(run("mnist-train", *words, "augmentation=none").folder())
    folder = run("mnist-train", *words).folder()
    assert metrics(folder)["train/loss"] > plain["train/loss"]
    test = load("digits", "unused")[1]
    classifier = load_classifier(folder)
    right = (classifier.logits(test.images).argmax(1) == test.labels).sum().item()
    assert metrics(folder)["test/accuracy"] == right / len(test.labels) > 0.5


# --- corrupted digits -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clean():
    return ready(validation=0).test.images[:100, 0].numpy()


def bars(count):
    """Upright strokes, 16×3, with their centre in the middle of 28×28 but half a pixel."""
    digits = np.zeros((count, 28, 28), np.uint8)
    digits[:, 6:22, 12:15] = 255
    return digits


def means(digits):
    """The centre of mass (row, column) of each digit."""
    y, x = np.mgrid[:28, :28]
    total = digits.sum((1, 2), dtype=float)
    return np.stack([(digits * y).sum((1, 2)) / total, (digits * x).sum((1, 2)) / total], 1)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_changes_digits_alike_each_time(clean, name):
    before = clean.copy()
    corrupted = CORRUPTIONS[name](clean)
    assert (corrupted.shape, corrupted.dtype) == (clean.shape, np.uint8)
    assert np.array_equal(clean, before)
    assert (corrupted != clean).any((1, 2)).mean() > 0.95
    assert np.array_equal(corrupted, CORRUPTIONS[name](clean))
    by_chance = name not in ("scale", "brightness", "stripe", "canny_edges")
    assert np.array_equal(corrupted, CORRUPTIONS[name](clean, seed=1)) != by_chance
    blank = CORRUPTIONS[name](np.zeros((2, 28, 28), np.uint8))
    assert blank.any() == (name in ("impulse_noise", "brightness", "stripe", "spatter", "dotted_line", "zigzag"))


def test_corruptions_of_single_pixels(clean):
    shot = CORRUPTIONS["shot_noise"](clean)
    assert set(np.unique(shot)) == {0, 85, 170, 255}
    assert not shot[clean == 0].any()
    grey = np.full((200, 28, 28), 100, np.uint8)
    impulse = CORRUPTIONS["impulse_noise"](grey)
    assert np.mean(impulse == 255) == pytest.approx(0.085, abs=0.005)
    assert np.mean(impulse == 0) == pytest.approx(0.085, abs=0.005)
    assert np.mean(impulse == 100) == pytest.approx(0.83, abs=0.005)
    np.testing.assert_allclose(CORRUPTIONS["brightness"](clean), (clean + 127.5).clip(0, 255), atol=0.51)
    stripe = CORRUPTIONS["stripe"](clean)
    assert np.array_equal(stripe[:, :, 7:21], clean[:, :, 7:21])
    assert np.array_equal(stripe[:, :, [0, 6, 21, 27]], 255 - clean[:, :, [0, 6, 21, 27]])


def test_corruptions_that_move_digits():
    digits = bars(20)
    moves = means(CORRUPTIONS["translate"](digits)) - means(digits)
    np.testing.assert_allclose(abs(moves), 3)
    assert {tuple(move) for move in np.sign(moves).tolist()} == {(-1, -1), (-1, 1), (1, -1), (1, 1)}
    scaled = CORRUPTIONS["scale"](digits)
    assert (scaled[0, :, 13] > 127).sum() == pytest.approx(0.7 * 16, abs=1)
    for name, slope in (("rotate", math.tan(0.4)), ("shear", math.tan(0.4))):
        ink = CORRUPTIONS[name](digits).astype(float)
        columns = (ink * np.arange(28)).sum(2) / np.maximum(ink.sum(2), 1)  # where the stroke is in each row
        slopes = (columns[:, 18] - columns[:, 9]) / 9
        np.testing.assert_allclose(abs(slopes), slope, atol=0.05)
        assert slopes.min() < 0 < slopes.max()


def test_corruptions_that_blur_keep_the_ink():
    digits = bars(200)
    for name in ("glass_blur", "motion_blur"):
        blurred = CORRUPTIONS[name](digits)
        np.testing.assert_allclose(blurred.sum((1, 2), dtype=float), digits[0].sum(), rtol=0.03)
    assert means(blurred)[:, 1].max() < 12  # motion smears it to one side


def test_corruptions_that_cover_digits(clean):
    covered = {name: CORRUPTIONS[name](clean).astype(int) for name in ("spatter", "dotted_line", "zigzag")}
    fog = CORRUPTIONS["fog"](bars(100))  # three parts of cloud to one of the digit
    assert fog[:, 6:22, 12:15].mean() - fog[:, 6:22, [11, 15]].mean() == pytest.approx(255 / 4, abs=3)
    assert fog[:, :5].mean() == pytest.approx(0.75 * 255 / 2, rel=0.2)
    mud = covered["spatter"][clean == 0]
    assert set(np.unique(mud)) <= {0, *range(50, 64)}
    assert 0.03 < (mud > 0).mean() < 0.3
    dots = (covered["dotted_line"] - clean).any((0, 1))
    assert [*np.flatnonzero(dots)] == [column for column in range(27) if column % 4 in (2, 3)]
    lines = (covered["zigzag"] - clean).any((0, 1))
    assert np.flatnonzero(lines)[[0, -1]] == pytest.approx([2, 25], abs=2)


def test_canny_edges_are_the_outline():
    square = np.zeros((1, 28, 28), np.uint8)
    square[0, 8:20, 8:20] = 255
    edges = CORRUPTIONS["canny_edges"](square)[0]
    assert set(np.unique(edges)) == {0, 255}
    assert not edges[11:17, 11:17].any()
    assert not edges[:6].any()
    assert {7, 8} & (found := {*np.flatnonzero(edges[13])})
    assert {19, 20} & found
    assert found <= {7, 8, 19, 20}


# --- files and mirrors --------------------------------------------------------------------------------------


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def md5(content):
    return hashlib.md5(content).hexdigest()


random = np.random.default_rng(0)
FILES = {
    "train-images-idx3-ubyte": idx(random.integers(0, 256, (50, 28, 28), dtype=np.uint8)),
    "train-labels-idx1-ubyte": idx(random.integers(0, 10, 50, dtype=np.uint8)),
    "t10k-images-idx3-ubyte": idx(random.integers(0, 256, (20, 28, 28), dtype=np.uint8)),
    "t10k-labels-idx1-ubyte": idx(random.integers(0, 10, 20, dtype=np.uint8)),
}
ARCHIVES = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in FILES.items()}


class Mirror(http.server.BaseHTTPRequestHandler):
    """The first part of an address is how it is answered, as in /cut/MNIST/raw/train-images-idx3-ubyte.gz."""

    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        manner, _, name = self.path.removeprefix("/").partition("/")
        content = ARCHIVES.get(name.rpartition("/")[2], b"")
        busy = manner == "busy" and self.asked.count(self.path) == 1
        if manner.isdigit() or busy:
            return self.send_error(503 if busy else int(manner))
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if manner == "cut":
            content = content[: len(content) // 2]
        if manner == "wrong":
            content = bytes(len(content))
        for start in range(0, len(content), 4096):
            self.wfile.write(content[start : start + 4096])
            time.sleep(0.02 if manner == "slow" else 0)

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(monkeypatch):
    """A small MNIST, whose checksums stand for the published ones, at a server's address; `Mirror.asked` has a list."""
    Mirror.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for dataset in (torchvision.datasets.MNIST, torchvision.datasets.KMNIST):
        monkeypatch.setattr(dataset, "resources", [(name, md5(content)) for name, content in ARCHIVES.items()])
    monkeypatch.setitem(datasets.MD5, "MNIST", {name: md5(content) for name, content in FILES.items()})
    monkeypatch.setattr(download, "SECONDS_BETWEEN_ROUNDS", (0.01, 0.01))
    monkeypatch.setattr(download, "SECONDS_TO_WAIT_FOR_A_MIRROR", PATIENCE)  # slow is not busy

    def use(*manners):
        monkeypatch.setenv("MNIST_CNN_MIRRORS", " ".join(f"http://127.0.0.1:{server.server_port}/{m}" for m in manners))

    yield use
    server.shutdown()


def left(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


WHOLE = {f"MNIST/raw/{name}{suffix}" for name in FILES for suffix in ("", ".gz")}


def _load(root, results):
    torch.set_num_threads(1)
    try:
        results.put(len(datasets.load("mnist", root)[0].labels))
    except Exception as error:
        results.put(repr(error))


@pytest.mark.parametrize("manners", [["good"], ["403", "cut", "slow"], ["wrong", "500", "busy"]])
def test_eight_processes_on_an_empty_folder_leave_one_good_copy(mirror, tmp_path, manners):
    mirror(*manners)
    forked = multiprocessing.get_context("fork")  # torch is loaded already
    results = forked.Queue()
    processes = [
        forked.Process(target=_load, args=(tmp_path / "deep" / "data", results), daemon=True) for _ in range(8)
    ]
    for process in processes:
        process.start()
    assert [results.get(timeout=PATIENCE) for _ in processes] == [50] * 8
    for process in processes:
        process.join(PATIENCE)
    assert left(tmp_path / "deep" / "data") == WHOLE
    served = [path for path in Mirror.asked if path.startswith(f"/{manners[-1]}/")]
    assert len(served) == (8 if "busy" in manners else 4)  # each file once, or once more after it was refused


SAID = {
    "403": "403 Forbidden",
    "404": "404 Not Found",
    "500": "500 Internal Server Error",
    "cut": "broke off, [0-9,]+ bytes are missing",
    "wrong": "sent [0-9,]+ bytes that are not the published file",
}


def test_the_error_has_what_each_mirror_said_and_nothing_is_left(mirror, tmp_path):
    mirror(*SAID)
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError) as refusal:
        datasets.load("mnist", tmp_path / "data" / "mine")
    for manner, words in SAID.items():
        assert re.search(f"127.0.0.1:[0-9]+/{manner}/MNIST/raw/: {words}", str(refusal.value))
    for words in ("train-images-idx3-ubyte", "MNIST_CNN_DATA", "MNIST_CNN_MIRRORS", "data=digits", "data.root"):
        assert words in str(refusal.value)
    times = {manner: len([path for path in Mirror.asked if path.startswith(f"/{manner}/")]) for manner in SAID}
    assert times == {"403": 1, "404": 1, "500": 3, "cut": 3, "wrong": 3}  # a refusal stands, the others may pass
    assert not list((tmp_path / "data").iterdir())


def test_whole_files_stay_where_a_later_one_cannot_be_had(mirror, tmp_path, monkeypatch):
    mirror("good")
    monkeypatch.setitem(ARCHIVES, "t10k-labels-idx1-ubyte.gz", b"nothing")
    with pytest.raises(UserError, match="t10k-labels"):
        datasets.load("mnist", tmp_path)
    assert left(tmp_path) == {path for path in WHOLE if "t10k-labels" not in path}


@pytest.mark.parametrize("harm", ["missing", "cut short", "altered", "no folder"])
def test_a_harmed_file_is_fetched_again_and_named_where_there_is_no_network(mirror, tmp_path, harm):
    mirror("good")
    datasets.load("mnist", tmp_path)
    Mirror.asked.clear()
    file = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    content = bytearray(file.read_bytes())
    content[5_000] ^= 1
    file.unlink()
    if harm == "no folder":
        shutil.rmtree(tmp_path / "MNIST")
    elif harm != "missing":
        file.write_bytes(content[:9_000] if harm == "cut short" else content)
    mirror("404")
    with pytest.raises(UserError) as refusal:
        datasets.load("mnist", tmp_path)
    named = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte" if harm == "no folder" else file
    assert str(named) in str(refusal.value)
    assert ("cannot be read" in str(refusal.value)) == (harm in ("missing", "no folder"))
    assert ("is not the published file" in str(refusal.value)) == (harm in ("cut short", "altered"))
    Mirror.asked.clear()
    mirror("good")
    assert len(datasets.load("mnist", tmp_path)[1].labels) == 20
    assert len(Mirror.asked) == (4 if harm == "no folder" else 1)
    assert left(tmp_path) == WHOLE


def test_a_folder_with_good_files_is_not_written_to(mirror, tmp_path):
    """Nor locked, so that it may be read-only: a file that came and went would show in the folders' times."""
    mirror("good")
    datasets.load("mnist", tmp_path)
    mirror()
    folders = (tmp_path, tmp_path / "MNIST", tmp_path / "MNIST" / "raw")
    before = [folder.stat().st_mtime_ns for folder in folders]
    for folder in folders:
        folder.chmod(0o555)
    assert len(datasets.load("mnist", tmp_path)[0].labels) == 50
    assert before == [folder.stat().st_mtime_ns for folder in folders]
    for folder in folders:
        folder.chmod(0o755)


def test_kmnist_is_checked_against_its_archives(mirror, tmp_path):
    mirror("good")
    datasets.load("kmnist", tmp_path)
    raw = tmp_path / "KMNIST" / "raw"
    for harm in ("altered", "no archive"):
        file = raw / "train-labels-idx1-ubyte"
        if harm == "altered":
            file.write_bytes(file.read_bytes()[:-1] + b"\xff")
        else:
            (raw / f"{file.name}.gz").unlink()
        mirror("404")
        with pytest.raises(UserError, match="not the published" if harm == "altered" else "gz cannot be read"):
            datasets.load("kmnist", tmp_path)
        mirror("good")
        assert len(datasets.load("kmnist", tmp_path)[0].labels) == 50


@pytest.mark.parametrize("harm", ["missing", "truncated", "altered"])
def test_real_mnist_harmed_is_named(mnist_root, tmp_path, harm, monkeypatch):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (mnist_root / "MNIST" / "raw").iterdir():
        (raw / file.name).symlink_to(file)
    file = raw / "t10k-images-idx3-ubyte"
    content = bytearray(file.read_bytes())
    content[5_000_000] ^= 1
    file.unlink()
    if harm != "missing":
        file.write_bytes(content[:7_000_000] if harm == "truncated" else content)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(UserError) as refusal:
        datasets.load("mnist", tmp_path)
    for word in ("127.0.0.1:9", "MNIST_CNN_DATA", "data=digits", "data.root", str(file)):
        assert word in str(refusal.value)
    assert ("2646ac" in str(refusal.value)) == (harm != "missing")


def test_what_torchvision_cannot_fetch_is_one_line(run, tmp_path, mirror):
    mirror("404")
    for name in ("emnist_letters", "qmnist", "usps"):
        said(run("mnist-train", f"data={name}", "data.root=here"), name.partition("_")[0].upper(), "404", "data.root")
    assert not left(tmp_path)
