"""Compare the runs of a profile: figures against the base, paired tests, and an answer in words."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pandas as pd

from data_prep import LABELS, DataError
from finetune import baselines, metrics, paths, records
from finetune.baselines import Baseline
from finetune.compare import answer, calibration, variants
from finetune.compare import stats as pairs
from finetune.compare import tables as costs
from finetune.compare.calibration import COVERAGES, Calibration, Figure, Scores
from finetune.compare.stats import MeanOverSeeds, OverSeeds, Pair
from finetune.compare.variants import Variant
from finetune.metrics import Metrics
from finetune.records import Merged, Prediction, RunRecord, Training
from finetune.settings import RUNS
from finetune.wording import NAMES


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
        validation: The runs' predictions of validation rows; None in records that are older than these.
        seeds: The trained runs' variants with other seeds; may be empty lists.
        curve: Those on fewer training rows.
        svm_curve: The linear SVM on fewer training rows, by its place (`svm/rows-250`), the fewest first; may be empty.
        merged: What came of merging the runs' adapters, of those that were merged.
    """

    profile: str
    records: dict[str, RunRecord]
    baselines: dict[str, Baseline]
    predictions: dict[str, list[Prediction]]
    validation: dict[str, list[Prediction] | None]
    seeds: dict[str, list[Variant]]
    curve: dict[str, list[Variant]]
    svm_curve: dict[str, Baseline]
    merged: dict[str, Merged]

    @property
    def any_record(self) -> RunRecord:
        return next(iter(self.records.values()))

    def tuned(self) -> dict[str, RunRecord]:
        return {run: record for run, record in self.records.items() if record.training}

    @cached_property
    def labels(self) -> list[str]:
        """The true labels of the test rows, which all runs share."""
        return [row.label for row in next(iter(self.predictions.values()))]

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
        return {run: metrics.compute(self.labels, self.answers(run)) for run in self.predictions}

    @cached_property
    def calibration(self) -> dict[str, Calibration]:
        return {run: calibration.of(self.predictions[run], self.validation[run]) for run in self.records}

    def pair(self, first: str, second: str) -> Pair:
        """Two runs, as the only pair that is tested."""
        return pairs.compare(first, second, self.labels, self.answers(first), self.answers(second))

    @cached_property
    def pairs(self) -> list[Pair]:
        """Every tuned run against base and SVM, then the tuned runs against each other, corrected for their number."""
        tuned = list(self.tuned())
        references = [name for name in ("base", "svm") if name in self.predictions]
        names = [*product(tuned, references), *combinations(tuned, 2)]
        tested = [replace(self.pair(*both), over_seeds=self._over_seeds(*both)) for both in names]
        return pairs.corrected(tested, len(self.labels))

    def right(self, name: str) -> np.ndarray:
        """Whether a run or baseline is right, shape (seeds, rows); the training that all tables show comes first."""
        return self._right[name]

    @cached_property
    def _right(self) -> dict[str, np.ndarray]:
        return {
            name: np.stack([variants.outcomes(rows), *(variant.right for variant in self.seeds.get(name, []))])
            for name, rows in self.predictions.items()
        }

    @cached_property
    def over_seeds(self) -> dict[str, MeanOverSeeds]:
        """Of each run that was trained with several seeds."""
        return {run: pairs.mean_over_seeds(self.labels, self.right(run)) for run in self.tuned() if self.seeds[run]}

    def _over_seeds(self, first: str, second: str) -> OverSeeds | None:
        """None where the two were not trained with the same seeds, several of them; base and SVM have none."""
        seeds = {self.seeds_of(name) for name in (first, second) if name in self.tuned()}
        if len(seeds) > 1 or len(seeds.pop()) == 1:
            return None
        return pairs.over_seeds(self.labels, self.right(first), self.right(second))

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

    def seeds_table(self) -> pd.DataFrame:
        """Mean and spread over the seeds of each run that has several, and the interval over seeds and rows."""
        rows = {
            NAMES[run]: {
                "seeds": len(of.accuracies),
                "mean accuracy %": 100 * of.mean,
                "95 % interval": percent_interval(of.low, of.high),
                "standard deviation": 100 * of.accuracies.std(ddof=1),
                "lowest %": 100 * of.accuracies.min(),
                "highest %": 100 * of.accuracies.max(),
            }
            for run, of in self.over_seeds.items()
        }
        return pd.DataFrame(rows).T.infer_objects()

    @cached_property
    def without_twins(self) -> dict[str, Metrics | None]:
        """The same on the rows whose article is in no training row; None where there is no such row."""
        alone = [number for number, row in enumerate(self.predictions["base"]) if not row.has_twin]
        labels = [self.labels[row] for row in alone]
        answers = {name: self.answers(name) for name in self.predictions}
        return {
            name: metrics.compute(labels, [of[row] for row in alone]) if alone else None for name, of in answers.items()
        }

    def quality_table(self) -> pd.DataFrame:
        """Accuracy and macro-F1 in percent, with their intervals; differences to the base in points."""
        base = self.scoring["base"]
        rows = {
            NAMES[name]: {
                "accuracy %": 100 * scoring.accuracy,
                "95 % interval": percent_interval(scoring.accuracy_low, scoring.accuracy_high),
                "against base": 100 * (scoring.accuracy - base.accuracy),
                "macro-F1 %": 100 * scoring.macro_f1,
                "macro-F1 interval": percent_interval(scoring.macro_f1_low, scoring.macro_f1_high),
                "macro-F1 against base": 100 * (scoring.macro_f1 - base.macro_f1),
            }
            for name, scoring in self.scoring.items()
        }
        return pd.DataFrame(rows).T.infer_objects()

    def class_table(self) -> pd.DataFrame:
        """F1 of each class in percent, with its interval."""
        rows = {
            NAMES[name]: {
                column: value
                for label, of_class in scoring.classes.items()
                for column, value in (
                    (f"{label} F1 %", 100 * of_class.f1),
                    (f"{label} interval", percent_interval(of_class.f1_low, of_class.f1_high)),
                )
            }
            for name, scoring in self.scoring.items()
        }
        return pd.DataFrame(rows).T.infer_objects()

    def calibration_table(self) -> pd.DataFrame:
        """Calibration errors before and after the temperature, and accuracy when abstaining, with their intervals."""
        return pd.DataFrame({NAMES[run]: _calibration_row(of) for run, of in self.calibration.items()}).T

    def confusion_table(self) -> pd.DataFrame:
        """How often each class was taken for each other one, those that the tuned runs confuse most first."""
        counts = {
            NAMES[run]: {
                f"{label} taken for {other}": scoring.confusion[row][column]
                for row, label in enumerate(LABELS)
                for column, other in enumerate(LABELS)
                if row != column
            }
            for run, scoring in self.scoring.items()
            if run in self.records
        }
        table = pd.DataFrame(counts)
        judged = [NAMES[run] for run in self.tuned()] or list(table)
        return table.loc[table[judged].sum(axis=1).sort_values(ascending=False, kind="stable").index]

    def merged_table(self) -> pd.DataFrame:
        """Accuracy of merged models beside those of their adapters apart, and how far the two agree."""
        rows = {
            NAMES[run]: {
                "merged into": of.base,
                "adapter apart %": 100 * of.adapter_accuracy,
                "merged %": 100 * of.scoring.accuracy,
                "95 % interval": percent_interval(of.scoring.accuracy_low, of.scoring.accuracy_high),
                "labelled alike %": 100 * of.agreement,
                "largest difference of a probability": f"{of.largest_difference:.3f}",
                "merged model MB": of.artefact_bytes / 1e6,
            }
            for run, of in self.merged.items()
        }
        return pd.DataFrame(rows).T.infer_objects()

    def cost_table(self) -> pd.DataFrame:
        """What each training cost, and what its artefact weighs."""
        tables = [costs.costs(record, *self.trainings(run)[1:]) for run, record in self.tuned().items()]
        return pd.concat(tables) if tables else pd.DataFrame()

    def answer(self) -> str:
        """The comparison in one paragraph, true whatever the figures are."""
        return answer.paragraph(self)


def _calibration_row(of: Calibration) -> dict[str, str]:
    row = {f"{name}, as it is": text for name, text in _scores(of.scores).items()}
    row["temperature"] = "not recorded" if of.temperature is None else f"{of.temperature:.2f}"
    if of.scaled:
        row |= {f"{name}, with the temperature": text for name, text in _scores(of.scaled).items()}
    for share in COVERAGES:
        at = of.accuracy_at(share)
        row[f"accuracy % of the surest {share:.0%}"] = f"{100 * at.value:.1f} ({percent_interval(at.low, at.high)})"
    return row


def _scores(scores: Scores) -> dict[str, str]:
    error = scores.error
    return {
        "ECE %": f"{100 * error.value:.1f} ({percent_interval(error.low, error.high)})",
        "Brier": _three_digits(scores.brier),
        "log loss": _three_digits(scores.log_loss),
    }


def _three_digits(figure: Figure) -> str:
    return f"{figure.value:.3f} ({figure.low:.3f} to {figure.high:.3f})"


def percent_interval(low: float, high: float) -> str:
    """An interval of shares in percent: `94.9 to 95.9`."""
    return f"{100 * low:.1f} to {100 * high:.1f}"


def load(profile: str) -> Comparison:
    """Read the evaluated runs of a profile.

    Raises:
        DataError: The base was not evaluated; a record or its predictions are broken; the runs saw different data,
            prompts, test rows or models; or a tuned model predicts exactly as the base does.
    """
    return load_folder(paths.results_folder(profile), profile)


def load_folder(folder: Path, profile: str) -> Comparison:
    found = {run: folder / run for run in RUNS}
    evaluated = _read_evaluated(found, folder)
    beside, rows_beside = baselines.read_all(folder)
    svm_curve, rows_of_curve = baselines.read_svm_curve(folder)
    _require_same_question(evaluated, beside | svm_curve, folder)
    _require_same_svm(beside, svm_curve, folder)
    predictions = {run: records.read_predictions(record, found[run]) for run, record in evaluated.items()}
    _require_same_rows(predictions | rows_beside | rows_of_curve, folder)
    _require_other_answers(evaluated, predictions, folder)
    predictions |= rows_beside
    validation = {run: records.read_validation(record, found[run]) for run, record in evaluated.items()}
    trained = {run: record for run, record in evaluated.items() if record.training}
    seeds = {run: variants.read(found[run], main, predictions[run], "seed") for run, main in trained.items()}
    curve = {run: variants.read(found[run], main, predictions[run], "rows") for run, main in trained.items()}
    merged = {run: of for run in trained if (of := records.read_merged(evaluated[run], found[run]))}
    ordered = {name: predictions[name] for name in NAMES if name in predictions}
    return Comparison(profile, evaluated, beside, ordered, validation, seeds, curve, svm_curve, merged)


def against_base(record: RunRecord) -> Pair:
    """A run against the base model of its profile. Reads nothing of the other runs, which may be under way.

    Raises:
        DataError: As `load` does, of these two.
    """
    folder = paths.results_folder(record.profile)
    places = {"base": folder / "base", record.run: paths.run_folder(record.profile, record.run, record.variant)}
    evaluated = _read_evaluated(places, folder)
    _require_same_question(evaluated, {}, folder)
    predictions = {run: records.read_predictions(evaluated[run], place) for run, place in places.items()}
    _require_same_rows(predictions, folder)
    _require_other_answers(evaluated, predictions, folder)
    labels = [row.label for row in predictions["base"]]
    answers = {run: [row.prediction for row in rows] for run, rows in predictions.items()}
    return pairs.compare(record.run, "base", labels, answers[record.run], answers["base"])


def _read_evaluated(places: dict[str, Path], folder: Path) -> dict[str, RunRecord]:
    """The records in these folders, of those runs that were evaluated; the base must be among them."""
    read = {run: records.read(place) for run, place in places.items() if (place / records.RECORD).is_file()}
    for run, record in read.items():
        if record.run != run:
            raise DataError(places[run] / records.RECORD, f"is the record of {record.run}; was the folder copied?")
    evaluated = {run: record for run, record in read.items() if record.evaluation}
    if "base" not in evaluated:
        raise DataError(folder, "the base model was not evaluated; run base_model_performance.ipynb first")
    return evaluated


def _require_same_question(evaluated: dict[str, RunRecord], beside: dict[str, Baseline], folder: Path) -> None:
    """Figures on other data, another prompt or another model are not comparable: name the difference."""
    base = evaluated["base"]
    for name, record in (evaluated | beside).items():
        for what in ("fingerprint", "prompt", "test_rows"):
            mine, theirs = getattr(record.data, what), getattr(base.data, what)
            if mine != theirs:
                raise DataError(
                    _place(folder, name),
                    f"{what} is {mine}, and {theirs} in the base's record: run both on the same data",
                )
        if record.model not in (None, base.model):
            raise DataError(_place(folder, name), f"the model is {record.model}, and {base.model} in the base's record")
    _require_same_training_rows(evaluated, beside, folder)


def _require_same_training_rows(evaluated: dict[str, RunRecord], beside: dict[str, Baseline], folder: Path) -> None:
    """A method that saw more rows is not better for it."""
    trained = {run: record for run, record in evaluated.items() if record.training}
    trained |= {name: baseline for name, baseline in beside.items() if name == "svm"}
    rows = {name: record.data.train_rows for name, record in trained.items()}
    for name, count in rows.items():
        first = next(iter(rows))
        if count != rows[first]:
            raise DataError(
                _place(folder, name),
                f"train_rows is {count}, and {rows[first]} in the record of {first}: train both on the same rows",
            )


def _require_same_svm(beside: dict[str, Baseline], fewer: dict[str, Baseline], folder: Path) -> None:
    """A learning curve is of one classifier."""
    for name, fitted in fewer.items():
        if "svm" not in beside or fitted.description != beside["svm"].description:
            raise DataError(
                _place(folder, name),
                f"{fitted.description} is not the classifier of baselines/svm; "
                "run `python -m finetune curve --only svm` again",
            )


def _require_same_rows(predictions: dict[str, list[Prediction]], folder: Path) -> None:
    """Pairs must be of the same rows."""
    base_rows = [(row.id, row.label) for row in predictions["base"]]
    for name, rows in predictions.items():
        if [(row.id, row.label) for row in rows] != base_rows:
            raise DataError(
                _place(folder, name), "was evaluated on other test rows than the base (another seed draws others)"
            )


def _require_other_answers(
    evaluated: dict[str, RunRecord], predictions: dict[str, list[Prediction]], folder: Path
) -> None:
    """An adapter that was not applied answers as the base does (vllm#10798)."""
    of_base = [row.probabilities for row in predictions["base"]]
    for run, record in evaluated.items():
        if record.training and [row.probabilities for row in predictions[run]] == of_base:
            raise DataError(folder / run, "gives exactly the base model's probabilities: its artefact was not applied")


def _place(folder: Path, name: str) -> Path:
    """Where a run's or baseline's record lies."""
    return folder / name if name in RUNS else baselines.baselines_folder(folder) / name
