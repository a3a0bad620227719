"""How the ranks of a run come together: torchrun or srun has started them, or rank 0 does; and how a run ends them.

Imports no torch.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from mnist_cnn.config.schema import NotFiniteError, RunError, UserError
from mnist_cnn.config.settings import Train
from mnist_cnn.training.ranks import COMING, Group, broke, outside

LOOPBACK = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)


def met(rank: int, size: int) -> Group:
    """This process's place among the ranks that torchrun or srun has started.

    Raises:
        UserError: what SLURM has set is not what Lightning can use.
    """
    from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
    from torch.distributed import PrefixStore, TCPStore

    elastic = TorchElasticEnvironment.detect()
    # torchrun's agent has a store already, the same one for every attempt to start the ranks again.
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        environment = TorchElasticEnvironment() if elastic else SLURMEnvironment(auto_requeue=False)
        address, port = environment.main_address, environment.main_port
        store = TCPStore(address, port, None, hosts, timedelta(seconds=COMING), wait_for_workers=False)
    except RuntimeError as error:
        raise UserError(f"rank {rank} cannot join the others: {str(error).strip().splitlines()[0]}") from None
    Group.theirs = Group(rank, size, PrefixStore(f"mnist_cnn {attempt}", store))
    return Group.theirs


def joined(port: int, rank: int, size: int) -> Group:
    """This process's place as a rank that rank 0 has started on this machine."""
    from torch.distributed import TCPStore

    return Group(rank, size, TCPStore("127.0.0.1", port, None, False, timedelta(seconds=25)))


def started(size: int) -> Group:
    """Start the other ranks on this machine; nothing outside it can reach them."""
    from torch.distributed import TCPStore

    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    store = TCPStore("127.0.0.1", port, None, True, wait_for_workers=False, master_listen_fd=listening.detach())
    children = []
    for rank in range(1, size):
        # Ctrl-C reaches every process of a terminal: rank 0 says what comes of it.
        work = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); import sys; sys.path[:] = {sys.path!r}"
        work += f"; from mnist_cnn.training.follow import follow; follow({port}, {rank}, {size})"
        environment = {**os.environ, "LOCAL_RANK": str(rank), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        children.append(subprocess.Popen([sys.executable, "-c", work], env=environment, stdin=subprocess.DEVNULL))
    return Group(0, size, store, children)


def _called(config: Train) -> Group:
    """The group that a run asks for."""
    asked, size = config.accelerator, config.accelerator.devices * config.accelerator.num_nodes
    words = f"accelerator.devices={asked.devices} and accelerator.num_nodes={asked.num_nodes}"
    group = Group.theirs
    if outside() and not group:
        raise UserError("torchrun and srun start the command: torchrun … -m mnist_cnn.train")
    if group and group.size != size:
        raise UserError(f"{words} are {size} ranks, but torchrun or srun has started {group.size}: give as many")
    if group and group.broken:
        raise RunError(f"the other ranks have ended: {group.failure()}")
    if group:
        return group
    if asked.num_nodes > 1:
        raise UserError(f"{words}: start the command on each machine by torchrun or srun, as the README shows")
    return started(size)


@contextmanager
def gathered(config: Train, folder: Path) -> Iterator[Group | None]:
    """The ranks of a run for as long as it goes; None where it is one process.

    Raises:
        UserError: they cannot share a batch, or are not those that torchrun or srun has started.
        RunError: one of them failed; it has the reason.
    """
    if config.accelerator.devices * config.accelerator.num_nodes == 1 and not (outside() or Group.theirs):
        yield None
        return
    import torch

    if uneven := config.uneven():
        raise UserError(uneven)
    threads, interface = torch.get_num_threads(), os.environ.get("GLOO_SOCKET_IFNAME")
    if LOOPBACK and not outside():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    group, status = None, 1
    try:
        group = _called(config)
        group.remedy = f"; what it has saved is whole: mnist-train resume={folder}"
        yield group
        status = 0
    except Exception as error:
        if group is None or not group.busy or isinstance(error, NotFiniteError):  # which all ranks find at one step
            raise
        group.broken = True
        if broke(error):
            raise RunError(group.reason(error) + group.remedy) from None
        group.fail(str(error) or type(error).__name__)
        raise
    finally:
        if group:
            group.busy = False
            torch.set_num_threads(threads)
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            if group is not Group.theirs:
                group.end(status)
        if interface is None:
            os.environ.pop("GLOO_SOCKET_IFNAME", None)
