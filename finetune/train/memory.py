"""Whether a training fits into memory and onto the disk, before anything is loaded: where GPU and host share memory, a
training too large freezes them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil

from data_prep import Task, UserError
from finetune import machine
from finetune.config.methods import METHODS
from finetune.config.recipes import Recipe
from finetune.model import encode
from finetune.model.encode import Encoded
from finetune.train import simulate
from finetune.train.held import Held, Work, build
from finetune.train.simulate import Batch

# What CUDA holds for a process, with the kernels of a training: measured on an H100 (benchmarks/memory.py).
CONTEXT = 790_000_000
# cuBLAS' workspaces of two threads, forward and backward: 32 MiB each on Hopper, as PyTorch's notes on CUDA say.
WORKSPACES = 2 * 32 * 2**20
# A reserve on a CPU: the tiny model took so much more than was counted. We do not know for what.
LATER = 75_000_000
# The batches of an epoch are drawn anew so often to find the longest one.
SHUFFLES = 4
# Checkpoints that a training keeps; a further one is written before the oldest goes.
KEPT_CHECKPOINTS = 2
# The scheduler, random states, arguments and a tokenizer's files.
SMALL_FILES = 15_000_000
# By how much an estimate may be too low (docs/memory.md).
SHORT = 0.07
# Changes that a refusal names.
WAYS = 3


@dataclass(frozen=True)
class Rows:
    """Lengths of a training's rows, in tokens.

    Attributes:
        own: Of each, behind what all share.
        shared: Tokens that all begin with, which a packed row computes once.
        answer: Tokens of an answer.
        scored: Places that scoring takes to the vocabulary, an article.
        read: Tokens of the labels that it reads behind an article.
    """

    own: Sequence[int]
    shared: int
    answer: int
    scored: int
    read: int

    @classmethod
    def of(cls, encoded: Sequence[Encoded], tokenizer, task: Task) -> Rows:
        """The lengths of a training's encoded rows."""
        shared = encode.shared_length([row.prompt for row in encoded])
        answers = [encode.answer_tokens(tokenizer, task.answer_for(label))[:-1] for label in task.labels]
        prefix = len(encode.common_prefix(answers))
        branches = sum(len(answer) - prefix - 1 for answer in answers)
        answer = max(len(row.answer) for row in encoded)
        return cls([len(row) - shared for row in encoded], shared, answer, 1 + branches, prefix + branches)

    def training(self, recipe: Recipe) -> Batch:
        """The longest micro-batch that an epoch is likely to hold."""
        size = min(recipe.per_device_train_batch_size, len(self.own))
        if not recipe.packing:
            # Padded, with logits of all tokens; a head has those of a row's last one.
            longest = max(self.own) + self.shared
            return Batch(size, longest, 0, 1 if recipe.task_type == "SEQ_CLS" else longest)
        shared = self.shared if recipe.completion_only_loss and not recipe.lora_dropout else 0
        own = -(-max(self.batches(size)) // size) + self.shared - shared
        answers_alone = recipe.completion_only_loss and not recipe.article_loss
        return Batch(size, own, shared, self.answer if answers_alone else own)

    def scoring(self, size: int, recipe: Recipe) -> Batch:
        """The longest batch of the validation rows, which are as long as those of the training."""
        size = min(size, len(self.own))
        if recipe.task_type == "SEQ_CLS":
            return Batch(size, max(self.own) + self.shared, 0, 1)
        own = -(-max(self.batches(size)) // size) - self.answer + self.read
        return Batch(size, own, self.shared, self.scored)

    def batches(self, size: int) -> np.ndarray:
        """Own tokens of the batches of some shuffled epochs."""
        own, generator = np.asarray(self.own), np.random.default_rng(0)
        whole = len(own) // size * size
        return np.concatenate(
            [generator.permutation(own)[:whole].reshape(-1, size).sum(axis=1) for _ in range(SHUFFLES)]
        )


# Of AG News with its lean prompt and SmolLM2's or Qwen2.5's tokenizer, where no rows are at hand.
TYPICAL = Rows(own=[75] * 512, shared=22, answer=7, scored=7, read=11)


@dataclass(frozen=True)
class Estimate:
    """Bytes of memory at the fullest moment of a training, by part.

    Attributes:
        moment: `training`, `validation` or `the check of the model`.
        parts: Bytes by part; their sum is the estimate.
        program: Of these, what the process holds before the model is loaded.
        checkpoint: Bytes of a checkpoint.
        artefact: Bytes of the saved model or adapter.
    """

    moment: str
    parts: Mapping[str, int]
    program: int
    checkpoint: int
    artefact: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in self.parts.items() if size >= 5e7)
        return f"{self.total / 1e9:.1f} GB at the fullest moment, {self.moment}: {parts}"


def estimate(configuration, work: Work, rows: Rows, eval_batch: int, program: int | None = None) -> Estimate:
    """What a training will take, from its model on the meta device: no weights are loaded.

    Args:
        configuration: The model's, of transformers.
        work: What is trained, and how.
        rows: Their lengths.
        eval_batch: Articles of a scoring batch.
        program: Bytes of a process without a model; on a GPU the CUDA context, elsewhere this process now.

    Raises:
        Exception: As `simulate.run`.
    """
    recipe = work.recipe
    held = Held(build(configuration, recipe, work.dtype), work)
    passed = simulate.run(configuration, work, rows.training(recipe), rows.scoring(eval_batch, recipe))
    if program is None:
        program = CONTEXT if work.cuda else psutil.Process().memory_info().rss
    always = {
        "program": program + (WORKSPACES if work.cuda else LATER),
        "weights": held.weights,
        "quantisation constants": held.constants,
        "adapter": held.adapter,
    }
    trains = always | {"optimiser": held.optimizer, "buckets of gradients": held.gradients * work.buckets}
    accumulated = held.gradients if recipe.gradient_accumulation_steps > 1 else 0

    def within(size: float, gradients: float, logits: float = 0) -> dict[str, float]:
        kept = max(accumulated + gradients / work.parts, held.apart if work.cuda else 0)
        return trains | {"gradients": kept, "activations": size - gradients - logits, "logits": logits} | graphs

    longest, shortest = (rows.shared + edge for edge in (max(rows.own), min(rows.own)))
    graphs = {"CUDA graphs": held.gradients * _recorded(recipe, rows)} if recipe.cuda_graphs and work.cuda else {}
    moments = [
        ("training", within(passed.forward, 0)),
        ("training", within(passed.start, passed.start_gradients, passed.logits)),
        ("training", within(passed.end, passed.end_gradients)),
        ("training", trains | {"gradients": held.gradients, "copies of moments": held.step} | graphs),
        ("validation", trains | {"a batch of validation rows": passed.scoring} | graphs),
    ]
    if recipe.task_type == "CAUSAL_LM":
        moments.append(("the check of the model", always | {"copies in fp32": held.check(longest, shortest)}))
    moment, parts = max(moments, key=lambda moment: sum(moment[1].values()))
    return Estimate(
        moment,
        {name: round(size) for name, size in parts.items() if size},
        program,
        checkpoint=held.trained + held.optimizer + SMALL_FILES,
        artefact=(held.trained if recipe.adapter else 2 * held.parameters) + SMALL_FILES,
    )


def _recorded(recipe: Recipe, rows: Rows) -> int:
    """How many shapes of rows CUDA graphs record: each holds gradients of its own."""
    batches = rows.batches(min(recipe.per_device_train_batch_size, len(rows.own)))
    multiple = max(64, 2 ** round(np.log2(max(8, batches.mean()) / 8)))
    return len(np.unique(batches // multiple))


def changes(work: Work) -> Iterator[tuple[str, str, Work]]:
    """Ways to need less memory, the cheapest first: those that change no result, those that change the recipe, then
    other methods. Each with its kind and in words."""
    recipe = work.recipe
    thrifty = "unsloth" if work.kernels == "unsloth" else "plain"

    def changed(checkpointing: str = work.checkpointing, **values) -> Work:
        return replace(work, checkpointing=checkpointing, recipe=replace(recipe, **values))

    size, steps = recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps
    while size > 1 and not recipe.update_in_backward:
        size, steps = size // 2, 2 * steps
        smaller = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        yield "batch", _assigned(smaller), changed(**smaller)
    recomputing = {"gradient_checkpointing": thrifty} | ({"cuda_graphs": False} if recipe.cuda_graphs else {})
    if work.checkpointing == "off":
        yield "checkpointing", _assigned(recomputing), changed(thrifty, **recomputing)
    if not recipe.adapter and work.cuda:
        for least in ({"optim": "adamw_8bit"}, {"dtype": "bfloat16", "optim": "adamw_8bit"} | recomputing):
            dtype, mode = least.get("dtype", work.dtype), least.get("gradient_checkpointing", work.checkpointing)
            yield "recipe", _assigned(least), replace(changed(mode, **least), dtype=dtype)
    for run in ("lora", "qlora"):
        other = METHODS[run].recipe
        if (recipe.adapter, recipe.load_in_4bit) < (other.adapter, other.load_in_4bit):
            kept = {name: getattr(other, name) for name in ("adapter", "load_in_4bit", "dtype", "optim")}
            less = changed(thrifty, **recomputing, **kept, update_in_backward=False)
            yield run, f"{METHODS[run].title}, recomputing", replace(less, dtype=work.compute_dtype)


def _assigned(values: Mapping[str, object]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


@dataclass(frozen=True)
class Fit:
    """Whether a training fits.

    Attributes:
        work: What is run, with checkpointing decided.
        estimate: Its memory; None if the model's code cannot be simulated.
        available: Bytes that are there for it, this process included.
        checkpointing: Why activations are kept or recomputed.
        memory: What is needed and what is there, in words.
    """

    work: Work
    estimate: Estimate | None
    available: int
    checkpointing: str
    memory: str

    @property
    def parts(self) -> Mapping[str, int] | None:
        """Bytes by part; None if they are not known."""
        return self.estimate.parts if self.estimate else None


def fit(configuration, work: Work, rows: Rows, eval_batch: int, origin: str, force: bool = False) -> Fit:
    """Decide whether activations are kept, and refuse what cannot fit, before the model is loaded.

    Args:
        configuration: The model's, of transformers.
        work: What is asked for. A recipe that names a mode of checkpointing is followed.
        rows: The rows' lengths.
        eval_batch: Articles of a scoring batch.
        origin: What set `gradient_checkpointing`.
        force: Go on although it does not fit.

    Raises:
        UserError: It cannot fit; the cheapest changes that do are named.
    """
    thrifty = "unsloth" if work.kernels == "unsloth" else "plain"
    asked = work.recipe.gradient_checkpointing
    mode, reason = asked, f"set by {origin}"
    if asked == "unsloth" and thrifty == "plain":
        mode, reason = "plain", "Unsloth's needs the Unsloth engine"
    work = replace(work, checkpointing="off" if asked == "auto" else mode)
    try:
        found = estimate(configuration, work, rows, eval_batch)
    except Exception as error:
        # Layers that need numbers, or know no packed rows, raise anything.
        unknown = f"not estimated: {type(error).__name__} while the model's code was simulated"
        if asked == "auto":
            work, reason = replace(work, checkpointing=thrifty), "how much activations take is not known"
        return Fit(work, None, machine.available_memory_bytes(), reason, unknown)
    # What the process holds by now is no longer free.
    available = machine.available_memory_bytes() + found.program

    def fits(candidate: Estimate) -> bool:
        return candidate.total * (1 + SHORT) <= available

    if asked == "auto":
        reason = f"with all activations it takes {found.total / 1e9:.1f} GB, and {available / 1e9:.1f} GB are there"
        if not fits(found):
            work = replace(work, checkpointing=thrifty)
            found = estimate(configuration, work, rows, eval_batch)
    shared = ", shared by CPU and GPU" if machine.is_unified() else ""
    kept = f", beside {machine.memory_floor() / 1e9:.1f} GB that we keep free" if machine.memory_floor() else ""
    text = f"{found}; {available / 1e9:.1f} GB are there{shared}{kept}"
    if fits(found) or force:
        return Fit(work, found, available, reason, text)
    ways: dict[str, str] = {}
    for kind, change, other in changes(work):
        # Of smaller and smaller batches, the first that fits.
        if kind not in ways and len(ways) < WAYS:
            needs = estimate(configuration, other, rows, eval_batch)
            if fits(needs):
                ways[kind] = f"{change} ({needs.total / 1e9:.1f} GB)"
    cheapest = f"it fits with {' or '.join(ways.values())}" if ways else "no change that we know of makes it fit"
    raise UserError(
        f"this training needs {found.total / 1e9:.1f} GB, and {available / 1e9:.1f} GB are there{shared}: {cheapest}; "
        "end other programs and kernels, or go on all the same with --force, in a notebook "
        "resolve(settings, data, force=True)"
    )


def disk(estimate: Estimate, saves: bool, folder: Path, force: bool = False) -> str:
    """What checkpoints and artefact will take on the disk at the worst moment, and what is free, in words.

    Args:
        estimate: Of the training.
        saves: Whether checkpoints are written as it goes; otherwise one is, if it is interrupted.
        folder: Where; it need not be there yet.
        force: Go on although it does not fit.

    Raises:
        UserError: They cannot fit.
    """
    standing = KEPT_CHECKPOINTS if saves else 1
    # A checkpoint is written before the oldest goes; the artefact before all go.
    worst = max((standing + saves) * estimate.checkpoint, standing * estimate.checkpoint + estimate.artefact)
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    text = (
        f"{estimate.checkpoint / 1e9:.1f} GB a checkpoint, {estimate.artefact / 1e9:.1f} GB the "
        f"{'adapter' if 'adapter' in estimate.parts else 'model'}, {worst / 1e9:.1f} GB at the worst moment; "
        f"{free / 1e9:.1f} GB are free"
    )
    if worst > free and not force:
        once = estimate.checkpoint + estimate.artefact
        fewer = f"set save_steps=0 ({once / 1e9:.1f} GB), " if saves and once <= free else ""
        raise UserError(
            f"the disk of {folder} is too small for this training ({text}): {fewer}make room, set FINETUNE_HOME to a "
            "folder on another disk, or use --force"
        )
    return text
