"""Paired tests against statsmodels and scipy, Holm's correction by hand, means over seeds by drawing from a truth."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import norm
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from data_prep.task import AG_NEWS
from finetune.compare import stats
from finetune.compare.stats import Pair

CLASSES = AG_NEWS.labels
LABELS = ["World", "Sports", "Business", "Sci/Tech"] * 100


def answers(right) -> list[str]:
    """The labels in turn; a wrong answer is the next label."""
    return [CLASSES[(row + (not is_right)) % 4] for row, is_right in enumerate(right)]


def compare(first, second) -> Pair:
    labels = answers([True] * len(first))
    return stats.compare("lora", "qlora", labels, answers(first), answers(second), CLASSES)


def table(only_first: int, only_second: int, both: int = 30, neither: int = 10) -> tuple[list[bool], list[bool]]:
    outcomes = [(True, False)] * only_first + [(False, True)] * only_second
    outcomes += [(True, True)] * both + [(False, False)] * neither
    return [first for first, _ in outcomes], [second for _, second in outcomes]


def pair(p_value) -> Pair:
    return Pair("lora", "qlora", 0.3, -0.2, 0.8, 0.3, -0.2, 0.8, 10, 7, p_value, p_value)


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (9, 2), (2, 9), (25, 25), (40, 12)])
def test_the_test_is_that_of_statsmodels(only_first, only_second):
    expected = statsmodels_mcnemar([[30, only_first], [only_second, 10]], exact=True).pvalue
    compared = compare(*table(only_first, only_second))
    assert compared.p_value == pytest.approx(expected)
    assert (compared.only_first, compared.only_second) == (only_first, only_second)
    if only_first == only_second == 0:
        assert (compared.points, compared.low, compared.high, compared.is_tie) == (0, 0, 0, True)


def test_a_pair_in_words_has_its_figures():
    assert str(pair(0.63)) == "LoRA against QLoRA: +0.3 points (-0.2 to +0.8), p = 0.630"


class TestHolm:
    def test_p_values_are_corrected_by_hand(self):
        """Sorted 0.001, 0.01, 0.03, 0.04: times 4, 3, 2, 1, and never below the one before."""
        corrected = stats.corrected([pair(p) for p in (0.03, 0.001, 0.04, 0.01)])
        assert [of.corrected_p for of in corrected] == pytest.approx([0.06, 0.004, 0.06, 0.03])
        assert [of.is_tie for of in corrected] == [True, False, True, False]

    def test_it_is_that_of_statsmodels(self):
        p_values = np.random.default_rng(0).random(14) ** 3
        assert stats.holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])

    def test_the_limit_is_five_percent_and_one_is_not_corrected(self):
        assert [stats.corrected([pair(p_value)])[0].is_tie for p_value in (0.0499, 0.05)] == [False, True]
        assert stats.corrected([]) == []


class TestOverSeeds:
    def test_of_rows_that_do_not_differ_it_is_the_t_test_of_the_seeds_means(self):
        values = np.repeat([[0.90], [0.94], [0.93]], 400, axis=1)
        found, expected = stats.estimate(LABELS, values - 0.9), DescrStatsW([0.0, 0.04, 0.03])
        assert found.interval() == pytest.approx(expected.tconfint_mean())
        assert found.p_value() == pytest.approx(expected.ttest_mean()[1])
        assert found.freedom == pytest.approx(2)

    def test_of_seeds_that_do_not_differ_it_is_the_t_test_of_the_rows(self):
        """Of one class, where nothing is stratified."""
        rows = np.random.default_rng(0).normal(0.02, 0.3, 400)
        found, expected = stats.estimate(["World"] * 400, np.tile(rows, (3, 1))), DescrStatsW(rows)
        assert found.interval() == pytest.approx(expected.tconfint_mean())
        assert found.p_value() == pytest.approx(expected.ttest_mean()[1])

    def test_what_classes_have_in_common_is_no_error(self):
        """One class always right and another always wrong: so they would be in other rows too."""
        values = np.array([[label == "World" for label in LABELS]] * 2, float)
        assert stats.estimate(LABELS, values).error == 0

    @pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
    def test_where_nothing_varies_there_is_no_error(self, value):
        assert stats.estimate(LABELS, np.full((3, 400), value)).error == 0

    @pytest.mark.parametrize(("between_seeds", "rows", "both"), [(0, 0.15, 0.2), (0.02, 0.15, 0.2), (0.05, 0, 0.1)])
    def test_the_interval_holds_the_truth(self, between_seeds, rows, both):
        """Three new seeds and 400 new rows each time: near 95 of 100 intervals hold the true mean, or more."""
        generator = np.random.default_rng(1)

        def holds() -> bool:
            values = generator.normal(0, between_seeds, (3, 1)) + generator.normal(0, rows, (1, 400))
            low, high = stats.estimate(LABELS, values + generator.normal(0, both, (3, 400))).interval()
            return low <= 0 <= high

        assert 0.915 < np.mean([holds() for _ in range(1500)]) < 0.995

    @pytest.mark.parametrize(("between_seeds", "size", "strict"), [(0, 0.05, 1), (0.3, 0.068, 3.8), (0.5, 0.078, 6.1)])
    def test_how_often_a_true_hypothesis_is_rejected(self, between_seeds, size, strict):
        """What the module says of its test, by drawing: three seeds, an error of the rows of 0.115."""
        generator = np.random.default_rng(0)

        def p_value() -> float:
            values = generator.normal(0, between_seeds, (3, 1)) + generator.normal(0, 0.115 * 200**0.5, (1, 200))
            return stats.estimate(["World"] * 200, values).p_value()

        p_values = np.array([p_value() for _ in range(12_000)])
        assert (p_values < 0.05).mean() == pytest.approx(size, abs=0.006)
        assert (p_values < 0.05 / 14).mean() * 14 / 0.05 == pytest.approx(strict, abs=0.8)

    def test_a_class_of_one_row_shows_no_variance(self):
        found = stats.estimate(["World", "World", "Sports"], np.array([[1, 0, 1], [1, 0, 1]], float))
        assert found.error == pytest.approx((2 * 0.5 / 9) ** 0.5)

    def test_rows_that_leave_no_error_are_tested_by_mcnemar(self):
        """Of four rows in two classes all of one class are the first's alone: p = 2/2², not 0."""
        first, second = np.array([[1, 1, 1, 1]] * 3), np.array([[1, 1, 0, 0]] * 3)
        found = stats.over_seeds(["World", "World", "Sports", "Sports"], first, second)
        assert (found.points, found.p_value) == (50, 0.5)

    def test_one_training_has_no_seeds(self):
        assert stats.over_seeds(LABELS, np.ones((1, 400)), np.ones((1, 400))) is None


class TestNoWorse:
    @pytest.mark.parametrize(
        ("only_first", "only_second", "rows", "margin"),
        [(0, 0, 128, 0.01), (3, 9, 400, 0.02), (9, 3, 400, 0.02), (90, 110, 7600, 0.01), (0, 6, 128, 0.05)],
    )
    def test_one_training_is_tested_by_the_score_of_the_likelihood(self, only_first, only_second, rows, margin):
        """Tango's test from its definition: the likelihood's maximum where the first is worse by the margin is found
        numerically."""

        def unlikeliness(q):
            chances = np.array([q - margin, q, 1 - 2 * q + margin])
            counts = np.array([only_first, only_second, rows - only_first - only_second])
            return -(counts[counts > 0] * np.log(np.maximum(chances[counts > 0], 1e-300))).sum()

        q = minimize_scalar(
            unlikeliness, bounds=(margin, (1 + margin) / 2), method="bounded", options={"xatol": 1e-12}
        ).x
        if only_first == only_second == 0:
            q = margin
        variance = rows * (q + (q - margin) - margin**2)
        expected = norm.sf((only_first - only_second + rows * margin) / variance**0.5)
        assert stats.score_test(only_first, only_second, rows, margin)[0] == pytest.approx(expected, rel=1e-4)

    def test_without_a_margin_it_is_mcnemar_s(self):
        p_value, _ = stats.score_test(60, 40, 1000, 1e-9)
        two_sided = statsmodels_mcnemar([[0, 60], [40, 0]], exact=False, correction=False).pvalue
        assert p_value == pytest.approx(two_sided / 2, rel=1e-4)

    def test_several_seeds_are_tested_by_t(self):
        """Rows of one class and seeds that do not differ: statsmodels' one-sided t test of the shifted rows."""
        generator = np.random.default_rng(0)
        first, second = (np.tile(generator.random(400) < 0.9, (3, 1)) for _ in range(2))
        expected = DescrStatsW(first[0].astype(float) - second[0]).ttest_mean(-0.02, alternative="larger")[1]
        assert stats.no_worse(["World"] * 400, first, second, 0.02)[0] == pytest.approx(expected)

    def test_seeds_whose_rows_do_not_differ_are_tested_by_one(self):
        alike = np.ones((3, 400), bool)
        assert stats.no_worse(LABELS, alike, alike, 0.02)[0] == stats.score_test(0, 0, 400, 0.02)[0]

    def test_rows_cannot_replace_seeds(self):
        """Three seeds that differ by 10 points: no number of rows shows a margin of 1."""
        first = np.array([np.arange(400) < count for count in (300, 340, 380)])
        assert stats.no_worse(LABELS, first, np.tile(np.arange(400) < 340, (3, 1)), 0.01)[1] == np.inf
