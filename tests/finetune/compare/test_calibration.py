"""Calibration against loops over rows, scikit-learn's own temperature scaling, and tables worked out by hand."""

import numpy as np
import pytest

from data_prep.task import AG_NEWS
from finetune.compare import calibration
from finetune.predictions import Prediction

LABELS = AG_NEWS.labels


def drawn(rows: int, seed: int = 0, sharpness: float = 1.0) -> tuple[list[str], np.ndarray]:
    """Probabilities, and labels that follow them if `sharpness` is 1; above it, the probabilities are too sure."""
    generator = np.random.default_rng(seed)
    true = generator.dirichlet(np.full(4, 0.4), rows)
    labels = [LABELS[generator.choice(4, p=row)] for row in true]
    sharpened = np.maximum(true, 1e-6) ** sharpness
    return labels, sharpened / sharpened.sum(axis=1, keepdims=True)


def codes(labels) -> np.ndarray:
    return np.array([LABELS.index(label) for label in labels])


def as_predictions(labels, probabilities) -> list[Prediction]:
    return [
        Prediction(
            id=f"test-{number}",
            label=label,
            prediction=LABELS[row.argmax()],
            probabilities=dict(zip(LABELS, map(float, row), strict=True)),
            generated=None,
            has_duplicate=False,
        )
        for number, (label, row) in enumerate(zip(labels, probabilities, strict=True))
    ]


def error_by_loops(labels, probabilities) -> float:
    """Expected calibration error, row by row into 15 bins."""
    bins = [[] for _ in range(15)]
    for label, row in zip(labels, probabilities, strict=True):
        confidence = max(row)
        bins[min(14, int(confidence * 15))].append((confidence, LABELS[list(row).index(confidence)] == label))
    total = 0.0
    for rows in filter(None, bins):
        confidence = sum(c for c, _ in rows) / len(rows)
        accuracy = sum(right for _, right in rows) / len(rows)
        total += len(rows) / len(labels) * abs(accuracy - confidence)
    return total


def brier_by_loops(labels, probabilities) -> float:
    return sum(
        sum((p - (label == name)) ** 2 for p, name in zip(row, LABELS, strict=True))
        for label, row in zip(labels, probabilities, strict=True)
    ) / len(labels)


@pytest.mark.parametrize(("seed", "rows"), [(0, 1), (1, 9), (2, 400), (3, 400)])
def test_scores_are_those_of_loops(seed, rows):
    labels, probabilities = drawn(rows, seed, sharpness=2)
    scores = calibration.score(codes(labels), probabilities)
    assert scores.error.value == pytest.approx(error_by_loops(labels, probabilities))
    assert scores.brier.value == pytest.approx(brier_by_loops(labels, probabilities))


def test_a_table_by_hand():
    """Two rows at 0.7, one of them right; one at 0.95 and one certain, both right, in the last bin."""
    probabilities = np.array([[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.01, 0.02, 0.95, 0.02], [0, 0, 1, 0]])
    labels = ["World", "World", "Business", "Business"]
    found = calibration.reliability(*calibration.confidences(codes(labels), probabilities))
    np.testing.assert_allclose(found.confidence, [0.7, 0.975])
    np.testing.assert_allclose(found.accuracy, [0.5, 1.0])
    assert found.rows.tolist() == [2, 2]
    assert found.error == pytest.approx((2 * 0.2 + 2 * 0.025) / 4)


class TestTemperature:
    @pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
    def test_it_finds_how_much_too_sure_the_model_is(self, sharpness):
        labels, probabilities = drawn(20_000, sharpness=sharpness)
        assert calibration.fit_temperature(codes(labels), probabilities) == pytest.approx(sharpness, rel=0.06)

    def test_it_is_that_of_scikit_learn(self):
        from sklearn.calibration import CalibratedClassifierCV
        from sklearn.frozen import FrozenEstimator
        from sklearn.linear_model import LogisticRegression

        generator = np.random.default_rng(5)
        features = generator.normal(size=(600, 4))
        labels = [LABELS[i] for i in (features + generator.normal(size=(600, 4))).argmax(axis=1)]
        model = LogisticRegression(C=100).fit(5 * features[:300], labels[:300])
        held_out, held_labels = 5 * features[300:], labels[300:]
        scaled = CalibratedClassifierCV(FrozenEstimator(model), method="temperature").fit(held_out, held_labels)
        order = [list(model.classes_).index(label) for label in LABELS]
        ours = model.predict_proba(held_out)[:, order]
        ours = calibration.with_temperature(ours, calibration.fit_temperature(codes(held_labels), ours))
        np.testing.assert_allclose(ours, scaled.predict_proba(held_out)[:, order], atol=2e-3)

    def test_a_certain_and_wrong_row_can_be_scaled(self):
        probabilities = np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
        assert calibration.fit_temperature(np.array([0, 1, 0]), probabilities) > 1


class TestCalibration:
    def test_without_a_wrong_validation_row_there_is_no_temperature(self):
        labels, probabilities = drawn(50)
        right = as_predictions([LABELS[best] for best in probabilities.argmax(axis=1)], probabilities)
        for validation, said in (([], "not recorded"), (right, "none: all validation rows are right")):
            found = calibration.of(as_predictions(labels, probabilities), validation)
            assert (found.temperature, found.scaled) == (said, None)

    def test_the_temperature_is_that_of_the_validation_rows(self):
        test, validation = drawn(500, seed=1, sharpness=3), drawn(500, seed=2, sharpness=3)
        found = calibration.of(as_predictions(*test), as_predictions(*validation))
        assert found.temperature == pytest.approx(
            calibration.fit_temperature(codes(validation[0]), validation[1]), rel=1e-3
        )
        scaled = calibration.with_temperature(test[1], found.temperature)
        assert found.scaled.error.value == pytest.approx(error_by_loops(test[0], scaled))
        assert found.scaled.log_loss.value < found.scores.log_loss.value
