"""What data parallel training costs: bytes and milliseconds of each network's all-reduce, and seconds of epochs.

Gloo between processes of one thread each, on this machine; a step makes one all-reduce, of all gradients.
"""

import csv
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from benchmarks.turns import ENVIRONMENT, ROOT
from mnist_cnn.config.architecture import Architecture

NETWORKS = ["mlp", "conv10", "conv32_64_64", "conv30_70", "conv64_128", "conv32_32_dropout"]
RANKS = (2, 4)
REPEATS = 300
HOSTS = {"mnist_a": ("mnist_va", "10.99.7.1"), "mnist_b": ("mnist_vb", "10.99.7.2")}  # namespace: interface, address
ALL_REDUCE = """
import json, statistics, sys, time, torch, torch.distributed as dist
address, port, rank, size, repeats, *counts = sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://{address}:{port}", rank=int(rank), world_size=int(size))
seconds = {}
for count in counts:
    gradients, each = torch.zeros(int(count)), []
    for _ in range(int(repeats)):
        before = time.perf_counter()
        dist.all_reduce(gradients)
        each.append(time.perf_counter() - before)
    seconds[count] = statistics.median(each[len(each) // 10 :])
dist.destroy_process_group()
if rank == "0":
    print(json.dumps(seconds))
"""


def parameters(name):
    architecture = yaml.safe_load((ROOT / "conf" / "architecture" / f"{name}.yaml").read_text())
    return sum(layer.parameters for layer in Architecture.model_validate(architecture).layers(10))


def all_reduce(counts, size, hosts=None):
    """Median seconds of an all-reduce of so many floats among `size` processes; with `hosts`, one in each namespace."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    places = list(hosts.items()) if hosts else [("", ("lo", "127.0.0.1"))] * size
    processes = []
    for rank, (name, (interface, _)) in enumerate(places):
        prefix = ["ip", "netns", "exec", name] if hosts else []
        words = [places[0][1][1], port, rank, size, REPEATS, *counts]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": interface}
        command = [*prefix, sys.executable, "-c", ALL_REDUCE, *map(str, words)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    return {int(count): value for count, value in json.loads(processes[0].communicate()[0]).items()}


def between_hosts(counts):
    """The same between two namespaces, which are removed at the end."""

    def ip(*words):
        subprocess.run(["ip", *words], check=True)

    try:
        for name in HOSTS:
            ip("netns", "add", name)
        (first, (a, _)), (second, (b, _)) = HOSTS.items()
        ip("link", "add", a, "netns", first, "type", "veth", "peer", "name", b, "netns", second)
        for name, (interface, address) in HOSTS.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            for each in ("lo", interface):
                ip("-n", name, "link", "set", each, "up")
        return all_reduce(counts, 2, HOSTS)
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "del", name], check=False)


def communication(hosts=False):
    counts = {name: parameters(name) for name in NETWORKS}
    seconds = {f"{size} ranks": all_reduce(counts.values(), size) for size in RANKS}
    if hosts:
        seconds["2 namespaces"] = between_hosts(counts.values())
    heads = ["network", "all-reduce, MB", "each rank sends, MB: 2, 4, 8 ranks", "8 ranks at 1 Gbit/s, ms"]
    heads += [f"{title} here, ms" for title in seconds]
    table = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for name, count in counts.items():
        size = 4 * count  # bytes
        sent = [2 * (ranks - 1) / ranks * size for ranks in (2, 4, 8)]
        row = [f"`{name}`", f"{size / 1e6:.2f}", ", ".join(f"{each / 1e6:.2f}" for each in sent)]
        row += [f"{8 * sent[-1] / 1e9 * 1000:.1f}"]
        row += [f"{1000 * measured[count]:.2f}" for measured in seconds.values()]
        table.append("| " + " | ".join(row) + " |")
    return {"parameters": counts, "seconds": seconds}, table


def second_epoch(network, batch, devices, threads):
    """Seconds of the second epoch of mnist-train on MNIST."""
    folder = Path(tempfile.mkdtemp(prefix="benchmark-")) / "run"
    words = [f"architecture={network}", f"data.batch_size={batch}", f"accelerator.devices={devices}", "epochs=2"]
    words += [f"accelerator.threads={threads}", "accelerator=cpu", "plots=false", f"hydra.run.dir={folder}"]
    command = [sys.executable, "-P", "-m", "mnist_cnn.train", *words]
    subprocess.run(command, check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    return float(list(csv.DictReader((folder / "metrics.csv").open()))[1]["seconds"])


def data_parallel(network="conv32_64_64", batches=(64, 512), turns=3):
    ways = {
        "1 process, 1 thread": (1, 1),
        "1 process, 2 threads": (1, 2),
        "2 ranks, 1 thread each": (2, 1),
    }  # devices, threads of each
    heads = [f"`{network}`, s an epoch of 54,000 digits", *ways]
    table = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    epochs = {}
    for batch in batches:
        rounds = [{way: second_epoch(network, batch, *how) for way, how in ways.items()} for _ in range(turns)]
        epochs[batch] = {way: statistics.median(each[way] for each in rounds) for way in ways}
        print("data_parallel", batch, epochs[batch], file=sys.stderr)
        row = " | ".join(f"{seconds:.2f}" for seconds in epochs[batch].values())
        table.append(f"| batches of {batch} | {row} |")
    return epochs, table
