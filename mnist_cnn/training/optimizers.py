"""What a YAML's `_target_` names; Keras 3's Adam and RMSprop, whose epsilon stands elsewhere; a linear schedule."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import hydra
import numpy as np
import torch
from hydra.errors import InstantiationException
from torch import Tensor

from mnist_cnn.config.schema import UserError, nearest


class ClosureOptimizer(torch.optim.Optimizer):
    """The frame of a step: the closure, which Lightning hands over, and then `move`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.move()
        return loss

    def move(self) -> None:
        raise NotImplementedError


class _KerasOptimizer(ClosureOptimizer):
    """Hands over the weights that have a gradient, their gradients, and their running averages."""

    averages: tuple[str, ...]

    def move(self) -> None:
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight].update({name: torch.zeros_like(weight) for name in self.averages})
            if weights:
                averages = [[self.state[weight][name] for weight in weights] for name in self.averages]
                self.update(group, weights, [weight.grad for weight in weights], *averages)

    def update(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor], *averages: Any) -> None:
        raise NotImplementedError


class KerasAdam(_KerasOptimizer):
    """Adam as Keras 3 computes it: epsilon joins the square root before the bias correction.

    m ← β₁ m + (1 - β₁) g;  v ← β₂ v + (1 - β₂) g²;  w ← w - lr √(1 - β₂ᵗ) / (1 - β₁ᵗ) · m / (√v + ε).
    The corrections have the weights' precision, as in Keras. Source: keras/src/optimizers/adam.py, Keras 3.

    It is torch's fused kernel, w ← w - lr / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε), given an lr and an ε that make
    it the same; torch's own class around that kernel takes several times as long as the kernel.
    """

    averages = ("mean", "square_mean")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-7,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "steps": 0})

    def update(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor], *averages: Any) -> None:
        means, square_means = averages
        group["steps"] += 1
        beta1, beta2 = group["betas"]
        number = np.float64 if weights[0].dtype == torch.float64 else np.float32
        one, step = number(1), number(group["steps"])
        corrected = float(np.sqrt(one - number(beta2) ** step) / (one - number(beta1) ** step))
        root = math.sqrt(1 - beta2 ** group["steps"])
        steps = torch.full((), group["steps"], dtype=torch.float32, device=weights[0].device)
        torch._fused_adam_(
            weights,
            gradients,
            means,
            square_means,
            [],
            [steps] * len(weights),
            lr=group["lr"] * corrected * (1 - beta1 ** group["steps"]) / root,
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=group["eps"] / root,
            amsgrad=False,
            maximize=False,
        )


class KerasRMSprop(_KerasOptimizer):
    """RMSprop as Keras 3 computes it: epsilon inside the square root, no momentum, not centred.

    v ← ρ v + (1 - ρ) g²;  w ← w - lr · g / √(v + ε). Source: keras/src/optimizers/rmsprop.py, Keras 3.
    """

    averages = ("square_mean",)

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, rho: float = 0.9, eps: float = 1e-7) -> None:
        super().__init__(params, {"lr": lr, "rho": rho, "eps": eps})

    def update(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor], *averages: Any) -> None:
        (square_means,) = averages
        torch._foreach_mul_(square_means, group["rho"])
        torch._foreach_addcmul_(square_means, gradients, gradients, 1 - group["rho"])
        roots = torch._foreach_add(square_means, group["eps"])
        torch._foreach_sqrt_(roots)
        torch._foreach_addcdiv_(weights, gradients, roots, -group["lr"])


def linear(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float = 0.1, final: float = 0.0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Every rate up to its own value in a fraction `warmup` of the steps, then down to the fraction `final` of it."""
    if not (0 <= warmup <= 1 and 0 <= final <= 1):
        raise ValueError("warmup and final must be fractions from 0 to 1")
    rising = max(round(warmup * steps), 1)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 1 - (1 - final) * min((step + 1 - rising) / (steps + 1 - rising), 1)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# --- `_target_`s of the user's own command line --------------------------------------------------------------


def instantiate(node: Mapping[str, Any], key: str) -> Any:
    """What a `_target_` of the user's own configuration names, with its errors in the user's words."""
    try:
        thing = hydra.utils.instantiate(dict(node), _convert_="all")  # a checkpoint holds plain values
        if key.startswith("logger."):
            _ = thing.experiment  # a logger connects here
        return thing
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, ModuleNotFoundError) and key.startswith("logger."):
            extra = key.removeprefix("logger.")
            raise UserError(
                f"logger={extra} needs a package that is not installed: pip install 'mnist-cnn[{extra}]'"
            ) from None
        raise UserError(f"{key}: {node.get('_target_')} cannot be made: {cause}") from None
    except Exception as error:  # each logger has its own
        raise UserError(f"{key}: {node.get('_target_')} does not start: {error}") from None


def check_factory(make: Callable[..., Any], key: str, *arguments: Any, **length: int) -> Any:
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
