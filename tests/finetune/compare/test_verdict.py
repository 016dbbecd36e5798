"""The verdict: its statistics against simulation, its words against the records, its refusals."""

import re
from dataclasses import replace

import numpy as np
import pytest
from factories import SETTINGS, predictions, right_on, write_run, write_variant
from test_baselines import write_baseline

from data_prep import UserError
from finetune import paths
from finetune.compare import verdict
from finetune.compare.comparison import load
from finetune.compare.report import notes
from finetune.compare.verdict import decide

METHODS = 7


def draw(generator, accuracies, rows: int, seeds: int, between_seeds: float) -> dict[str, np.ndarray]:
    """Methods whose errors are shared by 85 %, as real ones are; every training's accuracy is drawn around its own."""
    shared = generator.random(rows)
    own = generator.random((len(accuracies), seeds, rows))
    is_own = generator.random((len(accuracies), 1, rows)) < 0.15
    chances = np.clip(np.array(accuracies)[:, None, None] + between_seeds * generator.normal(size=(1, seeds, 1)), 0, 1)
    chances = np.clip(chances + between_seeds * generator.normal(size=(len(accuracies), seeds, 1)), 0, 1)
    return dict(zip("abcdefg", np.where(is_own, own, shared) < chances, strict=False))


@pytest.mark.parametrize(
    ("methods", "rows", "seeds", "between_seeds", "margin", "worse"),
    # Over seeds with fewer methods: a test of a pair takes ten times as long there.
    [(5, 600, 1, 0.0, 3.0, 4), (5, 2000, 1, 0.0, 1.0, 4),
     (5, 600, 1, 0.0, 3.0, 1), (3, 300, 3, 0.005, 4.0, 2)],
)  # fmt: skip
def test_a_wrong_no_worse_is_rare(methods, rows, seeds, between_seeds, margin, worse):
    """All methods but one, or one alone, are worse than the best by exactly the margin: at most 5 % of 2,000 draws call
    one of these no worse. Four standard errors of 2,000 draws are 2 points."""
    generator = np.random.default_rng(worse)
    accuracies = [0.9] * (methods - worse) + [0.9 - margin / 100] * worse
    labels, wrong = np.arange(rows) % 4, 0
    for _ in range(2000):
        right = draw(generator, accuracies, rows, seeds, between_seeds)
        shown = quickly_shown(labels, right, margin)
        wrong += any(name in shown for name in list(right)[methods - worse :])
    assert wrong / 2000 < 0.05 + 0.02


def quickly_shown(labels, right, margin) -> set[str]:
    found = verdict.show(labels, list(right), lambda first, second: (right[first], right[second]), margin)
    return {name for name, of in found.items() if of.corrected_p < 0.05}


def test_rows_that_would_decide_do_so_four_times_in_five():
    """Of two methods alike, by one training: as many rows as are said to be needed show it in about 80 % of draws, or
    more, as they are counted at the strictest level of Holm's."""
    generator = np.random.default_rng(3)
    right = draw(generator, [0.9] * METHODS, 400, 1, 0.0)
    found = verdict.show(np.arange(400) % 4, ["a", "b"], lambda one, two: (right[one], right[two]), 2.0)
    rows = round(min(of.rows for of in found.values()))
    assert 400 < rows < 5000
    hits = [bool(quickly_shown(np.arange(rows) % 4, two(generator, rows), 2.0)) for _ in range(300)]
    assert np.mean(hits) > 0.75


def two(generator, rows) -> dict[str, np.ndarray]:
    return {name: of for name, of in draw(generator, [0.9] * METHODS, rows, 1, 0.0).items() if name in "ab"}


@pytest.fixture
def results(home):
    """Full gets 900 of 1,000, LoRA 896, QLoRA 860, the SVM 700."""
    results = paths.results_folder("cpu")
    write_run(results, "base", right_on(500, 1000))
    for run, count, seconds, memory in (("full", 900, 90.0, 8), ("lora", 896, 50.0, 4), ("qlora", 860, 60.0, 2)):
        cost = {"seconds": seconds, "peak_memory_bytes": memory * 10**9}
        write_run(results, run, right_on(count, 1000), confidence=0.5 + count / 9000, cost=cost)
    write_baseline(results, "svm", right_on(700, 1000))
    write_baseline(results, "majority", right_on(250, 1000))
    return results


class TestVerdict:
    def test_it_takes_the_cheapest_that_is_close_enough(self, results):
        compared = load("cpu")
        found = decide(compared, margin=2.0)
        assert (found.taken, found.best) == ("lora", "full")
        assert list(found.methods) == ["base", "svm", "lora", "qlora", "full"]
        at_most = compared.pair("full", "lora").high
        assert 0.4 < at_most < 2
        assert found.text == (
            f"Take LoRA. It gets 89.6 %; full fine-tuning is at most {at_most:.1f} points better (95 % interval) "
            "and needs 1.8 x the training time."
        )

    @pytest.mark.parametrize(
        ("margin", "save", "taken"),
        [(2.0, "time", "lora"), (2.0, "memory", "lora"), (7.0, "memory", "qlora"), (7.0, "time", "lora"),
         (30.0, "time", "svm"), (60.0, "artefact size", "svm"), (60.0, "time", "base")],
    )  # fmt: skip
    def test_margin_and_what_to_save_decide(self, results, margin, save, taken):
        assert decide(load("cpu"), margin, save).taken == taken

    @pytest.mark.parametrize("name", ["svm", "encoder", "logistic", "few_shot", "head"])
    def test_whatever_answers_the_task_may_be_taken(self, results, name):
        """It is no worse than full fine-tuning by the margin, and cheaper than all that are."""
        if name == "head":
            cost = {"seconds": 1.0, "peak_memory_bytes": 10**9}
            write_run(results, "head", right_on(898, 1000), confidence=0.65, cost=cost)
        else:
            seconds = None if name == "few_shot" else 1.0
            write_baseline(results, name, right_on(898, 1000), fit_seconds=seconds)
        compared = load("cpu")
        found = decide(compared, margin=2.0)
        assert found.taken == name and found.best == "full"
        high = compared.pair("full", name).judged.high
        assert f"It gets 89.8 %; full fine-tuning is at most {high:.1f} points better" in found.text

    def test_costs_are_those_of_the_records(self, results):
        compared = load("cpu")
        assert verdict.cost(compared, "lora", "time") == 50
        assert verdict.cost(compared, "lora", "memory") == 4e9
        assert verdict.cost(compared, "lora", "artefact size") == 4e6
        assert verdict.cost(compared, "svm", "time") == compared.baselines["svm"].fit_seconds
        assert [verdict.cost(compared, name, "memory") for name in ("svm", "base")] == [0, 0]

    def test_of_several_seeds_the_cost_is_the_median_and_the_accuracy_the_mean(self, home):
        results = paths.results_folder("cpu")
        write_run(results, "base", right_on(500, 1000))
        write_run(results, "lora", right_on(900, 1000), settings=SETTINGS, cost={"seconds": 10.0})
        for seed, seconds in ((43, 90.0), (44, 30.0)):
            write_variant(results, "lora", f"seed-{seed}", right_on(860, 1000), cost={"seconds": seconds})
        compared = load("cpu")
        found = decide(compared)
        assert verdict.cost(compared, "lora", "time") == 30
        assert "It gets 87.3 %" in found.text and "trained once" not in found.method

    def test_the_best_itself_is_taken_where_no_cheaper_one_is_close(self, results):
        found = decide(load("cpu"), margin=0.5)
        assert found.method.endswith("another seed may change the verdict.")
        assert found.text == (
            "Take full fine-tuning. It gets 90.0 %, the highest accuracy. No cheaper method is shown to be within "
            "0.5 points."
        )

    def test_where_nothing_is_shown_it_says_how_many_rows_would_decide(self, home):
        results = paths.results_folder("cpu")
        write_run(results, "base", right_on(20, 40))
        write_run(results, "lora", right_on(36, 40))
        write_run(results, "qlora", right_on(35, 40, start=3), confidence=0.6)
        found = decide(load("cpu"))
        assert found.taken is None
        [rows] = re.findall(r"^No method is shown to be within 1 point of the best\. LoRA has the highest accuracy, "
                            r"90\.0 %\. About ([\d,]+) test rows would decide\.$", found.text)  # fmt: skip
        assert int(rows.replace(",", "")) > 40

    def test_the_base_alone(self, home):
        write_run(paths.results_folder("cpu"), "base", right_on(20, 40))
        assert decide(load("cpu")).text == "Only the base model was evaluated. It gets 50.0 %."

    @pytest.mark.parametrize(
        ("in_train", "repeated", "splits", "caution"),
        [
            (1, 1, "training", ""),
            (20, 20, "training", " But 20 of 40 test rows repeat {} rows. On the other 20, LoRA gets 75.0 %."),
            (0, 20, "validation", " But 20 of 40 test rows repeat {} rows. On the other 20, LoRA gets 75.0 %."),
            (9, 20, "training or validation", " But 20 of 40 test rows repeat {} rows. On the other 20, LoRA gets 75"),
            (40, 40, "training", " But all test rows repeat {} rows: these figures show memory alone."),
        ],
    )
    def test_many_test_rows_that_are_in_other_splits_are_told_with_the_accuracy_on_the_others(
        self, home, in_train, repeated, splits, caution
    ):
        def rows(count, confidence):
            found = enumerate(predictions(right_on(count, 40), confidence))
            return [
                replace(row, has_duplicate=number < in_train, in_validation=in_train <= number < repeated)
                for number, row in found
            ]

        results = paths.results_folder("cpu")
        write_run(results, "base", [], rows=rows(0, 0.4))
        write_run(results, "lora", [], rows=rows(35, 0.7))
        compared = load("cpu")
        text = decide(compared).text
        assert text.startswith("Take LoRA. It gets 87.5 %")
        assert (caution or "No cheaper method is shown to be within 1 point.").format(splits) in text
        assert ("But" in text) == bool(caution)
        noted = {1: ", exactly or nearly: without them, LoRA gets 87.2 %."}
        assert f"{repeated} test rows repeat a {splits} row{noted.get(repeated, '')}" in " ".join(notes(compared))

    def test_a_classifier_that_is_no_worse_is_taken(self, results):
        write_baseline(results, "logistic", right_on(897, 1000), fit_seconds=2.0)
        found = decide(load("cpu"), margin=2.0)
        assert (found.taken, found.best) == ("logistic", "full")
        assert re.match(
            r"Take logistic regression on the base model\. It gets 89\.7 %; full fine-tuning is at most 0\.\d points "
            r"better \(95 % interval\) and needs 45 x the training time\.$",
            found.text,
        )

    @pytest.mark.parametrize("margin", [0, -1, 100, float("nan")])
    def test_a_margin_that_means_nothing_is_refused(self, results, margin):
        with pytest.raises(UserError, match="give points of accuracy above 0 and below 100"):
            decide(load("cpu"), margin)

    def test_what_cannot_be_saved_is_refused(self, results):
        with pytest.raises(UserError, match="save is 'money': choose one of 'time', 'memory', 'artefact size'"):
            decide(load("cpu"), save="money")
