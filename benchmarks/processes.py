"""One training on one GPU and on several: speed, memory and equal results, under DDP and FSDP2.

    python -m benchmarks.processes CSV_FOLDER [--gpus 2] [--parts speed equality large] [--layers 28] [--out FILE]

CSV_FOLDER holds AG News' train.csv and test.csv. `speed` trains the shape of Qwen2.5-7B with random weights, with
LoRA and in full; each update has 128 articles, whatever the number of GPUs. `equality` trains SmolLM2-135M in fp32 and
compares each step's loss and the final weights with one GPU's. `large` trains all weights of the shape of Qwen2.5-14B,
which does not fit one GPU of 80 GB. FILE is written anew with each result; one that fails is a result too.
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
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.part import RESULT, TIMED_STEPS, WARM_STEPS, data_of
from benchmarks.throughput import write_shape
from data_prep.files import write_json
from finetune.config.shapes import SHAPES
from finetune.launch import CONFIGS
from finetune.model import smollm2

SMALL, MIDDLE, LARGE = "SmolLM2-135M-Instruct", "Qwen2.5-7B-Instruct", "Qwen2.5-14B-Instruct"
UPDATE = {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 2}
COMMON = {"engine": "transformers", "cudnn_benchmark": False, "cuda_graphs": False, "seed": 1, "save_steps": 0.0}
COMMON |= {"num_train_epochs": 1}
LORA = UPDATE | {"target_modules": "all-linear", "gradient_checkpointing": "off"}
# bitsandbytes' 8-bit AdamW knows no weights in parts (FSDP2); PyTorch's holds moments in the weights' type.
FULL = UPDATE | {"dtype": "bfloat16", "gradient_checkpointing": "plain", "optim": "adamw_torch_fused"}
FULL_8BIT = FULL | {"optim": "adamw_8bit"}
EXACT = {"compute_dtype": "float32", "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
EXACT_FULL = EXACT | {"learning_rate": 2e-5, "dtype": "float32", "optim": "adamw_torch"}
EQUAL_STEPS = 8
# A launch that waits for nothing must not cost the others their time.
LAUNCH_SECONDS = 210


@dataclass(frozen=True)
class Training:
    """One training to measure: a method on a model, on one GPU or on all of them."""

    key: str
    run: str
    model: str
    strategy: str
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return EQUAL_STEPS if self.model == SMALL else WARM_STEPS + TIMED_STEPS


# Launches, each with what it trains one after the other. Those of one GPU run side by side.
LAUNCHES: dict[str, list[list[Training]]] = {
    "speed": [
        [Training("lora_one", "lora", MIDDLE, "one", LORA)],
        [
            Training("full_one", "full", MIDDLE, "one", FULL),
            Training("full_8bit_one", "full", MIDDLE, "one", FULL_8BIT),
        ],
        [
            Training("lora_ddp", "lora", MIDDLE, "ddp", LORA),
            Training("full_8bit_ddp", "full", MIDDLE, "ddp", FULL_8BIT),
        ],
        [Training("lora_fsdp2", "lora", MIDDLE, "fsdp2", LORA), Training("full_fsdp2", "full", MIDDLE, "fsdp2", FULL)],
    ],
    "equality": [
        [
            Training(f"equal_{run}_{strategy}", run, SMALL, strategy, values)
            for run, values in (("lora", EXACT), ("full", EXACT_FULL))
        ]
        for strategy in ("one", "ddp", "fsdp2")
    ],
    "large": [[Training("large_fsdp2", "full", LARGE, "fsdp2", FULL)]],
}
TRAININGS = {one.key: one for part in LAUNCHES.values() for launch in part for one in launch}


def main() -> None:
    """Measure what is asked for, or be one of the processes that do."""
    options = _options()
    if options.work:
        _work(options)
        return
    os.environ["FINETUNE_COMMAND"] = shlex.join(["python", "-m", "benchmarks.processes", *sys.argv[1:]])
    launches = [launch for part in options.parts for launch in LAUNCHES[part]]
    # All this before the data's folder becomes FINETUNE_HOME.
    options.small = str(smollm2.ensure().resolve())
    models = {one.model for launch in launches for one in launch} - {SMALL}
    for name in models:
        shape = {field: value for field, value in SHAPES[name].items() if field != "model_type"}
        layers = options.layers or shape["num_hidden_layers"]
        write_shape(layers, Path(_folder(name, options)), shape)
    with ThreadPoolExecutor(1 + len(models)) as pool:
        # In processes of their own, which give the GPU's memory back.
        written = [pool.submit(_write, name, options) for name in sorted(models)]
        report = _provenance(options)
        for future in written:
            future.result()
    results: dict[str, dict[str, Any]] = {}
    lock = threading.Lock()

    def add(result: dict[str, Any]) -> None:
        with lock:
            results[result["key"]] = result
            in_order = [results[key] for key in TRAININGS if key in results]
            write_json(Path(options.out), report | {"results": in_order, "compared": _compared(results, options)})

    alone = [launch for launch in launches if launch[0].strategy == "one"]
    with ThreadPoolExecutor(options.gpus) as pool:
        list(pool.map(lambda one: _launch(one[1], options, add, one[0] % options.gpus), enumerate(alone)))
    for launch in launches:
        if launch not in alone:
            _launch(launch, options, add)
    print(f"{options.out} holds {len(results)} of {sum(map(len, launches))} trainings")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", metavar="CSV_FOLDER")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--parts", nargs="+", default=["speed", "equality"], choices=LAUNCHES)
    parser.add_argument("--layers", type=int, help="of the 7B and 14B shapes, to try this out")
    parser.add_argument("--scratch", default="/dev/shm")
    parser.add_argument("--out", default="results/processes.json")
    parser.add_argument("--small", help=argparse.SUPPRESS)
    parser.add_argument("--work", nargs="*", default=[], choices=TRAININGS, help=argparse.SUPPRESS)
    return parser.parse_args()


def _folder(model: str, options: argparse.Namespace) -> str:
    return options.small if model == SMALL else str(Path(options.scratch, f"{model}-{options.layers or 'all'}-random"))


def _write(model: str, options: argparse.Namespace) -> None:
    command = [sys.executable, "-m", "benchmarks.part", "model", options.csv, "--model", _folder(model, options)]
    subprocess.run(command, check=True)


def _wanted(one: Training, options: argparse.Namespace) -> dict[str, Any]:
    update = one.overrides["per_device_train_batch_size"] * one.overrides["gradient_accumulation_steps"]
    where = {"model": _folder(one.model, options), "source": "csv", "data_path": options.csv}
    return COMMON | where | {"train_rows": one.steps * update} | one.overrides


def _provenance(options: argparse.Namespace) -> dict[str, Any]:
    from finetune import plan, records

    # Before the processes, none of which then prepares any.
    wanted = {"model": options.small, "source": "csv", "data_path": options.csv}
    data = data_of(plan("base", "gpu", wanted), options.scratch)
    return {
        "environment": records.environment().model_dump(),
        "data": data.reference.model_dump(),
        "gpus": options.gpus,
        "layers": options.layers or "all",
        "steps": {"warm": WARM_STEPS, "timed": TIMED_STEPS},
    }


def _launch(launch: list[Training], options: argparse.Namespace, add, gpu: int = 0) -> None:
    """Run trainings in a process on one GPU, or in processes on all; add each result."""
    strategy, processes = launch[0].strategy, options.gpus if launch[0].strategy != "one" else 1
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{strategy}.yaml")]
        command += ["--num_processes", str(processes), "--main_process_port", "0"]
        command += ["--num_cpu_threads_per_process", str(max(1, (os.cpu_count() or 1) // processes))]
    command += ["-m", "benchmarks.processes", options.csv, "--scratch", options.scratch, "--small", options.small]
    command += ["--layers", str(options.layers)] if options.layers else []
    command += ["--work", *(one.key for one in launch)]
    own = {"CUDA_VISIBLE_DEVICES": str(gpu)} if strategy == "one" else {}
    # Refusals of memory are for users; what fails here is a result.
    environment = os.environ | {"FINETUNE_FORCE": "1", "FINETUNE_PROFILE": "gpu"} | own
    start, reported = time.perf_counter(), set()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as running:
        # SIGTERM: a launcher ends its processes.
        alarm = threading.Timer(LAUNCH_SECONDS, running.terminate)
        alarm.start()
        for line in running.stdout:
            if line.startswith(RESULT):
                result = json.loads(line.removeprefix(RESULT))
                reported.add(result["key"])
                add(result)
        running.wait()
        alarm.cancel()
    for one in launch:
        if one.key not in reported:
            add({"key": one.key, "outcome": f"its launch ended with status {running.returncode}"})
    keys = " ".join(one.key for one in launch)
    print(f"{keys}: {time.perf_counter() - start:.0f} s, exit {running.returncode}", flush=True)


def _work(options: argparse.Namespace) -> None:
    import torch
    from accelerate import PartialState

    from finetune import machine

    PartialState(cpu=not machine.has_cuda())
    for key in options.work:
        try:
            result = _measured(TRAININGS[key], options)
        except Exception as error:
            traceback.print_exc()
            result = {"key": key, "outcome": f"process {machine.rank()}: {type(error).__name__}: {error}"[:300]}
            print(RESULT + json.dumps(result), flush=True)
            # The others may wait for this one: the launcher ends them.
            os._exit(1)
        if machine.rank() == 0:
            print(RESULT + json.dumps(result), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _measured(one: Training, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from accelerate.utils import gather_object
    from safetensors.torch import save_file
    from transformers import TrainerCallback

    from finetune import machine, plan
    from finetune.config.methods import METHODS
    from finetune.notebooks import run_cells
    from finetune.train.processes import whole_weights

    wanted = _wanted(one, options)
    data_of(plan(one.run, "gpu", wanted), options.scratch)
    began, ends = time.perf_counter(), []
    notebook = METHODS[one.run].notebook
    trainer = run_cells(notebook, "newest_checkpoint(trainer)", PROFILE="gpu", OVERRIDES=wanted)["trainer"]

    class Stamps(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            machine.wait_for_gpu()
            ends.append(time.perf_counter())
            if state.global_step == 1:
                # The peak of training, not of loading.
                machine.reset_peak_memory()

    trainer.args.eval_strategy, trainer.args.eval_on_start = "no", False
    trainer.args.save_strategy, trainer.args.logging_steps, trainer.args.report_to = "no", 1, []
    trainer.add_callback(Stamps())
    trainer.train()
    peaks = gather_object([machine.peak_memory()[0]])
    seconds = statistics.median(b - a for a, b in zip(ends[WARM_STEPS - 1 :], ends[WARM_STEPS:], strict=False))
    update = trainer.update[0] * trainer.update[1]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    if one.model == SMALL:
        trained = ((name, value.detach()) for name, value in trainer.model.named_parameters() if value.requires_grad)
        weights = whole_weights(trainer.model, True) if trainer.is_fsdp_enabled else dict(trained)
        if machine.rank() == 0:
            kept = {name: value.cpu().clone() for name, value in weights.items() if value.is_floating_point()}
            save_file(kept, _weights(one.key, options))
    return {
        "key": one.key,
        "run": one.run,
        "model": one.model,
        "strategy": machine.strategy(),
        "processes": machine.processes(),
        "overrides": one.overrides,
        "gpu": machine.gpu_name(),
        "articles_per_second": update / seconds,
        "seconds_per_update": seconds,
        "seconds_to_first_step": ends[0] - began,
        "peak_gib": [peak / 2**30 for peak in peaks],
        "losses": [entry["loss"] for entry in logged],
        "grad_norms": [entry["grad_norm"] for entry in logged],
        "torch": torch.__version__,
    }


def _weights(key: str, options: argparse.Namespace) -> str:
    return str(Path(options.scratch, f"processes-{key}.safetensors"))


def _compared(results: dict[str, dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each training on several GPUs beside the same one on one GPU."""
    return list(_comparisons({key: one for key, one in results.items() if "outcome" not in one}, options))


def _comparisons(results: dict[str, dict[str, Any]], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from safetensors.torch import load_file

    for key, one in results.items():
        method, _, strategy = key.rpartition("_")
        alone = results.get(f"{method}_one")
        if strategy == "one" or alone is None:
            continue
        found: dict[str, Any] = {"key": key, "beside": alone["key"]}
        found["speed_up"] = one["articles_per_second"] / alone["articles_per_second"]
        found["efficiency"] = found["speed_up"] / one["processes"]
        for name in ("losses", "grad_norms"):
            pairs = zip(one[name], alone[name], strict=True)
            found[f"largest_relative_difference_of_{name}"] = max(abs(a - b) / abs(b) for a, b in pairs)
        if one["model"] == SMALL:
            mine, other = (load_file(_weights(each["key"], options)) for each in (one, alone))
            found["same_tensors"] = mine.keys() == other.keys()
            both = mine.keys() & other.keys()
            found["largest_difference_of_a_weight"] = max((mine[n] - other[n]).abs().max().item() for n in both)
            found["largest_weight"] = max(other[name].abs().max().item() for name in both)
        yield found


if __name__ == "__main__":
    main()
