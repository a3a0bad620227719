"""Commands and run folders: what a command takes and prints, whose folder it is, loggers, and training from Python."""

import csv
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml
from conftest import CONF, PATIENCE, on_a_terminal, outcome, said, wait_until

import mnist_cnn
from mnist_cnn.config.schema import UserError
from mnist_cnn.runs import files
from mnist_cnn.runs import folder as runs

QUICK = ("data=digits", "epochs=1", "plots=false", "architecture=conv10")
METRICS = {
    *("parameters", "epochs", "tested_epoch", "fit_seconds", "train_seconds", "test_seconds"),
    *(f"{part}/{figure}" for part in ("train", "val", "test") for figure in ("loss", "accuracy")),
}


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


# --- what a run leaves and prints --------------------------------------------------------------------------


def test_a_run_leaves_what_the_contract_says(run):
    ended = run("mnist-train", "data=digits", "epochs=3")
    assert (ended.status, ended.err) == (0, "")
    folder = ended.folder()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(_\d+)?", folder.name)
    assert folder.parent.parts[-2:] == ("outputs", "train")
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir()}
    pictures = ("training_digits", "learning_curves", "confusion_matrix", "incorrect_digits", "first_weights")
    pictures += ("feature_maps_1", "feature_maps_2", "feature_maps_3")
    assert files == {
        *("config.yaml", "metrics.json", "metrics.csv", "train.log", "checkpoints/best.ckpt", "checkpoints/last.ckpt"),
        *(f"plots/{name}.png" for name in pictures),
        *(f".hydra/{name}.yaml" for name in ("config", "hydra", "overrides")),
    }
    figures = metrics(folder)
    assert set(figures) == METRICS
    assert (figures["parameters"], figures["epochs"]) == (93_322, 3)
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    best = max(rows, key=lambda row: float(row["val/accuracy"]))
    assert figures["val/accuracy"] == float(best["val/accuracy"])
    assert figures["tested_epoch"] == int(best["epoch"])
    assert figures["test/accuracy"] > 0.8
    recorded = yaml.safe_load((folder / "config.yaml").read_text())
    assert (recorded["data"]["name"], recorded["seed"]) == ("digits", 1)
    assert recorded["run"]["overrides"] == ["data=digits", "epochs=3"]
    assert recorded["run"]["versions"]["mnist-cnn"] == "0.2.0"
    assert "git_commit" in recorded["run"]


def test_output_is_plain_lines_that_say_what_matters(run):
    out = run("mnist-train", "data=digits", "epochs=2", "plots=false").out
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", out)
    for words in ("(1293, 1, 28, 28)", "(144, 1, 28, 28)", "(360, 1, 28, 28)", "(26, 26, 32)", "93,322"):
        assert words in out
    assert len(re.findall(r"^epoch \d/2  loss", out, flags=re.MULTILINE)) == 2
    assert re.search(r"test loss [\d.]+, accuracy [\d.]+% \(95 % interval [\d.]+% to [\d.]+%, 360 digits\)", out)
    for noise in ("GPU available", "Tip", "Warning", "litlogger", "Trainer.fit", "workers"):
        assert noise not in out


def test_a_terminal_gets_a_bar_with_loss_and_accuracy(start):
    words = (*QUICK, "architecture=conv64_128")  # an epoch takes longer than from one look at the bar to the next
    status, shown = on_a_terminal(start, 100, "-m", "mnist_cnn.train", *words)
    assert status == 0
    assert re.search(rb"epoch 1/1:.*loss \d\.\d+, accuracy [\d.]+%", shown)


def test_the_reader_of_the_output_may_go(tmp_path):
    command = f"{shlex.quote(sys.executable)} -m mnist_cnn.train {' '.join(QUICK)} hydra.run.dir=run | head -1"
    ended = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert ended.stderr == ""
    assert metrics(tmp_path / "run")


# --- whose folder it is ------------------------------------------------------------------------------------


def test_another_runs_folder_is_never_written_to(run):
    folder = run("mnist-train", *QUICK).folder()
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    said(run("mnist-train", *QUICK, "seed=9", f"hydra.run.dir={folder}"), f"resume={folder}")
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert run("mnist-train", *QUICK).folder() != folder


def test_the_users_own_files_stay_and_our_leftovers_go(run, tmp_path):
    folder = tmp_path / "mine"
    (folder / "checkpoints").mkdir(parents=True)
    own = [".1.notes", ".env", ".12.last.ckpt", "notes.txt", ".mnist_cnn-notes", "checkpoints/.3.keep"]
    for name in own:
        (folder / name).write_text("mine")
    (folder / ".mnist_cnn-0123abcd-metrics.csv").write_text("half")  # of a process that was killed at it
    assert run("mnist-train", *QUICK, "hydra.run.dir=mine").status == 0
    assert all((folder / name).read_text() == "mine" for name in own)
    assert not list(folder.rglob(".mnist_cnn-????????-*"))
    assert not (folder / ".lock").exists()


def test_two_processes(run, tmp_path, trained):
    (tmp_path / "new").mkdir()
    with runs.alone_in(tmp_path / "new"):
        said(run("mnist-train", *QUICK, "hydra.run.dir=new"), "another process trains in this folder; wait for it")
        assert [path.name for path in (tmp_path / "new").iterdir()] == [".lock"]
    assert run("mnist-train", *QUICK, "hydra.run.dir=new").status == 0


def test_of_two_starts_in_one_folder_one_trains_and_the_other_removes_nothing(start, tmp_path):
    words = ("-m", "mnist_cnn.train", *QUICK, "hydra.run.dir=run")
    both = [start(*words), start(*words)]
    ends = sorted((outcome(process) for process in both), key=lambda ended: ended.status)
    assert ends[0].status == 0, ends
    said(ends[1], "run")
    assert metrics(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {".hydra", "train.log", "config.yaml", "checkpoints"}


CLAIM = """
import sys, time
from pathlib import Path
from mnist_cnn.config.schema import UserError
from mnist_cnn.runs.folder import claim, discard
while time.time() < float(sys.argv[1]):
    pass
for number in range(200):
    try:
        folder = claim(Path(f"{number}"), by_user=True)
    except UserError:
        print("lost", number)
        continue
    if number % 2:
        Path(folder, sys.argv[2]).touch()
        time.sleep(0.001)
        assert Path(folder, sys.argv[2]).exists()
        discard(folder)
    else:
        Path(folder, "config.yaml").touch(exist_ok=False)
        print("won", number)
"""


def test_a_folder_has_one_owner_however_close_two_claims_are(start, tmp_path):
    """Even numbers are kept by the first that comes; odd ones are given up at once, with none of another's files."""
    moment = str(time.time() + 3)
    ends = [outcome(process) for process in [start("-c", CLAIM, moment, name) for name in ("a", "b")]]
    assert [ended.status for ended in ends] == [0, 0], ends
    won = sorted(int(line.split()[1]) for ended in ends for line in ended.out.splitlines() if line.startswith("won"))
    assert won == list(range(0, 200, 2))


def test_a_folder_that_a_command_made_for_nothing_goes_again(run, tmp_path):
    said(run("mnist-evaluate", "checkpoint=nowhere"), "checkpoint nowhere does not exist")
    said(run("mnist-train", *QUICK, "initialize=nowhere", "hydra.run.dir=new"), "checkpoint nowhere does not exist")
    (tmp_path / "mine").mkdir()
    said(run("mnist-train", *QUICK, "initialize=nowhere", "hydra.run.dir=mine"), "checkpoint nowhere does not exist")
    assert not list(tmp_path.glob("outputs/*/*"))
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "mine").is_dir()


def test_what_a_killed_process_was_writing_never_has_the_files_name(tmp_path):
    with files.whole(tmp_path / "b.txt") as temporary:
        temporary.write_text("half")
        assert (temporary.suffix, [path.name for path in tmp_path.iterdir()]) == (".txt", [temporary.name])
    with pytest.raises(OSError, match="no room"):
        write_with_no_room(tmp_path / "c.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["b.txt"]
    files.write_whole(tmp_path / "a.txt", "whole")
    assert oct((tmp_path / "a.txt").stat().st_mode & 0o777) == oct(0o666 & ~umask())


def write_with_no_room(path):
    with files.whole(path):
        raise OSError("no room")


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --- loggers -----------------------------------------------------------------------------------------------


def test_tensorboard_gets_the_figures(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run("mnist-train", *QUICK, "logger=tensorboard", "epochs=2").folder()
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    names = {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "test/accuracy"}
    assert names <= set(events.Tags()["scalars"])
    assert len(events.Scalars("train/loss")) == len(events.Scalars("learning_rate")) == 2
    assert events.Scalars("hp_metric")[-1].value == pytest.approx(metrics(folder)["test/accuracy"])
    assert yaml.safe_load((folder / "tensorboard" / "hparams.yaml").read_text())["optimizer"]["lr"] == 0.001


def test_mlflow_gets_the_figures_where_its_own_variable_says_beside_another_logger(run, monkeypatch, tmp_path):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mine.db")
    folder = run("mnist-train", *QUICK, "logger=[mlflow,tensorboard]").folder()
    assert list((folder / "tensorboard").glob("events*"))
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mine.db")
    experiment = client.get_experiment_by_name("mnist_cnn")
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.data.metrics["test/accuracy"] == metrics(folder)["test/accuracy"]
    assert logged.data.params["optimizer/lr"] == "0.001"


def test_wandb_offline_gets_the_figures(run, monkeypatch):
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")  # seconds for its own process to start
    ended = run("mnist-train", *QUICK, "logger=wandb", "logger.wandb.offline=true")
    assert ended.status == 0
    assert list(ended.folder().glob("wandb/offline-run-*/*.wandb"))


# --- from Python -------------------------------------------------------------------------------------------


def test_train_from_python_returns_a_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # those of the commands in the tests before
    run = mnist_cnn.train(QUICK)
    out, err = capfd.readouterr()
    assert (len(re.findall(r"^epoch 1/1  loss", out, flags=re.MULTILINE)), err) == (1, "")
    (folder,) = (tmp_path / "outputs" / "train").iterdir()
    assert run.folder == folder
    assert run.metrics == metrics(folder)
    assert [row["epoch"] for row in run.history] == [1.0]
    assert run.history[0]["val/accuracy"] == run.metrics["val/accuracy"]
    assert run.classifier.network.parameter_count() == run.metrics["parameters"]
    assert re.fullmatch(rf"Run\('{folder}', test accuracy \d\d\.\d\d%\)", repr(run))
    assert '<img alt="learning curves" src="data:image/png;base64,' in run._repr_html_()
    mnist_cnn.train(QUICK, verbose=False)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(UserError, match="did you mean epochs"):
        mnist_cnn.train(["epoch=3"])
    with pytest.raises(UserError, match="another run's folder"):
        mnist_cnn.train([*QUICK, f"hydra.run.dir={folder}"])
    assert len(list((tmp_path / "outputs" / "train").iterdir())) == 2


def test_ctrl_c_in_python_saves_the_run_and_is_pythons_own(tmp_path, monkeypatch, signalled):
    monkeypatch.chdir(tmp_path)
    signalled(signal.SIGINT, 5)
    with pytest.raises(KeyboardInterrupt):
        mnist_cnn.train([*QUICK, "hydra.run.dir=run"], verbose=False)
    assert mnist_cnn.train(["resume=run"], verbose=False).metrics["epochs"] == 1


def test_threads_train_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begun, outcomes = threading.Event(), []

    class Meanwhile(logging.Handler):
        def emit(self, record):
            begun.set()

    def work(wait):
        if wait:
            begun.wait(60)
        try:
            outcomes.append(mnist_cnn.train(QUICK).metrics["epochs"])
        except UserError as error:
            outcomes.append(str(error))

    handler = Meanwhile()
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    threads = [threading.Thread(target=work, args=(wait,)) for wait in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == ["another thread of this process trains: wait for it, or train in a process of your own", 1]
    work(False)
    assert outcomes[-1] == 1


def test_a_notebook_shows_a_run_and_goes_on_after_an_interrupt(tmp_path):
    """In a real kernel: epochs are printed, a run shows itself, and an interrupted cell ends as any other."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(cwd=str(tmp_path))
    shown = {}

    def note(message):
        content = message["content"]
        text = content.get("text", "") + "".join(content.get("data", {}).values())
        shown[message["msg_type"]] = shown.get(message["msg_type"], "") + text
        if "epoch 1/9999" in text:
            manager.interrupt_kernel()

    def cell(code):
        shown.clear()
        return client.execute_interactive(code, output_hook=note, timeout=PATIENCE)["content"]

    try:
        words = ", ".join(map(repr, QUICK))
        assert cell(f"from mnist_cnn import train\nrun = train([{words}])\nrun")["status"] == "ok", shown
        assert "epoch 1/1  loss" in shown["stream"]
        assert 'src="data:image/png' in shown["execute_result"]
        assert cell(f"train([{words}, 'epochs=9999', 'hydra.run.dir=long'])")["ename"] == "KeyboardInterrupt"
        assert cell("print(len(run.history), run.classifier.classes[3])")["status"] == "ok"
        assert shown["stream"] == "1 3\n"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert (tmp_path / "long" / "checkpoints" / "last.ckpt").exists()


def test_train_from_python_takes_a_whole_configuration(tmp_path, monkeypatch):
    from hydra import compose, initialize_config_dir

    monkeypatch.chdir(tmp_path)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", list(QUICK))
    runs = mnist_cnn.train(config), mnist_cnn.train(QUICK)
    untimed = [{key: value for key, value in run.metrics.items() if not key.endswith("_seconds")} for run in runs]
    assert untimed[0] == untimed[1]


@pytest.mark.parametrize("order", ["import mnist_cnn.train", "from mnist_cnn import load_classifier"])
def test_train_is_a_function_whatever_was_imported_first(order):
    code = f"{order}\nfrom mnist_cnn import train\nassert callable(train)"
    subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], check=True)


def test_any_terminal_will_do(start, trained, tmp_path, digit):
    """One that has few letters; no stderr, as of a service; a notebook's backend, as `!mnist-predict` has it."""
    (tmp_path / "七.png").write_bytes(digit.read_bytes())
    closed = "import os, sys; os.close(2); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    few = {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "module://matplotlib_inline.nowhere"}
    words = ("-m", "mnist_cnn.predict", f"checkpoint={trained}", "images=七.png", "grid=grid.png")
    ended = outcome(start("-c", closed, *words, env=few))
    assert ended.status == 0
    assert "\\u4e03.png" in ended.out
    assert (tmp_path / "grid.png").is_file()


def test_one_dense_layer_needs_no_brackets(run):
    ended = run("mnist-train", *QUICK, "architecture.dense=16", "trainer.fast_dev_run=true")
    assert ended.status == 0
    assert "dense 1                   (16,)" in ended.out


def test_an_interrupt_while_torch_is_imported_leaves_nothing(run, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mnist_cnn.training.fit.fit", interrupted)
    ended = run("mnist-train", *QUICK)
    assert (ended.status, ended.err) == (130, "stopped by SIGINT\n")
    assert not list(tmp_path.rglob("train.log"))
    assert not list(tmp_path.glob("outputs/train/*"))


# --- Hydra's own powers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["train", "evaluate", "predict", "export", "draw", "sweep"])
def test_help_is_ours_and_imports_no_torch(verb, tmp_path):
    code = f"import sys, mnist_cnn.{verb} as c\ntry: c.main()\nfinally: assert 'torch' not in sys.modules, 'torch'"
    ended = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert f"mnist-{verb}" in ended.stdout
    assert verb in ("export", "draw") or "accelerator: auto, cpu, cuda" in ended.stdout
    groups, keys = re.fullmatch(r".*?(Groups .*?)?\n(Keys .*?)\n\n.*", ended.stdout, flags=re.DOTALL).groups()
    assert verb in ("train", "sweep") or "optimizer" not in (groups or "")
    for line in keys.splitlines()[1:]:  # each key with its value, and what it is
        assert verb == "sweep" or re.fullmatch(r"  [\w.]+=\S* +\S.*", line) or re.search(r"[.]\w+=\S*$", line), line


def test_help_explains_each_key_with_the_overrides_at_hand(run):
    shown = run("mnist-train", "--help", "optimizer=muon", "logger=tensorboard").out
    for key in ("optimizer.lr_rest=0.002", "logger.tensorboard.name=tensorboard", "data.batch_size=64", "epochs="):
        assert re.search(rf"^  {key}\S* +[\w]+", shown, flags=re.MULTILINE), key
    said(run("mnist-train", "--help", "optimiser=sgd"), "did you mean optimizer?")


def test_the_version_is_that_of_all_that_matters(run):
    shown = run("mnist-predict", "--version").out
    assert all(f"{name} " in shown for name in ("mnist-cnn", "torch", "pytorch-lightning", "hydra-core"))


def test_cfg_job_prints_the_configuration(run, tmp_path):
    ended = run("mnist-train", "--cfg", "job", "experiment=conv64_128")
    assert ended.status == 0
    assert yaml.safe_load(ended.out)["data"]["batch_size"] == 64
    assert not list(tmp_path.iterdir())


def test_tab_completion_knows_groups_and_keys(monkeypatch, run):
    monkeypatch.setenv("COMP_LINE", "mnist-train architecture=conv")
    assert "architecture=conv64_128" in run("mnist-train", "-sc", "query=bash").out.split()
    monkeypatch.setenv("COMP_LINE", "mnist-train data.batch")
    assert "data.batch_size=" in run("mnist-train", "-sc", "query=bash").out.split()


def test_a_users_own_config_directory(run, tmp_path):
    (tmp_path / "mine" / "architecture").mkdir(parents=True)
    own = "blocks: [{filters: 3, kernel: 7, pool: 4}]\ndense: []\ninitialization: torch\n"
    (tmp_path / "mine" / "architecture" / "tiny.yaml").write_text(own)
    ended = run("mnist-train", "--config-dir", "mine", *QUICK, "architecture=tiny")
    assert ended.status == 0
    assert metrics(ended.folder())["parameters"] == 3 * 49 + 3 + 75 * 10 + 10


def test_paths_with_special_characters_mean_themselves(run, tmp_path):
    said(run("mnist-train", *QUICK, "hydra.run.dir=a" + os.fsdecode(b"\xff")), "the name is no UTF-8")
    odd = tmp_path / "a run, b=1 (x)"
    assert run("mnist-train", *QUICK, f"hydra.run.dir={tmp_path / 'run'}").status == 0
    (tmp_path / "run").rename(odd)
    assert "finished already" in run("mnist-train", f"resume={odd}").out


def test_ctrl_c_while_the_command_line_is_read_ends_without_a_traceback(start):
    code = (
        "import argparse, os, signal, sys; from mnist_cnn.train import main; sys.argv = ['mnist-train', 'epochs=1']\n"
        "argparse._re.sub = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "argparse.ArgumentParser.format_usage = lambda parser: argparse._re.sub('', '', '')\n"
        "main()"
    )
    ended = outcome(start("-c", code))
    assert (ended.status, ended.err) == (-signal.SIGINT, "")


def test_ctrl_c_while_a_command_is_imported_ends_without_a_traceback(start):
    code = (
        "import importlib, os, signal, sys, mnist_cnn; sys.argv = ['mnist-train', 'epochs=1']\n"
        "importlib.import_module = lambda _: os.kill(os.getpid(), signal.SIGINT)\n"
        "mnist_cnn.main()"
    )
    ended = outcome(start("-c", code))
    assert (ended.status, ended.err) == (-signal.SIGINT, "")


def test_a_signal_ends_python_m_with_its_status_and_the_way_on(start, tmp_path):
    process = start("-m", "mnist_cnn.train", *QUICK, "epochs=9999", "hydra.run.dir=run")
    wait_until(lambda: process.poll() is not None or (tmp_path / "run" / "checkpoints" / "last.ckpt").exists())
    process.send_signal(signal.SIGTERM)
    ended = outcome(process)
    assert ended.status == 143
    assert ended.err == f"stopped by SIGTERM; continue with: mnist-train resume={tmp_path / 'run'}\n"
