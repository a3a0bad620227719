"""mnist-predict: which digit is in a picture."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import hydra
from omegaconf import DictConfig

from mnist_cnn.config.schema import UserError, validated
from mnist_cnn.config.settings import CONF, Predict
from mnist_cnn.runs.hydra_app import plain, run_command
from mnist_cnn.runs.jobs import guarded

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mnist_cnn.inference.classifier import Classifier
    from mnist_cnn.inference.image_files import Source

log = logging.getLogger(__name__)
BATCH = 500  # pictures in memory at once
GRID = 40  # pictures drawn


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="predict")
def job(config: DictConfig) -> None:
    guarded(lambda: predict(validated(Predict, plain(config))), Path())


def main() -> None:
    run_command(job, "predict")


class Read(NamedTuple):
    """A picture as it was read: its digit, or why there is none, and what the grid shows of it."""

    name: str
    digit: NDArray[np.uint8] | None
    error: str
    thumbnail: NDArray[np.uint8] | None = None


def predict(config: Predict) -> None:
    """Print or write the label and the probabilities of each picture; exit status 1 where one could not be read."""
    from mnist_cnn.inference.image_files import sources

    words = [word for word in config.images if not word.startswith("-")]
    if missing := [word for word in words if "*" not in word and word[0] != "@" and not Path(word).exists()]:
        next(sources(missing))  # says what is wrong before anything is loaded

    import torch
    from tqdm import tqdm

    from mnist_cnn.inference.classifier import load_classifier
    from mnist_cnn.inference.digit_image import form_for
    from mnist_cnn.inference.predictions import writer_for

    if config.accelerator.threads:
        torch.set_num_threads(config.accelerator.threads)
    classifier = load_classifier(config.checkpoint, config.accelerator.name, config.views)
    form = form_for(classifier.description.data.name, config.mode)
    pictures = sources(config.images, as_bytes=config.input == "bytes")
    failed, shown = 0, list[tuple[Read, Any]]()
    bar = tqdm(unit=" pictures", disable=None, leave=False)  # on a terminal only
    with bar, writer_for(config.output) as writer:
        while batch := list(islice(pictures, BATCH)):
            reads = [
                read(source, form, bool(config.grid) and len(shown) + index < GRID)
                for index, source in enumerate(batch)
            ]
            rows = classify(reads, classifier, config.top_k)
            writer.write(rows)
            failed += report(reads)
            shown += [(one, row) for one, row in zip(reads, rows, strict=True) if one.thumbnail is not None]
            bar.update(len(batch))
    if config.grid:
        draw(shown, Path(config.grid))
    if failed and not config.skip_errors:
        raise SystemExit(1)


def read(source: Source, form: Callable[[Any], NDArray[np.uint8]], draws: bool) -> Read:
    """A picture in MNIST's form, or its error."""
    try:
        picture = source.read()
        digit = form(picture)
        return Read(source.name, digit, "", thumbnail_of(picture) if draws else None)
    except UserError as error:
        return Read(source.name, None, str(error))


def classify(reads: list[Read], classifier: Classifier, top_k: int) -> list[dict[str, Any]]:
    import numpy as np
    import torch

    from mnist_cnn.inference.predictions import row_of

    digits = [one.digit for one in reads if one.digit is not None]
    stacked = np.stack(digits)[:, None] if digits else np.zeros((0, 1, 28, 28), np.uint8)
    probabilities = iter(torch.softmax(classifier.logits(torch.from_numpy(stacked)), dim=1).numpy())
    return [
        row_of(one.name, None if one.digit is None else next(probabilities), classifier.classes, top_k, one.error)
        for one in reads
    ]


def report(reads: list[Read]) -> int:
    """A line on stderr for each picture that could not be read; their number."""
    bad = [one for one in reads if one.digit is None]
    for one in bad:
        log.error("error: %s %s", one.name, one.error)
    return len(bad)


def thumbnail_of(picture: Any) -> NDArray[np.uint8]:
    """A picture of any kind to uint8 (112, 112, 3), as it is seen, on grey where it is not square."""
    import numpy as np
    from PIL import Image, ImageOps

    from mnist_cnn.inference.digit_image import channels_of

    colours = np.asarray(channels_of(picture)).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(np.repeat(colours, 3, axis=2) if colours.shape[2] == 1 else colours)
    return np.asarray(ImageOps.pad(image, (112, 112), color=(200, 200, 200)))


def draw(shown: list[tuple[Read, dict[str, Any]]], path: Path) -> None:
    from mnist_cnn.inference import plots

    pictures = [(one.thumbnail, one.digit, f"{row['label']}  {row['probability']:.1%}") for one, row in shown]
    plots.predictions(pictures, path)
    log.info("%s", path)


if __name__ == "__main__":
    main()
