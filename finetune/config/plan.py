"""What will run: profile, experiment and recipe, resolved from defaults, profile, environment and overrides.

Later ones win: default < profile < environment (FINETUNE_LEARNING_RATE=1e-4) < override. An unknown profile,
parameter or value is refused with the list of what exists.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass

from data_prep import Task, UserError, find_task
from finetune import machine, paths
from finetune.config import embedded
from finetune.config.methods import METHODS
from finetune.config.profiles import MODEL, PROFILES, TASK, choose_profile, place
from finetune.config.recipes import STRICT, Count, Recipe, check
from finetune.files import short_digest

if TYPE_CHECKING:
    # It takes most of the time of `import finetune`; a plan needs it for its table alone.
    import pandas as pd
    from pandas.io.formats.style import Styler

ENVIRONMENT_PREFIX = "FINETUNE_"
# Origins of values that nobody chose: of the experiment, and of a method's recipe.
DEFAULT = ("default", "recipe")
EVALUATION_ONLY = {
    "test_rows",
    "generation_rows",
    "few_shot_examples",
    "logistic_rows",
    "encoder_rows",
    "per_device_eval_batch_size",
    "evaluation_kernels",
}
# What tells which training an evaluation is of.
NAMING = {"task", "model", "variant"}
# Files and folders, or names on the hub.
PLACES = ("model", "data_path")
# Settings of the process, not parameters of an experiment.
NOT_PARAMETERS = {
    "FINETUNE_HOME",
    "FINETUNE_PROFILE",
    "FINETUNE_COMMAND",
    "FINETUNE_FORCE",
    "FINETUNE_MEMORY_FLOOR",
    "FINETUNE_PROCESSES",
}


@dataclass(frozen=True, config=STRICT)
class Experiment:
    """What is asked: which model, which rows, which prompt, evaluated how."""

    model: Annotated[str, Field(min_length=1)] = MODEL
    """A causal chat model: a hub name, a folder, or `embedded` (SmolLM2-135M-Instruct from a PyPI wheel)."""
    task: str = TASK
    """Texts and labels: `ag_news`, or a file `tasks/NAME.yaml` of your own."""
    source: Literal["sample", "files", "hub", "csv"] = "sample"
    """Where the rows come from, of the sources that the task has; its own where it lacks this one. `csv` is a folder in
    the task's form."""
    data_path: str | None = None
    """The folder for source=csv; else other files or another data set than the task's."""
    prompt: str = "lean"
    """The prompt before every text: `lean` asks for one of the labels, `verbose` explains them."""
    normalise: bool = True
    """Repair the task's text artefacts (AG News: #39; &lt;b&gt; and backslashes)."""
    train_rows: Count | None = None
    """Training rows to use, drawn evenly from the classes; all if not given."""
    validation_rows: Annotated[int, Field(ge=4)] = 2000
    """Training rows to set aside for validation, if the source has no validation split and the task names no share."""
    test_rows: Count | None = None
    """Test rows to use, drawn evenly from the classes; all if not given."""
    generation_rows: Annotated[int, Field(ge=0)] = 1000
    """Test rows that the model also answers by generation; 0: none."""
    logistic_rows: Annotated[int, Field(ge=0)] = 20_000
    """Training rows that the logistic regression on the untuned model's states reads, at most; 0: there is none."""
    encoder_rows: Annotated[int, Field(ge=0)] = 20_000
    """Training rows that the sentence encoder's logistic regression reads, at most; 0: there is none."""
    few_shot_examples: Annotated[int, Field(ge=1)] = 8
    """Training rows in the prompt of the few-shot baseline, drawn evenly from the classes."""
    per_device_eval_batch_size: Count = 64
    """Articles per forward pass of the evaluation; the result does not depend on it."""
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the matrix products; `auto`: bfloat16 on a GPU, the faster of both on a CPU."""
    evaluation_kernels: Literal["fused", "plain"] = "fused"
    """Kernels of the evaluation on a GPU for norms, rotary embeddings and activations: Liger's or PyTorch's."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of a training: the initialisation and the order of the rows."""
    data_seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of the validation split and of the row selection, the same for all trainings of a comparison."""
    variant: Annotated[str, Field(pattern="^[a-z0-9-]*$")] = ""
    """Sub-folder of a further seed or number of rows (seed-43, rows-250); `run --seeds` and `curve` set it."""

    @property
    def model_name(self) -> str:
        """The model's name for people."""
        return embedded.NAME if self.model == "embedded" else self.model


@plain_dataclass(frozen=True)
class Settings:
    """Everything that determines a run, with where each value came from."""

    run: str
    profile: str
    profile_reason: str
    engine: Literal["transformers", "unsloth"]
    engine_reason: str
    experiment: Experiment
    recipe: Recipe | None
    origins: Mapping[str, str]

    @property
    def values(self) -> dict[str, Any]:
        """All parameters by name."""
        return asdict(self.experiment) | (asdict(self.recipe) if self.recipe else {})

    @property
    def task(self) -> Task:
        """The task that the experiment is on."""
        return find_task(self.experiment.task)

    @property
    def digest(self) -> str:
        """12 hexadecimal digits that change when anything that determines the run changes."""
        return self._digest_of(self.values)

    @property
    def training_digest(self) -> str:
        """The same of what determines the training alone: a model may be evaluated in more ways than one."""
        return self._digest_of({name: value for name, value in self.values.items() if name not in EVALUATION_ONLY})

    @property
    def place(self) -> str:
        """The name of its folders."""
        return place(self.profile, self.experiment.task, self.experiment.model)

    @property
    def run_folder(self) -> Path:
        return paths.run_folder(self.place, self.run, self.experiment.variant)

    @property
    def state_folder(self) -> Path:
        return paths.state_folder(self.place, self.run, self.experiment.variant)

    @property
    def artefact_folder(self) -> Path:
        return paths.artefact_folder(self.place, self.run, self.recipe.adapter, self.experiment.variant)

    def _digest_of(self, values: dict[str, Any]) -> str:
        return short_digest([self.run, self.engine, values])

    def table(self) -> pd.DataFrame:
        """Parameter, value, origin and meaning, one row a parameter: what was asked for first, defaults last."""
        import pandas as pd

        rank = {"override": 0, "environment": 1, f"profile {self.profile}": 2, f"task {self.task.name}": 2}
        names = sorted(self.values, key=lambda name: rank.get(self.origins[name], 3))
        rows = [(name, str(self.values[name]), self.origins[name], meaning(name)) for name in names]
        return pd.DataFrame(rows, columns=["parameter", "value", "from", "meaning"]).set_index("parameter")

    def _repr_html_(self) -> str:
        table = self.table()
        is_default = table["from"].isin(DEFAULT)
        engine = f"; engine <code>{self.engine}</code> ({self.engine_reason})" if self.recipe else ""
        return (
            f"<p><b>{METHODS[self.run].title}</b>: "
            f"profile <code>{self.profile}</code> ({self.profile_reason}){engine}</p>"
            f"{left_aligned(table[~is_default]).to_html()}"
            f"<details><summary>{is_default.sum()} parameters have their default values</summary>"
            f"{left_aligned(table[is_default]).to_html()}</details>"
        )


def left_aligned(table: pd.DataFrame) -> Styler:
    """A table for a notebook, its texts as they are: neither markup nor formulas in them work."""
    aligned = [{"selector": "th, td", "props": "text-align: left"}]
    plain = table.style.format(escape="html").format_index(escape="html").set_table_styles(aligned)
    # What MathJax 2 and 3 pass by.
    return plain.set_table_attributes('class="dataframe tex2jax_ignore mathjax_ignore"')


def plan(run: str, profile: str = "auto", overrides: Mapping[str, Any] | None = None, task: str = TASK) -> Settings:
    """Settle what will run.

    Args:
        run: A method's name in METHODS: `base`, `full`, `lora`, ...
        profile: A profile's name, or `auto` to choose by the hardware (or by FINETUNE_PROFILE).
        overrides: Parameter values that win over everything else.
        task: A task's name; for AG News, FINETUNE_TASK or an override may name another.

    Raises:
        UserError: An unknown run, profile, parameter or value; or an engine that this machine does not have, or several
            processes cannot use.
    """
    if run not in METHODS:
        raise UserError(f"unknown run '{run}'; the runs are: {', '.join(METHODS)}")
    method = METHODS[run]
    profile, reason = choose_profile(profile)
    named = {"task": task} if task != TASK else {}
    asked = [("environment", _from_environment()), ("override", named | dict(overrides or {}))]
    chosen, name = PROFILES[profile], method.like or run
    first, layers = _merge([("profile", chosen.values_for(name)), *asked]), []
    chosen_task = find_task(str(first[0].get("task", Experiment.task)))
    source = first[0].get("source", Experiment.source)
    if source not in chosen_task.kinds and first[1].get("source", "profile") == "profile":
        # The profile's source is AG News'.
        source = next(iter(chosen_task.sources))
        layers = [(f"task {chosen_task.name}", {"source": source})]
    values, origins = _merge([(f"profile {profile}", chosen.values_for(name, source)), *layers, *asked])
    experiment = _build(Experiment, values, None)
    chosen_task.find_prompt(experiment.prompt)
    recipe = _build(Recipe, values, method.recipe) if method.recipe else None
    if recipe:
        if recipe.lora_alpha is None:
            recipe = replace(recipe, lora_alpha=2 * recipe.r)
        check(recipe, run, method.recipe)
        if recipe.dtype == "bfloat16" and experiment.compute_dtype == "float32":
            raise UserError("compute_dtype=float32 contradicts dtype=bfloat16: bfloat16 weights multiply in bfloat16")
        if recipe.cuda_graphs and experiment.compute_dtype == "float32":
            raise UserError("compute_dtype=float32 needs cuda_graphs=False: attention in float32 cannot be recorded")
    is_head = recipe is not None and recipe.task_type == "SEQ_CLS"
    its_own = "the recipe: Unsloth's layers here read packed rows, and a head padded ones" if is_head else "the recipe"
    engine, engine_reason = (
        _choose_engine(recipe.engine, origins.get("engine", its_own)) if recipe else ("transformers", "evaluation only")
    )
    if engine == "unsloth" and experiment.compute_dtype == "float32":
        raise UserError("compute_dtype=float32 needs engine=transformers: Unsloth multiplies in bfloat16")
    used = {field.name for part in filter(None, (experiment, recipe)) for field in fields(part)}
    origins = {name: origins.get(name, "default" if name in _names(Experiment) else "recipe") for name in used}
    return Settings(run, profile, reason, engine, engine_reason, experiment, recipe, origins)


def _choose_engine(wanted: str, origin: str) -> tuple[Literal["transformers", "unsloth"], str]:
    """The training engine, and why.

    Raises:
        UserError: Unsloth is asked for by name where there is no CUDA, or for several processes.
    """
    # `run --processes` plans before the processes are there.
    processes = int(os.environ.get("FINETUNE_PROCESSES", machine.processes()))
    if processes > 1 and wanted == "unsloth":
        raise UnavailableHere("Unsloth trains in one process here: set engine=transformers, or leave --processes out")
    if processes > 1 and wanted == "auto":
        return "transformers", f"{processes} processes, which Accelerate joins"
    if wanted == "transformers":
        return "transformers", f"set by {origin}"
    if not machine.has_cuda():
        if wanted == "unsloth":
            raise UnavailableHere(
                "Unsloth needs an NVIDIA GPU with CUDA and this machine has none; train with transformers instead: "
                "fine_tuning_full.ipynb for full fine-tuning, else engine=transformers"
            )
        return "transformers", "no CUDA on this machine, so transformers + TRL + PEFT instead of Unsloth"
    return "unsloth", "CUDA is present"


def meaning(parameter: str) -> str:
    """What a parameter is, in a sentence; records may hold some that are none any more."""
    return (_documentation(Experiment) | _documentation(Recipe)).get(parameter, "A parameter of an earlier version.")


class UnavailableHere(UserError):
    """A step that this machine cannot run; the suite reports it as skipped, with the reason."""


def parse_assignments(assignments: list[str]) -> dict[str, str]:
    """`["learning_rate=1e-4"]` as a dict; values stay text, and are converted when a plan is made."""
    parsed = {}
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator:
            raise UserError(f"--set {assignment}: write it as name=value")
        parsed[name.strip()] = value.strip()
    return parsed


def located(name: str, value: Any) -> Any:
    """A parameter's value that means the same in any working folder: a notebook's is not the command line's."""
    return paths.absolute(value) if name in PLACES and value and value != MODEL else value


def fewer_rows(count: int) -> dict[str, Any]:
    """The overrides of a training on fewer rows, a point of a learning curve."""
    return {"train_rows": count, "variant": f"rows-{count}"}


def applicable(overrides: Mapping[str, Any], run: str) -> dict[str, Any]:
    """The overrides that mean something to a run: the base model has no learning rate."""
    unknown = set(overrides) - _names(Experiment) - _names(Recipe)
    if unknown:
        raise UserError(_unknown(unknown.pop(), "override"))
    known = {name: value for name, value in overrides.items() if METHODS[run].recipe or name in _names(Experiment)}
    return {name: located(name, value) for name, value in known.items()}


def _unknown(name: str, origin: str) -> str:
    known = sorted(_names(Experiment) | _names(Recipe))
    return f"unknown parameter '{name}' ({origin}); the parameters are: {', '.join(known)}"


def _from_environment() -> dict[str, str]:
    return {
        name.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for name, value in os.environ.items()
        if name.startswith(ENVIRONMENT_PREFIX) and name not in NOT_PARAMETERS
    }


def _merge(layers: list[tuple[str, Mapping[str, Any]]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Later layers win; returns values and the layer each came from. Refuses names that no part knows."""
    known = _names(Experiment) | _names(Recipe)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in layers:
        for name, value in layer.items():
            if name not in known:
                raise UserError(_unknown(name, origin))
            values[name] = None if value == "None" else located(name, value)
            origins[name] = origin
    return values, origins


def _build(part: type, values: Mapping[str, Any], base: Any) -> Any:
    """An instance of `part` from the values that it knows, over the fields of `base`."""
    own = {name: value for name, value in values.items() if name in _names(part)}
    try:
        return part(**((asdict(base) if base else {}) | own))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise UserError(
            f"{name}={first['input']!r} is not possible: {first['msg']} ({_documentation(part)[name]})"
        ) from error


def _names(part: type) -> set[str]:
    return {field.name for field in fields(part)}


def _documentation(part: type) -> dict[str, str]:
    # In a table, a docstring's line break would be shown as `\n`.
    return {name: " ".join(field.description.split()) for name, field in part.__pydantic_fields__.items()}
