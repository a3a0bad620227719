"""Sweeps through SLURM's own daemons, started on this machine: slurmctld, slurmd and munged of Debian's slurm-wlm."""

import csv
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from conftest import PATIENCE, equal, outcome, wait_until

NETWORK = ("architecture.blocks=[{filters:4,kernel:5,pool:4,dropout:0.25}]", "architecture.dense=[{units:16}]")
SMALL = ("data=digits", "plots=false", "data.batch_size=64", "epochs=2", "accelerator.threads=1", *NETWORK)
SECONDS = 60  # for the daemons to start
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={controller}
SlurmdPort={node}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES State=UP
"""


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.fixture(scope="module")
def slurm():
    """SLURM_CONF of a cluster of this machine, with two cores; its daemons end with the tests."""
    path = f"{os.environ['PATH']}:/usr/sbin"  # where Debian has daemons
    programs = {name: shutil.which(name, path=path) for name in ("munged", "slurmctld", "slurmd", "scontrol")}
    if missing := [name for name, program in programs.items() if program is None]:
        reason = f"no {', '.join(missing)}: apt-get install slurm-wlm munge"
        (pytest.fail if os.environ.get("MNIST_CNN_SLURM") == "required" else pytest.skip)(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # a socket's path must be short
    folder.chmod(0o711)
    (folder / "state").mkdir()
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    values = {"host": host, "user": getpass.getuser(), "controller": free_port(), "node": free_port()}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, **values))
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    munge = [f"--{name}-file={folder / name}" for name in ("key", "pid", "log", "seed")]
    commands = [
        [programs["munged"], "--foreground", "--force", f"--socket={folder / 'munge.socket'}", *munge],
        [programs["slurmctld"], "-D", "-i"],
        [programs["slurmd"], "-D"],
    ]
    daemons = []
    try:
        with (folder / "daemons.log").open("w") as output:
            for command in commands:
                daemons.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
                if not daemons[1:]:
                    wait_until((folder / "munge.socket").exists)
        until = time.monotonic() + SECONDS
        while "State=IDLE" not in control(environment, "show", "node"):
            assert time.monotonic() < until, (folder / "daemons.log").read_text()
            time.sleep(0.1)
        yield environment["SLURM_CONF"]
        subprocess.run(["scancel", f"--user={values['user']}"], env=environment, check=False)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(PATIENCE)
        shutil.rmtree(folder, ignore_errors=True)


def control(environment, *words):
    command = ["scontrol", "--oneliner", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout


def test_a_sweep_of_two_jobs_of_which_slurm_queues_one_again(run, start, tmp_path, slurm):
    """SIGUSR2, as SLURM sends it before a job's time is up: the job saves, is queued again, and ends as if alone."""
    pytest.importorskip("submitit")
    settings = (*SMALL, "optimizer._target_=disturbed.Adam")
    environment = {"SLURM_CONF": slurm, "DISTURB": f"{signal.SIGUSR2:d} 30 {tmp_path / 'signalled'}"}
    sweep = ("hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.partition=main")
    process = start("-m", "mnist_cnn.train", "-m", *settings, "seed=1,2", *sweep, "hydra.sweep.dir=s", env=environment)
    ours = {**os.environ, "SLURM_CONF": slurm}
    until = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < until:
        for job in control(ours, "show", "job").splitlines():
            if "Reason=BeginTime" in job:  # SLURM would let it wait for two minutes before it begins again
                control(ours, "update", job.split()[0], "StartTime=now")
        time.sleep(0.5)
    ended = outcome(process)
    assert ended.status == 0, ended
    rows = list(csv.DictReader((tmp_path / "s" / "results.csv").open()))
    assert [row["error"] for row in rows] == ["", ""]
    folders = [tmp_path / "s" / row["job"] for row in rows]
    queued_again = ["stopped by SIGUSR2" in (folder / "train.log").read_text() for folder in folders]
    assert sorted(queued_again) == [False, True]
    (script,) = (tmp_path / "s" / ".submitit").glob("*/*submission.sh")
    for line in ("--requeue", "--partition=main", "--signal=USR2@120", "--time=240"):
        assert f"#SBATCH {line}\n" in script.read_text()
    number = queued_again.index(True)
    run("mnist-train", *settings, rows[number]["overrides"].split()[-1], "hydra.run.dir=alone")
    equal(tmp_path / "alone", folders[number])
