"""The roofline against figures worked out by hand, and against what no GPU can do."""

from dataclasses import replace

import measurements
import numpy as np
import pytest

from benchmarks import roofline
from benchmarks.roofline import Machine, Work, share_of, work_of
from data_prep import UserError
from finetune.config.recipes import FULL, LORA, QLORA

# Qwen2.5-7B: 28 layers of 2 x 3584 x (3584 + 512) + 3 x 3584 x 18944 weights; 152,064 x 3584 in the head.
LAYERS, HEAD = 6_525_288_448, 544_997_376
# The input embeddings, and 333,312 in biases and norms.
ALL = LAYERS + 2 * HEAD + 333_312
GPU = Machine(800e12, 3.0e12)


def kept(recipe, **changes):
    return replace(recipe, gradient_checkpointing="off", **changes)


def test_the_shape_is_qwen_s():
    assert (roofline.LINEAR, roofline.HEAD, roofline.PARAMETERS) == (LAYERS, HEAD, ALL)


def test_arithmetic_of_a_frozen_and_of_a_trained_model():
    tokens, articles = 1000, 10
    supervised = 65
    assert work_of(kept(LORA), articles, tokens).flops == 4 * LAYERS * tokens + 4 * HEAD * supervised
    assert work_of(kept(FULL), articles, tokens).flops == 6 * LAYERS * tokens + 6 * HEAD * supervised
    assert work_of(kept(LORA, completion_only_loss=False), articles, tokens).flops == 4 * (LAYERS + HEAD) * tokens
    again = replace(LORA, gradient_checkpointing="plain")
    assert work_of(again, articles, tokens).flops == 6 * LAYERS * tokens + 4 * HEAD * supervised


def test_weights_are_read_forwards_and_backwards():
    assert work_of(kept(LORA), 1, 0).streamed == 2 * 2 * (LAYERS + HEAD)
    assert work_of(kept(FULL), 1, 0).streamed == 2 * 2 * (LAYERS + HEAD) + 2 * ALL, "and their gradients are written"


def test_four_bit_weights_are_unpacked_in_each_pass():
    more = work_of(kept(QLORA), 1, 100).apart - work_of(kept(LORA), 1, 100).apart
    assert more == pytest.approx(2 * LAYERS * (4.127 / 8 + 2))
    assert work_of(kept(QLORA), 1, 100).streamed == work_of(kept(LORA), 1, 100).streamed, "bf16 copies are multiplied"


def test_traffic_of_full_fine_tuning():
    update = 4 * 2 + 2 * (2 + 2)
    bf16 = {"dtype": "bfloat16", "optim": "adamw_8bit"}
    assert work_of(kept(FULL, gradient_accumulation_steps=1, **bf16), 8, 500).apart == update * ALL
    accumulated = work_of(kept(FULL, gradient_accumulation_steps=4, **bf16), 8, 500).apart
    assert accumulated == pytest.approx((update / 4 + 6 * 3 / 4) * ALL), "three of four add their gradients up"
    fp32 = work_of(kept(FULL, gradient_accumulation_steps=1, optim="adamw_8bit"), 8, 500).apart
    assert fp32 == pytest.approx((12 + 4 * 4 + 2 * (4 + 2)) * ALL), "weights and gradients are cast"


def test_the_longer_of_two_times_and_what_comes_on_top():
    works = [Work(100, 10, 0), Work(100, 30, 0), Work(100, 30, 10)]
    assert [work.seconds(Machine(peak=100, bandwidth=10), 0.5) for work in works] == [2, 3, 4]


def test_below_the_ridge_more_tokens_cost_next_to_nothing():
    """On a GB10 products wait for weights below about 348 tokens, a few more with activations."""
    gb10 = Machine(95e12, 273e9)
    assert gb10.ridge == pytest.approx(348, abs=1)
    few, some, many, twice = (work_of(kept(LORA), 1, tokens).seconds(gb10, 1) for tokens in (50, 100, 1000, 2000))
    assert some / few < 1.05
    assert twice / many > 1.9


class TestShare:
    def share(self, **changes) -> float:
        record = measurements.record(measurements.changed("batch", **changes))
        return share_of(record, record.rows.loc["batch"])

    def test_it_gives_the_measured_speed_back(self):
        row = measurements.record().rows.loc["batch"]
        assert roofline.work_of_row(row).seconds(GPU, self.share()) == pytest.approx(64 / 240)

    def test_it_counts_less_than_the_ladder_s_rule(self):
        assert 0.8 < self.share() / measurements.record().rows.share_of_peak["batch"] < 0.9

    def test_a_row_faster_than_the_gpu_is_refused(self):
        with pytest.raises(UserError, match=r"`batch` is faster than \d+ articles/s, all that this GPU could do"):
            self.share(articles_per_second=600.0, computed_per_second=600 * 60.6)

    def test_another_model_is_refused(self):
        with pytest.raises(UserError, match="measured on 2,000,000,000 parameters, not on all of the 7B shape"):
            self.share(parameters=2_000_000_000)


def test_the_ceiling_of_scoring_by_hand():
    rows = measurements.record().rows
    ceiling = roofline.scoring_ceiling(rows)
    in_layers = measurements.BASE - 2 * HEAD
    assert ceiling["scoring_lean_128"] == pytest.approx(800e12 / (2 * in_layers * 70 + 2 * HEAD * 7))
    assert np.isnan(ceiling["generation_lean_128"])
