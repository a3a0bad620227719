"""Averages of the weights, by Lightning's callback, so that an interrupted run resumes to the same bits."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor

from mnist_cnn.training.module import DigitClassifier


class Averages(WeightAveraging):
    """Exponential averages of weights and batch norm's statistics, moved at the end of each stretch of training.

    They are what is validated, and what a checkpoint has as its network; it has the weights that train beside them.

    Args:
        decay: the share of the average that stays at each update; the first takes the weights as they are.
        device: where the averages are kept.
    """

    def __init__(self, decay: float, device: torch.device) -> None:
        def average(average: Tensor, current: Tensor, _: Tensor | int) -> Tensor:
            # Batch norm's count of batches is no average; a figure that stays the same shall stay so to the last bit.
            return average.lerp(current, 1 - decay) if average.is_floating_point() else current

        super().__init__(device=device, use_buffers=True, avg_fn=average)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any) -> None:
        """A stretch that a signal has cut short is averaged when the resumed run has done the rest of it."""
        assert isinstance(pl_module, DigitClassifier)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if pl_module.position % data.steps_per_stretch == 0 or pl_module.position == data.steps_per_epoch:
            super().on_train_batch_end(trainer, pl_module, *arguments)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Within a validation the two are swapped."""
        if trainer.validating:
            self._swap_models(pl_module)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if trainer.validating:
            for key in ("state_dict", "current_model_state"):
                checkpoint[key] = {name: value.clone() for name, value in checkpoint[key].items()}
            self._swap_models(pl_module)
