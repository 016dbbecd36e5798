"""Profiles: one name for a machine's model, data and sizes. They hold values only; code never asks for a profile."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep import UserError
from finetune import machine
from finetune.files import short_digest


@dataclass(frozen=True)
class Profile:
    """Values for every run, and more for single methods and for the built-in sample."""

    purpose: str
    shared: Mapping[str, Any]
    by_method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sample: Mapping[str, Any] = field(default_factory=dict)

    def values_for(self, method: str, source: str | None = None) -> dict[str, Any]:
        """The values of a method, on rows of a source where that is known."""
        return {**self.shared, **self.by_method.get(method, {}), **(self.sample if source == "sample" else {})}


PROFILES = {
    "spark": Profile(
        "Qwen2.5-7B-Instruct on all of AG News, on a DGX Spark or another large CUDA GPU",
        shared={
            "model": "unsloth/Qwen2.5-7B-Instruct",
            "source": "hub",
            # The update of 8 x 4 articles in one pass: each pass reads all weights, and memory there is slow.
            "per_device_train_batch_size": 32,
            "gradient_accumulation_steps": 1,
        },
        # fp32 weights and gradients take 61 GB of the 7B model; 8-bit moments add 15 GB where fp32 ones add 61.
        by_method={"full": {"optim": "adamw_8bit"}},
    ),
    "gpu": Profile(
        "The embedded SmolLM2-135M on AG News, on any CUDA GPU",
        shared={
            "source": "hub",
            "article_loss": 0.5,
            "num_train_epochs": 3,
            "validation_rows": 1000,
            "per_device_train_batch_size": 64,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": "off",
            "cuda_graphs": True,
            # Scoring is bound by launches too: 512 articles are 40,000 tokens.
            "per_device_eval_batch_size": 512,
            # A run takes seconds; a checkpoint of all weights with their optimiser state takes one or two.
            "save_steps": 0.0,
            "target_modules": "all-linear",
        },
        # By few trainings, judged on validation rows (results/LOG.md): LoRA's is the highest that was tried, QLoRA's is
        # LoRA's.
        by_method={
            "full": {"learning_rate": 0.0001},
            "lora": {"learning_rate": 0.002},
            "qlora": {"learning_rate": 0.002},
            # LoRA's, not searched. A head has no loss on the article, and its padded rows are no graph's.
            "head": {"learning_rate": 0.002, "article_loss": 0.0, "cuda_graphs": False},
        },
    ),
    "cpu": Profile(
        "The embedded SmolLM2-135M on the built-in sample, on a laptop without a GPU",
        shared={
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": "off",
            "target_modules": "all-linear",
            # The base model's notebook scores the validation rows of the untrained model.
            "eval_on_start": False,
            # Once, at the end (1 would be each step): it takes as long as three steps.
            "eval_steps": 0.99,
            # A training takes two minutes; two checkpoints of all weights with their moments are 3.2 GB to write.
            "save_steps": 0.0,
            "generation_rows": 16,
            "few_shot_examples": 4,
            # It would read 352 rows, which takes as long as an evaluation and a half.
            "logistic_rows": 0,
            "per_device_eval_batch_size": 32,
        },
        by_method={
            "full": {"learning_rate": 0.0001},
            "lora": {"learning_rate": 0.002},
            "qlora": {"learning_rate": 0.002},
            "head": {"learning_rate": 0.002},
        },
        # Of 288: twenty steps are enough at these learning rates (results/LOG.md).
        sample={"train_rows": 160},
    ),
}

TASK = "ag_news"
MODEL = "embedded"


def place(profile: str, task: str, model: str) -> str:
    """The name of all folders of a profile's results: no two tasks or models share one.

    AG News with the profile's own model is in the profile's folder, `cpu`; others in `cpu+tickets`,
    `cpu+Qwen--Qwen2.5-0.5B-Instruct` and `cpu+tickets+my-model-3f2a91`.
    """
    parts = [profile, *([task] if task != TASK else [])]
    if model != PROFILES[profile].shared.get("model", MODEL):
        parts.append(_folder_name(model))
    return "+".join(parts)


def _folder_name(model: str) -> str:
    """A hub name, or a folder's last part with a digest of the rest."""
    path = Path(model).expanduser()
    if path.is_absolute() or path.is_dir():
        return f"{path.name}-{short_digest(str(path.resolve()))[:6]}"
    return re.sub(r"[^\w.-]", "--", model)


# Qwen2.5-7B with fp32 weights, gradients and 8-bit moments needs 76 GB before activations.
LARGE_GPU_BYTES = 90e9


def choose_profile(name: str) -> tuple[str, str]:
    """The profile to use, and why.

    Raises:
        UserError: No profile has this name.
    """
    reason = "asked for by name"
    if name == "auto" and "FINETUNE_PROFILE" in os.environ:
        name, reason = os.environ["FINETUNE_PROFILE"], "FINETUNE_PROFILE in the environment"
    if name == "auto":
        return _by_hardware()
    if name not in PROFILES:
        raise UserError(f"unknown profile '{name}'; the profiles are: auto, {', '.join(PROFILES)}")
    return name, reason


def _by_hardware() -> tuple[str, str]:
    if not machine.has_cuda():
        return "cpu", "chosen: no CUDA on this machine"
    gpu = machine.gpu_name()
    memory = machine.total_memory_bytes()
    size = "spark" if memory >= LARGE_GPU_BYTES else "gpu"
    return size, f"chosen: {gpu} with {memory / 1e9:.0f} GB"
