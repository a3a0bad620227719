"""What one waits for before the first step and between jobs, and the memory of a run."""

import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.turns import ENVIRONMENT, RECIPES, TURNS, ours, timed, wait_for

TRAIN = [sys.executable, "-P", "-m", "mnist_cnn.train"]
IMPORTS = [sys.executable, "-c", "import torch, torchvision, pytorch_lightning"]
QUICK = {"--help": (["--help"], 0), "--cfg job": (["--cfg", "job"], 0), "a refused override": (["epochs=-1"], 2)}


def peak_memory(command):
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    return os.wait4(process.pid, 0)[2].ru_maxrss / 1024  # MiB


def until_first_step():
    command = ours("conv10", 1)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    wait_for(process, "mnist-train", "epoch")
    until = time.perf_counter() - start
    process.communicate()
    rows = Path(command[-1].partition("=")[2], "metrics.csv").read_text().splitlines()
    return until - float(next(csv.DictReader(rows))["seconds"])


def between_jobs(plots):
    """Seconds that each further job of a sweep in one process takes beyond its fit."""
    folder = tempfile.mkdtemp(prefix="benchmark-")
    sweep = ["-m", "experiment=conv10", "epochs=1", "seed=1,2,3,4,5,6", f"plots={plots}", f"hydra.sweep.dir={folder}"]
    timed([*TRAIN, *sweep])
    files = Path(folder).glob("*/metrics.json")
    ends = sorted((file.stat().st_mtime, json.loads(file.read_text())["fit_seconds"]) for file in files)
    return [after[0] - before[0] - after[1] for before, after in itertools.pairwise(ends)]


def startup():
    seconds = {name: [] for name in ("imports", "first step", *QUICK)}
    for _ in range(TURNS):
        seconds["imports"].append(timed(IMPORTS))
        seconds["first step"].append(until_first_step())
        for name, (arguments, status) in QUICK.items():
            seconds[name].append(timed([*TRAIN, *arguments], status))
    jobs = {plots: between_jobs(plots) for plots in ("false", "true")}
    base = peak_memory(IMPORTS)
    memory = {recipe: peak_memory(ours(recipe, 1)) - base for recipe in RECIPES}
    ratios = [a / b for a, b in zip(seconds["first step"], seconds["imports"], strict=True)]

    rows = {
        "`import torch, torchvision, pytorch_lightning`, s": seconds["imports"],
        "`mnist-train` until its first step, s": seconds["first step"],
        "that / the imports": ratios,
        **{f"{name}, s": seconds[name] for name in QUICK},
        "a further job of `-m` beyond its fit, s": jobs["false"],
        "the same, with its pictures, s": jobs["true"],
    }
    table = ["| what | median | lowest–highest |", "| --- | --- | --- |"]
    table += [f"| {name} | {statistics.median(v):.2f} | {min(v):.2f}–{max(v):.2f} |" for name, v in rows.items()]
    figures = list(memory.values())
    table.append(
        "| memory at its peak above the imports', the five recipes, MiB "
        f"| {statistics.median(figures):.0f} | {min(figures):.0f}–{max(figures):.0f} |"
    )
    return {"seconds": seconds, "jobs": jobs, "memory_above_imports": memory}, table
