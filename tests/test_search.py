"""mnist-sweep as a user runs it: studies that are searched, interrupted, shared, reported and trained again."""

import csv
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import signal
import sqlite3
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import postgresql
import pytest
import torch
import yaml
from conftest import CONF, PATIENCE, equal, outcome, wait_until
from optuna.trial import TrialState, create_trial
from PIL import Image

from mnist_cnn import sweep
from mnist_cnn.search import plots, report
from mnist_cnn.search import study as of_study
from mnist_cnn.search.study import SharedStudy, without_password
from mnist_cnn.search.worker import Stop, Worker

COMMAND = ("-m", "mnist_cnn.sweep")
QUICK = ("data=digits", "epochs=1", "architecture=conv10", "data.batch_size=64")
SWEEP = ("mnist-sweep", "sweep=learning_rate", *QUICK, "folder=study")
RANDOM = ("sampler._target_=optuna.samplers.RandomSampler", "+sampler.seed=1")
PRUNE_NOTHING = "pruner._target_=optuna.pruners.NopPruner"


def rows(folder):
    return list(csv.DictReader((folder / "trials.csv").open()))


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def trials(folder, name=None):
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{folder / 'study.db'}")
    return study.get_trials()


def files(folder):
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.rglob("*") if file.is_file()}


def refused(ended, *words, status=2):
    assert ended.status == status, ended
    assert re.fullmatch(r"error: .*\n", ended.err), ended.err
    for word in words:
        assert word in ended.err


@pytest.fixture(autouse=True)
def not_drawn():
    """Pictures take seconds: a test that is about them undoes this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_plots", lambda *_: None)
        yield patch


@pytest.fixture(scope="module")
def server():
    """A real PostgreSQL server; .ci/run installs it and lets none of these tests skip."""
    if not postgresql.programs():
        assert not os.environ.get("MNIST_CNN_POSTGRESQL"), "PostgreSQL's server was to be here"
        pytest.skip("no PostgreSQL server: apt-get install postgresql")
    server = postgresql.Server()
    yield server
    server.close()


@pytest.fixture
def space(tmp_path):
    """Write a search space; gives the words of the command that takes it."""

    def write(**parameters):
        (tmp_path / "own" / "sweep").mkdir(parents=True, exist_ok=True)
        content = {key.replace("__", "."): value for key, value in parameters.items()}
        (tmp_path / "own" / "sweep" / "mine.yaml").write_text(yaml.safe_dump(content))
        return ("mnist-sweep", "--config-dir", "own", "sweep=mine", *QUICK, "folder=study")

    return write


# --- a study from its beginning to its end -------------------------------------------------------------------


def test_a_study_leaves_what_the_readme_says_and_the_same_command_continues_it(run, tmp_path):
    ended = run(*SWEEP, "trials=3", *RANDOM)
    assert (ended.status, ended.err) == (0, "")
    study = tmp_path / "study"
    assert len(re.findall(r"^\d/3  trial \d  [\d.]+%  .* s  optimizer.lr=", ended.out, flags=re.MULTILINE)) == 3
    assert "3 of 3 trials done (0 pruned, 0 failed), 0 running; best" in ended.out
    assert re.search(r"\nbest: trial \d  [\d.]+%  optimizer.lr=[\d.e-]+\nstudy\n$", ended.out)
    assert "epoch 1" not in ended.out
    found = rows(study)
    assert [row["state"] for row in found] == ["complete"] * 3
    for row in found:
        folder = study / row["folder"]
        assert float(row["val/accuracy"]) == metrics(folder)["val/accuracy"]
        assert metrics(folder)["test/accuracy"] is None
        assert not (folder / "plots").exists()
        assert "validation" in (folder / "train.log").read_text()
    before = files(study / "trials")
    ended = run(*SWEEP, "trials=5", *RANDOM)
    assert ended.status == 0
    assert "continuing: 3 of 5 trials done" in ended.out
    assert len({row["optimizer.lr"] for row in rows(study)}) == 5
    assert before.items() <= files(study / "trials").items()


def test_a_trial_is_the_run_of_its_overrides_and_best_is_an_experiment(run, tmp_path, space):
    command = space(
        optimizer={"type": "categorical", "choices": ["adamw", "rmsprop"]},
        optimizer__lr={"type": "float", "low": 0.001, "high": 0.01, "log": True},
        schedule={"type": "categorical", "choices": ["onecycle"]},
        architecture__blocks__0__filters={"type": "int", "low": 4, "high": 9},
        architecture__blocks__0__dropout={"type": "float", "low": 0.1, "high": 0.4, "step": 0.1},
        architecture__dense={"type": "categorical", "choices": [[24], [20, {"units": 16, "dropout": 0.2}]]},
    )
    assert run(*command, "trials=3", "data.validation_from=random", "seed=3").status == 0
    best = max(trials(tmp_path / "study"), key=lambda trial: (trial.value, -trial.number))
    folder = tmp_path / "study" / best.user_attrs["folder"]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["optimizer"]["lr"] == config["schedule"]["scheduler"]["max_lr"] == best.params["optimizer.lr"]
    assert config["architecture"]["blocks"][0]["filters"] == best.params["architecture.blocks.0.filters"]
    equal(folder, run("mnist-train", *best.user_attrs["overrides"]).folder())
    ended = run("mnist-train", "--config-dir", "study", "experiment=best", "plots=false")
    assert ended.status == 0
    assert metrics(ended.folder())["val/accuracy"] == best.value
    assert metrics(ended.folder())["test/accuracy"] > 0.2


@pytest.mark.parametrize("name", sorted(file.stem for file in (CONF / "sweep").glob("*.yaml")))
def test_every_shipped_space_is_searched(run, name):
    architecture = "conv10" if name == "recipe" else "conv32_32_dropout"
    words = (f"architecture={architecture}", "data=digits", "data.validation=1200", "epochs=1")
    ended = run("mnist-sweep", f"sweep={name}", *words, "trials=1")
    assert ended.status == 0
    study = ended.folder()
    assert study.name == f"{name}_architecture-{architecture}_data.validation-1200_data-digits_epochs-1"
    expected = {
        "learning_rate": ["optimizer.lr"],
        "recipe": ["optimizer", "optimizer.lr", "schedule", "data.batch_size", "architecture.dense.0.dropout"],
        "width": [*(f"architecture.blocks.{n}.filters" for n in range(2)), "architecture.dense.0.units"],
    }[name]
    assert [key for key in rows(study)[0] if "." in key or key in ("optimizer", "schedule")] == expected


def test_bad_trials_are_pruned_failing_ones_recorded_and_a_finite_space_ends(run, tmp_path, space):
    command = space(optimizer__lr={"type": "categorical", "choices": [1e-8, 0.003, 1e30]})
    words = ("trials=10", "epochs=3", "optimizer=sgd", "optimizer.momentum=0.9", "augmentation=none")
    words += ("sampler._target_=optuna.samplers.BruteForceSampler", "+sampler.seed=1")
    ended = run(*command, *words, "pruner._target_=optuna.pruners.ThresholdPruner", "+pruner.lower=0.35")
    assert ended.status == 0
    by_rate = {row["optimizer.lr"]: row for row in rows(tmp_path / "study")}
    states = {rate: row["state"] for rate, row in by_rate.items()}
    assert states == {"1e-08": "pruned", "0.003": "complete", "1e+30": "fail"}
    assert by_rate["1e-08"]["epochs"] == "1"
    assert "is not finite" in by_rate["1e+30"]["reason"]
    assert "failed: the loss" in ended.out
    error = tmp_path / "study" / by_rate["1e+30"]["folder"] / "error.txt"
    assert error.read_text().strip() == by_rate["1e+30"]["reason"]
    assert "3 of 3 trials done (1 pruned, 1 failed)" in run(*command, *words).out


def test_the_loss_may_be_searched(run, tmp_path):
    assert run(*SWEEP, "trials=2", "metric=val/loss").status == 0
    best = min(rows(tmp_path / "study"), key=lambda row: float(row["val/loss"]))
    assert f"in {best['folder']}" in (tmp_path / "study" / "experiment" / "best.yaml").read_text()
    assert metrics(tmp_path / "study" / best["folder"])["val/loss"] == float(best["val/loss"])


def test_another_study_in_the_same_place_is_refused_and_named(run, tmp_path):
    assert run(*SWEEP, "trials=1").status == 0
    before = files(tmp_path / "study")
    words = ("study=learning_rate_architecture-conv10_data.batch_size-64_data-digits_epochs-1", "epochs=2", "seed=2")
    refused(run(*SWEEP, *words), "has seed=1, not 2; epochs=1, not 2; leave that out, or name another by study=")
    refused(run(*SWEEP, "study=other"), "study is the folder of the study learning_rate_", "choose another")
    assert files(tmp_path / "study") == before
    (tmp_path / "study" / "study.yaml").write_text("{study: gone, metric: val/loss, storage: null, retries: 1}\n")
    refused(run("mnist-sweep", "report=study"), "has no study gone")


def test_where_every_trial_fails_the_command_does(run, tmp_path, space):
    command = space(optimizer__lr={"type": "float", "low": 1e30, "high": 1e31})
    ended = run(*command, "trials=2", "optimizer=sgd")
    refused(ended, "no trial of study is complete; such as the loss", status=1)
    assert [row["state"] for row in rows(tmp_path / "study")] == ["fail", "fail"]


@pytest.fixture
def quick_trials(monkeypatch):
    """Trials that do not train."""
    monkeypatch.setattr(sweep, "check_machine", lambda _: None)
    monkeypatch.setattr(Worker, "_train", lambda self, trial, parameters: trained(trial, parameters))


def trained(trial, parameters):
    value = 1 / (1 + abs(math.log10(parameters.get("optimizer.lr", 0.003)) + 2.5))
    trial.set_user_attr("folder", f"trials/{trial.number}")
    trial.set_user_attr("overrides", ["optimizer=adam"])
    return {"epochs": 1, "val/accuracy": value, "val/loss": 1 - value}


def test_a_sampler_with_a_seed_gives_each_trial_its_own_whichever_process_begins_it(run, tmp_path, quick_trials):
    words = (*SWEEP[:-1], *RANDOM)
    assert run(*words, "folder=one", "trials=6").status == 0
    rates = [row["optimizer.lr"] for row in rows(tmp_path / "one")]
    assert len(set(rates)) == 6
    for total in (2, 6):  # begun anew
        assert run(*words, "folder=other", f"trials={total}").status == 0
    assert [row["optimizer.lr"] for row in rows(tmp_path / "other")] == rates
    refused(run(*words, "folder=one", "trials=9", "sampler.seed=x"), "sampler.seed=x: must be a whole number")


def test_a_grid_is_dealt_out_to_all_processes(run, tmp_path, space, quick_trials):
    command = space(optimizer__lr={"type": "float", "low": 0.001, "high": 0.01})
    grid = (
        "sampler._target_=optuna.samplers.GridSampler",
        "+sampler.search_space={optimizer.lr: [0.001, 0.004, 0.01]}",
    )
    for total in (1, 50):
        assert run(*command, *grid, f"trials={total}").status == 0
    assert sorted(row["optimizer.lr"] for row in rows(tmp_path / "study")) == ["0.001", "0.004", "0.01"]


def test_any_study_can_be_drawn(tmp_path, not_drawn):
    """Trials without an error, of which there is no logarithm; parameters of one value; labels that are long."""
    not_drawn.undo()
    study = optuna.create_study(direction="maximize")
    lists = optuna.distributions.CategoricalDistribution(["[{filters:32,kernel:3},{filters:64,kernel:3}]", None])
    space = {"blocks": lists, "dropout": optuna.distributions.FloatDistribution(0.3, 0.3)}
    for number, values in enumerate([(1.0, 1.0, 0.97, None), (0.5, 0.4)]):
        for value in values:
            trial = study.ask(
                space if number < 1 else {"lr": optuna.distributions.FloatDistribution(1e-4, 1, log=True)}
            )
            study.tell(trial, value, TrialState.COMPLETE if value else TrialState.FAIL)
        shared = SimpleNamespace(metric="val/accuracy", trials=study.get_trials, folder=tmp_path)
        plots.write_plots(shared, "<a title>", "about it")
        for picture in (tmp_path / "pictures").iterdir():
            assert np.asarray(Image.open(picture).convert("L")).std() > 5
        assert "&lt;a title&gt;" in (tmp_path / "report.html").read_text()


def test_a_report_at_any_time_and_the_best_trained_again_without_the_users_folder(
    run, tmp_path, space, not_drawn, monkeypatch
):
    command = space(optimizer__lr={"type": "float", "low": 0.001, "high": 0.003})
    (tmp_path / "own" / "architecture").mkdir()
    (tmp_path / "own" / "architecture" / "small.yaml").write_text(
        "blocks: [{filters: 4, kernel: 5, pool: 2}]\ndense: []\n"
    )
    assert run(*command, "architecture=small", "trials=2", "+sampler.seed=1").status == 0
    for name in ("trials.csv", "experiment/best.yaml"):
        (tmp_path / "study" / name).unlink()
    not_drawn.undo()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    before = files(tmp_path / "study" / "trials")
    ended = run("mnist-sweep", "report=../study")
    assert (ended.status, ended.err) == (0, "")
    assert "2 of 2 trials done" in ended.out
    assert ended.folder() == Path("../study")
    study = tmp_path / "study"
    names = {"study.yaml", "study.db", "trials", "trials.csv", "experiment", "report.html", "pictures"}
    assert {path.name for path in study.iterdir()} == names
    pictures = {path.stem for path in (study / "pictures").iterdir()}
    # Of two trials that tie there are no importances.
    assert pictures - {"importances"} == {"history", "parallel_coordinate", "slice"}
    page = (study / "report.html").read_text()
    assert page.count('class="plotly-graph-div"') == len(pictures)
    assert not re.search(r'<(script|link)[^>]+(src|href)="?http', page)
    line = next(line for line in ended.out.splitlines() if "experiment=best" in line)
    ended = run(*shlex.split(line), "plots=false")
    assert metrics(ended.folder())["parameters"] == metrics(tmp_path / "study" / "trials" / "0000")["parameters"]
    ended = run("mnist-sweep", "retrain=../study")
    assert ended.status == 0, ended.err
    assert "seed 1 gives the trial's own figure again" in ended.out
    record = json.loads((tmp_path / "study" / "retrain.json").read_text())
    scores = [run["test/accuracy"] for run in record["runs"].values()]
    assert len(scores) == 5
    assert record["test/accuracy mean"] == pytest.approx(sum(scores) / 5)
    done = files(tmp_path / "study" / "retrain")
    assert run("mnist-sweep", "retrain=../study").status == 0
    checkpoints = {file: content for file, content in done.items() if file.suffix == ".ckpt"}
    assert checkpoints.items() <= files(tmp_path / "study" / "retrain").items()
    assert before == files(tmp_path / "study" / "trials")


def test_what_is_wrong_is_said_before_torch_is_imported(start, tmp_path, space):
    space(optimizer={"type": "categorical", "choices": ["adam", "adan"]})
    script = (
        "import sys; sys.argv = ['mnist-sweep', '--config-dir', 'own', 'sweep=mine']\n"
        "from mnist_cnn.sweep import main\n"
        "try: main()\nfinally: print('torch' in sys.modules)"
    )
    status, out, err = outcome(start("-c", script))
    assert (status, out) == (2, "False\n")
    assert err.startswith("error: sweep=mine: optimizer=adan: no such option; did you mean adam?")


# --- interrupted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_gives_the_trial_back_and_the_same_command_resumes_it(run, tmp_path, signalled, signum):
    settings = (*SWEEP, "trials=2", "epochs=2", "data.batch_size=64", *RANDOM, PRUNE_NOTHING)
    signalled(signum, 30)
    ended = run(*settings)
    assert ended.status == 128 + signum
    assert ended.err == (
        f"stopped by {signum.name}: 0 of 2 trials done (0 pruned, 0 failed), 0 running; the same command continues\n"
    )
    assert [trial.state for trial in trials(tmp_path / "study")] == [TrialState.WAITING] * 2
    assert run(*settings).status == 0
    assert [row["state"] for row in rows(tmp_path / "study")] == ["complete", "complete"]
    resumed = trials(tmp_path / "study")[0]
    assert list(resumed.intermediate_values) == [1, 2]
    alone = run("mnist-train", *resumed.user_attrs["overrides"]).folder()
    equal(alone, tmp_path / "study" / resumed.user_attrs["folder"])


def test_a_disk_that_is_full_ends_the_command_and_costs_no_trial(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "_train", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        refused(run(*SWEEP, "trials=2"), "No space left on device", status=1)
    assert [trial.state for trial in trials(tmp_path / "study")] == [TrialState.WAITING] * 2
    assert run(*SWEEP, "trials=2").status == 0
    assert [row["state"] for row in rows(tmp_path / "study")] == ["complete", "complete"]


def test_memory_that_does_not_suffice_costs_one_trial(run, tmp_path, monkeypatch):
    backward, calls = torch.Tensor.backward, []

    def short(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")
        return backward(*arguments, **options)

    monkeypatch.setattr(torch.Tensor, "backward", short)
    assert run(*SWEEP, "trials=2").status == 0
    first, second = rows(tmp_path / "study")
    assert (first["state"], second["state"]) == ("fail", "complete")
    assert first["reason"].startswith("out of memory with data.batch_size=")


class KilledError(BaseException):
    """Ends a worker as SIGKILL does: nothing is told."""


def later(folder):
    """A minute passes."""
    with sqlite3.connect(folder / "study.db") as database:
        database.execute("UPDATE trial_heartbeats SET heartbeat = datetime(heartbeat, '-61 seconds')")
        database.execute("UPDATE trials SET datetime_complete = datetime(datetime_complete, '-61 seconds')")


def killed(run, *words):
    def die(*_):
        raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "_train", die)
        with pytest.raises(KilledError):
            run(*words)
    later(Path("study"))


def test_a_trial_whose_worker_was_killed_runs_again_up_to_a_limit(run, tmp_path):
    words = (*SWEEP, "trials=1", "retries=1")
    for already in (0, 1):
        killed(run, *words)
        states = [trial.state for trial in trials(tmp_path / "study")]
        assert states == [TrialState.FAIL] * already + [TrialState.RUNNING]
    refused(run(*words), "no trial of study is complete; such as its worker was killed 2 times", status=1)
    assert [row["state"] for row in rows(tmp_path / "study")] == ["again", "fail"]
    assert run(*words, "retries=2").status == 0
    assert [row["state"] for row in rows(tmp_path / "study")] == ["again", "again", "complete"]
    assert "runs again as trial 1" in rows(tmp_path / "study")[0]["reason"]


def test_workers_killed_at_the_worst_moments_cost_no_trial(run, tmp_path, monkeypatch):
    """One before its first heartbeat; one that had failed a killed worker's trial, and was about to repeat it."""
    words = (*SWEEP, "trials=2", "heartbeat=1")
    killed(run, *words)
    with sqlite3.connect(tmp_path / "study" / "study.db") as database:
        database.execute("DELETE FROM trial_heartbeats")
    with monkeypatch.context() as patch:
        patch.setattr(of_study, "MISSED", 1)
        assert run(*words).status == 0
    assert sorted(row["state"] for row in rows(tmp_path / "study")) == ["again", "complete", "complete"]
    with sqlite3.connect(tmp_path / "study" / "study.db") as database:
        (number,) = database.execute("SELECT trial_id FROM trials WHERE number = 2").fetchone()
        tables = ("user_attributes", "system_attributes", "params", "values", "intermediate_values", "heartbeats")
        for table in ("trials", *(f"trial_{name}" for name in tables)):
            database.execute(f"DELETE FROM {table} WHERE trial_id = {number}")
    later(tmp_path / "study")
    assert run(*words).status == 0
    assert sorted(row["state"] for row in rows(tmp_path / "study")) == ["again", "complete", "complete"]


def test_a_trial_that_was_given_to_another_worker_is_let_go(run, tmp_path, monkeypatch):
    """A laptop that slept: others took its trial while it was away."""
    pruning = Worker._pruning

    def taken(self, trial, reported):
        if trial.number == 0:
            self.shared.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            self.shared.storage.get_heartbeat_stale_trial_callback()(self.shared.study, self.shared.trials()[0])
        return pruning(self, trial, reported)

    monkeypatch.setattr(Worker, "_pruning", taken)
    assert run(*SWEEP, "trials=2").status == 0
    assert [row["state"] for row in rows(tmp_path / "study")] == ["again", "complete", "complete"]


# --- many processes ------------------------------------------------------------------------------------------


def open_quickly(url, folder):
    parts = {"sampler": "optuna.samplers.RandomSampler", "pruner": "optuna.pruners.NopPruner"}
    parts = {key: {"_target_": target} for key, target in parts.items()}
    settings = SimpleNamespace(storage=url, retries=99, metric="val/accuracy", heartbeat=1, **parts)
    return SharedStudy(settings, "shared", folder)


def work(url, folder, total):
    """A command with one worker, whose trials take moments."""

    def train(self, trial, parameters):
        time.sleep(random.random() / 20)
        return {"epochs": 1, "val/accuracy": parameters["x"]}

    Worker._train, of_study.MISSED = train, 3
    random.seed()
    shared = open_quickly(url, folder)
    shared.fill(total)
    suggest = lambda trial: {"x": trial.suggest_float("x", 0, 1)}  # noqa: E731
    Worker(shared, SimpleNamespace(suggest=suggest), total, Stop(), lambda: None).run()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_study_has_exactly_its_trials_however_its_processes_are_killed(tmp_path, kind, request):
    """Five commands begin at the same moment; each is killed twice and begun anew."""
    url = f"sqlite:///{tmp_path}/study.db" if kind == "sqlite" else request.getfixturevalue("server").url
    forked = multiprocessing.get_context("fork")  # Optuna is loaded already
    for start in range(3):
        workers = [forked.Process(target=work, args=(url, tmp_path, 24), daemon=True) for _ in range(5)]
        for worker in workers:
            worker.start()
        for worker in workers if start < 2 else ():
            time.sleep(random.random() / 4)
            worker.kill()
        for worker in workers:
            worker.join(PATIENCE)
    assert [worker.exitcode for worker in workers] == [0] * 5
    shared = open_quickly(url, tmp_path)
    counts = shared.counts()
    assert counts["complete"] == 24
    assert counts.keys() <= {"complete", "again", "surplus"}
    assert len({trial.params["x"] for trial in shared.finished()}) == 24


def test_trials_that_two_processes_add_or_repeat_at_the_same_moment_are_one_too_many(tmp_path):
    shared = open_quickly(f"sqlite:///{tmp_path}/study.db", tmp_path)
    shared.fill(3)
    for history in ([], [0], [0], [3], [2]):
        attrs = {"retry_history": history} if history else {}
        shared.study.add_trial(create_trial(state=TrialState.WAITING, system_attrs=attrs))
    found = [of_study.is_surplus(shared.trials(), number, 3) for number in range(8)]
    assert found == [False, False, False, True, False, True, True, False]


def test_a_study_on_postgresql_keeps_its_password_to_itself(run, tmp_path, server):
    words = (*SWEEP, "trials=1", "study=with_password")
    ended = run(*words, f"storage={server.url}")
    assert ended.status == 0
    for file in (tmp_path / "study").rglob("*"):
        assert not file.is_file() or b"secret" not in file.read_bytes()
    refused(run("mnist-sweep", "report=study"), "give storage=… again")
    assert run("mnist-sweep", "report=study", f"storage={server.url}").status == 0
    wrong = server.url.replace("secret", "wrong")
    ended = run(*words, f"storage={wrong}", "folder=other")
    refused(ended, "storage=postgresql://sweeper@127.0.0.1", "cannot be used: ", "password authentication failed")
    assert not (tmp_path / "other").exists()
    host = server.url.rpartition("@")[2]
    inquiring = f"storage='postgresql://sweeper@{host}?connect_timeout=9&password=p:w%40d/"
    assert run(*words, f"{inquiring}secret'").status == 0
    assert "?connect_timeout=9\n" in (tmp_path / "study" / "study.yaml").read_text()
    refused(run(*words, f"{inquiring}wrong'"), "connect_timeout=9 cannot be used: ")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:s3cr@t@h/d", None),
        ("postgresql://u:s3cr/t@h:5432/d?a=1", "postgresql://u@h:5432/d?a=1"),
        ("redis://u:s3cret@h", "redis://u@h"),
        ("u:s3cret@h/d", "u://…"),
        ("postgresql://u:s3cret", "postgresql://…"),
        ("mysql://u@h/d?ssl_password=s3cret&x=1", "mysql://u@h/d?x=1"),
        ("sqlite:////a/b:c/study.db", "sqlite:////a/b:c/study.db"),
    ],
)
def test_no_address_shows_its_password(run, url, shown):
    assert shown is None or without_password(url) == shown
    if "s3cr" in url:
        ended = run(*SWEEP, f"storage='{url}'")
        assert ended.status == 2
        assert "s3cr" not in ended.err + ended.out


def test_a_server_that_is_gone_is_one_line(run, server):
    ended = run(*SWEEP, "storage=postgresql://sweeper:secret@127.0.0.1:1/d")
    refused(ended, "storage=postgresql://sweeper@127.0.0.1:1/d cannot be used: ")
    with pytest.MonkeyPatch.context() as patch:
        train = Worker._train

        def stopping(self, trial, parameters):
            server.stop()
            return train(self, trial, parameters)

        patch.setattr(Worker, "_train", stopping)
        words = (*SWEEP, "trials=2", f"storage={server.url}", "study=gone", "heartbeat=1")
        ended = run(*words)
    server.start()
    refused(ended, "the storage postgresql://sweeper@", "does not answer", "the same command continues", status=1)
    assert run(*words).status == 0
    assert sum(row["state"] == "complete" for row in rows(Path("study"))) == 2


def test_workers_have_their_part_of_the_threads_and_one_gpu_each(run, monkeypatch):
    begun = []

    class Ended:
        pid = 1

        def __init__(self, command, env, **_):
            begun.append((command, env))

        def poll(self):
            return 0

    monkeypatch.setattr("subprocess.Popen", Ended)
    monkeypatch.setattr("joblib.cpu_count", lambda: 13)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.delenv("OMP_NUM_THREADS")
    refused(run(*SWEEP, "workers=3", "trials=9"), "0 of 9 trials done", "the same command continues", status=1)
    assert [env["CUDA_VISIBLE_DEVICES"] for _, env in begun] == ["3", "5", "3"]
    assert {env["OMP_NUM_THREADS"] for _, env in begun} == {"4"}
    assert all(command[-2:] == ["workers=1", "accelerator.threads=4"] for command, _ in begun)
    begun.clear()
    run(*SWEEP, "workers=2", "accelerator=cpu", "accelerator.threads=3")
    assert {env["OMP_NUM_THREADS"] for _, env in begun} == {"3"}
    assert {env["CUDA_VISIBLE_DEVICES"] for _, env in begun} == {"3,5"}
    assert all(command[-1] == "workers=1" for command, _ in begun)


def workers_of(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_workers_that_are_killed_or_told_to_end_are_begun_anew_by_the_same_command(run, start, tmp_path):
    words = (*SWEEP[1:], "trials=4", "epochs=3", "heartbeat=1", "+sampler.seed=1")
    study = tmp_path / "study"
    parent = start(*COMMAND, *words, "workers=2")
    wait_until(lambda: parent.poll() is not None or len(list(study.glob("trials/*/metrics.csv"))) >= 2)
    workers = workers_of(parent)
    os.kill(workers[0], signal.SIGKILL)
    wait_until(lambda: len(workers_of(parent)) == 1)
    parent.send_signal(signal.SIGTERM)
    status, _, err = outcome(parent)
    assert status == 143
    assert re.fullmatch(
        r"worker 1 was ended by SIGKILL\n"
        r"stopped by SIGTERM: \d of 4 trials done .*; the same command continues\n",
        err,
    )
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    ended = run(SWEEP[0], *words)
    assert (ended.status, ended.err) == (0, "")
    assert "\nbest: trial " in ended.out
    found = rows(study)
    assert sorted({row["state"] for row in found} - {"pruned"}) == ["again", "complete"]
    ended = [row for row in found if row["state"] != "again"]
    assert len({row["folder"] for row in ended}) == len({row["optimizer.lr"] for row in ended}) == len(ended) == 4
    again = next(row for row in found if row["state"] == "again")
    folders = {row["folder"] for row in ended}
    assert again["folder"] in {"", *folders}  # none: killed before it had one
    config = yaml.safe_load((study / "trials/0000/config.yaml").read_text())  # begun by a worker of two
    assert config["accelerator"]["threads"] == 1


def test_a_machine_without_the_data_says_so_once_and_costs_no_trial(run, tmp_path, monkeypatch):
    words = (*SWEEP, "trials=4", "data=mnist", "data.root=/dev/null/data")
    refused(run(*words), "/dev/null/data cannot be written")

    class Refused:
        def __init__(self, command, env, stdout, **_):
            stdout.write(b"a warning\nerror: /dev/null/data cannot be written\n")

        def poll(self):
            return 2

    monkeypatch.setattr("subprocess.Popen", Refused)
    refused(run(*words, "workers=3"), "error: /dev/null/data cannot be written")
    assert {trial.state for trial in trials(tmp_path / "study")} == {TrialState.WAITING}
