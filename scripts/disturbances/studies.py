"""`scripts/chaos sweep`: studies whose workers are killed, what workers gain, what trials leak.

usage: scripts/chaos sweep [--trials N] [--kills N] [--flat N] [--seed N] [PART...]
       --trials N   of each study (40)                --kills N   of each worker, by SIGKILL (2)
       --flat N     of the study of one process (500) --seed N    of the moments (1)
       PART         postgresql, sqlite, throughput, flat (all)

postgresql: 4 workers; sqlite: 2. Each time all are killed the same command begins anew. All study scikit-learn's digits
with conv10. Tables are printed; outputs/chaos/<date>_<time>/sweep.json has the figures, and
`scripts/tables outputs/chaos/<date>_<time>` writes them into scripts/README.md.
"""

import argparse
import csv
import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["data=digits", "architecture=conv10", "accelerator=cpu"]
STUDY = ["sweep=learning_rate", *SMALL]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
PATIENCE = 1200  # seconds, after which a study hangs
SECONDS = (0, 12)  # from the first epoch's end after a command's start until a worker is killed


def command(*words):
    return [sys.executable, "-P", "-m", "mnist_cnn.sweep", *words]


def trials(folder):
    return list(csv.DictReader((folder / "trials.csv").open()))


def killed_once(process, workers, moments, folder):
    """Wait for a command to end, while each of its workers is killed at a moment of its own; how many were."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    begun, start, due, killed = time.monotonic(), time.time(), {}, 0
    while process.poll() is None:
        now = time.monotonic() - begun
        if now > PATIENCE:
            process.kill()
        try:
            found = children.read_text().split()
        except OSError:
            break
        training = due or any(file.stat().st_mtime > start for file in folder.glob("trials/*/metrics.csv"))
        if not due and training and len(found) == workers:
            due = {pid: now + moments.uniform(*SECONDS) for pid in found}
        for pid, moment in due.items():
            if now > moment and pid in found:
                os.kill(int(pid), signal.SIGKILL)
                due[pid], killed = float("inf"), killed + 1
        time.sleep(0.05)
    return killed


def disturbed(kind, count, workers, kills, seed, root):
    """A study whose workers are each killed so many times, and begun anew by the same command each time."""
    sys.path.insert(0, str(ROOT / "tests"))
    import postgresql

    moments, folder = random.Random(f"{seed} {kind}"), root / kind
    server = postgresql.Server() if kind == "postgresql" else None
    words = [*STUDY, f"trials={count}", f"workers={workers}", "epochs=15", "heartbeat=1", f"folder={folder}"]
    words += [f"storage={server.url}"] if server else []
    begun, killed, seen, starts, status = time.monotonic(), 0, {}, 0, None
    with (root / f"{kind}.log").open("w") as log:
        while status != 0 and starts < kills + 1:
            starts += 1
            process = subprocess.Popen(command(*words), env=ENVIRONMENT, stdout=log, stderr=log)
            if starts <= kills:
                killed += killed_once(process, workers, moments, folder)
            status = process.wait(PATIENCE)
            for config in folder.glob("trials/*/config.yaml"):
                seen.setdefault(config, config.read_bytes())
    seconds = time.monotonic() - begun
    found = trials(folder) if status == 0 else []
    states = {state: sum(row["state"] == state for row in found) for state in ("complete", "pruned", "again")}
    wrong = judged(folder, found, count, seen, killed == kills * workers)
    again = subprocess.run(
        command(f"retrain={folder}", *([f"storage={server.url}"] if server else [])),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    reproduced = again.returncode == 0 and json.loads((folder / "retrain.json").read_text())["again"]
    if server:
        server.close()
    record = {"kind": kind, "workers": workers, "trials": count, "killed": killed, "starts": starts, **states}
    wrong = wrong or ("" if reproduced else "the best")
    return {**record, "reproduced": reproduced, "seconds": seconds, "wrong": wrong}


def judged(folder, found, count, seen, all_killed):
    """What is not as it should be at the end of a study."""
    if not found:
        return "it failed"
    ended = [row for row in found if row["state"] in ("complete", "pruned")]
    if len(ended) != count or any(row["state"] not in ("complete", "pruned", "again") for row in found):
        return f"{len(ended)} trials, and {sorted({row['state'] for row in found})}"
    if len({row["folder"] for row in ended}) != count:
        return "two trials in one folder"
    if any(config.read_bytes() != before for config, before in seen.items()):
        return "a folder was overwritten"
    for row in ended:
        figures = folder / row["folder"] / "metrics.json"
        if row["state"] == "complete" and float(row["val/accuracy"]) != json.loads(figures.read_text())["val/accuracy"]:
            return f"trial {row['trial']} is not what its folder says"
    return "" if all_killed else "it ended before all its workers were killed"


def throughput(count, root):
    """Seconds and trials a minute of the same study by one process and by several, from command to end."""
    rows = []
    for workers, threads in ((1, 4), (4, 1), (1, 2), (2, 1)):
        folder = root / f"throughput_{workers}_{threads}"
        words = [f"trials={count}", f"workers={workers}", f"accelerator.threads={threads}", "epochs=10"]
        begun = time.monotonic()
        subprocess.run(
            command(*STUDY, *words, "pruner._target_=optuna.pruners.NopPruner", f"folder={folder}"),
            env=ENVIRONMENT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        seconds = time.monotonic() - begun
        rows.append({"workers": workers, "threads": threads, "seconds": seconds, "a minute": 60 * count / seconds})
    return rows


def flat(count, root):
    """Memory in MiB and open files of one process, each fifty trials."""
    folder = root / "flat"
    words = [*STUDY, f"trials={count}", "epochs=1", f"folder={folder}"]
    rows, step = [], max(1, count // 10)
    with subprocess.Popen(command(*words), env=ENVIRONMENT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and len(rows) < 10:
            done = len(list(folder.glob("trials/*/config.yaml")))  # a pruned one has no metrics.json
            if done >= step * (len(rows) + 1):
                status = Path(f"/proc/{process.pid}/status").read_text()
                resident = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))
                files = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
                rows.append({"trials": done, "MiB": resident / 1024, "files": files})
            time.sleep(0.05)
    return rows


def tables(record):
    lines = []
    if studies := [record[kind] for kind in ("postgresql", "sqlite") if kind in record]:
        lines += ["| storage | workers | killed | commands | complete | pruned | run again | best again | seconds |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
        names = {"postgresql": "PostgreSQL", "sqlite": "SQLite"}
        for each in studies:
            best = "bit for bit" if each["reproduced"] else "no"
            figures = [names[each["kind"]], each["workers"], each["killed"], each["starts"], each["complete"]]
            figures += [each["pruned"], each["again"], best, f"{each['seconds']:.0f}"]
            lines.append("| " + " | ".join(map(str, figures)) + " |")
    if "throughput" in record:
        lines += ["", "| workers | threads each | seconds | trials a minute |", "| --- | --- | --- | --- |"]
        for each in record["throughput"]:
            figures = f"{each['seconds']:.0f} | {each['a minute']:.0f}"
            lines.append(f"| {each['workers']} | {each['threads']} | {figures} |")
        lines += ["", "Where one process has more threads than there are cores, they wait for each other."]
    if "flat" in record:
        lines += ["", "| trials of one process | " + " | ".join(str(each["trials"]) for each in record["flat"]) + " |"]
        lines += ["| --- |" + " --- |" * len(record["flat"])]
        for key, name in {"MiB": "resident, MiB", "files": "open files"}.items():
            lines.append(f"| {name} | " + " | ".join(f"{each[key]:.0f}" for each in record["flat"]) + " |")
    return "\n".join(lines)


def main():
    from mnist_cnn.runs.folder import git_commit, versions

    parser = argparse.ArgumentParser(usage=__doc__.partition("usage: ")[2])
    for name, count in {"trials": 40, "kills": 2, "flat": 500, "seed": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("parts", nargs="*")
    arguments = parser.parse_args(sys.argv[2:])
    parts = {
        "postgresql": lambda: disturbed("postgresql", arguments.trials, 4, arguments.kills, arguments.seed, root),
        "sqlite": lambda: disturbed("sqlite", arguments.trials, 2, arguments.kills, arguments.seed, root),
        "throughput": lambda: throughput(arguments.trials, root),
        "flat": lambda: flat(arguments.flat, root),
    }
    if unknown := [part for part in arguments.parts if part not in parts]:
        parser.error(f"{unknown[0]}: expected {', '.join(parts)}")
    root = Path("outputs", "chaos", time.strftime("%Y-%m-%d_%H-%M-%S")).absolute()
    root.mkdir(parents=True)
    record = {part: parts[part]() for part in arguments.parts or parts}
    record |= {"seed": arguments.seed, "git_commit": git_commit(), "versions": versions()}
    record["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    record["table"] = tables(record)
    (root / "sweep.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(f"{record['table']}\n\n{root / 'sweep.json'}")
    wrong = [
        f"{part}: {record[part]['wrong']}" for part in ("postgresql", "sqlite") if record.get(part, {}).get("wrong")
    ]
    for each in wrong:
        print(f"{each}; see {root}", file=sys.stderr)
    return int(bool(wrong))
