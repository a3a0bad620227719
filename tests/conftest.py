"""What the tests share: the shipped configurations, real MNIST where it is, and commands run as a user does."""

import fcntl
import gc
import importlib
import json
import logging
import os
import pickle
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

# Before torch is imported: each test at a time on one thread, whatever the machine's cores; small networks gain nothing
# by more. What several threads change is tested where a test asks for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.set_threshold(50_000, 20, 100)  # each look through all that torch and Lightning bring takes a good part of a second

REPOSITORY = Path(__file__).parents[1]
CONF = REPOSITORY / "conf"
TUTORIALS = ["conv30_70", "conv32_32_dropout", "conv64_128", "conv10", "conv32_64_64"]
ARCHITECTURES = {
    "conv30_70": 195_860,
    "conv32_32_dropout": 600_810,
    "conv64_128": 485_514,
    "conv10": 145_370,
    "conv32_64_64": 93_322,
    "mlp": 407_050,
    "pytorch_example": 1_199_882,
    "lenet5": 61_706,
    "resnet_small": 77_562,
    "xception_small": 90_250,
}
QUICK = ("data=digits", "epochs=1", "plots=false", "architecture=conv10")
NETWORK = (  # small, with dropout, whose random numbers are part of what must continue
    "architecture.blocks=[{filters:4,kernel:5,pool:4,dropout:0.25}]",
    "architecture.dense=[{units:16,dropout:0.5}]",
)
STEPS = 21  # of an epoch of scikit-learn's digits: 1,293 in batches of 64
PATIENCE = 300  # seconds, after which a process hangs: machines stall, and a test that passes never waits so long


@pytest.fixture(scope="session", autouse=True)
def parsed_once():
    """Hydra parses its YAMLs and ours anew for each command: here each once, while its size and time stay."""
    from omegaconf import OmegaConf

    load, parsed = OmegaConf.load, {}

    def loaded(file):
        about = os.fstat(file.fileno())
        key = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
        if key not in parsed:
            parsed[key] = pickle.dumps(load(file))
        return pickle.loads(parsed[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OmegaConf, "load", loaded)
        yield


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """The folder of the real MNIST; the test is skipped where there is none."""
    root = Path(os.environ.get("MNIST_CNN_DATA") or REPOSITORY.parent / "shared" / "data")
    if not (root / "MNIST" / "raw" / "train-images-idx3-ubyte").is_file():
        pytest.skip(f"no MNIST in {root}; set MNIST_CNN_DATA to a folder that has it")
    return root


class Ended(NamedTuple):
    status: int
    out: str
    err: str

    def folder(self) -> Path:
        """The run's folder, which a command names last."""
        return Path(self.out.strip().splitlines()[-1])


def said(ended: Ended, *words: str, status: int = 2) -> None:
    """The command ended with this status and one clear line on stderr that has these words."""
    assert ended.status == status, ended
    assert "Traceback" not in ended.err + ended.out
    assert len(ended.err.strip().splitlines()) == 1, ended.err
    assert ended.err.startswith("error: ")
    for word in words:
        assert word in ended.err


def typed(patch: pytest.MonkeyPatch, name: str, *words: str) -> int:
    """Run a command in this process as a user types it; a process of its own takes seconds more."""
    import torch

    module = importlib.import_module(f"mnist_cnn.{name.removeprefix('mnist-')}")
    patch.setattr(sys, "argv", [name, *words])
    patch.delenv("HYDRA_FULL_ERROR", raising=False)
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as ended:
            module.main()
    finally:
        torch.set_num_threads(threads)
        for handler in logging.getLogger().handlers[:]:
            if isinstance(handler, logging.FileHandler):  # a log ends with its command, whose folder may be gone
                logging.getLogger().removeHandler(handler)
                handler.close()
    return ended.value.code


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def command(name: str, *words: str) -> Ended:
        capsys.readouterr()
        return Ended(typed(monkeypatch, name, *words), *capsys.readouterr())

    return command


@pytest.fixture
def signalled(monkeypatch):
    """Send this process a signal in the n-th step of training, or at the n-th call of something else."""
    import torch

    def use(signum, number, owner=torch.Tensor, method="backward"):
        work, calls = getattr(owner, method), []

        def counted(*arguments, **options):
            calls.append(method)
            if len(calls) == number:
                os.kill(os.getpid(), signum)
            return work(*arguments, **options)

        monkeypatch.setattr(owner, method, counted)

    return use


# --- what runs have written -----------------------------------------------------------------------------------


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def weights(checkpoint: Path) -> dict:
    """Those of a .ckpt file, or of a run's best."""
    from mnist_cnn.models.checkpoint import read_checkpoint

    return read_checkpoint(checkpoint)[0]["state_dict"]


def same(first: dict, second: dict) -> bool:
    """The same names, and the same bits under each."""
    return first.keys() == second.keys() and all(value.equal(second[name]) for name, value in first.items())


def equal(first: Path, second: Path) -> None:
    """The same bits: weights, optimizer, schedule, bookkeeping of both checkpoints, metrics.csv and metrics.json."""
    from disturbances.comparison import first_difference, run_result  # of scripts/; it imports torch

    assert first_difference(run_result(first), run_result(second)) == ""


# --- processes of their own ----------------------------------------------------------------------------------


def processes(session: int) -> list[int]:
    """Those that go on in a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(int(stat.parent.name))
    return found


def wait_until(condition) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture
def start(tmp_path):
    """Start Python in an empty folder and a session of its own, of which nothing outlives the test."""
    begun: list[subprocess.Popen] = []

    def process(*words: str, **options) -> subprocess.Popen:
        changes = options.pop("env", {})
        path = [str(REPOSITORY / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
        env.pop("HYDRA_FULL_ERROR", None)  # which a command in this process has set
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        command = [sys.executable, *words]
        begun.append(subprocess.Popen(command, cwd=tmp_path, env=env | changes, start_new_session=True, **options))
        return begun[-1]

    yield process
    for each in begun:
        while left := processes(each.pid):
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        with each:  # closes its pipes
            pass


def outcome(process: subprocess.Popen) -> Ended:
    """How a process has ended, once all that it has started has closed its output too."""
    out, err = process.communicate(timeout=PATIENCE)
    return Ended(process.returncode, out, err)


def on_a_terminal(start, columns: int, *words: str) -> tuple[int, bytes]:
    """The status of Python on a terminal so wide, and what it showed there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = start(*words, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # the terminal's other side was closed
        while True:
            shown += os.read(ours, 65536)
    os.close(ours)
    return process.wait(PATIENCE), shown


# --- what tests only read ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A finished run on scikit-learn's digits, for the tests that only read one."""
    from mnist_cnn import train

    before = Path.cwd()
    folder = tmp_path_factory.mktemp("trained")
    os.chdir(folder)
    try:
        train(["data=digits", "epochs=3", "architecture=conv10"])
    finally:
        os.chdir(before)
    return next((folder / "outputs" / "train").iterdir())


@pytest.fixture(scope="session")
def swept(tmp_path_factory) -> Path:
    """A finished study of two trials on scikit-learn's digits."""
    folder = tmp_path_factory.mktemp("swept") / "study"
    words = ("sweep=learning_rate", "trials=2", "data=digits", "epochs=1", "architecture=conv10", f"folder={folder}")
    with pytest.MonkeyPatch.context() as patch:
        assert typed(patch, "mnist-sweep", *words) == 0
    return folder


@pytest.fixture(scope="session")
def digit(tmp_path_factory) -> Path:
    """A picture of 28×28 of the first of scikit-learn's test digits."""
    from PIL import Image

    from mnist_cnn.data.datasets import load

    path = tmp_path_factory.mktemp("pictures") / "digit 0 (first).png"
    Image.fromarray(load("digits", "unused")[1].images[0, 0].numpy()).save(path)
    return path
