"""What can be taken out of a record's recipe, to see what it gains."""

import yaml

from mnist_cnn.config import CONF


def without(name, settings_of):
    """The overrides that take each part of a recipe out of it; `settings_of` gives the configuration of overrides."""
    config = settings_of([])
    recipe = yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text())
    gone = [f"~optimizer.{key}" for key in recipe.get("optimizer", {}) if key != "lr"]
    schedule = [f"~schedule.scheduler.{key}" for key in recipe.get("schedule", {}).get("scheduler", {})]
    blocks = [f"++architecture.blocks.{number}." for number in range(len(config.architecture.blocks))]
    rest = config.optimizer.get("lr_rest", config.optimizer["lr"])
    parts = {
        "augmentation": ["augmentation=none", *(f"augmentation.{key}=0" for key in recipe.get("augmentation", {}))],
        "label smoothing": ["label_smoothing=0"],
        "Muon: AdamW instead": ["optimizer=adamw", f"optimizer.lr={rest}", *gone],
        "warm-up and decay": ["schedule=constant", *schedule],
        "weight averaging": ["averaging=0"],
        "several views": ["views=1"],
        "batch norm": [f"{block}{word}" for block in blocks for word in ("batch_norm=false", "bias=true")],
        "dropout": [f"{block}dropout=0" for block in blocks],
        "bfloat16": ["accelerator.precision=32-true"],
    }
    return {part: words for part, words in parts.items() if settings_of(words) != config}
