"""Rows of segments: each token is computed once, and the result is that of separate sequences."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune.model import packing
from finetune.model.encode import IGNORED
from finetune.model.packing import Backbone, Forest
from finetune.train.trainer import FixedShapes, RowCollator


@pytest.fixture
def backbone(tiny_model) -> Backbone:
    return Backbone(AutoModelForCausalLM.from_pretrained(tiny_model))


def test_a_row_counts_positions_and_keys_from_the_beginning_of_each_sequence():
    forest = Forest()
    root = forest.add([7, 8])
    first = forest.add([9, 10, 11], root)
    forest.add([12], first)
    forest.add([13, 14], root)
    row = forest.row()
    assert row.input_ids.tolist() == [[7, 8, 9, 10, 11, 12, 13, 14]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 2, 3]]
    assert row.query_ends.tolist() == [0, 2, 5, 6, 8]
    seen = [keys.tolist() for keys in np.split(row.key_index.numpy(), row.key_ends[1:-1])]
    assert seen == [[0, 1], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5], [0, 1, 6, 7]]
    assert (row.longest_query, row.longest_keys) == (3, 6)
    assert forest.last(first) == 4


def alone(backbone: Backbone, tokens: list[int]) -> torch.Tensor:
    """Logits of one sequence, by transformers."""
    return backbone.model(input_ids=torch.tensor([tokens])).logits[0]


def everywhere(backbone: Backbone, row: packing.Row, *embeddings: torch.Tensor) -> torch.Tensor:
    return backbone(row, torch.arange(row.input_ids.numel()), *embeddings)


def test_logits_are_those_of_separate_sequences(backbone):
    shared, rests = [3, 4, 5], [[6, 7, 8, 9], [10], [11, 12]]
    forest = Forest()
    root = forest.add(shared)
    stems = [forest.add(rest, root) for rest in rests]
    branch = forest.add([20, 21], stems[2])
    with torch.no_grad():
        states = everywhere(backbone, forest.row())
        for stem, rest in zip(stems, rests, strict=True):
            torch.testing.assert_close(
                states[forest.last(stem) + 1 - len(rest) : forest.last(stem) + 1],
                alone(backbone, shared + rest)[len(shared) :],
                atol=1e-5,
                rtol=1e-4,
            )
        torch.testing.assert_close(
            states[forest.last(branch)], alone(backbone, shared + rests[2] + [20, 21])[-1], atol=1e-5, rtol=1e-4
        )


def test_outside_of_a_row_the_model_is_as_before(tiny_model, backbone):
    ids = torch.tensor([[5, 6, 7, 8], [0, 9, 10, 11]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa")
    with torch.no_grad():
        torch.testing.assert_close(
            backbone.model(input_ids=ids, attention_mask=mask).logits, plain(input_ids=ids, attention_mask=mask).logits
        )
    generated = [model.generate(ids, attention_mask=mask, max_new_tokens=5) for model in (plain, backbone.model)]
    assert torch.equal(*generated)


EXAMPLES = [
    {"input_ids": [3, 4, 5, *rest, 30 + number, 2], "labels": [IGNORED] * (3 + len(rest)) + [30 + number, 2]}
    for number, rest in enumerate([[6, 7], [8], [9, 10, 11, 12]])
]


def gradients(backbone: Backbone, batch) -> tuple[float, torch.Tensor]:
    backbone.model.zero_grad()
    logits = backbone(batch["row"], batch["predicts"])
    loss = torch.nn.functional.cross_entropy(logits, batch["targets"], reduction="sum")
    loss.backward()
    return loss.item(), torch.cat([parameter.grad.flatten() for parameter in backbone.model.parameters()])


def by_hand(backbone: Backbone, examples) -> tuple[float, torch.Tensor]:
    """transformers' own loss, one article after the other."""
    backbone.model.zero_grad()
    total = 0.0
    for example in examples:
        batch = {name: torch.tensor([values]) for name, values in example.items()}
        loss = backbone.model(**batch, num_items_in_batch=1).loss
        loss.backward()
        total += loss.item()
    return total, torch.cat([parameter.grad.flatten() for parameter in backbone.model.parameters()])


@pytest.mark.parametrize("shared", [0, 2, 3])
@pytest.mark.parametrize("shapes", [None, FixedShapes(multiple=16, longest=9, supervised=4)])
def test_loss_and_gradients_are_those_of_the_articles_one_by_one(backbone, shared, shapes):
    loss, gradient = gradients(backbone, RowCollator(shared, shapes)(EXAMPLES))
    expected_loss, expected = by_hand(backbone, EXAMPLES)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-3)


def test_loss_on_all_tokens_is_that_of_the_articles_one_by_one(backbone):
    examples = [{**example, "labels": example["input_ids"]} for example in EXAMPLES]
    loss, gradient = gradients(backbone, RowCollator(0)(examples))
    expected_loss, expected = by_hand(backbone, examples)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("shapes", [None, FixedShapes(multiple=16, longest=9, supervised=9)])
def test_an_articles_own_tokens_weigh_what_they_are_given(backbone, shapes):
    batch = RowCollator(3, shapes, article_weight=0.25)(EXAMPLES)
    logits = backbone(batch["row"], batch["predicts"])
    losses = torch.nn.functional.cross_entropy(logits, batch["targets"], reduction="none")
    articles = [{**one, "labels": [IGNORED] * 4 + one["input_ids"][4:-2] + [IGNORED] * 2} for one in EXAMPLES]
    expected = by_hand(backbone, EXAMPLES)[0] + 0.25 * by_hand(backbone, articles)[0]
    assert (losses * batch["weights"]).sum().item() == pytest.approx(expected, rel=1e-5)
    assert (batch["labels"] != IGNORED).sum() == 6


def test_embeddings_may_be_computed_beforehand(backbone):
    row = RowCollator(3)(EXAMPLES)["row"]
    with torch.no_grad():
        torch.testing.assert_close(everywhere(backbone, row, backbone.embed(row)), everywhere(backbone, row))


def test_a_row_computes_what_is_shared_once():
    tokens = sum(len(example["input_ids"]) for example in EXAMPLES)
    alone, together = (RowCollator(shared)(EXAMPLES)["input_ids"].numel() for shared in (0, 3))
    # Up to a multiple of 8.
    assert alone == -(-tokens // 8) * 8
    assert together == -(-(tokens - 3 * (len(EXAMPLES) - 1)) // 8) * 8


def test_batches_of_fixed_shapes_are_alike():
    collate = RowCollator(3, FixedShapes(multiple=32, longest=9, supervised=4))
    first, second = collate(EXAMPLES), collate([EXAMPLES[2]] * 3)
    assert {name: first[name].shape for name in first if name not in ("row", "articles")} == {
        name: second[name].shape for name in second if name not in ("row", "articles")
    }
    rows = first["row"], second["row"]
    assert rows[0].key_index.shape == rows[1].key_index.shape
    assert rows[0].longest_keys == rows[1].longest_keys == 32


def test_checkpointed_layers_see_the_row_again_in_the_backward_pass(backbone):
    batch = RowCollator(3)(EXAMPLES)
    _, expected = gradients(backbone, batch)
    backbone.model.gradient_checkpointing_enable()
    backbone.model.train()
    with packing.within(batch["row"]):
        _, gradient = gradients(backbone, batch)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)
