"""One typed record per run: `results/<profile>/<run>/record.json`, and its predictions beside it.

Everything downstream reads records. A record that does not match its schema, or predictions that are not the
record's, are refused.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from data_prep import DataError
from data_prep.files import write_json
from finetune import machine, paths, predictions
from finetune.files import short_digest
from finetune.metrics import Metrics, first_difference
from finetune.predictions import Prediction

RECORD = "record.json"
MERGED = "merged.json"
DIGEST = "digest"
Kind = TypeVar("Kind", bound="Part")


class Part(BaseModel):
    # A loss that is no number must not read as one that was not logged.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class Environment(Part):
    """Where and with what something was measured. `dirty`: the tree had changes that are not in the commit."""

    created: str
    command: str
    commit: str | None
    dirty: bool | None
    packages: dict[str, str | None]
    hardware: dict[str, str | int | None]

    @property
    def short_commit(self) -> str:
        return (self.commit or "unknown")[:10] + (" with changes" if self.dirty else "")

    @property
    def machine(self) -> str:
        """The GPU; without one, the processor and its cores."""
        return self.hardware["gpu"] or f"{self.hardware['cpu']}, {self.hardware['cores']} cores, no GPU"

    @property
    def jobs(self) -> int:
        """How many notebooks the command executed at once, at most."""
        found = re.search(r"--jobs[ =](\d+)", self.command)
        return int(found[1]) if found else 1


class LogPoint(Part):
    """What the trainer logged at a step; with a validation, the seconds of training before it."""

    step: int
    epoch: float
    loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    validation_accuracy: float | None = None
    validation_log_loss: float | None = None
    training_seconds: float | None = None


class Training(Part):
    """Cost of a training. Seconds and energy exclude validation and model loading; tokens exclude padding.

    `energy_joules` is the GPU's own count, and None where it has none. `rendered_prompt` is the prompt with the
    columns' names for a text, as the model's template wrote it. `base_digest` says which weights were tuned
    (`model.hub.base_digest`), `base_revision` a hub model's commit. `strategy` is how several `processes` shared the
    training, on which `hosts`, with each one's peak memory in `device_peak_bytes`. Older records have none of these.
    """

    environment: Environment
    settings_digest: str
    seconds: float
    steps: int
    articles: int
    tokens: int
    articles_per_second: float
    tokens_per_second: float
    peak_memory_bytes: int
    peak_memory_kind: str
    parameters: int
    trainable_parameters: int
    supervised_tokens_of_first_rows: int
    attention: str
    choices: dict[str, str]
    artefact: str
    artefact_bytes: int
    artefact_digest: str
    history: list[LogPoint]
    energy_joules: float | None = None
    rendered_prompt: str = ""
    base_digest: str = ""
    base_revision: str = ""
    processes: int = 1
    strategy: str = "one process"
    hosts: list[str] = []
    device_peak_bytes: list[int] = []

    @property
    def device_seconds(self) -> float:
        """What the training cost in time of all devices."""
        return self.seconds * self.processes


class Generation(Part):
    """Evaluation by generation, on the first rows of the test split; an invalid answer counts as wrong."""

    seconds: float
    valid_share: float
    agreement_with_scoring: float
    metrics: Metrics


class Evaluation(Part):
    """Test metrics by scoring, on all rows and on those without a duplicate; and by generation.

    `artefact_digest` is the base's own where nothing was tuned. `dtype` is the type of matrix products, and `precision`
    the reason for it. Older records hold neither a base's digest nor this reason.
    """

    environment: Environment
    artefact_digest: str | None
    seconds: float
    articles_per_second: float
    peak_memory_bytes: int
    batch_size: int
    dtype: str
    scoring: Metrics
    log_loss: float
    without_duplicates: Metrics | None
    generation: Generation | None
    predictions_digest: str
    precision: str = ""


class DataReference(Part):
    """Which data a run saw: results on different fingerprints are never compared."""

    source: str
    title: str
    fingerprint: str
    prompt: str
    train_rows: int
    validation_rows: int
    test_rows: int
    # Older records are all of this task.
    task: str = "ag_news"


class RunRecord(Part):
    """One run: what was asked, what it cost, what came out. `profile` names its folders: the profile, with task and
    model where these are not its own."""

    schema_version: Literal[1] = 1
    run: str
    profile: str
    engine: str
    model: str
    seed: int
    settings: dict[str, Any]
    settings_digest: str
    data: DataReference
    training: Training | None = None
    evaluation: Evaluation | None = None

    @property
    def variant(self) -> str:
        """Which variant of its run this is; older records are all of the run itself."""
        return self.settings.get("variant", "")

    @property
    def environments(self) -> list[Environment]:
        """Of the training and of the evaluation, those that there were."""
        return [part.environment for part in (self.training, self.evaluation) if part]


class Merged(Part):
    """A merged model, and how its predictions compare with those of base and adapter apart.

    Attributes:
        base: Which weights the adapter was merged into.
        adapter_digest: Of the adapter that was merged.
        agreement: Share of the test rows with the same label.
        largest_difference: Of a label's probability, over all rows.
    """

    environment: Environment
    run: str
    base: str
    adapter_digest: str
    artefact: str
    artefact_bytes: int
    artefact_digest: str
    scoring: Metrics
    adapter_accuracy: float
    agreement: float
    largest_difference: float

    def __str__(self) -> str:
        return (
            f"{self.artefact} ({self.artefact_bytes / 1e6:.0f} MB), merged into {self.base}: accuracy "
            f"{self.scoring.accuracy:.2%} against {self.adapter_accuracy:.2%} with the separate adapter, "
            f"{self.agreement:.2%} of the rows get the same label, probabilities within {self.largest_difference:.3f}"
        )


def environment() -> Environment:
    """Commit, packages and hardware, now."""
    commit, dirty = _commit()
    return Environment(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=os.environ.get("FINETUNE_COMMAND", "Run All in Jupyter"),
        commit=commit,
        dirty=dirty,
        packages=machine.package_versions(),
        hardware=machine.snapshot(),
    )


def write(record: RunRecord, folder: Path) -> None:
    """Write a record in one step. Predictions that belonged to an earlier one go first."""
    if record.evaluation is None:
        (folder / predictions.FILE).unlink(missing_ok=True)
    write_part(record, folder / RECORD)


def write_part(part: Part, path: Path) -> None:
    """Write a record with the digest of its content: a figure that is damaged later is not read as another one."""
    content = json.loads(part.model_dump_json())
    write_json(path, content | {DIGEST: short_digest(content)})


def read(folder: Path) -> RunRecord:
    """The record in a run's folder.

    Raises:
        DataError: It is missing, or does not match the schema.
    """
    return parsed(RunRecord, folder / RECORD)


def parsed(kind: type[Kind], path: Path, remedy: str = "run its notebook again") -> Kind:
    """What `write_part` wrote.

    Raises:
        DataError: It is missing, was changed since, or does not match the schema.
    """
    try:
        content = json.loads(path.read_bytes())
        # Older records have none.
        digest = content.pop(DIGEST, None) if isinstance(content, dict) else None
        part = kind.model_validate(content)
    except FileNotFoundError as error:
        raise DataError(path, "no such file; run the notebook that makes it first") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise DataError(path, f"not a record of this version ({where}: {first['msg']}); {remedy}") from error
    except ValueError as error:
        raise DataError(path, f"not a record of this version (file: {error}); is it cut short? {remedy}") from error
    if digest not in (None, short_digest(content)):
        raise DataError(path, f"was changed after it was written, or is damaged; {remedy}")
    return part


def read_merged(record: RunRecord, folder: Path) -> Merged | None:
    """What came of merging a run's adapter; None if it was not merged, or trained again since.

    Raises:
        DataError: It does not match the schema.
    """
    path = folder / MERGED
    if record.training is None or not path.is_file():
        return None
    merged = parsed(Merged, path)
    return merged if merged.adapter_digest == record.training.artefact_digest else None


class Scored(Protocol):
    """What holds figures of test rows, and the digest of the predictions that they come from."""

    scoring: Metrics
    predictions_digest: str


def read_predictions(record: RunRecord, folder: Path) -> list[Prediction]:
    """The predictions of the test rows that belong to a record.

    Raises:
        DataError: They are missing, were changed, are another record's, or give other figures than the record holds.
    """
    if record.evaluation is None:
        raise DataError(folder / RECORD, f"{record.run} was not evaluated yet; run its performance notebook")
    return read_scored(record.run, record.evaluation, folder)


def read_scored(name: str, recorded: Scored, folder: Path) -> list[Prediction]:
    """The predictions of the test rows that a record's figures come from, from its folder.

    Raises:
        DataError: As `read_predictions`.
    """
    rows = predictions.read(folder, recorded.predictions_digest)
    other = first_difference(recorded.scoring, [row.label for row in rows], [row.prediction for row in rows])
    if other:
        raise DataError(
            folder / RECORD, f"the record of {name} holds another {other} than its predictions give; evaluate it again"
        )
    return rows


def read_validation(record: RunRecord, folder: Path) -> list[Prediction]:
    """The same of the validation rows.

    Raises:
        DataError: They are missing, were changed, or are another record's.
    """
    return predictions.read(folder, record.evaluation.predictions_digest, "validation")


def _commit() -> tuple[str | None, bool | None]:
    """The commit of the code that runs and whether the tree differs from it; None outside a git checkout."""
    # The project's repository, whatever a hook or a shell has in GIT_DIR, and whoever owns it.
    git = ["git", "-C", str(paths.PROJECT), "-c", f"safe.directory={paths.PROJECT}"]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    ask = functools.partial(subprocess.run, capture_output=True, text=True, check=True, env=ours)
    try:
        head = ask([*git, "rev-parse", "HEAD"]).stdout.strip()
        status = ask([*git, "status", "--porcelain"]).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None, None
    return head, bool(status.strip())
