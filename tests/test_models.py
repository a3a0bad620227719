"""Networks from plain specifications: counts, shapes, gradients, dropout, checkpoints, and what cannot be built."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import ARCHITECTURES, CONF, REPOSITORY, metrics, said
from torch import nn
from torch.nn import functional as F

from mnist_cnn import load_classifier
from mnist_cnn.config.schema import UserError
from mnist_cnn.data.datasets import load
from mnist_cnn.models.checkpoint import FORMAT, Description, read_checkpoint, rebuild, save, save_weights
from mnist_cnn.models.convnet import ConvNet, Dropout, OneChannelConv2d, summary


def shipped(name):
    return yaml.safe_load((CONF / "architecture" / f"{name}.yaml").read_text())


def test_every_shipped_architecture_is_tested():
    assert {file.stem for file in (CONF / "architecture").glob("*.yaml")} == set(ARCHITECTURES)


@pytest.mark.parametrize(("name", "parameters"), ARCHITECTURES.items())
def test_parameter_count_is_the_tutorials(name, parameters):
    network = ConvNet(shipped(name))
    assert network.parameter_count() == parameters
    assert sum(row.parameters for row in network.specification.layers()) == parameters
    assert f"{parameters:,} parameters" in (CONF / "architecture" / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    network = ConvNet(shipped(name)).train()
    images = torch.randint(0, 256, (16, 1, 28, 28), dtype=torch.uint8)
    F.cross_entropy(network(images), torch.arange(16) % 10).backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_summary_states_the_shapes_that_the_network_has(name):
    network = ConvNet(shipped(name)).eval()
    seen = []
    for module in network.modules():
        whole = not isinstance(module, nn.Conv2d) or module.groups == 1  # else the first half of a separable one
        if whole and isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.MaxPool2d | nn.AvgPool2d | nn.Linear | Dropout):
            module.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[1:])))
    network(torch.zeros(1, 1, 28, 28, dtype=torch.uint8))
    rows = [row.output for row in network.specification.layers() if row.name != "flatten"]
    assert [(shape[1], shape[2], shape[0]) if len(shape) == 3 else shape for shape in seen] == rows


def test_the_rows_of_tutorial_002():
    """The tutorial prints its model's summary; these are its rows."""
    rows = [(row.output, row.parameters) for row in ConvNet(shipped("conv64_128")).specification.layers()]
    assert rows == [
        ((26, 26, 64), 640),
        ((13, 13, 64), 0),
        ((11, 11, 128), 73_856),
        ((5, 5, 128), 0),
        ((3200,), 0),
        ((128,), 409_728),
        ((10,), 1_290),
    ]


def test_the_summary_is_a_table_with_a_total():
    lines = summary(ConvNet(shipped("conv64_128"))).splitlines()
    assert lines[0].split() == ["layer", "output", "shape", "parameters"]
    assert "(26, 26, 64)" in lines[1]
    assert lines[-1].split() == ["total", "485,514"]


def test_norm_padding_stride_and_dropout():
    block = {"filters": 8, "kernel": 3, "padding": 1, "stride": 2, "batch_norm": True, "pool": 2, "dropout": 0.1}
    network = ConvNet({"blocks": [block], "dense": [{"units": 5, "dropout": 0.5}, 7]}, classes=3)
    kinds = [type(module) for module in network.blocks[0]]
    assert kinds == [OneChannelConv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.ReLU, Dropout]
    assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 3)
    rows = network.specification.layers(classes=3)
    assert sum(row.parameters for row in rows) == network.parameter_count()
    assert [row.output for row in rows if row.name == "max pool 1"] == [(7, 7, 8)]


def test_pooling_before_relu_is_the_tutorials_order_exactly():
    torch.manual_seed(0)
    network = ConvNet(shipped("conv64_128")).eval()
    x = torch.randint(0, 256, (8, 1, 28, 28), dtype=torch.uint8)
    y = x.float() / 255
    for block in network.blocks:
        y = F.max_pool2d(torch.relu(block[0](y)), 2)
    y = network.logits(network.dense(y.permute(0, 2, 3, 1).flatten(1)))
    torch.testing.assert_close(network(x), y, rtol=0, atol=1e-6)


def test_initialization_of_torch_differs_from_that_of_keras():
    networks = []
    for initialization in ("keras", "torch"):
        torch.manual_seed(0)
        networks.append(ConvNet({**shipped("conv10"), "initialization": initialization}))
    keras, other = networks
    assert not keras.logits.bias.any()
    assert other.logits.bias.any()
    bound = (6 / (100 + 10)) ** 0.5
    assert 0.95 * bound < keras.logits.weight.abs().max() <= bound
    assert other.logits.weight.abs().max() <= 0.1


def test_the_normalisation_figures_travel_with_the_weights():
    network = ConvNet(shipped("conv10"), mean=33.3, std=78.6)
    assert {"mean", "std"} <= set(network.state_dict())


def test_a_block_without_bias():
    network = ConvNet({"blocks": [{"filters": 8, "kernel": 3, "bias": False, "batch_norm": True}], "dense": []})
    assert network.blocks[0][0].bias is None
    assert network.parameter_count() == 8 * 9 + 16 + (8 * 26 * 26 + 1) * 10
    assert network.parameter_count() == sum(row.parameters for row in network.specification.layers())


def test_blocks_of_every_kind():
    """Activations, pooling, norms, separable and residual blocks are what torch computes, one by one."""
    torch.manual_seed(0)
    blocks = [
        {"filters": 6, "kernel": 5, "padding": 2, "pool": 2, "batch_norm": "after"},
        {"filters": 8, "kernel": 3, "padding": 1, "separable": True, "residual": True, "batch_norm": True},
        {"filters": 8, "kernel": 3, "padding": 1, "residual": True, "activation": "silu", "pool": 14, "pooling": "max"}
        | {"batch_norm": "last"},
    ]
    network = ConvNet(
        {"blocks": blocks, "dense": [{"units": 5, "activation": "tanh"}], "activation": "gelu", "pooling": "avg"}
    )
    network.eval()
    first, second, third = network.blocks
    x = torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8)
    y = F.avg_pool2d(first[2](F.gelu(first[0](x.float() / 255))), 2)
    (each, across), norm = second[0].layers
    assert (each.groups, across.kernel_size, each.bias) == (6, (1, 1), None)
    y = F.gelu(norm(across(each(y))) + second[0].shortcut(y))
    y = third[3](F.max_pool2d(F.silu(third[0].layers(y) + y), 14))
    y = network.logits(torch.tanh(network.dense[0][0](y.flatten(1))))
    torch.testing.assert_close(network(x), y)
    rows = network.specification.layers()
    assert network.parameter_count() == sum(row.parameters for row in rows)
    assert "average pool 1" in [row.name for row in rows]
    assert [tuple(maps.shape) for maps in network.feature_maps(x)] == [(4, 6, 28, 28), (4, 8, 14, 14), (4, 8, 14, 14)]


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu", "silu", "tanh", "sigmoid"])
def test_activations_are_torchs(activation):
    network = ConvNet({"blocks": [], "dense": [8], "activation": activation}).eval()
    x = torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8)
    y = getattr(F, activation, None) or getattr(torch, activation)
    expected = network.logits(y(network.dense[0][0](x.float().flatten(1) / 255)))
    torch.testing.assert_close(network(x), expected)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"activation": "rleu"}, ["activation=rleu", "did you mean relu"]),
        ({"activation": {"_target_": "relu"}}, ["must be a mapping such as"]),
        ({"residual": True}, ["residual needs an odd kernel"]),
        ({"layer": "my_layers.Scale"}, ["must be a mapping such as"]),
        ({"batch_norm": "later"}, ["batch_norm"]),
    ],
)
def test_a_block_that_cannot_be(part, words):
    with pytest.raises(UserError) as error:
        ConvNet({"blocks": [{"filters": 8, "kernel": 3, **part}], "dense": []})
    for word in words:
        assert word in str(error.value)


OWN_LAYERS = """
import torch

class Scale(torch.nn.Module):
    def __init__(self, channels, start=1.0):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.full((channels, 1, 1), start))

    def forward(self, x):
        return x * self.factor

class Narrow(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()

    def forward(self, x):
        return x[:, :, 1:]

class Square(torch.nn.Module):
    def forward(self, x):
        return x * x.sigmoid()
"""


def test_layers_of_ones_own(run, tmp_path, monkeypatch, digit):
    """Named on the command line they are imported; for a checkpoint alone they are not."""
    (tmp_path / "my_layers.py").write_text(OWN_LAYERS)
    monkeypatch.syspath_prepend(tmp_path)
    block = "{filters:4,kernel:5,pool:4,layer:{_target_:my_layers.Scale,start:0.5}}"
    words = [f"architecture.blocks=[{block}]", "architecture.activation={_target_:my_layers.Square}"]
    ended = run("mnist-train", "data=digits", "epochs=1", "plots=false", *words)
    assert ended.status == 0, ended.err
    assert re.search(r"layers of your own +4\n", ended.out)
    folder = ended.folder()
    program = f"""if True:
        import sys
        from mnist_cnn import load_classifier
        try:
            load_classifier({str(folder)!r})
        except Exception as error:
            print(error)
        print("my_layers" in sys.modules)
        print(load_classifier({str(folder)!r}, modules=["my_layers"]).predict({str(digit)!r}))
    """
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    refused, imported, label = done.stdout.splitlines()
    assert "name it again, by modules=[my_layers]" in refused
    assert imported == "False"
    assert re.fullmatch(r"\['\d'\]", label)
    for verb, *more in (
        ("mnist-predict", f"images={digit.parent}"),
        ("mnist-evaluate", "plots=false"),
        ("mnist-export", "output=x.safetensors", "format=safetensors"),
    ):
        done = run(verb, f"checkpoint={folder}", "modules=[my_layers]", *more)
        assert done.status == 0, done.err
    again = run("mnist-train", "data=digits", "epochs=1", "plots=false", f"initialize={folder}", "modules=[my_layers]")
    assert again.status == 0, again.err
    said(run("mnist-train", "data=digits", words[0].replace("Scale", "Scales")), "my_layers.Scales cannot be made")
    narrow = "architecture.blocks=[{filters:4,kernel:5,layer:{_target_:my_layers.Narrow}}]"
    said(run("mnist-train", "data=digits", narrow), "a layer of your own fails, or does not keep the shape")


# --- oneDNN's layout and dropout ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_onednns_layout_is_the_same_function_with_the_same_gradients(name):
    specification = shipped(name)
    specification["blocks"] = [{**block, "dropout": 0.0} for block in specification["blocks"]]
    specification["dense"] = [d["units"] if isinstance(d, dict) else d for d in specification["dense"]]
    torch.manual_seed(1)
    network = ConvNet(specification)
    images, labels = (tensor[:32] for tensor in load("digits", "unused")[0])
    found = []
    for onednn in (False, True):
        network.onednn = onednn
        network.zero_grad()
        logits = network(images)
        F.cross_entropy(logits, labels).backward()
        found.append([logits.detach(), *(parameter.grad.clone() for parameter in network.parameters())])
    assert found[0][0].abs().max() > 0.05
    for plain, blocked in zip(*found, strict=True):
        torch.testing.assert_close(blocked, plain, atol=2e-5, rtol=2e-3)


@pytest.mark.parametrize(("kernel", "stride", "padding", "bias"), [(5, 2, 2, True), (3, 1, 1, False), (4, 3, 0, True)])
def test_the_first_convolutions_gradient_in_onednns_layout(kernel, stride, padding, bias):
    torch.manual_seed(1)
    ours = OneChannelConv2d(1, 6, kernel, stride, padding, bias=bias)
    images = torch.randn(5, 1, 28, 28)
    found = []
    for x in (images, images.to_mkldnn()):
        ours.zero_grad()
        output = ours(x)
        output = output.to_dense() if x.is_mkldnn else output
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        found.append([parameter.grad.clone() for parameter in ours.parameters()])
    for plain, blocked in zip(*found, strict=True):
        torch.testing.assert_close(blocked, plain, atol=1e-3, rtol=1e-4)


def test_onednns_layout_takes_dropout_and_batch_norm():
    for block in ({"dropout": 0.5}, {"batch_norm": True}):
        network = ConvNet({"blocks": [{"filters": 4, "kernel": 3, "pool": 2, **block}] * 2, "dense": [8]})
        network.onednn = True
        network(torch.zeros(2, 1, 28, 28, dtype=torch.uint8)).sum().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())


def test_pixels_have_a_gradient_in_training():
    network = ConvNet({"blocks": [{"filters": 4, "kernel": 3, "pool": 2}], "dense": [8]})
    network.onednn = True
    images = torch.rand(2, 1, 28, 28).requires_grad_()
    network(images).sum().backward()
    assert images.grad is not None


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
def test_dropout_keeps_the_fraction_and_the_mean(fraction):
    torch.manual_seed(1)
    x = torch.ones(64, 32, 12, 13).to(memory_format=torch.channels_last).requires_grad_()
    dropped = Dropout(fraction)(x)
    kept = (dropped != 0).float()
    assert kept.mean().item() == pytest.approx(1 - fraction, abs=0.004)
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)
    assert kept.mean((0, 2, 3)).std() < 0.02  # in every channel alike
    assert not torch.equal(dropped, Dropout(fraction)(x))
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped)  # the same mask and scale on the way back
    assert torch.equal(Dropout(fraction).eval()(x), x)


# --- checkpoints -------------------------------------------------------------------------------------------


def test_a_checkpoint_rebuilds_its_network(tmp_path):
    torch.manual_seed(0)
    network = ConvNet(shipped("conv10"), classes=4, mean=33.3, std=78.6).eval()
    data = {"name": "mnist", "validation": 0.1, "validation_from": "last", "normalization": "standard", "seed": 1}
    about = {"format": FORMAT, "architecture": shipped("conv10"), "classes": list("abcd"), "data": data, "versions": {}}
    save_weights(tmp_path / "x.ckpt", Description.model_validate(about), network)
    again, description = rebuild(tmp_path / "x.ckpt")
    assert description.classes == list("abcd")
    assert description.data.validation == 0.1
    images = torch.randint(0, 256, (8, 1, 28, 28), dtype=torch.uint8)
    assert torch.equal(again.eval()(images), network(images))


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_run_begins_from_a_checkpoint_of_an_older_format(run, trained, tmp_path, version):
    """The buffer std had another name, and format 1 neither a temperature nor blocks that may be without bias."""
    content, _ = read_checkpoint(trained)
    about = content["mnist_cnn"]
    about["format"] = version
    if version < 3:
        for block in about["architecture"]["blocks"]:
            del block["bias"]
    if version == 1:
        about.pop("temperature", None)
    content["state_dict"]["network.standard_deviation"] = content["state_dict"].pop("network.std")
    save(tmp_path / "old.ckpt", {"state_dict": content["state_dict"], "mnist_cnn": about})
    for one, other in zip(
        rebuild(trained)[0].state_dict().values(), rebuild(tmp_path / "old.ckpt")[0].state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)
    words = ("data=digits", "epochs=1", "plots=false", "optimizer.lr=1e-12")
    ended = run("mnist-train", *words, "initialize=old.ckpt")
    assert (ended.status, read_checkpoint(ended.folder())[1].format) == (0, FORMAT)
    assert metrics(ended.folder())["val/accuracy"] == pytest.approx(metrics(trained)["val/accuracy"])


def test_nothing_is_left_where_a_checkpoint_cannot_be_written(tmp_path):
    (tmp_path / "whole.ckpt").write_bytes(b"as before")
    with pytest.raises(OSError, match="nowhere"):
        save(tmp_path / "nowhere" / "x.ckpt", {})
    with pytest.raises(Exception, match="pickle"):
        save(tmp_path / "whole.ckpt", {"function": lambda: None})
    assert [path.name for path in tmp_path.iterdir()] == ["whole.ckpt"]
    assert (tmp_path / "whole.ckpt").read_bytes() == b"as before"


# --- what cannot be built ----------------------------------------------------------------------------------

REFUSED = [
    (
        {"blocks": [{"filters": 8, "kernel": 5, "pool": 2}, {"filters": 8, "kernel": 13}], "dense": []},
        ["block 2", "12×12×8", "kernel 13"],
    ),
    (
        {"blocks": [{"filters": 8, "kernel": 28}, {"filters": 8, "kernel": 1, "pool": 2}], "dense": []},
        ["block 2", "1×1×8", "pool 2"],
    ),
    ({"blocks": [{"filters": 0, "kernel": 5}], "dense": []}, ["block 1", "28×28×1", "filters=0"]),
    ({"blocks": [{"kernel": 5}], "dense": []}, ["block 1", "28×28×1", "filters is missing"]),
    (
        {"blocks": [{"filters": 8, "kernel": 3}, {"filter": 8, "kernel": 3}], "dense": []},
        ["block 2", "26×26×8", "filter", "did you mean filters"],
    ),
    ({"blocks": [{"filters": 8.5, "kernel": 3}], "dense": []}, ["block 1", "filters=8.5", "integer"]),
    ({"blocks": [{"filters": True, "kernel": 3}], "dense": []}, ["block 1", "filters=True"]),
    ({"blocks": [{"filters": 8, "kernel": 3, "dropout": 1.0}], "dense": []}, ["block 1", "dropout=1.0", "less than 1"]),
    ({"blocks": [{"filters": 8, "kernel": 3, "dropout": float("nan")}], "dense": []}, ["block 1", "finite"]),
    ({"blocks": ["conv"], "dense": []}, ["block 1", "dictionary"]),
    ({"blocks": "conv", "dense": []}, ["architecture.blocks='conv'", "list"]),
    ({"blocks": [], "dense": [0]}, ["units=0", "greater"]),
    ({"blocks": [], "dense": ["wide"]}, ["'wide'", "number of units"]),
    ({"blocks": [], "dense": [65536, 65536]}, ["parameters", "at most"]),
    ({"blocks": []}, ["dense is missing"]),
    ({"blocks": [], "dense": [], "depth": 3}, ["unknown key depth"]),
]


@pytest.mark.parametrize(("specification", "words"), REFUSED)
def test_what_cannot_be_built_is_refused_by_block_and_shape(specification, words):
    with pytest.raises(UserError) as refusal:
        ConvNet(specification)
    message = str(refusal.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# --- mnist-import torch= ----------------------------------------------------------------------------------------


class PyTorchExample(nn.Module):
    """The layers of examples/mnist/main.py."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
        self.fc1, self.fc2 = nn.Linear(9216, 128), nn.Linear(128, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        return F.log_softmax(self.fc2(F.relu(self.fc1(x.flatten(1)))), 1)


FOREIGN = {
    "pytorch_example": (PyTorchExample, 0.1307, 0.3081, []),
    "lenet5": (
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh()),
            *(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh()),
            *(nn.Linear(84, 10), nn.LogSoftmax(1)),
        ),
        *(0.0, 1.0, ["mean=0", "std=1"]),
    ),
    "norms and no dense layer": (
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(5, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(6)),
            *(nn.Flatten(), nn.Linear(6 * 5 * 5, 10), nn.LogSoftmax(1)),
        ),
        *(0.5, 0.5, ["mean=0.5", "std=0.5", "architecture=conv10", "architecture.dense=[]"]),
        "architecture.blocks=[{filters:5,kernel:3,batch_norm:true,pool:2},{filters:6,kernel:3,pool:2,batch_norm:last}]",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("within", [None, "model_state_dict"])
def test_the_weights_of_a_plain_network_give_its_probabilities(run, name, within):
    make, mean, std, words, *more = FOREIGN[name]
    torch.manual_seed(0)
    network = make()
    images = torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8)
    inputs = (images / 255 - mean) / std
    network.train()(inputs)  # so that the figures of norms are no start's
    state = network.eval().state_dict()
    torch.save({within: state, "epoch": 3} if within else state, "model.pt")
    choice = [] if more else [f"architecture={name}"]
    ended = run("mnist-import", "torch=model.pt", "output=x.ckpt", *choice, *words, *more)
    assert ended.status == 0, ended
    assert "scikit-learn's digits are right" in ended.err  # no network that has learnt anything
    with torch.no_grad():
        expected = network(inputs).exp().numpy()
    found = load_classifier("x.ckpt", "cpu").probabilities(images, mode="exact")
    np.testing.assert_allclose(found, expected, atol=1e-6)
