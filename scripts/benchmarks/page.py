"""The page of mnist-draw in chromium: milliseconds of a forward pass, on one core, and how often the bars move."""

import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
import yaml

from benchmarks.turns import DATA, ROOT
from mnist_cnn.data.datasets import load
from mnist_cnn.inference.page import folded, page, write_page
from mnist_cnn.models.checkpoint import read_checkpoint
from mnist_cnn.models.convnet import ConvNet

NETWORKS = ["pretrained", *sorted(path.stem for path in (ROOT / "conf" / "architecture").glob("*.yaml"))]
DRAWING = 4  # seconds
FORWARD = """(digits) => digits.map((digit) => {
  const start = performance.now();
  forward(network, digit);
  return performance.now() - start;
})"""
WATCH = """() => {
  const original = show;
  window.shownAt = [];
  window.show = (probabilities) => {
    original(probabilities);
    shownAt.push(performance.now());
  };
}"""


def written(name, folder):
    """The page of the packaged network, or of an architecture with its first weights."""
    path = folder / f"{name}.html"
    if name == "pretrained":
        write_page(name, path)
        return path
    torch.manual_seed(0)
    specification = yaml.safe_load((ROOT / "conf" / "architecture" / f"{name}.yaml").read_text())
    network = folded(ConvNet(specification, 10), half=False)
    path.write_text(page(network, read_checkpoint("pretrained")[1], half=False), encoding="utf-8")
    return path


def drawn(window):
    """Milliseconds between two moves of the bars, while one draws circles."""
    box = window.locator("#paper").bounding_box()
    window.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.5 * box["height"])
    window.mouse.down()
    window.evaluate(WATCH)
    start = time.perf_counter()
    while (seconds := time.perf_counter() - start) < DRAWING:
        x, y = 0.5 + 0.3 * math.cos(3 * seconds), 0.5 + 0.3 * math.sin(3 * seconds)
        window.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        time.sleep(0.005)
    window.mouse.up()
    times = window.evaluate("shownAt")
    return [after - before for before, after in pairwise(times)]


def measure(browser, path, digits):
    window = browser.new_page(viewport={"width": 1200, "height": 900})
    window.goto(path.as_uri())
    window.evaluate(FORWARD, digits)  # warms up
    milliseconds = sorted(window.evaluate(FORWARD, digits))
    gaps = drawn(window)
    window.close()
    return {
        **{"lowest": milliseconds[0], "median": statistics.median(milliseconds)},
        **{"of_10_9": milliseconds[len(milliseconds) * 9 // 10], "bars": 1000 / statistics.mean(gaps)},
        **{"load": os.getloadavg()[0]},
    }


def draw():
    from playwright.sync_api import sync_playwright

    digits = load("mnist", DATA).test.images[:200].reshape(200, -1).tolist()
    figures = {}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name in NETWORKS:
            figures[name] = measure(browser, written(name, Path(folder)), digits)
            print("draw", name, figures[name], file=sys.stderr)
        browser.close()
    table = ["| network | forward pass, ms: median (lowest, 9 of 10 below) | bars move, times a second | load |"]
    table += ["| --- | --- | --- | --- |"]
    for name, row in figures.items():
        forward = f"{row['median']:.1f} ({row['lowest']:.1f}, {row['of_10_9']:.1f})"
        table.append(f"| `{name}` | {forward} | {row['bars']:.0f} | {row['load']:.1f} |")
    return figures, table
