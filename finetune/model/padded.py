"""Rows of segments, unfolded into padded batches: what a model that cannot read packed rows gets."""

from __future__ import annotations

import numpy as np
import torch

from finetune.model.head import only_at
from finetune.model.packing import Row


class Padded:
    """A causal language model that computes each sequence of a row on its own, as plain transformers does.

    It takes the place of `packing.Backbone` for a model in which articles of one row would see each other.
    Padding follows a sequence, and needs no mask: nothing that a causal model computes at a token depends on what comes
    after it. With a mask, Qwen2.5-Coder-0.5B in bf16 on an H100 had gradients of NaN in three of 77 batches.

    Args:
        model: A model of transformers, or one wrapped by peft, with an attention of its own.
    """

    embeds_on_device = True

    def __init__(self, model):
        self.model = model
        self.head = model.get_output_embeddings()
        self.device = self.head.weight.device

    def __call__(self, row: Row, places: torch.Tensor, embeddings: None = None, in_fp32: bool = False) -> torch.Tensor:
        """Logits at places of a row; arguments and result are those of `packing.Backbone`."""
        sequences, columns = _unfold(row, places.tolist())
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        longest = int(lengths.max())
        # The padding's tokens are never read; 0 is in every vocabulary, which a pad token may not be.
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        ids[torch.arange(longest) < lengths[:, None]] = torch.from_numpy(np.concatenate(sequences))
        flat = torch.tensor([number * longest + column for number, column in columns], device=self.device)
        with only_at(self.head, flat, in_fp32):
            output = self.model(input_ids=ids.to(self.device), use_cache=False, return_dict=True)
        return output.logits[0]


def _unfold(row: Row, places: list[int]) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    """The token ids of the sequences that hold `places`, and for each place: its sequence, and where in it."""
    tokens, wanted = row.input_ids[0].cpu().numpy(), set(places)
    seen_by_segment = np.split(row.key_index.cpu().numpy(), row.key_ends.cpu().numpy()[1:-1])
    sequences: list[np.ndarray] = []
    found: dict[int, tuple[int, int]] = {}
    # The longest first: what one segment shares with a longer one is read from the longer one.
    for seen in sorted(seen_by_segment, key=len, reverse=True):
        here = [(place, column) for column, place in enumerate(seen.tolist()) if place in wanted and place not in found]
        if here:
            found |= {place: (len(sequences), column) for place, column in here}
            # What follows the last place that is read changes nothing.
            sequences.append(tokens[seen[: here[-1][1] + 1]])
    return sequences, [found[place] for place in places]
