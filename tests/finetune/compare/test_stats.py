"""Paired tests against statsmodels, Holm's correction by hand, and what a test could have shown by simulation."""

import re

import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar

from data_prep import LABELS
from finetune.compare import stats as pairs
from finetune.compare.stats import Pair, detectable


def answers(right) -> list[str]:
    """The labels in turn; a wrong answer is the next label."""
    return [LABELS[(row + (not is_right)) % 4] for row, is_right in enumerate(right)]


def compare(first, second) -> Pair:
    labels = answers([True] * len(first))
    return pairs.compare("lora", "qlora", labels, answers(first), answers(second))


def table(only_first: int, only_second: int, both: int = 30, neither: int = 10) -> tuple[list[bool], list[bool]]:
    outcomes = [(True, False)] * only_first + [(False, True)] * only_second
    outcomes += [(True, True)] * both + [(False, False)] * neither
    return [first for first, _ in outcomes], [second for _, second in outcomes]


def pair(points=0.3, p_value=0.63, **changes) -> Pair:
    values = {
        "first": "lora",
        "second": "qlora",
        "points": points,
        "low": points - 0.5,
        "high": points + 0.5,
        "f1_points": points,
        "f1_low": points - 0.5,
        "f1_high": points + 0.5,
        "only_first": 10,
        "only_second": 7,
        "p_value": p_value,
        "corrected_p": p_value,
        "detectable": 1.2,
    }
    return Pair(**(values | changes))


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (9, 2), (2, 9), (25, 25), (40, 12)])
def test_the_test_is_that_of_statsmodels(only_first, only_second):
    expected = statsmodels_mcnemar([[30, only_first], [only_second, 10]], exact=True).pvalue
    compared = compare(*table(only_first, only_second))
    assert compared.p_value == pytest.approx(expected)
    assert (compared.only_first, compared.only_second) == (only_first, only_second)


@pytest.mark.parametrize(("only_first", "only_second"), [(9, 2), (60, 30)])
def test_the_interval_of_a_difference_is_near_the_normal_one(only_first, only_second):
    compared = compare(*table(only_first, only_second, both=400, neither=100))
    rows = 500 + only_first + only_second
    share = (only_first - only_second) / rows
    error = ((only_first + only_second) / rows - share**2) ** 0.5 / rows**0.5
    assert compared.points == pytest.approx(100 * share)
    wald = (100 * (share - 1.96 * error), 100 * (share + 1.96 * error))
    assert (compared.low, compared.high) == pytest.approx(wald, abs=0.1 * 100 * 1.96 * error)


class TestHolm:
    def test_p_values_are_corrected_by_hand(self):
        """Sorted 0.001, 0.01, 0.03, 0.04: times 4, 3, 2, 1, and never below the one before."""
        given = [pair(p_value=p) for p in (0.03, 0.001, 0.04, 0.01)]
        assert [of.corrected_p for of in pairs.corrected(given, 1000)] == pytest.approx([0.06, 0.004, 0.06, 0.03])

    def test_ties_are_those_after_the_correction(self):
        given = [pair(p_value=p) for p in (0.03, 0.001, 0.04, 0.01)]
        assert [of.is_tie for of in pairs.corrected(given, 1000)] == [True, False, True, False]

    def test_one_pair_is_not_corrected(self):
        assert pairs.corrected([pair(p_value=0.04)], 1000)[0].corrected_p == pytest.approx(0.04)

    def test_none_is_none(self):
        assert pairs.corrected([], 1000) == []

    def test_the_detectable_difference_is_that_at_the_level_that_was_asked_of_the_ties(self):
        given = [pair(p_value=p, only_first=60, only_second=40) for p in (0.5, 0.001, 0.6)]
        corrected = pairs.corrected(given, 1000)
        assert corrected[0].detectable == pytest.approx(detectable(100, 1000, 0.025))


class TestDetectable:
    @pytest.mark.parametrize("discordant", [12, 40, 170])
    def test_it_is_found_four_times_in_five(self, discordant):
        """Simulated: rows fall to the better method with the share that the difference implies."""
        difference = detectable(discordant, 7600, 0.05)
        share = (1 + difference / 100 * 7600 / discordant) / 2
        won = np.random.default_rng(3).binomial(discordant, share, size=4000)
        p_values = {k: statsmodels_mcnemar([[0, k], [discordant - k, 0]], exact=True).pvalue for k in set(won)}
        found = np.mean([p_values[k] < 0.05 for k in won])
        assert found == pytest.approx(0.8, abs=0.025)

    def test_it_is_near_the_normal_approximation(self):
        """With many discordant rows (Connor 1987): n d² = (1.96 √ψ + 0.8416 √(ψ - d²))², ψ their share.

        The exact test asks for a little more.
        """
        difference = detectable(400, 7600, 0.05) / 100
        share = 400 / 7600
        needed = (1.959964 * share**0.5 + 0.841621 * (share - difference**2) ** 0.5) ** 2 / difference**2
        assert 0.93 * 7600 < needed < 7600

    @pytest.mark.parametrize("discordant", range(6))
    def test_with_fewer_than_six_rows_nothing_could_be_shown(self, discordant):
        assert detectable(discordant, 100, 0.05) is None

    def test_with_six_it_is_all_but_all_of_them(self):
        """Only six of six is significant: share⁶ = 0.8, but for the other tail."""
        share = 0.8 ** (1 / 6)
        assert detectable(6, 100, 0.05) == pytest.approx(100 * (2 * share - 1) * 6 / 100, rel=1e-3)

    def test_a_stricter_level_needs_more(self):
        assert detectable(100, 1000, 0.05) < detectable(100, 1000, 0.005)


class TestSentence:
    @pytest.mark.parametrize(("first", "second"), [(180, 100), (100, 180)])
    def test_winner_points_and_interval_have_one_direction(self, first, second):
        text = str(compare([row < first for row in range(200)], [row < second for row in range(200)]))
        winner = "LoRA beats QLoRA" if first > second else "QLoRA beats LoRA"
        points, low, high = map(float, re.search(r"by ([-\d.]+) points \(([-\d.]+) to ([-\d.]+)", text).groups())
        assert text.startswith(f"{winner} by 40.0 points")
        assert low < points < high

    def test_a_tie_says_what_could_have_been_shown(self):
        assert str(pair()) == (
            "LoRA and QLoRA cannot be told apart (+0.3 points, -0.2 to +0.8, p = 0.630; "
            "a true difference of 1.2 points would have been found four times in five)"
        )

    @pytest.mark.parametrize(("count", "rows"), [((0, 0), "no row"), ((1, 0), "one row"), ((2, 3), "5 rows")])
    def test_a_tie_that_nothing_could_have_broken_says_so(self, count, rows):
        text = str(pair(only_first=count[0], only_second=count[1], detectable=None))
        assert text.endswith(f"with {rows} that one of them alone gets right, no difference could have been shown)")

    def test_rows_that_leave_no_error_are_tested_by_mcnemar(self):
        """Of four rows in two classes all of one class are the first's alone: p = 2/2², not 0."""
        first, second = np.array([[1, 1, 1, 1]] * 3), np.array([[1, 1, 0, 0]] * 3)
        found = pairs.over_seeds(["World", "World", "Sports", "Sports"], first, second)
        assert (found.points, found.estimate.error, found.p_value) == (50, 0, 0.5)

    @pytest.mark.parametrize(("p_value", "is_tie"), [(0.0499, False), (0.05, True), (0.0501, True)])
    def test_the_limit_is_five_percent(self, p_value, is_tie):
        assert pair(p_value=p_value).is_tie == is_tie
