"""Keras 3's Adam and RMSprop, where torch's place epsilon elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch


class KerasAdam(torch.optim.Adam):
    """Adam as Keras 3 computes it: epsilon joins the square root before the bias correction.

    m ← β₁ m + (1 - β₁) g;  v ← β₂ v + (1 - β₂) g²;  w ← w - lr √(1 - β₂ᵗ) / (1 - β₁ᵗ) · m / (√v + ε).
    The corrections have the weights' precision, as in Keras. Source: keras/src/optimizers/adam.py, Keras 3.

    It is torch's fused step, which adds ε to √v / √(1 - β₂ᵗ), given an ε that grows alike.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-7,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)
        for group in self.param_groups:
            group["steps"] = 0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        asked = [(group["lr"], group["eps"]) for group in self.param_groups]
        for group in self.param_groups:
            group["steps"] += 1
            beta1, beta2 = group["betas"]
            number = np.float64 if group["params"][0].dtype == torch.float64 else np.float32
            one, step = number(1), number(group["steps"])
            corrected = np.sqrt(one - number(beta2) ** step) / (one - number(beta1) ** step)
            root = math.sqrt(1 - beta2 ** group["steps"])
            group["eps"] /= root
            group["lr"] *= float(corrected) * (1 - beta1 ** group["steps"]) / root
        try:
            return super().step(closure)
        finally:
            for group, (rate, epsilon) in zip(self.param_groups, asked, strict=True):
                group["lr"], group["eps"] = rate, epsilon


class KerasRMSprop(torch.optim.Optimizer):
    """RMSprop as Keras 3 computes it: epsilon inside the square root, no momentum, not centred.

    v ← ρ v + (1 - ρ) g²;  w ← w - lr · g / √(v + ε). Source: keras/src/optimizers/rmsprop.py, Keras 3.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, rho: float = 0.9, eps: float = 1e-7) -> None:
        super().__init__(params, {"lr": lr, "rho": rho, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight]["square_mean"] = torch.zeros_like(weight)
            gradients = [weight.grad for weight in weights]
            square_means = [self.state[weight]["square_mean"] for weight in weights]
            torch._foreach_mul_(square_means, group["rho"])
            torch._foreach_addcmul_(square_means, gradients, gradients, 1 - group["rho"])
            roots = torch._foreach_add(square_means, group["eps"])
            torch._foreach_sqrt_(roots)
            torch._foreach_addcdiv_(weights, gradients, roots, -group["lr"])
        return loss
