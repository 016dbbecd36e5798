"""What fits into a memory: one planned run, or methods, models and batch sizes in a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from finetune import machine
from finetune.config.methods import METHODS
from finetune.config.plan import Experiment, Settings
from finetune.config.recipes import Recipe
from finetune.config.shapes import SHAPES, configuration
from finetune.model import load
from finetune.train.held import Held, Work, build
from finetune.train.memory import SHORT, TYPICAL, Estimate, estimate

# The methods of the table, with what makes full fine-tuning small.
THRIFTY = {"dtype": "bfloat16", "optim": "adamw_8bit"}
COLUMNS = {"full": {}, "full, thrifty": THRIFTY, "lora": {}, "qlora": {}}
# Articles of a micro-batch: the largest one that is tried, and the others.
LARGEST, OTHERS = 64, (8, 1)


def of_run(settings: Settings) -> Estimate:
    """The memory of a planned run on this machine, on rows of typical length, with activations kept unless the recipe
    says otherwise.

    Raises:
        UserError: The model's configuration cannot be read.
    """
    work = Work.of(settings, *_types(settings.recipe), settings.recipe.use_liger_kernel, machine.has_cuda())
    asked = settings.recipe.gradient_checkpointing
    work = replace(work, checkpointing="off" if asked == "auto" else asked)
    return estimate(shape(settings.experiment), work, TYPICAL, settings.experiment.per_device_eval_batch_size)


def shape(experiment: Experiment):
    """A model's configuration: of the list, or read without its weights."""
    known = SHAPES.get(experiment.model_name.rpartition("/")[2])
    if known is None:
        return load.configuration(experiment.model)
    return configuration(known)


def table(memory: float, cuda: bool) -> Iterator[tuple[str, list[str]]]:
    """Line by line, each model's largest micro-batch for each of COLUMNS in so many bytes."""
    for name, values in SHAPES.items():
        model = configuration(values)
        yield name, [_largest(model, column, memory, cuda) for column in COLUMNS]


def _largest(configuration, column: str, memory: float, cuda: bool) -> str:
    recipe = replace(METHODS[column.partition(",")[0]].recipe, gradient_accumulation_steps=1, **COLUMNS[column])
    if COLUMNS[column] and not cuda:
        return "-"
    recipe = replace(recipe, target_modules="all-linear", lora_alpha=2 * recipe.r)
    types = _types(recipe, cuda)
    work = Work(recipe, "off", *types, "liger" if cuda else "none", cuda)
    least = Held(build(configuration, recipe, types[0]), work).least * (1 + SHORT)
    if least > memory:
        return f"no: {least / 1e9:.0f} GB"
    for checkpointing, mark in (("off", ""), ("plain", " *")):
        more: tuple[int, float] | None = None
        for size in (LARGEST, *OTHERS):
            sized = replace(recipe, per_device_train_batch_size=size)
            work = replace(work, recipe=sized, checkpointing=checkpointing)
            needs = estimate(configuration, work, TYPICAL, size).total * (1 + SHORT)
            if needs <= memory:
                if more:
                    # Between two sizes the need is at most on the line between theirs.
                    size += int((memory - needs) / (more[1] - needs) * (more[0] - size))
                return f"{size}{mark}"
            more = size, needs
    return f"no: {needs / 1e9:.0f} GB"


def _types(recipe: Recipe, cuda: bool | None = None) -> tuple[str, str]:
    """The types of weights and products; a CPU may choose bfloat16 products, which need no more."""
    products = "bfloat16" if (machine.has_cuda() if cuda is None else cuda) else "float32"
    return products if recipe.dtype == "auto" else recipe.dtype, products
