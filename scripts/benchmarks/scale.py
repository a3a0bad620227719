"""Seconds and memory at 1, 2, 4 and 8 times as many digits: training, scoring and prediction."""

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.turns import DATA, ENVIRONMENT
from mnist_cnn.data.datasets import load

TIMES = (1, 2, 4, 8)
RECIPE = "conv10"


def copies():
    """MNIST with each digit several times: a data set of one's own, in the process of a command."""
    (train, test, classes), times = load("mnist", DATA), int(os.environ["TIMES"])
    many = [(part.images.repeat(times, 1, 1, 1), part.labels.repeat(times)) for part in (train, test)]
    return *many, classes


def measured(times, verb, *words):
    """Seconds of a command and its memory at its peak, MiB."""
    environment = {**ENVIRONMENT, "TIMES": str(times)}
    environment["PYTHONPATH"] += f"{os.pathsep}{Path(__file__).parents[1]}"
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", f"mnist_cnn.{verb}", *words], stdout=subprocess.DEVNULL, env=environment
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"error: mnist_cnn.{verb} {' '.join(words)} ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def scale():
    figures, place = {"an epoch of training": [], "scoring": [], "prediction": []}, Path(tempfile.mkdtemp())
    own = "data._target_=benchmarks.scale.copies"
    for times in TIMES:
        run = place / f"run_{times}"
        recipe = [f"experiment={RECIPE}", "epochs=2", "plots=false", "accelerator=cpu", f"hydra.run.dir={run}"]
        _, memory = measured(times, "train", *recipe, "data.validation=0", own)
        epoch = float(list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))[-1]["seconds"])
        figures["an epoch of training"].append((60_000 * times, epoch, memory))
        seconds = json.loads((run / "metrics.json").read_text())["test_seconds"]
        figures["scoring"].append((10_000 * times, seconds, memory))
    digits = load("mnist", DATA).train.images[:, 0].numpy()
    for times in (0, *TIMES):  # the first, of one digit, is what the command takes at the least
        np.save(place / "digits.npy", np.tile(digits, (times, 1, 1)) if times else digits[:1])
        checkpoint, images = f"checkpoint={place / 'run_1'}", f"images={place / 'digits.npy'}"
        words = [checkpoint, images, "mode=exact", "accelerator=cpu", f"output={place / 'table.csv'}"]
        seconds, memory = measured(1, "predict", *words)
        if not times:
            least = seconds
            continue
        figures["prediction"].append((60_000 * times, seconds - least, memory))
    table = ["| what | digits | seconds | µs a digit | memory at its peak, MiB | seconds grow as digits to the power |"]
    table.append("| --- | --- | --- | --- | --- | --- |")
    for name, rows in figures.items():
        counts, seconds, _ = np.log(rows).T
        slope = np.polyfit(counts, seconds, 1)[0]
        for count, taken, memory in rows:
            power = f"{slope:.2f}" if count == rows[-1][0] else ""
            table.append(f"| {name} | {count:,} | {taken:.2f} | {1e6 * taken / count:.1f} | {memory:,.0f} | {power} |")
    return figures, table
