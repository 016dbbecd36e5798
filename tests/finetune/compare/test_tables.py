"""What test_report_numbers.py does not show of tables: their width, and what they leave out."""

import itertools
import random

import factories
import pytest
from factories import SETTINGS, right_on, write_run, write_variant
from test_baselines import write_baseline

from finetune import paths
from finetune.compare import plots, tables
from finetune.compare.comparison import load
from finetune.records import LogPoint

HISTORY = [
    LogPoint(step=5, epoch=0.5, validation_accuracy=0.89, training_seconds=40.0),
    LogPoint(step=7, epoch=0.7, loss=0.3),
    LogPoint(step=10, epoch=1.0, validation_accuracy=0.925, training_seconds=90.0),
    LogPoint(step=15, epoch=1.5, validation_accuracy=0.91, training_seconds=300.0),
]


@pytest.fixture
def results(home):
    results = paths.results_folder("cpu")
    write_run(results, "base", right_on(20, 40))
    return results


def test_the_front_holds_what_nothing_dominates():
    generator = random.Random(1)
    points = [(generator.randint(0, 9), generator.randint(0, 9)) for _ in range(40)]
    front = [points[index] for index in plots.pareto_front(points)]
    better = {one for one, other in itertools.permutations(set(points), 2) if other[0] <= one[0] and other[1] >= one[1]}
    assert sorted(front) == sorted(set(points) - better)


def test_the_base_alone_has_no_costs_times_and_curve(results):
    for table in (tables.all_costs, tables.time_to_accuracy, tables.learning_curve):
        assert table(load("cpu")).empty


def test_the_summary_fits_a_terminal_and_leaves_out_what_does_not_read(results):
    for run, count in (("full", 34), ("full_unsloth", 35)):
        write_run(results, run, right_on(count, 40), confidence=count / 100)
    write_baseline(results, "svm", right_on(30, 40))
    write_baseline(results, "majority", right_on(10, 40))
    table = tables.summary(load("cpu"))
    assert list(table.index) == ["TF-IDF + linear SVM", "base model", "full", "full (Unsloth)"]
    assert max(map(len, table.to_string().splitlines())) <= 80
    assert list(table.loc["full"]) == ["85.0", "70.9 to 92.9", "90 s", "2.5", "4"]


def test_times_that_are_written_alike_are_written_once(results):
    write_run(results, "lora", right_on(30, 40), settings=SETTINGS, cost={"seconds": 15.1})
    write_variant(results, "lora", "seed-43", right_on(31, 40), cost={"seconds": 15.4})
    assert tables.all_costs(load("cpu")).loc["LoRA", "training"] == "15 s"


def test_what_one_run_alone_has(results):
    """Only full fine-tuning's validations were timed, and only its energy was counted."""
    write_run(results, "full", right_on(36, 40), cost={"history": HISTORY, "energy_joules": 12_340.0})
    write_run(results, "lora", right_on(34, 40), cost={"history": factories.HISTORY})
    write_baseline(results, "svm", right_on(30, 40))
    compared = load("cpu")
    table = tables.time_to_accuracy(compared)
    assert list(table.index) == ["full", "TF-IDF + linear SVM"]
    assert list(table.loc["full"]) == ["90 s", "90 s", "never (best 92.5 %)", "never (best 92.5 %)"]
    assert list(table.loc["TF-IDF + linear SVM"]) == ["2 s", *["never (best 91.0 %)"] * 3]
    assert list(tables.all_costs(compared)["energy kJ"]) == ["12.3", "-"]
    assert list(plots.measured(compared.trainings("full")).values()) == [1.5, 2.5, 12.34, 4, 0.02]
