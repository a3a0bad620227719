"""mnist-train as a user runs it: folders, figures, sweeps, continuing, starting from a checkpoint."""

import csv
import json
import logging
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ARCHITECTURES, CONF, TUTORIALS, equal, on_a_terminal, outcome

import mnist_cnn
from mnist_cnn.config.schema import UserError
from mnist_cnn.models.checkpoint import read_checkpoint

QUICK = ("data=digits", "epochs=1", "plots=false", "architecture=conv10")
METRICS = {
    *("parameters", "epochs", "tested_epoch", "fit_seconds", "train_seconds", "test_seconds"),
    *(f"{part}/{figure}" for part in ("train", "val", "test") for figure in ("loss", "accuracy")),
}


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def weights(checkpoint):
    return read_checkpoint(checkpoint)[0]["state_dict"]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_what_the_contract_says(run):
    ended = run("mnist-train", "data=digits", "epochs=3")
    assert ended.status == 0
    assert ended.err == ""
    folder = ended.folder()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(_\d+)?", folder.name)
    assert folder.parent.parts[-2:] == ("outputs", "train")
    left = {str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir()}
    pictures = ("training_digits", "learning_curves", "confusion_matrix", "incorrect_digits", "first_kernels")
    pictures += ("feature_maps_1", "feature_maps_2", "feature_maps_3")
    assert left == {
        *("config.yaml", "metrics.json", "metrics.csv", "train.log", "checkpoints/best.ckpt", "checkpoints/last.ckpt"),
        *(f"plots/{name}.png" for name in pictures),
        *(f".hydra/{name}.yaml" for name in ("config", "hydra", "overrides")),
    }
    figures = metrics(folder)
    assert set(figures) == METRICS
    assert figures["parameters"] == 93_322
    assert figures["epochs"] == 3
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    best = max(rows, key=lambda row: float(row["val/accuracy"]))
    assert figures["val/accuracy"] == float(best["val/accuracy"])
    assert figures["tested_epoch"] == int(best["epoch"])
    assert figures["test/accuracy"] > 0.8
    recorded = yaml.safe_load((folder / "config.yaml").read_text())
    assert recorded["data"]["name"] == "digits"
    assert recorded["seed"] == 1
    assert recorded["run"]["overrides"] == ["data=digits", "epochs=3"]
    assert recorded["run"]["versions"]["torch"] == torch.__version__.split("+")[0]
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
    assert re.search(rb"epoch 1/1:.*batch/s, loss \d\.\d+, accuracy [\d.]+%", shown)


def test_same_seed_same_weights_and_another_seed_others(run):
    folders = [run("mnist-train", *QUICK, f"seed={seed}").folder() for seed in (3, 3, 4)]
    first, again, other = (weights(folder) for folder in folders)
    assert same(first, again)
    assert not same(first, other)
    assert len({folder.name for folder in folders}) == 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains(run, architecture):
    folder = run("mnist-train", *QUICK, f"architecture={architecture}", "data.batch_size=64").folder()
    assert metrics(folder)["parameters"] == ARCHITECTURES[architecture]
    assert metrics(folder)["test/accuracy"] > 0.2


@pytest.mark.parametrize("optimizer", sorted(file.stem for file in (CONF / "optimizer").glob("*.yaml")))
@pytest.mark.parametrize("schedule", sorted(file.stem for file in (CONF / "schedule").glob("*.yaml")))
def test_every_optimizer_trains_with_every_schedule_and_resumes(run, optimizer, schedule):
    folder = run("mnist-train", *QUICK, f"optimizer={optimizer}", f"schedule={schedule}", "epochs=2").folder()
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert float(rows[1]["train/loss"]) < float(rows[0]["train/loss"])
    rates = [float(row["learning_rate"]) for row in rows]
    assert (rates[0] == rates[1]) == (schedule == "constant")
    read_checkpoint(folder / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize("name", [*TUTORIALS, "mlp"])
def test_a_recipe_is_the_tutorials(name):
    """The tutorials' own numbers: batch size, epochs, share of validation, and the last epoch tested."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [f"experiment={name}"])
    expected = {
        "conv30_70": (200, 10, 0, "KerasAdam"),
        "conv32_32_dropout": (128, 2, 0, "KerasAdam"),
        "conv64_128": (64, 5, 0.1, "KerasAdam"),
        "conv10": (200, 10, 0, "KerasAdam"),
        "conv32_64_64": (64, 5, 0, "KerasRMSprop"),
        "mlp": (64, 5, 0, "KerasRMSprop"),
    }[name]
    optimizer = config.optimizer._target_.rpartition(".")[2]
    assert (config.data.batch_size, config.epochs, config.data.validation, optimizer) == expected
    assert (config.data.normalization, config.data.validation_from, config.selection) == ("unit", "last", "last")
    assert config.architecture.initialization == "keras"
    assert (config.optimizer.lr, config.optimizer.eps) == (0.001, 1e-7)


def test_a_recipe_runs_and_tests_its_last_epoch(run):
    folder = run("mnist-train", "experiment=conv10", "data=digits", "epochs=3", "plots=false").folder()
    figures = metrics(folder)
    assert figures["tested_epoch"] == 3
    assert figures["val/accuracy"] is None
    assert same(weights(folder), weights(folder / "checkpoints" / "last.ckpt"))


def test_a_network_from_the_command_line(run):
    blocks = "architecture.blocks=[{filters:4,kernel:5,pool:2},{filters:6,kernel:3,stride:2,batch_norm:true}]"
    folder = run("mnist-train", *QUICK, blocks, "architecture.dense=[24,12]").folder()
    assert read_checkpoint(folder)[1].architecture.blocks[1].batch_norm


def test_normalisation_reaches_the_checkpoint(run):
    folder = run("mnist-train", *QUICK, "data.normalization=standard").folder()
    assert 0 < weights(folder)["network.mean"] < 255
    assert weights(folder)["network.standard_deviation"] < 255


# --- sweeps ------------------------------------------------------------------------------------------------


def test_a_sweep_ends_with_a_table_best_first_by_validation(run, tmp_path):
    ended = run("mnist-train", *QUICK, "-m", "optimizer.lr=0.00001,0.01", "seed=1,2")
    assert ended.status == 0
    table = next(tmp_path.glob("outputs/multirun/*/results.csv"))
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 4
    assert set(rows[0]) >= {"overrides", "val/accuracy", "test/accuracy", "fit_seconds"}
    order = [float(row["val/accuracy"]) for row in rows]
    assert order == sorted(order, reverse=True)
    assert "optimizer.lr=0.01" in rows[0]["overrides"]
    for row in rows:
        assert row["overrides"] in ended.out
        figures = metrics(table.parent / row["job"])
        assert float(row["test/accuracy"]) == figures["test/accuracy"]
        assert re.fullmatch(r"\d+_[\w.+-]+", row["job"])


def test_a_failing_job_is_reported_and_the_others_go_on(run, tmp_path):
    ended = run("mnist-train", "-m", *QUICK, "initialize=nowhere,null")
    assert ended.status == 1
    assert "checkpoint nowhere does not exist" in ended.err
    assert "Traceback" not in ended.err
    rows = list(csv.DictReader(next(tmp_path.glob("outputs/multirun/*/results.csv")).open()))
    assert [bool(row["error"]) for row in rows] == [False, True]
    assert "failed: checkpoint nowhere" in ended.out


@pytest.mark.parametrize(
    "words", [("epochs=1,-1",), ("epochs=-1", "seed=1,2"), ("resume=a,b",), ("seed=1,2", "data.x=3")]
)
def test_a_sweep_with_a_wrong_setting_is_refused_before_any_training(run, tmp_path, words):
    ended = run("mnist-train", "-m", *QUICK, *words)
    assert ended.status == 2
    assert len(ended.err.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.*"))


def test_a_sweeps_folder_is_for_one_sweep_and_its_jobs_may_be_named_otherwise(run, tmp_path):
    sweep = ("mnist-train", "-m", *QUICK, "hydra.sweep.dir=swept", "hydra.sweep.subdir=s${hydra.job.num}")
    assert run(*sweep, "seed=1,2").status == 0
    table = (tmp_path / "swept" / "results.csv").read_bytes()
    assert table.count(b"seed=") == 2
    ended = run(*sweep, "seed=3,4")
    assert ended.status == 2
    assert "swept is another sweep's folder" in ended.err
    assert run(*sweep, "seed=1,2").status == 0  # the same one: all its jobs are kept
    assert (tmp_path / "swept" / "results.csv").read_bytes() == table


def test_a_job_of_a_sweep_is_the_job_alone(run, tmp_path):
    alone = run("mnist-train", *QUICK, "seed=2").folder()
    run("mnist-train", "-m", *QUICK, "seed=1,2")
    job = next(tmp_path.glob("outputs/multirun/*/1_*"))
    assert same(weights(alone), weights(job))


# --- continuing and starting from a checkpoint -------------------------------------------------------------


def test_an_interrupted_process_continues_to_the_weights_of_an_undisturbed_one(run, start, tmp_path):
    """Stopped by SIGINT within an epoch; `resume` ends with the same bits."""
    settings = (*QUICK, "architecture.dense=[{units:16,dropout:0.5}]", "epochs=4", "schedule=cosine")
    settings += ("optimizer._target_=disturbed.Adam",)
    whole = run("mnist-train", *settings).folder()
    folder = tmp_path / "stopped"
    disturb = {"DISTURB": f"{signal.SIGINT:d} 30 {tmp_path / 'signalled'}"}
    status, _, err = outcome(start("-m", "mnist_cnn.train", *settings, f"hydra.run.dir={folder}", env=disturb))
    assert status == 130
    assert err == f"stopped by SIGINT; continue with: mnist-train resume={folder}\n"
    assert not (folder / "metrics.json").exists()
    config = (folder / "config.yaml").read_bytes()
    assert run("mnist-train", f"resume={folder}").status == 0
    equal(whole, folder)
    assert (folder / "config.yaml").read_bytes() == config


def test_a_finished_run_that_grows_and_is_interrupted_continues(run, signalled):
    folder = run("mnist-train", *QUICK).folder()
    signalled(signal.SIGTERM, 100)
    assert run("mnist-train", f"resume={folder}", "epochs=4").status == 143
    assert metrics(folder)["epochs"] == 1
    assert run("mnist-train", f"resume={folder}").status == 0
    assert metrics(folder)["epochs"] == 4
    assert run("mnist-train", f"resume={folder}", "epochs=5").status == 0
    assert metrics(folder)["epochs"] == 5


def test_a_moved_run_keeps_its_best_checkpoint(run, tmp_path):
    grown = ("data=digits", "plots=false", "optimizer.lr=0.003")
    run("mnist-train", *grown, "epochs=5", "hydra.run.dir=a")
    (tmp_path / "a").rename(tmp_path / "b")
    run("mnist-train", "resume=b", "epochs=7")
    run("mnist-train", *grown, "epochs=7", "hydra.run.dir=whole")
    moved, whole = metrics(tmp_path / "b"), metrics(tmp_path / "whole")
    assert moved["tested_epoch"] == whole["tested_epoch"]
    assert same(weights(tmp_path / "b"), weights(tmp_path / "whole"))


def test_the_learning_rate_is_that_of_its_epoch(run):
    folder = run("mnist-train", *QUICK, "schedule=exponential", "epochs=3").folder()
    rates = [float(row["learning_rate"]) for row in csv.DictReader((folder / "metrics.csv").open())]
    assert rates == pytest.approx([0.001, 0.0007, 0.00049])


def test_initialize_keeps_the_normalisation_of_its_weights(run, tmp_path):
    run("mnist-train", *QUICK, "data.normalization=standard", "hydra.run.dir=standard")
    folder = run("mnist-train", *QUICK[:3], "initialize=standard").folder()
    assert read_checkpoint(folder)[1].data.normalization == "standard"
    ended = run("mnist-train", *QUICK[:3], "initialize=standard", "data.normalization=unit")
    assert (ended.status, "trained with standard" in ended.err) == (2, True)


def test_validation_digits_that_were_trained_on_before_are_warned_of(run, tmp_path):
    run("mnist-train", *QUICK, "data.validation=0", "hydra.run.dir=all")
    assert "was trained on some of these validation digits" in run("mnist-train", *QUICK[:3], "initialize=all").err
    assert run("mnist-train", *QUICK[:3], "initialize=all", "data.validation=0").err == ""


def test_the_reader_of_the_output_may_go(tmp_path):
    command = f"{shlex.quote(sys.executable)} -m mnist_cnn.train {' '.join(QUICK)} hydra.run.dir=run | head -1"
    ended = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert ended.stderr == ""
    assert metrics(tmp_path / "run")


def test_a_loss_that_is_not_finite_ends_the_run(run):
    ended = run("mnist-train", *QUICK, "optimizer=sgd", "optimizer.lr=1e30")
    assert ended.status == 1
    assert re.search(r"the loss of step \d+ is not finite, at learning rate 1e\+30", ended.err)
    assert "optimizer.lr" in ended.err
    assert "Traceback" not in ended.err


def test_resuming_needs_no_checkpoint_that_the_run_began_from(run, trained, tmp_path):
    shutil.copy(trained / "checkpoints" / "best.ckpt", tmp_path / "start.ckpt")
    folder = run("mnist-train", *QUICK[:3], "initialize=start.ckpt").folder()
    (tmp_path / "start.ckpt").unlink()
    assert run("mnist-train", f"resume={folder}", "epochs=2").status == 0


def test_resuming_a_finished_run_changes_nothing(run):
    folder = run("mnist-train", *QUICK).folder()
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file() and file.suffix != ".log"}
    ended = run("mnist-train", f"resume={folder}")
    assert ended.status == 0
    assert "finished already" in ended.out
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_epochs_may_grow_and_other_settings_may_not_change(run):
    folder = run("mnist-train", *QUICK).folder()
    ended = run("mnist-train", f"resume={folder}", "seed=7")
    assert (ended.status, "seed=1, not 7" in ended.err) == (2, True)
    ended = run("mnist-train", f"resume={folder}", "architecture=mlp")
    assert (ended.status, "architecture" in ended.err) == (2, True)
    ended = run("mnist-train", f"resume={folder}", "epochs=2")
    assert ended.status == 0
    assert metrics(folder)["epochs"] == 2
    whole = run("mnist-train", *QUICK, "epochs=2").folder()
    assert same(weights(whole / "checkpoints" / "last.ckpt"), weights(folder / "checkpoints" / "last.ckpt"))


def test_another_runs_folder_is_never_written_to(run):
    folder = run("mnist-train", *QUICK).folder()
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    ended = run("mnist-train", *QUICK, "seed=9", f"hydra.run.dir={folder}")
    assert ended.status == 2
    assert f"resume={folder}" in ended.err
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_initialize_brings_network_and_weights(run, trained):
    ended = run("mnist-train", "data=digits", "plots=false", "epochs=1", f"initialize={trained}", "optimizer.lr=1e-12")
    start, end = weights(trained), weights(ended.folder())
    assert all(torch.allclose(start[name], end[name], atol=1e-6) for name in start)


def test_freeze_blocks_trains_only_the_dense_part(run, trained):
    blocks = "architecture.blocks=[{filters:4,kernel:5,batch_norm:true,pool:4,dropout:0.5}]"
    first = run("mnist-train", *QUICK, blocks).folder()
    folder = run(
        "mnist-train", "data=digits", "epochs=1", "plots=false", f"initialize={first}", "freeze=blocks"
    ).folder()
    start, end = weights(first), weights(folder)
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved
    assert all(name.startswith(("network.dense", "network.logits")) for name in moved)


def test_other_classes_get_a_new_last_layer(run, trained, monkeypatch):
    from mnist_cnn.data import datasets

    monkeypatch.setitem(datasets.CLASSES, "digits", list("abcdefghij"))
    folder = run("mnist-train", *QUICK[:3], f"initialize={trained}", "freeze=blocks", "optimizer.lr=1e-12").folder()
    start, end = weights(trained), weights(folder)
    assert torch.equal(start["network.blocks.0.0.weight"], end["network.blocks.0.0.weight"])
    assert not torch.allclose(start["network.logits.weight"], end["network.logits.weight"], atol=1e-3)
    assert read_checkpoint(folder)[1].classes == list("abcdefghij")


def test_an_architecture_beside_initialize_is_refused(run, trained):
    ended = run("mnist-train", "data=digits", f"initialize={trained}", "architecture=mlp")
    assert ended.status == 2
    assert "architecture=mlp" in ended.err


# --- loggers, Python, Hydra's own powers -------------------------------------------------------------------


def test_tensorboard_gets_the_figures(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run("mnist-train", *QUICK, "logger=tensorboard", "epochs=2").folder()
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "test/accuracy"} <= set(
        events.Tags()["scalars"]
    )
    assert len(events.Scalars("train/loss")) == 2


def test_mlflow_gets_the_figures(run):
    import mlflow

    folder = run("mnist-train", *QUICK, "logger=mlflow").folder()
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("mnist_cnn")
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.data.metrics["test/accuracy"] == metrics(folder)["test/accuracy"]


def test_wandb_offline_gets_the_figures(run, monkeypatch):
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")  # seconds for its own process to start
    ended = run("mnist-train", *QUICK, "logger=wandb", "logger.offline=true")
    assert ended.status == 0
    assert list(ended.folder().glob("wandb/offline-run-*/*.wandb"))


def test_train_from_python_returns_what_it_writes(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # those of the commands in the tests before
    returned = mnist_cnn.train(QUICK)
    (folder,) = (tmp_path / "outputs" / "train").iterdir()
    assert returned == metrics(folder)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(UserError, match="did you mean epochs"):
        mnist_cnn.train(["epoch=3"])
    assert len(list((tmp_path / "outputs" / "train").iterdir())) == 1


def test_train_from_python_takes_a_whole_configuration(tmp_path, monkeypatch):
    from hydra import compose, initialize_config_dir

    monkeypatch.chdir(tmp_path)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", list(QUICK))
    first, second = mnist_cnn.train(config), mnist_cnn.train(QUICK)
    untimed = [{k: v for k, v in figures.items() if not k.endswith("_seconds")} for figures in (first, second)]
    assert untimed[0] == untimed[1]


@pytest.mark.parametrize("order", ["import mnist_cnn.train", "from mnist_cnn import load_classifier"])
def test_train_is_a_function_whatever_was_imported_first(order):
    code = f"{order}\nfrom mnist_cnn import train\nassert callable(train)"
    subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], check=True)


@pytest.mark.parametrize("verb", ["train", "evaluate", "predict"])
def test_help_is_ours_and_imports_no_torch(verb, tmp_path):
    code = f"import sys, mnist_cnn.{verb} as c\ntry: c.main()\nfinally: assert 'torch' not in sys.modules, 'torch'"
    ended = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert f"mnist-{verb}" in ended.stdout
    assert "accelerator: auto, cpu, cuda" in ended.stdout


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
