"""Many small kernels by one launch: on CUDA a small network's step waits for Python, not for arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

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
        with torch.cuda.graph(self.graph):
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

    Batches of the first shape that comes twice in a row are replayed; others, as the last short one, go the usual way.
    `layers` says what the network was when the graph was made.
    """

    def __init__(self, network: nn.Module, loss_of: LossOf, layers: tuple[str, ...] = ()) -> None:
        self.network, self.loss_of, self.layers = network, loss_of, layers
        self.parameters = [*network.parameters()]
        self.key: tuple[Any, ...] = ()  # of the batches that the graph is for
        self.last: tuple[Any, ...] = ()
        self.gradients: Sequence[Tensor] | None = None  # of the last batch, where they were replayed

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss () and logits (B, classes) of images (B, 1, 28, 28) and labels (B,)."""
        self.gradients = None
        self.weights = [weight for weight in self.parameters if weight.requires_grad]
        key = (images.shape, images.dtype, len(self.weights))  # a callback may free weights while a run goes on
        again, self.last = key == self.last, key
        if key != self.key:
            if not again:
                return self.loss_of(images, labels)
            examples = [images.clone(), labels.clone()]
            self.graphed, self.key = Graphed(self._with_gradients, examples, [*self.network.buffers()]), key
        loss, logits, self.gradients = self.graphed(images, labels)
        return loss.clone(), logits.clone()

    def _with_gradients(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        loss, logits = self.loss_of(images, labels)
        return loss.detach(), logits.detach(), torch.autograd.grad(loss, self.weights)

    def backward(self) -> bool:
        """Hand out the gradients of the last batch; False where it was not replayed."""
        if self.gradients is None:
            return False
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            weight.grad = gradient
        return True
