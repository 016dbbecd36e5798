"""Memory that runs out in a step: the same update again, in smaller forward passes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data_prep import UserError


@dataclass(frozen=True)
class Articles:
    """The rows that a batch was joined from: no container of tensors, so that nobody walks through them each step."""

    rows: Sequence[Mapping[str, list[int]]]


class Portions:
    """Runs the passes of an update, in halves once a whole batch does not fit any more.

    The loss divides by the supervised tokens of the whole update, so that halves give the same gradients to rounding.
    A pass that failed may have left a part of its gradients: the update begins again.

    Args:
        collate: Joins rows into a batch, with its `articles`.
        trained: What gets gradients; they are None before an update's first pass.

    Attributes:
        largest: Articles in a pass, once memory ran out; None before.
        note: What was done about it, in words.
    """

    def __init__(self, collate: Callable[[Sequence[Mapping]], dict], trained: Sequence[torch.nn.Parameter]):
        self._collate, self._trained = collate, trained
        self._update: list[Sequence[Mapping]] = []
        self.largest: int | None = None
        self.note = ""

    def run(self, batch: dict[str, Any], one_pass: Callable[[dict[str, Any]], torch.Tensor], step: int) -> torch.Tensor:
        """The loss of a batch, with its gradients added to the update's.

        Args:
            batch: As the collator gave it.
            one_pass: Forward and backward pass of a batch.
            step: The number of the step, for messages.

        Raises:
            UserError: One article does not fit.
        """
        if all(parameter.grad is None for parameter in self._trained):
            self._update = []
        self._update.append(batch["articles"].rows)
        due = self._update[-1:]
        while True:
            try:
                if self.largest is None:
                    return one_pass(batch)
                for rows in due:
                    parts = [rows[start : start + self.largest] for start in range(0, len(rows), self.largest)]
                    losses = [one_pass(self._collate(part)) for part in parts]
                # Those before the last were in the log already.
                return torch.stack(losses).sum()
            except torch.OutOfMemoryError:
                pass
            # Not in the handler: the error holds the tensors of the pass that failed.
            if not self.halve(step):
                raise UserError(
                    f"out of memory at step {step}, where one article does not fit: set gradient_checkpointing=plain "
                    "or a smaller max_length, take QLoRA, or end other programs and kernels"
                )
            for parameter in self._trained:
                parameter.grad = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            due = self._update

    def halve(self, step: int) -> bool:
        """Take half as many articles in a pass from here on; False if a pass has one already, or none came through
        here."""
        before = self.largest or max(map(len, self._update), default=1)
        if before == 1:
            return False
        self.largest = (before + 1) // 2
        self.note = (
            f"too little memory at step {step} with {before} articles in a pass; from there on {self.largest}, in the "
            "same updates"
        )
        print(self.note, flush=True)
        return True
