"""A share of scripts/chaos: runs on MNIST that are killed, stopped and out of room end bit for bit the same."""

import json
import os
import subprocess
import sys

from conftest import REPOSITORY


def test_disturbed_runs_end_as_undisturbed_ones(mnist_root, tmp_path):
    counts = {"kill": 3, "terminate": 1, "interrupt": 1, "full": 1}
    words = [f"--{kind}={count}" for kind, count in counts.items()]
    ended = subprocess.run(
        [sys.executable, REPOSITORY / "scripts" / "chaos", *words, "--networks=conv10"],
        cwd=tmp_path,
        env={**os.environ, "MNIST_CNN_DATA": str(mnist_root)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended
    (record,) = tmp_path.glob("outputs/chaos/*/chaos.json")
    runs = json.loads(record.read_text())["runs"]
    assert len(runs) == sum(counts.values())
    assert all(run["disturbances"] for run in runs)
    assert "| SIGKILL | `conv10` | 3 |" in ended.stdout
