"""Networks from plain specifications: counts, shapes, gradients, and what cannot be built."""

import pytest
import torch
import yaml
from conftest import ARCHITECTURES, CONF
from torch import nn
from torch.nn import functional as F

from mnist_cnn.config.schema import UserError
from mnist_cnn.models.convnet import ConvNet, Dropout, summary


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
        if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.Linear | Dropout):
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
    lines = summary(ConvNet(shipped("conv64_128")).specification, 10).splitlines()
    assert lines[0].split() == ["layer", "output", "shape", "parameters"]
    assert "(26, 26, 64)" in lines[1]
    assert lines[-1].split() == ["total", "485,514"]


def test_norm_padding_stride_and_dropout():
    block = {"filters": 8, "kernel": 3, "padding": 1, "stride": 2, "batch_norm": True, "pool": 2, "dropout": 0.1}
    network = ConvNet({"blocks": [block], "dense": [{"units": 5, "dropout": 0.5}, 7]}, classes=3)
    kinds = [type(module) for module in network.blocks[0]]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.ReLU, Dropout]
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
    network = ConvNet(shipped("conv10"), mean=33.3, standard_deviation=78.6)
    assert {"mean", "standard_deviation"} <= set(network.state_dict())


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
