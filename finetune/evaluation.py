"""Evaluation: exact label probabilities by scoring, and strictly checked answers by generation.

Scoring asks: given that the answer is one of the four, which? Every label's probability is the product of its tokens'
probabilities after the forced prefix `{"category":"`, up to the closing brace, so labels of different lengths and
labels that share a first token are compared exactly. One forward pass does a batch: behind each article stand the
tokens of all labels as a tree, each seeing only the article and its own ancestors. What all prompts begin with is
computed once, and only the positions that predict a label's token reach the vocabulary.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from data_prep import LABELS, parse_answer
from finetune.chat import answer_tokens

# The longest valid answer has about ten tokens; an answer that goes on beyond this is invalid anyway.
MAX_ANSWER_TOKENS = 16


@dataclass(frozen=True)
class LabelTree:
    """The tokens of all labels' answers behind their common prefix, as a tree.

    Attributes:
        prefix: Token ids that all answers begin with.
        tokens: Token id of every inner node, parents before children.
        parents: Index of each inner node's parent, -1 for the prefix's end.
        depths: Distance of each inner node from the prefix's end, from 1.
        paths: Per label, the (position, token) pairs whose log-probabilities add up to the label's; position 0 is
            the prefix's end, position i + 1 is inner node i.
    """

    prefix: list[int]
    tokens: list[int]
    parents: list[int]
    depths: list[int]
    paths: list[list[tuple[int, int]]]

    @classmethod
    def of(cls, answers: Sequence[list[int]]) -> LabelTree:
        """Build the tree of answers that end differently; leaves are predicted, not read, so they are no nodes."""
        shared = common_prefix(answers)
        tokens: list[int] = []
        parents: list[int] = []
        depths: list[int] = []
        index: dict[tuple[int, ...], int] = {(): -1}
        paths = []
        for answer in answers:
            rest = tuple(answer[len(shared) :])
            for length in range(1, len(rest)):
                if rest[:length] not in index:
                    index[rest[:length]] = len(tokens)
                    tokens.append(rest[length - 1])
                    parents.append(index[rest[: length - 1]])
                    depths.append(length)
            paths.append([(index[rest[:i]] + 1, token) for i, token in enumerate(rest)])
        return cls(list(shared), tokens, parents, depths, paths)

    def visible(self) -> torch.Tensor:
        """Which inner node sees which: itself and its ancestors. Boolean, shape (nodes, nodes)."""
        seen = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen


def common_prefix(sequences: Sequence[list[int]]) -> list[int]:
    """The tokens that all sequences begin with."""
    shared = []
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return shared


class LabelScorer:
    """Scores the four labels behind prompts. See the module's docstring for how.

    Args:
        model: A causal language model of transformers, or one wrapped by peft.
        tokenizer: Its tokenizer.
        batch_size: Prompts per forward pass; it does not change the result beyond rounding.
    """

    def __init__(self, model, tokenizer, batch_size: int):
        self.model = model
        self.pad = tokenizer.pad_token_id
        self.batch_size = batch_size
        # The closing brace ends an answer; whether eos follows is generation's matter.
        self.tree = LabelTree.of([answer_tokens(tokenizer, label)[:-1] for label in LABELS])

    @torch.inference_mode()
    def score(self, prompts: Sequence[list[int]], progress: str | None = None) -> np.ndarray:
        """Probabilities of the labels, shape (prompts, labels), each row adding up to 1.

        Args:
            prompts: Token ids, each ending where the answer begins.
            progress: Text of a progress bar; none is shown without it.
        """
        shared = common_prefix(prompts)[: min(map(len, prompts)) - 1]
        cache = self._read_shared(shared)
        rests = [prompt[len(shared) :] for prompt in prompts]
        # By length, so that a batch holds little padding.
        order = sorted(range(len(rests)), key=lambda row: len(rests[row]))
        scores = np.empty((len(rests), len(LABELS)))
        bar = tqdm(total=len(rests), desc=progress, unit="article", disable=progress is None)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            scores[batch] = self._score_batch([rests[row] for row in batch], len(shared), copy.deepcopy(cache))
            bar.update(len(batch))
        bar.close()
        return scores

    def _read_shared(self, shared: list[int]):
        """Keys and values of what all prompts begin with."""
        from transformers import DynamicCache

        cache = DynamicCache()
        if shared:
            ids = torch.tensor([shared], device=self.model.device)
            self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def _score_batch(self, rests: list[list[int]], shared: int, cache) -> np.ndarray:
        """Probabilities of one batch; `rests` are the prompts behind their `shared` first tokens."""
        if shared:
            cache.batch_repeat_interleave(len(rests))
        ids, positions, mask = self._layout(rests, shared)
        logits = self.model(
            input_ids=ids.to(self.model.device),
            position_ids=positions.to(self.model.device),
            attention_mask=_additive(mask, self.model.dtype).to(self.model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=len(self.tree.tokens) + 1,
        ).logits
        log_probabilities = logits.float().log_softmax(dim=-1)
        scores = [sum(log_probabilities[:, position, token] for position, token in path) for path in self.tree.paths]
        return torch.stack(scores, dim=1).double().softmax(dim=1).cpu().numpy()

    def _layout(self, rests: list[list[int]], shared: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids (rows, columns), positions (rows, columns) and who sees whom (rows, columns, shared + columns).

        A row is padding, the rest of the prompt, the answers' prefix, then the tree: padded on the left, so that the
        positions that predict are the same columns in every row.
        """
        nodes = len(self.tree.tokens)
        texts = [rest + self.tree.prefix for rest in rests]
        width = max(map(len, texts))
        ids = torch.full((len(texts), width + nodes), self.pad)
        positions = torch.zeros_like(ids)
        mask = torch.zeros(len(texts), width + nodes, shared + width + nodes, dtype=torch.bool)
        mask[:, :, :shared] = True
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        tree, depths = self.tree.visible(), torch.tensor(self.tree.depths, dtype=torch.long)
        for row, text in enumerate(texts):
            first = width - len(text)
            ids[row, first:] = torch.tensor(text + self.tree.tokens)
            positions[row, first:width] = torch.arange(shared, shared + len(text))
            positions[row, width:] = shared + len(text) - 1 + depths
            mask[row, first:width, shared + first : shared + width] = causal[first:, first:]
            mask[row, width:, shared + first : shared + width] = True
            mask[row, width:, shared + width :] = tree
        # A padding token must see something, or its softmax is not a number: itself.
        diagonal = torch.arange(width)
        mask[:, diagonal, shared + diagonal] = True
        return ids, positions, mask


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask as transformers' eager and sdpa attention take it: added to the logits, shape (rows, 1, q, k)."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min).unsqueeze(1)


@torch.inference_mode()
def generate(model, tokenizer, prompts: Sequence[list[int]], batch_size: int, progress: str | None = None) -> list[str]:
    """The model's own answers, decoded greedily, as text without special tokens."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    answers = [""] * len(prompts)
    bar = tqdm(total=len(prompts), desc=progress, unit="article", disable=progress is None)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer.pad(
            {"input_ids": [prompts[row] for row in rows]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        output = model.generate(
            **batch,
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            answers[row] = text
        bar.update(len(rows))
    bar.close()
    return answers


def predicted_labels(probabilities: np.ndarray) -> list[str]:
    """The most probable label of each row of shape (rows, labels)."""
    return [LABELS[index] for index in probabilities.argmax(axis=1)]


def parsed_labels(answers: Sequence[str]) -> list[str | None]:
    """The label of each generated answer; None where it is not the JSON that was asked for."""
    return [parse_answer(answer) for answer in answers]


def timed(function: Callable, *arguments, **named) -> tuple[object, float]:
    """A function's result, and the seconds it took."""
    start = time.perf_counter()
    result = function(*arguments, **named)
    return result, time.perf_counter() - start
