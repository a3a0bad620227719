"""mnist-import against Keras itself: equal probabilities, and each layer that ConvNet cannot express named."""

import numpy as np
import pytest
from test_keras_parity import TUTORIALS, keras, keras_layers
from test_messages import said

from mnist_cnn import load_classifier

L = keras.layers
DIGITS = np.random.default_rng(0).integers(0, 256, (1000, 28, 28)).astype(np.uint8)


def equal(run, model, name, inputs):
    model.save(name)
    ended = run("mnist-import", f"keras={name}", "output=imported.ckpt")
    assert ended.status == 0, ended
    found = load_classifier("imported.ckpt", "cpu").probabilities(DIGITS, mode="exact")
    np.testing.assert_allclose(found, model.predict(inputs, verbose=0, batch_size=500), atol=1e-5)


@pytest.mark.parametrize("ending", ["h5", "keras"])
@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorials_model_gives_the_same_probabilities(run, name, ending):
    model = keras.Sequential([keras.Input((28, 28, 1)), *keras_layers(name), L.Dense(10, activation="softmax")])
    equal(run, model, f"model.{ending}", DIGITS[..., None].astype(np.float32) / 255)


@pytest.mark.parametrize("ending", ["h5", "keras"])
def test_rescaling_batch_norm_and_a_functional_model(run, ending):
    inputs = keras.Input((28, 28, 1))
    x = L.Conv2D(8, 3, padding="same")(L.Rescaling(1 / 127.5, offset=-1.0)(inputs))
    norm = L.BatchNormalization()
    x = L.MaxPooling2D(2)(L.ReLU()(norm(x)))
    model = keras.Model(inputs, L.Softmax()(L.Dense(10)(L.Dropout(0.2)(L.Flatten()(x)))))
    norm.set_weights(list(np.random.default_rng(1).uniform(0.5, 1.5, (4, 8)).astype(np.float32)))
    equal(run, model, f"model.{ending}", DIGITS[..., None].astype(np.float32))


REFUSED = {
    "AveragePooling2D": lambda: [L.Conv2D(4, 3, activation="relu"), L.AveragePooling2D(2, name="odd"), L.Flatten()],
    "SeparableConv2D": lambda: [L.SeparableConv2D(4, 3, name="odd"), L.Flatten()],
    "tanh": lambda: [L.Conv2D(4, 3, activation="tanh", name="odd"), L.Flatten()],
    "dilation_rate": lambda: [L.Conv2D(4, 3, activation="relu", dilation_rate=2, name="odd"), L.Flatten()],
    "use_bias": lambda: [L.Conv2D(4, 3, activation="relu", use_bias=False, name="odd"), L.Flatten()],
    "strides": lambda: [L.Conv2D(4, 3, activation="relu"), L.MaxPooling2D(3, strides=2, name="odd"), L.Flatten()],
    "kernel_size": lambda: [L.Conv2D(4, (3, 5), activation="relu", name="odd"), L.Flatten()],
    "without relu": lambda: [L.Conv2D(4, 3), L.Flatten(name="odd")],
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_layer_that_cannot_be_expressed_is_named(run, tmp_path, kind):
    keras.Sequential([keras.Input((28, 28, 1)), *REFUSED[kind](), L.Dense(10, activation="softmax")]).save(
        "model.keras"
    )
    said(run("mnist-import", "keras=model.keras", "output=x.ckpt"), "model.keras", "layer odd", kind)
    assert not (tmp_path / "x.ckpt").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(40), b"\x89HDF\r\n\x1a\n" + bytes(90)])
@pytest.mark.parametrize("ending", ["h5", "keras"])
def test_a_file_that_is_none(run, tmp_path, content, ending):
    (tmp_path / f"model.{ending}").write_bytes(content)
    said(run("mnist-import", f"keras=model.{ending}", "output=x.ckpt"), f"model.{ending}")


def test_weights_in_another_file_are_not_followed(run, tmp_path):
    import h5py

    model = keras.Sequential([keras.Input((28, 28, 1)), L.Flatten(), L.Dense(10, activation="softmax", name="last")])
    model.save("model.h5")
    with h5py.File("model.h5", "r+") as file:
        del file["model_weights/last"]
        file["model_weights/last"] = h5py.ExternalLink("secret.h5", "/last")
    said(run("mnist-import", "keras=model.h5", "output=x.ckpt"), "model.h5", "is a link")
