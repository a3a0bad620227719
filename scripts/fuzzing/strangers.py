"""Mutated folders of runs, lists of pictures, .npz files, ONNX and Keras models: each must be taken, or refused."""

import importlib
import io
import json
import os
import tempfile
from contextlib import suppress
from copy import deepcopy
from functools import cache
from itertools import islice
from pathlib import Path

import h5py
import hypothesis.strategies as st
import numpy as np
import onnx
import yaml

from fuzzing.files import checkpoint_content, mutated, mutations, repacked, replaced
from fuzzing.outcome import DIGITS, refusal_allowed
from mnist_cnn.config.settings import Train
from mnist_cnn.inference.classifier import load_classifier
from mnist_cnn.models.keras_file import read_keras
from mnist_cnn.pictures.digit_image import readings
from mnist_cnn.pictures.image_files import find_pictures
from mnist_cnn.runs.folder import read_metrics, read_run
from mnist_cnn.runs.hydra_app import plain_job
from mnist_cnn.runs.strangers import require_known, require_plain
from mnist_cnn.runs.sweep_folder import read_record
from mnist_cnn.search.study import read_study_file
from mnist_cnn.train import composed_of

VALUES = [None, True, 0, -1, 1e308, "", "os.system", "torch.optim.SGD", "${oc.env:HOME}", [], {}, [[]], ["x"]]
VALUES += [{"_target_": "os.system"}, {"_target_": ["x"]}, {"_target_": None, "x": {}}]
values = st.sampled_from(VALUES)


@cache
def contents():
    """The default configuration, and the four kinds of files that are read from a folder."""
    settings = Train.model_validate(plain_job(composed_of(["data=digits"])))
    run = {"versions": {"mnist-cnn": "0.2.0"}, "choices": {"data": "digits"}}
    sweep = {"version": "0.2.0", "overrides": ["seed=1,2"], "hydra": [], "config_dir": None, "working_folder": "/"}
    study = {"study": "x", "metric": "val/loss", "storage": "sqlite:///x.db", "retries": 3, "config_dir": None}
    metrics = {"fit_seconds": 1.0, "epochs": 1, "val/accuracy": 0.5, "test/accuracy": None}
    config = {**settings.model_dump(mode="json"), "run": run}
    return settings, [("config.yaml", config), ("sweep.yaml", sweep), ("study.yaml", study), ("metrics.json", metrics)]


def folder(arguments):
    number, kind, path, value, changes = arguments
    settings, files = contents()
    name, whole = files[number % len(files)]
    if kind == "value":
        whole = replaced(deepcopy(whole), path, value)
    text = (json.dumps if name.endswith("json") else yaml.safe_dump)(whole).encode()
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / name).write_bytes(text if kind == "value" else mutated(text, changes))
        if name == "config.yaml":
            read = refusal_allowed(lambda: read_run(Path(place)))
            if read:
                refusal_allowed(lambda: require_known(read[0], settings, Path(place)))
        elif name == "sweep.yaml":
            record = refusal_allowed(lambda: read_record(Path(place)))
            if record:
                refusal_allowed(lambda: require_plain(record["overrides"] + record["hydra"], Path(place)))
        else:
            refusal_allowed(lambda: (read_study_file if name == "study.yaml" else read_metrics)(Path(place)))


LINES = [
    "digit.png",
    "empty",
    "pipe.png",
    "pipe.npy",
    "x.npz",
    "gone.png",
    "x" * 5000,
    "/dev/zero",
    ".",
    "*.png",
    "@x",
    "-",
]


def picture_list(lines):
    """A list of paths, good and bad: each line is a picture, or an error of that line alone."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        try:
            (Path(place) / "empty").mkdir()
            for name in ("pipe.png", "pipe.npy"):
                os.mkfifo(name)
            np.savez("x.npz", DIGITS[1].images[:2, 0].numpy())
            lines = [line for line in lines if line.strip() != "/"]  # all pictures of this machine
            text = "\n".join(lines).replace("\0", "")  # with it the file is binary, and refused as a whole
            Path("list.txt").write_text(text, encoding="utf-8", errors="surrogateescape")
            for source in islice(find_pictures(["@list.txt"]), 50):
                refusal_allowed(lambda source=source: readings(source.read()))
        finally:
            os.chdir(here)


KINDS = ["u1", "u2", "i8", "f2", "f4", "f8", "c8", "?", "S3", "U3", "M8[s]", "V5", "O"]


def arrays(arguments):
    """An .npz of arrays of any kind and shape, as it is or with a record mutated."""
    kinds, number, changes, whole = arguments
    buffer = io.BytesIO()
    np.savez(buffer, **{f"a{i}": np.zeros(shape, kind) for i, (kind, shape) in enumerate(kinds)})
    content = buffer.getvalue() if whole or not kinds else repacked(buffer.getvalue(), number, changes)
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        Path(file.name).write_bytes(content)
        for source in refusal_allowed(lambda: list(islice(find_pictures([file.name]), 20))) or []:
            refusal_allowed(lambda source=source: readings(source.read()))


@cache
def exported():
    """The ONNX file of a small network."""
    export = importlib.import_module("mnist_cnn.export")
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "x.ckpt").write_bytes(checkpoint_content())
        output = f"{place}/x.onnx"
        export.export(export.Export(checkpoint=f"{place}/x.ckpt", format="onnx", output=output, modules=[]))
        return Path(output).read_bytes()


OPERATORS = ["Loop", "ConstantOfShape", "Expand", "MatMul", "Conv", "Reshape", "Pow", "Cast", "Identity", "Tile"]


def onnx_model(arguments):
    kind, number, operator, changes = arguments
    content = exported()
    if kind == "bytes":
        content = mutated(content, changes)
    else:
        model = onnx.load_model_from_string(content)
        node = model.graph.node[number % len(model.graph.node)]
        if kind == "operator":
            node.op_type = operator
        elif kind == "input" and node.input:
            names = [each.name for each in model.graph.initializer] + ["digits", "nothing"]
            node.input[number % len(node.input)] = names[number % len(names)]
        elif kind == "sizes":
            weight = model.graph.initializer[number % len(model.graph.initializer)]
            weight.dims[:] = [2 ** (number % 40), *weight.dims[1:]]
        content = model.SerializeToString()
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        Path(file.name).write_bytes(content)
        classifier = refusal_allowed(lambda: load_classifier(file.name, "cpu"))
        if classifier:
            refusal_allowed(lambda: classifier.probabilities(DIGITS[1].images[:1]))


@cache
def keras_model():
    """A network of one layer as Keras saves it."""
    buffer = io.BytesIO()
    layers = [{"class_name": "Flatten", "config": {"name": "flatten"}}]
    dense = {"name": "dense", "units": 10, "activation": "softmax", "use_bias": True}
    layers.append({"class_name": "Dense", "config": dense})
    with h5py.File(buffer, "w") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": {"layers": layers}})
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = [b"flatten", b"dense"]
        group.create_group("dense").attrs["weight_names"] = [b"kernel", b"bias"]
        group["dense/kernel"] = np.zeros((784, 10), np.float32)
        group["dense/bias"] = np.zeros(10, np.float32)
    return buffer.getvalue()


def hdf5(arguments):
    kind, dtype, path, value, changes = arguments
    buffer = io.BytesIO(keras_model())
    with suppress(TypeError, ValueError), h5py.File(buffer, "r+") as file:
        if kind == "dtype":
            del file["model_weights/dense/kernel"]
            file["model_weights/dense"].create_dataset("kernel", (784, 10), dtype)
        elif kind == "config":
            file.attrs["model_config"] = json.dumps(replaced(json.loads(file.attrs["model_config"]), path, value))
    content = buffer.getvalue()
    if kind in ("bytes", "heap"):  # the heap has the model's JSON; damage there hangs the library
        content = mutated(content, changes, spared=8 if kind == "bytes" else content.find(b"GCOL"))
    with tempfile.NamedTemporaryFile(suffix=".h5") as file:
        Path(file.name).write_bytes(content)
        refusal_allowed(lambda: read_keras(Path(file.name)))


paths = st.lists(st.integers(0, 99), min_size=1, max_size=6)
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 28]), max_size=4).map(tuple)
STRANGERS = {
    "folders": (folder, st.tuples(st.integers(0, 3), st.sampled_from(["value", "bytes"]), paths, values, mutations())),
    "lists": (picture_list, st.lists(st.sampled_from(LINES) | st.text(max_size=8), max_size=8)),
    "npz files": (
        arrays,
        st.tuples(
            st.lists(st.tuples(st.sampled_from(KINDS), shapes), max_size=3),
            st.integers(0, 9),
            mutations(),
            st.booleans(),
        ),
    ),
    "ONNX files": (
        onnx_model,
        st.tuples(
            st.sampled_from(["bytes", "operator", "input", "sizes"]),
            st.integers(0, 999),
            st.sampled_from(OPERATORS),
            mutations(),
        ),
    ),
    "HDF5 files": (
        hdf5,
        st.tuples(
            st.sampled_from(["bytes", "heap", "dtype", "config"]),
            st.sampled_from(["f2", "f4", "f8", "i4", "S9", "V9", "c8", "(9,)f4"]),
            paths,
            values,
            mutations(),
        ),
    ),
}
