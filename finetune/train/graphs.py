"""Training steps of small models as CUDA graphs.

A model of 135 million parameters does the arithmetic of a step in a fraction of the time that Python takes to launch
its kernels. A graph records the launches of one forward and backward pass and replays them as one; the mathematics is
the same. Every shape has to be that of the recording, so `trainer.RowCollator` pads rows to a multiple of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import torch

from finetune.model.packing import Row

# Kernels are chosen and compiled in the first passes, which cannot be recorded.
WARM_UPS = 3


class GraphedPasses:
    """Forward and backward passes, recorded once per shape.

    Args:
        loss_of: The loss of a batch: a dict of tensors and one `Row`. It must not wait for the GPU.
        parameters: What gets gradients; they add up until they are set to None, as without graphs.
    """

    def __init__(self, loss_of: Callable[[dict[str, Any]], torch.Tensor], parameters: Iterable[torch.nn.Parameter]):
        self._loss_of = loss_of
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._recorded: dict[tuple, _Recording] = {}
        self._longest = 0
        self._sums: list[torch.Tensor] = []
        self._pool = None

    def __call__(self, batch: dict[str, Any]) -> torch.Tensor:
        """The loss of a batch, with its gradients in `parameter.grad`."""
        tensors = _tensors(batch)
        key = tuple(tuple(tensor.shape) for tensor in tensors)
        if key not in self._recorded:
            self._forget_shorter(batch["row"].input_ids.numel())
            self._recorded[key] = self._record(batch)
        recording = self._recorded[key]
        for static, tensor in zip(recording.inputs, tensors, strict=True):
            static.copy_(tensor, non_blocking=True)
        recording.graph.replay()
        self._add(recording.gradients)
        return recording.loss.clone()

    def _forget_shorter(self, tokens: int) -> None:
        """Forget all recordings if a longer row comes: it may make the model replace what they read, such as Unsloth's
        tables of rotary embeddings."""
        if tokens > self._longest:
            self._recorded.clear()
            # It goes with the last recording that was made in it.
            self._pool = None
            self._longest = tokens

    def _add(self, gradients: list[torch.Tensor]) -> None:
        """Add a pass's gradients to the update's: the next replay overwrites them."""
        if self._parameters[0].grad is not None:
            torch._foreach_add_(self._sums, gradients)
            return
        if not self._sums:
            self._sums = [torch.empty_like(gradient) for gradient in gradients]
        torch._foreach_copy_(self._sums, gradients)
        for parameter, gradient in zip(self._parameters, self._sums, strict=True):
            parameter.grad = gradient

    def _record(self, batch: dict[str, Any]) -> _Recording:
        kept = [parameter.grad for parameter in self._parameters]
        # A side stream, as PyTorch's notes on CUDA graphs ask for.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._forget_gradients()
                self._loss_of(batch).backward()
        torch.cuda.current_stream().wait_stream(stream)
        self._forget_gradients()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            loss = self._loss_of(batch)
            loss.backward()
        self._pool = graph.pool()
        gradients = [parameter.grad for parameter in self._parameters]
        # Detached, or the recorded pass would be kept alive, its nodes on another stream than the next recording's.
        recording = _Recording(graph, _tensors(batch), loss.detach(), gradients)
        for parameter, gradient in zip(self._parameters, kept, strict=True):
            parameter.grad = gradient
        return recording

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


class _Recording:
    """A graph with the tensors that it reads and writes."""

    def __init__(self, graph: torch.cuda.CUDAGraph, inputs: list, loss: torch.Tensor, gradients: list):
        self.graph, self.inputs, self.loss, self.gradients = graph, inputs, loss, gradients


def _tensors(batch: dict[str, Any]) -> list[torch.Tensor]:
    """All tensors of a batch, those of its row among them, in one order."""
    found = []
    for value in batch.values():
        parts = [getattr(value, field.name) for field in fields(value)] if isinstance(value, Row) else [value]
        found += [part for part in parts if isinstance(part, torch.Tensor)]
    return found
