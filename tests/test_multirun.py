"""Sweeps by `mnist-train -m`: every job as it is alone, none lost, here and in processes of their own."""

import csv
import os
import re
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import yaml
from conftest import equal, outcome, processes, wait_until
from test_messages import said
from test_resume import NETWORK, STEPS

from mnist_cnn.runs import jobs
from mnist_cnn.training import fit

TRAIN = ("-m", "mnist_cnn.train", "-m", "hydra.sweep.dir=sweep")
ONE_THREAD = "accelerator.threads=1"
AT_ONCE = {"parallel": "hydra.launcher.n_jobs=2", "submitit": "hydra.sweeper.max_batch_size=2"}
PACKAGES = {"parallel": "joblib", "submitit": "submitit"}
SMALL = ("data=digits", "plots=false", "data.batch_size=64", "epochs=2", *NETWORK)


def table(folder):
    return {row["job"]: row for row in csv.DictReader((folder / "results.csv").open())}


def files(folder):
    """What a job has left, but for its log and Hydra's record of its start."""
    left = [path for path in folder.rglob("*") if path.is_file() and ".hydra" not in path.parts]
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in left if path.suffix != ".log"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("seed=range(1,4)",), ["seed=1", "seed=2", "seed=3"]),
        (("optimizer=glob(ada*)",), ["optimizer=adadelta", "optimizer=adam", "optimizer=adamw"]),
        (("architecture.dense=[8],[4,4]", "+data.extra=1"), None),
        (("optimizer=glob(ada*)", "seed=1,-1"), None),
    ],
)
def test_ranges_globs_and_lists_are_planned_before_a_job_begins(run, tmp_path, monkeypatch, words, expected):
    monkeypatch.setattr(fit, "fit", lambda settings, folder, *_: (folder / "metrics.json").write_text("{}"))
    ended = run("mnist-train", "-m", *SMALL, *words, "hydra.sweep.dir=sweep")
    assert ended.status == (0 if expected else 2)
    if expected:
        assert [row["overrides"].split()[-1] for row in table(tmp_path / "sweep").values()] == expected
    else:
        said(ended)
        assert not (tmp_path / "sweep").exists()


def test_a_job_that_fails_in_a_way_nobody_foresaw_is_reported_and_the_others_go_on(run, tmp_path, monkeypatch):
    work = fit.fit

    def failing(settings, *rest):
        if settings.seed == 1:
            raise KeyError("unforeseen")
        return work(settings, *rest)

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
    words = ("seed=1,2", "initialize=null,nowhere", "fail_fast=true", "hydra.sweep.dir=sweep")
    ended = run("mnist-train", "-m", *SMALL, *words)
    assert ended.status == 1
    first, last = ended.err.splitlines()
    assert re.match(r"error: job 1 \(.*initialize=nowhere\): checkpoint nowhere does not exist", first)
    assert last.startswith("the sweep was stopped, as fail_fast=true: 1 of 4 jobs are done (0_")
    assert re.search(r"not begun: .*seed=2 initialize=null.* \| .*seed=2 initialize=nowhere", last)
    assert len(table(tmp_path / "sweep")) == 2
    assert not any("fail_fast" in name for name in table(tmp_path / "sweep"))


@pytest.mark.parametrize("way", ["the same command", "its folder alone"])
def test_an_interrupted_sweep_ends_with_every_job_as_it_is_alone(run, tmp_path, signalled, way, monkeypatch):
    for seed in (1, 2, 3):
        run("mnist-train", *SMALL, f"seed={seed}", f"hydra.run.dir=alone{seed}")
    command = ("mnist-train", "-m", *SMALL, "seed=1,2,3", "hydra.sweep.dir=a sweep")
    signalled(signal.SIGTERM, 2 * STEPS + 5)
    ended = run(*command)
    sweep = tmp_path / "a sweep"
    assert ended.status == 143
    assert re.search(r"seed=2 .*–  interrupted$", ended.out, flags=re.MULTILINE)
    assert re.search(rf"not begun: [^|]* seed=3; continue with: mnist-train -m 'multirun.resume={sweep}'\n", ended.err)
    first, second = sorted(path for path in sweep.iterdir() if re.match(r"\d_", path.name))
    before = files(first)
    if way == "its folder alone":
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        sweep.rename(tmp_path / "moved")
        sweep, first, second = (tmp_path / "moved" / path.relative_to(sweep) for path in (sweep, first, second))
        command = ("mnist-train", "multirun.resume=../moved")
    ended = run(*command)
    assert (ended.status, ended.err) == (0, "")
    assert f"{first.name}: kept" in ended.out
    assert f"{second.name}: resumed" in ended.out
    assert files(first) == before
    assert [row["error"] for row in table(sweep).values()] == [""] * 3
    for name in table(sweep):
        equal(tmp_path / f"alone{name[-1]}", sweep / name)
    assert run("mnist-train", "-m", f"multirun.resume={sweep}").out.count(": kept") == 3


def test_another_sweeps_folder_is_refused_and_left_as_it_is(run, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "fit", lambda settings, folder, *_: (folder / "metrics.json").write_text("{}"))
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
    said(run("mnist-train", "-m", "multirun.resume=sweep", "seed=4"), "the sweep has seed=1,2, not seed=4")
    said(run("mnist-train", "-m", "multirun.resume=sweep", "hydra.sweep.dir=x"), "leave out hydra.sweep.dir")
    said(run("mnist-train", "-m", "multirun.resume=conf"), "is not a sweep's folder: it has no multirun.yaml")
    assert before == {path: path.read_bytes() for path in (tmp_path / "sweep").rglob("*") if path.is_file()}
    assert run("mnist-train", "multirun.resume=sweep").status == 0  # with the sweep's own --config-dir


def test_a_job_that_would_not_be_the_same_now_is_refused(run, tmp_path):
    command = ("mnist-train", "-m", *SMALL, "epochs=1", "seed=1", "hydra.sweep.dir=sweep")
    run(*command)
    (job,) = table(tmp_path / "sweep")
    file = tmp_path / "sweep" / job / "config.yaml"
    content = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**content, "optimizer": {**content["optimizer"], "lr": 0.5}}))
    said(run(*command), "another sweep's folder", f"its {job} has another optimizer")
    shutil.copytree(tmp_path / "sweep" / job, tmp_path / "sweep" / "7_more")
    file.write_text(yaml.safe_dump(content))
    said(run(*command), "7_more is no job of this one")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_two_jobs(run, tmp_path, monkeypatch, signum):
    monkeypatch.setattr(fit, "fit", lambda settings, folder, *_: (folder / "metrics.json").write_text("{}"))
    monkeypatch.setattr(jobs, "left", lambda: os.kill(os.getpid(), signum))
    ended = run("mnist-train", "-m", *SMALL, "seed=1,2", "hydra.sweep.dir=sweep")
    assert ended.status == 128 + signum
    assert re.fullmatch(
        r"the sweep was stopped: 1 of 2 jobs are done \(0_\S*seed-1\); not begun: .*seed=2; .*\n", ended.err
    )
    assert len(table(tmp_path / "sweep")) == 1


def test_two_sweeps_at_once_and_two_jobs_never_share_a_folder(run, tmp_path):
    from mnist_cnn.runs.folder import alone_in

    said(run("mnist-train", "-m", *SMALL, "seed=1,2", "hydra.sweep.subdir=x"), "the folder of jobs 0 and 1 alike")
    assert not list(tmp_path.iterdir())
    (tmp_path / "sweep").mkdir()
    with alone_in(tmp_path / "sweep"):
        said(run("mnist-train", "-m", *SMALL, "seed=1,2", "hydra.sweep.dir=sweep"), "another process trains")


def test_another_sweeper_plans_as_it_goes(run, tmp_path, monkeypatch):
    """One that Hydra takes from a plugin: its own class, of whose jobs nothing is known beforehand."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.plugins import Plugins

    class Other(BasicSweeper):
        pass

    Other.__module__, Other.__qualname__ = "hydra_plugins.test", "Other"
    monkeypatch.setitem(sys.modules, "hydra_plugins.test", SimpleNamespace(Other=Other))
    Plugins.instance().register(Other)
    sweeper = "hydra.sweeper._target_=hydra_plugins.test.Other"
    ended = run("mnist-train", "-m", *SMALL, "epochs=1", "initialize=nowhere,null", sweeper, "hydra.sweep.dir=sweep")
    assert ended.status == 1
    assert sorted(bool(row["error"]) for row in table(tmp_path / "sweep").values()) == [False, True]
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


@pytest.fixture
def two_gpus(tmp_path):
    """An environment with an nvidia-smi that knows of two."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 0\necho 1\n")
    program.chmod(0o755)
    return {"PATH": f"{program.parent}:{os.environ['PATH']}", "LOKY_MAX_CPU_COUNT": "2"}


def gpus(folders):
    return {re.search(r"on GPU (\d)", (folder / "train.log").read_text())[1] for folder in folders}


@pytest.mark.parametrize("launcher", ["parallel", "submitit"])
def test_jobs_at_once_are_the_jobs_alone(run, start, tmp_path, two_gpus, launcher):
    """A failing one is reported once and at once; threads and GPUs are divided."""
    pytest.importorskip(PACKAGES[launcher])
    words = (*SMALL, "initialize=null,nowhere", f"hydra/launcher={launcher}", AT_ONCE[launcher])
    process = start(*TRAIN, *words, env=two_gpus)
    status, out, err = outcome(process)
    assert status == 1, err
    wait_until(lambda: not processes(process.pid))  # joblib's tracker of resources ends a moment later
    lines = err.splitlines()
    assert re.fullmatch(r"error: job 1 \(.* initialize=nowhere\): checkpoint nowhere does not exist.*", lines[0]), err
    assert re.fullmatch(r"1 of 2 jobs failed; continue with: mnist-train -m multirun.resume=\S+", lines[1])
    assert len(lines) == 2
    assert re.search(r"^2 jobs at once, 1 thread each, on GPUs 0, 1$", out, flags=re.MULTILINE)
    assert len(re.findall(r"^\d of 2: job 0 \(.*\): test accuracy \d", out, flags=re.MULTILINE)) == 1
    assert "epoch 1/2" not in out
    finished, failed = table(tmp_path / "sweep").items()
    assert (finished[1]["error"], failed[1]["error"][:18]) == ("", "checkpoint nowhere")
    # Where one ends before the other begins, both may have the same.
    assert gpus(tmp_path / "sweep" / name for name, _ in (finished, failed)) <= {"0", "1"}
    run("mnist-train", *SMALL, ONE_THREAD, "hydra.run.dir=alone")
    equal(tmp_path / "alone", tmp_path / "sweep" / finished[0])


@pytest.mark.parametrize(("launcher", "signum"), [("parallel", signal.SIGINT), ("submitit", signal.SIGTERM)])
def test_a_signal_ends_the_jobs_at_once_with_their_checkpoints(run, start, tmp_path, two_gpus, launcher, signum):
    pytest.importorskip(PACKAGES[launcher])
    words = (*SMALL, "epochs=9999", "seed=1,2,3", f"hydra/launcher={launcher}", AT_ONCE[launcher])
    process = start(*TRAIN, *words, env=two_gpus)
    sweep = tmp_path / "sweep"
    wait_until(lambda: process.poll() is not None or len(list(sweep.glob("*/checkpoints/last.ckpt"))) == 2)
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)  # as a terminal does
    else:
        process.send_signal(signum)
    status, out, err = outcome(process)
    assert status == 128 + signum, err
    assert "Traceback" not in err + out
    (line,) = err.splitlines()
    assert line.startswith("the sweep was stopped: 0 of 3 jobs are done; not begun: ")
    assert line.count("seed=3") == 1
    assert len(table(sweep)) == 2
    begun = [config.parent for config in sweep.glob("*/config.yaml")]
    for folder in begun:
        assert f"stopped by SIGTERM; continue with: mnist-train resume={folder}" in (folder / "train.log").read_text()
    assert gpus(begun) == {"0", "1"}
    wait_until(lambda: not processes(process.pid))
    for folder in begun:  # each is resumed as it was begun
        config = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(config.replace("epochs: 9999", "epochs: 10000"))
    said(run("mnist-train", f"multirun.resume={sweep}", "hydra/launcher=basic"), "has another epochs")


@pytest.fixture
def slurm(tmp_path):
    """PATH with a SLURM of one machine, whose jobs begin at once and again where scontrol was asked for it."""
    programs = {
        "sbatch": f"""
            for script; do :; done
            cp "$script" {tmp_path}/script
            export SLURM_JOB_ID=77 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
            (bash "$script"; while rm {tmp_path}/again; do bash "$script"; done) >{tmp_path}/slurm.log 2>&1 &
            echo Submitted batch job 77""",
        "srun": """
            while [ "${1#--}" != "$1" ]; do case "$1" in --output|--error) shift;; esac; shift; done
            exec "$@\"""",
        "scontrol": f"touch {tmp_path}/again",
        "sacct": "echo 'JobID|State|NodeList'; echo '77|RUNNING|here'",
    }
    (tmp_path / "bin").mkdir()
    for name, script in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return f"{tmp_path / 'bin'}:{os.environ['PATH']}"


def test_a_job_that_slurm_queues_anew_goes_on_where_it_was(run, start, tmp_path, slurm):
    """SIGUSR2 comes before a job's time is up; after SIGTERM, of a machine that is taken away, the rest is the same."""
    pytest.importorskip("submitit")
    settings = (*SMALL, ONE_THREAD, "optimizer._target_=disturbed.Adam")
    run("mnist-train", *settings, "hydra.run.dir=alone")
    environment = {"PATH": slurm, "DISTURB": f"{signal.SIGUSR2:d} 30 {tmp_path / 'signalled'}"}
    process = start(*TRAIN, *settings, "hydra/launcher=slurm", "hydra.launcher.partition=gpu", env=environment)
    status, _, err = outcome(process)
    assert (status, err) == (0, "")
    script = (tmp_path / "script").read_text()
    for line in ("--requeue", "--partition=gpu", "--signal=USR2@120", "--time=240"):
        assert f"#SBATCH {line}\n" in script
    (name,) = table(tmp_path / "sweep")
    log = (tmp_path / "sweep" / name / "train.log").read_text()
    assert log.count("stopped by SIGUSR2") == 1
    assert "begins again" not in log
    equal(tmp_path / "alone", tmp_path / "sweep" / name)
