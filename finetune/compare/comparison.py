"""The evaluated runs of a profile as data: records, predictions, and what follows from them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, product
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_prep import DataError
from finetune import baseline_records, metrics, paths, records
from finetune.baseline_records import Baseline
from finetune.compare import calibration, stats
from finetune.compare.calibration import Calibration
from finetune.compare.stats import Estimate, Pair
from finetune.config.methods import BASELINES, METHODS
from finetune.metrics import Metrics
from finetune.predictions import Prediction
from finetune.records import Merged, RunRecord, Training
from finetune.wording import NAMES

# How a run is evaluated, but for its test rows: this may differ.
HARMLESS = {"per_device_eval_batch_size", "generation_rows"}
# What else of its data; of the rows that a model learnt from, their number is compared apart.
NOT_COMPARED = {"source", "title", "validation_rows", "train_rows"}
# What a run with another seed, or on fewer rows, may differ in from its run.
VARIED = {"seed": {"seed", "variant"} | HARMLESS, "rows": {"train_rows", "variant"} | HARMLESS}


@dataclass(frozen=True)
class Variant:
    """A run with another seed (`lora/seed-43`) or on fewer rows (`lora/rows-250`): its record, and whether it is right
    on each test row, shape (rows,)."""

    record: RunRecord
    right: np.ndarray


@dataclass(frozen=True)
class CurvePoint:
    """A point of a learning curve: on how many rows was trained, for how long, and what came of it."""

    train_rows: int
    seconds: float
    scoring: Metrics


@dataclass(frozen=True)
class Comparison:
    """The evaluated runs of one profile, and the baselines that were measured beside them.

    Attributes:
        records: The runs by name, in the order base, full, LoRA, QLoRA.
        baselines: The baselines by name; may be empty.
        predictions: Of runs and baselines, in the order of the tables; the same test rows for all.
        validation: The runs' predictions of validation rows; may be empty lists.
        seeds: The trained runs' variants with other seeds; may be empty lists.
        curve: Those on fewer training rows.
        svm_curve: The linear SVM on fewer training rows, by its place (`svm/rows-250`), the fewest first; may be empty.
        merged: What came of merging the runs' adapters, of those that were merged.
    """

    profile: str
    records: dict[str, RunRecord]
    baselines: dict[str, Baseline]
    predictions: dict[str, list[Prediction]]
    validation: dict[str, list[Prediction]]
    seeds: dict[str, list[Variant]]
    curve: dict[str, list[Variant]]
    svm_curve: dict[str, Baseline]
    merged: dict[str, Merged]

    @property
    def any_record(self) -> RunRecord:
        return next(iter(self.records.values()))

    def tuned(self) -> dict[str, RunRecord]:
        return {run: record for run, record in self.records.items() if record.training}

    def answering(self) -> list[str]:
        """Runs and baselines that answer the task: all but the majority class, which does not read the article."""
        return [name for name in self.predictions if name != "majority"]

    @cached_property
    def labels(self) -> list[str]:
        """The true labels of the test rows, which all runs share."""
        return [row.label for row in next(iter(self.predictions.values()))]

    @property
    def classes(self) -> tuple[str, ...]:
        """All labels of the task, in its order."""
        return tuple(self.any_record.evaluation.scoring.classes)

    def answers(self, run: str) -> list[str]:
        """A run's predicted labels, row by row."""
        return [row.prediction for row in self.predictions[run]]

    def most_frequent(self, run: str) -> tuple[str, float]:
        """The label that a run predicts most often, and for which share of the rows."""
        [(label, count)] = Counter(self.answers(run)).most_common(1)
        return label, count / len(self.labels)

    @cached_property
    def scoring(self) -> dict[str, Metrics]:
        """Metrics of runs and baselines, from their predictions."""
        return {run: metrics.compute(self.labels, self.answers(run), self.classes) for run in self.predictions}

    @cached_property
    def calibration(self) -> dict[str, Calibration]:
        return {run: calibration.of(self.predictions[run], self.validation[run]) for run in self.records}

    def pair(self, first: str, second: str) -> Pair:
        """Two runs, as the only pair that is tested."""
        pair = stats.compare(first, second, self.labels, self.answers(first), self.answers(second), self.classes)
        return replace(pair, over_seeds=stats.over_seeds(self.labels, *self.outcomes(first, second)))

    @cached_property
    def pairs(self) -> list[Pair]:
        """Every tuned run against the base and what learns from the same rows, then the tuned runs against each other,
        corrected for their number."""
        tuned = list(self.tuned())
        learns = [name for name, of in BASELINES.items() if of.learns]
        references = [name for name in ("base", *learns) if name in self.predictions]
        names = [*product(tuned, references), *combinations(tuned, 2)]
        return stats.corrected([self.pair(*both) for both in names])

    def right(self, name: str) -> np.ndarray:
        """Whether a run or baseline is right, shape (seeds, rows); the training that all tables show comes first."""
        return self._right[name]

    @cached_property
    def _right(self) -> dict[str, np.ndarray]:
        return {
            name: np.stack([is_right(rows), *(variant.right for variant in self.seeds.get(name, []))])
            for name, rows in self.predictions.items()
        }

    def outcomes(self, first: str, second: str) -> tuple[np.ndarray, np.ndarray]:
        """`right` of both, seed by seed; of the first trainings alone where the two were trained with other seeds. What
        was not trained has no seeds, and shape (1, rows)."""
        both = self.right(first), self.right(second)
        seeds = {self.seeds_of(name) for name in (first, second) if name in self.tuned()}
        return both if len(seeds) <= 1 else (both[0][:1], both[1][:1])

    @cached_property
    def over_seeds(self) -> dict[str, Estimate]:
        """The mean accuracy of each run that was trained with several seeds."""
        return {
            run: stats.estimate(self.labels, self.right(run).astype(float)) for run in self.tuned() if self.seeds[run]
        }

    def accuracy(self, name: str) -> tuple[float, float, float]:
        """Accuracy with its 95 % interval: of several seeds the mean over seeds and rows, else Wilson's."""
        if name in self.over_seeds:
            return self.over_seeds[name].mean, *self.over_seeds[name].interval()
        return self.scoring[name].estimate

    def seeds_of(self, run: str) -> tuple[int, ...]:
        """The seeds that a tuned run was trained with, that of its record first."""
        return (self.records[run].seed, *(variant.record.seed for variant in self.seeds[run]))

    @property
    def first_seed(self) -> str:
        """What to call the trainings that are in the records themselves."""
        seeds = {record.seed for record in self.tuned().values()}
        return f"seed {seeds.pop()}" if len(seeds) == 1 else "the first seed"

    def trainings(self, run: str) -> list[Training]:
        """What a tuned run's trainings cost, that of its record first, then those with other seeds."""
        return [self.records[run].training, *(variant.record.training for variant in self.seeds[run])]

    def learning_curve(self) -> dict[str, list[CurvePoint]]:
        """The points of each run that was trained on fewer rows too, the fewest first, and then the linear SVM's.

        Empty where no run was.
        """
        found = {
            run: [
                CurvePoint(of.data.train_rows, of.training.seconds, of.evaluation.scoring)
                for of in (*(variant.record for variant in fewer), self.records[run])
            ]
            for run, fewer in self.curve.items()
            if fewer
        }
        if found and self.svm_curve:
            fitted = (*self.svm_curve.values(), self.baselines["svm"])
            found["svm"] = [CurvePoint(of.data.train_rows, of.fit_seconds, of.scoring) for of in fitted]
        return found

    @cached_property
    def repeated(self) -> list[bool]:
        """Which test rows have their article in a training or a validation row, exactly or nearly."""
        return [row.is_repeated for row in self.predictions["base"]]

    @property
    def repeated_splits(self) -> str:
        """In which rows these articles are: `training`, `validation`, or `training or validation`."""
        rows = self.predictions["base"]
        found = {
            "training": any(row.has_duplicate for row in rows),
            "validation": any(row.in_validation for row in rows),
        }
        return " or ".join(split for split, is_there in found.items() if is_there)

    @cached_property
    def without_duplicates(self) -> dict[str, Metrics | None]:
        """Metrics on the other rows; None where there is none."""
        return {
            name: metrics.compute_without(self.repeated, self.labels, self.answers(name), self.classes)
            for name in self.predictions
        }


def load(profile: str) -> Comparison:
    """Read the evaluated runs of a profile.

    Raises:
        DataError: The base was not evaluated; a record or its predictions are broken; the runs saw different data,
            prompts, test rows or models; or a tuned model predicts exactly as the base does.
    """
    return load_folder(paths.results_folder(profile), profile)


def load_folder(folder: Path, profile: str) -> Comparison:
    places = {run: folder / run for run in METHODS}
    evaluated, predictions = _read_evaluated(places, folder)
    beside, rows_beside = baseline_records.read_all(folder)
    svm_curve, rows_of_curve = baseline_records.read_svm_curve(folder)
    places |= {name: baseline_records.baselines_folder(folder) / name for name in (beside | svm_curve)}

    # Figures on other data, test rows or models are not comparable; who saw more training rows is not better for it.
    others, rows = beside | svm_curve, predictions | rows_beside | rows_of_curve
    known = {
        places[name]: facts(of, rows[name], evaluated["base"].model)
        for name, of in ({"base": evaluated["base"]} | others).items()
    }
    check_comparable(known, may_differ=NOT_COMPARED)
    trained = {run: record for run, record in evaluated.items() if record.training}
    trained_rows = trained | {name: of for name, of in beside.items() if BASELINES[name].learns}
    check_comparable({places[name]: {"train_rows": of.data.train_rows} for name, of in trained_rows.items()})
    # A learning curve is of one classifier.
    svms = {name: of for name, of in others.items() if of.name == "svm"}
    check_comparable({places[name]: {"classifier": of.description} for name, of in svms.items()})

    return Comparison(
        profile,
        evaluated,
        beside,
        {name: (predictions | rows_beside)[name] for name in NAMES if name in predictions | rows_beside},
        {run: records.read_validation(record, places[run]) for run, record in evaluated.items()},
        {run: read_variants(places[run], main, predictions[run], "seed") for run, main in trained.items()},
        {run: read_variants(places[run], main, predictions[run], "rows") for run, main in trained.items()},
        svm_curve,
        {run: of for run in trained if (of := records.read_merged(evaluated[run], places[run]))},
    )


def against_base(record: RunRecord) -> Pair | str:
    """A run against the base model of its profile, or a sentence where the base was not evaluated yet. Reads nothing of
    the other runs, which may be under way.

    Raises:
        DataError: As `load` does, of these two.
    """
    folder = paths.results_folder(record.profile)
    if not (folder / "base" / records.RECORD).is_file():
        return "The base model is not evaluated yet: run base_model_performance.ipynb, then this cell again."
    places = {"base": folder / "base", record.run: paths.run_folder(record.profile, record.run, record.variant)}
    _, predictions = _read_evaluated(places, folder)
    labels = [row.label for row in predictions["base"]]
    answers = {run: [row.prediction for row in rows] for run, rows in predictions.items()}
    classes = tuple(record.evaluation.scoring.classes)
    return stats.compare(record.run, "base", labels, answers[record.run], answers["base"], classes)


def read_variants(
    folder: Path, main: RunRecord, rows: Sequence[Prediction], kind: Literal["seed", "rows"]
) -> list[Variant]:
    """The evaluated variants in a run's folder, by number of rows or by seed, the run itself not among them.

    Args:
        folder: The run's.
        main: The run's record.
        rows: The run's predictions of the test rows.
        kind: What the variants vary.

    Raises:
        DataError: One differs from its run in more than its kind says, was made on other data, or judged on other rows.
    """
    found = []
    for path in sorted(folder.glob(f"{kind}-*/{records.RECORD}")):
        record = records.read(path.parent)
        if record.evaluation:
            predictions = records.read_predictions(record, path.parent)
            both = {folder: (main, rows), path: (record, predictions)}
            known = main.settings.keys() | record.settings.keys()
            facts = {
                place: {name: of.settings.get(name) for name in sorted(known)}
                | {"engine": of.engine, "model": of.model, "fingerprint": of.data.fingerprint, "task": of.data.task}
                | {"test rows and labels": _digest(answers)}
                for place, (of, answers) in both.items()
            }
            check_comparable(facts, may_differ=VARIED[kind])
            found.append(Variant(record, is_right(predictions)))
    return sorted(found, key=lambda variant: (variant.record.data.train_rows, variant.record.seed))


class NotComparable(DataError):
    """Runs whose figures are not comparable."""


def check_comparable(runs: Mapping[Path, Mapping[str, Any]], may_differ: Collection[str] = ()) -> None:
    """Refuse runs whose figures are not comparable.

    Args:
        runs: What is known of each, by the place of its record; the first is what the others are compared with.
        may_differ: Names of what need not be the same.

    Raises:
        NotComparable: With the first difference: what, where, and both values.
    """
    first, *others = runs or [None]
    for place in others:
        for name, value in runs[place].items():
            if name not in may_differ and value != runs[first][name]:
                raise NotComparable(
                    place, f"{name} is {value}, and {runs[first][name]} in {first}: compare runs with the same {name}"
                )


def is_right(predictions: Sequence[Prediction]) -> np.ndarray:
    """Whether each row's prediction is right, shape (rows,)."""
    return np.array([row.prediction == row.label for row in predictions])


def facts(record: RunRecord | Baseline, rows: Sequence[Prediction], model: str | None = None) -> dict[str, Any]:
    """What figures must share; a classifier without a language model counts as `model`."""
    return {"model": record.model or model, **record.data.model_dump(), "test rows and labels": _digest(rows)}


def _digest(rows: Sequence[Prediction]) -> str:
    return hashlib.sha256(repr([(row.id, row.label) for row in rows]).encode()).hexdigest()[:12]


def _read_evaluated(places: dict[str, Path], folder: Path) -> tuple[dict[str, RunRecord], dict[str, list[Prediction]]]:
    """The records in these folders, of those runs that were evaluated, and their predictions of the test rows; all on
    the same rows and weights, and the base among them."""
    read = {run: records.read(place) for run, place in places.items() if (place / records.RECORD).is_file()}
    for run, record in read.items():
        if record.run != run:
            raise DataError(places[run] / records.RECORD, f"is the record of {record.run}; was the folder copied?")
    evaluated = {run: record for run, record in read.items() if record.evaluation}
    if "base" not in evaluated:
        raise DataError(folder, "the base model was not evaluated; run base_model_performance.ipynb first")
    weights = {
        run: record.training.base_digest if record.training else record.evaluation.artefact_digest
        for run, record in evaluated.items()
    }
    # Older records do not know them.
    check_comparable({places[run]: {"base weights": digest} for run, digest in weights.items() if digest})
    predictions = {run: records.read_predictions(record, places[run]) for run, record in evaluated.items()}
    known = {places[run]: facts(record, predictions[run]) for run, record in evaluated.items()}
    check_comparable(known, may_differ=NOT_COMPARED)
    # An adapter that was not applied answers as the base does (vllm#10798).
    of_base = [row.probabilities for row in predictions["base"]]
    for run, record in evaluated.items():
        if record.training and [row.probabilities for row in predictions[run]] == of_base:
            raise DataError(folder / run, "gives exactly the base model's probabilities: its artefact was not applied")
    return evaluated, predictions
