"""Metrics against scikit-learn, closed formulae and enumeration."""

import random
from itertools import product
from math import comb, log

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, precision_score, recall_score
from statsmodels.stats.proportion import proportion_confint

from data_prep.task import AG_NEWS
from finetune import metrics, resampling

LABELS = AG_NEWS.labels


def random_answers(seed: int, rows: int, invalid: float = 0.0) -> tuple[list[str], list[str | None]]:
    generator = random.Random(seed)
    labels = generator.choices(LABELS, k=rows)
    predictions = [label if generator.random() < 0.7 else generator.choice(LABELS) for label in labels]
    return labels, [None if generator.random() < invalid else prediction for prediction in predictions]


@pytest.mark.parametrize("rows", [1, 7, 200])
@pytest.mark.parametrize("invalid", [0, 0.3, 1])
def test_figures_are_those_of_scikit_learn(rows, invalid):
    labels, predictions = random_answers(rows, rows, invalid)
    result = metrics.compute(labels, predictions, LABELS)
    answers = [prediction or "invalid" for prediction in predictions]
    options = {"labels": list(LABELS), "zero_division": 0}
    assert result.rows == rows
    assert result.accuracy == pytest.approx(accuracy_score(labels, answers))
    # Over the classes that have rows.
    there = [label for label in LABELS if label in labels]
    assert result.macro_f1 == pytest.approx(f1_score(labels, answers, average="macro", **options | {"labels": there}))
    assert metrics.first_difference(result, labels, answers) is None
    per_class = f1_score(labels, answers, average=None, **options)
    precision = precision_score(labels, answers, average=None, **options)
    for index, label in enumerate(LABELS):
        assert result.classes[label].f1 == pytest.approx(per_class[index])
        assert result.classes[label].precision == pytest.approx(precision[index])
        assert result.classes[label].rows == labels.count(label)


def test_a_table_worked_out_by_hand():
    labels = ["World"] * 4 + ["Sports"] * 2 + ["Business"] * 2 + ["Sci/Tech"] * 2
    predictions = ["World", "World", "Sports", None, "Sports", "Sports", "Sci/Tech", "Business", "Business", None]
    result = metrics.compute(labels, predictions, LABELS)
    assert result.accuracy == 0.5
    assert result.confusion == [[2, 1, 0, 0], [0, 2, 0, 0], [0, 0, 1, 1], [0, 0, 1, 0]]
    world, sports, business, technology = (result.classes[label] for label in LABELS)
    assert (world.precision, world.recall, world.f1) == pytest.approx((1, 1 / 2, 2 / 3))
    assert (sports.precision, sports.recall, sports.f1) == pytest.approx((2 / 3, 1, 4 / 5))
    assert (business.precision, business.recall, business.f1) == pytest.approx((1 / 2, 1 / 2, 1 / 2))
    assert (technology.precision, technology.recall, technology.f1) == (0, 0, 0)
    assert result.macro_f1 == pytest.approx((2 / 3 + 4 / 5 + 1 / 2) / 4)


def test_different_lengths_are_refused():
    with pytest.raises(ValueError):
        metrics.compute(["World", "Sports"], ["World"], LABELS)


@pytest.mark.parametrize("rows", [1, 2, 7, 59, 128, 7600])
def test_the_interval_is_wilson_s_and_holds_the_accuracy(rows):
    """The pictures draw the distances, and a negative one is an error there."""
    for correct in {0, 1, rows // 2, rows - 1, rows}:
        low, high = metrics.accuracy_interval(correct, rows)
        assert (low, high) == pytest.approx(proportion_confint(correct, rows, method="wilson"), abs=1e-9)
        assert 0 <= 100 * low <= 100 * (correct / rows) <= 100 * high <= 100


def discordant(only_first: int, only_second: int, both: int = 3, neither: int = 2) -> tuple[list[bool], list[bool]]:
    pairs = [(True, False)] * only_first + [(False, True)] * only_second
    pairs += [(True, True)] * both + [(False, False)] * neither
    random.Random(0).shuffle(pairs)
    return [first for first, _ in pairs], [second for _, second in pairs]


def test_mcnemar_is_the_exact_binomial_test():
    """All ways in which the discordant rows could fall, at least as uneven as they did."""
    for first, second in product(range(11), repeat=2):
        count = first + second
        extreme = sum(comb(count, k) for k in range(count + 1) if abs(count - 2 * k) >= abs(first - second))
        assert metrics.mcnemar(*discordant(first, second)) == (first, second, pytest.approx(extreme / 2**count))
    assert metrics.mcnemar(*discordant(10, 2, both=500, neither=300))[2] == pytest.approx(158 / 4096)


def test_log_loss_takes_the_columns_in_the_order_of_the_labels():
    probabilities = np.array([[0.7, 0.1, 0.1, 0.1], [0.2, 0.5, 0.2, 0.1], [0.3, 0.3, 0.15, 0.25], [0.1, 0.1, 0.4, 0.4]])
    expected = -(log(0.7) + log(0.5) + log(0.15) + log(0.4)) / 4
    assert metrics.log_loss(LABELS, probabilities, LABELS) == pytest.approx(expected)
    # Where a class has no row, and where a sure answer is wrong.
    assert metrics.log_loss(["Sports"], probabilities[1:2], LABELS) == pytest.approx(-log(0.5))
    assert 10 < metrics.log_loss(["World"], np.array([[0.0, 1.0, 0.0, 0.0]]), LABELS) < 1000


@pytest.mark.parametrize("what", ["accuracy", "accuracy_low", "accuracy_high", "macro_f1"])
def test_a_figure_that_predictions_do_not_give_is_named(what):
    labels, answers = ["World", "Sports", "Business", "Sci/Tech"] * 5, ["World", "Sports", "", "World"] * 5
    found = metrics.compute(labels, answers, LABELS)
    assert metrics.first_difference(found, labels, answers) is None
    assert metrics.first_difference(found.model_copy(update={what: 0.7}), labels, answers) == what
    moved = [[5, 0, 0, 0], [0, 5, 0, 0], [0, 0, 0, 0], [0, 5, 0, 0]]
    assert metrics.first_difference(found.model_copy(update={"confusion": moved}), labels, answers) == "confusion"


def estimate(name: str, scoring: metrics.Metrics) -> tuple[float, float, float]:
    counts = scoring.counts
    return metrics.METRICS[name].estimate(resampling.counted(counts), resampling.resampled(counts))


@pytest.mark.parametrize("invalid", [0, 7])
def test_every_metric_is_that_of_scikit_learn_and_its_interval_that_of_the_rows(invalid):
    generator = np.random.default_rng(3)
    labels = [AG_NEWS.labels[min(row % 7, 3)] for row in range(200)]
    predicted = [label if generator.random() < 0.7 else str(generator.choice(AG_NEWS.labels)) for label in labels]
    predicted[:invalid] = [None] * invalid
    scoring = metrics.compute(labels, predicted, AG_NEWS.labels)
    answers = [answer or "" for answer in predicted]
    expected = {
        "macro_f1": scoring.macro_f1,
        "matthews": matthews_corrcoef(labels, answers),
        "balanced_accuracy": recall_score(labels, answers, labels=AG_NEWS.labels, average="macro"),
    }
    assert expected.keys() == metrics.METRICS.keys()
    for name in metrics.METRICS:
        value, low, high = estimate(name, scoring)
        assert value == pytest.approx(expected[name]) and low < value < high
    assert estimate("macro_f1", scoring)[1:] == (scoring.macro_f1_low, scoring.macro_f1_high)


def test_balanced_accuracy_is_shown_where_it_is_not_the_accuracy():
    even, uneven = (metrics.compute(labels, labels, LABELS[:2]) for labels in (LABELS[:2] * 5, LABELS[:1] + LABELS[:2]))
    assert "balanced accuracy %" in metrics.figures(uneven) and "balanced accuracy %" not in metrics.figures(even)
    # Of a class without rows it says nothing.
    assert estimate("balanced_accuracy", metrics.compute(["World"], ["World"], LABELS))[0] == 1


def test_one_answer_for_all_rows_has_no_correlation():
    scoring = metrics.compute(["World", "Sports"] * 5, ["World"] * 10, AG_NEWS.labels)
    assert estimate("matthews", scoring) == (0, 0, 0)


class TestDetectableDifference:
    @pytest.mark.parametrize(("rows", "discordant"), [(7600, 0.03), (1000, 0.1), (128, 0.3)])
    def test_it_is_found_four_times_in_five(self, rows, discordant):
        """By drawing rows and McNemar's test without correction, which the formula is of."""
        share = metrics.detectable_difference(rows, discordant) / 100
        chances = [(discordant + share) / 2, (discordant - share) / 2, 1 - discordant]
        drawn = np.random.default_rng(3).multinomial(rows, chances, size=4000)
        found = abs(drawn[:, 0] - drawn[:, 1]) / np.sqrt(np.maximum(drawn[:, 0] + drawn[:, 1], 1)) > 1.959964
        assert found.mean() == pytest.approx(0.8, abs=0.03)

    def test_few_rows_can_show_no_more_than_all_that_differ(self):
        assert metrics.detectable_difference(20) == 3
