"""How jobs that run at once share a machine: its GPUs and its cores. Imports no torch."""

from __future__ import annotations

import os
import shutil
import subprocess

from omegaconf import OmegaConf

GPUS = "MNIST_CNN_GPUS"  # the environment variable by which jobs know which GPUs they share


def visible_gpus() -> list[str]:
    """The GPUs as CUDA_VISIBLE_DEVICES names them; asked of nvidia-smi, as torch takes seconds to import."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in visible.split(",") if gpu]
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return [line.strip() for line in answer.stdout.splitlines() if line.strip().isdigit()]


def gpus_of_job(number: int, at_once: int) -> str:
    """CUDA_VISIBLE_DEVICES for a job of `at_once` on this machine: its part of the GPUs, and at least one."""
    gpus = [gpu for gpu in os.environ.get(GPUS, "").split(",") if gpu]
    each = max(1, len(gpus) // at_once)
    first = number * each % max(1, len(gpus))
    return ",".join(gpus[first : first + each]) or os.environ.get("CUDA_VISIBLE_DEVICES", "0")


def threads_of_job(at_once: int) -> str:
    """OMP_NUM_THREADS for a job of `at_once` on this machine."""
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // at_once))


def cores() -> int:
    """Those that this process may use, in a container too."""
    from joblib import cpu_count

    return cpu_count()


# For the launchers of conf/hydra/launcher.
for _resolver in (gpus_of_job, threads_of_job):
    OmegaConf.register_new_resolver(_resolver.__name__, _resolver, replace=True)
