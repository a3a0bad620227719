"""Every message that a user can cause: the command, its exit status, the words of its one line.

`SETTINGS` has those of mnist-train's settings, `TABLE` those of all commands.
"""

import json
import shlex
import shutil
import zipfile

import numpy as np
import pytest
import torch
import yaml
from conftest import CONF, outcome, said
from PIL import Image

QUICK = ("mnist-train", "data=digits", "epochs=1", "plots=false", "architecture=conv10")

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
    (["seed=1,2"], ["seed=1,2", "mnist-train -m"]),
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
    said(run(*QUICK, *words), *expected)
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("verb", ["train", "evaluate", "predict"])
def test_cuda_asked_for_and_absent(run, trained, digit, verb):
    words = {"train": QUICK[1:], "evaluate": (f"checkpoint={trained}",)}
    words["predict"] = (f"checkpoint={trained}", f"images={digit}")
    said(run(f"mnist-{verb}", *words[verb], "accelerator=cuda"), "accelerator=cuda", "no CUDA device")


def test_a_missing_logger_names_its_extra(run, monkeypatch):
    from pytorch_lightning.loggers import tensorboard

    def absent(*_, **__):
        raise ModuleNotFoundError("tensorboard")

    monkeypatch.setattr(tensorboard.TensorBoardLogger, "__init__", absent)
    said(run(*QUICK, "logger=tensorboard"), "logger=tensorboard", "pip install 'mnist-cnn[tensorboard]'")


# --- all commands --------------------------------------------------------------------------------------------

CONV = ("Conv2D", {"kernel_size": 3, "strides": 1, "filters": 1, "activation": "relu"}, (3, 3, 1, 1), (1,))
LINEAR = (CONV[0], {**CONV[1], "activation": "linear"}, *CONV[2:])
FLAT = ("Flatten", {})
OUT = ("Dense", {"units": 10, "activation": "softmax"}, (784, 10), (10,))
POOL = {"pool_size": 2, "strides": 2}


def keras_model(*layers, kind="Sequential"):
    """A .h5 file as Keras writes it, of (class, settings, shape of each weight...)."""

    def make(path, run_folder):
        h5py = pytest.importorskip("h5py")
        named = [
            (name, {"name": f"layer{i}", **settings}, shapes) for i, (name, settings, *shapes) in enumerate(layers)
        ]
        config = [{"class_name": name, "config": settings} for name, settings, _ in named]
        with h5py.File(path, "w") as file:
            file.attrs["model_config"] = json.dumps({"class_name": kind, "config": {"layers": config}})
            weights = file.create_group("model_weights")
            weights.attrs["layer_names"] = [settings["name"] for _, settings, _ in named]
            for _, settings, shapes in named:
                group = weights.create_group(settings["name"])
                group.attrs["weight_names"] = [f"w{number}" for number in range(len(shapes))]
                for number, shape in enumerate(shapes):
                    group[f"w{number}"] = np.zeros(shape, np.float32)

    return make


def foreign_onnx(path, run_folder):
    onnx = pytest.importorskip("onnx")
    values = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in "xyz"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "y"], ["z"])], "sum", values[:2], values[2:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8), path)


def zipped(config_size, compressed):
    def make(path, run_folder):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
            archive.writestr("config.json", b" " * config_size)
            archive.writestr("model.weights.h5", bytes(10**6 if compressed else 1))

    return make


def branching(path, run_folder):
    layers = [("Flatten", {}), ("Dense", {"units": 10})]
    keras_model(*layers, kind="Functional")(path, run_folder)
    import h5py

    with h5py.File(path, "r+") as file:
        model = json.loads(file.attrs["model_config"])
        model["config"]["layers"][1]["inbound_nodes"] = [[["other", 0, 0, {}]]]
        file.attrs["model_config"] = json.dumps(model)


def other_checkpoint(change):
    """The run's best checkpoint after `change`."""

    def make(path, run_folder):
        content = torch.load(run_folder / "checkpoints" / "best.ckpt", weights_only=True)
        change(content)
        torch.save(content, path)

    return make


def two_classes(content):
    content["mnist_cnn"]["classes"] = ["even", "odd"]
    for name in ("network.logits.weight", "network.logits.bias"):
        content["state_dict"][name] = content["state_dict"][name][:2].clone()


def weight(value):
    return other_checkpoint(lambda content: content["state_dict"].update({"network.logits.bias": value}))


def sparse_file(path, run_folder):
    with path.open("wb") as file:
        file.truncate(2**30 + 1)


def long_description(path, run_folder):
    torch.save({"state_dict": {}, "mnist_cnn": {"text": "x" * (2**24 + 1)}}, path)


def overlapping(path, run_folder):
    """A zip whose directory says that a record is larger than the file."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data/0", b"1234")
    content = path.read_bytes()
    path.write_bytes(content.replace((4).to_bytes(4, "little") * 2, (10**6).to_bytes(4, "little") * 2))


def compressed(path, run_folder):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data/0", bytes(1000))


def stopped_run(path, run_folder, **changes):
    """A run of 2 epochs without its metrics, as one that was interrupted leaves it."""

    shutil.copytree(run_folder, path)
    (path / "metrics.json").unlink()
    config = yaml.safe_load((path / "config.yaml").read_text())
    for key, value in changes.items():
        config[key] = value if not isinstance(value, dict) else {**config[key], **value}
    (path / "config.yaml").write_text(yaml.safe_dump(config))


def old_run(path, run_folder):
    stopped_run(path, run_folder, run={"versions": {"mnist-cnn": "0.1.0"}})


def swept(path, run_folder):
    """The folder of a sweep that was stopped before its first job."""
    path.mkdir()
    record = {"version": "0.2.0", "overrides": ["data=digits", "seed=1,2"], "hydra": [], "config_dir": None}
    (path / "sweep.yaml").write_text(yaml.safe_dump({**record, "working_folder": str(path.parent)}))


def old_sweep(path, run_folder):
    """The folder of such a sweep of a version before 0.2, which has Hydra's own record alone."""
    hydra = {"job": {"config_name": "train"}, "overrides": {"task": ["data=digits", "seed=1,2"], "hydra": []}}
    path.mkdir()
    (path / "multirun.yaml").write_text(yaml.safe_dump({"hydra": hydra}))


def array(value, **options):
    return lambda path, run_folder: np.save(path, value, **options)


def text(content):
    return lambda path, run_folder: path.write_text(content)


def idx(*header):
    return lambda path, run_folder: path.write_bytes(np.array(header, ">i4").tobytes() + bytes(9))


def data_folder(path, run_folder):
    raw = path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(b"short")


def kmnist_folder(path, run_folder):
    raw = path / "KMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(b"short")
    (raw / "train-images-idx3-ubyte.gz").write_bytes(b"no archive")


def large_npz(path, run_folder):
    """Its directory says that an array has 4 GiB."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("digits.npy", b"1234")
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 24 : at + 28] = (0xFFFFFFF0).to_bytes(4, "little")
    path.write_bytes(content)


def spaces(path, run_folder):
    """Search spaces of one line each, as own options of the group sweep."""
    (path / "experiment").mkdir(parents=True)
    (path / "experiment" / "mine.yaml").write_text("optimizer: {lr: 0.1}\n")
    (path / "experiment" / "chosen.yaml").write_text("defaults: [{override /optimizer: sgd}]\n")
    number = "{type: float, low: 0.1, high: 0.2}"
    lines = {
        "kind": "optimizer.lr: {type: flaot, low: 1, high: 2}",
        "word": "optimizer.lr: {type: float, lo: 1, high: 2}",
        "lacks": "optimizer.lr: {type: float, low: 1}",
        "range": "optimizer.lr: {type: float, low: 2, high: 1}",
        "logs": "optimizer.lr: {type: float, low: 0.0, high: 1, log: true}",
        "steps": "epochs: {type: int, low: 1, high: 10, step: 4}",
        "empty": "optimizer: {type: categorical, choices: []}",
        "key": f"optimiser.lr: {number}",
        "leaf": f"optimizer.lrr: {number}",
        "option": "optimizer: {type: categorical, choices: [adam, adan]}",
        "value": "epochs: {type: int, low: 0, high: 3}",
        "test": "test: {type: categorical, choices: [true]}",
        "both": f"{{architecture: {{type: categorical, choices: [mlp]}}, architecture.blocks.0.dropout: {number}}}",
        "star": f"optimizer.*.lr: {number}",
        "beyond": "architecture.blocks.7.filters: {type: int, low: 1, high: 2}",
        "held": "data.validation: {type: categorical, choices: [0.1, 0]}",
        "nothing": f"architecture.blocks.*.dropout: {number}",
    }
    (path / "sweep").mkdir(parents=True)
    for name, line in lines.items():
        (path / "sweep" / f"{name}.yaml").write_text(line + "\n")


def begun_study(path, run_folder):
    path.mkdir()
    (path / "study.yaml").write_text("{study: other, metric: val/accuracy, storage: null, retries: 3}\n")


# A word of a command that stands here is a file or folder made for it.
FILES = {
    "newer.ckpt": other_checkpoint(lambda content: content["mnist_cnn"].update(format=99)),
    "odd.ckpt": other_checkpoint(lambda content: content["mnist_cnn"]["architecture"].update(dense="x")),
    "two.ckpt": other_checkpoint(two_classes),
    "sparse.ckpt": weight(torch.zeros(10).to_sparse()),
    "double.ckpt": weight(torch.zeros(10).double()),
    "expanded.ckpt": weight(torch.zeros(1).expand(10)),
    "lacking.ckpt": other_checkpoint(lambda content: content["state_dict"].pop("network.logits.bias")),
    "long.ckpt": long_description,
    "overlapping.ckpt": overlapping,
    "compressed.ckpt": compressed,
    "compressed.pt": compressed,
    "huge.onnx": sparse_file,
    "foreign.safetensors": lambda path, _: __import__("safetensors.torch").torch.save_file({"a": torch.zeros(1)}, path),
    "damaged.safetensors": lambda path, _: __import__("safetensors.torch").torch.save_file(
        {"a": torch.zeros(1)}, path, metadata={"mnist_cnn": "{"}
    ),
    "bytes.onnx": text("hello"),
    "bytes.safetensors": text("hello"),
    "text.png": text("hello"),
    "wide.png": lambda path, _: Image.new("1", (70_000, 1000)).save(path),
    "small.png": lambda path, _: Image.new("L", (20, 30)).save(path),
    "noise.png": lambda path, _: Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (40, 40)).astype(np.uint8)
    ).save(path),
    "cut.jpg": lambda path, _: path.write_bytes(b"\xff\xd8\xff\xe0\0\x10JFIF\0"),
    "empty": lambda path, _: path.mkdir(),
    "binary.txt": lambda path, _: path.write_bytes(b"\xff\xfea\0"),
    "five.npy": array(np.zeros((1, 2, 3, 4, 5))),
    "line.npy": array(np.zeros((2, 0, 28), np.uint8)),
    "words.npy": array(np.array([["a", "b"]])),
    "nan.npy": array(np.full((28, 28), np.nan)),
    "six.npy": array(np.zeros((1, 2, 28, 6))),
    "float.npy": array(np.zeros((28, 28))),
    "objects.npy": array(np.array([[{}]]), allow_pickle=True),
    "huge.npz": large_npz,
    "other-idx3-ubyte": idx(0x801, 1, 3, 3),
    "short-idx3-ubyte": idx(0x803, 2, 3, 3),
    "data": data_folder,
    "kdata": kmnist_folder,
    "spaces": spaces,
    "begun": begun_study,
    "stopped": stopped_run,
    "swept": swept,
    "old": old_run,
    "old_sweep": old_sweep,
    "edited": lambda path, run: stopped_run(path, run, seed=5),
    "scheduled": lambda path, run: stopped_run(path, run, schedule={"length": "T_max"}),
    "weights.h5": keras_model(("Flatten", {}), ("Dense", OUT[1], (3, 10), (10,))),
    "kind.h5": keras_model(kind="Other"),
    "branching.h5": branching,
    "swelling.keras": zipped(2, compressed=True),
    "large.keras": zipped(2**26, compressed=False),
    "bad.keras": text("hello"),
    "lambda.h5": keras_model(("Lambda", {})),
    "after.h5": keras_model(FLAT, OUT, ("Dropout", {"rate": 0.5})),
    "first.h5": keras_model(("Conv2D", {**CONV[1], "data_format": "channels_first"})),
    "weights_only.h5": lambda path, _: pytest.importorskip("h5py").File(path, "w").close(),
    "model.keras": text("hello"),
    "model.pt": lambda path, _: torch.save(torch.nn.Linear(2, 2), path),
    "list.pt": lambda path, _: torch.save([1], path),
    "small.pt": lambda path, _: torch.save(torch.nn.Linear(2, 2).state_dict(), path),
    "odd.pt": lambda path, _: torch.save(
        torch.nn.Sequential(torch.nn.Linear(784, 512), torch.nn.Linear(512, 9)).state_dict(), path
    ),
    "foreign.onnx": foreign_onnx,
    "oblong.h5": keras_model(("Conv2D", {**CONV[1], "kernel_size": [3, 5]})),
    "input.h5": keras_model(("InputLayer", {"batch_shape": [None, 32, 32, 3]})),
    "reshape.h5": keras_model(CONV, ("Reshape", {})),
    "rescaling.h5": keras_model(("Rescaling", {"scale": [1, 2], "offset": 0})),
    "conv.h5": keras_model(FLAT, CONV),
    "norm.h5": keras_model(("BatchNormalization", {})),
    "pool.h5": keras_model(("MaxPooling2D", POOL)),
    "strides.h5": keras_model(CONV, ("MaxPooling2D", {**POOL, "strides": 1})),
    "dropout.h5": keras_model(("Dropout", {"rate": 0.5})),
    "dense.h5": keras_model(CONV, OUT),
    "elu.h5": keras_model(("Conv2D", {**CONV[1], "activation": "elu"})),
    "linear.h5": keras_model(LINEAR, FLAT),
    "activation.h5": keras_model(("Activation", {"activation": "tanh"})),
    "endless.h5": keras_model(FLAT),
    "lastdrop.h5": keras_model(
        FLAT, ("Dense", {"units": 5, "activation": "relu"}, (784, 5), (5,)), ("Dropout", {"rate": 0.5}), FLAT
    ),
}
EVALUATE, PREDICT, EXPORT = "mnist-evaluate checkpoint=", "mnist-predict checkpoint=", "mnist-export checkpoint="
IMAGES, KERAS = "mnist-predict checkpoint=RUN images=", "mnist-import output=x.ckpt keras="
TORCH = "mnist-import output=x.ckpt architecture=mlp torch="
TRAIN = "mnist-train data=digits epochs=1 plots=false architecture=conv10 "
SWEEP, OWN = "mnist-sweep sweep=learning_rate data=digits", "mnist-sweep --config-dir spaces data=digits sweep="
TABLE = [
    # words of other packages, and what a shell has taken apart
    (f"{TRAIN} accelerator=gpu", 2, ["accelerator=cuda: torch finds no CUDA device"]),
    (f"{TRAIN} accelerator=mps", 2, ["accelerator=mps: torch finds no Apple GPU"]),
    (f"{TRAIN} lr=0.1", 2, ["unknown key lr; did you mean optimizer.lr?"]),
    (f"{TRAIN} learning_rate=0.1", 2, ["did you mean optimizer.lr?"]),
    (f"{TRAIN} dropout=0.5", 2, ["did you mean architecture.dense=[{units:64,dropout:0.5}]?"]),
    (f"{TRAIN} batch_size=8", 2, ["did you mean data.batch_size?"]),
    (f"{TRAIN} device=cuda", 2, ["did you mean accelerator?"]),
    (f"{TRAIN} optimizer=Adam", 2, ["did you mean adam?"]),
    (f"{TRAIN} model=conv10", 2, ["did you mean architecture?"]),
    (f"{TRAIN} dataset=mnist", 2, ["did you mean data?"]),
    (f"{TRAIN} max_epochs=3", 2, ["did you mean epochs?"]),
    (f"{TRAIN} optimizer.Learning-Rate=3", 2, ["did you mean optimizer.lr?"]),
    (f"{TRAIN} optimizer=ADAMW", 2, ["did you mean adamw?"]),
    (f"{TRAIN} activation=relu", 2, ["did you mean architecture.activation?"]),
    (f"{TRAIN} arch=conv10", 2, ["did you mean architecture?"]),
    (f"{TRAIN} callbacks={{x:1}}", 2, ["callbacks=… names one of a group's files", "write +callbacks=…"]),
    (f"{TRAIN} num_workers=4", 2, ["unknown key num_workers; mnist-train --help lists them"]),
    (f"{TRAIN} checkpoint=RUN", 2, ["start from it by initialize=, or continue its run by resume="]),
    (f"{PREDICT}RUN model=x", 2, ["unknown key model; did you mean checkpoint?"]),
    (f"{EVALUATE}RUN batch_size=8", 2, ["unknown key batch_size; mnist-evaluate --help lists them"]),
    (f"{TRAIN} logger=[csv,tensorbord]", 2, ["logger=tensorbord: no such option; did you mean tensorboard?"]),
    (f"{TRAIN} callbacks.early_stopping.patience=3", 2, ["it comes with callbacks=early_stopping: give that as well"]),
    (f"{TRAIN} architecture.blocks.0.dropout=0.5", 2, ["add it by +architecture.blocks.0.dropout=…"]),
    (f"{TRAIN} architecture.blocks.0.filter=3", 2, ["unknown key architecture.blocks.0.filter; did you mean filters?"]),
    (f"{TRAIN} architecture.blocks.filters=3", 2, ["a list's items have numbers"]),
    (f"{TRAIN} 'architecture.dense={{units:64}}'", 2, ["put brackets around it, as in architecture.dense=[{…}]"]),
    (f"{TRAIN} architecture.dense=units:64 architecture.dense=dropout:0.5", 2, ["single quotes"]),
    (f"{TRAIN} epochs = 3", 2, ["epochs: expected key=value, without spaces, as in epochs=3"]),
    (f"{TRAIN} accelerator.devices=4 data.batch_size=3", 2, ["data.batch_size=3", "must be 4 at least"]),
    (f"{TRAIN} freeze=blocks", 2, ["give initialize=FOLDER"]),
    ("mnist-predict photo.jpg", 2, ["photo.jpg: expected key=value; did you mean images=photo.jpg?"]),
    ("mnist-predict images = photo.jpg", 2, ["images: expected key=value, without spaces"]),
    (f"{TRAIN} -m seed=1, 2", 2, ["seed=1,: the shell has taken it apart"]),
    (f"{TRAIN} -m seed=1 seed=2", 2, ["seed is given 2 times: the values of a sweep stand together"]),
    ("mnist-train --config-dir spaces experiment=chosen", 2, ["must be: # @package _global_"]),
    ("mnist-train experiment=mine/own.yaml", 2, ["your own file is an option by --config-dir FOLDER"]),
    (f"{TRAIN} hydra.run.dir=text.png", 2, ["text.png cannot be written (File exists)", "hydra.run.dir=FOLDER"]),
    (f"{IMAGES}text.png grid=/dev/null/x.png", 2, ["/dev/null/x.png cannot be written"]),
    (f"{EXPORT}RUN output=/dev/null/x.onnx", 2, ["/dev/null/x.onnx cannot be written"]),
    (f"{IMAGES}七.png", 2, ["七.png does not exist: give a picture"]),
    (f"{TRAIN} trainer.zzz=1", 2, ["unknown key trainer.zzz; trainer has ", "gradient_clip_val", "max_time"]),
    (f"{TRAIN} hparams_search=mnist", 2, ["searches are mnist-sweep's"]),
    (f"{TRAIN} hydra/sweeper=optuna", 2, ["hydra/sweeper/optuna: no such sweeper: searches are mnist-sweep's"]),
    (f"{TRAIN} architecture.blocks=[filters:3] architecture.blocks=[kernel:3]", 2, ["single quotes"]),
    (f"{TRAIN} architecture.blocks=[{{filters:", 2, ["single quotes"]),
    ("mnist-train architecture=mlp architecture.blocks.0.filters=3", 2, ["architecture.blocks has no item 0"]),
    ("mnist-train --config-dir spaces experiment=mine", 2, ["must be: # @package _global_"]),
    (f"{TRAIN} hydra.run.dir=/dev/null/run", 2, ["/dev/null/run cannot be written", "hydra.run.dir=FOLDER"]),
    (f"{EVALUATE}latest", 2, ["checkpoint=latest: there is no finished run"]),
    # mnist-train
    (f"{TRAIN} augmentation.rotation=200", 2, ["augmentation.rotation=200: must be less than or equal to 180"]),
    (f"{TRAIN} augmentation.scale=1", 2, ["augmentation.scale=1: must be less than 1"]),
    (f"{TRAIN} augmentation.shear=-3", 2, ["augmentation.shear=-3: must be greater than or equal to 0"]),
    (f"{TRAIN} augmentation.shift=nan", 2, ["augmentation.shift=nan: must be a finite number"]),
    (f"{TRAIN} +epochs=3", 2, ["+epochs adds a key that is there already; set it with epochs="]),
    (f"{TRAIN} augmentation=afine", 2, ["augmentation=afine: no such option; did you mean affine?"]),
    (f"{TRAIN} augmentation.rotate=3", 2, ["unknown key augmentation.rotate; did you mean augmentation.rotation?"]),
    (f"{TRAIN} label_smoothing=1", 2, ["label_smoothing=1: must be less than 1"]),
    (f"{TRAIN} ema_decay=1.0", 2, ["ema_decay=1.0: must be less than 1"]),
    (f"{TRAIN} tta=3", 2, ["tta=3: must be 1, 5 or 9"]),
    (f"{EVALUATE}RUN tta=2", 2, ["tta=2: must be 1, 5 or 9"]),
    (f"{IMAGES}text.png tta=many", 2, ["tta='many': must be 1, 5 or 9"]),
    (f"{TRAIN} optimizer=muon optimizer.lr_rest=0", 2, ["Muon refuses", "lr_rest must be greater than 0"]),
    (f"{TRAIN} optimizer=muon optimizer.momentum=1", 2, ["momentum and both betas must be from 0 to below 1"]),
    (f"{TRAIN} optimizer=muon optimizer.ns_steps=2.5", 2, ["ns_steps must be a whole number from 1 to 99"]),
    (f"{TRAIN} optimizer=muon +optimizer.lr_bias=1", 2, ["unknown key optimizer.lr_bias for Muon; did you mean lr"]),
    (f"{TRAIN} schedule=linear schedule.scheduler.warmup=3", 2, ["warmup and final must be fractions from 0 to 1"]),
    (f"{TRAIN} initialize=RUN architecture=mlp", 2, ["is not the architecture of initialize=", "leave it out"]),
    (f"{TRAIN} -m resume=stopped,edited", 2, ["resume continues one run: leave out -m"]),
    (
        f"{TRAIN} -m seed=1,2 hydra.sweep.subdir=x",
        2,
        ["is the folder of jobs 0 and 1 alike; let it contain ${hydra.job"],
    ),
    (f"{TRAIN} -m seed=1,3 hydra.sweep.dir=swept", 2, ["is another sweep's folder: it has", "seed=1,2, not seed=1,3"]),
    ("mnist-train multirun.resume=swept seed=4", 2, ["is another sweep's folder: it has seed=1,2, not seed=4"]),
    ("mnist-train -m multirun.resume=swept hydra.sweep.dir=x", 2, ["names the sweep's folder: leave out hydra.sweep"]),
    ("mnist-train -m multirun.resume=empty", 2, ["is not a sweep's folder: it has no sweep.yaml of mnist-train"]),
    ("mnist-train -m multirun.resume=", 2, ["multirun.resume is empty: name a sweep's folder"]),
    (f"{TRAIN} multirun={{resume:x}}", 2, ["multirun.resume=x: continues a sweep on mnist-train's command line only"]),
    ("mnist-train resume=empty", 2, ["is not a run's folder: it has no config.yaml of mnist-train"]),
    ("mnist-train resume=stopped seed=9", 2, ["the run has seed=1, not 9", "leave that out or start a new run"]),
    ("mnist-train resume=stopped epochs=1", 2, ["epochs may only grow"]),
    ("mnist-train resume=scheduled epochs=9", 2, ["epochs cannot grow, as the run's schedule ends with epoch 3"]),
    ("mnist-train resume=edited", 2, ["was changed: its seed is not that of"]),
    (f"{TRAIN} hydra.run.dir=stopped", 2, ["is another run's folder: choose another, or continue that run by resume="]),
    (f"{TRAIN} optimizer=sgd optimizer.lr=1e30", 1, ["the loss of", "is not finite", "try a smaller optimizer.lr"]),
    (
        "mnist-train data.root=/dev/null/data",
        2,
        ["/dev/null/data cannot be written", "set data.root or MNIST_CNN_DATA"],
    ),
    ("mnist-train data.root=data", 2, ["is not the published file", "it has 5 bytes", "could not be downloaded"]),
    ("mnist-train data=kmnist data.root=kdata", 2, ["are not the published files", "could not be downloaded"]),
    (
        "mnist-train data.root=empty",
        2,
        ["train-images-idx3-ubyte cannot be read", "could not be downloaded", "Put the"],
    ),
    (f"{TRAIN} optimizer.betas=[0.9,nan]", 2, ["optimizer", "betas.1=nan: must be a finite number"]),
    (f"{TRAIN} optimizer._target_=torch.optim.Adan", 2, ["optimizer: torch.optim.Adan cannot be made"]),
    (f"{TRAIN} architecture.dense=[x]", 2, ["'x' must be a number of units such as 128, or {units:128,dropout:0.5}"]),
    (
        f"{TRAIN} architecture.blocks=3",
        2,
        ["architecture.blocks=3: must be a list such as [{filters:32,kernel:3,pool:2}]"],
    ),
    (
        f"{TRAIN} architecture.blocks=[{{filters:8,kernel:20}},{{filters:8,kernel:20}}]",
        2,
        ["architecture block 2, whose input is 9×9×8: kernel 20 is larger than its input of 9×9"],
    ),
    (f"{TRAIN} architecture.blocks=[{{filters:8,kernel:20,pool:10}}]", 2, ["pool 10 is larger than its input of 9×9"]),
    (
        f"{TRAIN} architecture.dense=[65536,65536]",
        2,
        ["architecture has 4,", "parameters; at most 100,000,000 are allowed"],
    ),
    (f"{TRAIN} accelerator=cpu accelerator.precision=16-mixed", 2, ["accelerator.precision=16-mixed needs CUDA"]),
    (f"{TRAIN} accelerator.devices=0", 2, ["accelerator.devices=0: must be greater than or equal to 1"]),
    (f"{TRAIN} accelerator.num_nodes=2", 2, ["give accelerator.rendezvous=HOST:PORT as well"]),
    (f"{TRAIN} trainer.max_epochs=3", 2, ["trainer.max_epochs is set by the run itself; use epochs"]),
    (f"{TRAIN} trainer.devices=2", 2, ["trainer.devices is set by the run itself; use accelerator.devices"]),
    (f"{TRAIN} trainer.precision=bf16-mixed", 2, ["trainer.precision is set by the run itself; use accelerator."]),
    (f"{TRAIN} trainer.barebones=true", 2, ["trainer.barebones is set by the run itself; use trainer.fast_dev_run"]),
    (f"{TRAIN} trainer.enable_progress_bar=false", 2, ["is set by the run itself; a bar is drawn on a terminal only"]),
    (f"{TRAIN} trainer.gradient_clip=1", 2, ["unknown key trainer.gradient_clip; did you mean trainer.gradient_clip"]),
    (f"{TRAIN} callbacks=early_stoping", 2, ["callbacks=early_stoping: no such option; did you mean early_stopping"]),
    ("mnist-train resume=old", 2, ["old was written by mnist-cnn 0.1.0, and version 0.2.0 cannot continue it"]),
    (f"{TRAIN} -m seed=1,2 hydra.sweep.dir=old_sweep", 2, ["old_sweep", "was written by mnist-cnn 0.1.0"]),
    (
        "mnist-train multirun.resume=old_sweep",
        2,
        ["old_sweep was written by mnist-cnn 0.1.0, and version 0.2.0"],
    ),
    (f"{PREDICT}RUN images=text.png accelerator.devices=2", 2, ["accelerator.devices=2: must be 1"]),
    (f"{EVALUATE}RUN accelerator.precision=bf16-mixed", 2, ["accelerator.precision='bf16-mixed': must be '32-true'"]),
    # mnist-sweep
    (f"{OWN}kind", 2, ["type='flaot': must be float, int or categorical", "did you mean float?", "as in {type: float"]),
    (f"{OWN}word", 2, ["optimizer.lr", "unknown key lo; did you mean low?"]),
    (f"{OWN}lacks", 2, ["optimizer.lr", "high is missing"]),
    (f"{OWN}range", 2, ["sweep=range: optimizer.lr: low <= high must hold, but got (low=2, high=1)"]),
    (f"{OWN}logs", 2, ["optimizer.lr: low > 0 must hold for log=True"]),
    (f"{OWN}steps", 2, ["epochs: The distribution is specified by [1, 10] and step=4", "not divisible"]),
    (f"{OWN}empty", 2, ["optimizer.choices is empty"]),
    (f"{OWN}key", 2, ["sweep=key: unknown key optimiser.lr; did you mean optimizer?"]),
    (f"{OWN}leaf", 2, ["sweep=leaf: unknown key optimizer.lrr; did you mean optimizer.lr?"]),
    (f"{OWN}option", 2, ["sweep=option: optimizer=adan: no such option; did you mean adam?"]),
    (f"{OWN}value", 2, ["sweep=value: epochs=0: must be greater than or equal to 1"]),
    (f"{OWN}test", 2, ["test is no part of a search: leave it out of the space"]),
    (f"{OWN}both", 2, ["where architecture is searched, its parts cannot be"]),
    (f"{OWN}star", 2, ["optimizer.*.lr: optimizer is no list"]),
    (f"{OWN}beyond", 2, ["sweep=beyond", "architecture.blocks.7.filters"]),
    (f"{OWN}held", 2, ["data.validation=0: a search needs digits held out; give data.validation=0.1"]),
    (f"{OWN}nothing architecture=mlp", 2, ["nothing to search: the network has no part that"]),
    (f"{SWEEP} optimizer.lr=0.1", 2, ["optimizer.lr is searched: leave it out of the command, or out of the space"]),
    (f"{SWEEP} experiment=conv10", 2, ["data.validation=0: a search needs digits held out"]),
    (f"{SWEEP} test=true", 2, ["a trial never scores the test set; mnist-sweep retrain=FOLDER does"]),
    (
        f"{SWEEP} accelerator.devices=2",
        2,
        ["accelerator.devices=2: a trial has one device; workers=N trains N at once"],
    ),
    (f"{SWEEP} resume=stopped", 2, ["resume continues one run: the same mnist-sweep command again continues a study"]),
    (f"{SWEEP} metric=test/accuracy", 2, ["metric='test/accuracy': must be 'val/accuracy' or 'val/loss'"]),
    (f"{SWEEP} trial=3", 2, ["unknown key trial; did you mean trials?"]),
    (f"{SWEEP} workers=0", 2, ["workers=0: must be greater than or equal to 1"]),
    (f"{SWEEP} report=begun", 2, ["sweep and report exclude each other: give one of them"]),
    (f"{SWEEP} -m", 2, ["mnist-sweep is a sweep itself: leave out -m, or use mnist-train -m"]),
    (f"{SWEEP} storage=redis://h", 2, ["storage: must be such as postgresql://user@host/database"]),
    (f"{SWEEP} storage=mysql://u:secret@h/d", 2, ["storage=mysql://u@h/d needs a driver", "mnist-cnn[mysql]"]),
    (f"{SWEEP} sampler._target_=optuna.samplers.Grid", 2, ["sampler: optuna.samplers.Grid cannot be made"]),
    (f"{SWEEP} pruner._target_=optuna.samplers.TPESampler", 2, ["is none of optuna.pruners"]),
    (f"{SWEEP} folder=begun", 2, ["begun is the folder of the study other: choose another"]),
    (f"{SWEEP} folder=stopped", 2, ["stopped is another run's folder"]),
    ("mnist-sweep data=digits", 2, ["sweep is missing: give sweep=learning_rate, recipe, width or your own"]),
    ("mnist-sweep sweep=widht", 2, ["sweep=widht: no such option; did you mean width?"]),
    ("mnist-sweep report=empty", 2, ["empty is not a study's folder: it has no study.yaml of mnist-sweep"]),
    ("mnist-sweep retrain=begun", 2, ["study.db is not there"]),
    # checkpoints
    (f"{EVALUATE}newer.ckpt", 2, ["has format 99", "this version reads formats 1 to", "install a newer one"]),
    (f"{EVALUATE}odd.ckpt", 2, ["describes no network that can be built"]),
    (f"{EVALUATE}https://example.org/best.ckpt", 2, ["is an address: nothing is fetched"]),
    (f"{EVALUATE}none.ckpt", 2, ["does not exist: give a .ckpt file or a run's folder"]),
    (f"{EVALUATE}empty", 2, ["has no checkpoints/best.ckpt: give a run's folder or a .ckpt file"]),
    (f"{EVALUATE}[]", 2, ["checkpoint is empty"]),
    (f"{EVALUATE}text.png", 2, ["is not a whole checkpoint of this package and was not loaded"]),
    (f"{EVALUATE}compressed.ckpt", 2, ["it is compressed, as torch never writes it"]),
    (f"{EVALUATE}overlapping.ckpt", 2, ["its records are larger than the file"]),
    (f"{EVALUATE}long.ckpt", 2, ["its description is too large"]),
    (f"{EVALUATE}lacking.ckpt", 2, ["do not fit the network that it describes", "logits.bias is missing or too many"]),
    (f"{EVALUATE}sparse.ckpt", 2, ["logits.bias is no plain tensor"]),
    (f"{EVALUATE}double.ckpt", 2, ["logits.bias is torch.float64 (10,), expected torch.float32 (10,)"]),
    (f"{EVALUATE}expanded.ckpt", 2, ["logits.bias has less data than its shape says"]),
    (f"{EVALUATE}two.ckpt", 2, ["digits has 10 classes, the checkpoint 2"]),
    (f"{EVALUATE}[RUN,two.ckpt]", 2, ["has other classes than", "they cannot predict together"]),
    (f"{EVALUATE}huge.onnx", 2, ["is larger than 536,870,912 bytes and was not loaded"]),
    (f"{EVALUATE}bytes.onnx", 2, ["is not an ONNX file of mnist-export"]),
    (f"{EVALUATE}bytes.safetensors", 2, ["is not a whole safetensors file"]),
    (
        f"{EVALUATE}foreign.safetensors",
        2,
        ["comes from another program: it has no description of an mnist_cnn network"],
    ),
    (f"{EVALUATE}damaged.safetensors", 2, ["has a damaged description"]),
    # mnist-evaluate, mnist-export
    (f"{EVALUATE}RUN split=train", 2, ["split='train'", "'test' or 'validation'"]),
    (f"{EVALUATE}RUN corruptions=mnistc", 2, ["corruptions='mnistc'", "'mnist_c'"]),
    (f"{EVALUATE}RUN data=cifar", 2, ["data=cifar", "digits"]),
    (f"{EVALUATE}RUN chekpoint=3", 2, ["unknown key chekpoint", "did you mean checkpoint"]),
    ("mnist-evaluate", 2, ["checkpoint is missing"]),
    (f"{EVALUATE}RUN calibrate=true", 2, ["calibrate=true fits on the digits held out: give split=validation"]),
    (f"{EVALUATE}[RUN,RUN] calibrate=true split=validation", 2, ["calibrate=true writes into one checkpoint"]),
    (f"{EVALUATE}RUN probabilities=[360]", 2, ["probabilities=[360]: test has digits 0 to 359"]),
    (f"{EXPORT}RUN output=x.pt2 format=onnx", 2, ["output=x.pt2: must end in .onnx for format=onnx"]),
    (f"{EXPORT}RUN output=x.pb", 2, ["output=x.pb: must end in .onnx or .pt2 or .safetensors"]),
    # mnist-predict
    (f"{PREDICT}RUN", 2, ["images is missing"]),
    (f"{IMAGES}text.png output=x.txt", 2, ["output=x.txt: must end in .csv or .json or .jsonl or .parquet"]),
    (f"{IMAGES}text.png input=bytes", 2, ["input=bytes reads one picture from standard input: give images=-"]),
    (f"{IMAGES}none.png", 2, ["does not exist: give a picture, a folder of pictures, a glob or @list.txt"]),
    (f"{IMAGES}'none*.png'", 2, ["matches no file"]),
    (f"{IMAGES}empty", 2, ["holds no picture: expected files such as *.png"]),
    (f"{IMAGES}@binary.txt", 2, ["cannot be read as a list of paths"]),
    (f"{IMAGES}text.png", 1, ["is not a picture that can be read (expected PNG, JPEG"]),
    (f"{IMAGES}cut.jpg", 1, ["is not a picture that can be read ("]),
    (f"{IMAGES}wide.png", 1, ["70000×1000 pixels; at most 65,000,000 are read"]),
    (f"{IMAGES}small.png", 1, ["there is no digit in it: the picture is blank"]),
    (f"{IMAGES}noise.png", 1, ["there is no digit in it: only noise or many things"]),
    (f"{IMAGES}small.png mode=exact", 1, ["is 20×30: mode=exact expects 28×28 in MNIST's form"]),
    (f"{IMAGES}float.npy mode=exact", 1, ["is float64 (28, 28): mode=exact expects uint8 (28, 28)"]),
    (f"{IMAGES}five.npy", 2, ["has shape (1, 2, 3, 4, 5): expected (H, W), (N, H, W) or (N, 1, 28, 28)"]),
    (f"{IMAGES}six.npy", 1, ["an array of shape (2, 28, 6) is no picture: expected (H, W), (H, W, 3) or (H, W, 4)"]),
    (f"{IMAGES}words.npy", 1, ["an array of <U1 is no picture: expected numbers"]),
    (f"{IMAGES}nan.npy", 1, ["a picture with pixels that are NaN or infinite"]),
    (f"{IMAGES}objects.npy", 2, ["holds no array that can be read"]),
    (f"{IMAGES}huge.npz", 2, ["an array of more than"]),
    (f"{IMAGES}other-idx3-ubyte", 2, ["not an idx file of uint8 images"]),
    (f"{IMAGES}short-idx3-ubyte", 2, ["it is shorter than images of (2, 3, 3) are"]),
    # mnist-import
    (f"{KERAS}none.h5", 2, ["does not exist: give a .h5 or .keras file"]),
    (f"{KERAS}bad.keras", 2, ["is not a whole Keras model with its architecture"]),
    (f"{KERAS}swelling.keras", 2, ["it is compressed beyond what weights can be"]),
    (f"{KERAS}large.keras", 2, ["its records are larger than any network of this package"]),
    (f"{KERAS}kind.h5", 2, ["a 'Other' model: expected Sequential, or Functional in one line"]),
    (f"{KERAS}branching.h5", 2, ["does not follow the layer before it alone"]),
    (f"{KERAS}weights.h5", 2, ["layer layer1 has weights of [(3, 10), (10,)], expected [(784, 10), (10,)]"]),
    (f"{KERAS}lambda.h5", 2, ["layer layer0 is a Lambda, which ConvNet cannot express; it was not run"]),
    (f"{KERAS}after.h5", 2, ["layer layer2 (Dropout) stands after the output, which ConvNet cannot express"]),
    (f"{KERAS}first.h5", 2, ["has data_format channels_first"]),
    (f"{KERAS}oblong.h5", 2, ["has kernel_size=[3, 5]"]),
    (f"{KERAS}input.h5", 2, ["has the shape [None, 32, 32, 3]"]),
    (f"{KERAS}reshape.h5", 2, ["stands after the first layer"]),
    (f"{KERAS}rescaling.h5", 2, ["is no single scale and offset before the first layer"]),
    (f"{KERAS}conv.h5", 2, ["stands after Flatten"]),
    (f"{KERAS}norm.h5", 2, ["does not follow a convolution, its activation or its pooling"]),
    (f"{KERAS}weights_only.h5", 2, ["it holds weights only; save the network with them"]),
    (f"{EVALUATE}model.keras", 2, ["model.keras is Keras's: mnist-import keras=model.keras output="]),
    (f"{EVALUATE}foreign.onnx", 2, ["foreign.onnx is not an ONNX file of mnist-export (it does not take digits alone"]),
    (f"{EVALUATE}small.pt", 2, ["comes from another program", "mnist-import torch=FILE.pt"]),
    ("mnist-import output=x.ckpt", 2, ["give keras=FILE or torch=FILE, one of the two"]),
    (f"{KERAS}a.h5 torch=a.pt", 2, ["give keras=FILE or torch=FILE, one of the two"]),
    (f"{KERAS}a.h5 std=1", 2, ["std goes with torch= alone"]),
    (f"{TORCH}none.pt", 2, ["torch=none.pt does not exist"]),
    (f"{TORCH}model.pt", 2, ["model.pt is not a whole state_dict, as torch.save(model.state_dict(), ...) writes it"]),
    (f"{TORCH}list.pt", 2, ["list.pt has list; the architecture has 4 weights: dense.0.0.weight, dense.0.0.bias"]),
    (f"{TORCH}small.pt", 2, ["small.pt has weight, bias; the architecture has 4 weights"]),
    (f"{TORCH}odd.pt", 2, ["odd.pt: its weights do not fit", "logits.weight", "(9, 512), expected", "(10, 512)"]),
    (f"{TORCH}compressed.pt", 2, ["it is compressed, as torch never writes it"]),
    (f"{TORCH}odd.pt divide_by_255=true", 2, ["divide_by_255 goes with keras= alone"]),
    ("mnist-import torch=odd.pt output=x.ckpt", 2, ["holds weights only: give architecture=pytorch_example"]),
    (f"{KERAS}pool.h5", 2, ["does not follow a convolution"]),
    (f"{KERAS}strides.h5", 2, ["has strides that are not its pool_size"]),
    (f"{KERAS}dropout.h5", 2, ["does not follow a block or a dense layer"]),
    (f"{KERAS}dense.h5", 2, ["stands before Flatten"]),
    (f"{KERAS}elu.h5", 2, ["has activation 'elu'"]),
    (f"{KERAS}linear.h5", 2, ["follows a layer without an activation"]),
    (f"{KERAS}activation.h5", 2, ["is 'tanh' there"]),
    (f"{KERAS}endless.h5", 2, ["the model does not end in a Dense layer of softmax or without an activation"]),
]


@pytest.mark.parametrize(("line", "status", "expected"), TABLE, ids=[line for line, _, _ in TABLE])
def test_a_message(run, tmp_path, trained, monkeypatch, line, status, expected):
    import torchvision

    for dataset in (torchvision.datasets.MNIST, torchvision.datasets.KMNIST):
        monkeypatch.setattr(dataset, "mirrors", ["http://127.0.0.1:9/"])
    for name, make in FILES.items():
        if (
            name
            in line.replace("=", " ").replace("@", " ").replace(",", " ").replace("]", " ").replace("[", " ").split()
        ):
            make(tmp_path / name, trained)
    said(run(*shlex.split(line.replace("RUN", str(trained)))), *expected, status=status)


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


def test_a_checkpoint_with_one_wrong_byte(run, tmp_path, trained):
    content = bytearray((trained / "checkpoints" / "best.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "harmed.ckpt").write_bytes(content)
    said(run("mnist-evaluate", "checkpoint=harmed.ckpt"), "harmed.ckpt", "not a whole checkpoint", "checksum")


def test_evaluate_says_where_there_is_no_validation_part(run):
    folder = run(*QUICK, "data.validation=0").folder()
    said(run("mnist-evaluate", f"checkpoint={folder}", "split=validation"), "without validation digits")


def test_the_disk_is_full(start):
    """RLIMIT_FSIZE stands for a full disk: a clear line and status 1, the work failed."""
    limits = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))"
    code = (
        f"{limits}; import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); import mnist_cnn.train as t; t.main()"
    )
    ended = outcome(start("-c", code, *QUICK[1:]))
    assert ended.status == 1
    assert "Traceback" not in ended.err
    assert "error: " in ended.err


def test_every_yaml_explains_itself():
    for file in CONF.rglob("*.yaml"):
        assert file.read_text().strip(), file
