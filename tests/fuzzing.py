"""Generated configurations and mutated files: each is taken, or ends as a user error, soon and in little memory.

tests/test_fuzzing.py runs a share of them, scripts/fuzz as many as wanted.
"""

import gc
import io
import logging
import multiprocessing
import os
import resource
import struct
import tempfile
import threading
import time
import traceback
import warnings
import zipfile
import zlib
from contextlib import ExitStack
from functools import cache
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import hypothesis
import hypothesis.strategies as st
import torch
from PIL import Image

import mnist_cnn
from mnist_cnn.config.schema import UserError
from mnist_cnn.data import datasets
from mnist_cnn.inference.classifier import load_classifier
from mnist_cnn.inference.digit_image import mnist_form
from mnist_cnn.inference.image_files import read_picture, sources
from mnist_cnn.training import fit, parts

SECONDS, MEBIBYTES = 2, 500
DIGITS = datasets.load("digits", "")


# --- configurations ----------------------------------------------------------------------------------------

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


def shown(value):
    """As Hydra's grammar writes it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{shown(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(shown, value)) + "]"
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
    "experiment": ["conv10", "conv30_70", "conv64_128", "mlp", "null"],
}
KEYS = ["seed", "epochs", "selection", "initialize", "freeze", "plots", "architecture", "architecture.blocks"]
KEYS += ["architecture.dense", "architecture.initialization", "architecture.blocks.0.filters", "optimizer", "schedule"]
KEYS += ["optimizer.lr", "optimizer.betas", "optimizer.eps", "optimizer.weight_decay", "optimizer.momentum"]
KEYS += ["schedule.interval", "schedule.length", "schedule.scheduler", "schedule.scheduler.gamma"]
KEYS += ["schedule.scheduler.pct_start", "schedule.scheduler.max_lr", "schedule.scheduler.factor", "accelerator.name"]
KEYS += ["accelerator.precision", "accelerator.threads", "data.batch_size", "data.validation", "data.validation_from"]
KEYS += ["data.normalization", "data.name", "logger", "resume", "augmentation", "augmentation.shift", "label_smoothing"]
KEYS += ["averaging", "views", "optimizer.lr_rest", "optimizer.ns_steps", "schedule.scheduler.warmup"]
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
    "averaging": st.sampled_from(["0", "0.9"]),
    "views": st.sampled_from(["1", "5", "9"]),
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
            words.append(f"architecture.blocks={shown(draw(blocks))}")
        elif kind == 14:
            words.append(f"architecture.dense={shown(draw(dense))}")
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


def built(config, folder, words, choices):
    """In place of a fit: all that is made before the first step, and one step's forward of a small network."""
    data = fit.MNISTDataModule(**config.data.model_dump(), seed=config.seed)
    data.setup()
    network, config = parts.first_network(config, data, words, False)
    parts.classifier_for(config, network, data, folder, None)
    fit.check_precision(config.accelerator.precision, fit.find_device(config.accelerator.name))
    if sum(layer.parameters for layer in config.architecture.layers()) < 10**6:
        assert network.eval()(data.train.images[:1]).shape == (1, len(data.classes))
    return {}


def configuration(words):
    """The composition, validation and making of what `words` say, as `mnist_cnn.train` does it."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as patched:
        os.chdir(folder)
        patched.callback(os.chdir, here)
        patched.enter_context(patch.object(fit, "fit", built))
        patched.enter_context(patch("mnist_cnn.data.datamodule.load", lambda name, root: DIGITS))
        refused(lambda: mnist_cnn.train(words))


# --- files -------------------------------------------------------------------------------------------------


@st.composite
def mutations(draw):
    """Up to four changes of a file: what, where as a share of its length, and with what."""
    what = st.sampled_from(["flip", "set", "cut", "insert", "remove", "copy", "number"])
    return draw(st.lists(st.tuples(what, st.floats(0, 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4))


NUMBERS = [0, 1, 2, 127, 128, 255, 256, 32767, 65535, 2**24, 2**31 - 1, 2**31, 2**32 - 1]


def mutated(content, changes, spared=0):
    """Half of the changes are among the first 64 bytes after those `spared`, as that is where headers are."""
    content = bytearray(content)
    for what, where, extra in changes:
        at = int(2 * where * 64) if where < 0.5 else int((2 * where - 1) * len(content))
        at = min(at + spared, len(content))
        if what == "flip" and at < len(content):
            content[at] ^= 1 << extra[0] % 8
        elif what == "set":
            content[at : at + len(extra)] = extra
        elif what == "cut":
            del content[at:]
        elif what == "insert":
            content[at:at] = extra * (1 + extra[0])
        elif what == "remove":
            del content[at : at + extra[0]]
        elif what == "copy":
            content[at:at] = content[at : at + 16 * extra[0]]
        elif what == "number":
            order = ">" if extra[0] & 1 else "<"
            number = struct.pack(f"{order}I", NUMBERS[extra[0] // 2 % len(NUMBERS)])
            content[at : at + 4] = number if extra[-1] & 1 else number[2:] if order == ">" else number[:2]
    return bytes(content)


def idx(changes):
    """A mutated idx file as `images=` of mnist-predict, and as a file of a data folder."""
    images = DIGITS[1].images[:5, 0].numpy()
    content = mutated(struct.pack(">IIII", 0x803, *images.shape) + images.tobytes(), changes)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "MNIST" / "raw"
        raw.mkdir(parents=True)
        path = raw / "train-images-idx3-ubyte"
        path.write_bytes(content)
        for source in refused(lambda: list(islice(sources([str(path)]), 20))) or []:
            refused(lambda source=source: mnist_form(source.read()))
        with patch.dict(os.environ, {"MNIST_CNN_MIRRORS": "nowhere:"}):
            assert refused(lambda: datasets.load("mnist", folder)) is None


@cache
def whole_pictures():
    """A digit in every format and mode that are read."""
    digit = Image.fromarray(255 - DIGITS[1].images[0, 0].numpy()).resize((60, 60))
    kinds = [("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
    kinds += [("JPEG", "L", {}), ("JPEG", "RGB", {"progressive": True}), ("JPEG", "CMYK", {}), ("BMP", "RGB", {})]
    kinds += [("BMP", "P", {}), ("BMP", "1", {}), ("GIF", "P", {}), ("GIF", "L", {"transparency": 0})]
    kinds += [("TIFF", "L", {"compression": name}) for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits")]
    kinds += [("TIFF", "RGB", {"compression": "jpeg"}), ("TIFF", "1", {"compression": "group4"}), ("TIFF", "F", {})]
    kinds += [("WEBP", "RGB", {}), ("WEBP", "RGBA", {"lossless": True})]
    pictures = []
    for form, mode, options in kinds:
        exif = Image.Exif()
        exif[0x0112] = 6
        buffer = io.BytesIO()
        picture = digit.convert("I").convert("I;16") if mode == "I;16" else digit.convert(mode)
        picture.save(buffer, form, **options, **({"exif": exif} if form in ("JPEG", "PNG", "WEBP") else {}))
        pictures.append(buffer.getvalue())
    return pictures


def with_checksums(content):
    """A PNG whose chunks have right checksums again, so that their content is read."""
    at, fixed = 8, bytearray(content)
    while at + 12 <= len(fixed):
        (length,) = struct.unpack(">I", fixed[at : at + 4])
        if at + 12 + length > len(fixed):
            break
        fixed[at + 8 + length : at + 12 + length] = struct.pack(">I", zlib.crc32(fixed[at + 4 : at + 8 + length]))
        at += 12 + length
    return bytes(fixed)


def picture(arguments):
    number, changes, checked = arguments
    content = mutated(whole_pictures()[number % len(whole_pictures())], changes, spared=4)
    if checked and content.startswith(b"\x89PNG"):
        content = with_checksums(content)
    refused(lambda: mnist_form(read_picture(io.BytesIO(content))))


@cache
def checkpoint_content():
    """A checkpoint of a small network that trained for an epoch."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["data=digits", "epochs=1", "plots=false", "architecture.dense=[8]", f"hydra.run.dir={folder}/run"]
        mnist_cnn.train([*words, "architecture.blocks=[{filters:2,kernel:5,pool:4,batch_norm:true}]"])
        return (Path(folder) / "run" / "checkpoints" / "best.ckpt").read_bytes()


def repacked(content, number, changes):
    """A checkpoint one of whose records is mutated, with right checksums, so that torch reads it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        records = old.infolist()
        for index, record in enumerate(records):
            whole = old.read(record)
            new.writestr(record.filename, mutated(whole, changes) if index == number % len(records) else whole)
    return buffer.getvalue()


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(torch.zeros(3)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=5,
)


def replaced(content, path, value):
    """A checkpoint with `value` in place of something in it: each number of `path` chooses an entry on the way down."""
    whole = torch.load(io.BytesIO(content), weights_only=True)
    node = whole
    for depth, step in enumerate(path):
        keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
        if not keys:
            break
        # Most begin in the description or the weights: they are what is read.
        key = ["mnist_cnn", "state_dict"][step % 2] if depth == 0 and step % 5 else keys[step % len(keys)]
        if depth == len(path) - 1 or not isinstance(node[key], dict | list):
            node[key] = value
            break
        node = node[key]
    buffer = io.BytesIO()
    torch.save(whole, buffer)
    return buffer.getvalue()


def checkpoint(arguments):
    kind, number, changes, path, value = arguments
    content = checkpoint_content()
    if kind == "bytes":
        content = mutated(content, changes)
    elif kind == "record":
        content = repacked(content, number, changes)
    else:
        content = replaced(content, path, value)
    with tempfile.NamedTemporaryFile(suffix=".ckpt") as file:
        Path(file.name).write_bytes(content)
        classifier = refused(lambda: load_classifier(file.name, "cpu"))
        if classifier:
            assert classifier.probabilities(DIGITS[1].images[:1]).shape == (1, len(classifier.classes))


# --- how they are run --------------------------------------------------------------------------------------


def refused(work):
    """What `work` returns; None where it ends as a user error, whose message is one line."""
    message = None
    try:
        return work()
    except UserError as error:
        message = str(error)
    assert 0 < len(message) < 3000
    return None


PROPERTIES = {
    "configurations": (configuration, overrides()),
    "idx files": (idx, mutations()),
    "pictures": (picture, st.tuples(st.integers(0, 999), mutations(), st.booleans())),
    "checkpoints": (
        checkpoint,
        st.tuples(
            st.sampled_from(["bytes", "record", "record", "value", "value"]),
            st.integers(0, 99),
            mutations(),
            st.lists(st.integers(0, 99), min_size=1, max_size=6),
            junk,
        ),
    ),
}


def examine(what, count, seed):
    """Run a property `count` times; the processor's seconds of the slowest and the memory taken, in MiB."""
    torch.set_num_threads(1)
    check, strategy = PROPERTIES[what]
    slowest = 0.0
    whole_pictures(), checkpoint_content()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        print_blob=False,
    )
    @hypothesis.given(strategy)
    def each(example):
        nonlocal slowest
        for _ in range(3):  # a machine that stalls does not do so each time
            start = time.process_time()
            check(example)
            if (seconds := time.process_time() - start) < SECONDS:
                break
        slowest = max(slowest, seconds)
        assert seconds < SECONDS, f"{seconds:.1f} s"

    each()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEBIBYTES, f"{grown:.0f} MiB"
    return slowest, grown


def _worker(results, what, count, seed):
    gc.freeze()  # what the parent has made is not looked through again
    logging.disable()
    warnings.simplefilter("ignore")
    try:
        results.put((seed, None, *examine(what, count, seed)))
    except BaseException:
        results.put((seed, traceback.format_exc(limit=-4), 0.0, 0.0))


def _apart(*arguments):
    """In a thread, whose stack begins anew: below a deep one CPython maps and unmaps memory at every call."""
    thread = threading.Thread(target=_worker, args=arguments)
    thread.start()
    thread.join()


def survey(what, count, seed, processes=2, patience=600):
    """`examine` shared among processes, so that a crash of the interpreter and a hang are seen as such.

    Returns the failures as text, the slowest example's seconds and the most MiB that a process took.
    """
    forked = multiprocessing.get_context("fork")  # torch is loaded already
    results = forked.Queue()
    share = [count // processes + (index < count % processes) for index in range(processes)]
    checkpoint_content()
    workers = [forked.Process(target=_apart, args=(results, what, n, seed + i)) for i, n in enumerate(share)]
    for worker in workers:
        worker.start()
    ended, failures = [], []
    deadline = time.monotonic() + patience
    while len(ended) + len(failures) < len(workers):
        if not results.empty():
            ended.append(results.get())
        elif dead := [w for w in workers if w.exitcode not in (None, 0)]:
            failures = [f"a process ended with {worker.exitcode}" for worker in dead]
        elif time.monotonic() > deadline:
            failures = ["a process hangs"] * len(workers)
        else:
            time.sleep(0.05)
    for worker in workers:
        worker.kill()
        worker.join()
    failures += [f"seed {seed}:\n{reason}" for seed, reason, _, _ in ended if reason]
    return failures, max((e[2] for e in ended), default=0.0), max((e[3] for e in ended), default=0.0)
