"""mnist-sweep: search hyperparameters with Optuna; any number of processes and machines work on one study."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mnist_cnn.config.parameters import Sweep
from mnist_cnn.config.schema import RunError, UserError, validated
from mnist_cnn.config.settings import CONF
from mnist_cnn.runs.folder import refuse_occupied, write_whole
from mnist_cnn.runs.hydra_app import plain, refuse, run_command
from mnist_cnn.runs.jobs import guarded
from mnist_cnn.search.space import OWN, Space, compose, key_of, study_name

if TYPE_CHECKING:
    from mnist_cnn.search.study import SharedStudy
    from mnist_cnn.training.fit import Metrics

log = logging.getLogger("mnist-sweep")

STUDY = "study.yaml"
SEEDS = 5  # of the best trial, trained again


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="sweep")
def job(config: DictConfig) -> Any:
    def work() -> Any:
        settings = validated(Sweep, plain(config))
        for package in ("optuna", "plotly"):
            if not importlib.util.find_spec(package):
                raise UserError(f"mnist-sweep needs the package {package}: pip install 'mnist-cnn[sweep]'")
        from mnist_cnn.search.storage import StorageError, reason_of

        overrides = list(HydraConfig.get().overrides.task)
        try:
            if settings.report:
                return conclude(existing(settings, Path(settings.report)))
            if settings.retrain:
                return retrain(existing(settings, Path(settings.retrain)), overrides)
            return search(settings, overrides, HydraConfig.get().runtime.choices["sweep"])
        except StorageError as error:
            raise RunError(f"the storage does not answer: {reason_of(error)}; the same command continues") from None

    return guarded(work, Path())


def main() -> None:
    if {"-m", "--multirun"} & set(sys.argv[1:]):
        refuse("mnist-sweep is a sweep itself: leave out -m, or use mnist-train -m")
    run_command(job, "sweep")


# --- a search ------------------------------------------------------------------------------------------------


def search(settings: Sweep, overrides: list[str], sweep: str) -> None:
    """Run the study's trials that are left, and leave its report."""
    try:
        space = Space(settings, overrides)
    except UserError as error:
        raise UserError(f"sweep={sweep}: {error}") from None
    name = settings.study or study_name(sweep, overrides)

    from mnist_cnn.search.crew import Crew
    from mnist_cnn.search.report import Progress
    from mnist_cnn.search.storage import patiently, shown
    from mnist_cnn.search.trials import PARENT, Worker, stopped_by_signals

    with stopped_by_signals() as stop:
        if PARENT in os.environ:  # a local worker: the command that began it says what there is to say
            address = shown(settings.storage or "")
            shared = patiently(lambda: joined(settings, space, name), stop, address)
            Worker(shared, space, settings, stop, lambda _: None).run()
        else:
            shared = joined(settings, space, name)
            with Progress(shared, settings.trials) as progress:
                if settings.workers > 1:
                    Crew(shared, settings, stop, progress).run()
                else:
                    Worker(shared, space, settings, stop, progress.look).run()
            if stop.is_set():
                sent = signal.Signals(stop.signum).name
                log.error("stopped by %s: %s; the same command continues", sent, progress.state())
    if stop.is_set():
        raise SystemExit(128 + stop.signum)
    if PARENT not in os.environ:
        shared.storage.patiently(lambda: conclude(shared), stop)


def joined(settings: Sweep, space: Space, name: str) -> SharedStudy:
    """The study of that name, begun where there is none yet.

    Raises:
        UserError: the folder is another's, the storage is not reached, or its study of that name is another.
    """
    from mnist_cnn.search.study import SharedStudy

    folder = Path(settings.folder or Path("outputs", "sweep", name))
    refuse_occupied(folder)
    if (folder / STUDY).is_file() and (other := described(folder)["study"]) != name:
        raise UserError(f"{folder} is the folder of the study {other}: choose another")
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        shared = SharedStudy(settings, name, folder)
    except UserError:
        if new and not any(folder.iterdir()):
            folder.rmdir()
        raise
    shared.agree(space, settings)
    describe(folder, name, settings)
    return shared


# --- a study that is there -----------------------------------------------------------------------------------


def describe(folder: Path, name: str, settings: Sweep) -> None:
    """Write what finds the study again; a password stays out of it."""
    from mnist_cnn.search.storage import without_password

    storage = without_password(settings.storage) if settings.storage else None
    about = {"study": name, "metric": settings.metric, "storage": storage, "retries": settings.retries}
    write_whole(folder / STUDY, yaml.safe_dump(about, sort_keys=False))


def described(folder: Path) -> dict[str, Any]:
    try:
        about = yaml.safe_load((folder / STUDY).read_text(encoding="utf-8"))
        return {key: about[key] for key in ("study", "metric", "storage", "retries")}
    except (OSError, yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError):
        raise UserError(f"{folder} is not a study's folder: it has no {STUDY} of mnist-sweep") from None


def existing(settings: Sweep, folder: Path) -> SharedStudy:
    """The study of a folder; `storage=` again where its address needs a password."""
    from mnist_cnn.search.study import SharedStudy

    about = described(folder)
    storage = settings.storage or about["storage"]
    update = {"metric": about["metric"], "retries": about["retries"], "storage": storage}
    return SharedStudy(settings.model_copy(update=update), about["study"], folder, begin=False)


def conclude(shared: SharedStudy) -> None:
    """Write the report, and say where it is.

    Raises:
        RunError: no trial is complete.
    """
    from mnist_cnn.search.report import parameters, state, write_report

    best, now = write_report(shared), shared.tally()
    log.info("%s", state(shared, now, now.begun))
    if best is None:
        why = f"; such as {now.failed[0].user_attrs.get('error', 'killed')}" if now.failed else ""
        raise RunError(f"no trial of {shared.folder} is complete{why}")
    log.info("best: %s", parameters(best))
    log.info("mnist-train --config-dir %s experiment=best", shared.folder)
    log.info("%s", shared.folder)


def retrain(shared: SharedStudy, overrides: list[str]) -> None:
    """Train the best trial on its own seed and the four after it, each scored on the test set; mean ± sd."""
    from mnist_cnn.search.report import best_of, figure

    best = best_of(shared, shared.tally())
    if best is None:
        raise UserError(f"no trial of {shared.folder} is complete yet: nothing to train again")
    words = [word for word in best.user_attrs["overrides"] if key_of(word) not in ("seed", "test")]
    words += [word for word in overrides if key_of(word).split(".")[0] not in OWN]
    first = compose(best.user_attrs["overrides"])[0].seed
    log.info(
        "trial %d, %s %s, on seeds %d to %d",
        best.number,
        shared.metric,
        figure(shared, best.values[0]),
        first,
        first + SEEDS - 1,
    )
    runs = {seed: retrained(shared, [*words, f"seed={seed}"], seed) for seed in range(first, first + SEEDS)}
    again = runs[first][shared.metric] == best.values[0]
    log.info(
        "seed %d gives the trial's own figure%s",
        first,
        " again" if again else " not: other overrides, threads or machine",
    )
    accuracies = [run["test/accuracy"] or 0.0 for run in runs.values()]
    mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
    record = {
        "trial": best.number,
        "again": again,
        "test/accuracy mean": mean,
        "test/accuracy sd": deviation,
        "runs": runs,
    }
    write_whole(shared.folder / "retrain.json", json.dumps(record, indent=1) + "\n")
    log.info("test accuracy %.2f ± %.2f %% (mean ± sd of %d seeds)", 100 * mean, 100 * deviation, SEEDS)
    log.info("%s", shared.folder / "retrain.json")


def retrained(shared: SharedStudy, overrides: list[str], seed: int) -> Metrics:
    """A run in the study's folder, which a later call finds done or continues."""
    from mnist_cnn.search.trials import logged
    from mnist_cnn.training.fit import fit

    folder = shared.folder / "retrain" / f"seed_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    settings, choices = compose(overrides, folder)
    if (folder / "config.yaml").is_file():
        settings = settings.model_copy(update={"resume": str(folder)})
    try:
        with logged(folder):
            metrics = fit(settings, folder, overrides, choices)
    except SystemExit:
        log.error("stopped at seed %d; the same command continues", seed)
        raise
    log.info(
        "seed %d  validation %.2f%%  test %.2f%%",
        seed,
        100 * (metrics["val/accuracy"] or 0),
        100 * (metrics["test/accuracy"] or 0),
    )
    return metrics


if __name__ == "__main__":
    main()
