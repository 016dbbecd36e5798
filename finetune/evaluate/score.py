"""Evaluation: exact label probabilities by scoring, and strictly checked answers by generation.

Scoring asks: given that the answer is one of the task's, which? Every label's probability is the product of its tokens'
probabilities after the forced prefix `{"category":"`, up to the closing brace, so labels of different lengths and
labels that begin alike are compared exactly. One forward pass does a batch: behind what all prompts begin with stand
the articles, and behind each article the labels, as a tree of segments that each see only what stands before them. What
labels share is computed once, and only the positions that predict a label's token reach the vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import groupby, takewhile

import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from data_prep import Task, UserError
from finetune import machine
from finetune.model import checks, load
from finetune.model.encode import answer_tokens, common_prefix, shared_length
from finetune.model.head import class_logits, padded
from finetune.model.packing import Backbone, Forest, Row
from finetune.model.padded import Padded

# AG News' longest valid answer has about ten tokens; other tasks' may have more.
MIN_ANSWER_TOKENS = 16
# Of the logits of a batch, in fp32. AG News on a GPU, 512 articles with 7 positions of 49,152 logits, takes 0.7 GB.
LOGIT_BYTES = 1e9


class LabelScorer:
    """Scores a task's labels behind prompts. See the module's docstring for how.

    Args:
        backbone: The model; `checks.choose_backbone` says which kind gives its own probabilities.
        tokenizer: Its tokenizer.
        task: Gives the labels and the answers' form.
        batch_size: Prompts per forward pass, at most; it does not change the result beyond rounding.
    """

    def __init__(self, backbone: Backbone | Padded, tokenizer, task: Task, batch_size: int):
        self.backbone = backbone
        self.batch_size = batch_size
        # The closing brace ends an answer; whether its turn ends is generation's matter.
        self.set_answers([answer_tokens(tokenizer, task.answer_for(label))[:-1] for label in task.labels])

    def set_answers(self, answers: Sequence[list[int]]) -> None:
        """The answers to tell apart: token ids, none the beginning of another."""
        self._prefix = common_prefix(answers)
        self._endings = [answer[len(self._prefix) :] for answer in answers]
        self._segments, self._places = label_tree(self._endings)
        # The article's last position, and all tokens of the tree.
        positions = 1 + sum(len(tokens) for _, tokens in self._segments)
        vocabulary = self.backbone.model.config.get_text_config().vocab_size
        fits = max(1, int(LOGIT_BYTES / 4 / vocabulary / positions))
        if fits < self.batch_size:
            print(
                f"batches: {fits} articles, and not {self.batch_size}: each asks for {vocabulary:,} logits at "
                f"{positions} positions"
            )
            self.batch_size = fits

    # Not inference_mode: a training goes on afterwards, with the buffers that FSDP2 made here.
    @torch.no_grad()
    def score(self, prompts: Sequence[list[int]], progress: str | None = None) -> np.ndarray:
        """Probabilities of the labels, shape (prompts, labels), each row adding up to 1.

        Args:
            prompts: Token ids, each ending where the answer begins.
            progress: Text of a progress bar; none is shown without it.

        Raises:
            UserError: One prompt does not fit into the memory.
        """
        shared = shared_length(prompts)
        scores, done = [], 0
        bar = tqdm(total=len(prompts), desc=progress, unit="article", disable=progress is None)
        with machine.MemoryWatch() as memory:
            while done < len(prompts):
                batch = prompts[done : done + self.batch_size]
                try:
                    scores.append(self._score_batch(batch, shared))
                    done += len(batch)
                    bar.update(len(batch))
                    short = memory.shortage()
                except torch.OutOfMemoryError:
                    short = "out of memory"
                if short and done < len(prompts):
                    # Several processes must run equally many batches of a model in parts.
                    if len(batch) == 1 or machine.strategy() == "FSDP2":
                        raise UserError(
                            f"{short}: one article does not fit beside the model; end other programs and kernels"
                        )
                    self.batch_size = (len(batch) + 1) // 2
                    now = f"from here on {self.batch_size}"
                    print(f"{short} with {len(batch)} articles in a batch; {now}", flush=True)
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
        bar.close()
        # Once, at the end: to wait for a batch would leave the GPU idle while the next one is laid out.
        return torch.cat(scores).double().softmax(dim=1).cpu().numpy()

    @torch.inference_mode()
    def states(self, prompts: Sequence[list[int]], progress: str | None = None) -> np.ndarray:
        """The last hidden state where a label would begin, as the output layer gets it, shape (prompts, width)."""
        shared, found = shared_length(prompts), []
        handle = self.backbone.head.register_forward_hook(lambda _, given, __: found.append(given[0][0].float().cpu()))
        try:
            for start in tqdm(range(0, len(prompts), self.batch_size), desc=progress, disable=progress is None):
                forest = Forest()
                root = forest.add(prompts[0][:shared]) if shared else None
                batch = prompts[start : start + self.batch_size]
                places = [forest.last(forest.add(prompt[shared:] + self._prefix, root)) for prompt in batch]
                row = forest.row().to(self.backbone.device)
                self.backbone(row, _on(places, row.input_ids))
        finally:
            handle.remove()
        return torch.cat(found).numpy()

    def _score_batch(self, prompts: Sequence[list[int]], shared: int) -> torch.Tensor:
        """Log-probabilities of the labels, shape (prompts, labels), of prompts with `shared` common tokens."""
        row, places, tokens = self._layout(prompts, shared)
        row = row.to(self.backbone.device)
        # A place that predicts tokens of several labels reaches the vocabulary once.
        unique, inverse = np.unique(places, return_inverse=True)
        # In bf16 the log-odds of two labels were multiples of 0.25, and 41 to 47 of 7,600 rows were near ties.
        logits = self.backbone(row, _on(unique, row.input_ids), in_fp32=True)
        scores = logits.float().log_softmax(dim=-1)[_on(inverse, logits), _on(tokens, logits)]
        lengths = _on([len(ending) for ending in self._endings] * len(prompts), logits)
        sums = torch.segment_reduce(scores, "sum", lengths=lengths)
        return sums.view(len(prompts), len(self._endings))

    def _layout(self, prompts: Sequence[list[int]], shared: int) -> tuple[Row, list[int], list[int]]:
        """The row, and for each prompt, label and token of its ending: where it is predicted, and which it is."""
        forest = Forest()
        root = forest.add(prompts[0][:shared]) if shared else None
        places: list[int] = []
        for prompt in prompts:
            stem = forest.add(prompt[shared:] + self._prefix, root)
            places += (forest.last(stem) + place for place in self._places)
            for parent, tokens in self._segments:
                forest.add(tokens, stem + parent)
        return forest.row(), places, [token for ending in self._endings for token in ending] * len(prompts)


class HeadScorer(LabelScorer):
    """Scores a task's labels by the classification head of a model that was loaded with them, in padded batches.

    Raises:
        UserError: The head is for other labels, or for the same in another order.
    """

    # It writes nothing.
    backbone = None

    def __init__(self, model, tokenizer, task: Task, batch_size: int):
        own = tuple(model.config.id2label.values())
        if own != task.labels:
            raise UserError(f"the head is for {', '.join(own)}, and the task has {', '.join(task.labels)}: train again")
        self._model, self._tokenizer, self.batch_size = model, tokenizer, batch_size

    def score(self, prompts: Sequence[list[int]], progress: str | None = None) -> np.ndarray:
        # Rows of similar length need little padding; the longest come first.
        order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        return super().score([prompts[row] for row in order], progress)[np.argsort(order)]

    def _score_batch(self, prompts: Sequence[list[int]], shared: int) -> torch.Tensor:
        return class_logits(self._model, padded(self._tokenizer, prompts).to(self._model.device))

    @torch.inference_mode()
    def padding_error(self, prompts: Sequence[list[int]]) -> float:
        """How far the logits of the shortest prompt are from its own, relatively, where a longer one is beside it."""
        shortest, longest = min(prompts, key=len), max(prompts, key=len)
        alone, together = self._score_batch([shortest], 0)[0], self._score_batch([longest, shortest], 0)[1]
        return ((together - alone).norm() / alone.norm()).item()


def choose_scorer(
    model, tokenizer, task: Task, sequences: Sequence[list[int]], batch_size: int
) -> tuple[LabelScorer, str]:
    """What scores with a language model, or with a classification head; and a sentence that says how it reads its rows,
    which are `sequences`.

    Raises:
        UserError: As `checks.choose_backbone`; or padding changes what a classification head reads.
    """
    if model.get_output_embeddings() is not None:
        backbone, reason = checks.choose_backbone(model, sequences)
        return LabelScorer(backbone, tokenizer, task, batch_size), reason
    scorer, was_training = HeadScorer(model, tokenizer, task, batch_size), model.training
    load.evaluating(model)
    error = scorer.padding_error(sequences)
    model.train(was_training)
    if not error < checks.LARGEST_BF16_ERROR:
        raise UserError(f"{model.config.name_or_path}: padding changes the head's logits by {error:.0%}; choose LoRA")
    return scorer, f"padded batches: the head reads each row's last token; padding changes its logits by {error:.2g}"


def label_tree(endings: Sequence[list[int]]) -> tuple[list[tuple[int, list[int]]], list[int]]:
    """The tokens to read behind an article so that each token of each ending is predicted, as a tree of segments.

    Args:
        endings: Token ids, none the beginning of another.

    Returns:
        Each segment's parent (0 is the article, 1 the first segment) and tokens. And for each ending and token of it,
        the place that predicts it: 0 is the article's last one, and the segments follow in their order.
    """
    segments: list[tuple[int, list[int]]] = []
    places: list[list[int]] = [[] for _ in endings]

    def grow(parent: int, last: int, members: Sequence[int], depth: int) -> None:
        parts: dict[int, list[int]] = {}
        for member in members:
            parts.setdefault(endings[member][depth], []).append(member)
        for part in parts.values():
            shared = common_prefix([endings[member][depth:] for member in part])
            # The last token of an ending is predicted, not read.
            tokens = shared if len(part) > 1 else shared[:-1]
            before = sum(len(tokens) for _, tokens in segments)
            for member in part:
                places[member] += [last, *range(before + 1, before + len(shared))]
            if tokens:
                segments.append((parent, tokens))
            if len(part) > 1:
                grow(len(segments), before + len(tokens), part, depth + len(tokens))

    grow(0, 0, range(len(endings)), 0)
    return segments, [place for of in places for place in of]


def _on(numbers: Sequence[int] | np.ndarray, tensor: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(np.asarray(numbers), device=tensor.device)


@torch.inference_mode()
def generate(
    model,
    tokenizer,
    task: Task,
    prompts: Sequence[list[int]],
    batch_size: int,
    progress: str | None = None,
    may_pad: bool = True,
) -> list[str]:
    """The model's own answers, decoded greedily, as text without special tokens.

    Args:
        model: The model. An answer ends at the template's end of a turn, or at any token that its generation_config or
            tokenizer names.
        tokenizer: Its tokenizer.
        task: Gives the labels and the answers' form.
        prompts: Token ids, each ending where the answer begins.
        batch_size: Prompts that are answered together.
        progress: Text of a progress bar; none is shown without it.
        may_pad: Whether prompts of different lengths may share a batch, behind padding. State-space and convolutional
            layers may read it.
    """
    ends = model.generation_config.eos_token_id
    valid = [answer_tokens(tokenizer, task.answer_for(label)) for label in task.labels]
    ends = {tokenizer.eos_token_id, valid[0][-1], *([ends] if isinstance(ends, int) else ends or [])}
    # An answer that goes on beyond the longest valid one is invalid anyway.
    longest = max(map(len, valid))
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    answers = [""] * len(prompts)
    bar = tqdm(total=len(prompts), desc=progress, unit="article", disable=progress is None)
    groups = [order] if may_pad else [list(same) for _, same in groupby(order, key=lambda row: len(prompts[row]))]
    batches = [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]
    for rows in batches:
        batch = tokenizer.pad(
            {"input_ids": [prompts[row] for row in rows]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        output = model.generate(
            **batch,
            max_new_tokens=max(MIN_ANSWER_TOKENS, longest),
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(ends),
        )
        for row, ids in zip(rows, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            # An end need not be a special token of the tokenizer, which decoding would leave out.
            answer = list(takewhile(lambda token: token not in ends, ids))
            answers[row] = tokenizer.decode(answer, skip_special_tokens=True)
        bar.update(len(rows))
    bar.close()
    return answers


def divided(function: Callable[[Sequence], Sequence], rows: Sequence, **named) -> list:
    """A function's results for rows, one each, which all processes share out; each gets all results, in order."""
    processes = machine.processes()
    own = -(-len(rows) // processes)
    due = rows[machine.rank() * own :][:own]
    # All run equally many batches, which a model in parts needs.
    found = list(function([*due, *rows[:1] * (own - len(due))], **named))
    return gather_object(found)[: len(rows)] if processes > 1 else found


def predicted_labels(probabilities: np.ndarray, labels: Sequence[str]) -> list[str]:
    """The most probable of the labels of each row of shape (rows, labels)."""
    return [labels[index] for index in probabilities.argmax(axis=1)]


def timed(function: Callable, *arguments, **named) -> tuple[object, float]:
    """A function's result, and the seconds it took."""
    start = time.perf_counter()
    result = function(*arguments, **named)
    return result, time.perf_counter() - start
