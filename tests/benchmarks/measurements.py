"""A file of measurements as the benchmark would have left it. The figures are invented, and round."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import factories

from benchmarks.records import SpeedRecord, read

PEAK = 800.0
# Of the 7B shape, without and with an adapter on all linear layers.
BASE, ADAPTED = 7_615_616_512, 7_655_986_688
# Tokens that lean and verbose prompts begin with, and an article's own.
LEAN, VERBOSE, OWN = 40, 200, 60

SEED = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "target_modules": "all-linear",
    "prompt": "verbose",
    "completion_only_loss": False,
    "gradient_checkpointing": "plain",
    "cuda_graphs": False,
}
ANSWER = SEED | {"gradient_checkpointing": "off", "completion_only_loss": True}
SMALL = ANSWER | {"prompt": "lean"}
LARGE = SMALL | {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 1}
GRAPHS = LARGE | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 8, "cuda_graphs": True}
RECOMPUTED = LARGE | {"gradient_checkpointing": "unsloth"}
FULL = LARGE | {"dtype": "bfloat16", "optim": "adamw_8bit"}


def training(key: str, speed: float, computed: float, overrides: dict[str, Any], gib: float, run: str = "lora") -> dict:
    """A training's row: articles a second, computed tokens an article, peak memory."""
    parameters = BASE if run == "full" else ADAPTED
    tflops = (6 if run == "full" else 4) * parameters * computed * speed / 1e12
    return {
        "part": "plain" if key.startswith(("trl", "peer")) else run,
        "key": key,
        "name": f"the {key} rung",
        "run": run,
        "overrides": overrides,
        "parameters": parameters,
        "articles_per_second": speed,
        "tokens_per_second": 100 * speed,
        "computed_per_second": computed * speed,
        "tflops": tflops,
        "matrix_peak_tflops": PEAK,
        "share_of_peak": tflops / PEAK,
        "peak_gib": gib,
        "seconds_to_first_step": 3.0,
    }


def failed(key: str, outcome: str = "OutOfMemoryError: CUDA out of memory | tried") -> dict:
    return {"part": "plain", "key": key, "name": f"the {key} rung", "outcome": outcome}


def rows() -> list[dict]:
    """Every rung of the ladder and some of the rest."""
    at_once = {count: OWN + LEAN / count for count in (8, 64)}
    scored = {"computed_per_second": 500 * 70.0, "parameters": BASE, "matrix_peak_tflops": PEAK, "peak_gib": 16.0}
    return [
        training("trl_seed", 10.0, 280, SEED, 22),
        training("trl_cudnn", 10.1, 280, SEED, 22),
        training("trl_packed", 13.5, 270, SEED, 23),
        training("peer", 50.0, 100, LARGE, 60),
        failed("peer_liger"),
        training("unsloth_seed", 20.0, 270, SEED, 24),
        training("flash", 30.0, 260, SEED, 18),
        training("kept", 50.0, 260, ANSWER | {"completion_only_loss": False}, 26),
        training("answer", 50.0, OWN + VERBOSE, ANSWER, 22),
        training("lean", 60.0, OWN + LEAN, SMALL, 20),
        training("shared", 60.0, at_once[8], SMALL, 19),
        training("batch", 240.0, at_once[64], LARGE, 30),
        training("lora_graphs_8x8", 180.0, at_once[8], GRAPHS, 18),
        training("lora_checkpointing", 170.0, at_once[64], LARGE | {"gradient_checkpointing": "plain"}, 17),
        training("lora_unsloth_checkpointing", 160.0, at_once[64], RECOMPUTED, 16),
        training("qlora", 230.0, at_once[64], LARGE, 20, "qlora"),
        training("full", 150.0, at_once[64], FULL, 70, "full"),
        {"part": "evaluation", "key": "scoring_lean_128", "name": "scoring", "articles_per_second": 500.0, **scored},
        {
            "part": "evaluation",
            "key": "generation_lean_128",
            "name": "generation, lean prompt",
            "articles_per_second": 60.0,
        },
        {"part": "start", "key": "start", "name": "LoRA, from the first import", "seconds_to_first_step": 45.25},
    ]


def content(results: list[dict] | None = None, gpu: str = "NVIDIA H100 80GB HBM3", **environment: Any) -> dict:
    """A whole file; `environment` changes its fields."""
    where = factories.environment().model_dump() | {"hardware": {"gpu": gpu}} | environment
    return {
        "environment": where,
        "data": factories.data_reference(100).model_dump(),
        "model": "Qwen2.5-7B's shape with random weights, 28 layers",
        "results": rows() if results is None else results,
    }


def without(*keys: str) -> list[dict]:
    return [row for row in rows() if row["key"] not in keys]


def changed(which: str, **changes: Any) -> list[dict]:
    """The rows, one of them with other fields."""
    return [row | changes if row["key"] == which else row for row in rows()]


def record(results: list[dict] | None = None, **changes: Any) -> SpeedRecord:
    with tempfile.TemporaryDirectory() as folder:
        return read(write(Path(folder) / "h100.json", results, **changes))


def write(path: Path, results: list[dict] | None = None, **changes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content(results, **changes)))
    return path
