"""Scoring is exact and does not depend on the batch; generation is checked strictly."""

import json
import math
from types import SimpleNamespace

import chats
import families
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep import UserError
from data_prep.sources import sample
from data_prep.task import AG_NEWS
from finetune import machine
from finetune.evaluate import score
from finetune.evaluate.score import LabelScorer
from finetune.model import checks, encode
from finetune.model.packing import Backbone
from finetune.model.padded import Padded


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(tiny_model, request):
    return AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=request.param).eval()


@pytest.fixture(scope="module")
def prompts(tokenizer):
    rows = list(sample(AG_NEWS).rows("test"))[:21]
    return encode.encode_prompts(tokenizer, [AG_NEWS.messages("lean", row.text, row.label)[:-1] for row in rows])


@torch.no_grad()
def one_by_one(model, tokenizer, prompt: list[int]) -> list[float]:
    """The labels' probabilities from four separate, unpadded, uncached forward passes."""
    scores = []
    for label in AG_NEWS.labels:
        answer = encode.answer_tokens(tokenizer, AG_NEWS.answer_for(label))[:-1]
        logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        scores.append(sum(logits[len(prompt) + i - 1, token].item() for i, token in enumerate(answer)))
    exponents = [math.exp(score - max(scores)) for score in scores]
    return [exponent / sum(exponents) for exponent in exponents]


def test_scores_are_those_of_separate_forward_passes(model, tokenizer, prompts):
    expected = [one_by_one(model, tokenizer, prompt) for prompt in prompts]
    scored = LabelScorer(Backbone(model), tokenizer, AG_NEWS, batch_size=8).score(prompts)
    np.testing.assert_allclose(scored, expected, atol=1e-5)
    assert np.ptp(scored, axis=0).max() > 1e-3, "a model that ignores the article would pass anything"


@pytest.mark.parametrize("batch_size", [1, 2, 5, 21, 64])
def test_scores_do_not_depend_on_the_batch_size(model, tokenizer, prompts, batch_size):
    reference = LabelScorer(Backbone(model), tokenizer, AG_NEWS, batch_size=7).score(prompts)
    scored = LabelScorer(Backbone(model), tokenizer, AG_NEWS, batch_size).score(prompts)
    np.testing.assert_allclose(scored, reference, atol=1e-5)
    assert (scored.argmax(axis=1) == reference.argmax(axis=1)).all()


def test_scores_are_the_same_where_memory_runs_out(model, tokenizer, prompts, monkeypatch):
    reference = LabelScorer(Backbone(model), tokenizer, AG_NEWS, batch_size=7).score(prompts)
    scorer, sizes = LabelScorer(Backbone(model), tokenizer, AG_NEWS, batch_size=16), []
    score_batch, most = scorer._score_batch, 5

    def limited(batch, shared):
        sizes.append(len(batch))
        if len(batch) > most:
            raise torch.OutOfMemoryError("simulated")
        return score_batch(batch, shared)

    monkeypatch.setattr(scorer, "_score_batch", limited)
    np.testing.assert_allclose(scorer.score(prompts), reference, atol=1e-5)
    assert sizes == [16, 8, 4, 4, 4, 4, 4, 1]
    most = 0
    with pytest.raises(UserError, match="out of memory: one article does not fit"):
        scorer.score(prompts)
    # Where nothing raises the error, the watch halves the batch that left too little, and ends what never fits.
    most, scorer.batch_size = 16, 16
    sizes.clear()
    monkeypatch.setattr(machine, "memory_left", lambda: 10**6 if sizes[-1] > 8 else 10**12)
    np.testing.assert_allclose(scorer.score(prompts), reference, atol=1e-5)
    assert sizes == [16, 5]
    scorer.batch_size = 2
    monkeypatch.setattr(machine, "memory_left", lambda: 10**6)
    with pytest.raises(UserError, match=r"0.0 GB of memory were left, .*: one article does not fit"):
        scorer.score(prompts)
    assert sizes == [16, 5, 2, 1]


def test_scores_do_not_depend_on_the_other_rows(model, tokenizer, prompts):
    """A row scored alone, where all but its last token is shared prefix, scores as among others."""
    scorer = LabelScorer(Backbone(model), tokenizer, AG_NEWS, batch_size=4)
    together = scorer.score(prompts)
    alone = np.concatenate([scorer.score([prompt]) for prompt in prompts[:5]])
    np.testing.assert_allclose(alone, together[:5], atol=1e-5)


def test_prompts_without_a_common_beginning_are_scored(model, tokenizer):
    prompts = [tokenizer(text)["input_ids"] for text in ("alpha beta gamma", "zeta eta theta iota")]
    expected = [one_by_one(model, tokenizer, prompt) for prompt in prompts]
    np.testing.assert_allclose(LabelScorer(Backbone(model), tokenizer, AG_NEWS, 2).score(prompts), expected, atol=1e-5)


def test_a_tree_with_shared_first_tokens_is_scored_exactly(model, tokenizer):
    """The tiny tokenizer's labels share no first token, so give the scorer answers that do."""
    answers = [[9, 21, 22, 25], [9, 21, 22, 26, 27], [9, 21, 23, 25], [9, 24, 25]]
    prompts = [tokenizer(text)["input_ids"] for text in ("one two three", "one four")]
    scorer = LabelScorer(Backbone(model), tokenizer, AG_NEWS, 2)
    scorer.set_answers(answers)
    expected = []
    for prompt in prompts:
        with torch.no_grad():
            scores = [
                sum(
                    model(torch.tensor([prompt + answer])).logits[0, len(prompt) + i - 1].log_softmax(-1)[token].item()
                    for i, token in enumerate(answer)
                )
                for answer in answers
            ]
        expected.append(np.exp(scores) / np.exp(scores).sum())
    np.testing.assert_allclose(scorer.score(prompts), expected, atol=1e-5)


# Seventy-seven; some begin like others, and some are the beginning of others.
MANY = [
    " ".join(filter(None, (what, rest)))
    for what in ("Other", "Card", "Card payment", "Top up", "Transfer", "Refund", "Cash withdrawal")
    for rest in ("", "issue", "issue abroad", "fee", "fee charged twice", "pending", "declined", "limit", "limits",
                 "not received", "wrong exchange rate")
]  # fmt: skip


def answers_to_many(tokenizer) -> list[list[int]]:
    return [tokenizer(json.dumps({"category": label}), add_special_tokens=False)["input_ids"] for label in MANY]


@pytest.mark.parametrize("kind", [Backbone, Padded])
def test_seventy_seven_labels_that_begin_alike_score_as_alone(model, tokenizer, prompts, kind):
    answers = answers_to_many(tokenizer)
    expected = []
    for prompt in prompts[:2]:
        with torch.no_grad():
            logits = [model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1) for answer in answers]
        sums = [
            of[range(len(prompt) - 1, len(prompt) + len(answer) - 1), answer].sum().item()
            for of, answer in zip(logits, answers, strict=True)
        ]
        expected.append(np.exp(sums) / np.exp(sums).sum())
    scorer = LabelScorer(kind(model), tokenizer, AG_NEWS, 8)
    scorer.set_answers(answers)
    np.testing.assert_allclose(scorer.score(prompts[:2]), expected, atol=1e-5)


def test_what_labels_share_is_read_and_asked_once(model, tokenizer, prompts, monkeypatch):
    answers, counts = answers_to_many(tokenizer), []

    class Counting(Backbone):
        def __call__(self, row, places, **named):
            counts.append((row.input_ids.numel(), len(places)))
            return super().__call__(row, places, **named)

    scorer = LabelScorer(Counting(model), tokenizer, AG_NEWS, 4)
    scorer.set_answers(answers)
    scorer.score(prompts[:4])
    shared, before = encode.shared_length(prompts[:4]), len(encode.common_prefix(answers))
    inner = {tuple(answer[:length]) for answer in answers for length in range(before + 1, len(answer))}
    apart = sum(len(answer) - before - 1 for answer in answers)
    assert len(inner) < apart / 2
    articles = sum(len(prompt) - shared + before for prompt in prompts[:4])
    assert counts == [(shared + articles + 4 * len(inner), 4 * (len(inner) + 1))]
    # Where the logits of a batch would need more memory than there is for them, it is smaller.
    monkeypatch.setattr(score, "LOGIT_BYTES", 4 * len(tokenizer) * 2.5 * (len(inner) + 1))
    scorer = LabelScorer(Backbone(model), tokenizer, AG_NEWS, 4)
    scorer.set_answers(answers)
    assert scorer.batch_size == 2


@pytest.mark.parametrize("batch_size", [1, 4, 21])
def test_generated_answers_do_not_depend_on_the_batch_size(model, tokenizer, prompts, batch_size):
    reference = score.generate(model, tokenizer, AG_NEWS, prompts, batch_size=6)
    assert score.generate(model, tokenizer, AG_NEWS, prompts, batch_size) == reference


@pytest.mark.parametrize("name", ["capped", "divided", "multiplied", "experts", "window", "state space", "convolution"])
def test_probabilities_of_other_families_are_their_own_at_any_batch_size(tokenizer, prompts, name):
    model, plain = (families.tiny_family(name, tokenizer) for _ in range(2))
    expected = [one_by_one(plain, tokenizer, prompt) for prompt in prompts[:6]]
    backbone, _ = checks.choose_backbone(model, prompts[:6])
    for batch_size in (1, 6):
        scored = LabelScorer(backbone, tokenizer, AG_NEWS, batch_size).score(prompts[:6])
        np.testing.assert_allclose(scored, expected, atol=1e-4)
    assert np.ptp(expected, axis=0).max() > 1e-3, "a model that ignores the article would pass anything"


def test_scores_of_a_bf16_model_are_not_rounded_to_bf16(tiny_model, tokenizer, prompts):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).eval()
    hidden = [model.get_decoder()(torch.tensor([prompt])).last_hidden_state[0, -1].float() for prompt in prompts]
    with torch.no_grad():
        expected = (torch.stack(hidden) @ model.lm_head.weight[[300, 301]].float().T).softmax(-1)
    scorer = LabelScorer(Backbone(model), tokenizer, AG_NEWS, 8)
    # Of one token each, so that their log-odds are a difference of two logits.
    scorer.set_answers([[300], [301]])
    scored = scorer.score(prompts)
    # The hidden states are in bf16, and packed rows add up in another order.
    np.testing.assert_allclose(scored, expected, atol=0.05)
    steps = np.log(scored[:, 0] / scored[:, 1]) * 128
    # Logits of 1 and more are multiples of 1/128 in bf16.
    assert np.mean(np.abs(steps - np.round(steps)) > 1e-3) > 0.9


@pytest.mark.parametrize("is_list", [True, False])
def test_an_answer_ends_at_any_token_of_the_models_own_list(model, tokenizer, prompts, is_list, monkeypatch):
    ids = torch.tensor([prompts[0]])
    own = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)[0, ids.shape[1] :]
    end = own[1].item()
    monkeypatch.setattr(model.generation_config, "eos_token_id", [7, end] if is_list else end)
    [cut] = score.generate(model, tokenizer, AG_NEWS, prompts[:1], batch_size=1)
    assert own[0] != end and cut == tokenizer.decode(own[:1])


def test_an_answer_ends_where_the_template_ends_a_turn():
    """Gemma's turns end with another token than its tokenizer's eos."""
    tokenizer = chats.tokenizer("Gemma 2")
    written = tokenizer('{"category":"World"}<end_of_turn>\nmore', add_special_tokens=False, return_tensors="pt")
    model = SimpleNamespace(
        device="cpu",
        generation_config=SimpleNamespace(eos_token_id=None),
        generate=lambda input_ids, **_: torch.cat([input_ids, written["input_ids"]], dim=1),
    )
    assert score.generate(model, tokenizer, AG_NEWS, [[5, 6, 7]], batch_size=1)[0].strip() == '{"category":"World"}'


@pytest.mark.parametrize("name", ["state space", "convolution"])
def test_answers_of_models_that_read_padding_do_not_depend_on_the_batch(tokenizer, prompts, name):
    model = families.tiny_family(name, tokenizer)
    alone = score.generate(model, tokenizer, AG_NEWS, prompts[:6], 1, may_pad=False)
    assert score.generate(model, tokenizer, AG_NEWS, prompts[:6], 6, may_pad=False) == alone
