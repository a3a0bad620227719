"""mnist-train: train a convnet, test it once, leave a run's folder. Also `mnist_cnn.train`, the same from Python.

torch and Lightning take seconds to import: that is done only once the configuration is known to be right.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mnist_cnn.config.schema import UserError, validated
from mnist_cnn.config.settings import CONF, Train
from mnist_cnn.runs.folder import claim, discard, release
from mnist_cnn.runs.hydra_app import guarded, in_one_line, in_worker, is_sweep, plain, plain_job, run_command
from mnist_cnn.runs.multirun import run_sweep, state, with_own_threads

if TYPE_CHECKING:
    from mnist_cnn.training.fit import Metrics

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def job(config: DictConfig) -> Metrics | None:
    details = HydraConfig.get()
    folder = Path(details.runtime.output_dir)

    def work() -> Metrics:
        settings, overrides = validated(Train, plain(config)), details.overrides.task
        if is_sweep():
            (folder / "error.txt").unlink(missing_ok=True)  # of an earlier start
            if state(folder) == "finished":
                log.info("%s has finished already: nothing was changed", folder)
                return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            settings = with_own_threads(settings)
            if state(folder) == "interrupted":  # its own settings were compared before the sweep went on
                settings, overrides = settings.model_copy(update={"resume": str(folder)}), []
        from mnist_cnn.training.fit import fit

        return fit(settings, folder, overrides, details.runtime.choices, silent=in_worker())

    return guarded(work, folder, fail_fast=config.fail_fast)


def main() -> None:
    run_command(lambda: run_sweep(job), "train")


def train(config: Sequence[str] | Mapping[str, Any] = ()) -> Metrics:
    """Train as `mnist-train` does, and return the metrics that it writes to metrics.json.

    Args:
        config: overrides as on the command line, such as `["data=digits", "epochs=3"]`, or a whole configuration.

    Raises:
        UserError: a setting, a file or a device is wrong; the message is one line.
    """
    words = [config] if isinstance(config, str) else config
    overrides = [] if isinstance(words, Mapping) else [str(override) for override in words]
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

        return fit(settings, folder, overrides, {} if isinstance(config, Mapping) else composed.hydra.runtime.choices)
    except (UserError, OmegaConfBaseException) as error:
        if folder:
            discard(folder)
        raise UserError(in_one_line(error, "train")) from None
    finally:
        HydraConfig.instance().cfg = previous
        if folder:
            release(folder)


def composed_of(overrides: list[str]) -> DictConfig:
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra.compose("train", overrides, return_hydra_config=True)
    except Exception as error:  # Hydra has no common one for a wrong override
        raise UserError(in_one_line(error, "train")) from None


class _Callable(ModuleType):
    """`mnist_cnn.train` is this module and the function alike, whichever was imported first."""

    def __call__(self, config: Sequence[str] | Mapping[str, Any] = ()) -> Metrics:
        return train(config)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    main()
