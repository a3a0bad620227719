"""What can be taken out of a record's recipe, or put in, to see what it gains."""

import yaml

from mnist_cnn.config.settings import CONF


def changes(name, settings_of):
    """The overrides that change one part of a recipe each; `settings_of` gives the configuration of overrides."""
    config = settings_of([])
    recipe = _read(name)
    if isinstance(base := recipe["defaults"][0], str):  # the same with other epochs
        recipe = _read(base)
    removed = [f"~optimizer.{key}" for key in recipe.get("optimizer", {}) if key != "lr"]
    schedule = [f"~schedule.scheduler.{key}" for key in recipe.get("schedule", {}).get("scheduler", {})]
    blocks = [f"++architecture.blocks.{number}." for number in range(len(config.architecture.blocks))]
    rest = config.optimizer.get("lr_rest", config.optimizer["lr"])
    parts = {
        "without augmentation": [
            "augmentation=none",
            *(f"augmentation.{key}=0" for key in recipe.get("augmentation", {})),
        ],
        "without label smoothing": ["label_smoothing=0"],
        "AdamW instead of Muon": ["optimizer=adamw", f"optimizer.lr={rest}", *removed],
        "without warm-up and decay": ["schedule=constant", *schedule],
        "without weight averaging": ["ema_decay=0"],
        "without batch norm": [f"{block}{word}" for block in blocks for word in ("batch_norm=false", "bias=true")],
        "without dropout": [f"{block}dropout=0" for block in blocks],
        "float32 instead of bfloat16": ["accelerator.precision=32-true"],
        "with weight averaging": ["ema_decay=0.99"] if not config.ema_decay else [],
        "with a fifth of the last block dropped out": [f"{blocks[-1]}dropout=0.2"] if blocks else [],
    }
    return {part: words for part, words in parts.items() if settings_of(words) != config}


def _read(name):
    return yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text())
