"""Run the notebooks headless, one after the other in their order, as a user would with Run All.

A step is reused when nothing that its result depends on has changed since it last succeeded: the code cells of its
notebook, its settings, the data, the artefacts or records that it reads, and the modules that compute it (`keys`).
Comments, tables, pictures and templates train no model again. A step that this machine or its settings do not allow
is skipped, with the reason, and so are the steps that need it; neither counts as passed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import nbformat
from nbclient.exceptions import CellExecutionError, DeadKernelError
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from tqdm import tqdm

from data_prep import UserError
from data_prep.files import MANIFEST, replacing, write_json
from finetune import keys, paths, predictions, records
from finetune.config.methods import METHODS
from finetune.config.plan import EVALUATION_ONLY, NAMING, Settings, UnavailableHere, applicable, fewer_rows, plan
from finetune.kernels import Kernels

NOTEBOOKS = paths.PROJECT / "notebooks"
RECORD = records.RECORD
# A killed training leaves its progress behind; a step of a 7B model on a DGX Spark takes about 20 seconds.
STALE_SECONDS = 300
SECONDS_BETWEEN_LINES = 30
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

    @property
    def kind(self) -> Literal["train", "evaluate", "compare"]:
        if self.run is None:
            return "compare"
        return "train" if self.notebook == METHODS[self.run].notebook else "evaluate"

    def of_variant(self, variant: Mapping[str, Any]) -> Step:
        """The same step with other overrides, and with the steps of these before it."""
        suffix = f"_{variant['variant']}"
        needs = tuple(name + suffix for name in self.needs)
        return replace(self, needs=needs, title=self.name + suffix, variant=variant)


def _steps() -> tuple[Step, ...]:
    """The base model, all trainings, their evaluations, the comparison."""
    trained = {run: method for run, method in METHODS.items() if method.recipe}
    base = METHODS["base"].evaluation
    evaluations = []
    for run, method in trained.items():
        # Where methods share a notebook, it is told which one it evaluates.
        shared = [other for other in trained.values() if other.evaluation == method.evaluation]
        title = "" if method is shared[0] else method.notebook.replace("fine_tuning_", "") + "_finetuning_performance"
        parameters = {"RUN": run} if len(shared) > 1 else {}
        evaluations.append(Step(method.evaluation, run, (method.notebook,), parameters, title))
    return (
        Step(base, "base"),
        *(Step(method.notebook, run) for run, method in trained.items()),
        *evaluations,
        Step("compare_methods", None, (base,)),
    )


STEPS = _steps()

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

    Raises:
        UserError: An unknown profile, parameter or run, or values that no run allows, before anything is executed.
    """

    def __init__(
        self,
        profile: str = "auto",
        overrides: Mapping[str, Any] | None = None,
        only: tuple[str, ...] = (),
        fresh: bool = False,
        seeds: int = 1,
        curve: tuple[int, ...] = (),
    ):
        self.overrides = dict(overrides or {})
        base = plan("base", profile, self.overrides_for("base"))
        self.profile, self.task, self.place = base.profile, base.task.name, base.place
        self.steps = _curve(_selected(only), curve) if curve else _seeded(_selected(only), base.experiment.seed, seeds)
        self.fresh = fresh
        self._plans: dict[str, Settings] = {}
        self._refused: dict[str, UserError] = {}
        for step in self.steps:
            try:
                self._plans[step.name] = self._plan(step)
            except UserError as error:
                self._refused[step.name] = error
        trained = [step.name for step in self.steps if step.kind == "train"]
        refused = [self._refused[name] for name in trained if name in self._refused]
        if trained and len(refused) == len(trained) and not isinstance(refused[0], UnavailableHere):
            raise refused[0]

    @property
    def folder(self) -> Path:
        """Where the executed notebooks go."""
        return paths.results_folder(self.place) / "notebooks"

    def overrides_for(self, run: str | None, variant: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The overrides that a run knows (the base model has no learning rate), and its variant's."""
        return applicable(self.overrides, run or "base") | dict(variant or {})

    def execute(self) -> list[Outcome]:
        """Run the steps, reusing and skipping what can be; after one that fails, what needs it is skipped.

        Returns:
            What became of each step, in the order in which they ended.
        """
        outcomes: list[Outcome] = []
        with contextlib.ExitStack() as stack:
            progress = stack.enter_context(_Progress(self.steps, self.place))
            kernels: Kernels | None = None
            for step in self.steps:
                outcome = self._without_executing(step, outcomes)
                if outcome is None:
                    # Not before a step needs them: the first one imports the libraries.
                    kernels = kernels or stack.enter_context(Kernels())
                    outcome = self._execute(step, kernels, progress)
                outcomes.append(outcome)
                progress.finish(outcome)
        return outcomes

    def _without_executing(self, step: Step, before: list[Outcome]) -> Outcome | None:
        """What becomes of a step that need not or cannot be executed."""
        status = {outcome.step.name: outcome.status for outcome in before}
        # Evaluations end with a comparison with the base. The comparison does without what this machine cannot run, but
        # not without what went wrong.
        needs = status.keys() if step.kind == "compare" else {*step.needs, *([BASE] if step.needs else [])}
        failed = [name for name in status if name in needs and status[name] == "failed"]
        skipped = [name for name in step.needs if status.get(name) == "skipped"]
        if failed or skipped:
            return Outcome(step, "skipped", reason=f"{failed[0]} failed" if failed else f"{skipped[0]} was skipped")
        if step.name in self._refused:
            return Outcome(step, "skipped", reason=str(self._refused[step.name]))
        made = None if self.fresh else self._made(step)
        if made is None:
            return None
        return Outcome(step, "reused", reason=f"made by commit {made}; nothing that it depends on has changed")

    def _execute(self, step: Step, kernels: Kernels, progress: _Progress) -> Outcome:
        notebook = parameterize_notebook(
            _notebook(step),
            {"PROFILE": self.profile, "TASK": self.task, **self._given(step), **step.parameters},
        )
        stamp = self._stamp(step)
        stamp.unlink(missing_ok=True)
        start = time.perf_counter()
        progress.start(step, len(notebook.cells))
        try:
            kernels.execute(notebook, NOTEBOOKS, progress.cell, progress.advance, progress.tick)
        except CellExecutionError as error:
            return Outcome(step, "failed", reason=f"{error.ename}: {ANSI.sub('', error.evalue)}")
        except DeadKernelError:
            return Outcome(step, "failed", reason="its kernel died, or did not start; out of memory is the usual cause")
        finally:
            with replacing(self.folder / f"{step.name}.ipynb") as file:
                nbformat.write(notebook, file)
        seconds = time.perf_counter() - start
        # The data may just have been prepared, so that the key is computed now.
        commit = records.environment().short_commit
        write_json(stamp, {"key": self._key(step), "seconds": round(seconds, 1), "commit": commit})
        return Outcome(step, "done", seconds)

    def _made(self, step: Step) -> str | None:
        """The commit that made the step's result, if that is still what would come out; None otherwise."""
        stamp = self._stamp(step)
        if not stamp.is_file() or not self._result(step).exists():
            return None
        made = json.loads(stamp.read_text())
        return made.get("commit", "unknown") if made["key"] == self._key(step) else None

    def _stamp(self, step: Step) -> Path:
        return self.folder / f".{step.name}.json"

    def _result(self, step: Step) -> Path:
        """What a step leaves behind, and is nothing without."""
        if step.kind == "compare":
            return paths.results_folder(self.place) / "report.html"
        plan = self._plans[step.name]
        return plan.artefact_folder if step.kind == "train" else plan.run_folder / predictions.FILE

    def _given(self, step: Step) -> dict[str, Any]:
        """The overrides of a notebook: the comparison takes those that name the runs, the evaluation of a trained model
        also its own."""
        overrides = self.overrides_for(step.run, step.variant)
        if step.kind == "compare" or (step.kind == "evaluate" and METHODS[step.run].recipe):
            known = NAMING if step.kind == "compare" else NAMING | EVALUATION_ONLY
            overrides = {name: value for name, value in overrides.items() if name in known}
        return {"OVERRIDES": overrides}

    def _plan(self, step: Step) -> Settings:
        return plan(step.run or "base", self.profile, self.overrides_for(step.run, step.variant))

    def _key(self, step: Step) -> str:
        """Changes when anything does that the step's result depends on."""
        plan = self._plans[step.name]
        manifest = paths.dataset_folder(plan.experiment.source, plan.place) / MANIFEST
        cells = [cell.source for cell in _notebook(step).cells if cell.cell_type == "code"]
        parts = [
            *(cell.encode() for cell in cells),
            # The comparison has no settings of its own: the records that it reads hold those of the runs.
            {"train": plan.training_digest, "evaluate": plan.digest, "compare": ""}[step.kind].encode(),
            plan.task.digest.encode(),
            manifest.read_bytes() if manifest.is_file() else b"",
            *(keys.code(path) for path in sorted(keys.sources(step.kind))),
            *([] if step.kind == "compare" else keys.model_files(plan.experiment.model)),
            *self._reads(step),
        ]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()

    def _reads(self, step: Step) -> Iterator[bytes]:
        """What a step reads of other steps: an evaluation its artefact, the comparison all records."""
        if step.kind == "compare":
            yield from (path.read_bytes() for path in sorted(paths.results_folder(self.place).rglob(RECORD)))
        elif step.needs:
            path = self._plans[step.name].run_folder / RECORD
            if path.is_file():
                yield json.loads(path.read_text())["training"]["artefact_digest"].encode()


class _Progress:
    """What runs, for how long, and how far a training is: a bar in a terminal, lines elsewhere; and the first figures.

    Args:
        steps: All steps.
        place: Where trainings and records are looked for.
    """

    def __init__(self, steps: tuple[Step, ...], place: str):
        self._place = place
        self._steps = steps
        self._bar = tqdm(total=len(steps), unit="step", disable=None, bar_format="{l_bar}{bar:20}| {elapsed}{postfix}")
        self._now = ""
        self._cells = 0
        self._shown: set[str] = set()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def _write(self, text: str) -> None:
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def start(self, step: Step, cells: int) -> None:
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
        found = sorted(paths.results_folder(self._place).rglob(RECORD))
        return {f"{path} {path.stat().st_mtime_ns}": path for path in found}

    def tick(self) -> None:
        training = _training_progress(self._place)
        if not self._bar.disable:
            self._bar.set_postfix_str(training)
        elif time.monotonic() - self._told >= SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            seconds = round(self._told - self._begun)
            self._write(f"                   {self._now}: {seconds} s" + (f", {training}" if training else ""))

    def finish(self, outcome: Outcome) -> None:
        self._bar.update()
        self._write(str(outcome))


def _training_progress(place: str) -> str:
    """How far the training that runs now is, empty if none does."""
    for path in paths.state_folder(place, "").parent.glob(f"{place}-*/progress.json"):
        # The file is replaced at every step and removed at the end, perhaps between glob and read.
        with contextlib.suppress(FileNotFoundError):
            state = json.loads(path.read_bytes())
            if time.time() - state["updated"] > STALE_SECONDS:
                continue
            return f"step {state['step']}/{state['total_steps']}, {state['seconds_left']} s left"
    return ""


def _selected(only: tuple[str, ...]) -> tuple[Step, ...]:
    known = [*METHODS, "compare"]
    unknown = [name for name in only if name not in known]
    if unknown:
        raise UserError(f"--only {unknown[0]}: there is no such run; the runs are: {', '.join(known)}")
    wanted = only or (*(run for run, method in METHODS.items() if method.by_default), "compare")
    return tuple(step for step in STEPS if (step.run or "compare") in wanted)


def _seeded(steps: tuple[Step, ...], first: int, seeds: int) -> tuple[Step, ...]:
    """The steps, and those of every trained run for each further seed, before the comparison."""
    variants = [{"seed": seed, "variant": f"seed-{seed}"} for seed in range(first + 1, first + seeds)]
    return _before_the_comparison(steps, variants)


def _curve(steps: tuple[Step, ...], rows: tuple[int, ...]) -> tuple[Step, ...]:
    """The steps of every trained run for each number of rows, and the comparison; all rows are the run itself."""
    trained = _before_the_comparison(steps, [fewer_rows(count) for count in rows])
    return tuple(step for step in trained if step.variant or step.run is None)


def _before_the_comparison(steps: tuple[Step, ...], variants: list[dict[str, Any]]) -> tuple[Step, ...]:
    trained = [step for step in steps if step.run not in (None, "base")]
    repeated = [step.of_variant(variant) for variant in variants for step in trained]
    return (*(step for step in steps if step.run), *repeated, *(step for step in steps if not step.run))


def _notebook(step: Step) -> nbformat.NotebookNode:
    return load_notebook_node(str(NOTEBOOKS / f"{step.notebook}.ipynb"))
