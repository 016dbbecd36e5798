"""Speed and memory of training and evaluation on one GPU: a ladder of optimisations, and the peer beside it.

    python -m benchmarks.throughput CSV_FOLDER [--layers 28] [--only PART ...] [--rungs KEY ...] [--gpus 1] [--out FILE]

CSV_FOLDER holds AG News' train.csv and test.csv. The model has the shape of Qwen2.5-7B and random weights: time and
memory do not depend on their values. Its tokenizer is the embedded model's, whose articles are about as long as
Qwen's. Every part is measured in a process of its own, alone on its GPU. With several GPUs the parts share them out.
Interrupted, the same command goes on from there: what FILE holds is kept if commit, packages and kind of GPU are the
same.

`python -m benchmarks.render FILE` prints the tables; docs/speed.md says how we count.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

from benchmarks import ladder
from benchmarks.part import RESULT, data_of
from data_prep.files import write_json

# A part that compiles without end must not cost the others their time.
PART_SECONDS = 420


def main() -> None:
    """Measure the parts that are asked for."""
    options = _options()
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
    print(f"{options.out} holds {len(measurements.results)} rows; tables: python -m benchmarks.render {options.out}")


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
        data = data_of(plan("base", "gpu", wanted | {"prompt": prompt}), options.scratch)
    return {
        "environment": records.environment().model_dump(),
        "data": data.reference.model_dump(),
        "model": f"Qwen2.5-7B's shape with random weights, {options.layers} layers",
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", metavar="CSV_FOLDER")
    parser.add_argument("--layers", type=int, default=28)
    keys = [key for part in ladder.ALL_PARTS for key in ladder.keys_of(part)]
    parser.add_argument("--only", nargs="*", default=[], choices=ladder.ALL_PARTS, metavar="PART")
    parser.add_argument("--rungs", nargs="*", default=[], choices=keys, metavar="KEY")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs to share the parts out to")
    parser.add_argument("--scratch", default="/dev/shm")
    parser.add_argument("--out", default="results/throughput.json")
    return parser.parse_args()


def _command(part: str, options: argparse.Namespace, model: Path) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.part", part, options.csv, "--model", str(model)]
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

    from finetune.model import smollm2

    tokenizer = AutoTokenizer.from_pretrained(smollm2.folder())
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


if __name__ == "__main__":
    main()
