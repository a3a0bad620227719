"""What was made faster gives the same results; no test here asserts a time."""

import json
import os

import pytest
import pytorch_lightning as pl
import torch
import yaml
from conftest import CONF, TUTORIALS
from torch.nn import functional as F

from mnist_cnn import train
from mnist_cnn.config.schema import UserError
from mnist_cnn.data.datamodule import MNISTDataModule
from mnist_cnn.data.datasets import load
from mnist_cnn.models.convnet import ConvNet, Dropout
from mnist_cnn.training.module import DigitClassifier
from mnist_cnn.training.optimizers import KerasAdam

FAST_BFLOAT16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def weights_after_an_epoch(precision: str = "32-true", **options) -> list[torch.Tensor]:
    torch.manual_seed(1)
    data = MNISTDataModule("digits", batch_size=16, validation=1200, **options)
    network = ConvNet({"blocks": [{"filters": 4, "kernel": 3, "pool": 2}], "dense": [8]})
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, precision=precision, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    classifier = DigitClassifier(network, KerasAdam)
    trainer.fit(classifier, datamodule=data)
    assert trainer.global_step == data.steps_per_epoch == 15
    assert classifier.history[0]["step"] == 15
    return [parameter.detach().clone() for parameter in network.parameters()]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_several_steps_at_a_time_train_as_one_at_a_time(precision):
    """In bfloat16 too, where autocast keeps copies of the weights that a step makes old."""
    plain, stretched = (weights_after_an_epoch(precision, stretches=stretches) for stretches in (False, True))
    assert all(map(torch.equal, plain, stretched))


@pytest.mark.parametrize("name", [*TUTORIALS, "mlp"])
def test_onednns_layout_is_the_same_function_with_the_same_gradients(name):
    specification = yaml.safe_load((CONF / "architecture" / f"{name}.yaml").read_text())
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


def test_onednns_layout_takes_dropout_and_batch_norm():
    for block in ({"dropout": 0.5}, {"batch_norm": True}):
        network = ConvNet({"blocks": [{"filters": 4, "kernel": 3, "pool": 2, **block}] * 2, "dense": [8]})
        network.onednn = True
        network(torch.zeros(2, 1, 28, 28, dtype=torch.uint8)).sum().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_dropout_keeps_the_share_and_the_mean(share):
    torch.manual_seed(1)
    x = torch.ones(64, 32, 12, 13).to(memory_format=torch.channels_last).requires_grad_()
    dropped = Dropout(share)(x)
    kept = (dropped != 0).float()
    assert kept.mean().item() == pytest.approx(1 - share, abs=0.004)
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)
    assert kept.mean((0, 2, 3)).std() < 0.02  # in every channel alike
    assert not torch.equal(dropped, Dropout(share)(x))
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped)  # the same mask and scale on the way back
    assert torch.equal(Dropout(share).eval()(x), x)


def test_bfloat16_is_refused_where_the_processor_would_emulate_it(monkeypatch):
    if hasattr(torch.cpu, "get_capabilities"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pytest.raises(UserError, match="no bfloat16 instructions"):
        train(["data=digits", "accelerator=cpu", "accelerator.precision=bf16-mixed", "epochs=1"])
    with pytest.raises(UserError, match="16-mixed needs CUDA"):
        train(["data=digits", "accelerator=cpu", "accelerator.precision=16-mixed", "epochs=1"])


@pytest.mark.skipif(not FAST_BFLOAT16, reason="this CPU has no bfloat16 instructions")
def test_a_run_in_bfloat16_learns(run):
    words = ["data=digits", "epochs=3", "accelerator=cpu", "accelerator.precision=bf16-mixed", "plots=false"]
    ended = run("mnist-train", *words)
    assert ended.status == 0
    assert json.loads((ended.folder() / "metrics.json").read_text())["test/accuracy"] > 0.85


def test_a_file_that_changes_is_read_again(mnist_root, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (mnist_root / "MNIST" / "raw").glob("*-ubyte"):
        (raw / file.name).write_bytes(file.read_bytes())
    first = load("mnist", tmp_path)
    assert load("mnist", tmp_path)[0].images is first[0].images
    labels = raw / "t10k-labels-idx1-ubyte"
    os.utime(labels, (1, 1))
    again = load("mnist", tmp_path)
    assert again[0].images is not first[0].images
    assert torch.equal(again[1].labels, first[1].labels)
