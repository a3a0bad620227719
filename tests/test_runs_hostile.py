"""Folders and words of strangers: nothing in them runs, and each ends in one line and status 2."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import yaml
from conftest import QUICK, outcome, said, wait_until

from mnist_cnn.config.schema import printable
from mnist_cnn.runs.files import cell

AGAIN = "give it again on the command line"
TOUCH = {"_target_": "os.system", "command": "touch marker"}
WANDB = {"_target_": "pytorch_lightning.loggers.WandbLogger", "settings": {"x_executable": "/bin/true"}}
MLFLOW = {"_target_": "pytorch_lightning.loggers.MLFlowLogger", "tracking_uri": "http://x/${oc.env:HOME}"}


@pytest.fixture
def stopped(trained, tmp_path):
    """A run that was stopped, with its config.yaml changed."""

    def make(change=None, text=None):
        folder = tmp_path / "stranger"
        shutil.copytree(trained, folder)
        (folder / "metrics.json").unlink()
        content = yaml.safe_load((folder / "config.yaml").read_text())
        if change:
            change(content)
        (folder / "config.yaml").write_text(text or yaml.safe_dump(content))
        return folder

    return make


TARGETS = {
    "a target in an argument": (lambda c: c["optimizer"].update(betas=TOUCH), ["optimizer.betas"]),
    "a program as optimizer": (lambda c: c.update(optimizer={**TOUCH, "lr": 1}), ["optimizer._target_=os.system"]),
    "a module of torch's": (
        lambda c: c["schedule"]["scheduler"].update(_target_="torch.optim.lr_scheduler.warnings.warn"),
        ["schedule.scheduler._target_=torch.optim.lr_scheduler.warnings.warn"],
    ),
    "a callback": (lambda c: c.update(callbacks={"mine": TOUCH}), ["callbacks.mine._target_=os.system"]),
    "an activation": (lambda c: c["architecture"].update(activation=TOUCH), ["architecture.activation", "os.system"]),
    "a program of a logger's": (lambda c: c.update(logger={"wandb": WANDB}), ["logger.wandb.settings"]),
    "an environment variable": (lambda c: c.update(logger={"mlflow": MLFLOW}), ["${…}"]),
    "a data set": (lambda c: c["data"].update(name="os.getcwd"), ["data._target_=os.getcwd"]),
    "a module": (lambda c: c.update(modules=["os"]), ["modules=[os]"]),
    "another machine": (lambda c: c["accelerator"].update(num_nodes=2, rendezvous="evil:1"), ["rendezvous=evil:1"]),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_a_strangers_run_runs_nothing(run, tmp_path, stopped, kind):
    change, words = TARGETS[kind]
    folder = stopped(change)
    said(run("mnist-train", f"resume={folder}"), "stranger", *words)
    assert not (tmp_path / "marker").exists()
    assert not list(folder.rglob(".mnist_cnn-*"))


LINKS = {
    "a log": ("mnist-train resume=stranger", "train.log"),
    "checkpoints": ("mnist-train resume=stranger", "checkpoints"),
    "a sweep's record": ("mnist-train -m multirun.resume=sweep", "multirun.yaml"),
    "a job": ("mnist-train -m multirun.resume=sweep", "0_seed=1/.hydra"),
    "a study's pictures": ("mnist-sweep report=study", "pictures"),
}


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("../mine")], ids=["pipe", "link"])
@pytest.mark.parametrize("kind", LINKS)
def test_nothing_is_written_through_a_strangers_link_or_pipe(run, tmp_path, stopped, kind, make):
    stopped()
    sweep = {"version": "0.2.0", "overrides": ["data=digits", "seed=1,2"], "hydra": [], "config_dir": None}
    study = {"study": "x", "metric": "val/loss", "storage": None, "retries": 1}
    for name, record in (("sweep", {**sweep, "working_folder": str(tmp_path)}), ("study", study)):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.yaml").write_text(yaml.safe_dump(record))
    command, name = LINKS[kind]
    path = tmp_path / command.rpartition("=")[2] / name
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    make(path)
    said(run(*command.split()), f"{name} is a link out of", "or no regular file")


def test_what_is_named_again_is_taken(run, stopped):
    folder = stopped(lambda content: content.update(modules=["mine"], callbacks={"own": {"_target_": "builtins.int"}}))
    said(run("mnist-train", f"resume={folder}", "modules=[mine]"), "callbacks.own._target_=builtins.int", AGAIN)
    again = ("modules=[mine]", "+callbacks.own={_target_:builtins.int}")
    said(run("mnist-train", f"resume={folder}", *again), "callbacks.own: a int is no callback of Lightning's")


NAMED = {
    "a target": ["optimizer._target_=disturbed.Adam", "modules=[mine]"],
    "an own file": ["--config-dir", "own conf", "optimizer=mine"],
    "a data set": ["data._target_=digits_again.load"],
    "plain": ["optimizer=adam"],
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Code of the user's own in the folder."""
    (tmp_path / "own conf" / "optimizer").mkdir(parents=True)
    (tmp_path / "own conf" / "optimizer" / "mine.yaml").write_text(
        "_target_: disturbed.Adam\n_partial_: true\nlr: 0.01\n"
    )
    (tmp_path / "digits_again.py").write_text(
        "from mnist_cnn.data import datasets\n"
        "def load():\n"
        "    return *((i[:, 0].numpy(), t.numpy()) for i, t in datasets.load('digits', 'x')[:2]), range(10)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("sweep", [False, True], ids=["run", "sweep"])
def test_the_line_that_continues_names_own_code_again(run, signalled, own, kind, sweep):
    words = ["data=digits", *NAMED[kind], "epochs=1", "architecture=conv10", "plots=false"]
    words += ["-m", "seed=1,2", "hydra.sweep.dir=a sweep", "fail_fast=true"] if sweep else ["hydra.run.dir=a run"]
    signalled(signal.SIGINT, 3)
    ended = run("mnist-train", *words)
    assert ended.status == 130
    lines = [shlex.split(line.partition("continue with: ")[2]) for line in ended.err.splitlines()]
    assert len(lines) == 1 + sweep
    for line in lines:
        assert run(*line).status == 0
    assert kind != "plain" or [len(line) for line in lines] == [2, 3][: 1 + sweep]


DAMAGED = {
    "holds itself": ("a: &a [*a]\n", "it has aliases"),
    "nested": ("[" * 5000, "recursion"),
    "a long number": ("seed: " + "1" * 6000, "4300 digits"),
    "no mapping": ("[1]", "no mapping"),
    "binary": ("\0\1", "damaged"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_config_is_one_line(run, stopped, kind):
    text, words = DAMAGED[kind]
    said(run("mnist-train", f"resume={stopped(text=text)}"), "config.yaml", words)


@pytest.mark.parametrize("text", ["", "[]", '{"fit_seconds": "x"}', "[" * 100_000])
def test_damaged_metrics_are_one_line(run, trained, tmp_path, text):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").write_text(text)
    said(run("mnist-train", "resume=run"), "metrics.json is damaged")


SWEEPS = {
    "a callback of Hydra's": ["hydra.callbacks.mine._target_=os.system"],
    "a logging factory": ["hydra.job_logging.handlers.file.class=os.system"],
    "a search path": ["hydra.searchpath=[file://evil]"],
    "a setup of a launcher": ["hydra/launcher=slurm", "hydra.launcher.setup=[touch marker]"],
    "a target": ["optimizer._target_=os.system"],
    "a target in a mapping": ["+callbacks.mine={_target_:os.system,command:ls}"],
    "a data set": ["data.name=os.getcwd"],
    "modules": ["modules=[os]"],
    "an environment variable": ["seed=${oc.env:HOME}"],
}


@pytest.mark.parametrize("kind", SWEEPS)
def test_a_strangers_sweep_runs_nothing(run, tmp_path, kind):
    words = SWEEPS[kind]
    (tmp_path / "sweep").mkdir()
    hydra = [word for word in words if word.startswith("hydra")]
    record = {"version": "0.2.0", "overrides": ["data=digits", *(set(words) - set(hydra))], "hydra": hydra}
    record |= {"config_dir": None, "working_folder": str(tmp_path)}
    (tmp_path / "sweep" / "sweep.yaml").write_text(yaml.safe_dump(record))
    said(run("mnist-train", "-m", "multirun.resume=sweep"), words[-1], AGAIN)
    (tmp_path / "sweep" / "sweep.yaml").write_text(yaml.safe_dump({**record, "overrides": "x"}))
    said(run("mnist-train", "-m", "multirun.resume=sweep"), "overrides='x': must be a valid list")
    (tmp_path / "sweep" / "sweep.yaml").write_text(yaml.safe_dump({**record, "config_dir": "${oc.env:HOME}"}))
    said(run("mnist-train", "-m", "multirun.resume=sweep"), "--config-dir ${oc.env:HOME}", AGAIN)
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["sweep.yaml"]


def test_a_strangers_sweep_does_not_choose_where_python_runs(start, tmp_path):
    """A process that starts there, as a rank, would import what lies there."""
    (tmp_path / "sweep" / "w").mkdir(parents=True)
    (tmp_path / "sweep" / "w" / "signal.py").write_text("open('../../marker', 'w')")
    record = {"version": "0.2.0", "overrides": ["data=digits", "accelerator.devices=2"], "hydra": []}
    record |= {"config_dir": None, "working_folder": "sweep/w"}
    (tmp_path / "sweep" / "sweep.yaml").write_text(yaml.safe_dump(record))
    words = ("-m", "mnist_cnn.train", "-m", "multirun.resume=sweep")
    said(outcome(start(*words)), "sweep was begun in another folder: continue it there, after cd sweep/w")
    assert not (tmp_path / "marker").exists()


def change_overrides(study, *words):
    """Overrides that a stranger has put into the study of a folder."""
    import sqlite3

    with sqlite3.connect(study / "study.db") as database:
        for number, value in database.execute(
            "select trial_user_attribute_id, value_json from trial_user_attributes where key = 'overrides'"
        ).fetchall():
            changed = json.dumps([*json.loads(value), *words])
            database.execute(
                "update trial_user_attributes set value_json = ? where trial_user_attribute_id = ?", (changed, number)
            )


@pytest.mark.parametrize(
    ("words", "said_of"),
    [
        (["+optimizer.betas={_target_:os.system,command:ls}"], "_target_:os.system"),
        (["hydra.searchpath=[file://evil]"], "hydra.searchpath"),
        (["modules=[os]"], "modules=[os]"),
    ],
)
def test_a_strangers_study_runs_nothing(run, tmp_path, swept, words, said_of):
    shutil.copytree(swept, tmp_path / "study")
    change_overrides(tmp_path / "study", *words)
    said(run("mnist-sweep", "retrain=study"), said_of, AGAIN)
    assert not (tmp_path / "study" / "retrain").exists()


def test_a_strangers_word_that_hydra_refuses_is_one_line(run, tmp_path, swept):
    shutil.copytree(swept, tmp_path / "study")
    change_overrides(tmp_path / "study", "nonsense=1")
    for verb in ("report", "retrain"):
        said(run("mnist-sweep", f"{verb}=study"), "unknown key nonsense")


def test_a_strangers_yaml_files_are_not_taken_from_a_study(run, tmp_path, swept):
    shutil.copytree(swept, tmp_path / "study")
    (tmp_path / "study" / "optimizer").mkdir()
    (tmp_path / "study" / "optimizer" / "mine.yaml").write_text("_target_: os.system\n_partial_: true\nlr: 1\n")
    change_overrides(tmp_path / "study", "optimizer=mine")
    about = yaml.safe_load((tmp_path / "study" / "study.yaml").read_text())
    (tmp_path / "study" / "study.yaml").write_text(yaml.safe_dump({**about, "config_dir": str(tmp_path / "study")}))
    said(run("mnist-sweep", "retrain=study"), "optimizer._target_=os.system", AGAIN)


def test_a_strangers_yaml_files_read_no_environment(run, tmp_path, swept, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cret")
    shutil.copytree(swept, tmp_path / "study")
    (tmp_path / "study" / "logger").mkdir()
    (tmp_path / "study" / "logger" / "mine.yaml").write_text(yaml.safe_dump({"mine": MLFLOW}).replace("HOME", "SECRET"))
    change_overrides(tmp_path / "study", "logger=mine")
    about = yaml.safe_load((tmp_path / "study" / "study.yaml").read_text())
    for config_dir, words in (
        (str(tmp_path / "study"), ["logger.mine.tracking_uri with ${…:…}", AGAIN]),
        ("${oc.env:SECRET}", ["study.yaml is damaged: config_dir", "without ${…}"]),
    ):
        (tmp_path / "study" / "study.yaml").write_text(yaml.safe_dump({**about, "config_dir": config_dir}))
        for verb in ("report", "retrain"):
            ended = run("mnist-sweep", f"{verb}=study")
            assert (ended.status, "s3cret" in ended.out + ended.err) == (2, False), ended
            assert all(word in ended.err for word in words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [*a]", ["study.yaml", "aliases"]),
        ("study: x", ["study.yaml is damaged", "metric is missing"]),
        (
            "{study: x, metric: val/loss, storage: 'evil://u:secret@h', retries: 1}",
            ["study.yaml is damaged", "storage"],
        ),
        (
            "{study: x, metric: val/loss, storage: 'postgresql://u@h/d', retries: 1}",
            ["storage=postgresql://u@h/d", "give storage=… again"],
        ),
    ],
)
def test_a_damaged_study_file_is_one_line(run, tmp_path, text, words):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.yaml").write_text(text)
    ended = run("mnist-sweep", "report=study")
    said(ended, *words)
    assert "secret" not in ended.err


# --- what a terminal and a spreadsheet are shown ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mred\x07\x9b", r"a\x1b[31mred\x07\x9b"),
        ("x\u202eexe.png", r"x\u202eexe.png"),
        ("a\tb\nc 数 é", "a\tb\nc 数 é"),
        ("oracle://user:p@ss:w/o rd@host/db failed", "oracle://user@host/db failed"),
        ("postgresql://h/d?password=secret&x=1", "postgresql://h/d?password=…&x=1"),
    ],
)
def test_what_a_terminal_is_shown(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize(
    "word",
    [
        "storage=oracle://u:s3cret@h/d",
        "Storage=postgresql://u:s3cret@h/d",
        "storage=postgresql://u:s3cret,x@h/d",
        "storage={a:postgresql://u:s3cret@h/d}",
        "storage='postgresql://u:s3cret@h:port/d'",
        "+x=postgresql://u:s3cret@h/d(",
    ],
)
def test_a_password_is_never_shown(run, word):
    ended = run("mnist-sweep", "sweep=learning_rate", word)
    said(ended)
    assert "s3cret" not in ended.err + ended.out


def test_a_traceback_shows_no_password(start, monkeypatch):
    code = (
        "import sys, mnist_cnn.runs.hydra_app as app\n"
        "sys.argv = ['mnist-train']\n"
        "def run_job(): raise RuntimeError('mysql://u:s3cret@h is away')\n"
        "app.run_command(run_job, 'train')\n"
    )
    ended = outcome(start("-c", code))
    assert ended.status == 1
    assert "mysql://u@h is away" in ended.err
    assert "s3cret" not in ended.err


def test_text_that_would_be_a_formula_is_none():
    for text in ("=1+1", "+1+cmd", "-2+3", "@x", "\t=1", "=HYPERLINK(1)"):
        assert cell(text) == f"'{text}"
    for text in ("a=1", "-", "-1.5", "+1e-05", "", None, -1, "7"):
        assert cell(text) == text


def test_a_log_shows_what_the_terminal_does(run, tmp_path):
    (tmp_path / "a\x1b[31m").mkdir()
    ended = run("mnist-train", *QUICK, "hydra.run.dir=a\x1b[31m/run")
    assert ended.status == 0
    log = (tmp_path / "a\x1b[31m" / "run" / "train.log").read_text()
    for text in (ended.out, log):
        assert r"a\x1b[31m/run" in text
        assert "\x1b" not in text


# --- a user's own folder ----------------------------------------------------------------------------------------


def test_folders_and_links_of_our_temporaries_name_are_no_trouble(run, tmp_path, stopped):
    folder = stopped()
    (folder / ".mnist_cnn-01234567-x").mkdir()
    (folder / ".2024.notes.txt").write_text("mine")
    (folder / ".mnist_cnn-01234567-y").symlink_to(".2024.notes.txt")
    assert run("mnist-train", f"resume={folder}", "plots=false").status == 0
    assert (folder / ".2024.notes.txt").read_text() == "mine"


def test_pictures_that_were_left_out_stay_left_out(run, stopped):
    folder = stopped(lambda content: content.update(plots=False))
    shutil.rmtree(folder / "plots")
    assert run("mnist-train", f"resume={folder}").status == 0
    assert not (folder / "plots").exists()


def test_a_finished_run_is_tidied_of_what_a_kill_left(run, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / "checkpoints" / ".mnist_cnn-01234567-last.ckpt").touch()
    assert run("mnist-train", "resume=run").status == 0
    assert not list((tmp_path / "run").rglob(".*[!.hydra]"))


@pytest.mark.skipif(not shutil.which("setpriv"), reason="of Linux")
def test_a_finished_run_may_be_read_only(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    # The superuser may write all the same, unless this is taken from it.
    bound = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    command = [*bound, sys.executable, "-m", "mnist_cnn.train", "resume=run"]
    for words, status, said_of in (
        ([], 0, "has finished already"),
        (["epochs=4"], 2, "run cannot be written (Permission denied)"),
    ):
        ended = subprocess.run([*command, *words], capture_output=True, text=True, cwd=tmp_path)
        assert (ended.returncode, len((ended.stdout + ended.stderr).splitlines())) == (status, 1)
        assert said_of in ended.stdout + ended.stderr
    assert not (folder / ".lock").exists()
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)


def test_a_full_disk_while_pictures_are_drawn_names_file_and_remedy(run, tmp_path, monkeypatch):
    from mnist_cnn.inference import plots

    def full(figure, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(plots, "save", full)
    ended = run("mnist-train", "data=digits", "epochs=1", "architecture=conv10", "hydra.run.dir=run")
    said(ended, "plots", "No space left", "mnist-train resume=", status=1)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert run("mnist-train", "resume=run").status == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="of Linux")  # noqa: PTH110
def test_output_that_finds_no_room_is_status_1(trained, digit, tmp_path):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        ended = subprocess.run(
            [sys.executable, "-m", "mnist_cnn.predict", f"checkpoint={trained}", f"images='{digit}'"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
    assert ended.returncode == 1
    assert ended.stderr == "error: the output could not be written: No space left on device\n"


def test_sigterm_leaves_nothing_half_written(start, tmp_path, digit):
    os.mkfifo(tmp_path / "list")
    command = start("-m", "mnist_cnn.predict", "images=-", "output=x.csv", stdin=subprocess.PIPE)
    wait_until(lambda: list(tmp_path.glob(".mnist_cnn-*")))
    command.send_signal(signal.SIGTERM)
    assert command.wait(60) == 143
    assert not [path for path in tmp_path.iterdir() if path.name != "list"]


def test_a_number_of_thousands_of_digits(run, tmp_path):
    said(run("mnist-train", "data=digits", f"seed={'1' * 5000}"), "thousands of digits")
    ended = run("mnist-train", "data=digits", f"seed={'1' * 3000}")
    said(ended, "seed=1111")
    assert len(ended.err) < 500
    assert not list(tmp_path.iterdir())


def test_help_says_which_files_are_safe(run):
    assert "safe to get from others" in " ".join(run("mnist-train", "--help").out.split())
