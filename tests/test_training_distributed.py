"""Several ranks: the steps and figures of one process, one folder, one end for all, and going on afterwards.

What a rank prints goes past pytest: its lines are looked for in train.log, which rank 0 writes as well.
"""

import csv
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from conftest import equal, metrics, outcome, processes, said, wait_until, weights

from mnist_cnn.models.checkpoint import read_checkpoint

# Without dropout and batch norm.
SETTINGS = ("data=digits", "plots=false", "data.batch_size=64", "architecture=conv10", "accelerator=cpu")
SETTINGS += ("augmentation=none",)  # each rank draws its own numbers
TWO = "accelerator.devices=2"
SECONDS_TO_END = 40
AGAIN = "optimizer._target_=disturbed.Adam"  # of one's own: a resumed run is given it again


def apart(first, second):
    """The largest difference of any weight."""
    return max((first[name] - second[name]).abs().max().item() for name in first)


def jobs(sweep):
    return sorted(path for path in sweep.iterdir() if path.is_dir() and path.name[0].isdigit())


def ranks():
    """Those of this process that go on: children of the server that forks them."""
    servers = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    servers = [pid for pid in servers if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return [each for pid in servers for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def disturbing(tmp_path, signum, at, rank=1, pid=0):
    """Words by which a rank sends a signal in its step `at`."""
    words = {"signum": int(signum), "at": at, "rank": rank, "pid": pid, "done": tmp_path / "disturbed"}
    return (AGAIN, *(f"+optimizer.{key}={value}" for key, value in words.items()))


def test_two_ranks_in_a_sweep_make_the_steps_of_one_process(run, tmp_path):
    """The last batch has 15 digits, which two ranks cannot share evenly, and then 1, of which one rank has none."""
    validation = {78: 22, 28: 23}
    words = (*SETTINGS, "epochs=1", "data.normalization=standard", "schedule=onecycle")
    alone = [run("mnist-train", *words, f"data.validation={count}").folder() for count in validation]
    ended = run("mnist-train", "-m", *words, TWO, "data.validation=78,28", "hydra.sweep.dir=sweep")
    assert (ended.status, ended.err) == (0, "")
    assert len(jobs(tmp_path / "sweep")) == 2
    for steps, one, other in zip(validation.values(), alone, jobs(tmp_path / "sweep"), strict=True):
        names = {str(file.relative_to(one)) for file in one.rglob("*") if file.is_file()}
        assert {str(file.relative_to(other)) for file in other.rglob("*") if file.is_file()} == names
        logged = (other / "train.log").read_text()
        assert [len(re.findall(words, logged)) for words in ("epoch 1/1", "test loss", "\ntotal ")] == [1, 1, 1]
        content, description = read_checkpoint(other / "checkpoints" / "last.ckpt")
        assert content["global_step"] == description.history[0]["step"] == steps >= 20
        assert apart(weights(one), weights(other)) <= 1e-5
        ours, theirs = metrics(one), metrics(other)
        for part in ("train", "val", "test"):
            assert theirs[f"{part}/loss"] == pytest.approx(ours[f"{part}/loss"], abs=1e-5)
            assert theirs[f"{part}/accuracy"] == pytest.approx(ours[f"{part}/accuracy"], abs=1e-9)


def test_a_killed_rank_ends_the_run_and_any_number_goes_on(run, tmp_path):
    words = (*SETTINGS, "epochs=2", "schedule=onecycle")
    whole = run("mnist-train", *words, AGAIN).folder()
    disturb = disturbing(tmp_path, signal.SIGKILL, 26)
    before = time.monotonic()
    ended = run("mnist-train", *words, *disturb, TWO, "hydra.run.dir=run")
    assert time.monotonic() - before < 2 * SECONDS_TO_END  # with the start and 26 steps
    said(ended, "rank 1 was ended by SIGKILL", "continue from its last checkpoint", f"resume={tmp_path}/run", status=1)
    assert not (tmp_path / "run" / ".lock").exists()
    assert len(read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")[1].history) == 1
    os.system(f"cp -r {tmp_path}/run {tmp_path}/alone")
    for folder, devices in (("run", 2), ("alone", 1)):
        ended = run("mnist-train", f"resume={folder}", AGAIN, f"accelerator.devices={devices}")
        assert (ended.status, ended.err) == (0, "")
        assert metrics(tmp_path / folder)["epochs"] == 2
        assert apart(weights(whole), weights(tmp_path / folder)) <= 1e-4
    assert not ranks()


def test_a_signal_to_the_command_saves_and_both_numbers_of_ranks_go_on(run, tmp_path):
    """Within the second epoch; as many ranks go on to the same bits, dropout and averages included."""
    words = (*SETTINGS, "epochs=2", "ema_decay=0.8", "architecture.dense=[{units:16,dropout:0.5}]")
    whole = tmp_path / "whole"
    assert run("mnist-train", *words, AGAIN, TWO, f"hydra.run.dir={whole}").status == 0
    disturb = disturbing(tmp_path, signal.SIGTERM, 26, rank=0, pid=os.getpid())
    ended = run("mnist-train", *words, *disturb, TWO, "hydra.run.dir=run")
    assert ended.status == 143
    assert ended.err.startswith(
        f"stopped by SIGTERM; continue with: mnist-train resume={tmp_path / 'run'} data=digits "
    )
    content, description = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert len(description.history) == 1
    assert 26 <= content["global_step"] < 42
    assert content["unfinished_epoch"]["seen"] == 64 * (content["global_step"] - 21)
    os.system(f"cp -r {tmp_path}/run {tmp_path}/alone")
    assert run("mnist-train", "resume=run", AGAIN).status == 0
    equal(whole, tmp_path / "run")
    assert run("mnist-train", "resume=alone", AGAIN, "accelerator.devices=1").status == 0
    rows = [[*csv.DictReader((folder / "metrics.csv").open())] for folder in (whole, tmp_path / "alone")]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == ["21", "42"]


@pytest.mark.parametrize(
    ("words", "status", "expected"),
    [
        (["optimizer._target_=disturbed.Failing"], 1, ["rank 1 failed (ValueError: something odd)", "resume="]),
        (["optimizer=sgd", "optimizer.lr=1e30"], 1, ["is not finite", "try a smaller optimizer.lr"]),
        (["initialize=nowhere"], 2, ["checkpoint nowhere does not exist"]),
        (["trainer.sync_batchnorm=true"], 2, ["trainer.sync_batchnorm=true: torch has it for CUDA only"]),
        (["accelerator.devices=1", "trainer.sync_batchnorm=true"], 2, ["torch has it for CUDA only"]),
    ],
)
def test_what_goes_wrong_in_a_rank_is_one_line(run, words, status, expected):
    said(run("mnist-train", *SETTINGS, "epochs=1", TWO, *words), *expected, status=status)
    assert not ranks()


def test_torchruns_ranks_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    said(run("mnist-train", *SETTINGS, TWO), "leave out torchrun", "accelerator.devices")
    assert not list(tmp_path.rglob("*.*"))


def test_ranks_end_where_the_command_is_killed(start, tmp_path):
    command = ("-m", "mnist_cnn.train", *SETTINGS, "epochs=9999", TWO, "hydra.run.dir=run")
    process = start(*command)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    wait_until(lambda: process.poll() is not None or last.exists())
    process.kill()
    outcome(process)
    wait_until(lambda: not processes(process.pid))
    read_checkpoint(last)


def test_two_machines_are_one_run(start, tmp_path):
    """Two processes on loopback, each with one rank, in folders of their own: the run's is that of rank 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ("accelerator.num_nodes=2", f"accelerator.rendezvous=127.0.0.1:{port}", "epochs=1")
    command = ("-m", "mnist_cnn.train", *SETTINGS, *words)
    ends = [outcome(each) for each in [start(*command, f"hydra.run.dir=run{number}") for number in (1, 2)]]
    assert [(end.status, end.err) for end in ends] == [(0, "")] * 2, ends
    (folder,) = tmp_path.glob("run*")
    assert metrics(folder)["epochs"] == 1
    assert next(iter(csv.DictReader((folder / "metrics.csv").open())))["step"] == "21"
    assert sum(end.out.count("epoch 1/1") for end in ends) == 1
    assert sum(end.out.count("rank 0 was on another machine") for end in ends) == 1
