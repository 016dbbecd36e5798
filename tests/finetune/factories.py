"""Records and predictions as a run would have left them, from nothing but who was right on which row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.task import AG_NEWS
from finetune import metrics, records
from finetune.predictions import Prediction, write
from finetune.records import (
    DataReference,
    Environment,
    Evaluation,
    Generation,
    LogPoint,
    RunRecord,
    Training,
)

LABELS = AG_NEWS.labels

HISTORY = [
    LogPoint(step=1, epoch=0.1, loss=1.4, grad_norm=2.0, learning_rate=1e-4),
    LogPoint(step=5, epoch=0.5, validation_accuracy=0.6, validation_log_loss=1.1),
    LogPoint(step=10, epoch=1.0, loss=0.7, grad_norm=1.0, learning_rate=0.0),
    LogPoint(step=10, epoch=1.0, validation_accuracy=0.8, validation_log_loss=0.5),
]


def environment() -> Environment:
    return Environment(
        created="2025-01-02T03:04:05+00:00",
        command="make demo",
        commit="0123456789abcdef0123456789abcdef01234567",
        dirty=False,
        packages={"torch": "2.0.0", "unsloth": None},
        hardware={"cpu": "A processor", "cores": 2, "gpu": None},
    )


def data_reference(rows: int, **changes: Any) -> DataReference:
    values = {
        "source": "csv",
        "title": "AG News",
        "fingerprint": "0123456789ab",
        "prompt": "lean-1",
        "train_rows": 1000,
        "validation_rows": 100,
        "test_rows": rows,
    }
    return DataReference(**(values | changes))


def training(run: str, **changes: Any) -> Training:
    values = {
        "environment": environment(),
        "settings_digest": "fedcba987654",
        "seconds": 90.0,
        "steps": 10,
        "articles": 1000,
        "tokens": 50_000,
        "articles_per_second": 11.1,
        "tokens_per_second": 555.5,
        "peak_memory_bytes": 2_500_000_000,
        "peak_memory_kind": "resident memory of the process",
        "parameters": 1_000_000,
        "trainable_parameters": 20_000,
        "supervised_tokens_of_first_rows": 64,
        "attention": "sdpa",
        "choices": {"packing": "off: the attention does not keep documents apart"},
        "artefact": f"adapters/cpu-{run}",
        "artefact_bytes": 4_000_000,
        "artefact_digest": "abcdef012345",
        "history": HISTORY,
    }
    return Training(**(values | changes))


def evaluation(labels: Sequence[str], predicted: Sequence[str], digest: str, **changes: Any) -> Evaluation:
    scoring = metrics.compute(labels, predicted, LABELS)
    values = {
        "environment": environment(),
        "artefact_digest": None,
        "seconds": 2.0,
        "articles_per_second": len(labels) / 2,
        "peak_memory_bytes": 1_000_000_000,
        "batch_size": 16,
        "dtype": "float32",
        "scoring": scoring,
        "log_loss": 0.5,
        "without_duplicates": scoring,
        "generation": None,
        "predictions_digest": digest,
    }
    return Evaluation(**(values | changes))


def predictions(right: Sequence[bool], confidence: float = 0.7) -> list[Prediction]:
    """The labels in turn; a wrong answer is the next label."""
    rows = []
    for row, is_right in enumerate(right):
        label = LABELS[row % 4]
        predicted = label if is_right else LABELS[(row + 1) % 4]
        probabilities = {name: confidence if name == predicted else (1 - confidence) / 3 for name in LABELS}
        rows.append(
            Prediction(
                id=f"test-{row}",
                label=label,
                prediction=predicted,
                probabilities=probabilities,
                generated=None,
                has_duplicate=False,
            )
        )
    return rows


def generation(rows: Sequence[Prediction], count: int) -> Generation:
    """Generated answers to the first `count` rows: what scoring gave, but for every tenth, which is invalid."""
    answers = [None if number % 10 == 0 else row.prediction for number, row in enumerate(rows[:count])]
    return Generation(
        seconds=1.0,
        valid_share=sum(answer is not None for answer in answers) / count,
        agreement_with_scoring=sum(answer == row.prediction for answer, row in zip(answers, rows, strict=False))
        / count,
        metrics=metrics.compute([row.label for row in rows[:count]], answers, LABELS),
    )


def record(run: str, rows: int = 40, data: dict[str, Any] | None = None, **changes: Any) -> RunRecord:
    """A record without training and evaluation, unless `changes` holds them."""
    values = {
        "run": run,
        "profile": "cpu",
        "engine": "transformers",
        "model": "a-model",
        "seed": 42,
        "settings": {"learning_rate": 1e-4, "packing": True, "data_path": None},
        "settings_digest": "fedcba987654",
        "data": data_reference(rows, **(data or {})),
    }
    return RunRecord(**(values | changes))


def write_run(
    results: Path,
    run: str,
    right: Sequence[bool],
    *,
    confidence: float | None = None,
    cost: dict[str, Any] | None = None,
    rows: list[Prediction] | None = None,
    validation: list[Prediction] | None = None,
    results_of_generation: Generation | None = None,
    **changes: Any,
) -> RunRecord:
    """Write an evaluated run (trained too, unless it is the base) that was right on the given rows.

    `cost` changes its training part, `rows` replaces its predictions, `validation` adds some of validation rows,
    and `changes` go to the record.
    """
    folder = results / run
    if rows is None:
        rows = predictions(right, confidence or (0.4 if run == "base" else 0.7))
    digest = write(folder, rows, validation or [])
    labels, predicted = [row.label for row in rows], [row.prediction for row in rows]
    result = record(
        run,
        len(rows),
        training=None if run == "base" else training(run, **(cost or {})),
        evaluation=evaluation(labels, predicted, digest, generation=results_of_generation),
        **changes,
    )
    records.write(result, folder)
    return result


def right_on(count: int, rows: int, start: int = 0) -> list[bool]:
    """Right on `count` of `rows` rows, beginning with row `start`."""
    return [start <= row < start + count for row in range(rows)]


# Of a trained run that has variants.
SETTINGS = {"learning_rate": 1e-4, "packing": True, "data_path": None, "seed": 42, "train_rows": None, "variant": ""}


def write_variant(results: Path, run: str, variant: str, right: Sequence[bool], settings=None, **changes: Any) -> None:
    """A variant of `run` (`seed-43`, `rows-250`), written where it belongs."""
    name = {"seed": "seed", "rows": "train_rows"}[variant.partition("-")[0]]
    values = SETTINGS | {name: int(variant.partition("-")[2]), "variant": variant} | (settings or {})
    record = write_run(results, f"{run}/{variant}", right, settings=values, seed=values["seed"], **changes)
    records.write(record.model_copy(update={"run": run}), results / run / variant)
