"""mnist-train: train a convnet, test it once, leave a run's folder. Also `mnist_cnn.train`, the same from Python.

from mnist_cnn import train

run = train(["data=digits", "epochs=3"])
run.metrics, run.history, run.classifier, run.folder
"""

# torch and Lightning take seconds to import: that is done only once the configuration is known to be right.

from __future__ import annotations

import base64
import csv
import html
import logging
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mnist_cnn.config.schema import UserError, validated
from mnist_cnn.config.settings import CONF, Train
from mnist_cnn.runs.command_line import literal_paths, typed
from mnist_cnn.runs.errors import in_one_line
from mnist_cnn.runs.folder import claim, discard, read_metrics, release
from mnist_cnn.runs.hydra_app import STOPPED, Console, guarded, in_worker, is_sweep, plain, plain_job, run_command
from mnist_cnn.runs.multirun import run_sweep, with_own_threads
from mnist_cnn.runs.sweep_folder import state

if TYPE_CHECKING:
    from mnist_cnn.inference.classifier import Classifier
    from mnist_cnn.training.fit import Metrics

__all__ = ["Run", "train"]

log = logging.getLogger(__name__)
_training = threading.Lock()  # Hydra, torch's random numbers and signals are the process's: one run at a time


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def job(config: DictConfig) -> Metrics | None:
    details = HydraConfig.get()
    folder = Path(details.runtime.output_dir)

    def work() -> Metrics:
        settings, overrides = validated(Train, plain(config)), typed(details.overrides.task)
        if is_sweep():
            (folder / "error.txt").unlink(missing_ok=True)  # of an earlier start
            if state(folder) == "finished":
                log.info("%s has finished already: nothing was changed", folder)
                return read_metrics(folder)
            settings = with_own_threads(settings)
            if state(folder) == "interrupted":
                settings = settings.model_copy(update={"resume": str(folder)})
        from mnist_cnn.training.fit import fit

        return fit(settings, folder, overrides, details.runtime.choices, silent=in_worker())

    return guarded(work, folder, fail_fast=config.fail_fast)


def main() -> None:
    run_command(lambda: run_sweep(job), "train")


class Run:
    """A run's folder: what `train` returns. In a notebook it shows its figures and learning curves.

    Attributes:
        folder: where the run has left everything.
        metrics: metrics.json, such as `run.metrics["test/accuracy"]`.
        history: the rows of metrics.csv, one an epoch; `pandas.DataFrame(run.history)` takes them as they are.
        classifier: the tested checkpoint, loaded when it is asked for first.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def metrics(self) -> Metrics:
        return read_metrics(self.folder) if (self.folder / "metrics.json").is_file() else {}

    @cached_property
    def history(self) -> list[dict[str, float]]:
        with (self.folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
            return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]

    @cached_property
    def classifier(self) -> Classifier:
        from mnist_cnn.inference.classifier import load_classifier

        return load_classifier(self.folder)

    def __repr__(self) -> str:
        accuracy = self.metrics.get("test/accuracy")
        return f"Run('{self.folder}'{'' if accuracy is None else f', test accuracy {accuracy:.2%}'})"

    def _repr_html_(self) -> str:
        from mnist_cnn.inference.plots import learning_curves, png

        picture = base64.b64encode(png(learning_curves({"": self.history}))).decode()
        known = {key: value for key, value in self.metrics.items() if value is not None}
        rows = "".join(f"<tr><td>{key}</td><td>{value:.6g}</td></tr>" for key, value in known.items())
        about = f"<p>{html.escape(repr(self))}</p><table>{rows}</table>"
        return f'{about}<img alt="learning curves" src="data:image/png;base64,{picture}">'


def train(config: Sequence[str] | Mapping[str, Any] = (), verbose: bool = True) -> Run:
    """Train as `mnist-train` does.

    Args:
        config: overrides as on the command line, such as `["data=digits", "epochs=3"]`, or a whole configuration.
        verbose: print a line for each epoch, as the command does.

    Raises:
        UserError: a setting, a file or a device is wrong, or another thread trains; the message is one line.
        KeyboardInterrupt: after Ctrl-C; the run is saved, and `["resume=FOLDER"]` continues it.
    """
    if not _training.acquire(blocking=False):
        raise UserError("another thread of this process trains: wait for it, or train in a process of your own")
    words = [config] if isinstance(config, str) else config
    overrides = [] if isinstance(words, Mapping) else literal_paths([str(override) for override in words])
    folder: Path | None = None
    previous = HydraConfig.instance().cfg
    try:
        composed = composed_of(overrides)
        if isinstance(config, Mapping):
            settings_alone = {key: value for key, value in config.items() if key != "run"}  # config.yaml's record
            whole = OmegaConf.merge({"hydra": composed.hydra}, settings_alone)
            assert isinstance(whole, DictConfig)
            composed = whole
        settings = validated(Train, plain_job(composed))
        by_user = any(word.startswith("hydra.run.dir=") for word in overrides)
        folder = Path(settings.resume or claim(Path(composed.hydra.run.dir), by_user)).absolute()
        settings = validated(Train, plain_job(composed, folder))  # loggers write into the folder
        from mnist_cnn.training.fit import fit

        with _printed(verbose):
            choices = {} if isinstance(config, Mapping) else composed.hydra.runtime.choices
            fit(settings, folder, overrides, choices, silent=not verbose)
        return Run(folder)
    except (UserError, OmegaConfBaseException) as error:
        if folder:
            discard(folder)
        raise UserError(in_one_line(error, "train")) from None
    except SystemExit as ended:
        if ended.code != STOPPED[0]:
            raise
        raise KeyboardInterrupt(f"{folder} is saved") from None  # the interpreter or the notebook goes on
    finally:
        HydraConfig.instance().cfg = previous
        if folder:
            release(folder)
        _training.release()


@contextmanager
def _printed(verbose: bool) -> Iterator[None]:
    """The package's lines on stdout and stderr, or nowhere; where a program has handlers of its own, they have them."""
    package, console = logging.getLogger("mnist_cnn"), Console()
    before = package.level
    if not package.hasHandlers():
        package.addHandler(console)
    package.setLevel(logging.INFO if verbose else logging.CRITICAL)
    try:
        yield
    finally:
        package.removeHandler(console)
        package.setLevel(before)


def composed_of(overrides: list[str]) -> DictConfig:
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra.compose("train", overrides, return_hydra_config=True)
    except Exception as error:  # Hydra has no common one for a wrong override
        raise UserError(in_one_line(error, "train")) from None


class _Callable(ModuleType):
    """`mnist_cnn.train` is this module and the function alike, whichever was imported first."""

    def __call__(self, config: Sequence[str] | Mapping[str, Any] = (), verbose: bool = True) -> Run:
        return train(config, verbose)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    main()
