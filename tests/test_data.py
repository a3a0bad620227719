"""Splits, normalisation, whole batches; verified files and careful downloads."""

import gzip
import hashlib
import http.server
import shutil
import struct
import threading

import numpy as np
import pytest
import torch
import torchvision
from conftest import REPOSITORY

from mnist_cnn import datasets
from mnist_cnn.datamodule import MNISTDataModule
from mnist_cnn.schema import UserError


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
    """Keras: floor of the training share, the last ones, before any shuffling."""
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
    normalised = (pixels - data.mean) / data.standard_deviation
    assert abs(normalised.mean()) < 1e-9
    assert abs(normalised.std(correction=0) - 1) < 1e-9
    assert (ready().mean, ready().standard_deviation) == (0.0, 255.0)


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
    def order(seed, epoch):
        loader = ready(seed=seed).train_dataloader()
        loader.sampler.set_epoch(epoch)
        torch.manual_seed(torch.seed())
        return torch.cat([labels for _, labels in loader])

    assert torch.equal(order(1, 0), order(1, 0))
    assert not torch.equal(order(1, 0), order(1, 1))
    assert not torch.equal(order(1, 0), order(2, 0))


def test_real_mnist(mnist_root):
    data = MNISTDataModule("mnist", str(mnist_root), validation=0.1)
    data.setup()
    assert (len(data.train.labels), len(data.validation.labels), len(data.test.labels)) == (54_000, 6_000, 10_000)
    raw = torchvision.datasets.MNIST(str(mnist_root), train=False)
    assert torch.equal(data.test.images[:, 0], raw.data)
    assert torch.equal(data.test.labels, raw.targets)
    assert int(data.test.labels[0]) == 7  # as tutorial 002 says
    assert "(54000, 1, 28, 28)" in data.shapes()


@pytest.mark.parametrize("harm", ["missing", "truncated", "altered"])
def test_real_mnist_harmed_is_named(mnist_root, tmp_path, harm, monkeypatch):
    shutil.copytree(mnist_root / "MNIST", tmp_path / "MNIST")
    file = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    file.chmod(0o644)
    file.parent.chmod(0o755)
    content = bytearray(file.read_bytes())
    content[5_000_000] ^= 1
    file.write_bytes(content[:7_000_000] if harm == "truncated" else content)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    if harm == "missing":
        file.unlink()
    with pytest.raises(UserError) as refusal:
        datasets.load("mnist", tmp_path)
    words = (
        ["127.0.0.1:9", "MNIST_CNN_DATA", "data=digits", "data.root"] if harm == "missing" else [str(file), "2646ac"]
    )
    for word in words:
        assert word in str(refusal.value)


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """A mirror on loopback with a small MNIST, whose checksums stand for the published ones."""
    random = np.random.default_rng(0)
    files = {}
    for part, count in (("train", 50), ("t10k", 20)):
        files[f"{part}-images-idx3-ubyte"] = idx(random.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        files[f"{part}-labels-idx1-ubyte"] = idx(random.integers(0, 10, count, dtype=np.uint8))
    site = tmp_path / "site"
    site.mkdir()
    for name, content in files.items():
        (site / f"{name}.gz").write_bytes(gzip.compress(content))
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, directory=str(site), **options)

        def do_GET(self):
            requests.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def md5(content):
        return hashlib.md5(content).hexdigest()

    archives = [(f"{name}.gz", md5((site / f"{name}.gz").read_bytes())) for name in files]
    for dataset in (torchvision.datasets.MNIST, torchvision.datasets.KMNIST):
        monkeypatch.setattr(dataset, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(dataset, "resources", archives)
    monkeypatch.setitem(datasets.MD5, "MNIST", {name: md5(content) for name, content in files.items()})
    yield site, requests
    server.shutdown()


@pytest.mark.parametrize("name", ["mnist", "kmnist"])
def test_missing_files_are_downloaded_once_by_many_at_once(small_mnist, tmp_path, name):
    _, requests = small_mnist
    found = []
    threads = [threading.Thread(target=lambda: found.append(datasets.load(name, tmp_path / "d"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(train.images.shape == (50, 1, 28, 28) for train, _ in found)
    assert len(requests) == 8  # of four files, each after a look for redirects
    names = {file.name for file in (tmp_path / "d").rglob("*") if file.is_file()} - {".download.lock"}
    assert names == {name + suffix for name in datasets.MD5["MNIST"] for suffix in ("", ".gz")}


def test_a_download_that_breaks_off_leaves_no_file(small_mnist, tmp_path):
    site, _ = small_mnist
    last = site / "t10k-labels-idx1-ubyte.gz"
    last.write_bytes(last.read_bytes()[:-4])
    with pytest.raises(UserError, match="could not be downloaded"):
        datasets.load("mnist", tmp_path / "d")
    assert [file.name for file in (tmp_path / "d").rglob("*") if file.is_file()] == [".download.lock"]


def test_kmnist_is_checked_against_its_archives(small_mnist, tmp_path):
    datasets.load("kmnist", tmp_path)
    file = tmp_path / "KMNIST" / "raw" / "train-labels-idx1-ubyte"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="train-labels-idx1-ubyte"):
        datasets.load("kmnist", tmp_path)
    file.with_name(file.name + ".gz").unlink()
    with pytest.raises(UserError, match="cannot be checked"):
        datasets.load("kmnist", tmp_path)


def test_no_mnist_is_in_the_repository():
    assert not list(REPOSITORY.glob("[!.]*/**/*idx3-ubyte*"))
