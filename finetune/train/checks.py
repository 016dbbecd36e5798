"""What is checked before a training starts: which tokens carry loss."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from operator import itemgetter

import pandas as pd
import torch
from trl import SFTTrainer

from data_prep import UserError
from finetune.model import encode

SUPERVISION_ROWS = 8


@dataclass(frozen=True)
class Supervision:
    """What the loss sees of the first rows, read from the collated batch that the model gets."""

    rows: int
    tokens: int
    labelled_tokens: int
    decoded: list[str]

    def table(self) -> pd.DataFrame:
        return pd.DataFrame({"tokens that carry loss, decoded": self.decoded})


def check_supervision(trainer: SFTTrainer, tokenizer) -> Supervision:
    """Collate the first rows as the training will, and read which tokens carry loss.

    Raises:
        UserError: None does. The training would run, and learn nothing.
    """
    rows = min(SUPERVISION_ROWS, len(trainer.train_dataset))
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(rows)])
    labelled = batch["labels"] != encode.IGNORED
    if not labelled.any():
        raise UserError("no token of the first rows carries loss: the answers were lost in collation or truncation")
    return Supervision(
        rows=rows,
        tokens=sum(len(trainer.train_dataset[row]["input_ids"]) for row in range(rows)),
        labelled_tokens=int(labelled.sum()),
        decoded=[tokenizer.decode(ids) for ids in _labelled_stretches(batch["input_ids"], labelled)],
    )


def _labelled_stretches(ids: torch.Tensor, labelled: torch.Tensor) -> list[list[int]]:
    """Tokens that carry loss, shape (rows, tokens) each, as uninterrupted stretches."""
    stretches = []
    for row_ids, row_labelled in zip(ids.tolist(), labelled.tolist(), strict=True):
        for is_labelled, stretch in itertools.groupby(zip(row_ids, row_labelled, strict=True), key=itemgetter(1)):
            if is_labelled:
                stretches.append([token for token, _ in stretch])
    return stretches
