"""Digits a second, and scoring beside bare forward passes."""

import contextlib
import io
import statistics
import sys
import tempfile
import time

import numpy as np
import torch
from PIL import Image

from benchmarks.turns import DATA, RECIPES, TURNS, ours, ratio, spread, timed
from mnist_cnn import load_classifier
from mnist_cnn.config.settings import Export, Predict
from mnist_cnn.data.datasets import load
from mnist_cnn.export import export
from mnist_cnn.inference.metrics import score
from mnist_cnn.predict import predict as classify


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def forward(network, images):
    with torch.inference_mode():
        for part in images.split(100):
            network(part)


def scoring(classifier, test):
    """Scoring the test digits beside the forward passes alone, in turn."""

    def scored():
        score(classifier.logits(test.images), test.labels)

    def bare():
        forward(classifier.network, test.images)

    pairs = [(seconds(scored), seconds(bare)) for _ in range(2 * TURNS + 1)]  # the first warms up
    return ratio(*zip(*pairs, strict=True)) | {"seconds": pairs}


def classified(checkpoint, images, mode, output):
    settings = Predict(
        checkpoint=checkpoint, images=images, input="paths", mode=mode, output=output, top_k=0, grid=None,
        tta=1, skip_errors=False, digits="one", modules=[], accelerator={"name": "cpu"},
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        classify(settings)


def predict():
    test = load("mnist", DATA)[1]
    digits = test.images[:, 0].numpy()
    ratios = {}
    for recipe in RECIPES:
        folder = tempfile.mkdtemp(prefix="benchmark-")
        timed([*ours(recipe, 1, "32-true", "data.validation=55000")[:-1], f"hydra.run.dir={folder}/run"])
        classifier = load_classifier(f"{folder}/run", "cpu")  # conv32_64_64's at last
        ratios[recipe] = scoring(classifier, test)
        print("predict", recipe, spread(ratios[recipe]), file=sys.stderr)

    files = [f"{folder}/{index:05d}.png" for index in range(len(digits))]
    for file, digit in zip(files, digits, strict=True):
        Image.fromarray(digit).save(file)
    np.save(f"{folder}/digits.npy", digits)
    with contextlib.redirect_stdout(io.StringIO()):
        export(Export(checkpoint=f"{folder}/run", format="onnx", output=f"{folder}/network.onnx", modules=[]))
    portable = load_classifier(f"{folder}/network.onnx", "cpu")

    def command(images, mode):
        classified(f"{folder}/run", f"{folder}/{images}", mode, f"{folder}/out.csv")

    works = {
        "`mnist-predict`, PNG files": (10_000, lambda: command("*.png", "any")),
        "`mnist-predict`, uint8 arrays, `mode=exact`": (10_000, lambda: command("digits.npy", "exact")),
        "one picture at a time, Python": (200, lambda: [classifier.predict(file) for file in files[:200]]),
        "one uint8 digit at a time, Python": (
            200, lambda: [classifier.probabilities(digits[i : i + 1], mode="exact") for i in range(200)]
        ),
        "uint8 digits, Python": (10_000, lambda: classifier.probabilities(digits, mode="exact")),
        "torch's forward passes alone, batches of 100": (10_000, lambda: forward(classifier.network, test.images)),
        "ONNX Runtime, uint8 digits, Python": (10_000, lambda: portable.probabilities(digits, mode="exact")),
    }  # fmt: skip
    rows = {}
    for title, (count, work) in works.items():
        work()  # the first time imports and warms up
        rows[title] = {"count": count, "seconds": [seconds(work) for _ in range(TURNS)]}
        print("predict", title, file=sys.stderr)
    table = ["| `conv32_64_64` | digits a second | ms each |", "| --- | --- | --- |"]
    for title, row in rows.items():
        median = statistics.median(row["seconds"])
        table.append(f"| {title} | {row['count'] / median:,.0f} | {1000 * median / row['count']:.3f} |")
    table += ["", "| scoring the 10,000 test digits | / bare forward passes (lowest–highest) |", "| --- | --- |"]
    table += [f"| `{recipe}` | {spread(figure)} |" for recipe, figure in ratios.items()]
    return {"pace": rows, "scoring": ratios}, table
