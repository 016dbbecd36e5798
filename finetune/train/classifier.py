"""transformers' trainer for a classification head, on padded batches of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from torch.nn import functional
from transformers import Trainer, TrainerCallback
from trl import SFTConfig

from data_prep import Example, Task, UserError
from finetune import machine
from finetune.evaluate import score
from finetune.model import encode
from finetune.model.head import class_logits, padded
from finetune.train.checks import SUPERVISION_ROWS, Supervision
from finetune.train.watched import Watched


class HeadTrainer(Watched, Trainer):
    """transformers' Trainer for a classification head, watched on validation rows.

    A row is a prompt as LoRA's, up to where the answer would begin; its last token predicts the label. Packed rows need
    an output layer at every token, so batches are padded, rows of similar length together.

    Arguments are those of `PackedSFTTrainer` that a head can have; the model is loaded with labels.

    Raises:
        UserError: A prompt does not fit into `max_length`, the head is for other labels, or padding changes what it
            reads.
    """

    # save_run reads them of every trainer.
    packed = cuda_graphs = update_in_backward = False
    article_loss = 0.0

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
        early_stopping_patience: int | None = None,
        **named: Any,
    ):
        if machine.processes() > 1:
            raise UserError("a classification head trains in one process: leave --processes out")
        self.added, self.update = named, (args.per_device_train_batch_size, args.gradient_accumulation_steps)
        encoded = encode.encode(processing_class, train_dataset, args.max_length)
        watched = encode.encode(processing_class, eval_dataset, args.max_length)
        prompts = [row.prompt for row in (*encoded, *watched)]
        self.checks = {"articles": encode.cuts([*encoded, *watched], args.max_length)}
        batch_size = args.per_device_eval_batch_size
        self.scorer, self.checks["rows"] = score.choose_scorer(model, processing_class, task, prompts, batch_size)
        self.encoded_tokens = sum(len(row.prompt) for row in encoded)
        labels = [task.labels.index(example.label) for example in train_dataset]
        rows = [{"input_ids": row.prompt, "labels": label} for row, label in zip(encoded, labels, strict=True)]
        args.train_sampling_strategy = "group_by_length"
        super().__init__(
            model=model,
            args=args,
            processing_class=processing_class,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list([{"input_ids": row.prompt} for row in watched]),
            data_collator=lambda rows: {
                **padded(processing_class, [row["input_ids"] for row in rows]),
                "labels": torch.tensor([row["labels"] for row in rows]),
            },
            callbacks=self.watching(model, args, callbacks, early_stopping_patience),
            **named,
        )
        self.watch([row.prompt for row in watched], [example.label for example in eval_dataset], task)
        # The loss divides by the rows of the whole update itself.
        self.model_accepts_loss_kwargs = True
        first = rows[:SUPERVISION_ROWS]
        names = [task.labels[row["labels"]] for row in first]
        self.supervision = Supervision(len(first), sum(len(row["input_ids"]) for row in first), len(first), names)

    def preview(self) -> pd.DataFrame:
        """The first rows: the end of what the head reads, and the label that carries the loss."""
        rows = self.train_dataset.select(range(self.supervision.rows))
        ends = [self.processing_class.decode(row["input_ids"][-12:]) for row in rows]
        return pd.DataFrame({"the prompt ends with": ends, "label": self.supervision.decoded})

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Cross-entropy of the labels: their sum over the batch, divided by the rows of the whole update
        (`num_items_in_batch`; this batch's own if not given)."""
        logits, labels = class_logits(model, inputs), inputs["labels"]
        smoothing = self.args.label_smoothing_factor
        losses = functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        loss = losses / (len(labels) if num_items_in_batch is None else num_items_in_batch)
        return (loss, {"logits": logits}) if return_outputs else loss
