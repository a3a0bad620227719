"""What a run keeps while it goes, and what an interrupted one falls back to."""

import errno
import json
import re
import shutil
import signal

import pytest
import torch
import yaml
from conftest import equal, outcome, wait_until
from test_messages import said
from test_train import metrics

from mnist_cnn.data import datamodule
from mnist_cnn.models.checkpoint import read_checkpoint
from mnist_cnn.runs import folder as runs
from mnist_cnn.training import resume
from mnist_cnn.training.module import DigitClassifier

NETWORK = (  # small, with dropout, whose random numbers are part of what must continue
    "architecture.blocks=[{filters:4,kernel:5,pool:4,dropout:0.25}]",
    "architecture.dense=[{units:16,dropout:0.5}]",
)
SETTINGS = ("data=digits", "plots=false", "data.batch_size=64", "epochs=3", "schedule=onecycle", *NETWORK)
STEPS = 21  # of an epoch: 1,293 digits in batches of 64


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    from mnist_cnn import train

    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train([*SETTINGS, f"hydra.run.dir={folder}"])
    return folder


@pytest.fixture
def failing(monkeypatch):
    """Let the n-th write of last.ckpt fail; each epoch writes it, after best.ckpt where it is better."""

    def use(number, fail):
        write, written = resume.save, []

        def save(path, content):
            written.extend([path] if path.name != "best.ckpt" else [])
            if len(written) == number and path.name != "best.ckpt":
                monkeypatch.setattr(resume, "save", write)
                fail(path)
            write(path, content)

        monkeypatch.setattr(resume, "save", save)

    return use


def no_room(path):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 8, STEPS, STEPS + 1, 2 * STEPS, 2 * STEPS + 9, 3 * STEPS])
def test_a_signal_finishes_the_step_and_saves(run, tmp_path, signalled, undisturbed, signum, step):
    signalled(signum, step)
    ended = run("mnist-train", *SETTINGS, "hydra.run.dir=run")
    assert ended.status == 128 + signum
    assert ended.err == f"stopped by {signum.name}; continue with: mnist-train resume={tmp_path / 'run'}\n"
    content, _ = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert content["global_step"] == step
    assert run("mnist-train", "resume=run").status == 0
    equal(undisturbed, tmp_path / "run")


def test_a_signal_while_it_validates(run, tmp_path, signalled, undisturbed):
    signalled(signal.SIGTERM, 2, DigitClassifier, "validation_step")
    assert run("mnist-train", *SETTINGS, "hydra.run.dir=run").status == 143
    assert len(read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")[1].history) == 1
    assert run("mnist-train", "resume=run").status == 0
    equal(undisturbed, tmp_path / "run")


def test_a_run_that_is_stopped_again_and_again(run, tmp_path, signalled):
    """On two threads, whose sums are the same each time as well."""
    words = (*SETTINGS, "accelerator.threads=2")
    whole = run("mnist-train", *words).folder()
    signalled(signal.SIGTERM, 5)
    run("mnist-train", *words, "hydra.run.dir=run")
    for number in (1, 20, 9):
        signalled(signal.SIGINT, number)
        assert run("mnist-train", "resume=run").status == 130
    assert run("mnist-train", "resume=run").status == 0
    equal(whole, tmp_path / "run")


def test_a_second_signal_ends_at_once_and_the_last_checkpoint_is_whole(start, tmp_path):
    """The first one finds it in a step that takes long: one of all digits at once."""
    words = ["architecture=conv64_128", "data=digits", "data.batch_size=1437", "plots=false", "epochs=9999"]
    process = start("-m", "mnist_cnn.train", *words, "hydra.run.dir=run")
    checkpoints = tmp_path / "run" / "checkpoints"
    wait_until(lambda: process.poll() is not None or (checkpoints / "last.ckpt").exists())
    process.terminate()
    process.terminate()
    assert outcome(process).status in (-signal.SIGTERM, 143)  # 143 where the step had ended before the second one
    last = checkpoints / "last.ckpt"  # or the one before, where the second one came between their two renamings
    read_checkpoint(last if last.exists() else checkpoints / "previous.ckpt")


def test_a_sweep_that_is_stopped_says_what_is_done(run, tmp_path, signalled):
    signalled(signal.SIGTERM, 3 * STEPS + 5)
    ended = run("mnist-train", "-m", *SETTINGS, "seed=1,2,3,4", "hydra.sweep.dir=sweep")
    assert ended.status == 143
    first, second = ended.err.splitlines()
    assert re.fullmatch(rf"stopped by SIGTERM; continue with: mnist-train resume={tmp_path}/sweep/1_\S*seed-2", first)
    assert re.match(r"the sweep was stopped: 1 of 4 jobs are done \(0_\S*seed-1\); not begun: ", second)
    assert second.count("seed=3") == second.count("seed=4") == 1
    assert len((tmp_path / "sweep" / "results.csv").read_text().splitlines()) == 3
    stopped = re.search(r"resume=(\S+)", first)[1]
    assert run("mnist-train", f"resume={stopped}").status == 0


def test_a_checkpoint_every_so_many_seconds(run, tmp_path, failing, undisturbed, monkeypatch):
    """Lost work is that since the last one: here the tenth, within the second epoch, cannot be written."""
    monkeypatch.setattr(datamodule, "STRETCH", 200)  # several times an epoch, which has 1,293 digits here
    failing(10, no_room)
    words = (*SETTINGS, "checkpoint.every_seconds=1e-9")
    said(run("mnist-train", *words, "hydra.run.dir=run"), "No space left", status=1)
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")[0]["epoch_so_far"]["position"] == 8
    assert run("mnist-train", "resume=run").status == 0
    equal(undisturbed, tmp_path / "run")


def test_a_loss_that_is_not_finite_leaves_the_checkpoint_before_it(run, tmp_path, monkeypatch):
    """The second epoch's learning rate is absurd; nothing of it is kept, however often checkpoints are written."""
    schedule = (
        "schedule=exponential",
        "schedule.scheduler.gamma=1e30",
        "optimizer=sgd",
        "checkpoint.every_seconds=1e-9",
    )
    ended = run("mnist-train", *[w for w in SETTINGS if "schedule" not in w], *schedule, "hydra.run.dir=run")
    said(ended, "is not finite", "at learning rate 5e+28", "try a smaller optimizer.lr", status=1)
    assert STEPS < int(re.search(r"step (\d+)", ended.err)[1]) < 2 * STEPS
    content, description = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert len(description.history) == 1
    assert all(value.isfinite().all() for value in content["state_dict"].values())


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


HARM = {
    "whole": lambda path: None,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "one wrong bit": flipped,
    "missing": lambda path: path.unlink(),
    "weights alone": lambda path: torch.save(
        {key: torch.load(path, weights_only=True)[key] for key in ("state_dict", "mnist_cnn")}, path
    ),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_full_disk_costs_nothing_older_and_a_harmed_checkpoint_falls_back(run, tmp_path, failing, undisturbed, harm):
    failing(3, no_room)
    ended = run("mnist-train", *SETTINGS, "hydra.run.dir=run")
    said(ended, "No space left on device", "mnist-train resume=", "run", status=1)
    folder = tmp_path / "run"
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    assert [
        len(read_checkpoint(folder / "checkpoints" / name)[1].history) for name in ("previous.ckpt", "last.ckpt")
    ] == [1, 2]
    HARM[harm](folder / "checkpoints" / "last.ckpt")
    ended = run("mnist-train", f"resume={folder}")
    assert ended.status == 0
    assert ("continuing from" in ended.err and "previous.ckpt" in ended.err) == (harm != "whole")
    assert ("last.ckpt" in ended.err) == (harm not in ("whole", "missing"))
    equal(undisturbed, folder)
    assert not list(folder.rglob("previous.ckpt"))
    assert not list(folder.glob(".lock"))


def test_a_run_without_a_whole_checkpoint_begins_again(run, tmp_path, failing, undisturbed):
    failing(2, no_room)
    run("mnist-train", *SETTINGS, "hydra.run.dir=run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.write_bytes(b"")
    ended = run("mnist-train", "resume=run")
    assert ended.status == 0
    assert "no whole checkpoint: it begins again" in ended.err
    equal(undisturbed, tmp_path / "run")


def test_the_folder_gone_in_the_middle_is_one_line(run, tmp_path, failing):
    failing(2, lambda path: shutil.rmtree(tmp_path / "run"))
    said(run("mnist-train", *SETTINGS, "hydra.run.dir=run"), "run", "No such file or directory", status=1)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_last_is_the_last_epoch_although_an_earlier_one_is_best(run):
    worse = ("epochs=4", "optimizer.lr=0.003", "schedule=exponential", "schedule.scheduler.gamma=10")
    words = [word for word in SETTINGS if not word.startswith(("schedule", "epochs"))]
    folder = run("mnist-train", *words, *worse).folder()
    best, last = (read_checkpoint(folder / "checkpoints" / name)[1].history for name in ("best.ckpt", "last.ckpt"))
    assert len(last) == 4
    assert len(best) == metrics(folder)["tested_epoch"] < 4
    accuracies = [row["val/accuracy"] for row in last]
    assert best[-1]["val/accuracy"] == max(accuracies)


def test_two_processes_on_one_folder(run, tmp_path, failing):
    failing(2, no_room)
    run("mnist-train", *SETTINGS, "hydra.run.dir=run")
    with runs.alone_in(tmp_path / "run"):
        said(run("mnist-train", "resume=run"), "run", "another process trains in this folder")
    (tmp_path / "new").mkdir()
    with runs.alone_in(tmp_path / "new"):
        said(run("mnist-train", *SETTINGS, "hydra.run.dir=new"), "new", "another process trains in this folder")


def test_every_differing_key_is_named(run, tmp_path, failing):
    failing(2, no_room)
    run("mnist-train", *SETTINGS, "hydra.run.dir=run")
    words = ("seed=7", "data.batch_size=32", "architecture=mlp", "optimizer.lr=0.5", "data=mnist", "epochs=9")
    names = ("seed=1, not 7", "data.batch_size=64, not 32", "architecture=conv32_64_64, not mlp")
    names += ("optimizer.lr=0.001, not 0.5", "data=digits, not mnist")
    ended = run("mnist-train", "resume=run", *words)
    said(ended, "run", *names)
    assert "epochs" not in ended.err
    said(run("mnist-train", "resume=run", "epochs=2"), "epochs=3", "may only grow", "2")


def test_a_config_that_was_changed_by_hand_is_refused(run, tmp_path, failing):
    failing(2, no_room)
    run("mnist-train", *SETTINGS, "hydra.run.dir=run")
    file = tmp_path / "run" / "config.yaml"
    content = yaml.safe_load(file.read_text())
    content["seed"] = 9
    content["architecture"]["dense"] = [{"units": 64}]
    file.write_text(yaml.safe_dump(content))
    said(run("mnist-train", "resume=run"), "config.yaml was changed", "architecture", "seed", "last.ckpt")


def test_out_of_memory_names_batch_size_and_network(run, monkeypatch):
    from mnist_cnn.models.convnet import ConvNet

    def forward(network, images):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(ConvNet, "forward", forward)
    ended = run("mnist-train", *SETTINGS)
    said(ended, "out of memory", "data.batch_size=64", "parameters (4@5×5, 16)", status=1)


def test_what_a_killed_process_left_half_written_is_cleared_away(run, tmp_path, failing, undisturbed):
    failing(2, no_room)
    run("mnist-train", *SETTINGS, "hydra.run.dir=run")
    for name in (".123.metrics.csv", "checkpoints/.77.last.ckpt", "checkpoints/new.ckpt"):
        (tmp_path / "run" / name).write_bytes(b"half")
    assert run("mnist-train", "resume=run").status == 0
    equal(undisturbed, tmp_path / "run")
    left = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert left == {path for path in left if not path.startswith((".1", "checkpoints/."))} - {"checkpoints/new.ckpt"}


def test_a_finished_run_is_left_as_it_is(run, undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.suffix != ".log"}
    ended = run("mnist-train", f"resume={undisturbed}")
    assert (ended.status, ended.err) == (0, "")
    assert "finished already" in ended.out
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.suffix != ".log"}
    assert json.loads((undisturbed / "metrics.json").read_text())["epochs"] == 3
