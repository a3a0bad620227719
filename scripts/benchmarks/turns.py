"""Commands that take turns on one machine, and the ratios of their seconds."""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from mnist_cnn.config.schema import UserError
from mnist_cnn.models.device import check_precision

ROOT = Path(__file__).resolve().parents[2]
DATA = str(Path(os.environ.get("MNIST_CNN_DATA", "data")).absolute())
RECIPES = {"conv30_70": 10, "conv32_32_dropout": 2, "conv64_128": 5, "conv10": 10, "conv32_64_64": 5}  # epochs
TURNS = 5
CONTESTANTS = ROOT / "scripts" / "benchmarks" / "contestants.py"


def supported_precisions():
    """Float32, and bfloat16 where the processor has instructions for it: mnist-train refuses to emulate them."""
    precisions = {"float32": "32-true", "bfloat16": "bf16-mixed"}
    try:
        check_precision("bf16-mixed", torch.device("cpu"))
    except UserError:
        del precisions["bfloat16"]
    return precisions


PRECISIONS = supported_precisions()
ENVIRONMENT = {**os.environ, "MNIST_CNN_DATA": DATA, "PYTHONPATH": str(ROOT)}


def ours(recipe, epochs, precision="32-true", *overrides, program=("-m", "mnist_cnn.train")):
    """The command of a run of mnist-train, whose folder is its last word's."""
    folder = tempfile.mkdtemp(prefix="benchmark-")
    settings = [f"experiment={recipe}"] if recipe else []
    settings += [f"epochs={epochs}", f"accelerator.precision={precision}", "plots=false", *overrides]
    return [sys.executable, "-P", *program, *settings, f"hydra.run.dir={folder}/run"]


def contestant(name, recipe, epochs, precision="32-true", *overrides, python=sys.executable):
    return [python, CONTESTANTS, name, recipe or "-", precision, str(epochs), *overrides]


def take_turns(commands, epochs):
    """Seconds of each epoch of each command, and its test accuracy; all but one are stopped at any time."""
    processes, seconds, accuracy = {}, {name: [] for name in commands}, {}
    try:
        for name, command in commands.items():
            process = processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=ENVIRONMENT,
                start_new_session=True,
            )
            wait_for(process, name, "ready", "total")  # mnist-train's last line before it trains ends its table
            pause(process)
        for _ in range(epochs):
            for name, process in processes.items():
                start = time.perf_counter()
                go_on(process)
                wait_for(process, name, "epoch")
                seconds[name].append(time.perf_counter() - start)
                pause(process)
        for name, process in processes.items():
            go_on(process)
            line = wait_for(process, name, "test")
            accuracy[name] = (
                float(line.split()[2]) if line.startswith("test acc") else float(line.split("%")[0].split()[-1]) / 100
            )
            process.wait()
    finally:
        for process in processes.values():
            process.kill()
    return seconds, accuracy


def waits_for_a_line(process):
    return CONTESTANTS in process.args


def pause(process):
    if not waits_for_a_line(process):
        os.kill(process.pid, signal.SIGSTOP)


def go_on(process):
    if waits_for_a_line(process):
        process.stdin.write("\n")
        process.stdin.flush()
    else:
        os.kill(process.pid, signal.SIGCONT)


def wait_for(process, name, *starts):
    for line in process.stdout:
        if line.startswith(starts):
            return line
    raise SystemExit(f"error: {name} ended without a line that begins with {' or '.join(starts)}")


def ratio(mine, other):
    """Median of the paired ratios and their spread, first epochs left out."""
    ratios = [a / b for a, b in zip(mine[1:], other[1:], strict=True)]
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios), "pairs": len(ratios)}


def spread(figure):
    return f"{figure['median']:.2f} ({figure['lowest']:.2f}–{figure['highest']:.2f})"


def timed(command, expected=0):
    start = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    seconds = time.perf_counter() - start
    if ended.returncode != expected:
        raise SystemExit(f"error: {' '.join(map(str, command))} ended with {ended.returncode}: {ended.stderr[-500:]}")
    return seconds
