"""Whether a training fits into memory and onto the disk, before anything is loaded: where GPU and host share memory, a
training too large freezes them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import nn

from data_prep import Task, UserError
from finetune import machine
from finetune.config.methods import METHODS
from finetune.config.recipes import Recipe
from finetune.model import encode
from finetune.model.encode import Encoded
from finetune.train import simulate
from finetune.train.simulate import Batch, Work

# bitsandbytes' 4-bit weights: a byte for each block of 64, fp32 for each 256 of these (double quantisation), and two
# tables of 16 and 256 numbers.
BLOCK, BLOCKS = 64, 256
# 8-bit moments: fp32 for each block of 256; tensors under 4,096 numbers keep fp32 moments. torchao's 4-bit ones have
# blocks of 128.
MOMENT_BLOCKS, LEAST = {"adamw_8bit": 256, "adamw_torch_8bit": 256, "adamw_torch_4bit": 128}, 4096
# What CUDA holds for a process, with the kernels of a training: measured on an H100 (benchmarks/memory.py).
CONTEXT = 600_000_000
# cuBLAS' workspaces of two threads, forward and backward: 32 MiB each on Hopper, as PyTorch's notes on CUDA say.
WORKSPACES = 2 * 32 * 2**20
# The batches of an epoch are drawn anew so often to find the longest one.
SHUFFLES = 4
# Checkpoints that a training keeps; a further one is written before the oldest goes.
KEPT_CHECKPOINTS = 2
# The scheduler, random states, arguments and a tokenizer's files.
SMALL_FILES = 15_000_000
# By how much an estimate may be too low (docs/memory.md).
SHORT = 0.05
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
    """

    own: Sequence[int]
    shared: int
    answer: int
    scored: int

    @classmethod
    def of(cls, encoded: Sequence[Encoded], tokenizer, task: Task) -> Rows:
        """The lengths of a training's encoded rows."""
        shared = encode.shared_length([row.prompt for row in encoded])
        answers = [encode.answer_tokens(tokenizer, task.answer_for(label))[:-1] for label in task.labels]
        prefix = len(encode.common_prefix(answers))
        scored = 1 + sum(len(answer) - prefix - 1 for answer in answers)
        answer = max(len(row.answer) for row in encoded)
        return cls([len(row) - shared for row in encoded], shared, answer, scored + prefix)

    def training(self, recipe: Recipe) -> Batch:
        """The longest micro-batch that an epoch is likely to hold."""
        size = min(recipe.per_device_train_batch_size, len(self.own))
        if not recipe.packing:
            # Padded, with logits of all tokens.
            longest = max(self.own) + self.shared
            return Batch(size, longest, 0, longest)
        shared = self.shared if recipe.completion_only_loss and not recipe.lora_dropout else 0
        own = -(-max(self.batches(size)) // size) + self.shared - shared
        answers_alone = recipe.completion_only_loss and not recipe.article_loss
        return Batch(size, own, shared, self.answer if answers_alone else own)

    def scoring(self, size: int) -> Batch:
        """The longest batch of the validation rows, which are as long as those of the training."""
        size = min(size, len(self.own))
        return Batch(size, -(-max(self.batches(size)) // size) + self.scored, self.shared, self.scored)

    def batches(self, size: int) -> np.ndarray:
        """Own tokens of the batches of some shuffled epochs."""
        own, generator = np.asarray(self.own), np.random.default_rng(0)
        whole = len(own) // size * size
        return np.concatenate(
            [generator.permutation(own)[:whole].reshape(-1, size).sum(axis=1) for _ in range(SHUFFLES)]
        )


# Of AG News with its lean prompt and SmolLM2's or Qwen2.5's tokenizer, where no rows are at hand.
TYPICAL = Rows(own=[75], shared=22, answer=7, scored=9)


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
    model = simulate.build(configuration, recipe, work.dtype)
    held = _Held(model, work)
    passed = simulate.run(configuration, work, rows.training(recipe), rows.scoring(eval_batch))
    if program is None:
        program = CONTEXT if work.cuda else psutil.Process().memory_info().rss
    always = {
        "program": program + (WORKSPACES if work.cuda else 0),
        "weights": held.weights,
        "quantisation constants": held.constants,
        "adapter": held.adapter,
    }
    trains = always | {"optimiser": held.optimizer}
    # Gradients of the passes before stay until the update.
    accumulated = held.gradients if recipe.gradient_accumulation_steps > 1 else 0
    graphs = {"CUDA graphs": held.gradients * _recorded(recipe, rows) + passed.start} if recipe.cuda_graphs else {}
    moments = [
        (
            "training",
            trains
            | {"gradients": accumulated + passed.start_gradients, "logits": passed.logits}
            | {"activations": passed.start - passed.start_gradients - passed.logits}
            | graphs,
        ),
        (
            "training",
            trains
            | {"gradients": accumulated + passed.end_gradients, "activations": passed.end - passed.end_gradients}
            | graphs,
        ),
        # PyTorch's AdamW makes a copy of all second moments, unless it is fused.
        ("training", trains | {"gradients": held.step, "activations": held.step_copies} | graphs),
        ("validation", trains | {"a batch of validation rows": passed.scoring} | graphs),
        ("the check of the model", always | {"copies in fp32": held.check(rows)}),
    ]
    moment, parts = max(moments, key=lambda moment: sum(moment[1].values()))
    return Estimate(
        moment,
        {name: round(size) for name, size in parts.items() if size},
        program,
        checkpoint=held.trained + held.optimizer + SMALL_FILES,
        artefact=(held.trained if recipe.adapter else 2 * held.parameters) + SMALL_FILES,
    )


class _Held:
    """What a model's tensors and their optimiser hold, counted on the meta device."""

    def __init__(self, model: nn.Module, work: Work):
        self.model, self.work, recipe = model, work, work.recipe
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        base = [*model.parameters(), *model.buffers()]
        base = {id(tensor): tensor for tensor in base if not (recipe.adapter and tensor.requires_grad)}
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.trained = sum(parameter.nbytes for parameter in trained)
        self.adapter = sum(map(self._rounded, (p.nbytes for p in trained))) if recipe.adapter else 0
        self.gradients = sum(self._rounded(parameter.nbytes) for parameter in trained)
        self.constants = 0
        if recipe.load_in_4bit:
            for weight in self._quantized():
                del base[id(weight)]
                blocks = -(-weight.numel() // BLOCK)
                constants = (blocks, 4 * -(-blocks // BLOCKS), 16 * 4, 256 * 4, 4)
                self.constants += sum(map(self._rounded, constants))
        self.weights = sum(self._rounded(tensor.nbytes) for tensor in base.values())
        if recipe.load_in_4bit:
            self.weights += sum(self._rounded(weight.numel() // 2) for weight in self._quantized())
        if recipe.offload_embedding == "on":
            self.weights -= model.get_input_embeddings().weight.nbytes
        embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
        self.optimizer = sum(
            self._rounded(size) for p in trained for size in moment_bytes(p, recipe.optim, id(p) in embeddings)
        )
        self.step = 0 if recipe.update_in_backward else self.gradients
        self.step_copies = self.step if work.cuda and recipe.optim == "adamw_torch" else 0

    def check(self, rows: Rows) -> int:
        """What the check of a model's logits takes beside it: in fp32, what is outside of its blocks, the largest of
        these, and the logits of two sequences."""
        lists = [part for part in self.model.modules() if isinstance(part, nn.ModuleList)]
        blocks = max(lists, key=lambda part: sum(p.numel() for p in part.parameters()))
        inside = {id(parameter) for parameter in blocks.parameters()}
        halves = [p for p in self.model.parameters() if p.element_size() == 2]
        packed = {id(weight) for weight in self._quantized()} if self.work.recipe.load_in_4bit else set()
        outside = sum(4 * p.numel() for p in halves if id(p) not in inside)
        block = max(
            sum(4 * p.numel() for p in part.parameters() if p.element_size() == 2 and id(p) not in packed)
            for part in blocks
        )
        # The logits of the longest and of a short one, and a copy while they are made.
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        longest, shortest = (rows.shared + rows.answer + edge for edge in (max(rows.own), min(rows.own)))
        copies = 0 if self.work.kernels == "unsloth" else outside + block
        return copies + 4 * vocabulary * (longest + shortest)

    def _quantized(self) -> Iterator[torch.Tensor]:
        """The weights that `load_in_4bit` packs: of all linear layers but the output layer."""
        from transformers.pytorch_utils import Conv1D

        # GPT-2's Conv1D is a linear layer, its weight transposed.
        for name, part in self.model.named_modules():
            is_linear = isinstance(part, nn.Linear | Conv1D) and part is not self.model.get_output_embeddings()
            if is_linear and ".lora_" not in name:
                yield part.weight

    def _rounded(self, size: float) -> int:
        return -(-int(size) // simulate.ROUNDED) * simulate.ROUNDED if self.work.cuda else int(size)


def moment_bytes(parameter: torch.Tensor, optim: str, is_embedding: bool) -> list[float]:
    """Bytes of AdamW's two moments of a weight, and of their blocks' constants.

    transformers has bitsandbytes keep an embedding's in fp32; torchao keeps small or uneven tensors' in their type.
    """
    count, block = parameter.numel(), MOMENT_BLOCKS.get(optim)
    if block is None:
        return [parameter.nbytes] * 2
    if optim == "adamw_8bit" and (is_embedding or count < LEAST):
        return [4 * count] * 2
    if optim != "adamw_8bit" and (count < LEAST or count % block):
        return [parameter.nbytes] * 2
    return [count * (0.5 if optim == "adamw_torch_4bit" else 1), 4 * -(-count // block)] * 2


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
    text = f"{found}; {available / 1e9:.1f} GB are there{shared}"
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
