"""Equality with Keras itself, in one process: logits, optimizer steps, initial weights, and imported files.

Keras runs on its torch backend; the networks are written as the tutorials write them.
"""

import os

os.environ["KERAS_BACKEND"] = "torch"

import functools
import io
import json
import math
import re
import sys
import zipfile

import absl.logging
import keras
import numpy as np
import pytest
import torch
import yaml
from conftest import CONF, TUTORIALS, said
from torch.nn import functional as F

from mnist_cnn import load_classifier
from mnist_cnn.data.datasets import load
from mnist_cnn.models.convnet import ConvNet
from mnist_cnn.training.optimizers import KerasAdam, KerasRMSprop

# Keras brings absl's log handler, which would close pytest's captured stream when Hydra sets up its own logging.
absl.logging.get_absl_handler().python_handler.setStream(sys.__stderr__)

layers = keras.layers
Conv2D, MaxPooling2D = keras.layers.Conv2D, keras.layers.MaxPooling2D
Dense, Dropout, Flatten = keras.layers.Dense, keras.layers.Dropout, keras.layers.Flatten


def keras_layers(name: str) -> list:
    return {
        "conv30_70": lambda: [
            Conv2D(30, (5, 5), activation="relu"),
            MaxPooling2D((2, 2)),
            Conv2D(70, (3, 3), activation="relu"),
            MaxPooling2D((2, 2)),
            Flatten(),
            Dense(100, activation="relu"),
        ],
        "conv32_32_dropout": lambda: [
            Conv2D(32, (3, 3), activation="relu"),
            Conv2D(32, (3, 3), activation="relu"),
            MaxPooling2D((2, 2)),
            Dropout(0.25),
            Flatten(),
            Dense(128, activation="relu"),
            Dropout(0.5),
        ],
        "conv64_128": lambda: [
            Conv2D(64, (3, 3), activation="relu"),
            MaxPooling2D((2, 2)),
            Conv2D(128, (3, 3), activation="relu"),
            MaxPooling2D((2, 2)),
            Flatten(),
            Dense(128, activation="relu"),
        ],
        "conv10": lambda: [
            Conv2D(10, (5, 5), strides=(1, 1), activation="relu"),
            MaxPooling2D((2, 2), strides=(2, 2)),
            Flatten(),
            Dense(100, activation="relu"),
        ],
        "conv32_64_64": lambda: [
            Conv2D(32, (3, 3), activation="relu"),
            MaxPooling2D((2, 2)),
            Conv2D(64, (3, 3), activation="relu"),
            MaxPooling2D((2, 2)),
            Conv2D(64, (3, 3), activation="relu"),
            Flatten(),
            Dense(64, activation="relu"),
        ],
    }[name]()


def keras_model(name: str, activation: str | None = None, dropout: bool = True) -> keras.Model:
    layers = [layer for layer in keras_layers(name) if dropout or not isinstance(layer, Dropout)]
    return keras.Sequential([keras.Input((28, 28, 1)), *layers, Dense(10, activation=activation)])


def our_network(name: str, dropout: bool = True) -> ConvNet:
    specification = yaml.safe_load((CONF / "architecture" / f"{name}.yaml").read_text())
    if not dropout:
        specification["blocks"] = [{**block, "dropout": 0.0} for block in specification["blocks"]]
        specification["dense"] = [d["units"] if isinstance(d, dict) else d for d in specification["dense"]]
    return ConvNet(specification)


def in_our_layout(weights: list[np.ndarray]) -> list[torch.Tensor]:
    """Keras's kernels (height, width, in, out) and (in, out) to torch's (out, in, height, width) and (out, in)."""
    return [torch.tensor(w.transpose(3, 2, 0, 1) if w.ndim == 4 else w.T) for w in weights]


def copy_weights(model: keras.Model, network: ConvNet) -> None:
    with torch.no_grad():
        for ours, theirs in zip(network.parameters(), in_our_layout(model.get_weights()), strict=True):
            ours.copy_(theirs)


@pytest.mark.parametrize("name", TUTORIALS)
def test_logits_equal_those_of_keras(name):
    keras.utils.set_random_seed(1)
    model, network = keras_model(name), our_network(name).eval()
    copy_weights(model, network)
    images = load("digits", "unused")[0].images[:64]
    ours = network(images).detach().numpy()
    theirs = model.predict(images.permute(0, 2, 3, 1).numpy().astype("float32") / 255, verbose=0)
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("name", TUTORIALS)
def test_parameter_count_and_rows_of_the_summary_are_those_of_keras(name):
    model, network = keras_model(name), our_network(name)
    assert network.parameter_count() == model.count_params()
    rows = [(row.output, row.parameters) for row in network.specification.layers()]
    assert rows == [(tuple(layer.output.shape[1:]), layer.count_params()) for layer in model.layers]


def distance_after_20_steps(seed, name, ours, theirs, digits, from_logits=False, onednn=False):
    """How far ours and Keras's weights are apart, relative, after the same batches; without dropout, whose random
    numbers cannot be shared. From logits Keras does not clip probabilities at 1e-7, which a violent start reaches."""
    keras.utils.set_random_seed(seed)
    model = keras_model(name, activation=None if from_logits else "softmax", dropout=False)
    network = our_network(name, dropout=False)
    network.to(getattr(torch, keras.config.floatx()))
    network.onednn = onednn
    copy_weights(model, network)
    before = torch.cat([weight.detach().flatten() for weight in network.parameters()])
    model.compile(optimizer=theirs(), loss=keras.losses.CategoricalCrossentropy(from_logits=from_logits))
    optimizer = ours(network.parameters(), lr=float(np.float32(0.001)))  # Keras keeps its rate in float32
    for step in range(20):
        chosen = torch.randperm(len(digits.labels), generator=torch.Generator().manual_seed(step))[:32]
        images, labels = digits.images[chosen], digits.labels[chosen]
        pixels = images.permute(0, 2, 3, 1).numpy().astype(keras.config.floatx()) / 255
        model.train_on_batch(pixels, keras.utils.to_categorical(labels.numpy(), 10))
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    our = torch.cat([weight.detach().flatten() for weight in network.parameters()])
    their = torch.cat([weight.flatten() for weight in in_our_layout(model.get_weights())])
    assert (their - before).norm() > 0.01 * before.norm()
    return ((our - their).norm() / their.norm()).item()


OPTIMIZERS = {"adam": (KerasAdam, keras.optimizers.Adam), "rmsprop": (KerasRMSprop, keras.optimizers.RMSprop)}


@pytest.fixture
def float64():
    """Double precision in Keras: what is left of a difference is then one of formula, not of rounding."""
    before = keras.config.dtype_policy()  # Keras's own Dense still multiplies in single precision
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy(before)


def equal_after_20_steps(*case, seeds=(2, 3, 4), **options):
    """In a few starts of a hundred a tie in a max pool, or at the zero of a relu, falls differently by rounding, and
    the paths part; a difference of formula parts them in all."""
    return any(distance_after_20_steps(seed, *case, **options) < 1e-4 for seed in seeds)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", TUTORIALS)
def test_weights_equal_those_of_keras_after_20_steps(name, optimizer, float64):
    digits = load("digits", "unused").train
    assert equal_after_20_steps(name, *OPTIMIZERS[optimizer], digits, from_logits=True)


@pytest.mark.parametrize("name", TUTORIALS)
def test_each_recipe_steps_like_keras_in_single_precision_on_mnist(name, mnist_root):
    digits = load("mnist", mnist_root).train
    recipe = (CONF / "experiment" / f"{name}.yaml").read_text()
    optimizer = re.search(r"override /optimizer: keras_(\w+)", recipe)[1]
    assert equal_after_20_steps(name, *OPTIMIZERS[optimizer], digits)
    # In the layout that mnist-train lets oneDNN choose, where sums are rounded otherwise.
    assert equal_after_20_steps(name, *OPTIMIZERS[optimizer], digits, seeds=(4, 5, 6, 7), onednn=True)


@pytest.mark.parametrize("theirs", [torch.optim.Adam, torch.optim.RMSprop])
def test_the_comparison_sees_a_difference_of_epsilon(theirs):
    """torch's own optimizers, with Keras's constants, are not Keras's: the test above can fail."""
    digits = load("digits", "unused").train
    optimizer = theirs.__name__.lower()
    options = {"adam": {"eps": 1e-7}, "rmsprop": {"alpha": 0.9, "eps": 1e-7}}[optimizer]
    ours = functools.partial(theirs, **options)
    assert not equal_after_20_steps("conv10", ours, OPTIMIZERS[optimizer][1], digits)


@pytest.mark.parametrize("name", TUTORIALS)
def test_initial_weights_have_the_distribution_of_keras(name):
    """Glorot uniform: the same bounds as Keras's own draw, flat between them, and zero biases."""
    from scipy.stats import kstest

    keras.utils.set_random_seed(3)
    torch.manual_seed(3)
    for ours, theirs in zip(our_network(name).parameters(), keras_model(name).get_weights(), strict=True):
        values = ours.detach().numpy().ravel()
        if values.size <= 512 and theirs.ndim == 1:
            assert not values.any()
            assert not theirs.any()
            continue
        fan_in, fan_out = np.prod(theirs.shape[:-1]), theirs.shape[-1] * np.prod(theirs.shape[:-2])
        bound = math.sqrt(6 / (fan_in + fan_out))
        for draw in (values, theirs.ravel()):
            assert kstest(draw, "uniform", args=(-bound, 2 * bound)).pvalue > 1e-4


# --- mnist-import ------------------------------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(0, 256, (1000, 28, 28)).astype(np.uint8)


def assert_equal_after_import(run, model, name, inputs):
    model.save(name)
    assert_equal_file(run, name, model.predict(inputs, verbose=0, batch_size=500))


def assert_equal_file(run, name, expected):
    ended = run("mnist-import", f"keras={name}", "output=imported.ckpt", "divide_by_255=true")
    assert ended.status == 0, ended
    found = load_classifier("imported.ckpt", "cpu").probabilities(PIXELS, mode="exact")
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("ending", ["h5", "keras"])
@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorials_model_gives_the_same_probabilities(run, name, ending):
    model = keras.Sequential([keras.Input((28, 28, 1)), *keras_layers(name), Dense(10, activation="softmax")])
    assert_equal_after_import(run, model, f"model.{ending}", PIXELS[..., None].astype(np.float32) / 255)


@pytest.mark.parametrize("ending", ["h5", "keras"])
def test_rescaling_batch_norm_and_a_functional_model(run, ending):
    inputs = keras.Input((28, 28, 1))
    x = Conv2D(8, 3, padding="same")(layers.Rescaling(1 / 127.5, offset=-1.0)(inputs))
    norm = layers.BatchNormalization()
    x = MaxPooling2D(2)(layers.ReLU()(norm(x)))
    model = keras.Model(inputs, layers.Softmax()(Dense(10)(Dropout(0.2)(Flatten()(x)))))
    norm.set_weights(list(np.random.default_rng(1).uniform(0.5, 1.5, (4, 8)).astype(np.float32)))
    assert_equal_after_import(run, model, f"model.{ending}", PIXELS[..., None].astype(np.float32))


@pytest.mark.parametrize("ending", ["h5", "keras"])
def test_other_activations_pooling_and_norms(run, ending):
    norm = layers.BatchNormalization()
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            Conv2D(6, 5, padding="same", activation="tanh"),
            layers.AveragePooling2D(2),
            Conv2D(8, 3, use_bias=False, activation="gelu"),
            norm,
            Conv2D(8, 3),
            layers.Activation("silu"),
            layers.GlobalAveragePooling2D(),
            Dense(16, activation="sigmoid"),
            Dense(10, activation="softmax"),
        ]
    )
    norm.set_weights(list(np.random.default_rng(1).uniform(0.5, 1.5, (4, 8)).astype(np.float32)))
    assert_equal_after_import(run, model, f"model.{ending}", PIXELS[..., None].astype(np.float32) / 255)


def with_norms(*parts):
    """A model of these layers, with figures of its norms that are no start's, factors below 0 among them."""
    model = keras.Sequential([keras.Input((28, 28, 1)), *parts])
    generator = np.random.default_rng(1)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            *affine, mean, variance = layer.get_weights()
            affine = [generator.uniform(-1, 1.5, each.shape) for each in affine]
            layer.set_weights([*affine, generator.normal(size=mean.shape), generator.uniform(0.5, 1.5, variance.shape)])
    return model


@pytest.mark.parametrize("ending", ["h5", "keras"])
def test_norms_anywhere_layers_without_bias_and_strides_with_padding_same(run, ending):
    norm = layers.BatchNormalization
    model = with_norms(
        Conv2D(6, 3, use_bias=False, activation="relu"),
        norm(),
        Conv2D(7, 5, strides=2, padding="same", activation="relu"),
        MaxPooling2D(2),
        norm(),
        Dropout(0.4),
        Conv2D(8, 2, padding="same", activation="relu"),
        MaxPooling2D(2),
        Dropout(0.4),
        norm(center=False),
        Conv2D(9, 3, padding="same", use_bias=False),
        norm(scale=False),
        layers.ReLU(),
        Flatten(),
        norm(),
        Dense(12, use_bias=False),
        norm(scale=False),
        layers.Activation("relu"),
        Dropout(0.3),
        Dense(11, activation="relu"),
        Dropout(0.3),
        norm(),
        Dense(10, use_bias=False, activation="softmax"),
    )
    assert_equal_after_import(run, model, f"model.{ending}", PIXELS[..., None].astype(np.float32) / 255)


def moved(before, after):
    """A .keras file's groups of weights under other names."""

    def change(path):
        import h5py

        with zipfile.ZipFile(path) as archive:
            config, content = archive.read("config.json"), io.BytesIO(archive.read("model.weights.h5"))
        with h5py.File(content, "r+") as file:
            for place, name in zip(before, after, strict=True):
                file.move(place, name)
            del file["layers"]
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("config.json", config)
            archive.writestr("model.weights.h5", content.getvalue())

    return change


def as_list(path):
    import h5py

    with h5py.File(path, "r+") as file:
        model = json.loads(file.attrs["model_config"])
        model["config"] = [layer for layer in model["config"]["layers"] if layer["class_name"] != "InputLayer"]
        file.attrs["model_config"] = json.dumps(model).encode()


GROUPS = ["layers/conv2d", "layers/conv2d_1", "layers/dense"]
OLD = {
    "Sequential as a list, before Keras 2.2.3": ("h5", as_list),
    "Keras 2.13": (
        "keras",
        moved(GROUPS, [f"_layer_checkpoint_dependencies/{name}" for name in ("conv2d", "conv2d_2", "dense")]),
    ),
    "Keras 2.13 on Windows": (
        "keras",
        moved(GROUPS, [f"_layer_checkpoint_dependencies\\{name}" for name in ("conv2d", "conv2d_2", "dense")]),
    ),
    "Keras 2.15 on Windows": ("keras", moved(GROUPS, [name.replace("/", "\\") for name in GROUPS])),
}


@pytest.mark.parametrize("kind", OLD)
def test_files_of_older_versions_of_keras(run, kind):
    ending, change = OLD[kind]
    convolutions = [Conv2D(4, 3, activation="relu"), Conv2D(4, 3, activation="relu")]
    model = with_norms(*convolutions, Flatten(), Dense(10, activation="softmax"))
    model.save(f"model.{ending}")
    change(f"model.{ending}")
    inputs = PIXELS[..., None].astype(np.float32) / 255
    assert_equal_file(run, f"model.{ending}", model.predict(inputs, verbose=0, batch_size=500))


@pytest.mark.parametrize("scale", [255, 1])
@pytest.mark.parametrize("kind", ["dense", "norm"])
def test_what_pixels_were_divided_by_is_found_out(run, scale, kind):
    digits = load("digits", "unused").train
    keras.utils.set_random_seed(1)
    norm = [layers.BatchNormalization()] if kind == "norm" else []
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            Conv2D(8, 5, strides=2, activation="relu"),
            *norm,
            Flatten(),
            Dense(10, activation="softmax"),
        ]
    )
    rate = 0.002 if scale == 255 else 0.0003
    model.compile(optimizer=keras.optimizers.Adam(rate), loss="sparse_categorical_crossentropy")
    inputs = digits.images.permute(0, 2, 3, 1).numpy().astype(np.float32) / scale
    model.fit(inputs, digits.labels.numpy(), batch_size=64, epochs=6, verbose=0)
    model.save("model.h5")
    ended = run("mnist-import", "keras=model.h5", "output=x.ckpt")
    assert ended.status == 0, ended
    assert f"divide_by_255={str(scale == 255).lower()} was found out" in ended.out
    assert load_classifier("x.ckpt", "cpu").network.std == scale


def test_where_digits_do_not_tell_what_pixels_were_divided_by_it_is_said(run):
    with_norms(Flatten(), Dense(10, activation="softmax")).save("model.h5")
    ended = run("mnist-import", "keras=model.h5", "output=x.ckpt")
    assert ended.status == 0, ended
    assert "divide_by_255=true and divide_by_255=false are both possible" in ended.err
    assert load_classifier("x.ckpt", "cpu").network.std == 255


REFUSED = {
    "SeparableConv2D": lambda: [layers.SeparableConv2D(4, 3, name="odd"), Flatten()],
    "softplus": lambda: [Conv2D(4, 3, activation="softplus", name="odd"), Flatten()],
    "BatchNormalization": lambda: [
        Conv2D(4, 3),
        MaxPooling2D(2),
        layers.BatchNormalization(name="odd"),
        layers.ReLU(),
        Flatten(),
    ],
    "axis": lambda: [Conv2D(26, 3, activation="relu"), layers.BatchNormalization(axis=1, name="odd"), Flatten()],
    "dilation_rate": lambda: [
        Conv2D(4, 3, activation="relu", dilation_rate=2, name="odd"),
        Flatten(),
    ],
    "strides": lambda: [
        Conv2D(4, 3, activation="relu"),
        MaxPooling2D(3, strides=2, name="odd"),
        Flatten(),
    ],
    "kernel_size": lambda: [Conv2D(4, (3, 5), activation="relu", name="odd"), Flatten()],
    "without an activation": lambda: [Conv2D(4, 3), Flatten(name="odd")],
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_layer_that_cannot_be_expressed_is_named(run, tmp_path, kind):
    keras.Sequential([keras.Input((28, 28, 1)), *REFUSED[kind](), Dense(10, activation="softmax")]).save("model.keras")
    said(run("mnist-import", "keras=model.keras", "output=x.ckpt"), "model.keras", "layer odd", kind)
    assert not (tmp_path / "x.ckpt").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(40), b"\x89HDF\r\n\x1a\n" + bytes(90)])
@pytest.mark.parametrize("ending", ["h5", "keras"])
def test_a_file_that_is_none(run, tmp_path, content, ending):
    (tmp_path / f"model.{ending}").write_bytes(content)
    said(run("mnist-import", f"keras=model.{ending}", "output=x.ckpt"), f"model.{ending}")


def test_weights_in_another_file_are_not_followed(run, tmp_path):
    h5py = pytest.importorskip("h5py")

    model = keras.Sequential([keras.Input((28, 28, 1)), Flatten(), Dense(10, activation="softmax", name="last")])
    model.save("model.h5")
    with h5py.File("model.h5", "r+") as file:
        del file["model_weights/last"]
        file["model_weights/last"] = h5py.ExternalLink("secret.h5", "/last")
    said(run("mnist-import", "keras=model.h5", "output=x.ckpt"), "model.h5", "is a link")


def external_group(file):
    import h5py

    del file["model_weights"]
    file["model_weights"] = h5py.ExternalLink("secret.h5", "/")


def of_kind(kind):
    def change(file):
        place = next(name for name in all_names(file["model_weights"]) if name.endswith("kernel"))
        shape = file["model_weights"][place].shape
        del file["model_weights"][place]
        file["model_weights"].create_dataset(place, shape, kind, chunks=(1, 1))  # nothing is written

    return change


def with_value(value):
    def change(file):
        place = next(name for name in all_names(file["model_weights"]) if name.endswith("kernel"))
        file["model_weights"][place][0, 0] = value

    return change


def all_names(group):
    found = []
    group.visit(found.append)
    return found


HOSTILE = {
    "all weights in another file": (external_group, "is a link"),
    "items of a megabyte": (of_kind(np.dtype(("V", 2**20))), "no floating-point numbers"),
    "arrays as items": (of_kind(np.dtype((np.float32, (1000, 1000)))), "no floating-point numbers"),
    "words": (of_kind(np.dtype("S9")), "no floating-point numbers"),
    "NaN": (with_value(np.nan), "not finite"),
    "infinite": (with_value(-np.inf), "not finite"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_weights_are_refused(run, tmp_path, kind):
    h5py = pytest.importorskip("h5py")
    change, words = HOSTILE[kind]
    model = keras.Sequential([keras.Input((28, 28, 1)), Flatten(), Dense(10, activation="softmax", name="last")])
    model.save("model.h5")
    with h5py.File("model.h5", "r+") as file:
        change(file)
    said(run("mnist-import", "keras=model.h5", "output=x.ckpt"), "model.h5", words)
    assert not (tmp_path / "x.ckpt").exists()


@pytest.mark.parametrize("name", ["k_vars", "vars", "optimizer_x", "ünï"])
@pytest.mark.parametrize("ending", ["h5", "keras"])
def test_a_layer_may_have_any_name(run, tmp_path, name, ending):
    model = keras.Sequential([keras.Input((28, 28, 1)), Flatten(), Dense(10, activation="softmax", name=name)])
    model.save(f"model.{ending}")
    ended = run("mnist-import", f"keras=model.{ending}", "output=x.ckpt")
    assert ended.status == 0, ended


def test_a_file_on_which_hdf5_never_ends_is_refused(run, tmp_path):
    h5py = pytest.importorskip("h5py")
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs["model_config"] = "{}"
        file.create_group("model_weights")
    content = bytearray(buffer.getvalue())
    content[content.index(b"GCOL") + 8] = 255  # in the size of the heap that has the model's JSON
    (tmp_path / "model.h5").write_bytes(content)
    said(run("mnist-import", "keras=model.h5", "output=x.ckpt"), "model.h5", "HDF5 crashes on it, or takes too long")


@pytest.mark.parametrize("scale", [0.0, 1e-320, float("inf")])
def test_a_rescaling_that_leaves_no_numbers_is_refused(run, scale):
    layers = [keras.Input((28, 28, 1)), keras.layers.Rescaling(1.0), Flatten(), Dense(10, activation="softmax")]
    keras.Sequential(layers).save("model.keras")
    with zipfile.ZipFile("model.keras") as old, zipfile.ZipFile("changed.keras", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "config.json":
                content = content.replace(b'"scale": 1.0', f'"scale": {json.dumps(scale)}'.encode())
            new.writestr(name, content)
    said(run("mnist-import", "keras=changed.keras", "output=x.ckpt"), "changed.keras")
