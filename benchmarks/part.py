"""One part of the benchmark of speed, measured in this process on one GPU; benchmarks/throughput.py starts it.

    python -m benchmarks.part PART CSV_FOLDER --model FOLDER [--rungs KEY ...] [--scratch FOLDER]

Prints a line of JSON for each measurement.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ladder
from benchmarks.ladder import PEER, Rung

WARM_STEPS, TIMED_STEPS = 2, 5
WEIGHTS = "model.safetensors"
# What a line that reports a measurement begins with.
RESULT = "RESULT "
KERNELS = {"plain": "PyTorch's", "fused": "Liger's"}


def parser() -> argparse.ArgumentParser:
    """The options of a part's process."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("part", choices=["model", *ladder.ALL_PARTS], help="`model` writes the random weights")
    options.add_argument("csv", metavar="CSV_FOLDER")
    options.add_argument("--model", required=True, help="folder of the model")
    options.add_argument("--rungs", nargs="*", default=[], metavar="KEY", help="rungs to measure; all if none is named")
    options.add_argument("--scratch", default="/dev/shm")
    return options


def main() -> None:
    """Measure the part's rungs, and print each as a line of JSON."""
    options = parser().parse_args()
    if options.part == "model":
        _write_random_weights(Path(options.model))
        return
    os.environ["FINETUNE_PROFILE"] = "gpu"
    if options.part == "evaluation":
        results: Iterator[dict[str, Any]] = _evaluation(options)
    elif options.part in ladder.STARTS:
        results = _start(options)
    else:
        wanted = [rung for rung in ladder.PARTS[options.part] if not options.rungs or rung.key in options.rungs]
        results = (_attempt(rung, options) for rung in wanted)
    for result in results:
        print(RESULT + json.dumps({"part": options.part, **result}), flush=True)


def _write_random_weights(folder: Path) -> None:
    """Random weights for the configuration in a folder; those that are there stay."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if (folder / WEIGHTS).is_file():
        return
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    half = folder.with_name(f".{folder.name}")
    model.save_pretrained(half, max_shard_size="100GB")
    (half / WEIGHTS).rename(folder / WEIGHTS)


def data_of(planned, scratch: str):
    """The rows, in a folder for each prompt, so that processes with several prompts do not undo each other's work."""
    from finetune import load_data

    os.environ["FINETUNE_HOME"] = str(Path(scratch, f"throughput-{planned.experiment.prompt}"))
    return load_data(planned)


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
    wanted["train_rows"] = (
        (WARM_STEPS + TIMED_STEPS) * wanted["per_device_train_batch_size"] * wanted["gradient_accumulation_steps"]
    )
    wanted.setdefault("cudnn_benchmark", False)
    plan = plan_training(rung.run, "gpu", wanted)
    import torch

    from finetune.model import load

    data = data_of(plan, options.scratch)
    peak = matrix_peak()
    gc.collect()
    torch.cuda.empty_cache()
    torch.backends.cudnn.benchmark = plan.recipe.cudnn_benchmark
    trainer = _suite_trainer(rung, wanted) if rung.trainer == "suite" else _trl_trainer(rung, plan, data)
    timing = _timed(trainer)
    parameters = load.parameter_count(trainer.model)
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


def _suite_trainer(rung: Rung, overrides: dict[str, Any]):
    from finetune.config.methods import METHODS
    from finetune.notebooks import run_cells
    from finetune.train.trainer import RowCollator

    notebook = METHODS[rung.run].notebook
    trainer = run_cells(notebook, "newest_checkpoint(trainer)", PROFILE="gpu", OVERRIDES=overrides)["trainer"]
    trainer.args.eval_strategy, trainer.args.eval_on_start = "no", False
    if not rung.share:
        trainer.data_collator = RowCollator(0)
    return trainer


def _trl_trainer(rung: Rung, plan, data):
    """SFTTrainer as its users set it up: on this suite's rows, but with its own collator, loss and packing."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from finetune import resolve
    from finetune.model import encode, load

    recipe = plan.recipe
    set_seed(plan.experiment.seed)
    loading = resolve(plan, data).loading | {"use_liger_kernel": recipe.use_liger_kernel}
    dtype = "bfloat16" if recipe.dtype == "auto" else recipe.dtype
    model, tokenizer = load.load_model(plan.experiment.model, dtype=dtype, load_in_4bit=recipe.load_in_4bit, **loading)
    if recipe.adapter:
        names = {name: getattr(recipe, name) for name in ("r", "lora_alpha", "lora_dropout", "target_modules")}
        model = load.add_lora(model, LoraConfig(task_type="CAUSAL_LM", **names))
    rows = encode.encode(tokenizer, data.train, recipe.max_length)
    arguments = SFTConfig(
        output_dir="/tmp/throughput",
        per_device_train_batch_size=recipe.per_device_train_batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        optim=recipe.optim,
        bf16=True,
        gradient_checkpointing=recipe.gradient_checkpointing != "off",
        report_to=[],
        **({"train_sampling_strategy": "group_by_length"} if not rung.options else {}),
        **rung.options,
    )
    dataset = Dataset.from_list([row.row(recipe.completion_only_loss) for row in rows])
    return SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer)


def _timed(trainer) -> dict[str, Any]:
    """Train for a few steps, and time all but the first."""
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
    }


def matrix_peak() -> float:
    """FLOP/s of a large bf16 matrix product on random numbers, the best of five times ten."""
    import torch

    size, seconds = 8192, []
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a @ b
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / 10)
    return 2 * size**3 / min(seconds)


def _evaluation(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Scoring and generation of the same test rows by plain transformers."""
    import torch

    from finetune import find_run
    from finetune.evaluate import score
    from finetune.evaluate.find import loading
    from finetune.model import encode, load, packing

    for prompt, batch, kernels in ladder.SCORED:
        wanted = {"model": options.model, "source": "csv", "data_path": options.csv, "prompt": prompt}
        wanted |= {"test_rows": 2048, "per_device_eval_batch_size": batch, "evaluation_kernels": kernels}
        found = find_run("base", "gpu", wanted)
        data = data_of(found, options.scratch)
        model, tokenizer = load.load_model(found.experiment.model, **loading(found))
        load.evaluating(model)
        prompts = [row.prompt for row in encode.encode(tokenizer, data.test, 1024)]
        peak = matrix_peak()
        torch.cuda.reset_peak_memory_stats()
        scorer = score.LabelScorer(packing.Backbone(model), tokenizer, data.task, batch)
        scorer.score(prompts[:batch])
        _, seconds = score.timed(scorer.score, prompts)
        answers = [encode.answer_tokens(tokenizer, data.task.answer_for(label))[:-1] for label in data.task.labels]
        read = _computed_tokens(prompts, answers)
        flops = 2 * load.parameter_count(model) * read / seconds
        key = ladder.scoring_key(prompt, batch, kernels)
        yield {
            "key": key,
            "name": f"scoring, {prompt} prompt, {batch} articles at once, {KERNELS[kernels]} kernels",
            "parameters": load.parameter_count(model),
            "articles_per_second": len(prompts) / seconds,
            "tokens_per_second": sum(map(len, prompts)) / seconds,
            "computed_per_second": read / seconds,
            "tflops": flops / 1e12,
            "matrix_peak_tflops": peak / 1e12,
            "share_of_peak": flops / peak,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        }
        if (key := f"generation_{prompt}_{batch}") in ladder.GENERATED and kernels == "fused":
            _, seconds = score.timed(score.generate, model, tokenizer, data.task, prompts[:512], batch)
            yield {
                "key": key,
                "name": f"generation, {prompt} prompt, 128 articles at once",
                "articles_per_second": 512 / seconds,
            }
        del model, scorer
        gc.collect()
        torch.cuda.empty_cache()


def _computed_tokens(prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> int:
    """Tokens that scoring computes: what articles do not share, what all answers begin with, and what each goes on with
    but its last token, which is predicted only."""
    from finetune.model import encode

    shared, prefix = encode.shared_length(prompts), len(encode.common_prefix(answers))
    per_article = prefix + sum(len(answer) - prefix - 1 for answer in answers)
    return sum(len(prompt) - shared + per_article for prompt in prompts)


def _start(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds from the first import to the end of the first optimiser step, in this fresh process."""
    start = time.perf_counter()
    engine = ladder.STARTS[options.part]
    name = f"LoRA on {engine.capitalize()}, from the first import to the end of the first step"
    rung = Rung(options.part, name, PEER, engine=engine)
    yield {
        "key": rung.key,
        "name": rung.name,
        "seconds_to_first_step": _training(rung, options)["ended_first_step"] - start,
    }


if __name__ == "__main__":
    main()
