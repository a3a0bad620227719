"""The counts that the project promises of generated configurations and mutated files; scripts/fuzz runs more."""

import io
import re

import fuzzing
import hypothesis.strategies as st
import pytest
from PIL import Image

from mnist_cnn.inference.digit_image import mnist_form
from mnist_cnn.inference.image_files import read_picture

COUNTS = {"configurations": 2000, "idx files": 2000, "pictures": 2000, "checkpoints": 500}


@pytest.mark.parametrize("what", COUNTS)
def test_whatever_comes_is_taken_or_refused_in_one_line(what):
    failures, _, _ = fuzzing.survey(what, COUNTS[what], seed=1)
    assert not failures, "\n".join(failures)


def fails(example):
    raise ValueError("a bug")


def takes_long(example):
    sum(range(4 * 10**6))


def takes_memory(example):
    return b"1" * 700 * 2**20


def crashes(example):
    import ctypes

    ctypes.string_at(0)


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (fails, "a bug"),
        (takes_long, "AssertionError: [0-9.]+ s"),
        (takes_memory, "[0-9]+ MiB"),
        (crashes, "ended with -11"),
    ],
)
def test_what_is_not_allowed_is_seen(monkeypatch, check, words):
    """A traceback, a hang, memory, a crash: the survey above would find each."""
    monkeypatch.setitem(fuzzing.PROPERTIES, "pictures", (check, fuzzing.mutations()))
    monkeypatch.setattr(fuzzing, "SECONDS", 0.01 if check is takes_long else 60)
    failures, _, _ = fuzzing.survey("pictures", 2, seed=1, processes=1)
    assert re.search(words, failures[0])


@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16"])
def test_a_large_picture_takes_little_memory_and_time(monkeypatch, mode):
    """36 million pixels in a file of some kilobytes; float channels of all of them would take gigabytes."""
    picture = Image.new("L", (6000, 6000), 255)
    picture.paste(0, (2800, 2000, 3000, 4000))
    picture = picture.convert("I").convert(mode) if mode == "I;16" else picture.convert(mode)
    if mode == "RGBA":
        picture.putpixel((0, 0), (255, 255, 255, 0))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    content = buffer.getvalue()

    def check(_):
        form = mnist_form(read_picture(io.BytesIO(content)))
        assert form[6:22, 14].min() > 200  # an upright stroke

    monkeypatch.setitem(fuzzing.PROPERTIES, "pictures", (check, st.just(None)))
    failures, _, _ = fuzzing.survey("pictures", 1, seed=1, processes=1)
    assert not failures, failures[0]
