"""What `run` shows while notebooks execute: the step, how far its training is, and the first figures."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from finetune import paths, records

# A killed training leaves its progress behind; a step of a 7B model on a DGX Spark takes about 20 seconds.
STALE_SECONDS = 300
SECONDS_BETWEEN_LINES = 30


class Progress:
    """What runs, for how long, and how far a training is: a bar in a terminal, lines elsewhere; and the first figures.

    Args:
        steps: All steps, each with a `name`.
        place: Where trainings and records are looked for.
    """

    def __init__(self, steps: Sequence, place: str):
        self._place = place
        self._steps = steps
        self._bar = tqdm(total=len(steps), unit="step", disable=None, bar_format="{l_bar}{bar:20}| {elapsed}{postfix}")
        self._now = ""
        self._cells = 0
        self._shown: set[str] = set()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def _write(self, text: str) -> None:
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def start(self, step, cells: int) -> None:
        self._now, self._cells = step.name, cells
        self._begun = self._told = time.monotonic()
        self._shown |= self._records().keys()
        if self._bar.disable:
            self._write(f"running            {step.name} ({self._steps.index(step) + 1} of {len(self._steps)})")

    def cell(self, number: int) -> None:
        self._bar.set_description_str(f"{self._now}, cell {number + 1}/{self._cells}")

    def advance(self) -> None:
        """Show each accuracy on the test rows as soon as its record is there."""
        there = self._records()
        for path in [path for key, path in there.items() if key not in self._shown]:
            record = json.loads(path.read_bytes())
            scoring = record.get("scoring") or (record.get("evaluation") or {}).get("scoring")
            if scoring:
                name = path.parent.relative_to(paths.results_folder(self._place))
                self._write(
                    f"                   {name}: {scoring['accuracy']:.1%} of {scoring['rows']:,} test rows right"
                )
        self._shown |= there.keys()

    def _records(self) -> dict[str, Path]:
        """The records that are there, by path and time: a clock that was set back says nothing of their order."""
        found = sorted(paths.results_folder(self._place).rglob(records.RECORD))
        return {f"{path} {path.stat().st_mtime_ns}": path for path in found}

    def tick(self) -> None:
        training = training_progress(self._place)
        if not self._bar.disable:
            self._bar.set_postfix_str(training)
        elif time.monotonic() - self._told >= SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            seconds = round(self._told - self._begun)
            self._write(f"                   {self._now}: {seconds} s" + (f", {training}" if training else ""))

    def finish(self, outcome) -> None:
        self._bar.update()
        self._write(str(outcome))


def training_progress(place: str) -> str:
    """How far the training that runs now is, empty if none does."""
    for path in paths.state_folder(place, "").parent.glob(f"{place}-*/progress.json"):
        # The file is replaced at every step and removed at the end, perhaps between glob and read.
        with contextlib.suppress(FileNotFoundError):
            state = json.loads(path.read_bytes())
            if time.time() - state["updated"] > STALE_SECONDS:
                continue
            return f"step {state['step']}/{state['total_steps']}, {state['seconds_left']} s left"
    return ""
