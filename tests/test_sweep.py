"""mnist-sweep as a user runs it: studies that are searched, interrupted, shared, reported and trained again."""

import csv
import json
import multiprocessing
import os
import random
import re
import signal
import sqlite3
import time
import types
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import postgresql
import pytest
import torch
import yaml
from conftest import CONF, PATIENCE, equal, on_a_terminal, outcome, wait_until
from optuna.trial import TrialState
from PIL import Image
from test_messages import said
from test_train import metrics, same, weights

from mnist_cnn.search import crew
from mnist_cnn.search.study import SharedStudy
from mnist_cnn.search.study import tally as of_study
from mnist_cnn.search.study_page import page
from mnist_cnn.search.study_plots import Axis, pictures
from mnist_cnn.search.trials import Worker
from mnist_cnn.training import fit

COMMAND = ("-m", "mnist_cnn.sweep")
QUICK = ("data=digits", "epochs=1", "architecture=conv10")
SWEEP = ("mnist-sweep", "sweep=learning_rate", *QUICK, "folder=study")
RANDOM = ("sampler._target_=optuna.samplers.RandomSampler", "+sampler.seed=1")


def rows(folder):
    return list(csv.DictReader((folder / "trials.csv").open()))


def trials(folder, name=None):
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{folder / 'study.db'}")
    return study.get_trials()


def files(folder):
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="session")
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


def test_a_study_leaves_what_the_readme_says_and_the_same_command_continues_it(run, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "score", lambda *_: pytest.fail("a trial looked at the test set"))
    ended = run(*SWEEP, "trials=3", *RANDOM)
    assert (ended.status, ended.err) == (0, "")
    study = tmp_path / "study"
    assert {path.name for path in study.iterdir()} == {
        *("study.yaml", "study.db", "study.db.lock", "trials", "trials.csv", "experiment", "report.html", "pictures"),
    }
    assert {path.name for path in (study / "pictures").iterdir()} == {
        f"{name}.png" for name in ("history", "importances", "parallel_coordinate", "slices", "study")
    }
    assert len(re.findall(r"^\d/3  trial \d  [\d.]+%  .* s  optimizer.lr=", ended.out, flags=re.MULTILINE)) == 3
    assert "3 of 3 trials done (0 pruned, 0 failed), 0 running; best" in ended.out
    found = rows(study)
    assert [row["state"] for row in found] == ["complete"] * 3
    for row in found:
        folder = study / row["folder"]
        assert float(row["val/accuracy"]) == metrics(folder)["val/accuracy"]
        assert metrics(folder)["test/accuracy"] is None
        assert "validation loss" in (folder / "train.log").read_text()
    before = files(study / "trials")
    assert run(*SWEEP, "trials=3").status == 0
    ended = run(*SWEEP, "trials=5", *RANDOM)
    assert ended.status == 0
    assert "continuing: 3 of 5 trials done" in ended.out
    assert len(rows(study)) == 5
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
    assert run(*command, "trials=4", "data.validation_from=random", "seed=3").status == 0
    best = max(trials(tmp_path / "study"), key=lambda trial: (trial.value, -trial.number))
    folder = tmp_path / "study" / best.user_attrs["folder"]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["optimizer"]["lr"] == config["schedule"]["scheduler"]["max_lr"] == best.params["optimizer.lr"]
    assert config["architecture"]["blocks"][0]["filters"] == best.params["architecture.blocks.0.filters"]
    alone = run("mnist-train", *best.user_attrs["overrides"]).folder()
    equal(folder, alone)
    ended = run("mnist-train", "--config-dir", "study", "experiment=best", "plots=false")
    assert ended.status == 0
    assert same(weights(folder), weights(ended.folder()))
    assert metrics(ended.folder())["test/accuracy"] > 0.2


@pytest.mark.parametrize("sweep", sorted(file.stem for file in (CONF / "sweep").glob("*.yaml")))
@pytest.mark.parametrize("architecture", ["conv10", "conv32_32_dropout"])
def test_every_shipped_space_is_searched(run, sweep, architecture):
    words = (f"architecture={architecture}", "data=digits", "data.validation=1200", "epochs=1")
    ended = run("mnist-sweep", f"sweep={sweep}", *words, "trials=2")
    assert ended.status == 0
    study = ended.folder()
    assert study.name == f"{sweep}_architecture-{architecture}_data.validation-1200_data-digits_epochs-1"
    row = rows(study)[0]
    blocks = 2 if architecture == "conv32_32_dropout" else 1
    expected = {
        "learning_rate": ["optimizer.lr"],
        "recipe": ["optimizer", "optimizer.lr", "schedule", "data.batch_size", "architecture.dense.0.dropout"],
        "width": [*(f"architecture.blocks.{n}.filters" for n in range(blocks)), "architecture.dense.0.units"],
    }[sweep]
    assert [key for key in row if "." in key or key in ("optimizer", "schedule")] == expected


def test_bad_trials_are_pruned_failing_ones_recorded_and_a_finite_space_ends(run, tmp_path, space):
    lr = {"type": "categorical", "choices": [1e-8, 0.003, 1e30]}
    command = space(optimizer__lr=lr)
    ended = run(
        *command,
        *("trials=10", "epochs=3", "optimizer=sgd", "optimizer.momentum=0.9"),
        *("sampler._target_=optuna.samplers.BruteForceSampler", "+sampler.seed=1"),
        *("pruner._target_=optuna.pruners.ThresholdPruner", "+pruner.lower=0.35"),
    )
    assert ended.status == 0
    by_rate = {row["optimizer.lr"]: row for row in rows(tmp_path / "study")}
    assert {rate: row["state"] for rate, row in by_rate.items()} == {
        "1e-08": "pruned",
        "0.003": "complete",
        "1e+30": "fail",
    }
    assert by_rate["1e-08"]["epochs"] == "1"
    assert len(list(csv.DictReader((tmp_path / "study" / by_rate["1e-08"]["folder"] / "metrics.csv").open()))) == 1
    assert "is not finite" in by_rate["1e+30"]["reason"]
    assert "failed: the loss of" in ended.out
    error = tmp_path / "study" / by_rate["1e+30"]["folder"] / "error.txt"
    assert error.read_text().strip() == by_rate["1e+30"]["reason"]
    assert "(1 pruned, 1 failed)" in ended.out
    again = run(*command, "trials=10", "epochs=3", "optimizer=sgd", "optimizer.momentum=0.9")
    assert "3 of 3 trials done" in again.out


def test_the_loss_may_be_searched(run, tmp_path):
    assert run(*SWEEP, "trials=2", "metric=val/loss").status == 0
    found = rows(tmp_path / "study")
    best = min(found, key=lambda row: float(row["val/loss"]))
    assert f"in {best['folder']}" in (tmp_path / "study" / "experiment" / "best.yaml").read_text()
    assert metrics(tmp_path / "study" / best["folder"])["val/loss"] == float(best["val/loss"])


def test_another_study_in_the_same_place_is_refused_and_named(run, tmp_path):
    assert run(*SWEEP, "trials=1").status == 0
    before = files(tmp_path / "study")
    words = ("study=learning_rate_architecture-conv10_data-digits_epochs-1", "epochs=2", "seed=2")
    said(run(*SWEEP, *words), "has seed=1, not 2; epochs=1, not 2; leave that out, or name another by study=")
    (tmp_path / "study" / "study.yaml").write_text("{study: gone, metric: val/loss, storage: null, retries: 1}\n")
    said(run("mnist-sweep", "report=study"), "has no study gone")
    after = files(tmp_path / "study")
    assert {file for file in before if before[file] != after[file]} == {tmp_path / "study" / "study.yaml"}


def test_where_every_trial_fails_the_command_does(run, tmp_path, space):
    command = space(optimizer__lr={"type": "float", "low": 1e30, "high": 1e31})
    ended = run(*command, "trials=2", "optimizer=sgd")
    said(ended, "no trial of study is complete; such as the loss of", status=1)
    assert [row["state"] for row in rows(tmp_path / "study")] == ["fail", "fail"]


def test_one_trial_that_diverged_does_not_press_the_others_into_a_line():
    axis = Axis("validation error", [0.9, 0.0092, 0.0110, 0.0104], log=True, percent=True)
    first, second = axis.places[[1, 2]]
    assert 0 < first < second - 0.03
    assert axis.places[0] < 1
    assert (axis.labels[0], axis.labels[-1]) == ("1%", "100%")
    assert all(0 < tick < 1 for tick in axis.ticks)
    equal = Axis("optimizer", ["adam"] * 5, choices=("adam", "sgd"))
    assert len(set(equal.places)) == 5  # side by side
    assert equal.labels == ["adam", "sgd"]


def test_a_study_of_one_process_and_a_seed_is_the_same_again(run, tmp_path):
    words = (*SWEEP[:-1], "trials=5", "+sampler.seed=1", "+sampler.n_startup_trials=2")
    assert [run(*words, f"folder={name}").status for name in ("one", "other")] == [0, 0]
    one, other = (
        [{k: v for k, v in row.items() if k not in ("seconds", "started")} for row in rows(tmp_path / name)]
        for name in ("one", "other")
    )
    assert one == other
    assert len({row["optimizer.lr"] for row in one}) == 5


def test_any_study_can_be_drawn(tmp_path):
    """Trials without an error, of which there is no logarithm; parameters of one value; labels that are long."""
    study = optuna.create_study(direction="maximize")
    lists = optuna.distributions.CategoricalDistribution(["[{filters:32,kernel:3},{filters:64,kernel:3}]", None])
    space = {"blocks": lists, "dropout": optuna.distributions.FloatDistribution(0.3, 0.3)}
    for figure in (1.0, 1.0, 0.97, None):
        trial = study.ask(space)
        trial.set_user_attr("error", "a reason")
        study.tell(trial, figure, TrialState.COMPLETE if figure else TrialState.FAIL)
    tally = partial(of_study, study.get_trials(), 0)
    shared = types.SimpleNamespace(study=study, metric="val/accuracy", folder=tmp_path, tally=tally)
    pictures(shared, "a title")
    page(shared, "<a title>", "about it")
    for picture in (tmp_path / "pictures").iterdir():
        assert np.asarray(Image.open(picture).convert("L")).std() > 5
    content = (tmp_path / "report.html").read_text()
    assert "&lt;a title&gt;" in content
    assert '"ticktext":["0",' in content
    assert '"name":"failed"' in content


def test_a_report_at_any_time_and_the_best_trained_again(run, tmp_path):
    assert run(*SWEEP, "trials=2", "+sampler.seed=1").status == 0  # two that tie have no importances to draw
    for name in ("trials.csv", "report.html", "experiment/best.yaml"):
        (tmp_path / "study" / name).unlink()
    before = files(tmp_path / "study" / "trials")
    ended = run("mnist-sweep", "report=study")
    assert (ended.status, ended.err) == (0, "")
    assert "2 of 2 trials done" in ended.out
    assert ended.folder() == Path("study")
    page = (tmp_path / "study" / "report.html").read_text()
    assert page.count('class="plotly-graph-div"') == 4
    assert not re.search(r'<(script|link)[^>]+(src|href)="?http', page)
    ended = run("mnist-sweep", "retrain=study")
    assert ended.status == 0
    assert "seed 1 gives the trial's own figure again" in ended.out
    record = json.loads((tmp_path / "study" / "retrain.json").read_text())
    scores = [run["test/accuracy"] for run in record["runs"].values()]
    assert len(scores) == 5
    assert record["test/accuracy mean"] == pytest.approx(sum(scores) / 5)
    assert [f"seed_{seed}" for seed in range(1, 6)] == sorted(
        p.name for p in (tmp_path / "study" / "retrain").iterdir()
    )
    done = files(tmp_path / "study" / "retrain")
    assert run("mnist-sweep", "retrain=study").status == 0
    checkpoints = {file: content for file, content in done.items() if file.suffix == ".ckpt"}
    assert checkpoints.items() <= files(tmp_path / "study" / "retrain").items()
    assert before == files(tmp_path / "study" / "trials")


def test_a_terminal_gets_a_line_that_is_refreshed(start):
    status, shown = on_a_terminal(start, 120, *COMMAND, *SWEEP[1:], "trials=2", "epochs=2")
    assert status == 0
    assert re.search(rb"\r1 of 2 trials done \(0 pruned, 0 failed\), \d running; best [\d.]+% \(trial 0\)", shown)
    assert b"epoch 1/2" not in shown


# --- interrupted, killed, shared -----------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_gives_the_trial_back_and_the_same_command_resumes_it(run, tmp_path, signalled, signum):
    settings = (*SWEEP, "trials=2", "epochs=2", "data.batch_size=64", *RANDOM)
    signalled(signum, 30)
    ended = run(*settings)
    assert ended.status == 128 + signum
    assert ended.err == (
        f"stopped by {signum.name}: 0 of 2 trials done (0 pruned, 0 failed), 0 running; the same command continues\n"
    )
    (stopped,) = trials(tmp_path / "study")
    assert stopped.state == TrialState.FAIL
    assert run(*settings).status == 0
    found = rows(tmp_path / "study")
    assert [row["state"] for row in found] == ["again", "complete", "complete"]
    assert found[0]["folder"] == found[1]["folder"]
    assert "runs again as trial 1" in found[0]["reason"]
    alone = run("mnist-train", *trials(tmp_path / "study")[1].user_attrs["overrides"]).folder()
    equal(alone, tmp_path / "study" / found[1]["folder"])


def test_a_trial_whose_worker_is_silent_runs_again_up_to_a_limit(run, tmp_path):
    words = (*SWEEP, "trials=1", "retries=1")
    with pytest.MonkeyPatch.context() as patch:

        def die(*_):
            raise TimeoutError  # no failure that the worker foresees, as little as SIGKILL

        patch.setattr(Worker, "_run", die)
        for killed in (1, 2):
            assert run(*words).status == 1
            found = trials(tmp_path / "study")
            assert [trial.state for trial in found] == [TrialState.FAIL] * (killed - 1) + [TrialState.RUNNING]
            with sqlite3.connect(tmp_path / "study" / "study.db") as database:  # 61 seconds pass
                database.execute("UPDATE trial_heartbeats SET heartbeat = datetime(heartbeat, '-61 seconds')")
    ended = run(*words)
    assert ended.status == 1
    assert "its worker was killed 2 times" in rows(tmp_path / "study")[1]["reason"]
    assert "no trial of study is complete; such as killed" in ended.err
    assert run(*words, "retries=2").status == 0
    assert [row["state"] for row in rows(tmp_path / "study")] == ["again", "again", "complete"]


def test_a_trial_that_was_given_to_another_worker_is_let_go(run, tmp_path):
    """A laptop that slept: others took its trial while it was away."""
    watch = Worker._watch

    def taken(self, trial):
        if trial.number == 0:
            self.shared.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        return watch(self, trial)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "_watch", taken)
        assert run(*SWEEP, "trials=2").status == 0
    assert [row["state"] for row in rows(tmp_path / "study")] == ["again", "complete", "complete"]


def _claim_all(url, folder, worker, done):
    """A worker whose trials take moments."""
    parts = {"sampler": "optuna.samplers.RandomSampler", "pruner": "optuna.pruners.NopPruner"}
    parts = {key: {"_target_": target} for key, target in parts.items()}
    settings = SimpleNamespace(storage=url, retries=3, metric="val/accuracy", heartbeat=PATIENCE, **parts)
    shared = SharedStudy(settings, "shared", folder)
    space = SimpleNamespace(distributions={"x": optuna.distributions.FloatDistribution(0, 1)})
    while True:
        trial, running = shared.claim(space, 40, worker)
        if trial is not None:
            time.sleep(random.random() / 50)
            shared.tell(trial, trial.params["x"], TrialState.COMPLETE)
            done.put(trial.number)
        elif not running:
            break


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_eight_processes_that_start_together_stop_at_the_studys_total(tmp_path, kind, request):
    url = f"sqlite:///{tmp_path}/study.db" if kind == "sqlite" else request.getfixturevalue("server").url
    forked = multiprocessing.get_context("fork")  # Optuna is loaded already
    done = forked.SimpleQueue()
    workers = [forked.Process(target=_claim_all, args=(url, tmp_path, str(n), done), daemon=True) for n in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE)
    assert [worker.exitcode for worker in workers] == [0] * 8
    assert sorted(done.get() for _ in range(40)) == list(range(40))
    assert done.empty()


def test_a_study_on_postgresql_keeps_its_password_to_itself(run, tmp_path, server):
    words = (*SWEEP, "trials=2", "study=with_password")
    ended = run(*words, f"storage={server.url}")
    assert ended.status == 0
    for file in (tmp_path / "study").rglob("*"):
        assert not file.is_file() or b"secret" not in file.read_bytes()
    ended = run("mnist-sweep", "report=study")
    assert ended.status == 2
    assert "cannot be used: " in ended.err
    assert run("mnist-sweep", "report=study", f"storage={server.url}").status == 0
    wrong = server.url.replace("secret", "wrong")
    ended = run(*words, f"storage={wrong}", "folder=other")
    said(ended, "storage=postgresql://sweeper:***@127.0.0.1", "cannot be used: ", "password authentication failed")
    assert not (tmp_path / "other").exists()
    host = server.url.rpartition("@")[2]
    inquiring = f"storage='postgresql://sweeper@{host}?connect_timeout=9&password=p:w%40d/"
    assert run(*words, f"{inquiring}secret'").status == 0
    assert "?connect_timeout=9\n" in (tmp_path / "study" / "study.yaml").read_text()
    said(run(*words, f"{inquiring}wrong'"), "connect_timeout=9&password=*** cannot be used: ")


def test_a_server_that_restarts_costs_no_trial(run, tmp_path, server, monkeypatch):
    """It goes before an epoch's end is reported, and is there again once a trial's end could not be told."""
    watch, tell, untold = Worker._watch, SharedStudy.tell, []

    def stopping(self, trial):
        if not untold:
            server.stop()
        return watch(self, trial)

    def telling(self, *arguments, **about):
        try:
            tell(self, *arguments, **about)
        except Exception as error:
            untold.append(error)
            server.start()
            raise

    monkeypatch.setattr(Worker, "_watch", stopping)
    monkeypatch.setattr(SharedStudy, "tell", telling)
    ended = run(*SWEEP, "trials=2", f"storage={server.url}", "study=restarted")
    assert (ended.status, ended.err, len(untold)) == (0, "", 1)
    assert [row["state"] for row in rows(tmp_path / "study")] == ["complete", "complete"]
    assert "the storage does not answer" in (tmp_path / "study" / "trials" / "0000" / "train.log").read_text()


def test_memory_that_does_not_suffice_costs_one_trial(run, tmp_path, monkeypatch):
    backward, calls = torch.Tensor.backward, []

    def short(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")
        return backward(*arguments)

    monkeypatch.setattr(torch.Tensor, "backward", short)
    assert run(*SWEEP, "trials=2").status == 0
    first, second = rows(tmp_path / "study")
    assert (first["state"], second["state"]) == ("fail", "complete")
    assert first["reason"].startswith("out of memory with data.batch_size=16 and a network of 145,370 parameters")


def test_workers_have_their_share_of_threads_and_one_gpu_each(run, monkeypatch):
    begun = []

    class Ended:
        pid = 1

        def __init__(self, command, env, **_):
            begun.append((command, env))

        def poll(self):
            return 0

    monkeypatch.setattr(crew.subprocess, "Popen", Ended)
    monkeypatch.setattr(crew, "cores", lambda: 13)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert run(*SWEEP, "workers=3", "trials=9").status == 1  # as no worker did anything
    assert [env["CUDA_VISIBLE_DEVICES"] for _, env in begun] == ["3", "5", "3"]
    assert {env["OMP_NUM_THREADS"] for _, env in begun} == {"4"}
    assert all(command[-2:] == ["workers=1", "accelerator.threads=4"] for command, _ in begun)
    begun.clear()
    run(*SWEEP, "workers=2", "accelerator=cpu", "accelerator.threads=3")
    assert {env["OMP_NUM_THREADS"] for _, env in begun} == {"3"}
    assert {env["CUDA_VISIBLE_DEVICES"] for _, env in begun} == {"3,5"}
    assert all(command[-1] == "workers=1" for command, _ in begun)


def test_local_workers_share_the_threads_and_one_that_is_killed_starts_anew(start, tmp_path, server):
    words = (*SWEEP[1:], "trials=5", "workers=2", "epochs=2", f"storage={server.url}", "study=crew")
    disturb = {"DISTURB": f"{signal.SIGKILL:d} 100 {tmp_path / 'killed'}"}
    status, out, err = outcome(start(*COMMAND, *words, "optimizer._target_=disturbed.Adam", env=disturb))
    assert status == 0, err
    assert re.fullmatch(r"worker \d was ended by SIGKILL: it starts anew\n", err)
    assert len(re.findall(r"^\d/5  trial", out, flags=re.MULTILINE)) == 5
    states = [row["state"] for row in rows(tmp_path / "study")]
    assert states.count("complete") + states.count("pruned") == 5
    assert states.count("again") == len(states) - 5 == 1
    folders = [row["folder"] for row in rows(tmp_path / "study") if row["state"] != "again"]
    assert len(set(folders)) == 5
    config = yaml.safe_load((tmp_path / "study" / folders[0] / "config.yaml").read_text())
    assert config["accelerator"]["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)


def test_a_signal_ends_the_workers_as_well(start, tmp_path):
    parent = start(*COMMAND, *SWEEP[1:], "trials=50", "workers=2", "epochs=9999")
    both = lambda: len(list((tmp_path / "study").glob("trials/*/metrics.csv"))) == 2  # noqa: E731
    wait_until(lambda: parent.poll() is not None or both())
    workers = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    parent.send_signal(signal.SIGTERM)
    status, _, err = outcome(parent)
    assert status == 143
    assert err == (
        "stopped by SIGTERM: 0 of 50 trials done (0 pruned, 0 failed), 0 running; the same command continues\n"
    )
    assert len(workers) == 2
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert [trial.user_attrs["interrupted"] for trial in trials(tmp_path / "study")] == [True, True]


def test_a_worker_that_cannot_begin_says_why_once(run, tmp_path):
    ended = run(*SWEEP, "workers=2", "data=mnist", "data.root=/dev/null/data")
    said(ended, "/dev/null/data cannot be written")
    assert trials(tmp_path / "study") == []
