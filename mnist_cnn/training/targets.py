"""Optimizers, schedules and loggers from the `_target_` YAMLs of the user's own command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import hydra
from hydra.errors import InstantiationException

from mnist_cnn.config.schema import UserError, nearest


def made(node: Mapping[str, Any], key: str) -> Any:
    """What a `_target_` of the user's own configuration names, with its errors in the user's words."""
    try:
        thing = hydra.utils.instantiate(dict(node), _convert_="all")  # a checkpoint holds plain values
        if key == "logger":
            _ = thing.experiment  # a logger connects here
        return thing
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, ModuleNotFoundError) and key == "logger":
            extra = str(node["_target_"]).rpartition(".")[2].removesuffix("Logger").lower()
            raise UserError(
                f"logger={extra} needs a package that is not installed: pip install 'mnist-cnn[{extra}]'"
            ) from None
        raise UserError(f"{key}: {node.get('_target_')} cannot be made: {cause}") from None
    except Exception as error:  # each logger has its own
        raise UserError(f"{key}: {node.get('_target_')} does not start: {error}") from None


def tried(make: Callable[..., Any], key: str, *arguments: Any, **length: int) -> Any:
    """Make an optimizer or scheduler once, so that a wrong setting is found before training."""
    function = getattr(make, "func", make)
    known = inspect.signature(function).parameters
    settings = {**getattr(make, "keywords", {}), **length}
    for name in settings:
        if name not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            raise UserError(f"unknown key {key}.{name} for {function.__name__}{nearest(name, known)}")
    try:
        thing = make(*arguments, **length)
        for stepped in (*arguments, thing):  # without gradients an optimizer changes nothing
            if hasattr(stepped, "step"):
                stepped.step()
        return thing
    except Exception as error:  # each of torch's optimizers has its own
        shown = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        raise UserError(f"{key}: {function.__name__} refuses {shown}: {error}") from None
