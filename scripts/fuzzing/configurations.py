"""Command lines of mnist-train, most of their words right: each must be taken, or end as a user error."""

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import hypothesis.strategies as st

import mnist_cnn
from fuzzing.outcome import DIGITS, refusal_allowed
from mnist_cnn.training import fit
from mnist_cnn.training.signals import StopRequest

odd_numbers = st.sampled_from(
    [0, 1, -1, 2, 3, 7, 28, 29, 64, 1024, 4096, 65536, 10**9, 2**63, 0.5, 0.1, -0.5, 1.0, 1e-3, 1e-30, 1e30]
)
odd_words = st.sampled_from(
    ["null", "true", "false", "nan", "inf", "-inf", "", "''", "abc", "[]", "{}", "[1,2]", "{a:1}", "???", "1e400", "é"]
) | st.sampled_from(
    ["0x10", "$", "${", "\\'", "${seed}", "${nowhere}", "${architecture}", "${oc.env:HOME}", "${oc.env:NOWHERE}"]
)
odd_text = st.text("=[]{}:,'\"\\$()~+@!?*#%;|<> \t\nab01.-_/é数", max_size=12)
values = st.one_of(odd_numbers.map(str), odd_words, odd_text)


def hydra_literal(value):
    """As Hydra's grammar writes it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{hydra_literal(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(hydra_literal, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


sizes = st.integers(1, 9) | odd_numbers
blocks = st.lists(
    st.fixed_dictionaries(
        {"filters": st.integers(1, 40) | odd_numbers, "kernel": st.sampled_from([1, 3, 5, 3, 5]) | sizes},
        optional={
            "stride": st.sampled_from([1, 2]) | sizes,
            "padding": st.sampled_from([0, 1, 2]) | sizes,
            "pool": st.sampled_from([None, 2, 3]) | sizes,
            "batch_norm": st.booleans(),
            "bias": st.booleans(),
            "dropout": st.sampled_from([0.0, 0.25, 0.5]) | odd_numbers,
        },
    )
    | st.sampled_from([3, None, "x", {}, {"filter": 3, "kernel": 3}, []]),
    max_size=5,
)
dense = st.lists(
    st.integers(1, 200) | odd_numbers | st.fixed_dictionaries({"units": sizes}, optional={"dropout": odd_numbers}),
    max_size=4,
)
GROUPS = {
    "architecture": ["conv30_70", "conv32_32_dropout", "conv64_128", "conv10", "conv32_64_64", "mlp"],
    "optimizer": ["adam", "adamw", "sgd", "rmsprop", "adadelta", "keras_adam", "keras_rmsprop", "muon"],
    "schedule": ["constant", "onecycle", "cosine", "exponential", "linear"],
    "augmentation": ["none", "affine"],
    "accelerator": ["auto", "cpu", "cuda"],
    "data": ["digits", "mnist", "fashion_mnist", "kmnist", "as_trained"],
    "logger": ["csv", "tensorboard", "null"],
    "callbacks": ["none", "early_stopping"],
    "experiment": ["conv10", "conv30_70", "conv64_128", "mlp", "null"],
}
KEYS = ["seed", "epochs", "selection", "initialize", "freeze", "plots", "architecture", "architecture.blocks"]
KEYS += ["architecture.dense", "architecture.initialization", "architecture.blocks.0.filters", "optimizer", "schedule"]
KEYS += ["optimizer.lr", "optimizer.betas", "optimizer.eps", "optimizer.weight_decay", "optimizer.momentum"]
KEYS += ["schedule.interval", "schedule.length", "schedule.scheduler", "schedule.scheduler.gamma"]
KEYS += ["schedule.scheduler.pct_start", "schedule.scheduler.max_lr", "schedule.scheduler.factor", "accelerator.name"]
KEYS += ["accelerator.precision", "accelerator.threads", "data.batch_size", "data.validation", "data.validation_from"]
KEYS += ["data.normalization", "data.name", "logger", "resume", "augmentation", "augmentation.shift", "label_smoothing"]
KEYS += ["ema_decay", "tta", "optimizer.lr_rest", "optimizer.ns_steps", "schedule.scheduler.warmup"]
KEYS += ["trainer", "trainer.gradient_clip_val", "trainer.limit_train_batches", "trainer.max_time", "trainer.max_steps"]
KEYS += ["trainer.val_check_interval", "trainer.profiler", "callbacks", "callbacks.early_stopping.monitor"]
GOOD = {
    "seed": st.integers(0, 9).map(str),
    "epochs": st.integers(1, 9).map(str),
    "selection": st.sampled_from(["best", "last"]),
    "freeze": st.sampled_from(["blocks", "null"]),
    "plots": st.sampled_from(["true", "false"]),
    "optimizer.lr": st.sampled_from(["0.1", "0.001", "1e-5", "1"]),
    "data.batch_size": st.integers(1, 600).map(str),
    "data.validation": st.sampled_from(["0", "0.1", "0.5", "100", "1436"]),
    "data.validation_from": st.sampled_from(["last", "random"]),
    "data.normalization": st.sampled_from(["unit", "standard"]),
    "accelerator.precision": st.sampled_from(["32-true", "bf16-mixed", "16-mixed"]),
    "accelerator.threads": st.sampled_from(["1", "2", "null"]),
    "augmentation.rotation": st.sampled_from(["0", "10", "180"]),
    "label_smoothing": st.sampled_from(["0", "0.1"]),
    "ema_decay": st.sampled_from(["0", "0.99"]),
    "tta": st.sampled_from(["1", "5", "9"]),
}
TARGETS = ["torch.optim.Adam", "torch.optim.LBFGS", "torch.optim.NAdam", "torch.optim.Nothing", "torch.nowhere.X", "x"]
TARGETS += ["torch.optim.lr_scheduler.StepLR", "torch.optim.lr_scheduler.ReduceLROnPlateau", "torch.nn.Linear", ""]


@st.composite
def overrides(draw):
    """One to six words of a command line of mnist-train, most of them right, so that the later checks are reached."""
    words = []
    for kind in draw(st.lists(st.integers(0, 19), min_size=1, max_size=6)):
        if kind < 7:
            group = draw(st.sampled_from(sorted(GROUPS)))
            words.append(f"{group}={draw(st.sampled_from(GROUPS[group]))}")
        elif kind < 13:
            key = draw(st.sampled_from(sorted(GOOD)))
            words.append(f"{key}={draw(GOOD[key])}")
        elif kind == 13:
            words.append(f"architecture.blocks={hydra_literal(draw(blocks))}")
        elif kind == 14:
            words.append(f"architecture.dense={hydra_literal(draw(dense))}")
        elif kind == 15:
            key = draw(st.sampled_from(["optimizer", "schedule.scheduler", "logger"]))
            words.append(f"{key}._target_={draw(st.sampled_from(TARGETS))}")
        elif kind == 16:
            group = draw(st.sampled_from(sorted(GROUPS)))
            words.append(draw(st.sampled_from(["", "+", "~"])) + f"{group}={draw(values)}")
        elif kind == 17:
            sign = draw(st.sampled_from(["", "+", "~", "++"]))
            words.append(f"{sign}{draw(st.sampled_from(KEYS))}={draw(values)}")
        elif kind == 18:
            words.append(
                f"+{draw(st.sampled_from(KEYS))}.{draw(st.sampled_from(['x', 'lr', 'steps', '0']))}={draw(values)}"
            )
        else:
            words.append(draw(odd_text))
    return [word for word in words if not word.startswith(("hydra", "+hydra"))]


def prepare_only(config, folder, words, choices, **_):
    """Instead of a fit: all that is made before the first step, and a small network's logits of one digit."""
    data = fit.MNISTDataModule(**config.data.model_dump(), seed=config.seed)
    data.setup()
    network, config = fit.first_network(config, data, words, False)
    fit.module_for(config, network)
    device = fit.find_device(config.accelerator.name)
    fit.check_precision(config.accelerator.precision, device)
    fit.trainer_for(config, folder, device, StopRequest(), True, (), True)
    if sum(layer.parameters for layer in config.architecture.layers()) < 10**6:
        assert network.eval()(data.train.images[:1]).shape == (1, len(data.classes))
    return {}


def configuration(words):
    """Compose, validate and build what `words` say, as `mnist_cnn.train` does."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as patched:
        os.chdir(folder)
        patched.callback(os.chdir, here)
        patched.enter_context(patch.object(fit, "fit", prepare_only))
        patched.enter_context(patch("mnist_cnn.data.datamodule.load", lambda *_: DIGITS))
        refusal_allowed(lambda: mnist_cnn.train(words))
