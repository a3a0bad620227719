"""Jobs as Hydra runs them: refused before a folder is made, guarded while they work."""

from __future__ import annotations

import logging
import shutil
import signal
import traceback
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from mnist_cnn.config.parameters import Sweep
from mnist_cnn.config.schema import RunError, Strict, UserError, validated
from mnist_cnn.config.settings import Evaluate, Export, Import, Predict, Train
from mnist_cnn.runs.folder import read_run, refuse_occupied, write_whole
from mnist_cnn.runs.hydra_app import in_one_line, literal, plain, refuse
from mnist_cnn.runs.launchers import share, watch
from mnist_cnn.runs.multirun import begin, current, ended
from mnist_cnn.runs.plan import RECORD, planned, require_same, title
from mnist_cnn.runs.worker import elsewhere, launcher_of, left, settle, sweeps_here, told_to_stop

log = logging.getLogger(__name__)

SCHEMAS: dict[str, type[Strict]] = {
    "train": Train,
    "evaluate": Evaluate,
    "predict": Predict,
    "export": Export,
    "import": Import,
    "sweep": Sweep,
}
_claimed: set[Path] = set()  # folders that this process made for itself
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


class RunFolder(Callback):
    """Hydra's hooks around a command: refuse bad input before a folder is made, claim it, run a sweep's jobs."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        try:
            name = config.hydra.job.config_name
            settings = validated(SCHEMAS[name], plain_job(config))
            if isinstance(settings, Train) and settings.resume:
                folder = Path(settings.resume)
                read_run(folder)
                # Hydra's own record of the first start stays as it is.
                set_hydra(config, folder, output_subdir=None)
            elif config.hydra.output_subdir is not None:
                set_hydra(config, claim(Path(config.hydra.run.dir), chosen(config, "hydra.run.dir")))
        except (UserError, OSError, OmegaConfBaseException) as error:
            refuse(in_one_line(error, config.hydra.job.config_name), error)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        name = config.hydra.job.config_name
        try:
            jobs = planned(config, lambda composed: validated(SCHEMAS[name], plain_job(composed)))
            folder, by_user = Path(config.hydra.sweep.dir), chosen(config, "hydra.sweep.dir")
            if name == "train" and by_user and jobs and (folder / RECORD).exists():
                require_same(folder, config, jobs)
            else:
                folder = claim(folder, by_user)
            shared = share(config, jobs)
            with read_write(config.hydra):
                config.hydra.sweep.dir = str(folder)
                # The jobs' too, wherever they run.
                config.hydra.overrides.hydra.append(literal("hydra.sweep.dir", str(folder.absolute())))
            sweeps_here()
            if name == "train":
                watch(begin(config, folder, jobs), shared)
        except Exception as error:  # Hydra would warn of it and go on
            refuse(in_one_line(error, name), error)

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        settle(config)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        left()

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        sweep = current()
        if sweep is None:  # of another command: its jobs' lines are all there is
            failed = any(Path(config.hydra.sweep.dir).glob("*/error.txt"))
        else:
            sweep.all_told()
            failed = ended(sweep)
        if failed:
            raise SystemExit(1)


def plain_job(config: DictConfig, folder: Path = Path()) -> dict[str, Any]:
    """The job's part of a composed configuration, resolved for a run in `folder`, without Hydra's own part."""
    previous = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        runtime: Any = HydraConfig.get().runtime
        with read_write(runtime):
            runtime.output_dir = str(folder)
        return plain(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
    finally:
        HydraConfig.instance().cfg = previous


def chosen(config: DictConfig, key: str) -> bool:
    return any(override.lstrip("+").startswith(f"{key}=") for override in config.hydra.overrides.hydra)


def set_hydra(config: DictConfig, folder: Path, **settings: Any) -> None:
    with read_write(config.hydra):
        config.hydra.run.dir = str(folder)
        for key, value in settings.items():
            config.hydra[key] = value


def claim(folder: Path, by_user: bool = False) -> Path:
    """Make a folder: the user's, which must hold no run, or else the first free of `folder`, `folder_2`, `folder_3`…

    Raises:
        UserError: the user's folder holds a run or a sweep already.
    """
    if by_user and folder == Path():
        raise UserError("hydra.run.dir is empty: name a folder")
    for attempt in count(1):
        candidate = folder if attempt == 1 else folder.with_name(f"{folder.name}_{attempt}")
        try:
            candidate.mkdir(parents=True)
            _claimed.add(candidate.absolute())
            return candidate
        except FileExistsError:
            if not candidate.is_dir():
                raise
            if by_user:
                refuse_occupied(candidate)
                return candidate
    raise AssertionError


def discard(folder: Path) -> None:
    """Remove a folder that this process made for itself and began nothing in."""
    if folder.absolute() in _claimed and not (folder / "config.yaml").exists():
        shutil.rmtree(folder, ignore_errors=True)


def guarded(work: Callable[[], Any], folder: Path) -> Any:
    """A job's failures as the contract has them; in a sweep they are reported and the other jobs go on."""
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    if told_to_stop():
        return None
    details = ""
    try:
        return work()
    except UserError as error:
        status, reason = 2, str(error)
    except RunError as error:
        status, reason = 1, str(error)
    except OSError as error:
        status, reason = 1, in_one_line(error, "train")
    except SystemExit as stopped:
        discard(folder)
        if stopped.code in STOPPED and told_to_stop():
            return None
        if stopped.code not in STOPPED or not elsewhere() or launcher_of(HydraConfig.instance().cfg) == "SlurmLauncher":
            raise  # SLURM may queue it anew
        status, reason = 1, f"stopped by {signal.Signals(stopped.code - 128).name}"  # this job alone
    except Exception as error:
        if not sweeping:
            raise
        status, reason, details = 1, f"{type(error).__name__}: {error}", traceback.format_exc()
    reason = " ".join(reason.split())
    if sweeping:
        return failed(folder, reason, details)
    log.error("error: %s", reason)
    discard(folder)
    raise SystemExit(status)


def failed(folder: Path, reason: str, details: str) -> None:
    """Report a job of a sweep that has failed, and leave the reason in its folder."""
    if told_to_stop():
        return
    job, sweep = HydraConfig.get(), current()
    log.error("error: %s: %s", title(job.job.num, job.overrides.task), reason)
    write_whole(folder / "error.txt", f"{reason}\n{details}")
    if sweep and sweep.fail_fast:
        sweep.stopped_by_failure = True
        raise SystemExit(1)
