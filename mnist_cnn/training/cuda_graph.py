"""Many small kernels by one launch: on CUDA a small network's step waits for Python, not for arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from mnist_cnn.models.convnet import ConvNet

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_post_accumulate_grad_hooks",
    "_compiled_call_impl",
)

LossOf = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Graphed:
    """A function of tensors, captured once and replayed on others of the same shapes.

    It must wait for nothing on the device. What it returns is overwritten by the next call.

    Args:
        function: what is captured.
        inputs: of the first call; the graph reads where they lie, and others are copied there.
        state: what the function changes in place; making the graph leaves it as it was.
    """

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Tensor], state: Sequence[Tensor] = ()) -> None:
        self.inputs = [*inputs]
        before, random = [tensor.clone() for tensor in state], torch.cuda.get_rng_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # once beforehand: libraries take what they need at first use
            function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # Of this thread only: a user's loader may pin memory beside it.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = function(*self.inputs)
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        torch.cuda.set_rng_state(random)

    def __call__(self, *inputs: Tensor) -> Any:
        if any(new.data_ptr() != own.data_ptr() for new, own in zip(inputs, self.inputs, strict=True)):
            torch._foreach_copy_(self.inputs, inputs)
        self.graph.replay()
        return self.outputs


class StepGraph:
    """Loss, logits and gradients of a batch by a graph; `loss_of` gives the first two, in training.

    Batches of the first shape that comes twice in a row are replayed; others, as the last short one, go the usual way,
    with a loss that autograd knows. `form` says what the step was when the graph was made.
    """

    def __init__(self, network: nn.Module, loss_of: LossOf, form: tuple[Any, ...]) -> None:
        self.loss_of, self.form = loss_of, form
        self.parameters, self.buffers = [*network.parameters()], [*network.buffers()]
        self.key: tuple[Any, ...] = ()  # of the batches that the graph is for
        self.last: tuple[Any, ...] = ()

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss () and logits (B, classes) of images (B, 1, 28, 28) and labels (B,)."""
        # A callback may free weights, or put others in their place, while a run goes on.
        key = (images.shape, images.dtype, *((p.requires_grad, p.data_ptr()) for p in self.parameters))
        again, self.last = key == self.last, key
        if key != self.key:
            if not again:
                return self.loss_of(images, labels)
            self.weights = [weight for weight in self.parameters if weight.requires_grad]
            self.graphed = Graphed(self._with_gradients, [images.clone(), labels.clone()], self.buffers)
            self.key = key
        for weight in self.weights:
            weight.grad = None  # else the optimizer, which zeroes gradients after this, could zero the new ones
        loss, logits, self.gradients = self.graphed(images, labels)
        return loss.clone(), logits.clone()

    def _with_gradients(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        loss, logits = self.loss_of(images, labels)
        with torch.autocast("cuda", enabled=False):  # as in Lightning's backward
            return loss.detach(), logits.detach(), torch.autograd.grad(loss, self.weights)

    def backward(self) -> None:
        """Hand out the gradients of the last batch that was replayed."""
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            weight.grad = gradient


def may_be_graphed(network: nn.Module, trainer: pl.Trainer) -> bool:
    """Whether all layers are ours and nobody watches them, and nobody scales, sums or traces the gradients."""
    if type(network) is not ConvNet or network.specification.own_modules():
        return False
    parts = [*network.modules(), *network.parameters()]
    hooked = any(getattr(part, hook, None) for part in parts for hook in HOOKS)  # torch has no public way to ask
    alone = isinstance(trainer.strategy, SingleDeviceStrategy) and trainer.accumulate_grad_batches == 1
    return alone and trainer.precision != "16-mixed" and not torch.is_anomaly_enabled() and not hooked


def form_of(network: nn.Module) -> tuple[Any, ...]:
    """What a graph has of a network: its layers, whether each trains, and where its weights and buffers lie."""
    training = (each.training for each in network.modules())
    return (repr(network), *training, *(value.data_ptr() for value in network.state_dict().values()))
