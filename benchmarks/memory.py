"""How near the estimate of a training's memory comes to its measured peak: three methods and three sizes on a GPU, the
tiny and the embedded model on a CPU.

    python -m benchmarks.memory gpu    # one GPU of 80 GB, random weights, no network; 5 minutes
    python -m benchmarks.memory cpu    # 10 minutes on two cores
    python -m benchmarks.memory gpu --again FILE    # the estimates of a measured file by today's code; no GPU

Every training is a notebook's own cells in a process of its own, on the built-in sample. Writes
results/reference/memory/gpu.json or cpu.json, from which `python -m benchmarks.render` makes docs/memory.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from benchmarks.records import recipe_of
from data_prep import Example
from data_prep.files import replacing
from data_prep.task import AG_NEWS
from finetune import machine, paths, records
from finetune.config import embedded, shapes
from finetune.config.methods import METHODS
from finetune.train.held import Work

FOLDER = paths.PROJECT / "results" / "reference" / "memory"
# What a line that reports a measurement begins with.
RESULT = "RESULT "
# Random weights take as much memory as others.
TINY = {"model_type": "llama", "vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": TINY,
    "135M": shapes.SHAPES[embedded.NAME],
    "1.5B": shapes.SHAPES["Qwen2.5-1.5B-Instruct"],
    "7B": shapes.SHAPES["Qwen2.5-7B-Instruct"],
}


@dataclass(frozen=True)
class Case:
    """A training that is measured.

    Attributes:
        shape: The model's, of SHAPES, or `embedded`.
        run: The method.
        overrides: Parameters besides COMMON.
    """

    shape: str
    run: str
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return " ".join([self.shape, self.run, *(f"{name}={value}" for name, value in self.overrides.items())])


COMMON = {
    "source": "sample",
    "train_rows": 96,
    "engine": "transformers",
    "use_liger_kernel": False,
    "cuda_graphs": False,
    "article_loss": 0.0,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 32,
    "gradient_accumulation_steps": 1,
    "target_modules": "all-linear",
    "gradient_checkpointing": "off",
    "save_steps": 0.0,
    "eval_steps": 0.5,
}
RECOMPUTING = {"gradient_checkpointing": "plain"}
# In fp32, weights and moments of the 7B shape need 107 GB.
THRIFTY = {"dtype": "bfloat16", "optim": "adamw_8bit"}
ON_GPU = (
    *(Case(shape, run) for shape in ("135M", "1.5B") for run in ("full", "lora", "qlora")),
    Case("7B", "full", THRIFTY | RECOMPUTING | {"gradient_accumulation_steps": 2}),
    Case("7B", "full", THRIFTY | {"update_in_backward": True}),
    Case("7B", "lora"),
    Case("7B", "qlora", RECOMPUTING),
    Case("135M", "full", {"cuda_graphs": True, "article_loss": 0.5}),
)
FEWER = {"train_rows": 32}
ON_CPU = tuple(Case(shape, run, FEWER) for shape in ("tiny", "embedded") for run in ("full", "lora", "qlora"))


def main(arguments: list[str] | None = None) -> int:
    """Measure the cases of a kind of machine, and write the file; returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", choices=["gpu", "cpu"])
    parser.add_argument("--only", action="append", default=[], metavar="SHAPE", help="shapes; all if none is named")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"default: {FOLDER.relative_to(paths.PROJECT)}/...")
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp"))
    parser.add_argument("--again", type=Path, metavar="FILE", help="estimate a measured file's cases on a GPU again")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    cases = ON_GPU if options.device == "gpu" else ON_CPU
    if options.case:
        print(RESULT + json.dumps(measure(next(case for case in cases if case.key == options.case), options.scratch)))
        return 0
    os.environ.setdefault("FINETUNE_COMMAND", shlex.join(["python", "-m", "benchmarks.memory", *arguments]))
    if options.again:
        estimate_again(options.again)
        return 0
    cases = tuple(case for case in cases if not options.only or case.shape in options.only)
    out = options.out or FOLDER / f"{options.device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch, ThreadPoolExecutor(2) as pool:
        # Beside one that computes, the next one imports its libraries.
        for line in pool.map(lambda case: _in_process(case, options.device, scratch), cases):
            print(shown(line), flush=True)
            lines.append(line)
            # What was measured before an interruption is not lost.
            with replacing(out) as file:
                content = {"environment": records.environment().model_dump(), "cases": lines}
                file.write(json.dumps(content, indent=1) + "\n")
    return int(any("failure" in line for line in lines))


def estimate_again(file: Path) -> None:
    """Replace the estimates in a file that was measured on a GPU by those of today's code, and name its commit.

    The file's measured figures stay; the rows are the built-in sample's, as they were.
    """

    from benchmarks.families import tiny_tokenizer
    from data_prep.sources import sample
    from finetune.model import encode
    from finetune.train.memory import Rows, estimate

    content, tokenizer = json.loads(file.read_bytes()), tiny_tokenizer()
    # The rows that a training takes are drawn by seed from these.
    examples = [
        Example(str(number), row.text, row.label, AG_NEWS.messages("lean", row.text, row.label))
        for number, row in enumerate(sample(AG_NEWS).rows("train"))
    ]
    rows = Rows.of(encode.encode(tokenizer, examples, 512), tokenizer, AG_NEWS)
    for line in content["cases"]:
        recipe = recipe_of(line["run"], line["overrides"] | {"lora_alpha": 32})
        dtype = "bfloat16" if recipe.dtype == "auto" else recipe.dtype
        work = Work(recipe, recipe.gradient_checkpointing, dtype, "bfloat16", "none", cuda=True)
        chosen = replace(rows, own=rows.own[: line["overrides"]["train_rows"]])
        eval_batch = line["overrides"]["per_device_eval_batch_size"]
        found = estimate(shapes.configuration(SHAPES[line["shape"]]), work, chosen, eval_batch)
        line["estimate"] = {"moment": found.moment, "parts": dict(found.parts)}
        print(shown(line), flush=True)
    content["estimated"] = records.environment().model_dump()
    with replacing(file) as target:
        target.write(json.dumps(content, indent=1) + "\n")


def shown(line: Mapping[str, Any]) -> str:
    """A case in a line of text."""
    if "failure" in line:
        return f"{line['case']}: {line['failure']}"
    estimate, peak = sum(line["estimate"]["parts"].values()), line["peak_bytes"]
    return f"{line['case']}: estimate {estimate / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB, {estimate / peak - 1:+.1%}"


def _in_process(case: Case, device: str, scratch: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", device, "--scratch", scratch, "--case", case.key]
    # What does not fit is a result too. Records and data go where the weights are.
    given = {"FINETUNE_FORCE": "1", "FINETUNE_HOME": scratch}
    if case.shape == "embedded":
        given["FINETUNE_HOME"] = str(paths.home())
    ran = subprocess.run(command, env=os.environ | given, capture_output=True, text=True, check=False)
    for line in ran.stdout.splitlines():
        if line.startswith(RESULT):
            return json.loads(line.removeprefix(RESULT))
    return {"case": case.key, "failure": (ran.stderr.strip().splitlines() or ["no output"])[-1][:300]}


def measure(case: Case, scratch: Path) -> dict[str, Any]:
    """Train a case in this process, and compare its peak with the estimate."""
    # Before the lock: they take as long as the rest.
    import torch

    import finetune.train.save  # noqa: F401
    from finetune.notebooks import run_cells

    with FileLock(scratch / "one-at-a-time.lock"):
        folder = case.shape if case.shape == "embedded" else str(_weights(case.shape, scratch))
        overrides = COMMON | {"model": folder} | case.overrides
        if not METHODS[case.run].recipe.adapter:
            overrides.pop("target_modules")
        profile = "gpu" if machine.has_cuda() else "cpu"
        notebook = METHODS[case.run].notebook
        names = run_cells(notebook, "newest_checkpoint(trainer)", PROFILE=profile, OVERRIDES=overrides)
        trainer, estimate = names["trainer"], names["resolved"].memory.estimate
        before = _peaks()
        # It forgets the peaks so far.
        trainer.train()
        peaks = {name: max(before[name], size) for name, size in _peaks().items()}
        if machine.has_cuda():
            free, total = torch.cuda.mem_get_info()
            peaks["context_bytes"] = total - free - torch.cuda.memory_reserved()
            peaks["peak_bytes"] = peaks["reserved_bytes"] + peaks["context_bytes"]
    return {
        "case": case.key,
        "shape": case.shape,
        "run": case.run,
        "overrides": COMMON | case.overrides,
        "estimate": {"moment": estimate.moment, "parts": dict(estimate.parts)},
        **peaks,
    }


def _peaks() -> dict[str, int]:
    import torch

    if not machine.has_cuda():
        return {"peak_bytes": machine.peak_memory()[0]}
    reserved, allocated = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
    return {"reserved_bytes": reserved, "allocated_bytes": allocated}


def _weights(shape: str, scratch: Path) -> Path:
    """A folder with random weights of a shape, and a small tokenizer; made in a process that gives its memory back."""
    folder = scratch / shape
    if not folder.is_dir():
        code = "import sys; from benchmarks.memory import write_weights; write_weights(*sys.argv[1:])"
        subprocess.run([sys.executable, "-c", code, shape, str(folder)], check=True)
    return folder


def write_weights(shape: str, folder: str) -> None:
    """Write random weights of a shape."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.families import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    with torch.device(machine.device()):
        model = AutoModelForCausalLM.from_config(shapes.configuration(SHAPES[shape] | tokens), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100GB")
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
