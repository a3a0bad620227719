"""What a run keeps while it goes, and what an interrupted one falls back to."""

import errno
import json
import shutil

import pytest
import torch
import yaml
from test_messages import said
from test_train import metrics, same, weights

from mnist_cnn import resume
from mnist_cnn.checkpoint import read_checkpoint

NETWORK = (  # small, with dropout, whose random numbers are part of what must continue
    "architecture.blocks=[{filters:4,kernel:5,pool:4,dropout:0.25}]",
    "architecture.dense=[{units:16,dropout:0.5}]",
)
SETTINGS = ("data=digits", "plots=false", "data.batch_size=64", "epochs=3", *NETWORK)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    from mnist_cnn import train

    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train([*SETTINGS, f"hydra.run.dir={folder}"])
    return folder


@pytest.fixture
def failing(monkeypatch):
    """Let the n-th checkpoint of a run fail; each epoch here writes best.ckpt, where it is better, and last.ckpt."""

    def use(number, fail):
        write, written = resume.save, []

        def save(path, content):
            written.append(path)
            if len(written) == number:
                monkeypatch.setattr(resume, "save", write)
                fail(path)
            write(path, content)

        monkeypatch.setattr(resume, "save", save)

    return use


def no_room(path):
    raise OSError(errno.ENOSPC, "No space left on device")


def untimed(folder):
    rows = [line.rpartition(",")[0] for line in (folder / "metrics.csv").read_text().splitlines()]
    assert rows[0].endswith("learning_rate")
    return rows, {key: value for key, value in metrics(folder).items() if key != "fit_seconds"}


def equal(first, second):
    """The same bits: weights, figures, and what would continue them."""
    for name in ("best.ckpt", "last.ckpt"):
        assert same(weights(first / "checkpoints" / name), weights(second / "checkpoints" / name))
    assert untimed(first) == untimed(second)


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
    failing(6, no_room)
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
    failing(4, no_room)
    run("mnist-train", *SETTINGS, "hydra.run.dir=run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.write_bytes(b"")
    ended = run("mnist-train", "resume=run")
    assert ended.status == 0
    assert "no whole checkpoint: it begins again" in ended.err
    equal(undisturbed, tmp_path / "run")


def test_the_folder_gone_in_the_middle_is_one_line(run, tmp_path, failing):
    failing(4, lambda path: shutil.rmtree(tmp_path / "run"))
    said(run("mnist-train", *SETTINGS, "hydra.run.dir=run"), "run", "No such file or directory", status=1)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_last_is_the_last_epoch_although_an_earlier_one_is_best(run):
    folder = run("mnist-train", *SETTINGS, "optimizer.lr=0.05", "epochs=9").folder()
    best, last = (read_checkpoint(folder / "checkpoints" / name)[1].history for name in ("best.ckpt", "last.ckpt"))
    assert len(last) == 9
    assert len(best) == metrics(folder)["tested_epoch"] < 9
    accuracies = [row["val/accuracy"] for row in last]
    assert best[-1]["val/accuracy"] == max(accuracies)


def test_two_processes_on_one_folder(run, tmp_path, failing):
    failing(4, no_room)
    run("mnist-train", *SETTINGS, "hydra.run.dir=run")
    with resume.alone_in(tmp_path / "run"):
        said(run("mnist-train", "resume=run"), "run", "another process trains in this folder")
    (tmp_path / "new").mkdir()
    with resume.alone_in(tmp_path / "new"):
        said(run("mnist-train", *SETTINGS, "hydra.run.dir=new"), "new", "another process trains in this folder")


def test_every_differing_key_is_named(run, tmp_path, failing):
    failing(4, no_room)
    run("mnist-train", *SETTINGS, "hydra.run.dir=run")
    words = ("seed=7", "data.batch_size=32", "architecture=mlp", "optimizer.lr=0.5", "data=mnist", "epochs=9")
    names = ("seed=1, not 7", "data.batch_size=64, not 32", "architecture=conv32_64_64, not mlp")
    names += ("optimizer.lr=0.001, not 0.5", "data=digits, not mnist")
    ended = run("mnist-train", "resume=run", *words)
    said(ended, "run", *names)
    assert "epochs" not in ended.err
    said(run("mnist-train", "resume=run", "epochs=2"), "epochs=3", "may only grow", "2")


def test_a_config_that_was_changed_by_hand_is_refused(run, tmp_path, failing):
    failing(4, no_room)
    run("mnist-train", *SETTINGS, "hydra.run.dir=run")
    file = tmp_path / "run" / "config.yaml"
    content = yaml.safe_load(file.read_text())
    content["seed"] = 9
    content["architecture"]["dense"] = [{"units": 64}]
    file.write_text(yaml.safe_dump(content))
    said(run("mnist-train", "resume=run"), "config.yaml was changed", "architecture", "seed", "last.ckpt")


def test_out_of_memory_names_batch_size_and_network(run, monkeypatch):
    from mnist_cnn.architectures import ConvNet

    def forward(network, images):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(ConvNet, "forward", forward)
    ended = run("mnist-train", *SETTINGS)
    said(ended, "out of memory", "data.batch_size=64", "parameters (4@5×5, 16)", status=1)


def test_what_a_killed_process_left_half_written_is_cleared_away(run, tmp_path, failing, undisturbed):
    failing(4, no_room)
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
