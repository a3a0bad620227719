"""MNIST's files: checked by checksum, fetched from mirrors that fail in every way, one good copy for all."""

import gzip
import hashlib
import http.server
import multiprocessing
import re
import shutil
import struct
import threading
import time

import numpy as np
import pytest
import torch
import torchvision
from conftest import PATIENCE

from mnist_cnn.config.schema import UserError
from mnist_cnn.data import datasets, download


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
        content = ARCHIVES[name.rpartition("/")[2]]
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
