"""An optimizer by which a run disturbs itself at an exact step, whatever the machine's speed.

`optimizer._target_=disturbed.Adam +optimizer.signum=9 +optimizer.at=30 +optimizer.done=/path`: SIGKILL in step 30.
The file at the path says that it was done, so that the run that goes on is left alone. Of several ranks, the one whose
number is `rank`; the signal goes to `pid` where that is given. An environment's `DISTURB=9 30 /path` says the same.
"""

import os
from contextlib import suppress
from pathlib import Path

import torch


class Adam(torch.optim.Adam):
    steps = 0

    def __init__(self, params, signum=0, at=0, done="", rank=0, pid=0, **settings):
        super().__init__(params, **settings)
        self.disturb = (signum, at, done)
        if "DISTURB" in os.environ:
            signum, at, done = os.environ["DISTURB"].split(maxsplit=2)
            self.disturb = (int(signum), int(at), done)
        self.rank, self.pid = rank, pid

    def step(self, closure=None):
        self.steps += 1
        signum, at, done = self.disturb
        if self.steps == at and int(os.environ.get("RANK", 0)) == self.rank:
            with suppress(FileExistsError):
                Path(done).touch(exist_ok=False)
                os.kill(self.pid or os.getpid(), signum)
        return super().step(closure)


class Failing(torch.optim.Adam):
    """Rank 1 raises in its fifth step; two were tried before training begins."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        if self.steps == 5 and os.environ.get("RANK") == "1":
            raise ValueError("something odd")
        return super().step(closure)


class Noting(torch.optim.Adam):
    """Writes the part of the machine that its process has into the file `noted`."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        threads = torch.get_num_threads()
        Path("noted").write_text(f"GPU {os.environ.get('CUDA_VISIBLE_DEVICES')}, {threads} thread{'s' * (threads > 1)}")
