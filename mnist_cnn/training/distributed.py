"""Data parallel runs: torch elastic starts the ranks from inside the command and watches them, Lightning's DDP trains.

Hydra composes once, in the command, which waits for its ranks. Rank 0 does what a single process would: it has the
run's folder, prints, tests and draws. On several machines the same command is started on each, and they find each
other at `accelerator.rendezvous`; the run's folder is that of the machine that gets rank 0.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from lightning_fabric.plugins.environments import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, record
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mnist_cnn.config.schema import NotFiniteError, RunError, UserError
from mnist_cnn.config.settings import Train
from mnist_cnn.runs.folder import discard
from mnist_cnn.runs.hydra_app import FILE_FORMAT, Console, Printable
from mnist_cnn.training.signals import Stopped, StopRequest

log = logging.getLogger(__name__)

LOOPBACK = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
ERRORS: dict[str, type[Exception]] = {error.__name__: error for error in (UserError, RunError, NotFiniteError)}
SECONDS_TO_COME = 600  # within which every machine has joined
# That a rank which lost another waits: torch elastic reports the first to end, and that is to be the cause.
SECONDS_AFTER = 3


def is_data_parallel(config: Train) -> bool:
    return config.accelerator.devices * config.accelerator.num_nodes > 1


def strategy_for(config: Train) -> Any:
    """Lightning's strategy: DDP over ranks that are there already, or a single device."""
    return DDPStrategy(cluster_environment=TorchElasticEnvironment()) if is_data_parallel(config) else "auto"


def launch(
    run: Callable[..., Any],
    config: Train,
    folder: Path,
    overrides: Sequence[str],
    choices: Mapping[str, Any],
    command: str,
) -> Any:
    """Call `run(config, folder, overrides, choices, command, stop)` in each rank, and return what rank 0 returns.

    Returns None where rank 0 is on another machine; this machine's folder is then taken away.

    Raises:
        UserError, RunError: a rank failed, or was killed; the others have ended too.
        Stopped: by a signal, after the ranks have saved.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError("mnist-train starts its ranks itself: leave out torchrun, and give accelerator.devices=…")
    asked = config.accelerator
    launcher = LaunchConfig(
        min_nodes=asked.num_nodes,
        max_nodes=asked.num_nodes,
        nproc_per_node=asked.devices,
        run_id="mnist_cnn",
        rdzv_backend="c10d",
        rdzv_endpoint=asked.rendezvous or "127.0.0.1:0",
        rdzv_configs={"timeout": SECONDS_TO_COME},
        local_addr=None if asked.rendezvous else "127.0.0.1",
        max_restarts=0,  # resume= is the way on
        start_method="forkserver",
    )
    for name in ("torch", "torch.distributed"):  # handlers, as each of the loggers below them has a level of its own
        for handler in logging.getLogger(name).handlers:
            handler.setLevel(logging.CRITICAL)
    environment = {
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "OMP_WAIT_POLICY": "passive",  # threads that spin while they wait would take the cores from the other ranks
        **({"GLOO_SOCKET_IFNAME": LOOPBACK} if not asked.rendezvous else {}),
    }
    added = {name: value for name, value in environment.items() if value and name not in os.environ}
    os.environ.update(added)
    multiprocessing.set_forkserver_preload([__name__])  # torch is imported once for all ranks and jobs
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")  # a rank needs nothing of the user's script: it is not run again
    try:
        results = elastic_launch(launcher, _rank)(
            run, config, folder, list(overrides), dict(choices), command, _handlers()
        )
    except SignalException as stopped:
        raise Stopped(stopped.sigval) from None
    except ChildFailedError as error:
        raise _failure(error, command) from None
    except RendezvousError as error:
        where = asked.rendezvous or "this machine"
        raise RunError(f"the {asked.num_nodes} machines did not find each other at {where} ({error})") from None
    finally:
        sys.modules["__main__"] = main
        for name in added:
            os.environ.pop(name, None)
    if 0 not in results:
        log.info("rank 0 was on another machine, which has the run's folder")
        discard(folder)
        return None
    if isinstance(results[0], Stopped):
        raise results[0]
    return results[0]


def _handlers() -> list[str | None]:
    """Where this process logs: the names of its files, and None for the console."""
    handlers = logging.getLogger().handlers
    files: list[str | None] = [each.baseFilename for each in handlers if isinstance(each, logging.FileHandler)]
    return files + [None] * any(isinstance(each, Console) for each in handlers)


@record  # what it raises reaches the command
def _rank(
    run: Callable[..., Any],
    config: Train,
    folder: Path,
    overrides: list[str],
    choices: dict[str, Any],
    resume: str,
    handlers: list[str | None],
) -> Any:
    """One of the ranks, in a process of its own."""
    stop = StopRequest(patient=True)
    stop.install()
    command = multiprocessing.parent_process()
    assert command is not None
    threading.Thread(target=_end_with, args=(command,), daemon=True).start()
    first = int(os.environ["RANK"]) == 0
    logging.getLogger().setLevel(logging.INFO if first else logging.CRITICAL)
    if first:
        for name in handlers:
            handler = Console() if name is None else logging.FileHandler(name, encoding="utf-8", delay=True)
            handler.setFormatter(Printable("%(message)s" if name is None else FILE_FORMAT))
            logging.getLogger().addHandler(handler)
    torch.set_num_threads(max(1, torch.get_num_threads() // config.accelerator.devices))
    try:
        return run(config, folder, overrides, choices, resume, stop)
    except Stopped as stopped:
        if not command.is_alive():
            os._exit(1)  # torch elastic would wait for it to take the answer
        return stopped
    except Exception as error:
        if _lost_another(type(error).__name__, str(error)):
            time.sleep(SECONDS_AFTER)
        raise


def _end_with(command: Any) -> None:
    """Where the command was killed its ranks would go on: they save and end too."""
    command.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _failure(error: ChildFailedError, command: str) -> Exception:
    """The error that a rank ended with; one that was killed comes first, as the others then fail because of it."""
    killed = [each for each in error.failures.items() if each[1].exitcode < 0 and each[1].signal_name() != "SIGTERM"]
    rank, failure = killed[0] if killed else error.get_first_failure()
    remedy = f"continue from its last checkpoint with: {command}"
    if killed:
        return RunError(f"rank {rank} was ended by {failure.signal_name()}, and the others with it; {remedy}")
    kind, _, text = _message(failure).partition(": ")
    if kind in ERRORS:
        return ERRORS[kind](text)
    if _lost_another(kind, text):
        return RunError(f"rank {rank} lost the connection to another rank, which may have been killed; {remedy}")
    return RunError(f"rank {rank} failed ({' '.join(f'{kind}: {text}'.split())[:500]}); {remedy}")


def _lost_another(kind: str, text: str) -> bool:
    return "gloo" in text or "nccl" in text.lower() or kind.startswith("Dist")


def _message(failure: ProcessFailure) -> str:
    found: Any = failure.error_file_data["message"]
    return str(found["message"] if isinstance(found, dict) else found)
