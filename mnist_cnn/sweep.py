"""mnist-sweep: search hyperparameters with Optuna; any number of processes and machines work on one study."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import statistics
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mnist_cnn.config.schema import RunError, UserError, validated
from mnist_cnn.config.settings import CONF
from mnist_cnn.config.study_settings import SweepSettings
from mnist_cnn.runs.command_line import override_key, typed
from mnist_cnn.runs.errors import refuse
from mnist_cnn.runs.files import write_whole
from mnist_cnn.runs.folder import refuse_occupied
from mnist_cnn.runs.hydra_app import guarded, plain, run_command, user_config_dir
from mnist_cnn.runs.strangers import require_known, require_own_files, require_plain
from mnist_cnn.search.space import Space, compose, study_name, training_overrides

if TYPE_CHECKING:
    from mnist_cnn.search.study import SharedStudy
    from mnist_cnn.search.worker import Stop

log = logging.getLogger("mnist-sweep")

SEEDS = 5  # of the best trial, trained again


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="sweep")
def job(config: DictConfig) -> Any:
    return guarded(lambda: work(validated(SweepSettings, plain(config))), Path())


def main() -> None:
    if {"-m", "--multirun"} & set(sys.argv[1:]):
        refuse("mnist-sweep is a sweep itself: leave out -m, or use mnist-train -m")
    run_command(job, "sweep")


def work(settings: SweepSettings) -> None:
    for name in ("optuna", "plotly"):
        if not importlib.util.find_spec(name):
            raise UserError(f"mnist-sweep needs the package {name}: pip install 'mnist-cnn[sweep]'")
    from mnist_cnn.search.study import reason_of, storage_error, without_password

    try:
        if settings.report:
            conclude(existing(settings, Path(settings.report)))
        elif settings.retrain:
            retrain(existing(settings, Path(settings.retrain)), settings, typed(HydraConfig.get().overrides.task))
        else:
            search(settings)
    except Exception as error:
        found = storage_error(error)
        if found is None:
            raise
        place = f" {without_password(settings.storage)}" if settings.storage else ""
        raise RunError(f"the storage{place} does not answer: {reason_of(found)}; the same command continues") from None


# --- a search ------------------------------------------------------------------------------------------------


def search(settings: SweepSettings) -> None:
    """Run the study's trials that are left, and leave its report."""
    overrides, sweep = typed(HydraConfig.get().overrides.task), HydraConfig.get().runtime.choices["sweep"]
    try:
        space = Space(settings, overrides)
        total = int(min(settings.trials, space.size(settings.sampler)))
    except UserError as error:
        raise UserError(f"sweep={sweep}: {error}") from None
    name = settings.study or study_name(sweep, overrides)

    from mnist_cnn.search.report import Progress
    from mnist_cnn.search.worker import PARENT, Worker, end_with_parent, run_workers

    with stopped_by_signals() as stop:
        shared = open_study(settings, space, name)
        if PARENT in os.environ:  # a local worker: the command that began it says what there is to say
            end_with_parent(int(os.environ[PARENT]))
            check_machine(settings)
            Worker(shared, space, total, stop, lambda: None).run()
        else:
            shared.fill(total)
            progress = Progress(shared, total)
            if len(progress.told) < total and settings.workers > 1:
                run_workers(settings, shared.folder, stop, progress.look)
            elif len(progress.told) < total:
                check_machine(settings)
                Worker(shared, space, total, stop, progress.look).run()
            progress.conclude(stop.signum)
    if stop.is_set():
        raise SystemExit(128 + stop.signum)
    if PARENT not in os.environ:
        conclude(shared)


@contextmanager
def stopped_by_signals() -> Iterator[Stop]:
    """SIGINT and SIGTERM set the event; a heartbeat that the storage does not take prints no traceback."""
    from mnist_cnn.search.worker import Stop

    stop, hook = Stop(), threading.excepthook
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    threading.excepthook = lambda _: None  # the trial's next report meets the same storage
    try:
        yield stop
    finally:
        threading.excepthook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def open_study(settings: SweepSettings, space: Space, name: str) -> SharedStudy:
    """The study of that name, begun where there is none yet.

    Raises:
        UserError: the folder is another's, the storage is not reached, or its study of that name is another.
    """
    from mnist_cnn.search.study import STUDY, SharedStudy, read_study_file

    folder = Path(settings.folder or Path("outputs", "sweep", name))
    refuse_occupied(folder)
    if (folder / STUDY).is_file() and (other := read_study_file(folder)["study"]) != name:
        raise UserError(f"{folder} is the folder of the study {other}: choose another")
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        shared = SharedStudy(settings, name, folder, user_config_dir(HydraConfig.get()))
    except UserError:
        if new and not any(folder.iterdir()):
            folder.rmdir()
        raise
    shared.require_same(space, settings)
    shared.write_study_file()
    return shared


def check_machine(settings: SweepSettings) -> None:
    """Have a machine without the data or the device refuse the study, and not fail each of its trials."""
    from mnist_cnn.data.datasets import load
    from mnist_cnn.models.device import check_precision, find_device

    check_precision(settings.accelerator.precision, find_device(settings.accelerator.name))
    load(settings.data.name, settings.data.root, settings.data.test)


# --- a study that is there -----------------------------------------------------------------------------------


def existing(settings: SweepSettings, folder: Path) -> SharedStudy:
    """The study of a folder; an address of its storage has to be given again."""
    from mnist_cnn.search.study import SharedStudy, read_study_file

    about = read_study_file(folder)
    require_own_files(folder)
    if (stored := about["storage"]) and not settings.storage:  # whoever answers there is told passwords
        raise UserError(f"{folder} has storage={stored}, which a folder may not choose: give storage=… again")
    update = {"metric": about["metric"], "retries": about["retries"]}
    own = user_config_dir(HydraConfig.get()) or about["config_dir"]
    return SharedStudy(settings.model_copy(update=update), about["study"], folder, own, begin=False)


def conclude(shared: SharedStudy) -> None:
    """Write the report, and say where it is.

    Raises:
        RunError: no trial is complete.
    """
    from mnist_cnn.search.report import best_command, figure, parameters, reason, state, write_report

    log.info("writing the report")
    best, finished = write_report(shared), shared.finished()
    if best is None:
        why = next((f"; such as {reason(trial)}" for trial in finished if reason(trial)), "")
        raise RunError(f"no trial of {shared.folder} is complete{why}")
    counts = shared.counts()
    log.info("%s", state(shared, counts.total() - counts["again"] - counts["surplus"]))
    log.info("%s", best_command(shared))
    log.info("best: trial %d  %s  %s", best.number, figure(shared, best.values[0]), parameters(best))
    log.info("%s", shared.folder)


def retrain(shared: SharedStudy, settings: SweepSettings, overrides: list[str]) -> None:
    """Train the best trial on its own seed and the four after it, each scored on the test set; mean ± sd."""
    from mnist_cnn.search.report import figure

    best = shared.best()
    if best is None:
        raise UserError(f"no trial of {shared.folder} is complete yet: nothing to train again")
    ours = training_overrides(overrides)
    given = {"seed", "test", *map(override_key, ours)}
    words = [word for word in best.user_attrs["overrides"] if override_key(word) not in given]
    require_plain(words, shared.folder)
    words += ours
    require_known(compose(words, config_dir=shared.config_dir)[0], settings, shared.folder)
    first = compose(best.user_attrs["overrides"], config_dir=shared.config_dir)[0].seed
    last, value = first + SEEDS - 1, figure(shared, best.values[0])
    log.info("trial %d, %s %s, on seeds %d to %d", best.number, shared.metric, value, first, last)
    runs = {seed: retrained(shared, [*words, f"seed={seed}"], seed) for seed in range(first, last + 1)}
    again = runs[first][shared.metric] == best.values[0]
    how = "again" if again else "not: other overrides, threads or machine"
    log.info("seed %d gives the trial's own figure %s", first, how)
    accuracies = [run["test/accuracy"] or 0.0 for run in runs.values()]
    mean, std = statistics.mean(accuracies), statistics.stdev(accuracies)
    record = {"trial": best.number, "again": again, "test/accuracy mean": mean, "test/accuracy sd": std, "runs": runs}
    write_whole(shared.folder / "retrain.json", json.dumps(record, indent=1) + "\n")
    log.info("test accuracy %.2f ± %.2f %% (mean ± sd of %d seeds)", 100 * mean, 100 * std, SEEDS)
    log.info("%s", shared.folder / "retrain.json")


def retrained(shared: SharedStudy, overrides: list[str], seed: int) -> dict[str, Any]:
    """The metrics of a run in the study's folder, which a later call finds done or continues."""
    from mnist_cnn.search.worker import trial_log
    from mnist_cnn.training.fit import fit

    folder = shared.folder / "retrain" / f"seed_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    settings, choices = compose(overrides, folder, shared.config_dir)
    if (folder / "config.yaml").is_file():
        settings = settings.model_copy(update={"resume": str(folder)})
    try:
        with trial_log(folder):
            metrics = fit(settings, folder, overrides, choices, silent=True)
    except SystemExit:
        log.error("stopped at seed %d; the same command continues", seed)
        raise
    parts = {part: 100 * (metrics[f"{part}/accuracy"] or 0) for part in ("val", "test")}
    log.info("seed %d  validation %.2f%%  test %.2f%%", seed, parts["val"], parts["test"])
    return metrics


if __name__ == "__main__":
    main()
