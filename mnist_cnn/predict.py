"""mnist-predict: which digit is in a picture, or which digits."""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import hydra
from omegaconf import DictConfig

from mnist_cnn.config.schema import UserError, printable, validated
from mnist_cnn.config.settings import CONF, Predict
from mnist_cnn.runs.files import writable
from mnist_cnn.runs.hydra_app import guarded, plain, run_command

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from mnist_cnn.inference.classifier import Classifier, Digit
    from mnist_cnn.inference.predictions import Prediction
    from mnist_cnn.pictures.image_files import PictureSource

log = logging.getLogger(__name__)
BATCH = 500  # pictures in memory at once
GRID = 40  # pictures drawn


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="predict")
def job(config: DictConfig) -> None:
    guarded(lambda: predict(validated(Predict, plain(config))), Path())


def main() -> None:
    run_command(job, "predict")


class DigitRead(NamedTuple):
    """A digit's readings as uint8 (28, 28), or why there are none; what the grid shows of the picture, uint8
    (H, W, 3); and, of a picture of several, their number and the digit's box."""

    name: str
    readings: list[NDArray[np.uint8]]
    error: str
    thumbnail: NDArray[np.uint8] | None = None
    number: str | None = None
    box: str | None = None


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
    several = config.digits == "several"
    pictures = find_pictures(config.images, as_bytes=config.input == "bytes")
    failed = count = 0
    drawn: list[tuple[NDArray[np.uint8], NDArray[np.uint8] | None, str]] = []
    bar = tqdm(unit=" pictures", disable=None, leave=False)  # on a terminal only
    with bar, prediction_writer(config.output) as writer:
        while batch := list(islice(pictures, BATCH)):
            drawing = GRID - len(drawn) if grid else 0
            read = [read_digits(source, classifier, config, at < drawing) for at, source in enumerate(batch)]
            digits = [digit for each in read for digit in each]
            rows, seen = classify_batch(digits, classifier, config.top_k, several)
            writer.write(rows)
            failed += report_errors(digits)
            count += len(batch)
            drawn += [
                (one.thumbnail, None if several else digit, caption(row))
                for one, digit, row in zip(digits, seen, rows, strict=True)
                if one.thumbnail is not None
            ]
            bar.update(len(batch))
        if not count:
            raise UserError(f"images={','.join(config.images)} names no picture")
    if grid:
        draw_grid(drawn, count, grid)
    if failed and not config.skip_errors:
        raise SystemExit(1)


def refuse_missing(images: list[str]) -> None:
    """Say that a path does not exist before torch and the network are loaded."""
    from mnist_cnn.pictures.image_files import exists, find_pictures

    paths = [word for word in images if word[0] not in "-@" and "*" not in word]
    if missing := [path for path in paths if not exists(path)][:1]:
        next(find_pictures(missing), None)


def read_digits(source: PictureSource, classifier: Classifier, config: Predict, drawing: bool) -> list[DigitRead]:
    """Read a picture and bring its digit to what a network may see, or each of several; or keep the error."""
    from mnist_cnn.pictures.digit_image import readings_for

    name = source.name.encode(errors="surrogateescape").decode(errors="backslashreplace")  # bytes that are no UTF-8
    name = printable(name).replace("\t", "\\t").replace("\n", "\\n")
    try:
        picture = source.read()
        if config.digits == "one":
            readings = readings_for(classifier.description.data.name, config.mode)(picture)
            return [DigitRead(name, readings, "", thumbnail(picture) if drawing else None)]
        digits = classifier.read(picture)
    except UserError as error:
        return [DigitRead(name, [], str(error))]
    number = "".join(digit.label for digit in digits)
    read = [DigitRead(name, [one.image], "", None, number, " ".join(map(str, one.box))) for one in digits]
    if drawing:
        read[0] = read[0]._replace(thumbnail=digits_in_boxes(picture, digits))
    return read


def classify_batch(
    digits: list[DigitRead], classifier: Classifier, top_k: int, several: bool
) -> tuple[list[Prediction], list[NDArray[np.uint8] | None]]:
    """A row for each digit, in their order, and the digit that the network saw, uint8 (28, 28); of pictures that
    could not be read the error and None."""
    from mnist_cnn.inference.predictions import prediction

    images, probabilities = classifier.surest([one.readings for one in digits if one.readings])
    found = iter(zip(images[:, 0], probabilities, strict=True))
    pairs = [next(found) if one.readings else (None, None) for one in digits]
    rows = [
        prediction(
            one.name, row, classifier, top_k, one.error, {"number": one.number, "box": one.box} if several else {}
        )
        for one, (_, row) in zip(digits, pairs, strict=True)
    ]
    return rows, [digit for digit, _ in pairs]


def report_errors(digits: list[DigitRead]) -> int:
    """A line on stderr for each picture that could not be read; returns how many."""
    failed = [one for one in digits if not one.readings]
    for one in failed:
        log.error("error: %s %s", one.name, one.error)
    return len(failed)


def thumbnail(picture: Any) -> NDArray[np.uint8]:
    """A picture of any kind as it is seen, uint8 (112, 112, 3), on grey where it is not square."""
    import numpy as np
    from PIL import ImageOps

    return np.asarray(ImageOps.pad(as_seen(picture), (112, 112), color=(200, 200, 200)))


def digits_in_boxes(picture: Any, digits: list[Digit]) -> NDArray[np.uint8]:
    """A picture of any kind with each digit's box and label, `?` where it is unsure, on grey, uint8 (600, 800, 3)."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageOps

    seen = as_seen(picture)
    shown = ImageOps.contain(seen, (800, 520))
    scale = shown.width / (seen.width * getattr(picture, "info", {}).get("reduced_by", 1))
    across, down = (800 - shown.width) // 2, (600 - shown.height) // 2  # down: 40 pixels at least, for a label above
    canvas = Image.new("RGB", (800, 600), (200, 200, 200))
    canvas.paste(shown, (across, down))
    draw = ImageDraw.Draw(canvas)
    for digit in digits:
        left, top, right, bottom = (scale * edge for edge in digit.box)
        left, top, right, bottom = left + across - 3, top + down - 3, right + across + 2, bottom + down + 2
        draw.rectangle((left, top, right, bottom), outline=(220, 0, 0), width=2)
        size = min(34, max(18, 0.4 * (bottom - top)))
        text = digit.label + "?" * digit.unsure
        draw.text((left, top - 3), text, fill=(220, 0, 0), font_size=size, anchor="ls")
    return np.asarray(canvas)


def as_seen(picture: Any) -> Image:
    """A picture of any kind, upright, in colours."""
    import numpy as np
    from PIL import Image

    from mnist_cnn.pictures.digit_image import visible_pixels

    colours = np.asarray(visible_pixels(picture)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(np.repeat(colours, 3, axis=2) if colours.shape[2] == 1 else colours)


def caption(row: Prediction) -> str:
    """What stands above a picture in the grid."""
    return row.get("number") or f"{row['label']}  {row['probability']:.1%}  {row['unsure'] or ''}".rstrip()


def draw_grid(drawn: list[tuple[Any, Any, str]], count: int, path: Path) -> None:
    """Draw the first of `count` pictures, each beside the digit that the network saw, or with its boxes."""
    from mnist_cnn.inference import plots

    plots.prediction_grid(drawn, count - len(drawn), path)
    log.info("%s", path)


if __name__ == "__main__":
    main()
