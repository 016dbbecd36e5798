"""Speed and memory of training and evaluation on one GPU: a ladder of optimisations, and the peer beside it.

    python -m benchmarks.throughput CSV_FOLDER [--layers 28] [--only PART ...] [--rungs KEY ...] [--gpus 1] [--out FILE]

CSV_FOLDER holds AG News' train.csv and test.csv. The model has the shape of Qwen2.5-7B and random weights: time and
memory do not depend on their values. Its tokenizer is the embedded model's, whose articles are about as long as
Qwen's. Every part is measured in a process of its own, alone on its GPU. With several GPUs the parts share them out.
Interrupted, the same command goes on from there: what FILE holds is kept if commit, packages and kind of GPU are the
same.

Counting: `tokens/s` counts each article's own tokens, prompt and answer included, whether a row shares its beginning
with others or not. `TFLOP/s` counts the tokens that were computed, 4 N per token where the base is frozen and 6 N where
it is trained (N parameters, all of them; recomputation does not count), and 2 N for scoring; `share of peak` divides by
a large bf16 matrix product of the same process.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

from benchmarks import ladder
from benchmarks.ladder import BEST, Rung
from data_prep import LABELS
from data_prep.store import write_json

WARM_STEPS, TIMED_STEPS = 2, 5
WEIGHTS = "model.safetensors"
# What a line of a part's process begins with that reports a measurement.
RESULT = "RESULT "
KERNELS = {"plain": "PyTorch's", "fused": "Liger's"}
# A part that compiles without end must not cost the others their time.
PART_SECONDS = 420


def main() -> None:
    """Measure the parts that are asked for and write their table."""
    options = _options()
    if options.part:
        _measure_part(options)
        return
    os.environ["FINETUNE_COMMAND"] = shlex.join(["python", "-m", "benchmarks.throughput", *sys.argv[1:]])
    model = Path(options.scratch, f"qwen2.5-7b-shape-{options.layers}")
    _write_shape(options.layers, model)
    # Beside the data, and in a process of its own, which gives the GPU's memory back.
    writer = subprocess.Popen(_command("model", options, model))
    report = _provenance(options, model)
    if writer.wait() != 0:
        sys.exit(f"the weights could not be written to {model}: see above")
    measurements = Measurements(Path(options.out), report)
    free_gpus: Queue[int] = Queue()
    for gpu in range(options.gpus):
        free_gpus.put(gpu)
    with ThreadPoolExecutor(options.gpus) as pool:
        to_do = ladder.processes(options.only, options.rungs, measurements.keys)
        running = [pool.submit(_in_process, *one, options, model, free_gpus, measurements.add) for one in to_do]
        for future in running:
            future.result()
    print(table(measurements.results))


class Measurements:
    """A file of measurements, written anew with each.

    Args:
        file: Where they go. What it holds is kept if it was measured on the same state of the project, with the same
            packages and on the same kind of GPU; what failed is not.
        report: What to write beside the results.
    """

    def __init__(self, file: Path, report: dict[str, Any]):
        self._file, self._report = file, report
        self._rows = {row["key"]: row for row in self._kept() if "outcome" not in row}
        # Each GPU's processes report from a thread of their own.
        self._lock = threading.Lock()

    @property
    def keys(self) -> set[str]:
        return set(self._rows)

    @property
    def results(self) -> list[dict[str, Any]]:
        """The rows in the order of the parts."""
        order = [key for part in ladder.ALL_PARTS for key in ladder.keys_of(part)]
        return sorted(self._rows.values(), key=lambda row: order.index(row["key"]))

    def add(self, row: dict[str, Any]) -> None:
        with self._lock:
            self._rows[row["key"]] = row
            write_json(self._file, self._report | {"results": self.results})

    def _kept(self) -> list[dict[str, Any]]:
        if not self._file.is_file():
            return []
        found = json.loads(self._file.read_text(encoding="utf-8"))
        if self._report["environment"]["dirty"] or _origin(found) != _origin(self._report):
            print(f"{self._file} is of another commit, model, GPU or packages: all is measured anew", flush=True)
            return []
        print(f"{len(found['results'])} measurements in {self._file} are kept, but for what failed", flush=True)
        return found["results"]


def _origin(report: Mapping[str, Any]) -> tuple:
    where = report["environment"]
    fingerprint = report["data"]["fingerprint"]
    return where["commit"], where["dirty"], where["packages"], where["hardware"]["gpu"], report["model"], fingerprint


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


def _command(part: str, options: argparse.Namespace, model: Path) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.throughput", options.csv, "--part", part, "--model", str(model)]
    return [*command, "--scratch", options.scratch]


def _in_process(
    part: str,
    keys: list[str],
    options: argparse.Namespace,
    model: Path,
    free_gpus: Queue[int],
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Measure a part on the next free GPU, and report each result as it comes."""
    command = _command(part, options, model)
    command += ["--rungs", *keys] if keys else []
    command += ["--profile", *options.profile] if options.profile else []
    gpu = free_gpus.get()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as compiled:
        own = {"CUDA_VISIBLE_DEVICES": str(gpu), "UNSLOTH_COMPILE_LOCATION": compiled}
        status = _run(command, os.environ | own, report)
    free_gpus.put(gpu)
    print(f"{part} {' '.join(keys)}: {time.perf_counter() - start:.0f} s on GPU {gpu}, exit {status}", flush=True)


def _run(command: list[str], environment: Mapping[str, str], report: Callable[[dict[str, Any]], None]) -> int:
    """A command's status; it is ended after `PART_SECONDS`."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        alarm = threading.Timer(PART_SECONDS, process.kill)
        alarm.start()
        for line in process.stdout:
            if line.startswith(RESULT):
                report(json.loads(line.removeprefix(RESULT)))
        alarm.cancel()
    return process.returncode


def _write_shape(layers: int, folder: Path) -> None:
    """Configuration and tokenizer of a model of Qwen2.5-7B's shape (config.json of Qwen/Qwen2.5-7B-Instruct)."""
    from transformers import AutoTokenizer, Qwen2Config

    from finetune import embedded

    tokenizer = AutoTokenizer.from_pretrained(embedded.folder())
    config = Qwen2Config(
        **(ladder.QWEN_7B | {"num_hidden_layers": layers}),
        max_position_embeddings=32_768,
        rope_theta=1e6,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
        architectures=["Qwen2ForCausalLM"],
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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


def _measure_part(options: argparse.Namespace) -> None:
    """Measure one part's rungs in this process, and print each as a line of JSON."""
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
    kernels = _kernels(_one_step(trainer)) if profile else {}
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


def _one_step(trainer) -> Callable[[], object]:
    """A training step on the first rows."""
    import torch

    examples = [trainer.train_dataset[row] for row in range(trainer.args.per_device_train_batch_size)]
    batch = {name: value.to("cuda") for name, value in trainer.data_collator(examples).items()}
    return lambda: trainer.training_step(trainer.model, batch, torch.tensor(512, device="cuda"))


def _kernels(step: Callable[[], object], count: int = 14) -> dict[str, Any]:
    """The kernels that a step spends its time in, and its slowest matrix products by shape, in milliseconds."""
    import torch
    from torch.profiler import ProfilerActivity

    torch.cuda.synchronize()
    activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        milliseconds = 1000 * (time.perf_counter() - start)
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

    for prompt, batch, kernels in ladder.SCORED:
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
        key = ladder.scoring_key(prompt, batch, kernels)
        yield {
            "key": key,
            "name": f"scoring, {prompt} prompt, {batch} articles at once, {KERNELS[kernels]} kernels",
            "parameters": models.parameter_count(model),
            "articles_per_second": len(prompts) / seconds,
            "tokens_per_second": sum(map(len, prompts)) / seconds,
            "computed_per_second": read / seconds,
            "tflops": flops / 1e12,
            "matrix_peak_tflops": peak / 1e12,
            "share_of_peak": flops / peak,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            **(_kernels(functools.partial(scorer.score, prompts[:batch])) if key in options.profile else {}),
        }
        if (key := f"generation_{prompt}_{batch}") in ladder.GENERATED and kernels == "fused":
            _, seconds = evaluation.timed(evaluation.generate, model, tokenizer, prompts[:512], batch)
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
    from finetune import chat

    shared, prefix = chat.shared_length(prompts), len(chat.common_prefix(answers))
    per_article = prefix + sum(len(answer) - prefix - 1 for answer in answers)
    return sum(len(prompt) - shared + per_article for prompt in prompts)


def _start(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds from the first import to the end of the first optimiser step, in this fresh process."""
    start = time.perf_counter()
    engine = ladder.STARTS[options.part]
    name = f"LoRA on {engine.capitalize()}, from the first import to the end of the first step"
    rung = Rung(options.part, name, "lora", BEST | {"gradient_checkpointing": "plain"}, engine=engine)
    yield {
        "key": rung.key,
        "name": rung.name,
        "seconds_to_first_step": _training(rung, options)["ended_first_step"] - start,
    }


if __name__ == "__main__":
    main()
