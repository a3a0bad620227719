"""A PostgreSQL server of the tests' own, on loopback, in a temporary folder; it can be ended as hard as one likes."""

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path


def programs() -> Path | None:
    """The folder of initdb and pg_ctl, which Debian keeps off the PATH."""
    found = [Path(path).parent for path in [shutil.which("pg_ctl")] if path]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((folder for folder in found if (folder / "initdb").exists()), None)


class Server:
    """Started when made; `url` is its database. It refuses to run as root: then it runs as `postgres`."""

    def __init__(self) -> None:
        self.programs = programs()
        self.folder = Path(tempfile.mkdtemp(prefix="mnist_cnn_postgresql_"))
        self.user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
        if self.user:
            shutil.chown(self.folder, "postgres", "postgres")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (self.folder / "password").write_text("p:w@d/secret\n")
        self._do(
            "initdb", "--auth=scram-sha-256", "--username=sweeper", f"--pwfile={self.folder / 'password'}", "--no-sync"
        )
        self.start()
        self.url = f"postgresql://sweeper:p%3Aw%40d%2Fsecret@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-h 127.0.0.1 -p {self.port} -k {self.folder} -c fsync=off"
        self._do("pg_ctl", "start", "--wait", f"--log={self.folder / 'log'}", f"--options={options}")

    def stop(self, mode: str = "immediate") -> None:
        self._do("pg_ctl", "stop", "--wait", f"--mode={mode}")

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def _do(self, program: str, *words: str) -> None:
        command = [self.programs / program, f"--pgdata={self.folder / 'data'}", *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=self.folder, **self.user)
