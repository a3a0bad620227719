"""Several ranks: the steps, the figures and the checkpoints of one process, one folder, and one end for all."""

import csv
import os
import re
import signal
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import equal, outcome, processes, wait_until
from test_messages import said
from test_recipes import ALL as RECIPE
from test_resume import SETTINGS as DROPOUT
from test_train import metrics, weights

from mnist_cnn.data.datamodule import Batches
from mnist_cnn.data.datasets import Digits
from mnist_cnn.models.checkpoint import read_checkpoint
from mnist_cnn.training.ranks import Group

# Without dropout. The last batch, of 13 or 15 digits, is one that two ranks cannot share evenly.
SETTINGS = ("data=digits", "plots=false", "data.batch_size=64", "architecture=conv10", "accelerator=cpu")
TWO = "accelerator.devices=2"
COMMAND = ("-m", "mnist_cnn.train", *SETTINGS, "epochs=1", TWO)


def apart(first, second):
    """The largest difference of any weight."""
    return max((first[name] - second[name]).abs().max().item() for name in first)


def ranks_of(pid):
    """The ranks that a process has started and that go on; other tests' helpers may be its children too."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(OSError):  # it has just ended
            if b"mnist_cnn.training.follow" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


class Failing(torch.optim.SGD):
    """Ends rank 1 at its 26th step: by an exception where the learning rate is 0.01, and else by SIGKILL."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        if self.steps == 26 and os.environ.get("LOCAL_RANK") == "1":
            if self.param_groups[0]["lr"] == 0.01:
                raise ValueError("something odd")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(closure)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize(("digits", "size", "stretch"), [(1293, 64, 3), (65, 64, 1), (64, 64, 2), (7, 16, 0)])
def test_each_digit_once_in_as_many_batches(ranks, digits, size, stretch):
    numbered = Digits(torch.zeros(digits, 1, 28, 28, dtype=torch.uint8), torch.arange(digits))
    order = torch.randperm(digits, generator=torch.Generator().manual_seed(1))
    seen = []
    for rank in range(ranks):
        loader = Batches(numbered, size, lambda: order, stretch, rank, ranks)
        seen.append([labels for group in loader for _, labels in (group if stretch else [group])])
    steps = list(zip(*seen, strict=True))
    for step, whole in zip(steps, order.split(size), strict=True):
        assert torch.cat(step).equal(whole)
        assert max(map(len, step)) - min(map(len, step)) <= 1


@pytest.fixture
def two_threads(monkeypatch):
    """As on two cores, where nobody has said how many threads to take."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_two_ranks_in_a_sweep_make_the_steps_of_one_process(run, tmp_path, two_threads):
    """After 22 steps, with 78 validation digits and 360 test digits; the sweep has a failing job between."""
    words = (*SETTINGS, "epochs=1", "data.validation=78", "data.normalization=standard", "schedule=onecycle")
    alone = run("mnist-train", *words, "seed=2").folder()
    ended = run("mnist-train", "-m", *words, TWO, "seed=2", "initialize=null,nowhere", "hydra.sweep.dir=sweep")
    assert ended.status == 1
    reason, last = ended.err.splitlines()
    assert "checkpoint nowhere does not exist" in reason
    assert last.startswith("1 of 2 jobs failed; continue with: mnist-train -m multirun.resume=")
    assert "2 ranks on this machine (cpu), each with 32 of a batch's 64 digits; threads of each: 1\n" in ended.out
    assert [len(re.findall(line, ended.out, re.MULTILINE)) for line in ("^epoch 1/1", "^test loss", "^total ")] == [
        1
    ] * 3
    folders = sorted(path for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    assert len(folders) == 2
    names = {str(file.relative_to(alone)) for file in alone.rglob("*") if file.is_file()}
    assert {str(file.relative_to(folders[0])) for file in folders[0].rglob("*") if file.is_file()} == names
    logged = (folders[0] / "train.log").read_text().splitlines()
    assert len(logged) == len({line for line in logged if line.strip()})
    assert apart(weights(alone), weights(folders[0])) <= 1e-5
    content, description = read_checkpoint(folders[0] / "checkpoints" / "last.ckpt")
    assert content["global_step"] == len(description.history) * 22 == 22
    ours, theirs = metrics(alone), metrics(folders[0])
    for key in ("train/loss", "val/loss", "test/loss"):
        assert theirs[key] == pytest.approx(ours[key], abs=1e-5)
    for key in ("train/accuracy", "val/accuracy", "test/accuracy"):
        assert theirs[key] == pytest.approx(ours[key], abs=1e-9)
    assert "360 digits" in ended.out


def test_checkpoints_cross_in_the_middle_of_an_epoch(run, tmp_path, signalled):
    """Begun by one process, stopped by SIGTERM; continued by two, stopped by SIGINT; ended by one."""
    words = (*SETTINGS, "epochs=3", "schedule=onecycle")
    whole = run("mnist-train", *words).folder()
    signalled(signal.SIGTERM, 5)
    assert run("mnist-train", *words, "hydra.run.dir=run").status == 143
    signalled(signal.SIGINT, 24)
    ended = run("mnist-train", "resume=run", TWO)
    assert ended.status == 130
    assert ended.err == f"stopped by SIGINT; continue with: mnist-train resume={tmp_path / 'run'}\n"
    content, _ = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert (content["global_step"], content["epoch_so_far"]["seen"]) == (29, 8 * 64)
    assert not ranks_of(os.getpid())
    assert run("mnist-train", "resume=run", "accelerator.devices=1").status == 0
    assert apart(weights(whole), weights(tmp_path / "run")) <= 1e-4
    rows = [[*csv.DictReader((folder / "metrics.csv").open())] for folder in (whole, tmp_path / "run")]
    for one, other in zip(*rows, strict=True):
        assert float(one["train/loss"]) == pytest.approx(float(other["train/loss"]), abs=1e-4)


@pytest.mark.parametrize("extra", [(), RECIPE], ids=["dropout", "a record's recipe"])
def test_as_many_ranks_continue_to_the_same_bits(run, tmp_path, signalled, extra):
    whole = run("mnist-train", *DROPOUT, *extra, TWO).folder()
    signalled(signal.SIGTERM, 30)
    assert run("mnist-train", *DROPOUT, *extra, TWO, "hydra.run.dir=run").status == 143
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")[0]["epoch_so_far"]["position"] == 9
    assert run("mnist-train", "resume=run").status == 0
    equal(whole, tmp_path / "run")


def test_a_rank_that_fails_ends_the_others_and_the_sweep_goes_on(run, tmp_path):
    """The first job's rank 1 is killed and the second's raises, each in the second epoch."""
    words = (*SETTINGS, TWO, "epochs=9", "optimizer=sgd", "optimizer._target_=test_data_parallel.Failing")
    ended = run("mnist-train", "-m", *words, "optimizer.lr=0.02,0.01", "hydra.sweep.dir=sweep")
    assert ended.status == 1
    first, second, last = ended.err.splitlines()
    assert "rank 1 was ended by SIGKILL; what it has saved is whole: mnist-train resume=" in first
    assert "rank 1 failed: ValueError: something odd (test_data_parallel.py, line" in second
    assert last.startswith("2 of 2 jobs failed")
    assert not ranks_of(os.getpid())
    for folder in sorted(path for path in (tmp_path / "sweep").iterdir() if path.is_dir()):
        assert len(read_checkpoint(folder / "checkpoints" / "last.ckpt")[1].history) == 1
        assert not (folder / ".lock").exists()


def test_the_others_end_where_rank_0_is_killed(start, tmp_path):
    process = start(*COMMAND, "epochs=9999", "hydra.run.dir=run")
    wait_until(lambda: process.poll() is not None or (tmp_path / "run" / "checkpoints" / "last.ckpt").exists())
    assert len(ranks_of(process.pid)) == 1
    process.kill()
    assert outcome(process).err == ""
    wait_until(lambda: not processes(process.pid))
    read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_ranks_that_another_has_started(start, tmp_path, launcher):
    """torchrun, and the variables that srun sets: one folder, each line once, status 0 of all."""
    if launcher == "torchrun":
        runs = [start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *COMMAND)]
    else:
        slurm = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
        slurm |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1"}
        runs = [start(*COMMAND, env={**slurm, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}) for rank in "01"]
    ends = [outcome(process) for process in runs]
    assert [end.status for end in ends] == [0] * len(runs), ends
    assert [end.out for end in ends[1:]] in ([], [""])
    assert ends[0].out.count("epoch 1/1") == ends[0].out.count("test loss") == 1
    (folder,) = (tmp_path / "outputs" / "train").iterdir()
    assert metrics(folder)["epochs"] == 1


def test_as_many_ranks_as_were_started(run, monkeypatch):
    monkeypatch.setattr(Group, "theirs", SimpleNamespace(size=2, broken=False))
    ended = run("mnist-train", *SETTINGS)
    said(ended, "accelerator.devices=1 and accelerator.num_nodes=1 are 1 ranks, but torchrun or srun has started 2")
