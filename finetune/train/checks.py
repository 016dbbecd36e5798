"""What is checked before a training starts: which tokens carry loss, and whether packed articles see each other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import pandas as pd
import torch
from trl import SFTTrainer

from data_prep import UserError
from finetune.model import encode, load, packing

SUPERVISION_ROWS = 8
CHECKED_TOKENS = 32
# bf16 rounding gives 0.003 to 0.01; a row whose articles saw each other, 0.9.
LARGEST_ISOLATION_ERROR = 0.1


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


@torch.no_grad()
def check_isolation(backbone: packing.Backbone, autocast: torch.autocast, encoded: Sequence[encode.Encoded]) -> str:
    """Two articles in one row behind what they share, against each of them alone in the model's own attention.

    Returns:
        How much their hidden states differ, in words.

    Raises:
        UserError: They see each other.
    """
    sequences = [(row.prompt + row.answer)[-CHECKED_TOKENS:] for row in encoded[:2]]
    shared = sequences[0][:8]
    forest = packing.Forest()
    root = forest.add(shared)
    for sequence in sequences:
        forest.add(sequence, root)
    load.evaluating(backbone.model)
    with autocast:
        together = backbone(forest.row().to(backbone.device)).float()[len(shared) :].split([*map(len, sequences)])
        alone = [backbone.alone(shared + sequence).float()[len(shared) :] for sequence in sequences]
    backbone.model.train()
    error = max(((a - b).norm() / b.norm()).item() for a, b in zip(together, alone, strict=True))
    if not error < LARGEST_ISOLATION_ERROR:
        raise UserError(
            f"packed articles see each other: their hidden states differ from those of each alone by {error:.0%}. The "
            "model's attention does not go through the packed one; use packing=False"
        )
    return f"packed articles are apart: hidden states within {error:.1%} of each article's alone"
