"""Compare the runs of a profile: figures against the base, paired tests, and an answer in words."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import pandas as pd

from data_prep import LABELS, DataError
from finetune import answer, calibration, metrics, pairs, paths, records
from finetune.calibration import COVERAGES, Calibration
from finetune.metrics import Metrics
from finetune.pairs import Pair
from finetune.records import Prediction, RunRecord
from finetune.settings import RUNS
from finetune.wording import NAMES


@dataclass(frozen=True)
class Comparison:
    """The evaluated runs of one profile, in the order base, full, LoRA, QLoRA."""

    profile: str
    records: dict[str, RunRecord]
    predictions: dict[str, list[Prediction]]
    validation: dict[str, list[Prediction] | None]

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

    @cached_property
    def scoring(self) -> dict[str, Metrics]:
        """Each run's metrics, from its predictions."""
        return {run: metrics.compute(self.labels, self.answers(run)) for run in self.predictions}

    @cached_property
    def calibration(self) -> dict[str, Calibration]:
        return {run: calibration.of(rows, self.validation[run]) for run, rows in self.predictions.items()}

    def pair(self, first: str, second: str) -> Pair:
        """Two runs, as the only pair that is tested."""
        return pairs.compare(first, second, self.labels, self.answers(first), self.answers(second))

    @cached_property
    def pairs(self) -> list[Pair]:
        """Every tuned run against the base, then the tuned runs against each other, corrected for their number."""
        tuned = list(self.tuned())
        names = [*((run, "base") for run in tuned), *combinations(tuned, 2)]
        return pairs.corrected([self.pair(*both) for both in names], len(self.labels))

    def quality_table(self) -> pd.DataFrame:
        """Accuracy, macro-F1 and F1 per class in percent, with their intervals; differences to the base in points."""
        base = self.scoring["base"]
        rows = {}
        for run, scoring in self.scoring.items():
            row = {
                "accuracy %": 100 * scoring.accuracy,
                "95 % interval": percent_interval(scoring.accuracy_low, scoring.accuracy_high),
                "against base": 100 * (scoring.accuracy - base.accuracy),
                "macro-F1 %": 100 * scoring.macro_f1,
                "macro-F1 interval": percent_interval(scoring.macro_f1_low, scoring.macro_f1_high),
                "macro-F1 against base": 100 * (scoring.macro_f1 - base.macro_f1),
            }
            for label, of_class in scoring.classes.items():
                row[f"{label} F1 %"] = 100 * of_class.f1
                row[f"{label} interval"] = percent_interval(of_class.f1_low, of_class.f1_high)
                row[f"{label} against base"] = 100 * (of_class.f1 - base.classes[label].f1)
            rows[NAMES[run]] = row
        return pd.DataFrame(rows).T.infer_objects()

    def calibration_table(self) -> pd.DataFrame:
        """Calibration errors with their intervals, before and after the temperature, and accuracy when abstaining."""
        return pd.DataFrame(
            {NAMES[run]: _calibration_row(of) for run, of in self.calibration.items()}
        ).T.infer_objects()

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
        }
        table = pd.DataFrame(counts)
        judged = [NAMES[run] for run in self.tuned()] or list(table)
        return table.loc[table[judged].sum(axis=1).sort_values(ascending=False, kind="stable").index]

    def cost_table(self) -> pd.DataFrame:
        """What each training cost, and what its artefact weighs."""
        return pd.concat([cost_table(record) for record in self.tuned().values()]) if self.tuned() else pd.DataFrame()

    def answer(self) -> str:
        """The comparison in one paragraph, true whatever the figures are."""
        return answer.paragraph(self)


def _calibration_row(of: Calibration) -> dict[str, float | str]:
    after = {"temperature": "not recorded", "ECE % after": "", "Brier after": "", "log loss after": ""}
    if of.scaled:
        after = {
            "temperature": f"{of.temperature:.2f}",
            "ECE % after": f"{100 * of.scaled.error:.1f}",
            "Brier after": f"{of.scaled.brier:.3f}",
            "log loss after": f"{of.scaled.log_loss:.3f}",
        }
    return {
        "ECE %": 100 * of.scores.error,
        "ECE interval": percent_interval(*of.error_interval),
        "Brier": of.scores.brier,
        "Brier interval": f"{of.brier_interval[0]:.3f} to {of.brier_interval[1]:.3f}",
        "log loss": of.scores.log_loss,
        **after,
        **{f"accuracy % of the surest {share:.0%}": 100 * of.accuracy_at(share) for share in COVERAGES},
    }


def percent_interval(low: float, high: float) -> str:
    """An interval of shares in percent: `94.9 to 95.9`."""
    return f"{100 * low:.1f} to {100 * high:.1f}"


def cost_table(record: RunRecord) -> pd.DataFrame:
    """What one training cost, as a table of one row."""
    training = record.training
    return pd.DataFrame(
        {
            "training min": training.seconds / 60,
            "articles/s": training.articles_per_second,
            "real tokens/s": training.tokens_per_second,
            "peak memory GB": training.peak_memory_bytes / 1e9,
            "trained parameters": training.trainable_parameters,
            "share of parameters %": 100 * training.trainable_parameters / training.parameters,
            "artefact MB": training.artefact_bytes / 1e6,
            "engine": record.engine,
        },
        index=[NAMES[record.run]],
    )


def load(profile: str) -> Comparison:
    """Read the evaluated runs of a profile.

    Raises:
        DataError: The base was not evaluated; a record or its predictions are broken; the runs saw different data,
            prompts, test rows or models; or a tuned model predicts exactly as the base does.
    """
    return load_folder(paths.results_folder(profile), profile)


def load_folder(folder: Path, profile: str) -> Comparison:
    found = {run: folder / run for run in RUNS if (folder / run / records.RECORD).is_file()}
    read = {run: records.read(path) for run, path in found.items()}
    for run, record in read.items():
        if record.run != run:
            raise DataError(found[run] / records.RECORD, f"is the record of {record.run}; was the folder copied?")
    evaluated = {run: record for run, record in read.items() if record.evaluation}
    if "base" not in evaluated:
        raise DataError(folder, "the base model was not evaluated; run base_model_performance.ipynb first")
    _require_same_question(evaluated, folder)
    predictions = {run: records.read_predictions(record, found[run]) for run, record in evaluated.items()}
    _require_same_rows_and_other_answers(evaluated, predictions, folder)
    validation = {run: records.read_validation(record, found[run]) for run, record in evaluated.items()}
    return Comparison(profile, evaluated, predictions, validation)


def _require_same_question(evaluated: dict[str, RunRecord], folder: Path) -> None:
    """Figures on other data, another prompt or another model are not comparable: name the difference."""
    base = evaluated["base"]
    for run, record in evaluated.items():
        for what in ("fingerprint", "prompt", "test_rows"):
            mine, theirs = getattr(record.data, what), getattr(base.data, what)
            if mine != theirs:
                raise DataError(
                    folder / run, f"{what} is {mine}, and {theirs} in the base's record: run both on the same data"
                )
        if record.model != base.model:
            raise DataError(folder / run, f"the model is {record.model}, and {base.model} in the base's record")


def _require_same_rows_and_other_answers(
    evaluated: dict[str, RunRecord], predictions: dict[str, list[Prediction]], folder: Path
) -> None:
    """Pairs must be of the same rows; and an adapter that was not applied answers as the base does (vllm#10798)."""
    base_rows = [row.id for row in predictions["base"]]
    for run, record in evaluated.items():
        if [row.id for row in predictions[run]] != base_rows:
            raise DataError(folder / run, "was evaluated on other test rows than the base (another seed draws others)")
        same = [row.probabilities for row in predictions[run]] == [row.probabilities for row in predictions["base"]]
        if record.training and same:
            raise DataError(folder / run, "gives exactly the base model's probabilities: its artefact was not applied")
