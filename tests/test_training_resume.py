"""What a run keeps while it goes, and what an interrupted one goes on from: to the same bits."""

import errno
import os
import re
import shutil
import signal

import pytest
import torch
import yaml
from conftest import NETWORK, QUICK, STEPS, equal, metrics, outcome, said, same, wait_until, weights

from mnist_cnn.models.checkpoint import read_checkpoint
from mnist_cnn.training import callbacks
from mnist_cnn.training.module import DigitClassifier

SETTINGS = ("data=digits", "plots=false", "data.batch_size=64", "epochs=2", *NETWORK)
OFTEN = "checkpoint.every_seconds=1e-9"  # at each step
VARIANTS = {
    "plain": ("schedule=exponential",),
    "everything": (
        *("optimizer=muon", "schedule=onecycle", "ema_decay=0.8", "augmentation=affine", "label_smoothing=0.1"),
        "architecture.blocks=[{filters:4,kernel:5,batch_norm:true,bias:false,pool:4,dropout:0.25}]",
    ),
    "accumulation": ("trainer.accumulate_grad_batches=4", "schedule=onecycle"),
    "validation within the epoch": ("trainer.val_check_interval=5", "optimizer=keras_adam"),
    "no validation": ("data.validation=0.0", "schedule=linear", "optimizer=keras_rmsprop"),
    "limited steps": (f"trainer.max_steps={STEPS + 5}", "schedule=cosine"),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run of a variant that nothing interrupted."""
    from mnist_cnn import train

    folders = {}

    def of(variant):
        if variant not in folders:
            folders[variant] = tmp_path_factory.mktemp("undisturbed") / "run"
            train([*SETTINGS, *VARIANTS[variant], f"hydra.run.dir={folders[variant]}"])
        return folders[variant]

    return of


def begin(run, variant="plain", *words):
    return run("mnist-train", *SETTINGS, *VARIANTS[variant], *words, "hydra.run.dir=run")


def last_checkpoint(tmp_path):
    return read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")


@pytest.fixture
def failing(monkeypatch):
    """Let the n-th write of last.ckpt fail; each epoch writes it, after best.ckpt where it is better."""

    def use(number, fail):
        write, written = callbacks.save, []

        def save(path, content):
            written.extend([path] if path.name == "last.ckpt" else [])
            if len(written) == number and path.name == "last.ckpt":
                monkeypatch.setattr(callbacks, "save", write)
                fail(path)
            write(path, content)

        monkeypatch.setattr(callbacks, "save", save)

    return use


def no_room(path):
    raise OSError(errno.ENOSPC, "No space left on device")


# --- signals -------------------------------------------------------------------------------------------------

MOMENTS = [
    *(("plain", signal.SIGTERM, step) for step in (1, STEPS)),
    ("everything", signal.SIGINT, STEPS + 9),
    *(("accumulation", signal.SIGTERM, step) for step in (STEPS - 1, STEPS + 7)),
    ("validation within the epoch", signal.SIGTERM, 5),
    ("no validation", signal.SIGTERM, 23),  # the last of the first epoch there
    ("limited steps", signal.SIGTERM, STEPS + 5),
]


@pytest.mark.parametrize(("variant", "signum", "step"), MOMENTS)
def test_a_signal_finishes_the_step_and_saves(run, tmp_path, signalled, undisturbed, variant, signum, step):
    signalled(signum, step)
    ended = begin(run, variant)
    assert ended.status == 128 + signum
    assert ended.err == f"stopped by {signum.name}; continue with: mnist-train resume={tmp_path / 'run'}\n"
    if variant == "plain":
        assert last_checkpoint(tmp_path)[0]["global_step"] == step
    ended = run("mnist-train", "resume=run")
    assert (ended.status, ended.err) == (0, "")
    equal(undisturbed(variant), tmp_path / "run")


@pytest.mark.parametrize("variant", ["plain", "everything", "validation within the epoch"])
def test_a_signal_while_it_validates(run, tmp_path, signalled, undisturbed, variant):
    signalled(signal.SIGTERM, 2, DigitClassifier, "validation_step")
    assert begin(run, variant).status == 143
    assert len(last_checkpoint(tmp_path)[1].history) == (variant != "validation within the epoch")
    assert run("mnist-train", "resume=run").status == 0
    equal(undisturbed(variant), tmp_path / "run")


def test_a_run_that_is_stopped_again_and_again(run, tmp_path, signalled):
    """On two threads, whose sums are the same each time as well."""
    words = (*SETTINGS, "accelerator.threads=2", "schedule=onecycle")
    whole = run("mnist-train", *words).folder()
    signalled(signal.SIGTERM, 5)
    run("mnist-train", *words, "hydra.run.dir=run")
    for number in (1, 20, 9):
        signalled(signal.SIGINT, number)
        assert run("mnist-train", "resume=run").status == 130
    assert run("mnist-train", "resume=run").status == 0
    equal(whole, tmp_path / "run")


def test_a_signal_before_the_first_step_begins_nothing(run, tmp_path, signalled):
    from mnist_cnn.data.datamodule import MNISTDataModule

    signalled(signal.SIGTERM, 1, MNISTDataModule, "setup")
    ended = run("mnist-train", *SETTINGS, "hydra.run.dir=run")
    assert (ended.status, ended.err) == (143, "stopped by SIGTERM; nothing was begun\n")
    assert not (tmp_path / "run").exists()


def test_a_second_signal_ends_at_once_and_the_last_checkpoint_is_whole(start, tmp_path):
    """The first one finds it in a step that takes long: one of all digits at once."""
    words = ["architecture=conv64_128", "data=digits", "data.batch_size=1437", "plots=false", "epochs=9999"]
    process = start("-m", "mnist_cnn.train", *words, "hydra.run.dir=run")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    wait_until(lambda: process.poll() is not None or last.exists())
    process.terminate()
    process.terminate()
    assert outcome(process).status in (-signal.SIGTERM, 143)  # 143 where the step had ended before the second one
    read_checkpoint(last)


# --- SIGKILL -------------------------------------------------------------------------------------------------


def killed(run, prepare, *words):
    """The status of a run in a process of its own, forked from this one, so that torch is loaded once."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        prepare()
        os._exit(run("mnist-train", *words, "hydra.run.dir=run").status)
    finally:
        os._exit(70)


@pytest.mark.parametrize(
    ("variant", "step"),
    [
        ("plain", 1),
        ("everything", STEPS),
        ("accumulation", STEPS + 1),
    ],
)
def test_a_killed_run_goes_on_from_its_last_checkpoint(run, tmp_path, signalled, undisturbed, variant, step):
    words = (*SETTINGS, *VARIANTS[variant], OFTEN)
    assert killed(run, lambda: signalled(signal.SIGKILL, step), *words) == -signal.SIGKILL
    ended = run("mnist-train", "resume=run")
    assert ended.status == 0
    assert ended.err == ("" if step > 1 else f"warning: {tmp_path / 'run'} has no whole checkpoint: it begins again\n")
    equal(undisturbed(variant), tmp_path / "run")


@pytest.mark.parametrize("write", [1, 11, STEPS + 1, STEPS + 3])
def test_killed_while_a_file_is_written(run, tmp_path, signalled, undisturbed, write):
    """Before it has its name: what was there stays whole, and what was half written is cleared away.

    config.yaml, last.ckpt at each step but the epoch's last, then best.ckpt, metrics.csv and last.ckpt.
    """
    words = (*SETTINGS, *VARIANTS["plain"], OFTEN)
    assert killed(run, lambda: signalled(signal.SIGKILL, write, os, "fsync"), *words) == -signal.SIGKILL
    half = [path for path in (tmp_path / "run").rglob(".mnist_cnn-*") if path.is_file()]
    assert len(half) == 1
    for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt"):
        read_checkpoint(path)
    if write == 1:  # config.yaml itself: nothing has begun
        return said(run("mnist-train", "resume=run"), "not a run's folder")
    assert run("mnist-train", "resume=run").status == 0
    equal(undisturbed("plain"), tmp_path / "run")
    assert not list((tmp_path / "run").rglob(".mnist_cnn-*"))


# --- what is kept --------------------------------------------------------------------------------------------


def test_a_checkpoint_every_so_many_seconds(run, tmp_path, failing, undisturbed):
    """Lost work is that since the last one: here the tenth cannot be written."""
    failing(10, no_room)
    said(begin(run, "plain", OFTEN), "No space left", status=1)
    assert last_checkpoint(tmp_path)[0]["global_step"] == 9
    assert run("mnist-train", "resume=run").status == 0
    equal(undisturbed("plain"), tmp_path / "run")


def test_a_loss_that_is_not_finite_leaves_the_checkpoint_before_it(run, tmp_path):
    """The second epoch's learning rate is absurd; nothing of it is kept, however often checkpoints are written."""
    schedule = ("schedule=exponential", "schedule.scheduler.gamma=1e30", "optimizer=sgd", OFTEN)
    ended = run("mnist-train", *SETTINGS, *schedule, "hydra.run.dir=run")
    said(ended, "is not finite", "at learning rate 5e+28", "try a smaller optimizer.lr", status=1)
    assert STEPS < int(re.search(r"step (\d+)", ended.err)[1]) < 2 * STEPS
    content, description = last_checkpoint(tmp_path)
    assert len(description.history) == 1
    assert all(value.isfinite().all() for value in content["state_dict"].values())


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


HARM = {
    "whole": lambda path: None,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "one wrong bit": flipped,
    "missing": lambda path: path.unlink(),
    "weights alone": lambda path: torch.save(
        {key: torch.load(path, weights_only=True)[key] for key in ("state_dict", "mnist_cnn")}, path
    ),
}


@pytest.mark.parametrize("harm", HARM)
def test_no_room_costs_nothing_older_and_a_harmed_checkpoint_falls_back(run, tmp_path, failing, undisturbed, harm):
    failing(2, no_room)
    said(begin(run), "No space left on device", "its last checkpoint is whole", "mnist-train resume=", "run", status=1)
    folder = tmp_path / "run"
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert len(last_checkpoint(tmp_path)[1].history) == 1
    HARM[harm](folder / "checkpoints" / "last.ckpt")
    ended = run("mnist-train", f"resume={folder}")
    assert ended.status == 0
    older = f"warning: continuing from {folder / 'checkpoints' / 'best.ckpt'}, which is older"
    assert (older in ended.err) == (harm != "whole")
    assert ("last.ckpt" in ended.err) == (harm not in ("whole", "missing"))
    equal(undisturbed("plain"), folder)
    assert not list(folder.glob(".lock"))


@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_the_last_checkpoint_of_a_run_that_has_trained_may_be_harmed_too(run, tmp_path, undisturbed, variant):
    """The best may be of the last epoch, or of one before it."""
    shutil.copytree(undisturbed(variant), tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    flipped(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert run("mnist-train", "resume=run").status == 0
    equal(undisturbed(variant), tmp_path / "run")


def test_a_run_without_a_whole_checkpoint_begins_again(run, tmp_path, failing, undisturbed):
    failing(2, no_room)
    begin(run)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.write_bytes(b"")
    ended = run("mnist-train", "resume=run")
    assert ended.status == 0
    assert "no whole checkpoint: it begins again" in ended.err
    equal(undisturbed("plain"), tmp_path / "run")


def test_the_folder_gone_in_the_middle_is_one_line(run, tmp_path, failing):
    failing(2, lambda path: shutil.rmtree(tmp_path / "run"))
    said(begin(run), "run", "No such file or directory", status=1)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_last_is_the_last_epoch_although_an_earlier_one_is_best(run):
    worse = ("epochs=4", "optimizer.lr=0.003", "schedule=exponential", "schedule.scheduler.gamma=10")
    folder = run("mnist-train", *SETTINGS, *worse).folder()
    best, last = (read_checkpoint(folder / "checkpoints" / name)[1].history for name in ("best.ckpt", "last.ckpt"))
    assert len(last) == 4
    assert len(best) == metrics(folder)["tested_epoch"] < 4
    assert best[-1]["val/accuracy"] == max(row["val/accuracy"] for row in last)


def test_out_of_memory_names_batch_size_and_network(run, monkeypatch):
    from mnist_cnn.models.convnet import ConvNet

    def forward(network, images):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(ConvNet, "forward", forward)
    ended = run("mnist-train", *SETTINGS)
    said(ended, "out of memory", "data.batch_size=64", "parameters (4@5×5, 16)", status=1)


# --- what resume= takes --------------------------------------------------------------------------------------


def test_every_differing_key_is_named(run, tmp_path, failing):
    failing(2, no_room)
    run("mnist-train", *SETTINGS, "hydra.run.dir=run")
    words = ("seed=7", "data.batch_size=32", "architecture=mlp", "optimizer.lr=0.5", "data=mnist", "epochs=9")
    words += ("trainer.gradient_clip_val=1", "ema_decay=0.5", "callbacks=early_stopping")
    names = ("seed=1, not 7", "data.batch_size=64, not 32", "architecture=conv32_64_64, not mlp")
    names += ("optimizer.lr=0.001, not 0.5", "data=digits, not mnist", "trainer.gradient_clip_val=None, not 1")
    names += ("ema_decay=0.0, not 0.5", "callbacks=none, not early_stopping")
    ended = run("mnist-train", "resume=run", *words)
    said(ended, "run", *names)
    assert "epochs" not in ended.err
    said(run("mnist-train", "resume=run", "epochs=1"), "epochs=2", "may only grow", "1")


def test_a_config_that_was_changed_by_hand_is_refused(run, tmp_path, failing):
    failing(2, no_room)
    begin(run)
    file = tmp_path / "run" / "config.yaml"
    content = yaml.safe_load(file.read_text())
    content["seed"] = 9
    content["architecture"]["dense"] = [{"units": 64}]
    file.write_text(yaml.safe_dump(content))
    said(run("mnist-train", "resume=run"), "config.yaml was changed", "architecture", "seed", "last.ckpt")


def test_a_finished_run_is_left_as_it_is(run, undisturbed):
    folder = undisturbed("plain")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix != ".log"}
    ended = run("mnist-train", f"resume={folder}")
    assert (ended.status, ended.err) == (0, "")
    assert "finished already" in ended.out
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix != ".log"}


def test_a_finished_run_may_grow_be_interrupted_and_grow_again(run, tmp_path, signalled):
    folder = run("mnist-train", *QUICK, "data.batch_size=64", "hydra.run.dir=run").folder()
    signalled(signal.SIGTERM, STEPS + 4)
    assert run("mnist-train", "resume=run", "epochs=3").status == 143
    assert not (folder / "metrics.json").exists()
    config = (folder / "config.yaml").read_bytes()
    assert run("mnist-train", "resume=run").status == 0
    assert (folder / "config.yaml").read_bytes() == config
    assert run("mnist-train", "resume=run", "epochs=4").status == 0
    equal(run("mnist-train", *QUICK, "data.batch_size=64", "epochs=4").folder(), folder)


def test_a_moved_run_keeps_its_best_checkpoint(run, tmp_path):
    """It gets worse from the second epoch on, so that the best one is of before the move."""
    words = (*SETTINGS, "optimizer.lr=0.003", "schedule=exponential", "schedule.scheduler.gamma=8")
    run("mnist-train", *words, "hydra.run.dir=a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert run("mnist-train", "resume=b", "epochs=4").status == 0
    whole = run("mnist-train", *words, "epochs=4", "hydra.run.dir=whole").folder()
    assert metrics(whole)["tested_epoch"] <= 2
    equal(whole, tmp_path / "b")


def test_resuming_needs_no_checkpoint_that_the_run_began_from(run, trained, tmp_path):
    shutil.copy(trained / "checkpoints" / "best.ckpt", tmp_path / "start.ckpt")
    folder = run("mnist-train", *QUICK[:3], "data.batch_size=256", "initialize=start.ckpt").folder()
    before = weights(folder)
    (tmp_path / "start.ckpt").unlink()
    assert run("mnist-train", f"resume={folder}", "epochs=2").status == 0
    assert not same(before, weights(folder / "checkpoints" / "last.ckpt"))
