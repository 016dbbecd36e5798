"""The tables, by hand."""

import factories
import numpy as np
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
    return paths.results_folder("cpu")


def compare(results, **right):
    """A comparison of runs that are right on the given rows; confidences differ, so that probabilities do."""
    for number, (run, rows) in enumerate(right.items()):
        write_run(results, run, rows, confidence=0.4 + 0.05 * number)
    return load("cpu")


def test_seconds_to_an_accuracy_are_those_of_the_first_validation_that_shows_it():
    training = factories.training("lora", history=HISTORY)
    assert [tables.seconds_to(training, target) for target in (0.85, 0.9, 0.92, 0.93)] == [40, 90, 90, None]


def test_the_front_by_hand():
    points = [(3, 90), (1, 80), (2, 85), (2, 84), (4, 89), (5, 91), (1, 79)]
    assert plots.pareto_front(points) == [1, 2, 0, 5]


def test_the_front_holds_what_nothing_dominates():
    import itertools
    import random

    generator = random.Random(1)
    points = [(generator.randint(0, 9), generator.randint(0, 9)) for _ in range(40)]
    front = [points[index] for index in plots.pareto_front(points)]
    better = {one for one, other in itertools.permutations(set(points), 2) if other[0] <= one[0] and other[1] >= one[1]}
    assert sorted(front) == sorted(set(points) - better)


def test_the_summary_fits_a_terminal_and_leaves_out_what_does_not_read(results):
    compared = compare(results, base=right_on(20, 40), full=right_on(34, 40), full_unsloth=right_on(35, 40))
    write_baseline(results, "svm", right_on(30, 40))
    write_baseline(results, "majority", right_on(10, 40))
    table = tables.summary(load("cpu"))
    assert list(table.index) == ["TF-IDF + linear SVM", "base model", "full", "full (Unsloth)"]
    assert max(map(len, table.to_string().splitlines())) <= 80
    assert dict(table.loc["full"]) == {
        "accuracy %": "85.0", "95 % interval": "70.9 to 92.9", "training": "90 s", "memory GB": "2.5",
        "artefact MB": "4",
    }  # fmt: skip
    assert compared.answering() == ["base", "full", "full_unsloth"]


def test_quality_is_that_of_the_records(results):
    table = tables.quality(compare(results, base=right_on(20, 40), lora=right_on(30, 40)))
    assert list(table.index) == ["base model", "LoRA"]
    low, high = map(float, table.loc["LoRA", "macro-F1 interval"].split(" to "))
    assert low < float(table.loc["LoRA", "macro-F1 %"]) < high
    assert table.loc["base model", "accuracy %"] == "50.0"
    assert table.loc["LoRA", "accuracy %"] == "75.0"
    assert table.loc["LoRA", "against base"] == "+25.0"
    assert table.loc["base model", "against base"] == "+0.0"
    # Wilson's interval of 30 in 40, by hand: (0.75 + z²/80 ± z √(0.75·0.25/40 + z²/6400)) / (1 + z²/40)
    assert table.loc["LoRA", "95 % interval"] == "59.8 to 85.8"


def test_f1_per_class_by_hand(results):
    """Each class has 10 rows. LoRA is right on rows 0 to 29, and gives the next label on rows 30 to 39."""
    compared = compare(results, base=right_on(0, 40), lora=right_on(30, 40))
    classes, quality = tables.classes(compared), tables.quality(compared)
    # Rows 30 to 39 are 2 World, 2 Sports, 3 Business and 3 Sci/Tech; each goes to the class after it.
    wrong, received = (2, 2, 3, 3), (3, 2, 2, 3)
    names = ("World", "Sports", "Business", "Sci/Tech")
    f1 = [100 * 2 * (10 - w) / (2 * (10 - w) + w + r) for w, r in zip(wrong, received, strict=True)]
    for name, expected in zip(names, f1, strict=True):
        assert classes.loc["LoRA", f"{name} F1 %"] == f"{expected:.1f}"
        low, high = map(float, classes.loc["LoRA", f"{name} interval"].split(" to "))
        assert low < expected < high
    assert quality.loc["LoRA", "macro-F1 %"] == f"{np.mean(f1):.1f}"
    assert quality.loc["LoRA", "macro-F1 against base"] == f"{np.mean(f1):+.1f}"


def test_cost_is_that_of_the_records(results):
    write_run(results, "base", right_on(20, 40))
    write_run(results, "full", right_on(30, 40), cost={"seconds": 120.0, "trainable_parameters": 1_000_000})
    write_run(results, "lora", right_on(30, 40), cost={"seconds": 90.0, "peak_memory_bytes": 1_500_000_000})
    table = tables.all_costs(load("cpu"))
    assert list(table.index) == ["full", "LoRA"]
    assert list(table["training"]) == ["2.0 min", "90 s"]
    assert list(table["share of parameters %"]) == ["100.00", "2.00"]
    assert list(table["peak memory GB"]) == ["2.5", "1.5"]
    assert list(table["artefact MB"]) == ["4.0", "4.0"]


def test_confusions_by_hand(results):
    """LoRA gives the next label on rows 30 to 39: 2 World, 2 Sports, 3 Business and 3 Sci/Tech."""
    table = tables.confusions(compare(results, base=right_on(0, 40), lora=right_on(30, 40)))
    assert list(table.index[:2]) == ["Business taken for Sci/Tech", "Sci/Tech taken for World"]
    assert list(table["LoRA"][:4]) == ["3", "3", "2", "2"]
    assert list(table["base model"][:4]) == ["10"] * 4
    assert table.shape == (12, 2) and table["LoRA"].astype(int).sum() == 10


def test_calibration_by_hand(results):
    """LoRA is sure by 0.45 on all 40 rows and right on 30: no bin but one."""
    table = tables.calibration(compare(results, base=right_on(20, 40), lora=right_on(30, 40))).T
    assert table.loc["LoRA", "ECE %, as it is"].startswith("30.0 (")
    right, wrong = 0.55**2 + 3 * (0.55 / 3) ** 2, 0.45**2 + (1 - 0.55 / 3) ** 2 + 2 * (0.55 / 3) ** 2
    assert table.loc["LoRA", "Brier, as it is"].startswith(f"{0.75 * right + 0.25 * wrong:.3f} (")
    assert table.loc["LoRA", "temperature"] == "not recorded"
    # Wilson's interval of 30 in 32.
    assert table.loc["LoRA", "accuracy % of the most confident 80%"] == "93.8 (79.9 to 98.3)"


def test_without_a_tuned_run_there_is_no_cost(results):
    assert tables.all_costs(compare(results, base=right_on(20, 40))).empty


def test_costs_of_several_seeds_are_medians_and_the_time_has_its_range(results):
    write_run(results, "base", right_on(20, 40))
    write_run(results, "lora", right_on(30, 40), settings=SETTINGS, cost={"seconds": 50.0})
    for seed, seconds in ((43, 100.0), (44, 30.0)):
        write_variant(results, "lora", f"seed-{seed}", right_on(31, 40), cost={"seconds": seconds})
    assert tables.all_costs(load("cpu")).loc["LoRA", "training"] == "50 s (30 s to 100 s)"
    assert tables.summary(load("cpu")).loc["LoRA", "training"] == "50 s"


def test_times_that_are_written_alike_are_written_once(results):
    write_run(results, "base", right_on(20, 40))
    write_run(results, "lora", right_on(30, 40), settings=SETTINGS, cost={"seconds": 15.1})
    write_variant(results, "lora", "seed-43", right_on(31, 40), cost={"seconds": 15.4})
    assert tables.all_costs(load("cpu")).loc["LoRA", "training"] == "15 s"


class TestTables:
    @pytest.fixture
    def results(self, results):
        write_run(results, "base", right_on(20, 40))
        write_run(results, "full", right_on(36, 40), cost={"history": HISTORY, "energy_joules": 12_340.0})
        write_run(results, "lora", right_on(34, 40), cost={"history": factories.HISTORY})
        return results

    def test_time_to_accuracy(self, results):
        write_baseline(results, "svm", right_on(30, 40))
        table = tables.time_to_accuracy(load("cpu"))
        assert list(table.index) == ["full", "TF-IDF + linear SVM"], "LoRA's validations were not timed"
        assert list(table.loc["full"]) == ["90 s", "90 s", "never (best 92.5 %)", "never (best 92.5 %)"]
        assert list(table.loc["TF-IDF + linear SVM"]) == ["2 s", *["never (best 91.0 %)"] * 3]

    def test_without_times_there_is_no_table(self, home):
        results = paths.results_folder("cpu")
        write_run(results, "base", right_on(20, 40))
        write_run(results, "lora", right_on(34, 40))
        assert tables.time_to_accuracy(load("cpu")).empty

    def test_energy_is_in_kilojoules_or_a_dash(self, results):
        table = tables.all_costs(load("cpu"))
        assert list(table["energy kJ"]) == ["12.3", "-"]

    def test_costs_have_the_units_of_their_titles(self, results):
        found = plots.measured(load("cpu").trainings("full"))
        assert list(found.values()) == [1.5, 2.5, 12.34, 4, 0.02]


class TestCurve:
    def test_points_are_those_of_the_records(self, results):
        write_run(results, "base", right_on(20, 40))
        write_run(results, "lora", right_on(36, 40), settings=SETTINGS, cost={"seconds": 240.0})
        for rows, right, seconds in ((500, 32, 120.0), (250, 28, 60.0)):
            write_variant(
                results,
                "lora",
                f"rows-{rows}",
                right_on(right, 40),
                data={"train_rows": rows},
                cost={"seconds": seconds},
            )

        table = tables.learning_curve(load("cpu"))
        assert list(table.index) == ["250 rows", "500 rows", "1,000 rows"]
        # Wilson's intervals of 28, 32 and 36 in 40.
        assert list(table["LoRA"]) == [
            "70.0 (54.6 to 81.9), 60 s",
            "80.0 (65.2 to 89.5), 2.0 min",
            "90.0 (76.9 to 96.0), 4.0 min",
        ]

    def test_without_fewer_rows_there_is_none(self, results):
        write_run(results, "base", right_on(20, 40))
        write_run(results, "lora", right_on(36, 40))
        assert tables.learning_curve(load("cpu")).empty
