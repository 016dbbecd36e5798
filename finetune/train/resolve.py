"""What a machine decides for a training, before the model is loaded: each choice with its reason."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch

from finetune import machine
from finetune.config.plan import Settings, left_aligned
from finetune.config.recipes import Recipe
from finetune.data import PreparedData
from finetune.model import checks, encode, load
from finetune.model.template import Template
from finetune.train import memory
from finetune.train.held import Work
from finetune.train.memory import Fit
from finetune.train.processes import share

# Set by `run --force`, for the notebooks' processes.
FORCE = "FINETUNE_FORCE"


@dataclass(frozen=True)
class Resolved:
    """What the plan leaves to the machine.

    Attributes:
        dtype: The type that weights are held in.
        compute_dtype: The type of matrix products.
        gradient_checkpointing: `unsloth`, `plain` or `off`.
        cuda_graphs: Whether steps are recorded and replayed.
        memory: Whether the training fits.
        reasons: Every choice in words.
        loading: What `load_model` takes besides the method's own arguments.
    """

    dtype: str
    compute_dtype: str
    gradient_checkpointing: str
    cuda_graphs: bool
    memory: Fit
    reasons: dict[str, str]
    loading: dict[str, Any]

    def table(self) -> pd.DataFrame:
        return pd.DataFrame({"choice and reason": self.reasons})

    def _repr_html_(self) -> str:
        return left_aligned(self.table()).to_html()


def resolve(settings: Settings, data: PreparedData, force: bool = False) -> Resolved:
    """Decide what the plan leaves open, and print it.

    Args:
        settings: The plan.
        data: What is trained on.
        force: Go on although memory or disk are too small; `run --force` says so too.

    Raises:
        UserError: The model cannot be found, does not suit method, task or rows; a row does not fit into `max_length`;
            or memory or disk are too small.
    """
    force = force or FORCE in os.environ
    recipe, engine = settings.recipe, settings.engine
    torch.backends.cudnn.benchmark = recipe.cudnn_benchmark
    precision = load.choose_precision(settings.experiment, recipe.dtype)
    # Memory is that of each process's share of an update.
    own = share(recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps, machine.processes())
    sizes = dict(zip(("per_device_train_batch_size", "gradient_accumulation_steps"), own, strict=True))
    settings = replace(settings, recipe=replace(recipe, **sizes))
    tokenizer = load.load_tokenizer(settings.experiment.model)
    configuration = load.configuration(settings.experiment.model)
    # A classification head has so many outputs.
    configuration.num_labels = len(data.task.labels)
    encoded = encode.encode(tokenizer, data.train, recipe.max_length)
    checks.check_model(configuration, tokenizer, data.task, [row.prompt + row.answer for row in encoded], recipe)
    dtype = precision.name if recipe.dtype == "auto" else recipe.dtype
    liger = recipe.use_liger_kernel and engine == "transformers" and machine.has_cuda()
    work = Work.of(settings, dtype, precision.name, liger, machine.has_cuda())
    rows = memory.Rows.of(encoded, tokenizer, data.task)
    eval_batch, origin = settings.experiment.per_device_eval_batch_size, settings.origins["gradient_checkpointing"]
    fit = memory.fit(configuration, work, rows, eval_batch, origin, force)
    checkpointing = fit.work.checkpointing
    # Checkpointing asks for random states as it goes, which no graph can record.
    graphs = recipe.cuda_graphs and machine.has_cuda() and checkpointing == "off" and machine.processes() == 1
    attention = load.packed_attention(precision.dtype) if recipe.packing else ("sdpa", "packing is off: padded batches")
    reasons = {
        "prompt": Template(tokenizer).note,
        "device": machine.gpu_name() or f"CPU, {machine.usable_cores()} threads",
        "engine": f"{engine}: {settings.engine_reason}",
        "attention": ": ".join(attention),
        "packing": _packing(recipe),
        "memory": fit.memory,
        "gradient checkpointing": f"{checkpointing}: {fit.checkpointing}",
        "precision": f"{'4-bit NormalFloat base' if recipe.load_in_4bit else f'{dtype} weights'}, {precision}",
        "kernels": _kernels(recipe, engine, liger),
        "CUDA graphs": _graphs(recipe, graphs),
    }
    if machine.processes() > 1:
        each = f"an update is {own[1]} passes of {own[0]} articles on each"
        reasons["processes"] = f"{machine.processes()} with {machine.strategy()}: {each}"
    if fit.estimate:
        saves = recipe.save_steps > 0 or recipe.load_best_model_at_end
        reasons["disk"] = memory.disk(fit.estimate, saves, settings.state_folder, force)
    for name, reason in reasons.items():
        print(f"{name}: {reason}")
    loading: dict[str, Any] = {"engine": engine, "compute_dtype": precision.name, "use_liger_kernel": liger}
    if engine == "unsloth":
        loading |= {
            "max_length": recipe.max_length,
            "full_finetuning": not recipe.adapter,
            "gradient_checkpointing": checkpointing,
            "offload_embedding": _offloads_embedding(recipe, checkpointing),
        }
    return Resolved(dtype, precision.name, checkpointing, graphs, fit, reasons, loading)


def housekeeping(settings: Settings) -> dict[str, Any]:
    """What an `SFTConfig` needs besides the method: folders, logs and how often a checkpoint is written."""
    # transformers 5 takes the folder of TensorBoard's logs from the environment alone.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(settings.run_folder / "tensorboard")
    recipe = settings.recipe
    # The best weights are those of a checkpoint.
    saves = recipe.eval_steps if recipe.load_best_model_at_end else recipe.save_steps
    return {
        "output_dir": str(settings.state_folder),
        "logging_steps": 0.02,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if saves else "no",
        "save_steps": saves or 500,
        "save_total_limit": 2,
        "use_cpu": not machine.has_cuda(),
        "dataloader_pin_memory": machine.has_cuda(),
    }


def _offloads_embedding(recipe: Recipe, checkpointing: str) -> bool:
    if recipe.offload_embedding == "auto":
        # Where memory is short enough for checkpointing.
        return checkpointing != "off" and recipe.adapter and not machine.is_unified()
    return recipe.offload_embedding == "on"


def _packing(recipe: Recipe) -> str:
    if recipe.packing:
        return "on: a batch is one row, and what prompts share is computed once"
    return "off: a classification head reads padded batches" if recipe.task_type == "SEQ_CLS" else "off"


def _kernels(recipe: Recipe, engine: str, liger: bool) -> str:
    if engine == "unsloth":
        return "Unsloth's"
    if liger:
        return "Liger's for norms, rotary embeddings and the MLP's activation, where it knows the model"
    return "PyTorch's: fused ones need CUDA" if recipe.use_liger_kernel else "PyTorch's: use_liger_kernel=False"


def _graphs(recipe: Recipe, graphs: bool) -> str:
    if graphs:
        return "on: a step is recorded once per shape of its batch, then replayed"
    if not recipe.cuda_graphs:
        return "off: cuda_graphs=False"
    return "off: they need CUDA, one process, and no gradient checkpointing"
