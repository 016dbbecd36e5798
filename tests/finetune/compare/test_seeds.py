"""Means over seeds and rows, by hand, by statsmodels, and by drawing new seeds and rows from a known truth."""

import numpy as np
import pytest
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import DescrStatsW

from finetune.compare import seeds
from finetune.compare.seeds import Estimate

LABELS = ["World", "Sports", "Business", "Sci/Tech"] * 100


def test_of_rows_that_do_not_differ_it_is_the_t_test_of_the_seeds_means():
    values = np.repeat([[0.90], [0.94], [0.93]], 400, axis=1)
    found, expected = seeds.estimate(LABELS, values - 0.9), DescrStatsW([0.0, 0.04, 0.03])
    assert found.interval() == pytest.approx(expected.tconfint_mean())
    assert found.p_value() == pytest.approx(expected.ttest_mean()[1])
    assert found.freedom == pytest.approx(2)


def test_of_seeds_that_do_not_differ_it_is_the_t_test_of_the_rows():
    """Of one class, where nothing is stratified."""
    rows = np.random.default_rng(0).normal(0.02, 0.3, 400)
    found, expected = seeds.estimate(["World"] * 400, np.tile(rows, (3, 1))), DescrStatsW(rows)
    assert found.interval() == pytest.approx(expected.tconfint_mean())
    assert found.p_value() == pytest.approx(expected.ttest_mean()[1])


def test_what_classes_have_in_common_is_no_error():
    """One class always right and another always wrong: so they would be in other rows too."""
    values = np.array([[label == "World" for label in LABELS]] * 2, float)
    assert seeds.estimate(LABELS, values).error == 0


@pytest.mark.parametrize(("between_seeds", "rows", "both"), [(0, 0.15, 0.2), (0.02, 0.15, 0.2), (0.05, 0, 0.1)])
def test_the_interval_holds_the_truth(between_seeds, rows, both):
    """Three new seeds and 400 new rows each time: near 95 of 100 intervals hold the true mean, or more."""
    generator = np.random.default_rng(1)

    def holds() -> bool:
        values = generator.normal(0, between_seeds, (3, 1)) + generator.normal(0, rows, (1, 400))
        low, high = seeds.estimate(LABELS, values + generator.normal(0, both, (3, 400))).interval()
        return low <= 0 <= high

    assert 0.915 < np.mean([holds() for _ in range(1500)]) < 0.995


def test_few_seeds_that_differ_much_widen_the_interval():
    alike, apart = (np.array([[1 - gap], [1], [1 + gap]]) + np.zeros((3, 400)) for gap in (0.01, 0.1))
    low, high = seeds.estimate(LABELS, apart).interval()
    assert high - low == pytest.approx(10 * np.diff(seeds.estimate(LABELS, alike).interval())[0])
    # t with two degrees of freedom: 4.303 standard errors.
    assert high - low == pytest.approx(2 * 4.3027 * 0.1 / 3**0.5, rel=1e-4)


@pytest.mark.parametrize("freedom", [2, 5, 30])
def test_the_detectable_mean_is_that_of_statsmodels(freedom):
    effect = TTestPower().solve_power(nobs=freedom + 1, alpha=0.05, power=0.8)
    found = Estimate(0.0, 0.3, freedom).detectable(0.05)
    assert found == pytest.approx(0.3 * effect * (freedom + 1) ** 0.5, rel=1e-4)


def test_a_detectable_mean_is_found_four_times_in_five_at_a_strict_level():
    """Where scipy's non-central t distribution gives no number: 2.3 degrees of freedom, a level of 0.05 / 14."""
    from scipy.stats import t

    shift = Estimate(0.0, 1.0, 2.3).detectable(0.05 / 14)
    generator = np.random.default_rng(5)
    drawn = (generator.normal(shift, 1, 200_000)) / np.sqrt(generator.chisquare(2.3, 200_000) / 2.3)
    assert (2 * t.sf(abs(drawn), 2.3) < 0.05 / 14).mean() == pytest.approx(0.8, abs=0.005)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_where_nothing_varies_there_is_no_error(value):
    found = seeds.estimate(LABELS, np.full((3, 400), value))
    assert (found.error, found.detectable(0.05)) == (0, None)


@pytest.mark.parametrize(("between_seeds", "size", "strict"), [(0, 0.05, 1), (0.3, 0.068, 3.8), (0.5, 0.078, 6.1)])
def test_how_often_a_true_hypothesis_is_rejected(between_seeds, size, strict):
    """What the module says of its test, by drawing: three seeds, an error of the rows of 0.115."""
    generator = np.random.default_rng(0)

    def p_value() -> float:
        values = generator.normal(0, between_seeds, (3, 1)) + generator.normal(0, 0.115 * 200**0.5, (1, 200))
        return seeds.estimate(["World"] * 200, values).p_value()

    p_values = [p_value() for _ in range(12_000)]
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(size, abs=0.006)
    assert np.mean(np.array(p_values) < 0.05 / 14) * 14 / 0.05 == pytest.approx(strict, abs=0.8)


def test_a_class_of_one_row_shows_no_variance():
    found = seeds.estimate(["World", "World", "Sports"], np.array([[1, 0, 1], [1, 0, 1]], float))
    assert found.error == pytest.approx((2 * 0.5 / 9) ** 0.5)
