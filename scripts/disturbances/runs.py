"""Runs of mnist-train that are killed, stopped or out of room, continued, and compared with undisturbed ones."""

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import shutil
import signal
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import mnist_cnn.train
import mnist_cnn.training.fit  # imports torch once, before the runs are forked
from disturbances.comparison import first_difference, run_result
from mnist_cnn.runs.folder import git_commit, versions

SETTINGS = ["seed=3", "plots=false", "epochs=2", "accelerator=cpu", "accelerator.threads=1", "data.batch_size=64"]
SETTINGS += ["schedule=onecycle", "checkpoint.every_seconds=0.3", "data.validation=57000"]
SETTINGS += ["trainer.limit_val_batches=20"]
RECIPES = {
    "plain": [],
    "Muon, EMA, augmentation": ["optimizer=muon", "ema_decay=0.99", "augmentation=affine"],
}
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "no room": None}
ALLOWED = {"SIGKILL": {-9}, "SIGTERM": {143, -15}, "SIGINT": {130, -2}, "no room": {1}}
MOST_DISTURBANCES = 3  # of one run
PATIENCE = 600  # seconds, after which a run hangs


class Job(NamedTuple):
    kind: str
    network: str
    recipe: str
    folder: Path
    undisturbed: Path
    seconds: float  # of the undisturbed run
    size: int  # of its last checkpoint, bytes


def words_of(network, recipe, folder):
    return [*SETTINGS, *RECIPES[recipe], f"architecture={network}", f"hydra.run.dir={folder}"]


# --- a process -----------------------------------------------------------------------------------------------


def start(words, log):
    """mnist-train in a process of its own, forked, so that torch is loaded once."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the child handles it
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return pid
    status = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        sys.argv = ["mnist-train", *words]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        mnist_cnn.train.main()
    except SystemExit as ended:
        status = ended.code
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and not error.__traceback__.tb_next:  # here, and not in main
            os._exit(130)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait(pid, seconds):
    """The exit status of a process, negative where a signal ended it; None where it goes on after the seconds."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.002)


def attempt(words, log, moment=None, kind="SIGKILL", room=0):
    """Run a command, disturb it after `moment` seconds; its status, whether it was disturbed, its seconds to end."""
    pid = start(words, log)
    status = wait(pid, PATIENCE if moment is None else moment)
    if status is not None or moment is None:
        return status, False, 0.0
    disturbed_at = time.monotonic()
    if kind == "no room":
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (room, room))
    else:
        os.kill(pid, SIGNALS[kind])
    status = wait(pid, PATIENCE)
    if status is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return status, True, time.monotonic() - disturbed_at


# --- a run ---------------------------------------------------------------------------------------------------


def next_words(job):
    """The command that goes on with a run, or begins it."""
    if (job.folder / "config.yaml").exists():
        return [f"resume={job.folder}"]
    return words_of(job.network, job.recipe, job.folder)


def disturb(job, moments, log):
    """Disturb a run up to three times; the disturbances, and what ended in a way it must not."""
    disturbances, seconds = [], job.seconds
    remaining = moments.randint(1, MOST_DISTURBANCES)
    while remaining:
        moment, room = moments.uniform(0, seconds), int(moments.uniform(0, 1.1 * job.size))
        status, hit, ending = attempt(next_words(job), log, moment, job.kind, room)
        finished = (job.folder / "metrics.json").exists()  # before it could be disturbed, or despite it
        if finished and status == 0 and not hit and not disturbances:  # the undisturbed one took longer: once more
            shutil.rmtree(job.folder)
            seconds /= 2
            continue
        remaining -= 1
        if hit:
            disturbances.append({"moment": moment, "status": status, "seconds_to_end": ending})
        if status not in ((ALLOWED[job.kind] if hit else set()) | ({0} if finished else set())):
            return disturbances, f"status {status}"
        if finished:
            break
    return disturbances, ""


def disturbed_run(job_and_seed):
    """One run, disturbed, continued to its end and compared."""
    job, seed = job_and_seed
    moments = random.Random(f"{seed} {job.kind} {job.folder.name}")
    log = job.folder.with_suffix(".log")
    disturbances, unexpected = disturb(job, moments, log)
    status, _, _ = attempt(next_words(job), log)
    if status != 0 and not unexpected:
        unexpected = f"continuing ended with {status}"
    difference = "" if unexpected else first_difference(run_result(job.undisturbed), run_result(job.folder))
    if "Traceback" in log.read_text(errors="replace"):
        unexpected = unexpected or "a traceback"
    if not unexpected and not difference:
        shutil.rmtree(job.folder)
        log.unlink()
    about = {"kind": job.kind, "network": job.network, "recipe": job.recipe}
    return {**about, "disturbances": disturbances, "difference": difference, "unexpected": unexpected}


def undisturbed_run(network, recipe, folder):
    """The seconds that the run takes and the bytes of its last checkpoint."""
    before = time.monotonic()
    status, _, _ = attempt(words_of(network, recipe, folder), folder.with_suffix(".log"))
    if status != 0:
        raise SystemExit(folder.with_suffix(".log").read_text())
    return time.monotonic() - before, (folder / "checkpoints" / "last.ckpt").stat().st_size


# --- all of them ---------------------------------------------------------------------------------------------


def planned(counts, networks, root):
    """The jobs: each kind's runs take the recipes in turn, and the networks in turn for each recipe."""
    undisturbed, jobs = {}, []
    for kind, count in counts.items():
        for index in range(count):
            recipe = list(RECIPES)[index % len(RECIPES)]
            network = networks[index // len(RECIPES) % len(networks)]
            place = root / f"undisturbed_{network}_{list(RECIPES).index(recipe)}"
            if place not in undisturbed:
                undisturbed[place] = undisturbed_run(network, recipe, place)
            folder = root / f"{kind.replace(' ', '_')}_{index}"
            jobs.append(Job(kind, network, recipe, folder, place, *undisturbed[place]))
    return jobs


def table(runs):
    lines = [
        "| disturbed by | network | recipe | runs | disturbances | bit for bit equal | seconds to end, median (most) |"
    ]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    groups = {}
    for run in runs:
        groups.setdefault((run["kind"], run["network"], run["recipe"]), []).append(run)
    order = [list(SIGNALS), sorted({network for _, network, _ in groups}), list(RECIPES)]
    for kind, network, recipe in sorted(
        groups, key=lambda group: [o.index(g) for o, g in zip(order, group, strict=True)]
    ):
        some = groups[kind, network, recipe]
        endings = [one["seconds_to_end"] for run in some for one in run["disturbances"]]
        equal = sum(not run["difference"] and not run["unexpected"] for run in some)
        shown = f"{statistics.median(endings):.2f} ({max(endings):.2f})" if endings and kind.startswith("SIG") else "–"
        cells = [kind, f"`{network}`", recipe, len(some), len(endings), f"{equal} of {len(some)}", shown]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(words, usage):
    parser = argparse.ArgumentParser(usage=usage)
    for name, count in {"kill": 100, "terminate": 30, "interrupt": 30, "full": 20, "seed": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--networks", default="conv10,conv32_32_dropout")
    arguments = parser.parse_args(words)
    root = Path("outputs", "chaos", time.strftime("%Y-%m-%d_%H-%M-%S")).absolute()
    root.mkdir(parents=True)
    begun = time.monotonic()
    counts = (arguments.kill, arguments.terminate, arguments.interrupt, arguments.full)
    jobs = planned(dict(zip(SIGNALS, counts, strict=True)), arguments.networks.split(","), root)
    runs = []
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for run in pool.imap_unordered(disturbed_run, [(job, arguments.seed) for job in jobs]):
            runs.append(run)
            if bad := run["unexpected"] or run["difference"]:
                print(
                    f"{run['kind']}, {run['network']}, {run['recipe']}: {bad}; see {root}", file=sys.stderr, flush=True
                )
    seconds = {f"{job.network}, {job.recipe}": job.seconds for job in jobs}
    record = {
        "seed": arguments.seed,
        "settings": SETTINGS,
        "recipes": RECIPES,
        "seconds": time.monotonic() - begun,
        "versions": versions(),
        "git_commit": git_commit(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "undisturbed_seconds": seconds,
        "table": table(runs),
        "runs": runs,
    }
    (root / "chaos.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(record["table"])
    print(f"\n{record['seconds']:.0f} s; {root / 'chaos.json'}")
    return int(any(run["unexpected"] or run["difference"] for run in runs))
