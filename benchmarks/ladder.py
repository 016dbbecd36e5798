"""What the benchmark of speed measures: the rungs of the ladder, the peers, ways to save memory, scoring, start-up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.config.shapes import SHAPES

# Sizes of Qwen2.5-7B (config.json of Qwen/Qwen2.5-7B-Instruct), in transformers' names.
QWEN_7B = {name: value for name, value in SHAPES["Qwen2.5-7B-Instruct"].items() if name != "model_type"}

SEED_BATCH = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
LARGE_BATCH = {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 1}
LARGER_BATCH = {"per_device_train_batch_size": 128, "gradient_accumulation_steps": 1}
ALL_LINEAR = {"target_modules": "all-linear"}


@dataclass(frozen=True)
class Rung:
    """One measurement.

    Attributes:
        key: What tables know it by.
        name: What it adds to the rung before it.
        overrides: Parameters of the suite.
        run: The suite's run.
        trainer: `suite`, or `trl`: SFTTrainer as its users set it up.
        engine: `unsloth` or `transformers`.
        options: SFTConfig's, for `trl`.
        share: Whether rows share the tokens that all begin with.
    """

    key: str
    name: str
    overrides: dict[str, Any]
    run: str = "lora"
    trainer: str = "suite"
    engine: str = "unsloth"
    options: dict[str, Any] = field(default_factory=dict)
    share: bool = True


FIRST = (
    SEED_BATCH | ALL_LINEAR | {"prompt": "verbose", "completion_only_loss": False, "gradient_checkpointing": "plain"}
)
FIRST |= {"cuda_graphs": False, "use_liger_kernel": False, "offload_embedding": "off", "article_loss": 0.0}
PLAIN = {"trainer": "trl", "engine": "transformers"}
PACK = {"packing": True, "max_length": 512}
UNSLOTH = FIRST | {"gradient_checkpointing": "unsloth"}
KEPT = UNSLOTH | {"gradient_checkpointing": "off"}
LEAN = KEPT | {"completion_only_loss": True, "prompt": "lean"}
BEST = LEAN | LARGE_BATCH
RECOMPUTING = {"gradient_checkpointing": "plain"}
PEER = BEST | RECOMPUTING
THRIFTY = PEER | {"offload_embedding": "on"}
THRIFTY_UNSLOTH = THRIFTY | {"gradient_checkpointing": "unsloth"}
GRAPHS = {"cuda_graphs": True, "offload_embedding": "on"}
GRAPHS_16 = BEST | GRAPHS | {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4}
GRAPHS_8 = BEST | GRAPHS | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 8}
FULL = BEST | {"dtype": "bfloat16", "optim": "adamw_8bit", "gradient_accumulation_steps": 2}
FULL_LIGER = FULL | {"use_liger_kernel": True}
IN_BACKWARD = FULL_LIGER | {"gradient_accumulation_steps": 1, "update_in_backward": True}
FOUR_BIT = RECOMPUTING | {"optim": "adamw_torch_4bit", "optim_args": "bf16_stochastic_round=True"}

SAME = "{}, 128 articles at once, the same"
ON_PLAIN = {"run": "full", "engine": "transformers"}
PARTS: dict[str, tuple[Rung, ...]] = {
    "plain": (
        Rung("trl_seed", "TRL + PEFT: 8 x 4 articles, long prompt, loss on all tokens, checkpointing", FIRST, **PLAIN),
        Rung("trl_cudnn", "+ cudnn.benchmark", FIRST | {"cudnn_benchmark": True}, **PLAIN),
        Rung("trl_packed", "+ TRL's packing, rows of 512", FIRST, options=PACK, **PLAIN),
        Rung("peer_checkpointing", "peer: TRL + PEFT, tuned, checkpointing", PEER, **PLAIN),
        Rung("peer", "peer: TRL + PEFT, tuned, no checkpointing", BEST, **PLAIN),
        Rung("peer_liger", "peer: the same with Liger's kernels", BEST | {"use_liger_kernel": True}, **PLAIN),
    ),
    "lora": (
        Rung("unsloth_seed", "+ Unsloth's kernels and checkpointing", UNSLOTH, trainer="trl", options=PACK),
        Rung("flash", "+ flash attention over whole articles", UNSLOTH, share=False),
        Rung("kept", "+ no checkpointing", KEPT, share=False),
        Rung("answer", "+ loss on the answer alone", KEPT | {"completion_only_loss": True}, share=False),
        Rung("lean", "+ lean prompt", LEAN, share=False),
        Rung("shared", "+ common beginning computed once", LEAN),
        Rung("batch", "+ 64 articles at once", BEST),
        Rung("batch_128", "+ 128 articles at once", BEST | LARGER_BATCH),
    ),
    "lora_memory": (
        Rung("lora_graphs_16x4", "LoRA, 16 x 4 articles, CUDA graphs, embeddings on the host", GRAPHS_16),
        Rung("lora_graphs_8x8", "LoRA, 8 x 8 articles, the same", GRAPHS_8),
        Rung("lora_checkpointing", "LoRA, checkpointing, embeddings on the host", THRIFTY),
        Rung("lora_checkpointing_128", SAME.format("LoRA"), THRIFTY | LARGER_BATCH),
        Rung("lora_unsloth_checkpointing", "LoRA, Unsloth's checkpointing, embeddings on the host", THRIFTY_UNSLOTH),
        Rung("lora_unsloth_checkpointing_128", SAME.format("LoRA"), THRIFTY_UNSLOTH | LARGER_BATCH),
    ),
    "qlora": (
        Rung("qlora", "QLoRA, 64 articles at once", BEST, "qlora"),
        Rung("qlora_128", "QLoRA, 128 articles at once", BEST | LARGER_BATCH, "qlora"),
        Rung("qlora_graphs_16x4", "QLoRA, 16 x 4 articles, CUDA graphs, embeddings on the host", GRAPHS_16, "qlora"),
        Rung("qlora_graphs_8x8", "QLoRA, 8 x 8 articles, the same", GRAPHS_8, "qlora"),
        Rung("qlora_checkpointing", "QLoRA, checkpointing, embeddings on the host", THRIFTY, "qlora"),
        Rung("qlora_checkpointing_128", SAME.format("QLoRA"), THRIFTY | LARGER_BATCH, "qlora"),
        Rung(
            "qlora_unsloth_checkpointing_96",
            "QLoRA, 96 articles at once, Unsloth's checkpointing, embeddings on the host",
            THRIFTY_UNSLOTH | {"per_device_train_batch_size": 96},
            "qlora",
        ),
        Rung("qlora_unsloth_checkpointing_128", SAME.format("QLoRA"), THRIFTY_UNSLOTH | LARGER_BATCH, "qlora"),
    ),
    "full": (
        Rung("full_plain", "full, bf16 weights, 8-bit AdamW, 64 x 2 articles", FULL, **ON_PLAIN),
        Rung("full", "full, + Liger's kernels", FULL_LIGER, **ON_PLAIN),
        Rung("full_64x4", "full, 64 x 4 articles", FULL_LIGER | {"gradient_accumulation_steps": 4}, **ON_PLAIN),
        Rung("full_checkpointing", "full, + checkpointing", FULL_LIGER | RECOMPUTING, **ON_PLAIN),
        Rung(
            "full_in_backward",
            "full, 64 x 1 articles, each weight updated in the backward pass",
            IN_BACKWARD,
            **ON_PLAIN,
        ),
        Rung(
            "full_in_backward_checkpointing",
            "full, 256 x 1 articles, the same, + checkpointing",
            IN_BACKWARD | RECOMPUTING | {"per_device_train_batch_size": 256},
            **ON_PLAIN,
        ),
        Rung(
            "full_4bit_checkpointing",
            "full, + 4-bit AdamW with stochastic rounding",
            FULL_LIGER | FOUR_BIT,
            **ON_PLAIN,
        ),
    ),
    "full_unsloth": (Rung("full_unsloth", "full, bf16 weights, 8-bit AdamW, Unsloth", FULL, "full_unsloth"),),
}
# Prompt, articles at once and kernels of what is scored.
SCORED = (("lean", 128, "plain"), ("lean", 128, "fused"), ("lean", 512, "fused"), ("verbose", 128, "fused"))
GENERATED = ("generation_lean_128", "generation_verbose_128")
# Parts that are one measurement, each on an engine.
STARTS = {"start": "unsloth", "start_transformers": "transformers"}
ALL_PARTS = (*PARTS, "evaluation", *STARTS)


def keys_of(part: str) -> list[str]:
    """What a part measures."""
    if part in PARTS:
        return [rung.key for rung in PARTS[part]]
    return [part] if part in STARTS else [*(scoring_key(*one) for one in SCORED), *GENERATED]


def rungs() -> list[str]:
    """The keys of the ladder: each rung adds one thing to the one before it."""
    return [key for key in keys_of("plain") if key not in peers()] + keys_of("lora")


def peers() -> list[str]:
    """The keys of TRL + PEFT as a careful user would set it up."""
    return [key for key in keys_of("plain") if key.startswith("peer")]


def settings_of_methods() -> dict[str, list[str]]:
    """The keys of every way that a method was measured in with a batch that fills the GPU."""
    return {
        "LoRA": ["batch", "batch_128", *keys_of("lora_memory")],
        "QLoRA": keys_of("qlora"),
        "full": [*keys_of("full"), *keys_of("full_unsloth")],
    }


def scoring_key(prompt: str, batch: int, kernels: str) -> str:
    return f"scoring_{prompt}_{batch}" + "_plain" * (kernels == "plain")


def processes(only: Sequence[str], rungs: Sequence[str], measured: set[str]) -> Iterator[tuple[str, list[str]]]:
    """Parts, each with the keys of the rungs that are not measured yet, for one process each. Rungs on transformers
    have each its own, so that none finds the memory of another; those on Unsloth share the half minute of its import.

    Args:
        only: Parts to measure; empty for all.
        rungs: Keys to measure; empty for all.
        measured: Keys that need no measurement.
    """
    for part in only or ALL_PARTS:
        keys = [
            key for key in keys_of(part) if key not in measured and (not rungs or key in rungs or part not in PARTS)
        ]
        if part in PARTS and PARTS[part][0].engine == "transformers":
            yield from ((part, [key]) for key in keys)
        elif keys:
            # The others measure all of theirs together.
            yield part, keys if part in PARTS else []
