"""TRL's trainer on packed rows: no padding, the common beginning computed once, logits only where a token carries loss.
The loss and its gradients are the same as for the articles one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from torch.nn import functional
from transformers import TrainerCallback
from trl import SFTConfig

from data_prep import Example, Task
from finetune import machine
from finetune.evaluate import score
from finetune.model import encode, packing
from finetune.model.checks import choose_backbone
from finetune.model.encode import IGNORED
from finetune.train import checks, processes
from finetune.train.graphs import GraphedPasses
from finetune.train.portions import Articles
from finetune.train.updates import update_in_backward
from finetune.train.watched import Watched

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
        `predicts` it, the `targets` and their `weights`; and the `articles` themselves."""
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
            "articles": Articles(examples),
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
            # A process without a row of an update has none.
            "predicts": torch.tensor([place - 1 for place in places] + [0] * missing, dtype=torch.int64),
            "targets": torch.tensor([targets[place] for place in places] + [IGNORED] * missing, dtype=torch.int64),
            "weights": torch.tensor(
                [1.0 if is_answer else self._article_weight for is_answer in answers] + [0.0] * missing
            ),
        }

    def _missing(self, supervised: int, tokens: int, articles: int) -> int:
        """Predictions to add so that batches are alike; there are never more than tokens."""
        return min(self._shapes.supervised * articles, tokens) - supervised if self._shapes else 0


class PackedSFTTrainer(Watched, processes.SharedTraining):
    """TRL's SFTTrainer on packed rows, watched on validation rows.

    With `packing=True` a batch of articles is one row without padding (`RowCollator`); otherwise batches are padded as
    TRL pads them. The loss and its gradients are the same. `evaluate` scores the label of each validation row.

    Args:
        model: From `load_model`, with an adapter or without.
        args: TRL's configuration; of it `packing`, `completion_only_loss` and `label_smoothing_factor` are read here.
        processing_class: The tokenizer.
        train_dataset: Examples to train on.
        eval_dataset: Examples to watch.
        task: Their labels and the answer's form.
        callbacks: Added to the trainer's own.
        article_loss: Weight of the article's own loss beside the answer's.
        cuda_graphs: Replay each step as one CUDA graph.
        update_in_backward: Update each weight in the backward pass (`updates`), unclipped.
        early_stopping_patience: Ends the training after so many measurements without a new best one, as
            `args.metric_for_best_model` has it.
        named: What SFTTrainer takes besides, such as `optimizers`.

    Raises:
        UserError: A row does not fit into `max_length`, no token carries loss, or our logits are not the model's.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: SFTConfig,
        processing_class: Any,
        train_dataset: Sequence[Example],
        eval_dataset: Sequence[Example],
        task: Task,
        callbacks: Sequence[TrainerCallback] = (),
        *,
        article_loss: float = 0.0,
        cuda_graphs: bool = False,
        update_in_backward: bool = False,
        early_stopping_patience: int | None = None,
        **named: Any,
    ):
        # What save_run reads of what ran.
        self.packed, self.article_loss, self.update_in_backward = args.packing, article_loss, update_in_backward
        self.added, adapted, config = named, getattr(model, "peft_config", None), model.config.get_text_config()
        asks_router, self._several = vars(config).get("output_router_logits"), machine.processes() > 1

        encoded = encode.encode(processing_class, train_dataset, args.max_length)
        watched = encode.encode(processing_class, eval_dataset, args.max_length)
        self.checks = {"articles": encode.cuts([*encoded, *watched], args.max_length)}
        sequences = [row.prompt + row.answer for row in (*encoded, *watched)]
        self.backbone, self.checks["rows"] = choose_backbone(model, sequences)
        # Nothing of packed rows alone: padded batches have another layout each time.
        cuda_graphs &= args.packing and isinstance(self.backbone, packing.Backbone) and not self._several
        # A recipe's update is the same on any number of processes; the record says what the recipe does.
        self.update = args.per_device_train_batch_size, args.gradient_accumulation_steps
        self.cuda_graphs = cuda_graphs
        if self._several:
            self.divide(args, reads_images=config is not model.config)
        self.encoded_tokens = sum(map(len, encoded))
        supervised = args.completion_only_loss is not False
        if self.packed:
            # Where prompts carry loss or meet with dropout, each article needs its own.
            dropout = any(config.lora_dropout for config in (adapted or {}).values())
            alike = supervised and not dropout
            shared = self._shared = encode.shared_length([row.prompt for row in encoded]) if alike else 0
            shapes = _fixed_shapes(args, encoded, shared, supervised and not article_loss) if cuda_graphs else None
            # What an article's token weighs against an answer's, so that the two means are weighed as asked for.
            answers = sum(len(row.answer) for row in encoded)
            articles = sum(len(row.prompt) - shared for row in encoded)
            named = {"data_collator": RowCollator(shared, shapes, article_loss * answers / articles)} | named
        # Rows are encoded and packed here; Unsloth would turn its own packing on.
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        args.packing = args.padding_free = False
        args.train_sampling_strategy = "random" if self.packed else "group_by_length"
        # The longest row comes first: what grows with rows (Unsloth's tables of rotary embeddings) must have its size
        # and place before a CUDA graph reads it. Replaced later, it left graphs with freed memory, and losses of NaN.
        args.eval_on_start = args.eval_on_start or cuda_graphs
        if update_in_backward:
            args.max_grad_norm = 0.0
        super().__init__(
            model=model,
            args=args,
            processing_class=processing_class,
            train_dataset=Dataset.from_list([row.row(supervised) for row in encoded]),
            eval_dataset=Dataset.from_list([row.row() for row in watched]),
            callbacks=self.watching(model, args, callbacks, early_stopping_patience, named.get("data_collator")),
            **named,
        )
        if self.packed and asks_router is not None:
            # TRL turns it on for its auxiliary loss, which cannot be formed from a packed row.
            config.output_router_logits = asks_router
        self.scorer = score.LabelScorer(self.backbone, processing_class, task, args.per_device_eval_batch_size)
        self.watch([row.prompt for row in watched], [example.label for example in eval_dataset], task)
        self.supervision = checks.check_supervision(self, processing_class)
        self._passes = GraphedPasses(self._loss, self._trained) if cuda_graphs else None
        # Of a table of 49,152 rows, a batch reads a few hundred. PyTorch makes its gradient as large as the table and
        # adds it to the head's, which is the same matrix: 0.6 of the 4.0 s of a step of SmolLM2-135M on two cores.
        table = model.get_input_embeddings().weight
        self._adds_rows = table is self.backbone.head.weight and table.requires_grad and table.device.type == "cpu"
        alone = not (update_in_backward or self._several)
        self._adds_rows &= self.packed and isinstance(self.backbone, packing.Backbone) and alone
        if self.packed:
            if not self._several:
                # The trainer calls it at each step; see floating_point_ops.
                model.zero_grad = self._forget_gradients
            # The loss divides by the whole update's supervised tokens itself.
            self.model_accepts_loss_kwargs = True

    def preview(self) -> pd.DataFrame:
        """The tokens of the first rows that carry loss, decoded from the batch that the model gets."""
        return self.supervision.table()

    def evaluate(self, *arguments, **named) -> dict[str, float]:
        # Not through DDP, which would have all processes call it equally often.
        self.backbone.run = self.backbone.model
        return super().evaluate(*arguments, **named)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.update_in_backward:
            update_in_backward(optimizer)
        return optimizer

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward pass; the row is active in both, because checkpointed layers run again in the second."""
        if not self.packed:
            return super().training_step(model, inputs, num_items_in_batch)
        # Updated in the backward pass, a part of the weights is new already when it fails: nothing can be repeated.
        # Nor may one process run another number of passes than the others.
        if self._several or self.update_in_backward or "articles" not in inputs:
            return self._pass(model, inputs, num_items_in_batch)
        step = self.state.global_step + 1
        return self.portions.run(inputs, lambda batch: self._pass(model, batch, num_items_in_batch), step)

    def _pass(self, model, inputs, num_items_in_batch) -> torch.Tensor:
        inputs = self._prepare_inputs(inputs)
        if self.portions.largest:
            # What was recorded holds memory, and its shapes are those of whole batches.
            self._passes = None
        if self._passes:
            tokens = torch.as_tensor(num_items_in_batch, device=self.args.device)
            return self._passes({**inputs, **self._embedded(inputs["row"]), "tokens": tokens})
        if self._adds_rows:
            inputs["embeddings"] = self.backbone.embed(inputs["row"]).detach().requires_grad_()
        with packing.within(inputs["row"]):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self._adds_rows:
            ids, gradient = inputs["row"].input_ids[0], inputs["embeddings"].grad[0]
            self.backbone.head.weight.grad.index_add_(0, ids, gradient)
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # Nothing reads them; to count them the trainer walks through all modules at each step, and so it does to clip
        # gradients and to forget them. For SmolLM2-135M with LoRA these walks took 18 ms a step, more than the GPU.
        return 0

    def _clip_grad_norm(self, model) -> torch.Tensor:
        if self.is_fsdp_enabled:
            return super()._clip_grad_norm(model)
        return torch.nn.utils.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def _forget_gradients(self) -> None:
        for parameter in self._trained:
            parameter.grad = None

    def _embedded(self, row: packing.Row) -> dict[str, torch.Tensor]:
        """Input embeddings that lie in the host's memory, where no CUDA graph can read them."""
        # Detached: Unsloth has them ask for a gradient, and a graph's inputs are overwritten.
        return {} if self.backbone.embeds_on_device else {"embeddings": self.backbone.embed(row).detach()}

    def _prepare_input(self, data: Any) -> Any:
        return data.to(self.args.device) if isinstance(data, packing.Row) else super()._prepare_input(data)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Cross-entropy of the supervised tokens: their sum over the batch, divided by those of the whole update
        (`num_items_in_batch`; this batch's own if not given)."""
        if not self.packed:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        tokens = (inputs["labels"] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        self.backbone.run = model
        # DDP and FSDP2 take the mean over processes, and we the sum.
        loss = self._loss({**inputs, "tokens": tokens}) * machine.processes()
        return (loss, {}) if return_outputs else loss

    def _loss(self, batch: Mapping[str, Any]) -> torch.Tensor:
        with self.autocast():
            logits = self.backbone(batch["row"], batch["predicts"], batch.get("embeddings"))
        smoothing = self.args.label_smoothing_factor
        losses = functional.cross_entropy(logits.float(), batch["targets"], reduction="none", label_smoothing=smoothing)
        return (losses * batch["weights"]).sum() / batch["tokens"]


def _fixed_shapes(args: SFTConfig, encoded: Sequence[encode.Encoded], shared: int, answers_alone: bool) -> FixedShapes:
    supervised = max(len(row.answer) if answers_alone else len(row) for row in encoded)
    # Few shapes, each of which is recorded once, against little padding: an eighth of a batch, as a power of two.
    batch = args.per_device_train_batch_size * (sum(map(len, encoded)) / len(encoded) - shared)
    multiple = max(64, 2 ** round(math.log2(batch / 8)))
    return FixedShapes(multiple, longest=max(map(len, encoded)), supervised=supervised)
