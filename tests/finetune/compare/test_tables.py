"""Costs, targets and fronts, by hand."""

import factories
import pytest
from factories import right_on, write_run
from test_baselines import write_baseline

from finetune import paths
from finetune.compare import tables as costs
from finetune.compare.comparison import load
from finetune.records import LogPoint

HISTORY = [
    LogPoint(step=5, epoch=0.5, validation_accuracy=0.89, training_seconds=40.0),
    LogPoint(step=7, epoch=0.7, loss=0.3),
    LogPoint(step=10, epoch=1.0, validation_accuracy=0.925, training_seconds=90.0),
    LogPoint(step=15, epoch=1.5, validation_accuracy=0.91, training_seconds=300.0),
]


def test_seconds_to_an_accuracy_are_those_of_the_first_validation_that_shows_it():
    training = factories.training("lora", history=HISTORY)
    assert [costs.seconds_to(training, target) for target in (0.85, 0.9, 0.92, 0.93)] == [40, 90, 90, None]


def test_the_front_by_hand():
    points = [(3, 90), (1, 80), (2, 85), (2, 84), (4, 89), (5, 91), (1, 79)]
    assert costs.pareto_front(points) == [1, 2, 0, 5]


def test_the_front_holds_what_nothing_dominates():
    import itertools
    import random

    generator = random.Random(1)
    points = [(generator.randint(0, 9), generator.randint(0, 9)) for _ in range(40)]
    front = [points[index] for index in costs.pareto_front(points)]
    better = {one for one, other in itertools.permutations(set(points), 2) if other[0] <= one[0] and other[1] >= one[1]}
    assert sorted(front) == sorted(set(points) - better)


class TestTables:
    @pytest.fixture
    def results(self, home):
        results = paths.results_folder("cpu")
        write_run(results, "base", right_on(20, 40))
        write_run(results, "full", right_on(36, 40), cost={"history": HISTORY, "energy_joules": 12_340.0})
        write_run(results, "lora", right_on(34, 40), cost={"history": factories.HISTORY})
        return results

    def test_time_to_accuracy(self, results):
        write_baseline(results, "svm", right_on(30, 40))
        table = costs.time_to_accuracy(load("cpu"))
        assert list(table.index) == ["full", "TF-IDF + linear SVM"], "LoRA's validations were not timed"
        assert list(table.loc["full"]) == ["90 s", "90 s", "never (best 92.5 %)", "never (best 92.5 %)"]
        assert list(table.loc["TF-IDF + linear SVM"]) == ["2 s", *["never (best 91.0 %)"] * 3]

    def test_without_times_there_is_no_table(self, home):
        results = paths.results_folder("cpu")
        write_run(results, "base", right_on(20, 40))
        write_run(results, "lora", right_on(34, 40))
        assert costs.time_to_accuracy(load("cpu")).empty

    def test_energy_is_in_kilojoules_or_a_dash(self, results):
        table = load("cpu").cost_table()
        assert list(table["energy kJ"]) == ["12.3", "-"]

    def test_costs_have_the_units_of_their_titles(self, results):
        found = costs.measured(load("cpu").trainings("full"))
        assert list(found.values()) == [1.5, 2.5, 12.34, 4, 0.02]
