"""Sweeps by `mnist-train -m`: all jobs checked before the first begins, sharing the machine, a table at the end.

Hydra's sweeper and launchers run the jobs; what a job has done is read from its folder.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from mnist_cnn.config.schema import UserError, validated
from mnist_cnn.config.settings import Train
from mnist_cnn.runs import hydra_app
from mnist_cnn.runs.command_line import literal, typed
from mnist_cnn.runs.errors import in_one_line, refuse
from mnist_cnn.runs.folder import claim, release
from mnist_cnn.runs.hydra_app import chosen, job_title, plain_job
from mnist_cnn.runs.strangers import require_own_files
from mnist_cnn.runs.sweep_folder import (
    RECORD,
    Job,
    Sweep,
    conclude,
    continue_line,
    continued,
    report_end,
    report_states,
    report_stop,
    require_same,
    write_record,
)

log = logging.getLogger(__name__)

GPUS = "MNIST_CNN_GPUS"  # the environment variable by which jobs know which GPUs they share

current: Sweep | None = None


# --- Hydra's hooks -----------------------------------------------------------------------------------------


class MultirunCallback(Callback):
    """Hydra's hooks of a sweep: all jobs checked, the folder claimed, a line for a worker's job, a table at the end."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        global current
        name = config.hydra.job.config_name
        try:
            jobs = planned(config)
            folder, by_user = Path(config.hydra.sweep.dir), chosen(config, "hydra.sweep.dir")
            begun = any((folder / file).exists() for file in (RECORD, "multirun.yaml"))
            if begun:
                require_own_files(folder)
            if name == "train" and jobs and by_user and begun:
                claim(folder, by_user, lambda _: require_same(folder, config, jobs))
            else:
                folder = claim(folder, by_user)
            if name == "train" and jobs:
                jobs = [job._replace(folder=folder / job.folder) for job in jobs]
                current = Sweep(folder, jobs, config, _stop_at_signals())
                write_record(folder, config)
                report_states(current)
            hydra_app.sweep_process = os.getpid()
            share_machine(config, jobs)
            _set_everywhere(config, "hydra.sweep.dir", str(folder.absolute()))
        except Exception as error:  # Hydra would warn of it and go on
            refuse(in_one_line(error, name), error)

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        if hydra_app.in_worker() and config.hydra.job.config_name == "train":
            for handler in logging.getLogger().handlers:
                if isinstance(handler, hydra_app.Console):  # it shows the line of `report_end` only
                    handler.addFilter(logging.Filter(report_end.__module__))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if hydra_app.in_worker() and config.hydra.job.config_name == "train":
            details = HydraConfig.get()
            report_end(Path(details.runtime.output_dir), job_title(details.job.num, typed(details.overrides.task)))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        if current is None:  # of another command or sweeper: its jobs' lines are all there is
            failed = any(Path(config.hydra.sweep.dir).glob("*/error.txt"))
        else:
            rows = conclude(current)
            unfinished = sum(bool(row["error"]) for row in rows)
            failed = unfinished > 0
            if failed:
                log.error("%d of %d jobs failed%s", unfinished, len(rows), continue_line(current))
        if failed:
            raise SystemExit(1)


def run_sweep(task: Callable[[], Any]) -> None:
    """Run a `@hydra.main` task; where it is a sweep that breaks off, end it with its table and how to continue."""
    global current
    sys.argv[1:] = continued(sys.argv[1:])
    try:
        task()
    except BaseException as error:
        refused = isinstance(error, SystemExit) and error.code in (None, 0, 2)
        if current is None or current.ended or refused:
            raise
        if isinstance(error, Exception):  # of a launcher; what fails in a job is reported there
            if not any(job.folder.exists() for job in current.jobs):
                raise
            log.error("error: the sweep broke off: %.300s", " ".join(f"{type(error).__name__}: {error}".split()))
        report_stop(current)
        raise SystemExit(error.code if isinstance(error, SystemExit) else 1) from None
    finally:
        if current:
            for number, handler in current.handlers.items():
                signal.signal(number, handler)
            release(current.folder)
        current = hydra_app.sweep_process = None


def _stop_at_signals() -> dict[int, Any]:
    """Ctrl-C and SIGTERM end the sweep between two jobs; a job that trains here deals with them itself."""
    if threading.current_thread() is not threading.main_thread():
        return {}

    def stop(signum: int, _: Any) -> None:
        for number in before:
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        raise SystemExit(128 + signum)

    before: dict[int, Any] = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    return before


def _set_everywhere(config: DictConfig, key: str, value: Any) -> None:
    """Set a key of Hydra's for the sweep and for each of its jobs, wherever they are composed anew."""
    with read_write(config.hydra), open_dict(config.hydra):
        OmegaConf.update(config, key, value)
        config.hydra.overrides.hydra.append(literal(key, value) if isinstance(value, str) else f"{key}={value}")


# --- jobs before they begin --------------------------------------------------------------------------------


def planned(config: DictConfig) -> list[Job]:
    """Every job of Hydra's own sweeper, its settings checked, its folder still relative to the sweep's.

    Another sweeper plans its jobs as it goes: none is known then.

    Raises:
        UserError: a job's settings are wrong, or two jobs have one folder.
    """
    sweeper: Any = get_class(config.hydra.sweeper._target_)
    if not hasattr(sweeper, "split_arguments"):
        return []
    loader = GlobalHydra.instance().config_loader()
    parameters = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parsed = OverridesParser.create(loader).parse_overrides([*parameters, *typed(config.hydra.overrides.task)])
    jobs: dict[Path, Job] = {}
    for number, overrides in enumerate(sweeper.split_arguments(parsed, None)[0]):
        composed = loader.load_sweep_config(config, list(overrides))
        with open_dict(composed.hydra.job):
            composed.hydra.job.id = composed.hydra.job.num = number
        settings = validated(hydra_app.SCHEMAS[config.hydra.job.config_name], plain_job(composed))
        if isinstance(settings, Train) and settings.resume:
            raise UserError("resume continues one run: leave out -m; a sweep is continued by multirun.resume=FOLDER")
        folder = Path(str(composed.hydra.sweep.subdir))
        if folder in jobs:
            raise UserError(
                f"hydra.sweep.subdir={folder} is the folder of jobs {jobs[folder].number} and {number} alike; "
                "let it contain ${hydra.job.num}"
            )
        jobs[folder] = Job(number, list(overrides), folder, settings)
    return list(jobs.values())


# --- how jobs that run at once share cores and GPUs --------------------------------------------------------


def share_machine(config: DictConfig, jobs: list[Job]) -> None:
    """Say which GPUs the jobs share, and how many run at once: as many as there are GPUs, or else cores, or jobs."""
    accelerators = {job.settings.accelerator.name for job in jobs if isinstance(job.settings, Train)}
    gpus = [] if accelerators == {"cpu"} else visible_gpus()
    os.environ[GPUS] = ",".join(gpus)
    launcher = config.hydra.launcher._target_.rpartition(".")[2]
    limits = {"JoblibLauncher": "hydra.launcher.n_jobs", "LocalLauncher": "hydra.sweeper.max_batch_size"}
    if key := limits.get(launcher):
        asked = OmegaConf.select(config, key) or 0
        at_once = asked if asked > 0 else len(gpus) or cores()
        _set_everywhere(config, key, min(at_once, len(jobs) or at_once))
        # Threads that spin while they wait would take the cores from the other jobs.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def with_own_threads(settings: Train) -> Train:
    """A job's settings with the threads that its launcher gives it: they are part of the bits, and of config.yaml."""
    threads = os.environ.get("OMP_NUM_THREADS", "") if hydra_app.in_worker() else ""
    if not threads.isdigit() or settings.accelerator.threads is not None:
        return settings
    accelerator = settings.accelerator.model_copy(update={"threads": int(threads)})
    return settings.model_copy(update={"accelerator": accelerator})


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
