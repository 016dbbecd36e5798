"""TRL's trainer on packed rows: a batch of articles is one row without padding, its common beginning computed once, and
only the positions that predict a supervised token reach the vocabulary. The loss and its gradients are those of the
same articles one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional
from trl import SFTTrainer

from finetune import segments
from finetune.chat import IGNORED
from finetune.graphs import GraphedPasses


@dataclass(frozen=True)
class FixedShapes:
    """Sizes that make the batches of a training alike, as CUDA graphs need them.

    Attributes:
        multiple: Rows are padded to a multiple of so many tokens.
        longest: Tokens of the longest article, with prompt and answer.
        supervised: Tokens that carry loss in an article, at most.
    """

    multiple: int
    longest: int
    supervised: int


class RowCollator:
    """Joins training rows into one.

    Args:
        shared: Tokens that all rows begin with, computed once per batch. None of them may carry loss.
        shapes: What to pad to; nothing is padded without it.
    """

    def __init__(self, shared: int, shapes: FixedShapes | None = None):
        self._shared = shared
        self._shapes = shapes

    def __call__(self, examples: Sequence[Mapping[str, list[int]]]) -> dict[str, Any]:
        """A batch: `input_ids` and `labels` of shape (1, T), the `row`, and which places `predicts` which `targets`."""
        forest, labels = segments.Forest(), []
        parent = None
        if self._shared:
            parent = forest.add(examples[0]["input_ids"][: self._shared])
            labels += [IGNORED] * self._shared
        for example in examples:
            forest.add(example["input_ids"][self._shared :], parent)
            # Nothing in its own sequence predicts a first token.
            own = example["labels"][self._shared :]
            labels += own if parent is not None else [IGNORED, *own[1:]]
        predicts = [place - 1 for place, label in enumerate(labels) if label != IGNORED]
        targets = [label for label in labels if label != IGNORED]
        if self._shapes:
            # At least one token, so that the number of segments is always the same.
            padding = self._shapes.multiple - len(labels) % self._shapes.multiple
            forest.add([0] * padding)
            labels += [IGNORED] * padding
            missing = self._shapes.supervised * len(examples) - len(targets)
            predicts, targets = predicts + [0] * missing, targets + [IGNORED] * missing
        row = forest.row()
        if self._shapes:
            longest = max(self._shapes.longest, self._shapes.multiple)
            row = replace(row, longest_query=longest, longest_keys=longest)
        return {
            "input_ids": row.input_ids,
            "labels": torch.tensor([labels]),
            "predicts": torch.tensor(predicts),
            "targets": torch.tensor(targets),
            "row": row,
        }


class RowTrainer(SFTTrainer):
    """Trains on the batches of `RowCollator`.

    Args:
        backbone: The model as `segments` runs it.
        graphed: Run the passes as CUDA graphs; the collator must give fixed shapes.
        arguments: What SFTTrainer takes.
    """

    def __init__(self, backbone: segments.Backbone, graphed: bool = False, **arguments: Any):
        super().__init__(**arguments)
        self._backbone = backbone
        self._passes = GraphedPasses(self._loss, backbone.model.parameters()) if graphed else None
        # The loss divides by the whole update's supervised tokens itself.
        self.model_accepts_loss_kwargs = True

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward pass; the row is active in both, because checkpointed layers run again in the second."""
        inputs = self._prepare_inputs(inputs)
        if self._passes:
            model.train()
            tokens = torch.as_tensor(num_items_in_batch, device=self.args.device)
            return self._passes({**inputs, "tokens": tokens})
        with segments.within(inputs["row"]):
            return super().training_step(model, inputs, num_items_in_batch)

    def _prepare_input(self, data: Any) -> Any:
        return data.to(self.args.device) if isinstance(data, segments.Row) else super()._prepare_input(data)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Cross-entropy of the supervised tokens: their sum over the batch, divided by those of the whole update
        (`num_items_in_batch`; this batch's own if not given)."""
        tokens = (inputs["labels"] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        loss = self._loss({**inputs, "tokens": tokens})
        return (loss, {}) if return_outputs else loss

    def _loss(self, batch: Mapping[str, Any]) -> torch.Tensor:
        row = batch["row"]
        with torch.autocast(row.input_ids.device.type, dtype=torch.bfloat16):
            logits = self._backbone.head(self._backbone(row).index_select(0, batch["predicts"]))
        return functional.cross_entropy(logits.float(), batch["targets"], reduction="sum") / batch["tokens"]
