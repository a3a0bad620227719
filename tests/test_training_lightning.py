"""Lightning's own ways: a plain `pl.Trainer` with each of its habits, and the same by `trainer.…` and `callbacks`."""

import csv
import inspect
import time
from datetime import timedelta

import pytest
import pytorch_lightning as pl
import torch
import yaml
from conftest import CONF, NETWORK, QUICK, STEPS, metrics, said, same, weights
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from mnist_cnn import ConvNet, DigitClassifier, MNISTDataModule, load_classifier
from mnist_cnn.config.settings import OWNED_TRAINER_KEYS

SMALL = {"blocks": [{"filters": 4, "kernel": 5, "pool": 4}], "dense": [16]}
SILENT = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture
def trainer(tmp_path):
    def make(**flags):
        return pl.Trainer(**{"accelerator": "cpu", "default_root_dir": tmp_path, "max_epochs": 1, **SILENT, **flags})

    return make


def digits(**settings):
    return MNISTDataModule("digits", **settings)


def classifier(optimizer=torch.optim.Adam, network=SMALL, **settings):
    torch.manual_seed(1)
    return DigitClassifier(ConvNet(network), optimizer, **settings)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


def apart(first, second):
    """The distance between two networks' weights."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return sum((a - b).square().sum() for a, b in pairs).sqrt().item()


class Seen(pl.Callback):
    """The labels of each training batch, by epoch."""

    def __init__(self):
        self.labels = {}

    def on_train_batch_start(self, trainer, module, batch, index):
        self.labels.setdefault(trainer.current_epoch, []).append(batch[1].tolist())


def test_fit_validate_test_and_predict(trainer):
    data, module = digits(), classifier()
    ours = trainer(max_epochs=3)
    ours.fit(module, data)
    names = {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "learning_rate"}
    assert names <= ours.callback_metrics.keys()
    assert ours.callback_metrics["learning_rate"] == pytest.approx(0.001)
    assert [(row["epoch"], row["step"]) for row in module.history] == [(1, STEPS), (2, 2 * STEPS), (3, 3 * STEPS)]
    assert module.history[2]["train/loss"] < module.history[0]["train/loss"]
    for part, scored in (("validation", ours.validate), ("test", ours.test)):
        (figures,) = scored(module, data, verbose=False)
        images, labels = getattr(data, part)
        logits = module.network.eval()(images)
        name = "val" if part == "validation" else part
        assert figures[f"{name}/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
        right = (logits.argmax(1) == labels).double().mean().item()
        assert figures[f"{name}/accuracy"] == pytest.approx(right)
        assert right > 0.3
    predicted = torch.cat(ours.predict(module, data))
    assert torch.allclose(predicted, logits.softmax(1), atol=1e-6)
    assert torch.equal(predicted, torch.cat(ours.predict(module, DataLoader(data.test.images, batch_size=100))))


def test_the_figures_of_training_are_those_of_its_batches(trainer):
    """With a learning rate of nothing an epoch's figures are those of all its digits."""
    data, module = digits(), classifier(lambda parameters: torch.optim.SGD(parameters, lr=1e-30))
    trainer().fit(module, data)
    logits = module.network(data.train.images)
    (row,) = module.history
    assert row["train/loss"] == pytest.approx(F.cross_entropy(logits, data.train.labels).item(), rel=1e-5)
    assert row["train/accuracy"] == pytest.approx((logits.argmax(1) == data.train.labels).double().mean().item())


def test_any_loader_will_do(trainer):
    data = digits()
    data.setup()
    module = classifier(scheduler=torch.optim.lr_scheduler.LinearLR, interval="step", length="total_iters")
    ours = trainer(max_epochs=2)
    ours.fit(module, DataLoader(TensorDataset(*data.train), batch_size=64, shuffle=True))
    assert ours.global_step == ours.lr_scheduler_configs[0].scheduler.total_iters == 2 * STEPS
    assert module.history[1]["train/loss"] < module.history[0]["train/loss"]


def test_gradient_clip_val_bounds_the_norm(trainer):
    moved = {}
    for clip in (None, 0.01):
        module = classifier(lambda parameters: torch.optim.SGD(parameters, lr=1.0))
        trainer(max_steps=1, gradient_clip_val=clip).fit(module, digits())
        moved[clip] = apart(module.network, classifier().network)
    assert moved[None] > 0.1
    assert moved[0.01] == pytest.approx(0.01, rel=1e-3)


def test_accumulated_gradients_are_those_of_the_large_batch(trainer):
    large, small = classifier(sgd), classifier(sgd)
    trainer(max_epochs=2, limit_train_batches=20).fit(large, digits(batch_size=64))
    ours = trainer(max_epochs=2, limit_train_batches=80, accumulate_grad_batches=4)
    ours.fit(small, digits(batch_size=16))
    assert ours.global_step == 40
    assert apart(large.network, classifier().network) > 0.1
    assert apart(large.network, small.network) < 1e-5
    for one, other in zip(large.history, small.history, strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], abs=1e-5)


def test_an_epochs_last_few_accumulated_batches_are_a_step_too(trainer):
    ours = trainer(max_epochs=2, accumulate_grad_batches=4)
    module = classifier(sgd, scheduler=torch.optim.lr_scheduler.LinearLR, interval="step", length="total_iters")
    ours.fit(module, digits())
    assert ours.global_step == ours.lr_scheduler_configs[0].scheduler.total_iters == 2 * 6  # of 21 batches


def test_fast_dev_run_is_one_batch_that_leaves_nothing(trainer, tmp_path):
    ours = trainer(max_epochs=None, fast_dev_run=True, enable_checkpointing=True)
    ours.fit(classifier(), digits())
    assert ours.global_step == 1
    assert "val/accuracy" in ours.callback_metrics
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(("limit", "steps"), [(5, 5), (0.1, 2), (1.0, STEPS), (1000, STEPS)])
def test_limit_train_batches(trainer, limit, steps):
    module = classifier(scheduler=torch.optim.lr_scheduler.LinearLR, interval="step", length="total_iters")
    ours = trainer(limit_train_batches=limit, max_epochs=2)
    ours.fit(module, digits())
    assert ours.global_step == ours.lr_scheduler_configs[0].scheduler.total_iters == 2 * steps


def test_overfit_batches_are_the_same_digits_each_epoch(trainer):
    seen, others = Seen(), Seen()
    module = classifier(lambda parameters: torch.optim.Adam(parameters, lr=0.01))
    trainer(overfit_batches=2, max_epochs=30, callbacks=[seen]).fit(module, digits())
    assert [len(batches) for batches in seen.labels.values()] == [2] * 30
    assert all(batches == seen.labels[0] for batches in seen.labels.values())
    assert module.history[-1]["train/accuracy"] > 0.95
    trainer(max_epochs=2, callbacks=[others]).fit(classifier(), digits())
    assert others.labels[0] != others.labels[1]


def test_max_time_ends_it(trainer):
    before = time.monotonic()
    ours = trainer(max_epochs=100_000, max_time=timedelta(seconds=0.5))
    ours.fit(classifier(), digits())
    assert 0 < ours.global_step < 100_000 * STEPS
    assert time.monotonic() - before < 60


def test_max_steps_ends_it(trainer):
    ours = trainer(max_epochs=100, max_steps=STEPS + 7)
    module = classifier(scheduler=torch.optim.lr_scheduler.LinearLR, interval="step", length="total_iters")
    ours.fit(module, digits())
    assert ours.global_step == ours.lr_scheduler_configs[0].scheduler.total_iters == STEPS + 7
    assert [row["step"] for row in module.history] == [STEPS, STEPS + 7]


@pytest.mark.parametrize("interval", [0.25, 5])
def test_val_check_interval_validates_within_the_epoch(trainer, interval):
    class Counted(pl.Callback):
        validations = 0

        def on_validation_epoch_end(self, trainer, module):
            self.validations += not trainer.sanity_checking
            assert module.network.training is False

    counted, module = Counted(), classifier()
    trainer(val_check_interval=interval, max_epochs=2, callbacks=[counted]).fit(module, digits())
    assert counted.validations == 2 * 4
    assert len(module.history) == 2
    plain = classifier()
    trainer(max_epochs=2).fit(plain, digits())
    assert same(plain.state_dict(), module.state_dict())


def test_early_stopping_by_validation_accuracy(trainer):
    module = classifier(lambda parameters: torch.optim.SGD(parameters, lr=1e-30))
    stopping = EarlyStopping("val/accuracy", mode="max", patience=2)
    trainer(max_epochs=50, callbacks=[stopping]).fit(module, digits())
    assert len(module.history) == 3
    assert stopping.best_score.item() == pytest.approx(module.history[0]["val/accuracy"])


def test_a_logger_gets_the_figures_and_the_learning_rate(trainer, tmp_path):
    logger = CSVLogger(tmp_path, "csv", "0")
    ours = trainer(max_epochs=2, logger=logger, callbacks=[LearningRateMonitor("step")], log_every_n_steps=5)
    ours.fit(classifier(scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)), digits())
    rows = list(csv.DictReader((tmp_path / "csv" / "0" / "metrics.csv").open()))
    for name in ("train/loss", "train/accuracy", "val/loss", "val/accuracy"):
        assert len([row for row in rows if row[name]]) == 2, name
    assert [float(row["learning_rate"]) for row in rows if row["learning_rate"]] == pytest.approx([0.001, 0.0005])
    assert [float(row["lr-Adam"]) for row in rows if row["lr-Adam"]] == pytest.approx([0.001] * 4 + [0.0005] * 4)


def test_model_checkpoint_writes_what_load_classifier_takes(trainer, tmp_path):
    keeping = ModelCheckpoint(tmp_path / "kept", monitor="val/accuracy", mode="max", save_top_k=1)
    data, module = digits(normalization="standard"), None
    data.setup()
    torch.manual_seed(1)
    module = DigitClassifier(ConvNet(SMALL, mean=data.mean, std=data.std))
    trainer(max_epochs=3, enable_checkpointing=True, callbacks=[keeping]).fit(module, data)
    loaded = load_classifier(keeping.best_model_path)
    assert loaded.description.data.name == "digits"
    assert loaded.description.data.normalization == "standard"
    best = max(row["val/accuracy"] for row in module.history)
    assert loaded.description.history[-1]["val/accuracy"] == pytest.approx(best) == keeping.best_model_score
    accuracy = (loaded.logits(data.validation.images).argmax(1) == data.validation.labels).double().mean().item()
    assert accuracy == pytest.approx(best)
    again = DigitClassifier.load_from_checkpoint(keeping.best_model_path)
    (figures,) = trainer().validate(again, data, verbose=False)
    assert figures["val/accuracy"] == pytest.approx(best)


def test_a_plain_trainer_goes_on_within_an_epoch_to_the_same_bits(trainer, tmp_path):
    network = {"blocks": [{"filters": 4, "kernel": 5, "pool": 4, "dropout": 0.25}], "dense": [16]}
    settings = {"scheduler": torch.optim.lr_scheduler.LinearLR, "interval": "step", "length": "total_iters"}
    keeping = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=STEPS // 2, save_top_k=-1)
    whole = classifier(network=network, **settings)
    trainer(max_epochs=2, enable_checkpointing=True, callbacks=[keeping]).fit(whole, digits())
    file = tmp_path / "kept" / f"step={STEPS // 2}.ckpt"
    again = classifier(network=network, **settings)
    trainer(max_epochs=2).fit(again, digits(), ckpt_path=file, weights_only=True)
    assert same(whole.state_dict(), again.state_dict())
    for one, other in zip(whole.history, again.history, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_bfloat16_trains(trainer):
    module = classifier(lambda parameters: torch.optim.Adam(parameters, lr=0.01))
    trainer(max_epochs=2, precision="bf16-mixed").fit(module, digits())
    assert module.history[1]["train/loss"] < module.history[0]["train/loss"]
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_a_compiled_module_trains_to_the_same_weights(trainer):
    plain, compiled = classifier(), classifier()
    trainer(max_epochs=2).fit(plain, digits())
    trainer(max_epochs=2).fit(torch.compile(compiled, backend="eager"), digits())
    assert len(compiled.history) == 2
    assert compiled.history[1]["train/loss"] == pytest.approx(plain.history[1]["train/loss"], abs=1e-5)
    assert apart(plain.network, compiled.network) < 1e-5


# --- by the command ------------------------------------------------------------------------------------------

SETTINGS = ("data=digits", "data.batch_size=64", "plots=false", *NETWORK)


def test_trainer_flags_reach_the_trainer(run, trained):
    """A step of SGD at a rate of 1 moves the weights by the norm of the gradient, which is clipped."""
    words = (*QUICK[:3], f"initialize={trained}", "data.batch_size=1437", "optimizer=sgd", "optimizer.lr=1")
    ended = run("mnist-train", *words, "epochs=1", "trainer.gradient_clip_val=0.001", "trainer.max_steps=1")
    assert (ended.status, ended.err) == (0, "")
    before, after = weights(trained), weights(ended.folder())
    moved = sum((before[name] - after[name]).square().sum() for name in before).sqrt().item()
    assert moved == pytest.approx(0.001, rel=1e-2)


def test_limits_of_batches_and_accumulation(run):
    folder = run("mnist-train", *SETTINGS, "epochs=2", "trainer.limit_train_batches=0.2").folder()
    assert [row["step"] for row in csv.DictReader((folder / "metrics.csv").open())] == ["4", "8"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["limit_train_batches"] == 0.2
    folder = run("mnist-train", *SETTINGS, "epochs=1", "trainer.accumulate_grad_batches=10").folder()
    assert [row["step"] for row in csv.DictReader((folder / "metrics.csv").open())] == ["3"]


def test_a_fast_dev_run_keeps_nothing(run):
    for words in ((), ("-m", "seed=1,2")):
        ended = run("mnist-train", *SETTINGS, "trainer.fast_dev_run=true", *words)
        assert (ended.status, ended.err) == (0, "")
        assert "nothing was kept" in ended.out


def test_early_stopping_ends_a_run(run):
    words = ("optimizer=sgd", "optimizer.lr=1e-30", "epochs=50", "callbacks=early_stopping")
    ended = run("mnist-train", *SETTINGS, *words, "callbacks.early_stopping.patience=2")
    assert (ended.status, ended.err) == (0, "")
    assert metrics(ended.folder())["epochs"] == 3
    assert metrics(ended.folder())["tested_epoch"] == 3  # of equal ones the last


class Counted(pl.Callback):
    steps = 0

    def __init__(self, words):
        self.words = words

    def on_train_batch_end(self, *_):
        Counted.steps += 1

    def on_train_end(self, *_):
        print(self.words)


def test_a_users_own_callbacks(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Counted, "steps", 0)
    own = tmp_path / "mine" / "callbacks"
    own.mkdir(parents=True)
    (own / "counted.yaml").write_text("mine:\n  _target_: test_training_lightning.Counted\n  words: counted them\n")
    ended = run("mnist-train", "--config-dir", "mine", *SETTINGS, "epochs=2", "callbacks=counted")
    assert (ended.status, ended.err) == (0, "")
    assert Counted.steps == 2 * STEPS
    assert "counted them\n" in ended.out
    (own / "wrong.yaml").write_text("mine:\n  _target_: test_training_lightning.Counted\n  word: 1\n")
    said(run("mnist-train", "--config-dir", "mine", *SETTINGS, "callbacks=wrong"), "callbacks.mine", "Counted", "word")


@pytest.mark.parametrize("key", OWNED_TRAINER_KEYS)
def test_what_the_run_owns_is_refused_with_the_key_to_use(run, tmp_path, key):
    for word in (f"trainer.{key}=1", f"+trainer.{key}=1"):
        said(run("mnist-train", *SETTINGS, word), f"trainer.{key} is set by the run itself; {OWNED_TRAINER_KEYS[key]}")
    assert not list(tmp_path.rglob("*.*"))


def test_every_flag_of_the_trainer_is_the_users_or_the_runs():
    users = yaml.safe_load((CONF / "trainer" / "default.yaml").read_text())
    flags = inspect.signature(pl.Trainer).parameters
    assert users.keys() | OWNED_TRAINER_KEYS.keys() == flags.keys()
    assert not users.keys() & OWNED_TRAINER_KEYS.keys()
    differing = {key for key, value in users.items() if value != flags[key].default}
    assert differing <= {"num_sanity_val_steps", "log_every_n_steps", "inference_mode", "accumulate_grad_batches"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trainer.gradient_clip_value=1"], ["trainer.gradient_clip_value", "did you mean trainer.gradient_clip_val"]),
        (["trainer.limit_train_batches=-1"], ["trainer", "limit_train_batches", "-1"]),
        (["trainer.gradient_clip_algorithm=no"], ["trainer", "gradient_clip_algorithm", "no"]),
        (["trainer.profiler=nothing"], ["trainer", "profiler", "simple"]),
        (["+trainer.max_epoch=3"], ["trainer", "max_epoch"]),
        (["callbacks=early_stopping", "data.validation=0"], ["callbacks.early_stopping.monitor=val/accuracy"]),
        (
            ["callbacks=early_stopping", "callbacks.early_stopping.monitor=val/accurracy"],
            ["callbacks.early_stopping.monitor=val/accurracy", "did you mean val/accuracy"],
        ),
        (["+callbacks.mine={_target_:torch.nn.ReLU}"], ["callbacks.mine", "ReLU is no callback"]),
    ],
)
def test_flags_that_lightning_refuses_are_one_line(run, words, expected):
    said(run("mnist-train", *SETTINGS, *words), *expected)
