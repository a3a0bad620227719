"""mnist-draw: a page to draw on, opened in the browser."""

from __future__ import annotations

import logging
import tempfile
import webbrowser
from pathlib import Path

import hydra
from omegaconf import DictConfig

from mnist_cnn.config.schema import validated
from mnist_cnn.config.settings import CONF, Draw
from mnist_cnn.runs.hydra_app import guarded, plain, run_command

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="draw")
def job(config: DictConfig) -> None:
    guarded(lambda: draw(validated(Draw, plain(config))), Path())


def main() -> None:
    run_command(job, "draw")


def draw(config: Draw) -> Path:
    """Write the page of `config.checkpoint` to a temporary place and open it in the browser; returns its path.

    Raises:
        UserError: the checkpoint cannot be read, or has layers of the user's own.
    """
    from mnist_cnn.inference.page import write_page

    output = Path(tempfile.mkdtemp(prefix="mnist-draw-")) / "digits.html"
    write_page(config.checkpoint, output)
    if not webbrowser.open(output.as_uri()):
        log.info("there is no browser here: open that file in one")
    return output


if __name__ == "__main__":
    main()
