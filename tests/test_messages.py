"""Every message that a user can cause: the command, its exit status, the words that must appear in one line."""

import shutil
import signal
import zipfile

import pytest
import torch
from conftest import CONF, outcome

TRAIN = ("mnist-train", "data=digits", "epochs=1", "plots=false", "architecture=conv10")


def said(ended, *words, status=2):
    assert ended.status == status, ended
    assert "Traceback" not in ended.err + ended.out
    assert len(ended.err.strip().splitlines()) == 1, ended.err
    assert ended.err.startswith("error: ")
    for word in words:
        assert word in ended.err


SETTINGS = [
    (["epoch=3"], ["unknown key epoch", "did you mean epochs"]),
    (["+epoch=3"], ["unknown key epoch", "did you mean epochs"]),
    (["+architectures=conv10"], ["unknown key architectures", "did you mean architecture"]),
    (["optimiser=adam"], ["unknown key optimiser", "did you mean optimizer"]),
    (["architecture=conv65"], ["architecture=conv65", "no such option", "did you mean conv", "conv64_128"]),
    (["optimizer=adan"], ["optimizer=adan", "did you mean adam"]),
    (["experiment=conv11"], ["experiment=conv11", "conv10"]),
    (["data.batch=3"], ["unknown key data.batch", "did you mean data.batch_size"]),
    (["+data.batch=3"], ["data", "unknown key batch", "did you mean batch_size"]),
    (["optimizer.lrr=1"], ["unknown key optimizer.lrr", "did you mean optimizer.lr"]),
    (["+optimizer.lrr=1"], ["unknown key optimizer.lrr", "did you mean lr"]),
    (["+schedule.scheduler.gama=1"], ["unknown key schedule.scheduler.gama", "ConstantLR"]),
    (["epochs=-1"], ["epochs=-1", "greater than or equal to 1"]),
    (["epochs=0"], ["epochs=0", "greater than or equal to 1"]),
    (["epochs=1.5"], ["epochs=1.5", "integer"]),
    (["epochs=three"], ["epochs='three'", "integer"]),
    (["epochs=true"], ["epochs=True", "integer"]),
    (["epochs=null"], ["epochs=None", "integer"]),
    (["seed=-1"], ["seed=-1", "greater than or equal to 0"]),
    (["data.batch_size=0"], ["data.batch_size=0", "greater than or equal to 1"]),
    (["data.validation=1.0"], ["data.validation=1.0", "below 1.0"]),
    (["data.validation=-3"], ["data.validation=-3", "fraction", "count"]),
    (["data.validation=nan"], ["data.validation=nan", "fraction"]),
    (["data.validation=1437"], ["data.validation=1437", "no training digit", "1,437"]),
    (["data.validation_from=first"], ["data.validation_from='first'", "'last' or 'random'"]),
    (["data.normalization=none"], ["data.normalization='none'", "'unit' or 'standard'"]),
    (["selection=worst"], ["selection='worst'", "'best' or 'last'"]),
    (["optimizer.lr=abc"], ["optimizer.lr='abc'", "number greater than 0"]),
    (["optimizer.lr=0"], ["optimizer.lr=0", "number greater than 0"]),
    (["optimizer.lr=nan"], ["optimizer", "lr=nan", "finite"]),
    (["optimizer.lr=inf"], ["optimizer", "lr=inf", "finite"]),
    (["optimizer.betas=[0.9,nan]"], ["optimizer", "betas.1=nan", "finite"]),
    (["optimizer.betas=[0.9,2.0]"], ["optimizer", "Adam", "betas"]),
    (["optimizer.weight_decay=heavy"], ["optimizer", "Adam", "heavy"]),
    (["optimizer._target_=torch.optim.Adan"], ["optimizer", "torch.optim.Adan"]),
    (["schedule=onecycle", "schedule.scheduler.pct_start=3"], ["schedule", "OneCycleLR", "3"]),
    (["schedule.interval=batch"], ["schedule.interval='batch'", "'step' or 'epoch'"]),
    (["accelerator.precision=fp8"], ["accelerator.precision='fp8'", "32-true"]),
    (["accelerator.threads=0"], ["accelerator.threads=0"]),
    (["accelerator=tpu"], ["accelerator=tpu", "auto, cpu, cuda"]),
    (["architecture.blocks=[{filters:8,kernel:29}]"], ["block 1", "28×28×1", "kernel=29"]),
    (["architecture.blocks=[{filters:8,kernel:20},{filters:8,kernel:20}]"], ["block 2", "9×9×8", "kernel 20"]),
    (["architecture.blocks=[{filter:8,kernel:3}]"], ["block 1", "unknown key filter", "did you mean filters"]),
    (["architecture.dense=[0]"], ["architecture.dense[0]", "greater"]),
    (["architecture.blocks=[{filters:8"], ["{filters:8"]),
    (["~seed"], ["seed is missing"]),
    (["~optimizer"], ["optimizer is missing"]),
    (["seed=1,2"], ["seed=1,2", "--multirun"]),
    (["--epochs", "3"], ["unknown flag --epochs", "epochs=…"]),
    (["--config-dir=nowhere"], ["nowhere", "not found"]),
    (["initialize=nowhere"], ["checkpoint nowhere does not exist"]),
    (["resume=nowhere"], ["nowhere", "not a run's folder"]),
    (["hydra.run.dir=/dev/null/run"], ["/dev/null/run"]),
    (["schedule=exponential", "schedule.scheduler.gamma=abc"], ["schedule.scheduler", "ExponentialLR", "abc"]),
    (["optimizer.betas=[0.9]"], ["optimizer", "Adam"]),
    (["optimizer=null"], ["a group takes the name of one of its options"]),
    (["accelerator.threads=100000"], ["accelerator.threads=100000", "less than or equal to 1024"]),
    (["data.validation=1436", "data.validation_from=random"], ["data.validation=1436", "10 to 1,427"]),
    (["resume="], ["resume is empty"]),
    (["initialize="], ["initialize is empty"]),
    (["data.root="], ["data.root is empty"]),
    (["hydra.run.dir="], ["hydra.run.dir is empty"]),
    (["--cfg", "nope"], ["--cfg", "nope"]),
    (["architecture.blocks=[" + ",".join(["{filters:8,kernel:3,dropout:0.1,padding:1}"] * 9) + ",3]"], ["block 10"]),
    (["logger=tensorbord"], ["logger=tensorbord", "did you mean tensorboard"]),
]


@pytest.mark.parametrize(("words", "expected"), SETTINGS, ids=[" ".join(words) for words, _ in SETTINGS])
def test_a_wrong_setting_is_named_and_nothing_is_begun(run, tmp_path, words, expected):
    said(run(*TRAIN, *words), *expected)
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("verb", ["train", "evaluate", "predict"])
def test_cuda_asked_for_and_absent(run, trained, digit, verb):
    words = {"train": TRAIN[1:], "evaluate": (f"checkpoint={trained}",)}
    words["predict"] = (f"checkpoint={trained}", f"images={digit}")
    said(run(f"mnist-{verb}", *words[verb], "accelerator=cuda"), "accelerator=cuda", "no CUDA device")


def test_a_missing_logger_names_its_extra(run, monkeypatch):
    from pytorch_lightning.loggers import tensorboard

    def absent(*_, **__):
        raise ModuleNotFoundError("tensorboard")

    monkeypatch.setattr(tensorboard.TensorBoardLogger, "__init__", absent)
    said(run(*TRAIN, "logger=tensorboard"), "logger=tensorboard", "pip install 'mnist-cnn[tensorboard]'")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
def test_no_network_names_mirrors_and_remedies(run, tmp_path, monkeypatch, name):
    import torchvision

    for dataset in (torchvision.datasets.MNIST, torchvision.datasets.FashionMNIST, torchvision.datasets.KMNIST):
        monkeypatch.setattr(dataset, "mirrors", ["http://127.0.0.1:9/one/", "http://127.0.0.1:9/two/"])
    ended = run("mnist-train", f"data={name}", f"data.root={tmp_path}/none")
    said(ended, "127.0.0.1:9/one", "127.0.0.1:9/two", "data.root", "MNIST_CNN_DATA", "data=digits")
    assert not list(tmp_path.glob("outputs/train/*"))


def test_a_data_folder_that_cannot_be_made(run):
    said(run("mnist-train", "data.root=/dev/null/data"), "/dev/null/data", "MNIST_CNN_DATA")


def pickled_model(path):
    torch.save({"state_dict": {}, "network": torch.nn.Linear(2, 2)}, path)


CHECKPOINTS = {
    "missing": (None, ["does not exist", ".ckpt"]),
    "a folder without one": (lambda path: path.mkdir(), ["no checkpoints/best.ckpt"]),
    "empty": (lambda path: path.write_bytes(b""), ["not a whole checkpoint"]),
    "text": (lambda path: path.write_text("hello"), ["not a whole checkpoint"]),
    "a zip of something else": (lambda path: zipfile.ZipFile(path, "w").close(), ["not a whole checkpoint"]),
    "a pickled model": (pickled_model, ["not a whole checkpoint"]),
    "another program's": (lambda path: torch.save({"state_dict": {}, "epoch": 3}, path), ["another program"]),
    "a list": (lambda path: torch.save([1, 2], path), ["another program"]),
}


@pytest.mark.parametrize("verb", ["train", "evaluate", "predict"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_that_is_none(run, tmp_path, digit, verb, kind):
    make, words = CHECKPOINTS[kind]
    path = tmp_path / "stranger.ckpt"
    if make:
        make(path)
    given = {
        "train": (*TRAIN[1:], f"initialize={path}"),
        "evaluate": (f"checkpoint={path}",),
        "predict": (f"checkpoint={path}", f"images={digit}"),
    }
    said(run(f"mnist-{verb}", *given[verb]), str(path), *words)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95, 0.999])
def test_a_checkpoint_cut_short(run, tmp_path, trained, share):
    whole = (trained / "checkpoints" / "best.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: int(share * len(whole))])
    said(run("mnist-evaluate", "checkpoint=cut.ckpt"), "cut.ckpt", "not a whole checkpoint")


def test_a_checkpoint_with_one_wrong_byte(run, tmp_path, trained):
    content = bytearray((trained / "checkpoints" / "best.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "harmed.ckpt").write_bytes(content)
    said(run("mnist-evaluate", "checkpoint=harmed.ckpt"), "harmed.ckpt", "not a whole checkpoint", "checksum")


CHANGES = {
    "a newer format": (lambda about: about.update(format=99), ["format 99", "install a newer"]),
    "no format": (lambda about: about.pop("format"), ["format None"]),
    "a network that cannot be": (
        lambda about: about["architecture"]["blocks"][0].update(kernel=99),
        ["block 1", "kernel=99"],
    ),
    "a network of another size": (lambda about: about["architecture"]["blocks"][0].update(filters=11), ["do not fit"]),
    "an unknown key": (lambda about: about.update(_target_="os.system"), ["unknown key _target_"]),
    "other classes": (lambda about: about.update(classes=["a", "b"]), ["do not fit"]),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_checkpoint_that_describes_something_else(run, tmp_path, trained, kind):
    change, words = CHANGES[kind]
    content = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    change(content["mnist_cnn"])
    torch.save(content, tmp_path / "changed.ckpt")
    said(run("mnist-evaluate", "checkpoint=changed.ckpt"), "changed.ckpt", *words)


def test_evaluate_refuses_what_it_cannot_do(run, trained):
    said(run("mnist-evaluate"), "checkpoint is missing")
    said(run("mnist-evaluate", f"checkpoint={trained}", "split=train"), "split='train'", "'test' or 'validation'")
    said(run("mnist-evaluate", f"checkpoint={trained}", "probabilities=[3,360]"), "probabilities=[360]", "0 to 359")
    said(run("mnist-evaluate", f"checkpoint={trained}", "data=cifar"), "data=cifar", "digits")
    said(
        run("mnist-evaluate", f"checkpoint={trained}", "chekpoint=3"),
        "unknown key chekpoint",
        "did you mean checkpoint",
    )


def test_evaluate_says_where_there_is_no_validation_part(run):
    folder = run(*TRAIN, "data.validation=0").folder()
    said(run("mnist-evaluate", f"checkpoint={folder}", "split=validation"), "without validation digits")


def test_predict_refuses_what_is_no_picture(run, tmp_path, trained, digit):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "cut.png").write_bytes(digit.read_bytes()[:60])
    (tmp_path / "empty").mkdir()
    from PIL import Image

    Image.new("L", (20, 30)).save(tmp_path / "small.png")
    checkpoint = f"checkpoint={trained}"
    said(run("mnist-predict", checkpoint), "images is missing")
    said(run("mnist-predict", checkpoint, "images=none.png"), "none.png does not exist")
    said(run("mnist-predict", checkpoint, "images=empty"), "empty holds no picture")
    said(run("mnist-predict", checkpoint, "images=text.png"), "text.png is not a picture", status=1)
    said(run("mnist-predict", checkpoint, "images=cut.png"), "cut.png is not a picture", status=1)
    said(run("mnist-predict", checkpoint, "images=small.png"), "small.png", "blank", status=1)
    said(run("mnist-predict", checkpoint, "images=small.png", "mode=exact"), "small.png is 20×30", "28×28", status=1)


def test_a_run_whose_config_was_damaged_is_not_resumed(run, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("epochs: [")
    said(run("mnist-train", "resume=run"), "run is not a run's folder")


def test_the_disk_is_full(start):
    """RLIMIT_FSIZE stands for a full disk: a clear line and status 1, the work failed."""
    limits = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))"
    code = (
        f"{limits}; import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); import mnist_cnn.train as t; t.main()"
    )
    ended = outcome(start("-c", code, *TRAIN[1:]))
    assert ended.status == 1
    assert "Traceback" not in ended.err
    assert "error: " in ended.err


def test_every_yaml_explains_itself():
    for file in CONF.rglob("*.yaml"):
        assert file.read_text().strip(), file


def test_ctrl_c_while_the_command_line_is_read_ends_without_a_traceback(start):
    code = (
        "import argparse, os, signal, sys; from mnist_cnn.train import main; sys.argv = ['mnist-train', 'epochs=1']\n"
        "argparse._re.sub = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "argparse.ArgumentParser.format_usage = lambda parser: argparse._re.sub('', '', '')\n"
        "main()"
    )
    ended = outcome(start("-c", code))
    assert (ended.status, ended.err) == (-signal.SIGINT, "")
