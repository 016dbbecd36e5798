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
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import nbformat
from nbclient.exceptions import CellExecutionError, DeadKernelError
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from data_prep import UserError
from data_prep.files import MANIFEST, replacing, write_json
from finetune import keys, paths, records
from finetune.config.methods import METHODS
from finetune.config.plan import EVALUATION_ONLY, NAMING, Settings, UnavailableHere, applicable, fewer_rows, plan
from finetune.files import folder_digest
from finetune.kernels import Kernels
from finetune.launch import driver
from finetune.progress import Progress

NOTEBOOKS = paths.PROJECT / "notebooks"
RECORD = records.RECORD
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
        shared: Processes that train and evaluate each model together, and how: `ddp` or `fsdp2`.

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
        shared: tuple[int, str] = (1, "ddp"),
    ):
        self.overrides = dict(overrides or {})
        base = plan("base", profile, self.overrides_for("base"))
        self.profile, self.task, self.place = base.profile, base.task.name, base.place
        self.steps = _curve(_selected(only), curve) if curve else _seeded(_selected(only), base.experiment.seed, seeds)
        self.fresh, self.shared = fresh, shared
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
            progress = stack.enter_context(Progress(self.steps, self.place))
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

    def _execute(self, step: Step, kernels: Kernels, progress: Progress) -> Outcome:
        notebook = parameterize_notebook(
            _notebook(step),
            {"PROFILE": self.profile, "TASK": self.task, **self._given(step), **step.parameters},
        )
        if METHODS[step.run or "base"].recipe:
            # The base model's notebook goes on with its model.
            notebook = driver(notebook, self.folder / f".{step.name}.processes.ipynb", *self.shared)
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
        try:
            made = json.loads(self._stamp(step).read_bytes())
            if made["key"] != self._key(step):
                return None
            self._check_result(step)
        except (FileNotFoundError, ValueError, KeyError, TypeError, UserError):
            # Not there, or damaged: made again.
            return None
        return made.get("commit", "unknown")

    def _stamp(self, step: Step) -> Path:
        return self.folder / f".{step.name}.json"

    def _check_result(self, step: Step) -> None:
        """Raise an error if what a step leaves behind is not there, or damaged."""
        if step.kind == "compare":
            (paths.results_folder(self.place) / "report.html").stat()
            return
        folder = self._plans[step.name].run_folder
        record = records.read(folder)
        if step.kind == "evaluate":
            records.read_predictions(record, folder)
        elif folder_digest(paths.home() / record.training.artefact) != record.training.artefact_digest:
            raise UserError(f"{record.training.artefact} is damaged")

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
            # One that is damaged is said by the step that reads it.
            with contextlib.suppress(UserError):
                yield records.read(self._plans[step.name].run_folder).training.artefact_digest.encode()


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
