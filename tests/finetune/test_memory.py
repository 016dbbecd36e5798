"""The question whether a training fits, before it starts."""

from dataclasses import replace

import pytest

from data_prep import UserError
from finetune import hardware, memory
from finetune.recipes import FULL, LORA

SEVEN_BILLION = 7_615_616_512


@pytest.mark.parametrize(
    ("recipe", "trainable", "gigabytes"),
    [
        # fp32 gradients and two fp32 moments: 12 bytes a weight.
        (FULL, SEVEN_BILLION, 91.4),
        # fp32 gradients and two moments of a byte: 6.
        (replace(FULL, optimizer="adamw_8bit"), SEVEN_BILLION, 45.7),
        (replace(FULL, weights="bfloat16"), SEVEN_BILLION, 45.7),
        (LORA, 40_000_000, 0.48),
    ],
)
def test_bytes_a_weight(recipe, trainable, gigabytes):
    assert memory.still_needed_bytes(recipe, trainable) / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_a_training_that_cannot_fit_is_refused_with_the_figures():
    too_many = hardware.available_memory_bytes()
    with pytest.raises(UserError, match=r"cannot fit: [\d.]+ GB for gradients and optimiser.* GB free"):
        memory.require_room(FULL, too_many)


def test_one_that_fits_says_what_is_free():
    assert memory.require_room(LORA, 1_000_000).startswith("0.0 GB for gradients and optimiser, activations on top; ")
