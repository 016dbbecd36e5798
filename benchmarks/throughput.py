"""Speed and memory of training and evaluation on one GPU: a ladder of optimisations, and the peer beside it.

    python -m benchmarks.throughput CSV_FOLDER [--layers 28] [--only PART ...] [--rungs KEY ...] [--gpus 1] [--out FILE]

CSV_FOLDER holds AG News' train.csv and test.csv. The model has the shape of Qwen2.5-7B and random weights: time and
memory do not depend on their values. Its tokenizer is the embedded model's, whose articles are about as long as
Qwen's. Every part is measured in a process of its own, alone on its GPU; all of it on one machine, in one run. With
several GPUs the parts share them out.

Counting: `tokens/s` counts each article's own tokens, prompt and answer included, whether a row shares its beginning
with others or not. `TFLOP/s` counts the tokens that were computed, 4 N per token where the base is frozen and 6 N where
it is trained (N parameters, all of them; recomputation does not count), and 2 N for scoring; `share of peak` divides by
a large bf16 matrix product of the same process.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

from data_prep import LABELS
from data_prep.store import write_json

WARM_STEPS, TIMED_STEPS = 2, 5
SEED_BATCH = {"batch_size": 8, "gradient_accumulation_steps": 4}
LARGE_BATCH = {"batch_size": 64, "gradient_accumulation_steps": 1}
LARGER_BATCH = {"batch_size": 128, "gradient_accumulation_steps": 1}
ALL_LINEAR = {"lora_targets": "all-linear"}


@dataclass(frozen=True)
class Rung:
    """One measurement.

    Attributes:
        key: What tables know it by.
        name: What it adds to the rung before it.
        run: The suite's run.
        overrides: Parameters of the suite.
        trainer: `suite`, or `trl`: SFTTrainer as its users set it up.
        engine: `unsloth` or `transformers`.
        options: SFTConfig's, for `trl`.
        share: Whether rows share the tokens that all begin with.
    """

    key: str
    name: str
    run: str = "lora"
    overrides: dict[str, Any] = field(default_factory=dict)
    trainer: str = "suite"
    engine: str = "unsloth"
    options: dict[str, Any] = field(default_factory=dict)
    share: bool = True


FIRST = SEED_BATCH | ALL_LINEAR | {"prompt": "verbose", "supervise": "all", "gradient_checkpointing": "plain"}
FIRST |= {"cuda_graphs": False, "fused_kernels": False, "offload_embedding": "off", "article_loss": 0.0}
PLAIN = {"trainer": "trl", "engine": "transformers"}
PACK = {"packing": True, "max_length": 512}
UNSLOTH = FIRST | {"gradient_checkpointing": "unsloth"}
KEPT = UNSLOTH | {"gradient_checkpointing": "off"}
LEAN = KEPT | {"supervise": "answer", "prompt": "lean"}
BEST = LEAN | LARGE_BATCH
PEER = BEST | {"gradient_checkpointing": "plain"}
THRIFTY = BEST | {"gradient_checkpointing": "plain", "offload_embedding": "on"}
GRAPHS = {"cuda_graphs": True, "offload_embedding": "on"}
GRAPHS_16 = BEST | GRAPHS | {"batch_size": 16, "gradient_accumulation_steps": 4}
GRAPHS_8 = BEST | GRAPHS | {"batch_size": 8, "gradient_accumulation_steps": 8}
FULL = BEST | {"weights": "bfloat16", "optimizer": "adamw_8bit", "gradient_accumulation_steps": 2}
FULL_LIGER = FULL | {"fused_kernels": True}
IN_BACKWARD = FULL_LIGER | {"gradient_accumulation_steps": 1, "update_in_backward": True}
FOUR_BIT = {"optimizer": "adamw_4bit_stochastic", "gradient_checkpointing": "plain"}

PARTS: dict[str, tuple[Rung, ...]] = {
    "plain": (
        Rung(
            "trl_seed",
            "TRL + PEFT: 8 x 4 articles, long prompt, loss on all tokens, checkpointing",
            "lora",
            FIRST,
            **PLAIN,
        ),
        Rung("trl_cudnn", "+ cudnn.benchmark", "lora", FIRST | {"cudnn_benchmark": True}, **PLAIN),
        Rung("trl_packed", "+ TRL's packing, rows of 512", "lora", FIRST, options=PACK, **PLAIN),
        Rung("peer_checkpointing", "peer: TRL + PEFT, tuned, checkpointing", "lora", PEER, **PLAIN),
        Rung("peer", "peer: TRL + PEFT, tuned, no checkpointing", "lora", BEST, **PLAIN),
        Rung("peer_liger", "peer: the same with Liger's kernels", "lora", BEST | {"fused_kernels": True}, **PLAIN),
    ),
    "lora": (
        Rung("unsloth_seed", "+ Unsloth's kernels and checkpointing", "lora", UNSLOTH, "trl", options=PACK),
        Rung("flash", "+ flash attention over whole articles", "lora", UNSLOTH, share=False),
        Rung("kept", "+ no checkpointing", "lora", KEPT, share=False),
        Rung("answer", "+ loss on the answer alone", "lora", KEPT | {"supervise": "answer"}, share=False),
        Rung("lean", "+ lean prompt", "lora", LEAN, share=False),
        Rung("shared", "+ common beginning computed once", "lora", LEAN),
        Rung("batch", "+ 64 articles at once", "lora", BEST),
        Rung("batch_128", "+ 128 articles at once", "lora", BEST | LARGER_BATCH),
    ),
    "lora_memory": (
        Rung("lora_graphs_16x4", "LoRA, 16 x 4 articles, CUDA graphs, embeddings on the host", "lora", GRAPHS_16),
        Rung("lora_graphs_8x8", "LoRA, 8 x 8 articles, the same", "lora", GRAPHS_8),
        Rung("lora_checkpointing", "LoRA, checkpointing, embeddings on the host", "lora", THRIFTY),
        Rung(
            "lora_unsloth_checkpointing",
            "LoRA, Unsloth's checkpointing, embeddings on the host",
            "lora",
            THRIFTY | {"gradient_checkpointing": "unsloth"},
        ),
        Rung("lora_checkpointing_128", "LoRA, 128 articles at once, the first", "lora", THRIFTY | LARGER_BATCH),
    ),
    "qlora": (
        Rung("qlora", "QLoRA, 64 articles at once", "qlora", BEST),
        Rung("qlora_128", "QLoRA, 128 articles at once", "qlora", BEST | LARGER_BATCH),
        Rung("qlora_graphs_16x4", "QLoRA, 16 x 4 articles, CUDA graphs, embeddings on the host", "qlora", GRAPHS_16),
        Rung("qlora_graphs_8x8", "QLoRA, 8 x 8 articles, the same", "qlora", GRAPHS_8),
        Rung("qlora_checkpointing", "QLoRA, checkpointing, embeddings on the host", "qlora", THRIFTY),
        Rung("qlora_checkpointing_128", "QLoRA, 128 articles at once, the same", "qlora", THRIFTY | LARGER_BATCH),
    ),
    "full": (
        Rung("full_plain", "full, bf16 weights, 8-bit AdamW, 64 x 2 articles", "full", FULL, engine="transformers"),
        Rung("full", "full, + Liger's kernels", "full", FULL_LIGER, engine="transformers"),
        Rung(
            "full_64x4",
            "full, 64 x 4 articles",
            "full",
            FULL_LIGER | {"gradient_accumulation_steps": 4},
            engine="transformers",
        ),
        Rung(
            "full_checkpointing",
            "full, + checkpointing",
            "full",
            FULL_LIGER | {"gradient_checkpointing": "plain"},
            engine="transformers",
        ),
        Rung(
            "full_in_backward",
            "full, 64 x 1 articles, each weight updated in the backward pass",
            "full",
            IN_BACKWARD,
            engine="transformers",
        ),
        Rung(
            "full_in_backward_checkpointing",
            "full, 256 x 1 articles, the same, + checkpointing",
            "full",
            IN_BACKWARD | {"gradient_checkpointing": "plain", "batch_size": 256},
            engine="transformers",
        ),
        Rung(
            "full_4bit_checkpointing",
            "full, + 4-bit AdamW with stochastic rounding",
            "full",
            FULL_LIGER | FOUR_BIT,
            engine="transformers",
        ),
    ),
    "full_unsloth": (Rung("full_unsloth", "full, bf16 weights, 8-bit AdamW, Unsloth", "full_unsloth", FULL),),
}
# Parts that are one measurement, each on an engine.
SCORED = (("lean", 128, "plain"), ("lean", 128, "fused"), ("lean", 512, "fused"), ("verbose", 128, "fused"))
KERNELS = {"plain": "PyTorch's", "fused": "Liger's"}
STARTS = {"start": "unsloth", "start_transformers": "transformers"}
# A part that compiles without end must not cost the others their time.
PART_SECONDS = 420


def main() -> None:
    """Measure the parts that are asked for and write their table."""
    options = _options()
    if options.part:
        _measure_part(options)
        return
    os.environ["FINETUNE_COMMAND"] = shlex.join(["python", "-m", "benchmarks.throughput", *sys.argv[1:]])
    model = _random_model(options.layers, Path(options.scratch))
    report = _provenance(options, model)
    free_gpus: Queue[int] = Queue()
    for gpu in range(options.gpus):
        free_gpus.put(gpu)
    with ThreadPoolExecutor(options.gpus) as pool:
        for results in pool.map(lambda one: _in_process(*one, options, model, free_gpus), _processes(options)):
            report["results"] += results
            write_json(Path(options.out), report)
    print(table(report["results"]))


def _processes(options: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Parts, each with the keys of its rungs, for one process each. Rungs on transformers have each its own, so that
    none finds the memory of another; those on Unsloth share the half minute of its import."""
    for part in options.only or [*PARTS, "evaluation", *STARTS]:
        keys = [rung.key for rung in PARTS.get(part, ()) if not options.rungs or rung.key in options.rungs]
        if PARTS.get(part, (None,))[0] and PARTS[part][0].engine == "transformers":
            yield from ((part, [key]) for key in keys)
        elif keys or part not in PARTS:
            yield part, keys


def _provenance(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Where, with what and on which data all this is measured."""
    from finetune import plan, records

    wanted = {"model": str(model), "source": "csv", "data_path": options.csv}
    for prompt in ("verbose", "lean"):
        # Before the parts, none of which then prepares any: those of a second run would not.
        data = _data(plan("base", "gpu", wanted | {"prompt": prompt}), options)
    return {
        "environment": records.environment().model_dump(),
        "data": data.reference.model_dump(),
        "model": f"Qwen2.5-7B's shape with random weights, {options.layers} layers",
        "results": [],
    }


def _data(planned, options: argparse.Namespace):
    """The rows, in a folder for each prompt, so that processes with several prompts do not undo each other's work."""
    from finetune.data import prepare_data

    os.environ["FINETUNE_HOME"] = str(Path(options.scratch, f"throughput-{planned.experiment.prompt}"))
    return prepare_data(planned)


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    head = ["", "articles/s", "tokens/s", "TFLOP/s", "share of peak", "peak GiB", "seconds to the first step"]
    lines = [head, ["---"] * len(head)]
    for row in results:
        name = f"{row['name']}: {row['outcome']}" if "outcome" in row else row["name"]
        lines.append([name, *(_shown(row.get(key), form) for key, form in _COLUMNS)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


_COLUMNS = (
    ("articles_per_second", "{:.1f}"),
    ("tokens_per_second", "{:,.0f}"),
    ("tflops", "{:.0f}"),
    ("share_of_peak", "{:.1%}"),
    ("peak_gib", "{:.1f}"),
    ("seconds_to_first_step", "{:.1f}"),
)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", metavar="CSV_FOLDER")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--rungs", nargs="*", default=[], metavar="KEY")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs to share the parts out to")
    parser.add_argument("--scratch", default="/dev/shm")
    parser.add_argument("--out", default="results/throughput.json")
    parser.add_argument("--profile", nargs="*", default=[], metavar="KEY", help="rungs whose slowest kernels to record")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_process(
    part: str, keys: list[str], options: argparse.Namespace, model: Path, free_gpus: Queue[int]
) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.throughput", options.csv, "--part", part, "--model", str(model)]
    command += ["--scratch", options.scratch]
    command += ["--rungs", *keys] if keys else []
    command += ["--profile", *options.profile] if options.profile else []
    gpu = free_gpus.get()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as compiled:
        own = {"CUDA_VISIBLE_DEVICES": str(gpu), "UNSLOTH_COMPILE_LOCATION": compiled}
        output, outcome = _output_of(command, os.environ | own)
    free_gpus.put(gpu)
    print(f"{part} {' '.join(keys)}: {time.perf_counter() - start:.0f} s on GPU {gpu}, {outcome}", flush=True)
    lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


def _output_of(command: list[str], environment: Mapping[str, str]) -> tuple[str, str]:
    """What a command printed, as far as it came in time, and how it ended."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, timeout=PART_SECONDS, check=False)
        return done.stdout.decode(), f"exit {done.returncode}"
    except subprocess.TimeoutExpired as error:
        return (error.stdout or b"").decode(), f"ended after {PART_SECONDS} s"


def _random_model(layers: int, scratch: Path) -> Path:
    """A folder with a model of Qwen2.5-7B's shape (config.json of Qwen/Qwen2.5-7B-Instruct) and random weights."""
    folder = scratch / f"qwen2.5-7b-shape-{layers}"
    if folder.is_dir():
        return folder
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from finetune import embedded

    config = Qwen2Config(
        vocab_size=152_064,
        hidden_size=3_584,
        intermediate_size=18_944,
        num_hidden_layers=layers,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32_768,
        rope_theta=1e6,
        tie_word_embeddings=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(embedded.folder())
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    return folder


def _measure_part(options: argparse.Namespace) -> None:
    """Measure one part's rungs in this process, and print each as a line of JSON."""
    os.environ["FINETUNE_PROFILE"] = "gpu"
    if options.part == "evaluation":
        results: Iterator[dict[str, Any]] = _evaluation(options)
    elif options.part in STARTS:
        results = _start(options)
    else:
        wanted = [rung for rung in PARTS[options.part] if not options.rungs or rung.key in options.rungs]
        results = (_attempt(rung, options) for rung in wanted)
    for result in results:
        print("RESULT " + json.dumps({"part": options.part, **result}), flush=True)


def _attempt(rung: Rung, options: argparse.Namespace) -> dict[str, Any]:
    """A rung's measurement, or what went wrong: one that fails is a result, and must not cost the others theirs."""
    try:
        return _training(rung, options)
    except Exception as error:
        traceback.print_exc()
        return {"key": rung.key, "name": rung.name, "outcome": f"{type(error).__name__}: {error}"[:300]}


def _training(rung: Rung, options: argparse.Namespace) -> dict[str, Any]:
    from finetune import plan_training

    wanted = rung.overrides | {
        "model": options.model,
        "source": "csv",
        "data_path": options.csv,
        "seed": 1,
        "engine": rung.engine,
    }
    wanted["train_rows"] = (WARM_STEPS + TIMED_STEPS) * wanted["batch_size"] * wanted["gradient_accumulation_steps"]
    wanted.setdefault("cudnn_benchmark", False)
    plan = plan_training(rung.run, "gpu", wanted | {"evaluations": 1})
    import torch

    from finetune import models

    data = _data(plan, options)
    peak = matrix_peak()
    gc.collect()
    torch.cuda.empty_cache()
    torch.backends.cudnn.benchmark = plan.recipe.cudnn_benchmark
    trainer = _suite_trainer(rung, plan, data) if rung.trainer == "suite" else _trl_trainer(rung, plan, data)
    timing = _timed(trainer, rung.key in options.profile)
    parameters = models.parameter_count(trainer.model)
    flops = (4 if plan.recipe.adapter else 6) * parameters * timing["computed_per_second"]
    return {
        "key": rung.key,
        "name": rung.name,
        "run": rung.run,
        "overrides": rung.overrides,
        "parameters": parameters,
        **timing,
        "tflops": flops / 1e12,
        "matrix_peak_tflops": peak / 1e12,
        "share_of_peak": flops / peak,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def _suite_trainer(rung: Rung, plan, data):
    from finetune.trainer import RowCollator
    from finetune.training import ValidationWatch, prepare_training

    trainer = prepare_training(plan, data).trainer
    trainer.remove_callback(ValidationWatch)
    if not rung.share:
        trainer.data_collator = RowCollator(0)
    return trainer


def _trl_trainer(rung: Rung, plan, data):
    """SFTTrainer as its users set it up: on this suite's rows, but with its own collator, loss and packing."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from finetune import chat, models

    recipe = plan.recipe
    model = models.load_for_training(plan, recipe.gradient_checkpointing)
    tokenizer = models.load_tokenizer(plan)
    rows = chat.encode(tokenizer, data.train, recipe.max_length)
    arguments = SFTConfig(
        output_dir="/tmp/throughput",
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        optim=recipe.optimizer,
        bf16=True,
        gradient_checkpointing=recipe.gradient_checkpointing != "off",
        report_to=[],
        **({"train_sampling_strategy": "group_by_length"} if not rung.options else {}),
        **rung.options,
    )
    dataset = Dataset.from_list([row.row(recipe.supervise) for row in rows])
    return SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer)


def _timed(trainer, profile: bool) -> dict[str, Any]:
    """Train for a few steps, and time all but the first; then, if asked, one more under the profiler."""
    import torch
    from transformers import TrainerCallback

    batches: list[tuple[int, int, int]] = []
    collate = trainer.data_collator

    def counted(examples):
        batch = collate(examples)
        articles = sum(len(example.get("seq_lengths", [1])) for example in examples)
        batches.append((articles, sum(len(example["input_ids"]) for example in examples), batch["input_ids"].numel()))
        return batch

    # On the GPU's own clock: to wait for it at each step would leave it idle while the next one is launched.
    ends: list[torch.cuda.Event] = []
    first: list[float] = []

    class Stamps(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            ends.append(torch.cuda.Event(enable_timing=True))
            ends[-1].record()
            if state.global_step == 1:
                torch.cuda.synchronize()
                first.append(time.perf_counter())
                # The peak of training, not of loading.
                torch.cuda.reset_peak_memory_stats()

    steps = WARM_STEPS + TIMED_STEPS
    trainer.data_collator = counted
    trainer.args.max_steps, trainer.args.save_strategy, trainer.args.logging_steps = steps, "no", steps
    trainer.add_callback(Stamps())
    start = time.perf_counter()
    trainer.train()
    torch.cuda.synchronize()
    kernels = _kernels(trainer) if profile else {}
    accumulated = trainer.args.gradient_accumulation_steps
    counts = batches[WARM_STEPS * accumulated : steps * accumulated]
    articles, tokens, computed = (sum(column) for column in zip(*counts, strict=True))
    # The median step: one stall of the machine is not the method's.
    milliseconds = [a.elapsed_time(b) for a, b in zip(ends[WARM_STEPS - 1 : -1], ends[WARM_STEPS:], strict=True)]
    seconds = statistics.median(milliseconds) / 1000 * TIMED_STEPS
    return {
        "articles_per_second": articles / seconds,
        "tokens_per_second": tokens / seconds,
        "computed_per_second": computed / seconds,
        "seconds_to_first_step": first[0] - start,
        "ended_first_step": first[0],
        **kernels,
    }


def _kernels(trainer, count: int = 14) -> dict[str, Any]:
    """The kernels that one step spends its time in, and its slowest matrix products by shape, in milliseconds."""
    import torch
    from torch.profiler import ProfilerActivity

    examples = [trainer.train_dataset[row] for row in range(trainer.args.per_device_train_batch_size)]
    batch = trainer.data_collator(examples)
    batch = {name: value.to("cuda") for name, value in batch.items()}
    torch.cuda.synchronize()
    activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        start = time.perf_counter()
        trainer.training_step(trainer.model, batch, torch.tensor(512, device="cuda"))
        torch.cuda.synchronize()
        milliseconds = 1000 * (time.perf_counter() - start)
    trainer.model.zero_grad()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    shown = {event.key[:90]: [round(event.self_device_time_total / 1000, 2), event.count] for event in kernels[:count]}
    busy = sum(event.self_device_time_total for event in kernels) / 1000
    by_shape = sorted(profiler.key_averages(group_by_input_shape=True), key=lambda event: -event.device_time_total)
    products = {
        f"{event.key} {event.input_shapes}"[:120]: [round(event.device_time_total / 1000, 2), event.count]
        for event in by_shape
        if event.key in ("aten::mm", "aten::addmm", "aten::addmm_")
    }
    slowest = dict(list(products.items())[: 2 * count])
    return {"profile": {"step_ms": milliseconds, "busy_ms": busy, "kernels": shown, "products": slowest}}


def matrix_peak() -> float:
    """FLOP/s of a large bf16 matrix product on random numbers, the best of five times ten."""
    import torch

    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / _best(lambda: a @ b)


def _best(run: Callable[[], object], times: int = 5, inner: int = 10) -> float:
    """Seconds of one call, the best of `times` groups of `inner`."""
    import torch

    run()
    seconds = []
    for _ in range(times):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(inner):
            run()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / inner)
    return min(seconds)


def _evaluation(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Scoring and generation of the same test rows by plain transformers."""
    import torch

    from finetune import chat, evaluation, models, plan, segments

    for prompt, batch, kernels in SCORED:
        wanted = {"model": options.model, "source": "csv", "data_path": options.csv, "prompt": prompt}
        wanted |= {"test_rows": 2048, "evaluation_batch_size": batch, "evaluation_kernels": kernels}
        settings = plan("base", "gpu", wanted)
        data = _data(settings, options)
        tokenizer = models.load_tokenizer(settings)
        prompts = [row.prompt for row in chat.encode(tokenizer, data.test, 1024)]
        model = models.load_for_evaluation(settings, None)
        peak = matrix_peak()
        torch.cuda.reset_peak_memory_stats()
        scorer = evaluation.LabelScorer(segments.Backbone(model), tokenizer, batch)
        scorer.score(prompts[:batch])
        _, seconds = evaluation.timed(scorer.score, prompts)
        read = _computed_tokens(prompts, [chat.answer_tokens(tokenizer, label)[:-1] for label in LABELS])
        flops = 2 * models.parameter_count(model) * read / seconds
        yield {
            "key": f"scoring_{prompt}_{batch}" + "_plain" * (kernels == "plain"),
            "name": f"scoring, {prompt} prompt, {batch} articles at once, {KERNELS[kernels]} kernels",
            "parameters": models.parameter_count(model),
            "articles_per_second": len(prompts) / seconds,
            "tokens_per_second": sum(map(len, prompts)) / seconds,
            "computed_per_second": read / seconds,
            "tflops": flops / 1e12,
            "matrix_peak_tflops": peak / 1e12,
            "share_of_peak": flops / peak,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        }
        if batch == 128 and kernels == "fused":
            _, seconds = evaluation.timed(evaluation.generate, model, tokenizer, prompts[:512], 128)
            yield {
                "key": f"generation_{prompt}_128",
                "name": f"generation, {prompt} prompt, 128 articles at once",
                "articles_per_second": 512 / seconds,
            }
        del model, scorer
        gc.collect()
        torch.cuda.empty_cache()


def _computed_tokens(prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> int:
    """Tokens that scoring computes: what articles do not share, what all answers begin with, and what each goes on with
    but its last token, which is predicted only."""
    from finetune import chat

    shared, prefix = chat.shared_length(prompts), len(chat.common_prefix(answers))
    per_article = prefix + sum(len(answer) - prefix - 1 for answer in answers)
    return sum(len(prompt) - shared + per_article for prompt in prompts)


def _start(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds from the first import to the end of the first optimiser step, in this fresh process."""
    start = time.perf_counter()
    engine = STARTS[options.part]
    name = f"LoRA on {engine.capitalize()}, from the first import to the end of the first step"
    rung = Rung(options.part, name, "lora", BEST | {"gradient_checkpointing": "plain"}, engine=engine)
    yield {
        "key": rung.key,
        "name": rung.name,
        "seconds_to_first_step": _training(rung, options)["ended_first_step"] - start,
    }


if __name__ == "__main__":
    main()
