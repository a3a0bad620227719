"""mnist-predict: which digits are in a picture."""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import hydra
from omegaconf import DictConfig

from mnist_cnn.config.schema import UserError, validated
from mnist_cnn.config.settings import CONF, Predict
from mnist_cnn.runs.folder import writable
from mnist_cnn.runs.hydra_app import guarded, plain, run_command

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from mnist_cnn.inference.classifier import Classifier, Digit
    from mnist_cnn.inference.predictions import Prediction
    from mnist_cnn.pictures.image_files import PictureSource
    from mnist_cnn.pictures.several import Candidate

log = logging.getLogger(__name__)
BATCH = 500  # pictures in memory at once
GRID = 40  # pictures drawn


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="predict")
def job(config: DictConfig) -> None:
    guarded(lambda: predict(validated(Predict, plain(config))), Path())


def main() -> None:
    run_command(job, "predict")


class PictureRead(NamedTuple):
    """What may be the digits of a picture, or why there are none, and, for the grid, it at a smaller size."""

    name: str
    candidates: list[Candidate]
    error: str
    thumbnail: Image | None = None
    width: int = 0  # in the pixels of the digits' boxes


def predict(config: Predict) -> None:
    """Print or write the label and the probabilities of each picture.

    Raises:
        UserError: a checkpoint or a path in `images` cannot be read.
        SystemExit: with status 1, a picture could not be read; the others were classified.
    """
    refuse_missing(config.images)
    grid = writable(config.grid) if config.grid else None  # before any picture is read

    import torch
    from tqdm import tqdm

    from mnist_cnn.inference.classifier import load_classifier
    from mnist_cnn.inference.predictions import prediction_writer
    from mnist_cnn.pictures.image_files import find_pictures

    if config.accelerator.threads:
        torch.set_num_threads(config.accelerator.threads)
    classifier = load_classifier(config.checkpoint, config.accelerator.name, config.tta, config.modules)
    pictures = find_pictures(config.images, as_bytes=config.input == "bytes")
    failed = count = 0
    panels: list[tuple[NDArray[np.uint8], str]] = []
    bar = tqdm(unit=" pictures", disable=None, leave=False)  # on a terminal only
    with bar, prediction_writer(config.output) as writer:
        while batch := list(islice(pictures, BATCH)):
            drawing = GRID - len(panels) if grid else 0
            read = [read_picture(source, classifier, config, index < drawing) for index, source in enumerate(batch)]
            found = [
                (one, digits, rows_of(one, digits, classifier, config))
                for one, digits in classify_batch(read, classifier, config.digits)
            ]
            writer.write([row for *_, rows in found for row in rows])
            for one, digits, rows in found:
                if one.error:
                    failed += 1
                    log.error("error: %s %s", one.name, one.error)
                elif one.thumbnail:
                    panels.append(panel(one, digits, rows))
            count += len(batch)
            bar.update(len(batch))
    if grid:
        draw_grid(panels, count, grid)
    if failed and not config.skip_errors:
        raise SystemExit(1)


def refuse_missing(images: list[str]) -> None:
    """Say that a path does not exist before torch and the network are loaded."""
    from mnist_cnn.pictures.image_files import find_pictures

    paths = [word for word in images if word[0] not in "-@" and "*" not in word]
    if missing := [path for path in paths if not Path(path).exists()]:
        next(find_pictures(missing), None)


def read_picture(source: PictureSource, classifier: Classifier, config: Predict, drawing: bool) -> PictureRead:
    """Read a picture and find what may be its digits, or keep the error."""
    name = source.name.encode(errors="surrogateescape").decode(errors="backslashreplace")  # bytes that are no UTF-8
    try:
        picture = source.read()
        candidates = classifier.candidates(picture, config.mode, always=config.digits == "several")
        return PictureRead(name, candidates, "", *(thumbnail(picture) if drawing else ()))
    except UserError as error:
        return PictureRead(name, [], str(error))


def classify_batch(
    batch: list[PictureRead], classifier: Classifier, digits: str
) -> list[tuple[PictureRead, list[Digit]]]:
    """Each picture with its digits, in their order; with digits=one several are an error."""
    readings = iter(classifier.choose([one.candidates for one in batch if one.candidates]))
    found = [(one, next(readings) if one.candidates else []) for one in batch]
    if digits != "one":
        return found
    return [
        (one._replace(error=f"shows {len(each)} digits: digits=several reads each"), [])
        if len(each) > 1
        else (one, each)
        for one, each in found
    ]


def rows_of(one: PictureRead, digits: list[Digit], classifier: Classifier, config: Predict) -> list[Prediction]:
    """The rows of a picture in the table: one for each digit, or one with its error."""
    from mnist_cnn.inference.predictions import prediction

    if one.error:
        return [prediction(one.name, None, classifier, config.top_k, one.error)]
    number = None
    if len(digits) > 1 or config.digits == "several":
        number = "".join(digit.label for digit in digits)
    return [
        prediction(one.name, digit.probabilities, classifier, config.top_k, "", number, digit.box if number else None)
        for digit in digits
    ]


def thumbnail(picture: Any) -> tuple[Image, int]:
    """A picture of any kind as it is seen, at no more than 896×448, and its width before."""
    import numpy as np
    from PIL import Image

    from mnist_cnn.pictures.digit_image import visible_pixels

    colours = np.asarray(visible_pixels(picture)).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(np.repeat(colours, 3, axis=2) if colours.shape[2] == 1 else colours)
    width = image.width * getattr(picture, "info", {}).get("reduced_by", 1)
    image.thumbnail((896, 448))
    return image, width


def panel(one: PictureRead, digits: list[Digit], rows: list[Prediction]) -> tuple[NDArray[np.uint8], str]:
    """What the grid shows of a picture, and the text above it."""
    from mnist_cnn.inference import plots

    assert one.thumbnail is not None
    first, row = digits[0], rows[0]
    if row["number"] is None:
        text = f"{first.label}  {first.probability:.1%}  {row['unsure'] or ''}".rstrip()
        return plots.picture_beside_digit(one.thumbnail, first.image), text
    labels = [f"{each['label']}{'?' if each['unsure'] else ''}" for each in rows]
    boxes = [digit.box for digit in digits]
    return plots.digits_in_boxes(one.thumbnail, one.width, labels, boxes), row["number"]


def draw_grid(panels: list[tuple[NDArray[np.uint8], str]], count: int, path: Path) -> None:
    """Draw the first of `count` pictures."""
    from mnist_cnn.inference import plots

    plots.prediction_grid(panels, count - len(panels), path)
    log.info("%s", path)


if __name__ == "__main__":
    main()
