"""An optimizer by which a run disturbs itself at an exact step, whatever the machine's speed.

`optimizer._target_=disturbed.Adam` with an environment's `DISTURB=9 30 /path`: SIGKILL in the 30th step of the process
that comes to it first; the file at the path says that it was done, so that the run that goes on is left alone.
"""

import os
from contextlib import suppress
from pathlib import Path

import torch


class Adam(torch.optim.Adam):
    steps = 0

    def step(self, closure=None):
        self.steps += 1
        signum, number, done = os.environ.get("DISTURB", "0 0 -").split(maxsplit=2)
        if self.steps == int(number):
            with suppress(FileExistsError):
                Path(done).touch(exist_ok=False)
                os.kill(os.getpid(), int(signum))
        return super().step(closure)
