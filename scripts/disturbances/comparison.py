"""What a run must give again, bit for bit, and the first thing that differs between two runs."""

import csv
import json

import torch


def run_result(folder):
    """All of a run that must not depend on when it was stopped: its checkpoints, metrics.csv and metrics.json."""
    checkpoints = {
        name: plain_content(torch.load(folder / "checkpoints" / f"{name}.ckpt", map_location="cpu", weights_only=True))
        for name in ("best", "last")
    }
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader((folder / "metrics.csv").open())]
    figures = json.loads((folder / "metrics.json").read_text())
    figures = {key: value for key, value in figures.items() if not key.endswith("_seconds")}
    return {**checkpoints, "metrics.csv": rows, "metrics.json": figures}


def plain_content(value):
    """A checkpoint's content without its seconds, tensors as their bytes."""
    if isinstance(value, dict):
        return {key: plain_content(each) for key, each in value.items() if key != "seconds"}
    if isinstance(value, list | tuple):
        return [plain_content(each) for each in value]
    return (str(value.dtype), tuple(value.shape), value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value


def first_difference(one, other, where=""):
    """The path of the first thing that differs, such as /last/state_dict/network.logits.bias; empty if nothing does."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return next((found for key in one if (found := first_difference(one[key], other[key], f"{where}/{key}"))), "")
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return next((found for i, (a, b) in pairs if (found := first_difference(a, b, f"{where}/{i}"))), "")
    return "" if one == other else where or "/"
