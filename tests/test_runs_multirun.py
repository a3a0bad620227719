"""Sweeps by `mnist-train -m`: every job as it is alone, none lost, here and in processes of their own."""

import csv
import json
import os
import re
import shutil
import signal
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import equal, outcome, processes, said, wait_until

from mnist_cnn.runs import folder as runs
from mnist_cnn.runs import multirun
from mnist_cnn.training import fit

TRAIN = ("-m", "mnist_cnn.train", "-m", "hydra.sweep.dir=sweep")
NETWORK = (  # small, with dropout, whose random numbers are part of what must continue
    "architecture.blocks=[{filters:4,kernel:5,pool:4,dropout:0.25}]",
    "architecture.dense=[{units:16,dropout:0.5}]",
)
SMALL = ("data=digits", "plots=false", "data.batch_size=64", "epochs=2", *NETWORK)
STEPS = 21  # of an epoch: 1,293 digits in batches of 64
PARALLEL = ("hydra/launcher=parallel", "hydra.launcher.n_jobs=2")


def table(folder):
    return {row["job"]: row for row in csv.DictReader((folder / "results.csv").open())}


def files(folder):
    """What a job has left, but for its log and Hydra's record of its start."""
    found = [path for path in folder.rglob("*") if path.is_file() and ".hydra" not in path.parts]
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in found if path.suffix != ".log"}


@pytest.fixture
def no_training(monkeypatch):
    """Jobs that have nothing to do."""

    def fit_nothing(settings, folder, *_, **__):
        (folder / "metrics.json").write_text(json.dumps({"fit_seconds": 0.0}))

    monkeypatch.setattr(fit, "fit", fit_nothing)


def test_a_word_may_take_its_value_from_another(run, tmp_path, no_training):
    """`${…}` is filled in by each job, and the sweep knows its jobs by the words as they were typed."""
    words = ("optimizer=sgd", "optimizer.lr=0.003,0.004", "optimizer.weight_decay=${optimizer.lr}")
    numbered = "hydra.sweep.subdir=${hydra.job.num}"
    ended = run("mnist-train", "-m", "data=digits", *words, "hydra.sweep.dir=sweep", numbered)
    assert ended.status == 0, ended
    assert list(table(tmp_path / "sweep")) == ["0", "1"]
    (tmp_path / "sweep" / "1" / "metrics.json").unlink()
    ended = run("mnist-train", "-m", "multirun.resume=sweep")
    assert (ended.status, "1 of 2 jobs are done" in ended.out) == (0, True), ended


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("seed=range(1,4)",), ["seed=1", "seed=2", "seed=3"]),
        (("optimizer=glob(ada*)",), ["optimizer=adadelta", "optimizer=adam", "optimizer=adamw"]),
        (("architecture.dense=[8],[4,4]", "+data.extra=1"), None),
        (("optimizer=glob(ada*)", "seed=1,-1"), None),
        (("epochs=-1", "seed=1,2"), None),
        (("resume=a,b",), None),
    ],
)
def test_ranges_globs_and_lists_are_planned_before_a_job_begins(run, tmp_path, no_training, words, expected):
    ended = run("mnist-train", "-m", *SMALL, *words, "hydra.sweep.dir=sweep")
    if expected:
        assert ended.status == 0
        assert [row["overrides"].split()[-1] for row in table(tmp_path / "sweep").values()] == expected
    else:
        said(ended)
        assert not (tmp_path / "sweep").exists()


def test_a_sweep_ends_with_a_table_best_first_by_validation(run, tmp_path):
    ended = run("mnist-train", *SMALL, "-m", "optimizer.lr=0.00001,0.01", "seed=1,2")
    assert ended.status == 0
    (file,) = tmp_path.glob("outputs/multirun/*/results.csv")
    rows = list(csv.DictReader(file.open()))
    assert len(rows) == 4
    figures = {"job", "overrides", "val/accuracy", "test/accuracy", "fit_seconds", "error"}
    assert set(rows[0]) >= figures | {"optimizer.lr", "seed"}
    assert {row["optimizer.lr"] for row in rows} == {"1e-05", "0.01"}
    best = [100 * float(row["test/accuracy"]) for row in rows if row["optimizer.lr"] == "0.01"]
    assert f"test {statistics.mean(best):.2f} ± {statistics.stdev(best):.2f} % (2 seeds)" in ended.out
    order = [float(row["val/accuracy"]) for row in rows]
    assert order == sorted(order, reverse=True)
    assert "optimizer.lr=0.01" in rows[0]["overrides"]
    for row in rows:
        assert row["overrides"] in ended.out
        figures = json.loads((file.parent / row["job"] / "metrics.json").read_text())
        assert float(row["test/accuracy"]) == figures["test/accuracy"]
        assert re.fullmatch(r"\d+_[\w.+-]+", row["job"])
    run("mnist-train", *SMALL, "optimizer.lr=0.01", "seed=2", "hydra.run.dir=alone")
    equal(tmp_path / "alone", next(file.parent.glob("3_*")))


def test_a_job_that_fails_in_a_way_nobody_foresaw_is_reported_and_the_others_go_on(run, tmp_path, monkeypatch):
    work = fit.fit

    def failing(settings, *rest, **options):
        if settings.seed == 1:
            raise KeyError("unforeseen")
        return work(settings, *rest, **options)

    monkeypatch.setattr(fit, "fit", failing)
    ended = run("mnist-train", "-m", *SMALL, "seed=1,2", "hydra.sweep.dir=sweep")
    assert ended.status == 1
    first, last = ended.err.splitlines()
    assert re.fullmatch(r"error: job 0 \(data=digits .* seed=1\): KeyError: 'unforeseen'", first)
    assert last == f"1 of 2 jobs failed; continue with: mnist-train -m multirun.resume={tmp_path / 'sweep'}"
    failed, finished = sorted(table(tmp_path / "sweep").values(), key=lambda row: not row["error"])
    assert (failed["error"], bool(finished["test/accuracy"])) == ("KeyError: 'unforeseen'", True)
    assert "Traceback" in (tmp_path / "sweep" / failed["job"] / "error.txt").read_text()
    assert "failed: KeyError: 'unforeseen'" in ended.out

    before = files(tmp_path / "sweep" / finished["job"])
    monkeypatch.setattr(fit, "fit", work)
    ended = run("mnist-train", "-m", f"multirun.resume={tmp_path / 'sweep'}")
    assert (ended.status, ended.err) == (0, "")
    assert f"{failed['job']}: failed, run again" in ended.out
    assert f"{finished['job']}: kept" in ended.out
    assert not any(row["error"] for row in table(tmp_path / "sweep").values())
    assert files(tmp_path / "sweep" / finished["job"]) == before
    assert not (tmp_path / "sweep" / failed["job"] / "error.txt").exists()


def test_fail_fast_ends_the_sweep_at_the_first_failing_job(run, tmp_path):
    words = ("seed=1,2", "initialize=nowhere,null", "fail_fast=true", "hydra.sweep.dir=sweep")
    ended = run("mnist-train", "-m", *SMALL, *words)
    assert ended.status == 1
    first, last = ended.err.splitlines()
    assert re.match(r"error: job 0 \(.*initialize=nowhere\): checkpoint nowhere does not exist", first)
    assert last.startswith("the sweep was stopped, as fail_fast=true: 0 of 4 jobs are done; not begun: ")
    assert last.count(" | ") == 2
    (name,) = table(tmp_path / "sweep")
    assert "fail_fast" not in name


@pytest.mark.parametrize("way", ["the same command", "its folder alone"])
def test_an_interrupted_sweep_ends_with_every_job_as_it_is_alone(run, tmp_path, signalled, way):
    for seed in (1, 2):
        run("mnist-train", *SMALL, f"seed={seed}", f"hydra.run.dir=alone{seed}")
    command = ("mnist-train", "-m", *SMALL, "seed=1,2,3", "hydra.sweep.dir=a sweep")
    signum = signal.SIGTERM if way == "the same command" else signal.SIGINT
    signalled(signum, 2 * STEPS + 5)
    ended = run(*command)
    sweep = tmp_path / "a sweep"
    assert ended.status == 128 + signum
    assert re.search(r"seed=2 .*–  interrupted$", ended.out, flags=re.MULTILINE)
    assert re.search(rf"not begun: [^|]* seed=3; continue with: mnist-train -m 'multirun.resume={sweep}'\n", ended.err)
    first, second = sorted(path for path in sweep.iterdir() if re.match(r"\d_", path.name))
    before = files(first)
    if way == "its folder alone":
        sweep.rename(tmp_path / "moved")
        sweep, first, second = (tmp_path / "moved" / path.relative_to(sweep) for path in (sweep, first, second))
        command = ("mnist-train", "multirun.resume=moved")
    ended = run(*command)
    assert (ended.status, ended.err) == (0, "")
    assert f"{first.name}: kept" in ended.out
    assert f"{second.name}: resumed" in ended.out
    assert files(first) == before
    assert [row["error"] for row in table(sweep).values()] == [""] * 3
    for place in (first, second):
        equal(tmp_path / f"alone{place.name[-1]}", place)
    assert run("mnist-train", "-m", f"multirun.resume={sweep}").out.count(": kept") == 3


def test_another_sweeps_folder_is_refused_and_left_as_it_is(run, tmp_path, no_training):
    own = tmp_path / "conf" / "experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# @package _global_\nepochs: 1\n")
    command = ("mnist-train", "--config-dir", "conf", "-m", *SMALL, "experiment=mine", "hydra.sweep.dir=sweep")
    assert run(*command, "seed=1,2").status == 0
    before = {path: path.read_bytes() for path in (tmp_path / "sweep").rglob("*") if path.is_file()}
    said(run(*command, "seed=1,3"), "another sweep's folder", "seed=1,2, not seed=1,3", "multirun.resume=")
    said(run(*command, "seed=1,2", "optimizer.lr=0.1"), "no optimizer.lr, not optimizer.lr=0.1")
    said(run(*command), "it has seed=1,2, not none")
    said(run(*command[:4], "seed=1,2", *command[4:]), "another sweep's folder", "seed=1,2, not seed=1,2 data=digits")
    own_yaml = ("mnist-train", "--config-dir", "conf", "-m")
    said(run(*own_yaml, "multirun.resume=sweep", "seed=4"), "it has seed=1,2, not seed=4")
    said(run("mnist-train", "-m", "multirun.resume=sweep"), "has --config-dir", "give it again on the command line")
    said(run("mnist-train", "-m", "multirun.resume=sweep", "hydra.sweep.dir=x"), "leave out hydra.sweep.dir")
    said(run("mnist-train", "-m", "multirun.resume=conf"), "is not a sweep's folder: it has no sweep.yaml")
    said(run("mnist-train", *SMALL, "hydra.run.dir=sweep"), "is another sweep's folder")
    assert before == {path: path.read_bytes() for path in (tmp_path / "sweep").rglob("*") if path.is_file()}
    assert run(*own_yaml, "multirun.resume=sweep").status == 0


def test_a_job_that_would_not_be_the_same_now_is_refused(run, tmp_path):
    command = ("mnist-train", "-m", *SMALL, "epochs=1", "seed=1", "hydra.sweep.dir=sweep")
    run(*command)
    (job,) = table(tmp_path / "sweep")
    file = tmp_path / "sweep" / job / "config.yaml"
    content = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**content, "optimizer": {**content["optimizer"], "lr": 0.5}}))
    said(run(*command), "another sweep's folder", f"its {job} has another optimizer")
    file.write_text(yaml.safe_dump({**content, "run": {**content["run"], "versions": {"mnist-cnn": "0.1.0"}}}))
    said(run(*command), f"{job} was written by mnist-cnn 0.1.0")
    shutil.copytree(tmp_path / "sweep" / job, tmp_path / "sweep" / "7_more")
    file.write_text(yaml.safe_dump(content))
    said(run(*command), "7_more is no job of this one")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_two_jobs(run, tmp_path, monkeypatch, no_training, signum):
    monkeypatch.setattr(multirun.MultirunCallback, "on_job_end", lambda *_, **__: os.kill(os.getpid(), signum))
    ended = run("mnist-train", "-m", *SMALL, "seed=1,2", "hydra.sweep.dir=sweep")
    assert ended.status == 128 + signum
    line = r"the sweep was stopped: 1 of 2 jobs are done \(0_\S*seed-1\); not begun: .*seed=2; continue with: .*\n"
    assert re.fullmatch(line, ended.err)
    assert len(table(tmp_path / "sweep")) == 1


def test_two_sweeps_at_once_and_two_jobs_never_share_a_folder(run, tmp_path):
    said(run("mnist-train", "-m", *SMALL, "seed=1,2", "hydra.sweep.subdir=x"), "the folder of jobs 0 and 1 alike")
    assert not list(tmp_path.iterdir())
    (tmp_path / "sweep").mkdir()
    with runs.alone_in(tmp_path / "sweep"):
        said(run("mnist-train", "-m", *SMALL, "seed=1,2", "hydra.sweep.dir=sweep"), "another process trains")


def test_another_sweeper_plans_as_it_goes(run, tmp_path, monkeypatch):
    """One that Hydra takes from a plugin, of whose jobs nothing is known beforehand: there is no table."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.plugins import Plugins
    from hydra.plugins.sweeper import Sweeper

    class Other(Sweeper):
        def __init__(self, **options):
            self.basic = BasicSweeper(**options)

        def setup(self, **options):
            self.basic.setup(**options)

        def sweep(self, arguments):
            return self.basic.sweep(arguments)

    Other.__module__, Other.__qualname__ = "hydra_plugins.test", "Other"
    monkeypatch.setitem(sys.modules, "hydra_plugins.test", SimpleNamespace(Other=Other))
    Plugins.instance().register(Other)
    sweeper = "hydra.sweeper._target_=hydra_plugins.test.Other"
    ended = run("mnist-train", "-m", *SMALL, "epochs=1", "initialize=nowhere,null", sweeper, "hydra.sweep.dir=sweep")
    assert (ended.status, ended.err.count("checkpoint nowhere does not exist")) == (1, 1)
    assert len(list((tmp_path / "sweep").glob("*/metrics.json"))) == 1
    said(run("mnist-train", "-m", *SMALL, "seed=1,2", sweeper, "hydra.sweep.dir=sweep"), "another sweep's folder")


@pytest.mark.parametrize("launcher", ["parallel", "slurm"])
def test_a_launcher_that_is_not_installed(start, tmp_path, launcher):
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "__init__.py").touch()  # hides those that are
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    process = start(*TRAIN, "seed=1,2", f"hydra/launcher={launcher}", env={"PYTHONPATH": path})
    said(outcome(process), f"pip install 'mnist-cnn[{'joblib' if launcher == 'parallel' else 'submitit'}]'")
    assert not (tmp_path / "sweep").exists()


def test_a_failing_job_of_another_command_fails_its_sweep(run, tmp_path, trained):
    ended = run("mnist-evaluate", "-m", f"checkpoint=nowhere,{trained}", "plots=false", "hydra.sweep.dir=sweep")
    assert (ended.status, "error: job 0 (checkpoint=nowhere" in ended.err) == (1, True)
    assert len(list((tmp_path / "sweep").glob("*/evaluation.json"))) == 1


# --- jobs in processes of their own ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "at_once", "expected"),
    [
        ("", 2, ["0", "0", "0"]),
        ("0", 2, ["0", "0", "0"]),
        ("0,1", 2, ["0", "1", "0"]),
        ("4,5,6,7", 2, ["4,5", "6,7", "4,5"]),
        ("0,1", 3, ["0", "1", "0"]),
    ],
)
def test_jobs_share_the_gpus(monkeypatch, gpus, at_once, expected):
    monkeypatch.setenv("MNIST_CNN_GPUS", gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [multirun.gpus_of_job(number, at_once) for number in range(3)] == expected


def test_jobs_at_once_are_the_jobs_alone(run, start, tmp_path):
    """Each has its own of two GPUs and a part of the threads; a failing one is reported, and a line tells of each.

    Of submitit: tests/test_runs_slurm.py.
    """
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 0\necho 1\n")
    program.chmod(0o755)
    small = (*SMALL, "epochs=1", "optimizer._target_=disturbed.Noting")
    words = (*small, "initialize=null,nowhere", "hydra/launcher=parallel")
    process = start(*TRAIN, *words, env={"PATH": f"{program.parent}:{os.environ['PATH']}"})
    status, out, err = outcome(process)
    assert status == 1, err
    wait_until(lambda: not processes(process.pid))  # joblib's tracker of resources ends a moment later
    assert "epoch 1/1" not in out
    line, last = err.splitlines()
    assert re.fullmatch(
        r"1 of 2 jobs failed; continue with: mnist-train -m multirun.resume=\S+ optimizer._target_=disturbed.Noting",
        last,
    )
    assert re.fullmatch(r"error: job 1 \(.* initialize=nowhere.*\): checkpoint nowhere does not exist.*", line)
    assert len(re.findall(r"^job 0 \(.*\): test accuracy [\d.]+%, [\d.]+ s$", out, flags=re.MULTILINE)) == 1
    finished, failed = table(tmp_path / "sweep").items()
    assert (finished[1]["error"], failed[1]["error"][:18]) == ("", "checkpoint nowhere")
    assert (tmp_path / "noted").read_text() == "GPU 0, 1 thread"
    run("mnist-train", *small, "accelerator.threads=1", "hydra.run.dir=alone")
    equal(tmp_path / "alone", tmp_path / "sweep" / finished[0])


def begun(start, tmp_path, number):
    """A sweep of three long jobs, two at once, both of which have a checkpoint."""
    process = start(*TRAIN, *SMALL, "epochs=9999", "seed=1,2,3", "accelerator=cpu", *PARALLEL)
    sweep = tmp_path / "sweep"
    wait_until(lambda: process.poll() is not None or len(list(sweep.glob("*/checkpoints/last.ckpt"))) == number)
    return process, sweep


def ended_with_its_table(process, sweep):
    """The outcome of such a sweep, of which nothing goes on."""
    ended = outcome(process)
    assert "Traceback" not in ended.err + ended.out
    line = ended.err.splitlines()[-1]
    assert line.startswith("the sweep was stopped: 0 of 3 jobs are done; not begun: ")
    assert line.endswith(f"; continue with: mnist-train -m multirun.resume={sweep}")
    assert line.count("seed=3") == 1
    assert [row["error"] for row in table(sweep).values()] == ["interrupted"] * 2
    wait_until(lambda: not processes(process.pid))
    return ended


def test_ctrl_c_ends_jobs_in_other_processes_with_the_sweep(run, start, tmp_path):
    process, sweep = begun(start, tmp_path, 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    ended = ended_with_its_table(process, sweep)
    assert (ended.status, len(ended.err.splitlines())) == (130, 1)
    said(run("mnist-train", f"multirun.resume={sweep}", "hydra/launcher=basic", "epochs=1"), "epochs=9999, not")


def test_a_worker_that_is_killed_ends_the_sweep_with_its_table(start, tmp_path):
    process, sweep = begun(start, tmp_path, 2)
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in processes(process.pid)}
    workers = [pid for pid, command in commands.items() if "LokyProcess" in command]
    os.kill(workers[0], signal.SIGKILL)
    ended = ended_with_its_table(process, sweep)
    assert ended.status == 1
    assert ended.err.startswith("error: the sweep broke off: TerminatedWorkerError: A worker process")
