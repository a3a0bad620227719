"""What a record's recipe switches on: warped digits, smoothed labels, Muon, schedules, averages, several views."""

import math
import signal
from itertools import pairwise

import pytest
import torch
from conftest import equal
from test_resume import SETTINGS, STEPS
from test_train import metrics, same, weights
from torch.nn import functional as F

from mnist_cnn import load_classifier
from mnist_cnn.config.settings import Augmentation
from mnist_cnn.data.augmentation import Affine, warped
from mnist_cnn.data.datasets import load
from mnist_cnn.models.checkpoint import read_checkpoint
from mnist_cnn.models.convnet import ConvNet
from mnist_cnn.training.module import DigitClassifier
from mnist_cnn.training.muon import Muon, orthogonalized
from mnist_cnn.training.optimizers import linear

ALL = (
    "augmentation=affine",
    "label_smoothing=0.1",
    "optimizer=muon",
    "averaging=0.8",
    "architecture.blocks=[{filters:4,kernel:5,batch_norm:true,bias:false,pool:4,dropout:0.25}]",
)


@pytest.fixture(scope="module")
def digits():
    """uint8 (20, 1, 28, 28) with a margin, so that small movements keep all ink."""
    return F.pad(load("digits", "unused")[1].images[:20, :, 4:-4, 4:-4], (4, 4, 4, 4))


def amounts(count, rotation=0.0, shear=0.0, scale=0.0, right=0.0, down=0.0):
    return torch.tensor([rotation, shear, scale, right, down])[:, None].repeat(1, count)


# --- augmentation ------------------------------------------------------------------------------------------


def test_no_movement_is_the_digit_itself(digits):
    assert torch.allclose(warped(digits, amounts(20)), digits.float(), atol=1e-2)


def test_a_shift_of_whole_pixels_is_a_roll(digits):
    moved = warped(digits, amounts(20, right=2, down=-1))
    assert torch.allclose(moved, digits.float().roll((-1, 2), (2, 3)), atol=1e-2)


def test_a_quarter_turn_and_twice_the_size(digits):
    turned = warped(digits, amounts(20, rotation=math.pi / 2))
    assert torch.allclose(turned, torch.rot90(digits.float(), 1, (2, 3)), atol=2e-2)
    large = warped(digits, amounts(20, scale=1.0))
    assert large[:, :, 10:18, 10:18].mean().item() == pytest.approx(
        digits[:, :, 12:16, 12:16].float().mean().item(), rel=0.1
    )


def test_shear_and_shift_follow_a_turn(digits):
    """All at once is one after the other, but for the blur of drawing it four times."""
    once = warped(digits, amounts(20, rotation=0.2, shear=0.1, scale=0.1, right=1, down=2))
    steps = warped(warped(digits, amounts(20, shear=0.1)), amounts(20, rotation=0.2))
    steps = warped(warped(steps, amounts(20, scale=0.1)), amounts(20, right=1, down=2))
    assert (once - steps).abs().mean() < 4
    assert (once - digits).abs().mean() > 8


def test_the_grid_is_torchs_own(digits):
    """A map drawn by hand, and by F.affine_grid."""
    maps = torch.eye(2, 3).repeat(20, 1, 1)
    maps[:, :, 2] = torch.tensor([-4 / 28, 2 / 28])  # from two pixels to the left, and one below
    expected = F.grid_sample(
        digits.float(), F.affine_grid(maps, [20, 1, 28, 28], align_corners=False), align_corners=False
    )
    assert torch.allclose(warped(digits, amounts(20, right=2, down=-1)), expected, atol=1e-3)


def test_each_digit_is_warped_by_draws_of_its_own_that_a_seed_fixes(digits):
    augment = Affine(Augmentation(rotation=15, shift=2, scale=0.1, shear=5))
    one = digits[:1].expand(20, -1, -1, -1)
    torch.manual_seed(3)
    first, second = augment(one), augment(one)
    assert len({tuple(image.flatten().tolist()) for image in torch.cat([first, second])}) == 40
    torch.manual_seed(3)
    assert torch.equal(augment(one), first)
    with torch.autocast("cpu", torch.bfloat16):  # no pixel moves for want of precision
        torch.manual_seed(3)
        assert torch.equal(augment(one), first)


def test_draws_stay_within_their_bounds_and_reach_them(digits, monkeypatch):
    from mnist_cnn.data import augmentation

    seen = []
    monkeypatch.setattr(augmentation, "warped", lambda images, amounts: seen.append(amounts))
    Affine(Augmentation(rotation=90, shift=3, scale=0.2, shear=45))(digits[:1].expand(2000, -1, -1, -1))
    bounds = torch.tensor([math.pi / 2, math.pi / 4, 0.2, 3, 3])
    assert torch.allclose(seen[0].abs().amax(1), bounds, rtol=0.01)
    assert (seen[0].abs().amax(1) <= bounds).all()
    assert torch.allclose(seen[0].mean(1), torch.zeros(5), atol=0.06 * 3)


def test_warped_digits_are_the_digits_of_training_alone(run, tmp_path):
    """The test scores digits as they are, and a network learns from warped ones."""
    words = ("data=digits", "epochs=2", "plots=false", "architecture=conv10", "selection=last")
    plain = metrics(run("mnist-train", *words).folder())
    folder = run("mnist-train", *words, "augmentation=affine").folder()
    assert metrics(folder)["train/loss"] > plain["train/loss"]
    test = load("digits", "unused")[1]
    classifier = load_classifier(folder)
    right = (classifier.logits(test.images).argmax(1) == test.labels).sum().item()
    assert metrics(folder)["test/accuracy"] == right / len(test.labels) > 0.5


# --- loss, network, optimizer, schedule --------------------------------------------------------------------


def test_smoothed_labels_are_in_trainings_loss_alone(run):
    words = ("data=digits", "epochs=1", "plots=false", "architecture=mlp", "optimizer.lr=1e-12")
    plain, smooth = (metrics(run("mnist-train", *words, f"label_smoothing={x}").folder()) for x in (0.0, 0.5))
    assert smooth["train/loss"] != pytest.approx(plain["train/loss"], rel=1e-6)
    assert smooth["val/loss"] == pytest.approx(plain["val/loss"], rel=1e-6)
    assert smooth["test/loss"] == pytest.approx(plain["test/loss"], rel=1e-6)


def test_a_block_without_bias():
    network = ConvNet({"blocks": [{"filters": 8, "kernel": 3, "bias": False, "batch_norm": True}], "dense": []})
    assert network.blocks[0][0].bias is None
    assert network.parameter_count() == 8 * 9 + 16 + (8 * 26 * 26 + 1) * 10
    assert network.parameter_count() == sum(row.parameters for row in network.specification.layers())


def stepped(optimizer, network, steps=3):
    for number in range(steps):
        torch.manual_seed(number)
        images, labels = torch.randint(0, 256, (16, 1, 28, 28)), torch.randint(0, 10, (16,))
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs_muon_of_filters_and_adamw_of_the_rest(nesterov):
    """torch's own class works in bfloat16 inside: equal to that precision, of the distance that a weight has moved."""
    specification = {
        "blocks": [{"filters": 30, "kernel": 3, "pool": 2}, {"filters": 8, "kernel": 3, "batch_norm": True, "pool": 4}],
        "dense": [40],
    }
    torch.manual_seed(0)
    network = ConvNet(specification)
    start = {name: value.detach().clone() for name, value in network.named_parameters()}
    settings = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    optimizer = Muon(network.parameters(), lr_rest=0.01, **settings)
    gradients = {name: torch.randn_like(value) for name, value in start.items()}
    hidden = ["blocks.0.0.weight", "blocks.1.0.weight", "dense.0.0.weight"]
    mine = {id(value): name for name, value in network.named_parameters()}
    assert [mine[id(weight)] for weight in optimizer.param_groups[0]["params"]] == hidden
    matrices = {name: start[name].flatten(1).clone().requires_grad_() for name in hidden}
    others = {name: value.clone().requires_grad_() for name, value in start.items() if name not in hidden}
    references = [
        torch.optim.Muon(matrices.values(), **settings),
        torch.optim.AdamW(others.values(), lr=0.01, weight_decay=0.1, fused=True),
    ]
    for _ in range(3):
        for name, weight in network.named_parameters():
            weight.grad = gradients[name]
        for name, weight in [*matrices.items(), *others.items()]:
            weight.grad = gradients[name].reshape(weight.shape)
        for each in (optimizer, *references):
            each.step()
    for name, weight in network.named_parameters():
        expected = (matrices | others)[name].view(weight.shape)
        moved = (expected - start[name]).abs().max()
        assert (weight - expected).abs().max() < (0.03 if name in hidden else 1e-5) * moved, name


@pytest.mark.parametrize("shape", [(16, 25), (64, 16), (10, 10)])
def test_orthogonal_updates_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalized(torch.randn(shape), 10))
    assert ((values > 0.6) & (values < 1.3)).all()


@pytest.mark.parametrize("network", [{"blocks": [], "dense": []}, {"blocks": [], "dense": [8]}])
def test_muon_trains_networks_without_convolutions(network):
    network = ConvNet(network)
    before = [value.clone() for value in network.parameters()]
    stepped(Muon(network.parameters()), network)
    assert all(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


@pytest.mark.parametrize("schedule", ["onecycle", "linear"])
def test_a_schedule_moves_both_of_muons_rates_alike(schedule):
    network = ConvNet({"blocks": [], "dense": [8]})
    optimizer = Muon(network.parameters(), lr=0.1, lr_rest=0.005)
    make = {
        "onecycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10, cycle_momentum=False),
        "linear": lambda: linear(optimizer, 10),
    }
    scheduler = make[schedule]()
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    first, rest = optimizer.param_groups
    assert first["lr"] == rest["lr"] != 0.1
    assert rest["lr"] * rest["ratio"] == pytest.approx(first["lr"] / 20)


def test_the_linear_schedule_rises_and_falls_by_equal_steps():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    scheduler, rates = linear(optimizer, 10, warmup=0.4, final=0.1), []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    falls = [a - b for a, b in pairwise(rates[3:])]
    assert falls == pytest.approx([1.8 / 7] * 6)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)


# --- weight averages ---------------------------------------------------------------------------------------


def test_averages_are_those_of_the_weights_after_each_stretch(run, monkeypatch):
    """By hand: what a run without averages passes through, averaged; the count of batches is the true one."""
    seen, work = [], DigitClassifier.training_step

    def step(classifier, stretch, index):
        work(classifier, stretch, index)
        seen.append({name: value.clone() for name, value in classifier.state_dict().items()})

    words = ("data=digits", "epochs=3", "plots=false", "data.batch_size=64", "selection=last", ALL[-1])
    monkeypatch.setattr(DigitClassifier, "training_step", step)
    run("mnist-train", *words)
    passed, expected = list(seen), dict(seen[0])
    for state in passed[1:]:
        expected = {
            name: value.lerp(state[name], 0.3) if value.is_floating_point() else state[name]
            for name, value in expected.items()
        }
    folder = run("mnist-train", *words, "averaging=0.7").folder()
    assert same(weights(folder), expected)
    last = read_checkpoint(folder / "checkpoints" / "last.ckpt")[0]
    assert same(last["state_dict"], expected)
    assert same(last["current_model_state"], passed[-1])
    assert int(last["state_dict"]["network.blocks.0.1.num_batches_tracked"]) == 3 * STEPS


def test_validation_is_of_the_averages(run):
    words = ("data=digits", "epochs=2", "plots=false", "architecture=conv10", "averaging=0.9", "selection=last")
    folder = run("mnist-train", *words).folder()
    evaluated = run("mnist-evaluate", f"checkpoint={folder}", "split=validation", "plots=false")
    assert f"accuracy {metrics(folder)['val/accuracy']:.2%}" in evaluated.out


# --- exact resume with everything on -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    from mnist_cnn import train

    folder = tmp_path_factory.mktemp("recipe") / "run"
    train([*SETTINGS, *ALL, f"hydra.run.dir={folder}"])
    return folder


@pytest.mark.parametrize("step", [3, STEPS, STEPS + 7])
def test_an_interrupted_recipe_resumes_to_the_same_bits(run, tmp_path, signalled, recipe, step):
    signalled(signal.SIGTERM, step)
    assert run("mnist-train", *SETTINGS, *ALL, "hydra.run.dir=run").status == 143
    ended = run("mnist-train", "resume=run")
    assert (ended.status, ended.err) == (0, "")
    assert "current_model_state" not in ended.out
    equal(recipe, tmp_path / "run")


def test_stretches_end_where_they_would_have(run, tmp_path, signalled, monkeypatch):
    """Several to an epoch: an average is moved at each one's end, wherever the run was stopped."""
    from mnist_cnn.data import datamodule

    monkeypatch.setattr(datamodule, "STRETCH", 300)
    assert run("mnist-train", *SETTINGS, *ALL, "hydra.run.dir=whole").status == 0
    signalled(signal.SIGTERM, STEPS + 7)
    assert run("mnist-train", *SETTINGS, *ALL, "hydra.run.dir=run").status == 143
    assert run("mnist-train", "resume=run").status == 0
    equal(tmp_path / "whole", tmp_path / "run")


def test_a_signal_while_the_averages_are_validated(run, tmp_path, signalled, recipe):
    signalled(signal.SIGTERM, 2, DigitClassifier, "validation_step")
    assert run("mnist-train", *SETTINGS, *ALL, "hydra.run.dir=run").status == 143
    assert run("mnist-train", "resume=run").status == 0
    equal(recipe, tmp_path / "run")


def test_the_seconds_of_training_and_of_the_test(run):
    folder = run("mnist-train", "data=digits", "epochs=2", "plots=false", "architecture=conv10").folder()
    figures = metrics(folder)
    assert 0 < figures["train_seconds"] < figures["fit_seconds"]
    assert figures["test_seconds"] > 0
    untested = run("mnist-train", "data=digits", "epochs=1", "plots=false", "test=false").folder()
    assert metrics(untested)["test_seconds"] is None
