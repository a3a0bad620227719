"""Mutated idx files, pictures and checkpoints: each must be taken, or end as a user error."""

import io
import os
import struct
import tempfile
import zipfile
import zlib
from functools import cache
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import hypothesis.strategies as st
import torch
from PIL import Image

import mnist_cnn
from fuzzing.outcome import DIGITS, refusal_allowed
from mnist_cnn.data import datasets
from mnist_cnn.inference.classifier import load_classifier
from mnist_cnn.pictures.digit_image import mnist_form
from mnist_cnn.pictures.image_files import find_pictures, read_picture


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
        for source in refusal_allowed(lambda: list(islice(find_pictures([str(path)]), 20))) or []:
            refusal_allowed(lambda source=source: mnist_form(source.read()))
        with patch.dict(os.environ, {"MNIST_CNN_MIRRORS": "nowhere:"}):
            assert refusal_allowed(lambda: datasets.load("mnist", folder)) is None


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
    refusal_allowed(lambda: mnist_form(read_picture(io.BytesIO(content))))


@cache
def checkpoint_content():
    """A checkpoint of a small network that trained for an epoch."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["data=digits", "epochs=1", "plots=false", "architecture.dense=[8]", f"hydra.run.dir={folder}/run"]
        mnist_cnn.train([*words, "architecture.blocks=[{filters:2,kernel:5,pool:4,batch_norm:true}]"], verbose=False)
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


def replaced(whole, path, value):
    """`whole` with `value` in place of something in it; each number of `path` chooses an entry on the way down."""
    node = whole
    for depth, step in enumerate(path):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        if "mnist_cnn" in keys and step % 5:  # most begin in the description or the weights: they are what is read
            keys = ["mnist_cnn", "state_dict"]
        key = keys[step % len(keys)]
        if depth == len(path) - 1 or not isinstance(node[key], dict | list):
            node[key] = value
            break
        node = node[key]
    return whole


def checkpoint(arguments):
    kind, number, changes, path, value = arguments
    content = checkpoint_content()
    if kind == "bytes":
        content = mutated(content, changes)
    elif kind == "record":
        content = repacked(content, number, changes)
    else:
        buffer = io.BytesIO()
        torch.save(replaced(torch.load(io.BytesIO(content), weights_only=True), path, value), buffer)
        content = buffer.getvalue()
    with tempfile.NamedTemporaryFile(suffix=".ckpt") as file:
        Path(file.name).write_bytes(content)
        classifier = refusal_allowed(lambda: load_classifier(file.name, "cpu"))
        if classifier:
            assert classifier.probabilities(DIGITS[1].images[:1]).shape == (1, len(classifier.classes))
