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

from finetune.model import packing
from finetune.model.encode import IGNORED
from finetune.model.precision import Precision
from finetune.train.graphs import GraphedPasses
from finetune.train.updates import update_in_backward

# A row's tokens are the inner dimension of gradients' products, and tensor cores want 16 bytes of it: without, those of
# an adapter took 16 of the 277 ms of a 7B model's step on an H100.
ALIGNMENT = 8


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
        shapes: What to pad to; without it, a multiple of 8 tokens.
        article_weight: Loss of an article's token in relation to an answer's; articles carry none without it.
    """

    def __init__(self, shared: int, shapes: FixedShapes | None = None, article_weight: float = 0.0):
        self._shared = shared
        self._shapes = shapes
        self._article_weight = article_weight

    def __call__(self, examples: Sequence[Mapping[str, list[int]]]) -> dict[str, Any]:
        """A batch: `input_ids` and `labels` of shape (1, T), the `row`, and for what carries loss: the place that
        `predicts` it, the `targets` and their `weights`."""
        forest, labels, targets = packing.Forest(), [], []
        parent = None
        if self._shared:
            parent = forest.add(examples[0]["input_ids"][: self._shared])
            labels, targets = [IGNORED] * self._shared, [IGNORED] * self._shared
        for example in examples:
            ids, own = example["input_ids"][self._shared :], example["labels"][self._shared :]
            forest.add(ids, parent)
            for into, tokens in ((labels, own), (targets, ids if self._article_weight else own)):
                # What predicts a first token does not stand before it in the row.
                into += [IGNORED, *tokens[1:]]
        padding = self._padding(len(labels))
        if padding:
            forest.add([0] * padding)
            labels, targets = labels + [IGNORED] * padding, targets + [IGNORED] * padding
        row = forest.row()
        if self._shapes:
            longest = max(self._shapes.longest, self._shapes.multiple)
            row = replace(row, longest_query=longest, longest_keys=longest)
        return {
            "input_ids": row.input_ids,
            "labels": torch.tensor([labels]),
            **self._supervised(labels, targets, len(examples)),
            "row": row,
        }

    def _padding(self, tokens: int) -> int:
        if self._shapes:
            # At least one token, so that the number of segments is always the same.
            return self._shapes.multiple - tokens % self._shapes.multiple
        return -tokens % ALIGNMENT

    def _supervised(self, labels: list[int], targets: list[int], articles: int) -> dict[str, torch.Tensor]:
        places = [place for place, target in enumerate(targets) if target != IGNORED]
        missing = self._missing(len(places), len(targets), articles)
        answers = [labels[place] != IGNORED for place in places]
        return {
            "predicts": torch.tensor([place - 1 for place in places] + [0] * missing),
            "targets": torch.tensor([targets[place] for place in places] + [IGNORED] * missing),
            "weights": torch.tensor(
                [1.0 if is_answer else self._article_weight for is_answer in answers] + [0.0] * missing
            ),
        }

    def _missing(self, supervised: int, tokens: int, articles: int) -> int:
        """Predictions to add so that batches are alike; there are never more than tokens."""
        return min(self._shapes.supervised * articles, tokens) - supervised if self._shapes else 0


class RowTrainer(SFTTrainer):
    """Trains on the batches of `RowCollator`.

    Args:
        backbone: The model as `packing` runs it.
        precision: The type of matrix products.
        graphed: Run the passes as CUDA graphs; the collator must give fixed shapes.
        label_smoothing_factor: Share of a target that goes to the other tokens of the vocabulary.
        updates_in_backward: Update each weight in the backward pass (`updates`).
        arguments: What SFTTrainer takes.
    """

    def __init__(
        self,
        backbone: packing.Backbone,
        precision: Precision,
        graphed: bool = False,
        label_smoothing_factor: float = 0.0,
        updates_in_backward: bool = False,
        **arguments: Any,
    ):
        super().__init__(**arguments)
        self._backbone = backbone
        self._precision = precision
        self._label_smoothing = label_smoothing_factor
        self._updates_in_backward = updates_in_backward
        self._trained = [parameter for parameter in backbone.model.parameters() if parameter.requires_grad]
        self._passes = GraphedPasses(self._loss, self._trained) if graphed else None
        # The trainer calls it at each step; see floating_point_ops.
        backbone.model.zero_grad = self._forget_gradients
        # The loss divides by the whole update's supervised tokens itself.
        self.model_accepts_loss_kwargs = True

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self._updates_in_backward:
            update_in_backward(optimizer)
        return optimizer

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward pass; the row is active in both, because checkpointed layers run again in the second."""
        inputs = self._prepare_inputs(inputs)
        if self._passes:
            tokens = torch.as_tensor(num_items_in_batch, device=self.args.device)
            return self._passes({**inputs, **self._embedded(inputs["row"]), "tokens": tokens})
        with packing.within(inputs["row"]):
            return super().training_step(model, inputs, num_items_in_batch)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # Nothing reads them; to count them the trainer walks through all modules at each step, and so it does to clip
        # gradients and to forget them. For SmolLM2-135M with LoRA these walks took 18 ms a step, more than the GPU.
        return 0

    def _clip_grad_norm(self, model) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def _forget_gradients(self) -> None:
        for parameter in self._trained:
            parameter.grad = None

    def _embedded(self, row: packing.Row) -> dict[str, torch.Tensor]:
        """Input embeddings that lie in the host's memory, where no CUDA graph can read them."""
        # Detached: Unsloth has them ask for a gradient, and a graph's inputs are overwritten.
        return {} if self._backbone.embeds_on_device else {"embeddings": self._backbone.embed(row).detach()}

    def _prepare_input(self, data: Any) -> Any:
        return data.to(self.args.device) if isinstance(data, packing.Row) else super()._prepare_input(data)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Cross-entropy of the supervised tokens: their sum over the batch, divided by those of the whole update
        (`num_items_in_batch`; this batch's own if not given)."""
        tokens = (inputs["labels"] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        loss = self._loss({**inputs, "tokens": tokens})
        return (loss, {}) if return_outputs else loss

    def _loss(self, batch: Mapping[str, Any]) -> torch.Tensor:
        row = batch["row"]
        with self._precision.autocast():
            hidden = self._backbone(row, batch.get("embeddings"))
            logits = self._backbone.head(hidden.index_select(0, batch["predicts"]))
        losses = functional.cross_entropy(
            logits.float(), batch["targets"], reduction="none", label_smoothing=self._label_smoothing
        )
        return (losses * batch["weights"]).sum() / batch["tokens"]
