"""What training does: every recipe, network, optimizer and schedule; averages, fine-tuning, and what ends it early."""

import csv
import re
from itertools import pairwise

import pytest
import torch
import yaml
from conftest import ARCHITECTURES, CONF, STEPS, TUTORIALS, metrics, same, weights
from hydra import compose, initialize_config_dir
from torch.nn import functional as F

from mnist_cnn import ConvNet, DigitClassifier, train
from mnist_cnn.config.schema import UserError
from mnist_cnn.models.checkpoint import read_checkpoint
from mnist_cnn.training.muon import Muon, orthogonalized
from mnist_cnn.training.optimizers import linear

if hasattr(torch.cpu, "get_capabilities"):  # as mnist-train looks
    FAST_BFLOAT16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
else:
    FAST_BFLOAT16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()

SHORT = ("data=digits", "epochs=1", "plots=false", "data.batch_size=64", "architecture=conv10")


def names(group):
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def epochs(folder):
    return list(csv.DictReader((folder / "metrics.csv").open()))


# --- recipes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("experiment"))
def test_every_recipe_trains_a_step(run, name):
    words = ("data=digits", "epochs=1", "plots=false", "trainer.limit_train_batches=1", "accelerator=cpu")
    words += () if FAST_BFLOAT16 else ("accelerator.precision=32-true",)
    ended = run("mnist-train", f"experiment={name}", *words)
    assert (ended.status, ended.err) == (0, "")
    figures = metrics(ended.folder())
    assert epochs(ended.folder())[0]["step"] == "1"
    assert figures["tested_epoch"] == 1
    assert figures["val/accuracy"] is None or name in ("conv64_128", "robust")
    warped = yaml.safe_load((ended.folder() / "config.yaml").read_text())["augmentation"].values()
    augmented = ("speed_99_5", "speed_99_7", "speed_99_7_gpu", "record_single", "record_ensemble", "robust")
    assert any(warped) is (name in augmented)  # not by the data
    header = (CONF / "experiment" / f"{name}.yaml").read_text()
    several = r"9\d\.\d+ ± \d\.\d+ % \(mean ± sd of \d+"
    assert re.search(f"# Measured: test accuracy {several}", header)


@pytest.mark.parametrize("name", [*TUTORIALS, "mlp"])
def test_a_recipe_is_the_tutorials(name):
    """The tutorials' own numbers: batch size, epochs, fraction of validation, and the last epoch tested."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [f"experiment={name}"])
    expected = {
        "conv30_70": (200, 10, 0, "KerasAdam"),
        "conv32_32_dropout": (128, 2, 0, "KerasAdam"),
        "conv64_128": (64, 5, 0.1, "KerasAdam"),
        "conv10": (200, 10, 0, "KerasAdam"),
        "conv32_64_64": (64, 5, 0, "KerasRMSprop"),
        "mlp": (64, 5, 0, "KerasRMSprop"),
    }[name]
    optimizer = config.optimizer._target_.rpartition(".")[2]
    assert (config.data.batch_size, config.epochs, config.data.validation, optimizer) == expected
    assert (config.data.normalization, config.data.validation_from, config.selection) == ("unit", "last", "last")
    assert config.architecture.initialization == "keras"
    assert (config.optimizer.lr, config.optimizer.eps) == (0.001, 1e-7)


def test_a_recipe_runs_and_tests_its_last_epoch(run):
    folder = run("mnist-train", "experiment=conv10", "data=digits", "epochs=3", "plots=false").folder()
    figures = metrics(folder)
    assert figures["tested_epoch"] == 3
    assert figures["val/accuracy"] is None
    assert same(weights(folder), weights(folder / "checkpoints" / "last.ckpt"))


# --- networks, optimizers, schedules -----------------------------------------------------------------------


def test_same_seed_same_weights_and_another_seed_others(run):
    folders = [run("mnist-train", *SHORT, f"seed={seed}").folder() for seed in (3, 3, 4)]
    first, again, other = (weights(folder) for folder in folders)
    assert same(first, again)
    assert not same(first, other)
    assert len({folder.name for folder in folders}) == 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains(run, architecture):
    folder = run("mnist-train", *SHORT, f"architecture={architecture}").folder()
    assert metrics(folder)["parameters"] == ARCHITECTURES[architecture]
    assert metrics(folder)["train/accuracy"] > 0.2  # a batch norm's averages want more steps than these


@pytest.mark.parametrize("optimizer", names("optimizer"))
def test_every_optimizer_trains(run, optimizer):
    folder = run("mnist-train", *SHORT, f"optimizer={optimizer}", "epochs=2").folder()
    rows = epochs(folder)
    assert float(rows[1]["train/loss"]) < float(rows[0]["train/loss"])
    assert rows[0]["learning_rate"] == rows[1]["learning_rate"]


@pytest.mark.parametrize("schedule", names("schedule"))
def test_every_schedule_moves_the_rate(run, schedule):
    folder = run("mnist-train", *SHORT, f"schedule={schedule}", "epochs=2").folder()
    rows = epochs(folder)
    assert float(rows[1]["train/loss"]) < float(rows[0]["train/loss"])
    assert (rows[0]["learning_rate"] == rows[1]["learning_rate"]) == (schedule == "constant")


def test_the_learning_rate_is_that_of_its_epoch(run):
    folder = run("mnist-train", *SHORT, "schedule=exponential", "epochs=3").folder()
    rates = [float(row["learning_rate"]) for row in csv.DictReader((folder / "metrics.csv").open())]
    assert rates == pytest.approx([0.001, 0.0007, 0.00049])


def test_a_network_from_the_command_line(run):
    blocks = "architecture.blocks=[{filters:4,kernel:5,pool:2},{filters:6,kernel:3,stride:2,batch_norm:true}]"
    folder = run("mnist-train", *SHORT, blocks, "architecture.dense=[24,12]").folder()
    assert read_checkpoint(folder)[1].architecture.blocks[1].batch_norm


def test_normalisation_reaches_the_checkpoint(run):
    folder = run("mnist-train", *SHORT, "data.normalization=standard").folder()
    assert 0 < weights(folder)["network.mean"] < 255
    assert weights(folder)["network.std"] < 255


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


def test_smoothed_labels_are_in_trainings_loss_alone(run):
    words = ("data=digits", "epochs=1", "plots=false", "architecture=mlp", "optimizer.lr=1e-12")
    plain, smooth = (metrics(run("mnist-train", *words, f"label_smoothing={x}").folder()) for x in (0.0, 0.5))
    assert smooth["train/loss"] != pytest.approx(plain["train/loss"], rel=1e-6)
    assert smooth["val/loss"] == pytest.approx(plain["val/loss"], rel=1e-6)
    assert smooth["test/loss"] == pytest.approx(plain["test/loss"], rel=1e-6)


# --- averages of the weights -------------------------------------------------------------------------------

SLOW = ("data=digits", "epochs=2", "plots=false", "data.batch_size=64", "selection=last")


def test_averages_are_those_of_the_weights_after_each_step(run, monkeypatch):
    """By hand: what a run without averages passes through, averaged."""
    before, work = [], DigitClassifier.training_step

    def step(classifier, batch, index):
        before.append({name: value.clone() for name, value in classifier.state_dict().items()})
        return work(classifier, batch, index)

    words = (*SLOW, "optimizer=muon", "architecture.blocks=[{filters:4,kernel:5,batch_norm:true,pool:4}]")
    monkeypatch.setattr(DigitClassifier, "training_step", step)
    plain = run("mnist-train", *words).folder()
    after = [*before[1:], weights(plain / "checkpoints" / "last.ckpt")]
    monkeypatch.setattr(DigitClassifier, "training_step", work)
    assert len(after) == 2 * STEPS
    expected = {name: value for name, value in after[0].items() if value.is_floating_point()}
    for state in after[1:]:
        expected = {name: value.lerp(state[name], 1 - 0.7) for name, value in expected.items()}
    folder = run("mnist-train", *words, "ema_decay=0.7").folder()
    last = read_checkpoint(folder / "checkpoints" / "last.ckpt")[0]
    assert same(last["current_model_state"], after[-1])
    assert not same(last["current_model_state"], last["state_dict"])
    assert same(weights(folder), last["state_dict"])
    for name, value in expected.items():
        torch.testing.assert_close(last["state_dict"][name], value, rtol=1e-5, atol=1e-6)


def test_validation_is_of_the_averages(run):
    folder = run("mnist-train", *SLOW, "architecture=conv10", "ema_decay=0.9").folder()
    evaluated = run("mnist-evaluate", f"checkpoint={folder}", "split=validation", "plots=false")
    assert f"accuracy {metrics(folder)['val/accuracy']:.2%}" in evaluated.out
    assert (
        metrics(folder)["val/accuracy"]
        != metrics(run("mnist-train", *SLOW, "architecture=conv10").folder())["val/accuracy"]
    )


# --- starting from a checkpoint ----------------------------------------------------------------------------


def test_initialize_keeps_the_normalisation_of_its_weights(run, tmp_path):
    run("mnist-train", *SHORT, "data.normalization=standard", "hydra.run.dir=standard")
    folder = run("mnist-train", *SHORT[:-1], "initialize=standard").folder()
    assert read_checkpoint(folder)[1].data.normalization == "standard"
    ended = run("mnist-train", *SHORT[:-1], "initialize=standard", "data.normalization=unit")
    assert (ended.status, "trained with standard" in ended.err) == (2, True)


def test_validation_digits_that_were_trained_on_before_are_warned_of(run, tmp_path):
    run("mnist-train", *SHORT, "data.validation=0", "hydra.run.dir=all")
    assert "was trained on some of these validation digits" in run("mnist-train", *SHORT[:-1], "initialize=all").err
    assert run("mnist-train", *SHORT[:-1], "initialize=all", "data.validation=0").err == ""


def test_initialize_brings_network_and_weights(run, trained):
    ended = run("mnist-train", "data=digits", "plots=false", "epochs=1", f"initialize={trained}", "optimizer.lr=1e-12")
    start, end = weights(trained), weights(ended.folder())
    assert all(torch.allclose(start[name], end[name], atol=1e-6) for name in start)


def test_freeze_blocks_trains_only_the_dense_part(run, trained):
    blocks = "architecture.blocks=[{filters:4,kernel:5,batch_norm:true,pool:4,dropout:0.5}]"
    first = run("mnist-train", *SHORT, blocks).folder()
    folder = run(
        "mnist-train", "data=digits", "epochs=1", "plots=false", f"initialize={first}", "freeze=blocks"
    ).folder()
    start, end = weights(first), weights(folder)
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved
    assert all(name.startswith(("network.dense", "network.logits")) for name in moved)


def test_other_classes_get_a_new_last_layer(run, trained, monkeypatch):
    from mnist_cnn.data import datasets

    digits = datasets.load("digits", "unused")
    monkeypatch.setitem(datasets.LOADERS, "digits", lambda _: digits._replace(classes=list("abcdefghij")))
    folder = run("mnist-train", *SHORT[:-1], f"initialize={trained}", "freeze=blocks", "optimizer.lr=1e-12").folder()
    start, end = weights(trained), weights(folder)
    assert torch.equal(start["network.blocks.0.0.weight"], end["network.blocks.0.0.weight"])
    assert not torch.allclose(start["network.logits.weight"], end["network.logits.weight"], atol=1e-3)
    assert read_checkpoint(folder)[1].classes == list("abcdefghij")


def test_an_architecture_beside_initialize_is_refused(run, trained):
    ended = run("mnist-train", "data=digits", f"initialize={trained}", "architecture=mlp")
    assert ended.status == 2
    assert "architecture=mlp" in ended.err


# --- precision, memory, time, and what ends a run ----------------------------------------------------------


def test_bfloat16_is_refused_where_the_processor_would_emulate_it(monkeypatch):
    if hasattr(torch.cpu, "get_capabilities"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pytest.raises(UserError, match="no bfloat16 instructions"):
        train(["data=digits", "accelerator=cpu", "accelerator.precision=bf16-mixed", "epochs=1"])
    with pytest.raises(UserError, match="16-mixed needs CUDA"):
        train(["data=digits", "accelerator=cpu", "accelerator.precision=16-mixed", "epochs=1"])


def test_a_run_in_bfloat16_learns(run, monkeypatch):
    """Also where the processor emulates it, which a small network of few steps bears."""
    monkeypatch.setattr("mnist_cnn.training.fit.check_precision", lambda precision, device: None)
    words = ["data=digits", "architecture=conv10", "epochs=2", "data.batch_size=64", "accelerator=cpu"]
    ended = run("mnist-train", *words, "accelerator.precision=bf16-mixed", "plots=false")
    assert ended.status == 0
    assert metrics(ended.folder())["test/accuracy"] > 0.5


def test_the_seconds_of_training_and_of_the_test(run):
    folder = run("mnist-train", *SHORT).folder()
    figures = metrics(folder)
    assert 0 < figures["train_seconds"] < figures["fit_seconds"]
    assert figures["test_seconds"] > 0
    untested = run("mnist-train", *SHORT, "test=false").folder()
    assert metrics(untested)["test_seconds"] is None
