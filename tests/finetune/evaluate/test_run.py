"""What an evaluation shows of a run beside its record."""

import numpy as np
import pytest
from factories import LABELS, predictions, write_run

from finetune import paths
from finetune.evaluate.run import prior_corrected, summary
from finetune.predictions import Prediction


def rows(probabilities: np.ndarray, name: str) -> list[Prediction]:
    """The labels in turn, with these probabilities."""
    return [
        Prediction(
            id=f"{name}-{row}",
            label=LABELS[row % 4],
            prediction=LABELS[of.argmax()],
            probabilities=dict(zip(LABELS, of.tolist(), strict=True)),
            generated=None,
            has_duplicate=False,
        )
        for row, of in enumerate(probabilities)
    ]


class TestPrior:
    @pytest.fixture
    def liking(self):
        """Probabilities of 80 rows by a model that likes the second label."""
        own = np.random.default_rng(1).dirichlet([1] * 4, 80) + np.tile(np.eye(4), (20, 1))
        own *= [1, 6, 1, 1]
        return own / own.sum(axis=1, keepdims=True)

    def test_what_validation_rows_show_of_it_is_taken_from_the_test_rows(self, home, liking):
        validation, test = liking[:40], liking[40:]
        results = paths.results_folder("cpu")
        record = write_run(results, "base", [], rows=rows(test, "test"), validation=rows(validation, "validation"))
        truth = np.arange(40) % 4
        expected = np.mean((test / validation.mean(axis=0)).argmax(axis=1) == truth)
        assert prior_corrected(record).accuracy == pytest.approx(expected)
        assert expected > record.evaluation.scoring.accuracy + 0.1
        line = summary(record).loc["scoring, corrected for the model's prior"]
        assert (line["rows"], line["accuracy"]) == (40, f"{expected:.1%}")

    def test_without_validation_rows_there_is_no_such_line(self, home):
        record = write_run(paths.results_folder("cpu"), "base", [], rows=predictions([True] * 8))
        assert prior_corrected(record) is None and "prior" not in " ".join(summary(record).index)
