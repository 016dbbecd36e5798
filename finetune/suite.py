"""Run the notebooks headless, in their order, as a user would with Run All; with `--jobs`, several at once.

A step is reused when nothing that it depends on has changed since it last succeeded: its notebook, the engine's
sources, its settings, the data, and the steps before it. A step that this machine cannot run is skipped, with the
reason, and so are the steps that need it; neither counts as passed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import nbformat
from nbclient.exceptions import CellExecutionError, DeadKernelError
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from tqdm import tqdm

from data_prep import UserError
from data_prep.store import MANIFEST, replacing, write_json
from finetune import paths, settings
from finetune.kernels import Kernels

NOTEBOOKS = paths.PROJECT / "notebooks"
# finetune.records knows this name too, but imports transformers, which the runner does without.
RECORD = "record.json"
# A killed training leaves its progress behind; a step of a 7B model on a DGX Spark takes about 20 seconds.
STALE_SECONDS = 300
SECONDS_BETWEEN_INTERRUPTS = 10
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Step:
    """One notebook of the suite.

    Attributes:
        notebook: Its name, without ending.
        run: The run that it makes or evaluates; None for the comparison.
        needs: The steps whose results it reads.
        parameters: What it is given besides PROFILE and OVERRIDES.
        title: Its name in the report, where a notebook serves two steps.
        variant: Overrides of this step alone: another seed, or fewer training rows.
    """

    notebook: str
    run: str | None
    needs: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    title: str = ""
    variant: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.title or self.notebook

    def of_variant(self, variant: Mapping[str, Any]) -> Step:
        """The same step with other overrides, and with the steps of these before it."""
        suffix = f"_{variant['variant']}"
        needs = tuple(name + suffix for name in self.needs)
        return replace(self, needs=needs, title=self.name + suffix, variant=variant)


STEPS = (
    Step("base_model_performance", "base"),
    Step("fine_tuning_full", "full"),
    Step("fine_tuning_full_unsloth", "full_unsloth"),
    Step("fine_tuning_lora", "lora"),
    Step("fine_tuning_qlora", "qlora"),
    Step("full_finetuning_performance", "full", ("fine_tuning_full",), {"RUN": "full"}),
    Step(
        "full_finetuning_performance",
        "full_unsloth",
        ("fine_tuning_full_unsloth",),
        {"RUN": "full_unsloth"},
        title="full_unsloth_finetuning_performance",
    ),
    Step("lora_finetuning_performance", "lora", ("fine_tuning_lora",)),
    Step("qlora_finetuning_performance", "qlora", ("fine_tuning_qlora",)),
    Step("compare_methods", None, ("base_model_performance",)),
)

# Evaluations end with a comparison with it.
BASE = STEPS[0].name

# Of a learning curve, before all rows.
CURVE_ROWS = (250, 1000, 4000)

Status = Literal["done", "reused", "skipped", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What became of a step, and why."""

    step: Step
    status: Status
    seconds: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        seconds = f"{self.seconds:6.1f} s" if self.status == "done" else " " * 8
        return f"{self.status:8} {seconds}  {self.step.name}" + (f": {self.reason}" if self.reason else "")


class Suite:
    """The steps of a profile, with overrides that hold for all of them.

    Args:
        profile: A profile's name, or `auto`.
        overrides: Parameter values for all steps.
        only: Runs to restrict the suite to (`base`, `full`, `lora`, ...; `compare` for the comparison); empty for all.
        fresh: Run every step, whatever can be reused.
        seeds: Trainings of each method, with the seed that is planned and those after it.
        curve: Numbers of training rows to train and evaluate each method on, instead of all.
        jobs: Steps to execute at once, where none needs another.

    Raises:
        UserError: An unknown profile, parameter, value or run, before anything is executed.
    """

    def __init__(
        self,
        profile: str = "auto",
        overrides: Mapping[str, Any] | None = None,
        only: tuple[str, ...] = (),
        fresh: bool = False,
        seeds: int = 1,
        curve: tuple[int, ...] = (),
        jobs: int = 1,
    ):
        self.overrides = dict(overrides or {})
        base = settings.plan("base", profile, self.overrides_for("base"))
        self.profile = base.profile
        self.steps = _curve(_selected(only), curve) if curve else _seeded(_selected(only), base.experiment.seed, seeds)
        self.fresh = fresh
        self.jobs = jobs
        self._keys: dict[str, str] = {}

    @property
    def folder(self) -> Path:
        """Where the executed notebooks go."""
        return paths.results_folder(self.profile) / "notebooks"

    def overrides_for(self, run: str | None, variant: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The overrides that a run knows (the base model has no learning rate), and its variant's."""
        return settings.applicable(self.overrides, run or "base") | dict(variant or {})

    def execute(self) -> list[Outcome]:
        """Run the steps, reusing and skipping what can be; after one that fails, what needs it is skipped.

        Returns:
            What became of each step, in the order in which they ended.
        """
        cells = {step.name: _code_cells(_notebook(step)) for step in self.steps}
        with (
            _Progress(cells, self.profile, self.jobs) as progress,
            Kernels(self.jobs) as kernels,
            # In threads even where there is one: in the main one nbclient 0.11 takes SIGINT for itself, shuts the
            # kernel down twice and ends in an AssertionError.
            ThreadPoolExecutor(self.jobs) as pool,
        ):
            if self.jobs > 1:
                progress.write(str(kernels))
            running: set[Future[Outcome]] = set()
            with _interruptible(running, kernels):
                return self._execute_all(running, kernels, pool, progress)

    def _execute_all(
        self, running: set[Future[Outcome]], kernels: Kernels, pool: ThreadPoolExecutor, progress: _Progress
    ) -> list[Outcome]:
        """Begin with each step as soon as it can be; `running` holds those that are being executed."""
        outcomes: list[Outcome] = []
        waiting = list(self.steps)

        def end(outcome: Outcome) -> None:
            outcomes.append(outcome)
            progress.finish(outcome)

        while True:
            while len(running) < self.jobs and (step := self._next(waiting, outcomes)):
                waiting.remove(step)
                if outcome := self._without_executing(step, outcomes):
                    end(outcome)
                else:
                    running.add(pool.submit(self._execute, step, kernels, progress))
            if not running:
                return outcomes
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                running.remove(future)
                end(future.result())

    def _next(self, waiting: list[Step], outcomes: list[Outcome]) -> Step | None:
        """The first of the steps in waiting that all it reads of have ended for."""
        unfinished = {step.name for step in self.steps} - {outcome.step.name for outcome in outcomes}
        return next((step for step in waiting if not self._awaited(step) & unfinished), None)

    def _awaited(self, step: Step) -> set[str]:
        """The steps that must have ended, if they are to run at all, before one begins."""
        if step.run is None:
            return {other.name for other in self.steps if other.run}
        return {*step.needs, BASE} if step.needs else set()

    def _without_executing(self, step: Step, before: list[Outcome]) -> Outcome | None:
        """What becomes of a step that need not or cannot be executed."""
        status = {outcome.step.name: outcome.status for outcome in before}
        # The comparison does without what this machine cannot run, but not without what went wrong.
        failed = [name for name in status if name in self._awaited(step) and status[name] == "failed"]
        skipped = [name for name in step.needs if status.get(name) == "skipped"]
        if failed or skipped:
            return Outcome(step, "skipped", reason=f"{failed[0]} failed" if failed else f"{skipped[0]} was skipped")
        try:
            key = self._key(step)
        except settings.UnavailableHere as error:
            return Outcome(step, "skipped", reason=str(error))
        if not self.fresh and self._is_done(step, key):
            return Outcome(step, "reused", reason="nothing that it depends on has changed")
        return None

    def _execute(self, step: Step, kernels: Kernels, progress: _Progress) -> Outcome:
        notebook = parameterize_notebook(
            _notebook(step),
            {"PROFILE": self.profile, "OVERRIDES": self.overrides_for(step.run, step.variant), **step.parameters},
        )
        stamp = self._stamp(step)
        stamp.unlink(missing_ok=True)
        start = time.perf_counter()
        try:
            kernels.execute(
                notebook,
                NOTEBOOKS,
                on_cell_start=lambda number: progress.cell(step, number + 1, len(notebook.cells)),
                on_cell_executed=lambda: progress.advance(step),
            )
        except CellExecutionError as error:
            return Outcome(step, "failed", reason=f"{error.ename}: {ANSI.sub('', error.evalue)}")
        except DeadKernelError:
            return Outcome(step, "failed", reason="its kernel died, or did not start; out of memory is the usual cause")
        finally:
            with replacing(self.folder / f"{step.name}.ipynb") as file:
                nbformat.write(notebook, file)
        seconds = time.perf_counter() - start
        # The data may just have been prepared: the key that a later run computes includes it.
        self._keys.pop(step.name, None)
        write_json(stamp, {"key": self._key(step), "seconds": round(seconds, 1)})
        return Outcome(step, "done", seconds)

    def _is_done(self, step: Step, key: str) -> bool:
        stamp = self._stamp(step)
        return stamp.is_file() and json.loads(stamp.read_text())["key"] == key and self._result(step).exists()

    def _stamp(self, step: Step) -> Path:
        return self.folder / f".{step.name}.json"

    def _trains(self, step: Step) -> bool:
        return step.notebook.startswith("fine_tuning")

    def _result(self, step: Step) -> Path:
        """What a step leaves behind, and is nothing without."""
        if step.run is None:
            return paths.results_folder(self.profile) / "report.html"
        plan = self._plan(step)
        return plan.artefact_folder if self._trains(step) else plan.run_folder / "predictions.jsonl"

    def _plan(self, step: Step) -> settings.Settings:
        return settings.plan(step.run or "base", self.profile, self.overrides_for(step.run, step.variant))

    def _key(self, step: Step) -> str:
        """Changes when anything does that the step's result depends on."""
        if step.name not in self._keys:
            plan = self._plan(step)
            manifest = paths.dataset_folder(plan.experiment.source) / MANIFEST
            parts = [
                (NOTEBOOKS / f"{step.notebook}.ipynb").read_bytes(),
                _sources_digest().encode(),
                (plan.training_digest if self._trains(step) else plan.digest).encode(),
                manifest.read_bytes() if manifest.is_file() else b"",
                *self._read_records(step),
            ]
            self._keys[step.name] = hashlib.sha256(b"\0".join(parts)).hexdigest()
        return self._keys[step.name]

    def _read_records(self, step: Step) -> Iterator[bytes]:
        """What a step reads of the records: an evaluation its training's part, the comparison all of them."""
        if step.run is None:
            yield from (path.read_bytes() for path in sorted(paths.results_folder(self.profile).rglob(RECORD)))
        elif step.needs:
            path = self._plan(step).run_folder / RECORD
            if path.is_file():
                yield json.dumps(json.loads(path.read_text())["training"]).encode()


class _Progress:
    """A bar over all cells: what runs, elapsed, and how far a training is. Silent without a terminal.

    Args:
        cells: Cells of code of each step, by its name.
        profile: Whose trainings are looked for.
        jobs: With one, the bar tells the cell of the step that runs; with several, the names of those that do.
    """

    def __init__(self, cells: Mapping[str, int], profile: str, jobs: int):
        several = "{bar:20}| {n_fmt}/{total_fmt} cells, {elapsed}{postfix}, {desc}"
        shown = "{l_bar}{bar:20}| {elapsed}{postfix}" if jobs == 1 else several
        self._bar = tqdm(total=sum(cells.values()), unit="cell", disable=None, bar_format=shown)
        self._cells = cells
        self._profile = profile
        self._jobs = jobs
        self._stop = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        # Cells done of each step that runs; each step tells of its own from a thread of its own.
        self._done: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __enter__(self) -> _Progress:
        self._ticker.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._ticker.join()
        self._bar.close()

    def write(self, text: str) -> None:
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def cell(self, step: Step, number: int, count: int) -> None:
        with self._lock:
            self._done.setdefault(step.name, 0)
            names = ", ".join(self._done)
            self._bar.set_description_str(f"{names}, cell {number}/{count}" if self._jobs == 1 else names)

    def advance(self, step: Step) -> None:
        with self._lock:
            self._done[step.name] += 1
            self._bar.update()

    def finish(self, outcome: Outcome) -> None:
        with self._lock:
            name = outcome.step.name
            self._bar.update(self._cells[name] - self._done.pop(name, 0))
            if self._done:
                self._bar.set_description_str(", ".join(self._done))
            self.write(str(outcome))

    def _tick(self) -> None:
        """Keep the elapsed time moving through long cells."""
        while not self._stop.wait(1):
            self._bar.set_postfix_str(_training_progress(self._profile))


@contextlib.contextmanager
def _interruptible(running: set[Future[Outcome]], kernels: Kernels) -> Iterator[None]:
    """Before it goes up, Ctrl-C interrupts the cells that run and ends their kernels; another error waits for them."""
    try:
        try:
            yield
        except Exception:
            wait(running)
            raise
    except KeyboardInterrupt:
        kernels.interrupt()
        # Again and again: one gets lost in a kernel that has not begun with the cell that it was sent, or in a library
        # that swallows it while it is imported.
        while wait(running, timeout=SECONDS_BETWEEN_INTERRUPTS).not_done:
            kernels.interrupt()
        raise


def _training_progress(profile: str) -> str:
    """How far the training that runs now is, empty if none does."""
    for path in paths.results_folder(profile).rglob("progress.json"):
        # The file is replaced at every step and removed at the end, perhaps between glob and read.
        with contextlib.suppress(FileNotFoundError):
            state = json.loads(path.read_text())
            if time.time() - state["updated"] > STALE_SECONDS:
                continue
            return f"step {state['step']}/{state['total_steps']}, {state['seconds_left']} s left"
    return ""


def _selected(only: tuple[str, ...]) -> tuple[Step, ...]:
    known = [*settings.RUNS, "compare"]
    unknown = [name for name in only if name not in known]
    if unknown:
        raise UserError(f"--only {unknown[0]}: there is no such run; the runs are: {', '.join(known)}")
    return tuple(step for step in STEPS if not only or (step.run or "compare") in only)


def _seeded(steps: tuple[Step, ...], first: int, seeds: int) -> tuple[Step, ...]:
    """The steps, and those of every trained run for each further seed, before the comparison."""
    variants = [{"seed": seed, "variant": f"seed-{seed}"} for seed in range(first + 1, first + seeds)]
    return _before_the_comparison(steps, variants)


def _curve(steps: tuple[Step, ...], rows: tuple[int, ...]) -> tuple[Step, ...]:
    """The steps of every trained run for each number of rows, and the comparison; all rows are the run itself."""
    trained = _before_the_comparison(steps, [settings.fewer_rows(count) for count in rows])
    return tuple(step for step in trained if step.variant or step.run is None)


def _before_the_comparison(steps: tuple[Step, ...], variants: list[dict[str, Any]]) -> tuple[Step, ...]:
    trained = [step for step in steps if step.run not in (None, "base")]
    repeated = [step.of_variant(variant) for variant in variants for step in trained]
    return (*(step for step in steps if step.run), *repeated, *(step for step in steps if not step.run))


def _notebook(step: Step) -> nbformat.NotebookNode:
    return load_notebook_node(str(NOTEBOOKS / f"{step.notebook}.ipynb"))


def _code_cells(notebook: nbformat.NotebookNode) -> int:
    # One more: the cell with the injected parameters.
    return sum(cell.cell_type == "code" for cell in notebook.cells) + 1


def _sources() -> Iterator[Path]:
    for package in ("data_prep", "finetune"):
        yield from sorted((paths.PROJECT / package).rglob("*.py"))
        yield from sorted((paths.PROJECT / package).rglob("*.csv"))
        yield from sorted((paths.PROJECT / package).rglob("*.html"))


def _sources_digest() -> str:
    content = hashlib.sha256()
    for path in _sources():
        content.update(path.read_bytes())
    return content.hexdigest()
