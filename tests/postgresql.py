"""A PostgreSQL server of the tests' own, on loopback, in a temporary folder; it can be ended as hard as one likes."""

import os
import shutil
import socket
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path


def programs() -> Path | None:
    """The folder of initdb and pg_ctl, which Debian keeps off the PATH."""
    found = [Path(path).parent for path in [shutil.which("pg_ctl")] if path]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((folder for folder in found if (folder / "initdb").exists()), None)


def free_port() -> int:
    """One that nobody is given by chance while the server is down: below those that Linux deals out."""
    for port in range(25_000 + os.getpid() % 5_000, 32_000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is free")


class Server:
    """Started when made; `url` is its database. It refuses to run as root: then it runs as `postgres`."""

    def __init__(self) -> None:
        self.programs = programs()
        self.folder = Path(tempfile.mkdtemp(prefix="mnist_cnn_postgresql_"))
        self.user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
        if self.user:
            shutil.chown(self.folder, "postgres", "postgres")
        self.port = free_port()
        (self.folder / "password").write_text("p:w@d/secret\n")
        self._do(
            "initdb", "--auth=scram-sha-256", "--username=sweeper", f"--pwfile={self.folder / 'password'}", "--no-sync"
        )
        self.start()
        self.url = f"postgresql://sweeper:p%3Aw%40d%2Fsecret@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-h 127.0.0.1 -p {self.port} -k {self.folder} -c fsync=off"
        self._do("pg_ctl", "start", "--wait", "--timeout=300", f"--log={self.folder / 'log'}", f"--options={options}")

    def stop(self, mode: str = "immediate") -> None:
        self._do("pg_ctl", "stop", "--wait", "--timeout=300", f"--mode={mode}")

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def _do(self, program: str, *words: str) -> None:
        command = [self.programs / program, f"--pgdata={self.folder / 'data'}", *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=self.folder, **self.user)
