"""On a GPU: `scripts/test -m gpu`. Everything else runs without one."""

import copy
import signal
from contextlib import nullcontext

import pytest
import pytorch_lightning as pl
import torch
from conftest import NETWORK, QUICK, STEPS, equal, metrics, said, same, weights
from pytorch_lightning.callbacks import BaseFinetuning, EMAWeightAveraging, ModelPruning

from mnist_cnn import ConvNet, DigitClassifier, MNISTDataModule, load_classifier
from mnist_cnn.config.schema import UserError
from mnist_cnn.models.device import check_precision

pytestmark = pytest.mark.gpu

CUDA = ("data=digits", "plots=false", "accelerator=cuda", *NETWORK)
EXACT = (*CUDA, "trainer.deterministic=true")
SMALL = {"blocks": [{"filters": 4, "kernel": 5, "pool": 4}], "dense": [16]}
DOUBLE = {
    "precision": "64-true",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def trained(run, *words):
    ended = run("mnist-train", *words)
    assert ended.status == 0, ended
    return ended.folder()


def by_trainer(*callbacks, accelerator="gpu", kind=DigitClassifier, **flags):
    """The weights, on the CPU, that a plain Trainer leaves, and the module.

    In float64: in float32, what a CPU rounds otherwise decides in one of three runs which pixel a pooling takes.
    """
    torch.manual_seed(1)
    module = kind(ConvNet(SMALL), lambda weights: torch.optim.SGD(weights, lr=0.05))
    flags = {"max_epochs": 2, **DOUBLE, **flags}
    trainer = pl.Trainer(accelerator=accelerator, devices=1, callbacks=[*callbacks], **flags)
    trainer.fit(module, datamodule=MNISTDataModule("digits"))
    return {name: value.cpu() for name, value in module.state_dict().items()}, module


def close(first, second):
    return all(torch.allclose(value, second[name], atol=1e-9) for name, value in first.items())


def test_a_gpu_finds_the_weights_that_a_cpu_finds():
    gpu, module = by_trainer()
    cpu, other = by_trainer(accelerator="cpu")
    assert close(gpu, cpu)
    for row, theirs in zip(module.history, other.history, strict=True):
        assert row["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-9)
        assert row["train/accuracy"] == pytest.approx(theirs["train/accuracy"], abs=1e-9)
        assert row["val/loss"] == pytest.approx(theirs["val/loss"], abs=1e-9)


@pytest.mark.parametrize("flags", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}])
def test_what_trainer_does_with_gradients_it_does_with_those_of_a_graph(flags):
    assert close(by_trainer(**flags)[0], by_trainer(accelerator="cpu", **flags)[0])


class Thaw(BaseFinetuning):
    """The blocks train from the second epoch on."""

    def freeze_before_training(self, module):
        self.freeze(module.network.blocks)

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.network.blocks, optimizer)


def pruning():
    # By default it sets the weights back to the first ones, which on a CPU are those that train: it has no copy.
    return ModelPruning("l1_unstructured", amount=0.3, use_lottery_ticket_hypothesis=False)


@pytest.mark.parametrize("callback", [lambda: EMAWeightAveraging(decay=0.9), pruning])
def test_a_callback_may_change_weights_and_layers(callback):
    gpu, cpu = (by_trainer(callback(), accelerator=name, max_epochs=4)[0] for name in ("gpu", "cpu"))
    assert close(gpu, cpu)
    assert not close(gpu, by_trainer(max_epochs=4)[0])


class Changes(pl.Callback):
    """Another smoothing and another last layer from the second epoch on; it copies the module, too."""

    def on_train_epoch_start(self, trainer, module):
        copy.deepcopy(module)
        if trainer.current_epoch == 1:
            module.label_smoothing = 0.3
            with torch.no_grad():
                module.network.logits.weight.data = module.network.logits.weight / 2


class Interrupts(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if index == STEPS // 2:
            raise RuntimeError("stopped")


def test_what_a_callback_changes_is_seen_at_the_next_epoch():
    gpu, cpu = (by_trainer(Changes(), accelerator=name)[0] for name in ("gpu", "cpu"))
    assert close(gpu, cpu)
    assert not close(gpu, by_trainer()[0])


def interrupted_and_fitted_again(accelerator):
    torch.manual_seed(1)
    module = DigitClassifier(ConvNet(SMALL), lambda weights: torch.optim.SGD(weights, lr=0.05))
    for callbacks in ([Interrupts()], []):
        trainer = pl.Trainer(accelerator=accelerator, devices=1, max_epochs=2, callbacks=callbacks, **DOUBLE)
        with pytest.raises(RuntimeError, match="stopped") if callbacks else nullcontext():
            trainer.fit(module, datamodule=MNISTDataModule("digits"))
    return {name: value.cpu() for name, value in module.state_dict().items()}


def test_a_fit_after_one_that_an_error_ended():
    assert close(interrupted_and_fitted_again("gpu"), interrupted_and_fitted_again("cpu"))


class Twice(DigitClassifier):
    """A step of the user's own."""

    def training_step(self, batch, batch_idx):
        return 2 * super().training_step(batch, batch_idx)


def test_a_subclass_may_have_its_own_step():
    assert close(by_trainer(kind=Twice)[0], by_trainer(kind=Twice, accelerator="cpu")[0])
    assert not close(by_trainer(kind=Twice)[0], by_trainer()[0])


def test_a_callback_may_free_weights_while_a_run_goes_on():
    gpu, cpu = by_trainer(Thaw())[0], by_trainer(Thaw(), accelerator="cpu")[0]
    assert close(gpu, cpu)
    torch.manual_seed(1)
    assert not gpu["network.blocks.0.0.weight"].equal(ConvNet(SMALL).blocks[0][0].weight)


def test_the_same_run_twice_gives_the_same_bits(run):
    first, second = (weights(trained(run, *EXACT, "epochs=2") / "checkpoints" / "last.ckpt") for _ in range(2))
    assert same(first, second)


@pytest.mark.parametrize("step", [STEPS // 2, STEPS + 3])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(run, signalled, step):
    whole = trained(run, *EXACT, "epochs=3", "seed=5")
    signalled(signal.SIGTERM, step, DigitClassifier, "on_train_batch_start")  # a graph calls no backward
    stopped = run("mnist-train", *EXACT, "epochs=3", "seed=5", "hydra.run.dir=stopped")
    assert stopped.status == 128 + signal.SIGTERM, stopped
    trained(run, "resume=stopped")
    equal(whole, whole.parents[2] / "stopped")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_each_precision_learns(run, precision):
    folder = trained(run, *QUICK, "accelerator=cuda", "epochs=5", f"accelerator.precision={precision}")
    assert metrics(folder)["test/accuracy"] > 0.8


def test_a_checkpoint_moves_between_devices(run):
    on_gpu = trained(run, *CUDA, "epochs=2")
    images = MNISTDataModule("digits")
    images.setup()
    cpu, gpu = (load_classifier(on_gpu, device).logits(images.test.images) for device in ("cpu", "cuda"))
    assert torch.allclose(cpu, gpu, atol=1e-3)
    further = trained(run, "data=digits", "plots=false", "accelerator=cpu", "epochs=1", f"initialize={on_gpu}")
    back = trained(run, "data=digits", "plots=false", "accelerator=cuda", "epochs=1", f"initialize={further}")
    assert metrics(back)["test/accuracy"] > 0.5


def test_a_loss_that_is_not_finite_is_said_within_the_epoch(run):
    said(run("mnist-train", *CUDA, "optimizer=sgd", "optimizer.lr=1e30", "epochs=5"), "not finite", status=1)


def test_bfloat16_is_refused_where_it_would_be_emulated(monkeypatch):
    check_precision("bf16-mixed", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(UserError, match="this GPU has no bfloat16"):
        check_precision("bf16-mixed", torch.device("cuda"))


def test_more_devices_than_there_are(run):
    said(run("mnist-train", *CUDA, f"accelerator.devices={torch.cuda.device_count() + 1}"), "CUDA devices")


def test_the_blocks_may_be_frozen(run):
    first = trained(run, *CUDA, "epochs=1")
    again = trained(
        run, "data=digits", "plots=false", "accelerator=cuda", "epochs=1", "freeze=blocks", f"initialize={first}"
    )
    before, after = (weights(folder / "checkpoints" / "last.ckpt") for folder in (first, again))
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed
    assert not any("blocks" in name for name in changed)


@pytest.mark.parametrize("batches", [2, 1])  # a step of several batches has no graph
@pytest.mark.parametrize("augmentation", ["affine", "robust"])
def test_augmentation_draws_on_the_gpu(run, augmentation, batches):
    words = (f"augmentation={augmentation}", f"trainer.accumulate_grad_batches={batches}", "epochs=3")
    assert metrics(trained(run, *CUDA, *words))["test/accuracy"] > 0.15
