"""Files from strangers: nothing in them runs, each ends in one line and status 2, soon and in little memory."""

import csv
import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from conftest import said, typed

import mnist_cnn.predict  # noqa: F401 - what it imports is not of the seconds below
from mnist_cnn import load_classifier
from mnist_cnn.config.schema import UserError
from mnist_cnn.models.checkpoint import FORMAT

SECONDS, MEBIBYTES = 2, 500  # seconds of the thread's own work: another test may go on beside it


class Runs:
    """A pickle of it would touch the marker."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def changed(trained, change):
    content = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    change(content)
    return content


def with_description(**values):
    return lambda path, trained, marker: torch.save(changed(trained, lambda c: c["mnist_cnn"].update(values)), path)


def pickled(path, trained, marker):
    torch.save(changed(trained, lambda c: c.update(extra=Runs(marker))), path)


def pickled_alone(path, trained, marker):
    path.write_bytes(pickle.dumps({"state_dict": Runs(marker)}))


def legacy(path, trained, marker):
    torch.save({"state_dict": Runs(marker)}, path, _use_new_zipfile_serialization=False)


def hyperparameters(path, trained, marker):
    call = {"_target_": "os.system", "_args_": [f"touch {marker}"], "_instantiator": "os.system"}
    nested = {"model": {"_class_path": "os.system", "init_args": {"command": f"touch {marker}"}, **call}}
    text = f"${{oc.env:HOME}}${{touch:{marker}}}"
    torch.save({"state_dict": {}, "hyper_parameters": {**nested, "text": text, **call}}, path)


def nested_in_description(path, trained, marker):
    def change(content):
        block = content["mnist_cnn"]["architecture"]["blocks"][0]
        block["filters"] = {"_target_": "os.system", "_args_": [f"touch {marker}"]}

    torch.save(changed(trained, change), path)


def interpolation(path, trained, marker):
    def change(content):
        content["mnist_cnn"]["architecture"]["blocks"][0]["filters"] = "${oc.env:HOME}"

    torch.save(changed(trained, change), path)


def bomb(path, trained, marker):
    whole = io.BytesIO()
    torch.save(changed(trained, lambda c: None), whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            name = record.filename
            if name.endswith("/data/0"):
                with new.open(name, "w") as file:
                    for _ in range(1024):
                        file.write(bytes(2**20))
            else:
                new.writestr(name, old.read(name))


def terabytes(path, trained, marker):
    def change(content):
        content["mnist_cnn"]["architecture"] = {"blocks": [], "dense": [65536] * 32, "initialization": "keras"}

    torch.save(changed(trained, change), path)


def largest_allowed(path, trained, marker):
    """Within the bounds of a specification, but without the weights: no memory is taken for them."""

    def change(content):
        content["mnist_cnn"]["architecture"] = {"blocks": [], "dense": [65536], "initialization": "keras"}
        content["state_dict"] = {}

    torch.save(changed(trained, change), path)


def expanded(path, trained, marker):
    def change(content):
        content["mnist_cnn"]["architecture"] = {"blocks": [], "dense": [65536], "initialization": "keras"}
        big = {"dense.0.0.weight": (65536, 784), "dense.0.0.bias": (65536,)}
        big |= {"logits.weight": (10, 65536), "logits.bias": (10,), "mean": (), "std": ()}
        content["state_dict"] = {f"network.{name}": torch.zeros(()).expand(size) for name, size in big.items()}

    torch.save(changed(trained, change), path)


def many_references(path, trained, marker):
    row = {f"figure {number}": 1.0 for number in range(50_000)}
    torch.save(changed(trained, lambda c: c["mnist_cnn"].update(history=[row] * 100_000)), path)


def cut(path, trained, marker):
    whole = (trained / "checkpoints" / "best.ckpt").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def wrong_magic(path, trained, marker):
    whole = (trained / "checkpoints" / "best.ckpt").read_bytes()
    path.write_bytes(b"XX" + whole[2:-22] + bytes(22))


def another_lightning_model(path, trained, marker):
    state = {"model.weight": torch.zeros(3, 3)}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.5.0", "hyper_parameters": {"lr": 0.1}}, path)


def weight(name, value):
    def make(path, trained, marker):
        def change(content):
            content["state_dict"][f"network.{name}"].view(-1)[0] = value

        torch.save(changed(trained, change), path)

    return make


FILES = {
    "a weight that is NaN": (weight("logits.bias", float("nan")), "logits.bias is not finite"),
    "a weight that is infinite": (weight("logits.weight", float("inf")), "logits.weight is not finite"),
    "a std of 0": (weight("std", 0.0), "std is not greater than 0"),
    "a pickled callable in a checkpoint": (pickled, "not a whole checkpoint"),
    "a pickled callable": (pickled_alone, "not a whole checkpoint"),
    "a pickled callable in torch's old format": (legacy, "not a whole checkpoint"),
    "targets in hyperparameters": (hyperparameters, "another program"),
    "a target in the description": (nested_in_description, "filters"),
    "a target beside the description": (with_description(_target_="os.system"), "unknown key _target_"),
    "an interpolation": (interpolation, "${oc.env:HOME}"),
    "a zip bomb": (bomb, "compressed"),
    "terabytes": (terabytes, "parameters; at most"),
    "a large network without weights": (largest_allowed, "do not fit"),
    "weights of one number": (expanded, "less data than its shape"),
    "many references to one thing": (many_references, "no network that can be built"),
    "cut short": (cut, "not a whole checkpoint"),
    "zero length": (lambda path, *_: path.write_bytes(b""), "not a whole checkpoint"),
    "wrong magic": (wrong_magic, "not a whole checkpoint"),
    "another Lightning model": (another_lightning_model, "another program"),
    "a temperature of zero": (with_description(temperature=0.0), "temperature"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_hostile_checkpoint(run, tmp_path, trained, digit, kind):
    make, words = FILES[kind]
    path, marker = tmp_path / "stranger.ckpt", tmp_path / "marker"
    make(path, trained, marker)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):  # a machine that stalls does not do so each time
        start = time.thread_time()
        ended = run("mnist-predict", f"checkpoint={path}", f"images={digit}")
        if (seconds := time.thread_time() - start) < SECONDS:
            break
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    said(ended, "stranger.ckpt", words)
    assert not marker.exists()
    assert seconds < SECONDS
    assert grown < MEBIBYTES * 1024


def test_the_marker_would_appear_where_it_is_run(tmp_path):
    """The files above are dangerous: Python's own reader runs them."""
    pickle.loads(pickle.dumps(Runs(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("address", ["https://example.org/best.ckpt", "s3://bucket/best.ckpt", "file:///best.ckpt"])
def test_an_address_is_not_fetched(run, digit, address):
    said(run("mnist-predict", f"checkpoint='{address}'", f"images={digit}"), address, "nothing is fetched")


def test_a_storage_that_claims_more_than_the_file_has(tmp_path, trained):
    """The pickle says how long a storage is; the file must not be read beyond its end."""
    torch.save(changed(trained, lambda content: None), tmp_path / "whole.ckpt")
    with zipfile.ZipFile(tmp_path / "whole.ckpt") as old, zipfile.ZipFile(tmp_path / "long.ckpt", "w") as new:
        for record in old.infolist():
            content = old.read(record)
            if record.filename.endswith("data.pkl"):
                assert b"K\xfa" in content  # 250 numbers: the first kernels of conv10
                content = content.replace(b"K\xfa", b"J\xff\xff\xff\x7f", 1)
            new.writestr(record.filename, content)
    digits = np.zeros((1, 28, 28), np.uint8)
    expected = load_classifier(trained).probabilities(digits)
    np.testing.assert_array_equal(load_classifier(tmp_path / "long.ckpt").probabilities(digits), expected)


def test_older_formats_load_and_a_newer_one_says_what_is_needed(trained, tmp_path):
    def of_format_3(content):
        content["mnist_cnn"]["format"] = 3
        content["state_dict"]["network.standard_deviation"] = content["state_dict"].pop("network.std")

    def of_format_1(content):
        of_format_3(content)
        about = content["mnist_cnn"]
        about["format"] = 1
        about.pop("temperature", None)
        for block in about["architecture"]["blocks"]:
            del block["bias"]

    digits = np.random.default_rng(0).integers(0, 256, (3, 28, 28)).astype(np.uint8)
    expected = load_classifier(trained).probabilities(digits)
    for older in (of_format_1, of_format_3):
        torch.save(changed(trained, older), tmp_path / "old.ckpt")
        np.testing.assert_array_equal(load_classifier(tmp_path / "old.ckpt").probabilities(digits), expected)
    for wrong, words in {
        FORMAT + 1: f"format {FORMAT + 1}.*pip install 'mnist-cnn>=",
        0: "no such file",
        True: "no such",
    }.items():
        torch.save(changed(trained, lambda c, w=wrong: c["mnist_cnn"].update(format=w)), tmp_path / "other.ckpt")
        with pytest.raises(UserError, match=words):
            load_classifier(tmp_path / "other.ckpt")


@pytest.mark.parametrize("ending", ["onnx", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 64, (2**63 - 1).to_bytes(8, "little") + b"{}"])
def test_an_exported_file_that_is_none(run, tmp_path, digit, ending, content):
    (tmp_path / f"x.{ending}").write_bytes(content)
    said(run("mnist-predict", f"checkpoint=x.{ending}", f"images={digit}"), f"x.{ending} is not")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A small network as an ONNX model."""
    onnx = pytest.importorskip("onnx")
    from importlib import import_module

    from mnist_cnn.models.checkpoint import save_weights
    from mnist_cnn.models.convnet import ConvNet

    path = tmp_path_factory.mktemp("exported")
    architecture = {"blocks": [{"filters": 2, "kernel": 5, "pool": 4}], "dense": []}
    network = ConvNet(architecture)
    save_weights(path / "x.ckpt", import_module("mnist_cnn.import").described(network.specification, 10), network)
    with pytest.MonkeyPatch.context() as patch:
        assert typed(patch, "mnist-export", f"checkpoint='{path}/x.ckpt'", f"output='{path}/x.onnx'") == 0
    return onnx.load(path / "x.onnx")


def add(*nodes):
    """Nodes before the last, whose outputs nothing uses."""

    def change(model):
        for kind, inputs, attributes in nodes:
            import onnx

            node = onnx.helper.make_node(kind, inputs, [f"{kind} output"], **attributes)
            model.graph.node.insert(len(model.graph.node) - 1, node)

    return change


def endless(model):
    import onnx

    body = onnx.helper.make_graph([], "body", [], [])
    add(("Loop", [], {"body": body}))(model)


def outer_product(model):
    """9 GB of two rows that have 400 KB."""
    import onnx

    for name, shape in (("column", (50_000, 1)), ("row", (1, 50_000))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name))
    add(("MatMul", ["column", "row"], {}))(model)


def elsewhere(model):
    import onnx

    weight = model.graph.initializer[0]
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="secret.bin")


def described(text):
    def change(model):
        model.metadata_props[0].value = text

    return change


def declared(end, kind, rank=None):
    def change(model):
        tensor = getattr(model.graph, end)[0].type.tensor_type
        tensor.elem_type = kind
        if rank is not None:
            del tensor.shape.dim[rank:]

    return change


ONNX = {
    "an endless loop": (endless, "the operator :Loop"),
    "gigabytes of a constant": (add(("ConstantOfShape", ["x"], {})), "ConstantOfShape"),
    "an outer product": (outer_product, "larger than"),
    "weights elsewhere": (elsewhere, "in another file"),
    "another domain": (add(("Mine", [], {"domain": "evil"})), "the operator evil:Mine"),
    "a description that is no mapping": (described("[1]"), "format None"),
    "a description that is nested": (described("[" * 100_000), "a damaged description"),
    "float digits": (declared("input", 1), "digits alone"),
    "digits of rank 1": (declared("input", 2, 1), "digits alone"),
    "words": (declared("output", 8), "not float32"),
    "probabilities of rank 1": (declared("output", 1, 1), "not float32"),
    "two outputs": (lambda model: model.graph.output.append(model.graph.output[0]), "probabilities alone"),
    "no outputs": (lambda model: model.graph.ClearField("output"), "probabilities alone"),
}


@pytest.mark.parametrize("kind", ONNX)
def test_a_hostile_onnx_file(run, tmp_path, digit, exported, kind):
    change, words = ONNX[kind]
    model = type(exported)()
    model.CopyFrom(exported)
    change(model)
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    start = time.thread_time()
    said(run("mnist-predict", "checkpoint=x.onnx", f"images={digit}"), "x.onnx", words)
    assert time.thread_time() - start < SECONDS


def test_an_onnx_file_whose_weights_are_no_numbers(run, tmp_path, digit, exported):
    import onnx

    model = type(exported)()
    model.CopyFrom(exported)
    for weight in model.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT:
            array = np.full_like(onnx.numpy_helper.to_array(weight), np.nan)
            weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    said(run("mnist-predict", "checkpoint=x.onnx", f"images={digit}"), "x.onnx gives no probabilities")


# --- lists of pictures ----------------------------------------------------------------------------------------


def test_a_bad_entry_of_a_list_is_an_error_of_it_alone(run, tmp_path, trained, digit):
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "bad.npy").write_bytes(b"hello")
    (tmp_path / "bad.npz").write_bytes(b"PK")
    np.savez(tmp_path / "half.npz", good=np.zeros((0, 28, 28), np.uint8), other=np.zeros(3))
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("words.txt", "hello")
    np.save(tmp_path / "none.npy", np.zeros((0, 28, 28), np.uint8))
    np.lib.format.open_memmap(tmp_path / "huge.npy", "w+", np.uint8, (1, 100_000, 100_000))  # sparse
    control = shutil.copy(digit, tmp_path / "a\x1b[31m\nb.png")
    latin = os.fsencode(tmp_path) + b"/\xe9.png"
    shutil.copy(digit, latin)
    bad = ["x" * 5000, "empty", "pipe.png", "pipe.npy", "bad.npy", "bad.npz", "half.npz", "text.npz", "none.npy"]
    bad += ["huge.npy", "gone.png", "/dev/zero"]
    (tmp_path / "list.txt").write_text("\n".join([*bad, str(digit)]))
    ended = run("mnist-predict", f"checkpoint={trained}", "images=@list.txt", "output=x.csv")
    assert ended.status == 1
    assert len(ended.err.splitlines()) == len(bad)
    rows = list(csv.DictReader((tmp_path / "x.csv").open(encoding="utf-8")))
    assert [bool(row["error"]) for row in rows] == [True] * len(bad) + [False]
    (tmp_path / "bad.npy").unlink()
    for name in ("pipe.png", "pipe.npy", "huge.npy"):
        (tmp_path / name).unlink()
    ended = run("mnist-predict", f"checkpoint={trained}", "images=.", "output=y.csv")
    assert ended.status == 0
    assert r"\xe9.png" in (tmp_path / "y.csv").read_text()
    ended = run("mnist-predict", f"checkpoint={trained}", "images=.")
    assert "\x1b" not in ended.out
    assert r"a\x1b[31m\nb.png" in ended.out
    assert control


def test_a_line_of_a_list_that_is_no_utf8_is_an_error_of_it_alone(run, tmp_path, trained, digit):
    for name in (b"\xe9.png", "a\x85b.png".encode()):
        shutil.copy(digit, os.fsencode(tmp_path) + b"/" + name)
    (tmp_path / "list.txt").write_bytes(b"gone\xff.png\r\n\xe9.png\na\xc2\x85b.png\n\xff\n" + os.fsencode(digit))
    ended = run("mnist-predict", f"checkpoint={trained}", "images=@list.txt", "output=x.csv")
    assert ended.status == 1
    assert ended.err == "error: gone\\xff.png does not exist\nerror: \\xff does not exist\n"
    rows = list(csv.DictReader((tmp_path / "x.csv").open(encoding="utf-8")))
    assert [bool(row["error"]) for row in rows] == [True, False, False, True, False]
    shutil.copy(digit, tmp_path / "x.png")
    said(run("mnist-predict", f"checkpoint={trained}", "images=@x.png"), "x.png cannot be read as a list of paths")


def test_an_array_that_says_it_is_larger_than_its_file(run, tmp_path, trained):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**10,)})
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", header.getvalue() + bytes(99))
    said(run("mnist-predict", f"checkpoint={trained}", "images=x.npz"), "x.npz", "a.npy is shorter than an array of")


@pytest.mark.parametrize("words", ["images=empty.npy", "images=@empty.txt"])
def test_no_picture_at_all_is_said(run, tmp_path, trained, words):
    np.save(tmp_path / "empty.npy", np.zeros((0, 28, 28), np.uint8))
    (tmp_path / "empty.txt").touch()
    said(run("mnist-predict", f"checkpoint={trained}", words, "output=x.csv"), "empty", "no picture")
    assert not (tmp_path / "x.csv").exists()


def test_dollars_in_names_are_no_formula(tmp_path):
    from mnist_cnn.inference import plots

    plots.confusion_matrix(np.eye(2, dtype=int), [r"$\frac$", "a$b$c^"], "$x$ $", tmp_path / "x.png")
    assert (tmp_path / "x.png").exists()


def test_a_lambda_layer_is_named_and_not_run(run, tmp_path):
    h5py = pytest.importorskip("h5py")
    marker = tmp_path / "marker"
    layers = [
        {"class_name": "Lambda", "config": {"name": "harmless", "function": f"__import__('os').mknod('{marker}')"}}
    ]
    config = json.dumps({"class_name": "Sequential", "config": {"layers": layers}})
    with h5py.File(tmp_path / "model.h5", "w") as file:
        file.attrs["model_config"] = config
        file.create_group("model_weights")
    with h5py.File(tmp_path / "model.weights.h5", "w"):
        pass
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("config.json", config)
        archive.write(tmp_path / "model.weights.h5", "model.weights.h5")
    for name in ("model.h5", "model.keras"):
        said(run("mnist-import", f"keras={name}", "output=x.ckpt"), name, "harmless is a Lambda", "not run")
    assert not marker.exists()
    assert not (tmp_path / "x.ckpt").exists()


def test_refusals_import_no_torch(tmp_path):
    code = (
        "import importlib, sys\n"
        "module = importlib.import_module('mnist_cnn.{0}')\n"
        "try: module.main()\n"
        "finally: print('torch' in sys.modules)"
    )
    for name in ("predict", "export", "draw", "import", "evaluate"):
        for words in (["--help"], ["+nothing=3"]):
            ended = subprocess.run(
                [sys.executable, "-c", code.format(name), *words], capture_output=True, text=True, cwd=tmp_path
            )
            assert ended.stdout.splitlines()[-1] == "False", ended
