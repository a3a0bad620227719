"""Muon for a whole network."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mnist_cnn.training.cuda_graph import Graphed
from mnist_cnn.training.optimizers import ClosureOptimizer


class Muon(ClosureOptimizer):
    """Muon of the convolutions' and hidden layers' weights, AdamW of all else: norms, biases and the last layer.

    A filter is a row of its layer's matrix. The update of a matrix of so many rows and columns is its momentum made
    near orthogonal, times √max(1, rows/columns): the mathematics of torch.optim.Muon, which takes matrices only, and in
    bfloat16 half as fast on a CPU at this size. Jordan et al., kellerjordan.github.io/posts/muon, 2024.

    Args:
        params: the network's, in order: the last of them with two dimensions is the last layer's weight.
        lr, momentum, nesterov, ns_steps: of the matrices.
        lr_rest, betas, eps: of the others; a schedule that moves `lr` moves `lr_rest` by the same factor.
        weight_decay: of all, decoupled: each step takes this share of the rate from a weight.
    """

    graphed: tuple[float, ...] = ()  # the numbers and the places of the means that the graph is for

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.05,
        lr_rest: float = 0.002,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if not (lr_rest > 0 and weight_decay >= 0 and eps >= 0):
            raise ValueError("lr_rest must be greater than 0, weight_decay and eps 0 or more")
        if len(betas) != 2 or not all(0 <= share < 1 for share in (momentum, *betas)):
            raise ValueError("momentum and both betas must be from 0 to below 1")
        if ns_steps not in range(1, 100):
            raise ValueError("ns_steps must be a whole number from 1 to 99")
        weights = list(params)
        matrices = [weight for weight in weights if weight.ndim > 1][:-1]
        known = set(map(id, matrices))
        muon = {"params": matrices, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        rest = {"params": [weight for weight in weights if id(weight) not in known], "steps": 0}
        # Each rate is `lr` times the ratio, so that schedules that set `lr` need not know of a second one.
        rest |= {"ratio": lr_rest / lr, "betas": betas, "eps": eps}
        super().__init__([muon, rest], {"lr": lr, "weight_decay": weight_decay})

    def move(self) -> None:
        muon, rest = self.param_groups
        self._orthogonal(muon, [weight for weight in muon["params"] if weight.grad is not None])
        self._adamw(rest, [weight for weight in rest["params"] if weight.grad is not None])

    def _orthogonal(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        """W ← (1 - lr λ) W - lr √max(1, rows/columns) · the momentum, made near orthogonal."""
        if not weights:
            return
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["mean"] = torch.zeros_like(weight)
        means = [self.state[weight]["mean"] for weight in weights]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        find = partial(updates_of, means, group["momentum"], group["nesterov"], group["ns_steps"])
        key = (*find.args[1:], *(mean.data_ptr() for mean in means))  # a checkpoint brings new means
        graphed = weights[0].is_cuda and not torch.distributed.is_initialized()  # tried on one device only
        if graphed and self.graphed != key:
            self.graph, self.graphed = Graphed(find, gradients, means), key
        updates = self.graph(*gradients) if graphed else find(*gradients)
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, updates, alpha=-group["lr"])

    def _adamw(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        """w ← (1 - lr λ) w - lr m̂ / (√v̂ + ε), by torch's fused kernel."""
        if not weights:
            return
        for weight in weights:
            if not self.state[weight]:
                self.state[weight].update(mean=torch.zeros_like(weight), square_mean=torch.zeros_like(weight))
        group["steps"] += 1
        steps = torch.full((), group["steps"], dtype=torch.float32, device=weights[0].device)
        torch._fused_adamw_(
            weights,
            [weight.grad for weight in weights],  # type: ignore[misc]
            [self.state[weight]["mean"] for weight in weights],
            [self.state[weight]["square_mean"] for weight in weights],
            [],
            [steps] * len(weights),
            lr=group["lr"] * group["ratio"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


def updates_of(means: list[Tensor], momentum: float, nesterov: bool, ns_steps: int, *gradients: Tensor) -> list[Tensor]:
    """Moves `means`; their layers' updates (filters, …), near orthogonal and times √max(1, rows/columns)."""
    torch._foreach_lerp_(means, gradients, 1 - momentum)
    updates = []
    for update in torch._foreach_lerp(gradients, means, momentum) if nesterov else means:
        # Channels last, as they lie in memory: a view. The order of columns makes no difference.
        last = update.movedim(1, -1) if update.ndim > 2 else update
        matrix = last.flatten(1)
        matrix = orthogonalized(matrix, ns_steps) * math.sqrt(max(1, len(matrix) / matrix.shape[1]))
        updates.append(matrix.view(last.shape).movedim(-1, 1) if update.ndim > 2 else matrix)
    return updates


def orthogonalized(matrix: Tensor, steps: int) -> Tensor:
    """The float32 matrix (rows, columns) with its singular values brought near 1, by Newton-Schulz steps.

    Each makes (a + b XXᵀ + c (XXᵀ)²) X of X, with the coefficients of torch.optim.Muon, after a division by the norm.
    The factors and the XXᵀ of all steps follow from the first XXᵀ alone, which has the shorter side: half of the time.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = len(matrix) > matrix.shape[1]
    with torch.autocast(matrix.device.type, enabled=False):
        x = matrix.T if tall else matrix
        x = x / x.norm().clamp(min=1e-7)
        gram, product = x @ x.T, None
        for step in range(steps):
            factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
            factor.diagonal().add_(a)
            product = factor if product is None else factor @ product
            if step < steps - 1:
                gram = factor @ gram @ factor  # they commute
        x = product @ x
    return x.T.contiguous() if tall else x
