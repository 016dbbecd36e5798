"""What a comparison reads and holds, and what it refuses."""

import json
from dataclasses import replace

import factories
import numpy as np
import pytest
from factories import SETTINGS, predictions, right_on, write_run, write_variant
from test_baselines import write_baseline

from data_prep import DataError
from finetune import paths, records
from finetune.compare import comparison
from finetune.compare.comparison import load, load_folder
from finetune.predictions import write


def random_right(accuracy: float, rows: int, seed: int) -> list[bool]:
    return (np.random.default_rng(seed).random(rows) < accuracy).tolist()


@pytest.fixture
def results(home):
    return paths.results_folder("cpu")


def compare(results, **right) -> comparison.Comparison:
    """A comparison of runs that are right on the given rows; confidences differ, so that probabilities do."""
    for number, (run, rows) in enumerate(right.items()):
        write_run(results, run, rows, confidence=0.4 + 0.05 * number)
    return load_folder(results, "cpu")


class TestFigures:
    def test_without_such_rows_there_is_no_figure(self, results):
        rows = [replace(row, has_duplicate=True) for row in predictions(right_on(30, 40))]
        write_run(results, "base", [], rows=rows)
        assert load_folder(results, "cpu").without_duplicates == {"base": None}

    def test_pairs_are_each_against_the_base_and_then_each_other(self, results):
        rows = {run: right_on(5 * number, 40) for number, run in enumerate(("qlora", "lora", "full", "base"), 1)}
        pairs = compare(results, **rows).pairs
        assert [(pair.first, pair.second) for pair in pairs] == [
            ("full", "base"),
            ("lora", "base"),
            ("qlora", "base"),
            ("full", "lora"),
            ("full", "qlora"),
            ("lora", "qlora"),
        ]

    def test_a_training_that_was_not_evaluated_is_left_out(self, results):
        records.write(factories.record("full", training=factories.training("full")), results / "full")
        assert list(compare(results, base=right_on(20, 40), lora=right_on(30, 40)).records) == ["base", "lora"]

    def test_p_values_are_corrected_for_all_pairs(self, results):
        rows = {run: right_on(count, 40) for run, count in {"base": 20, "lora": 29, "qlora": 27}.items()}
        compared = compare(results, **rows)
        # Nine, seven and two rows: p = 2/2⁹, 2/2⁷ and 1/2; Holm multiplies by 3, 2 and 1.
        assert [pair.corrected_p for pair in compared.pairs] == pytest.approx([6 / 2**9, 4 / 2**7, 0.5])
        assert compared.pair("qlora", "base").corrected_p == pytest.approx(2 / 2**7), "alone it is not corrected"


def write_seeds(results, run: str, accuracy: float, rows: int = 400, seeds: int = 3) -> list[list[bool]]:
    outcomes = [random_right(accuracy, rows, 100 * len(run) + seed) for seed in range(seeds)]
    write_run(results, run, outcomes[0], settings=SETTINGS)
    for number, right in enumerate(outcomes[1:], 43):
        write_variant(results, run, f"seed-{number}", right)
    return outcomes


class TestSeeds:
    @pytest.mark.parametrize("variant", ["seed-43", "rows-250"])
    def test_a_figure_that_its_predictions_do_not_give_is_refused(self, results, variant):
        write_run(results, "base", right_on(20, 40))
        write_run(results, "lora", right_on(36, 40), settings=SETTINGS)
        write_variant(results, "lora", variant, right_on(30, 40))
        path = results / "lora" / variant / "record.json"
        content = json.loads(path.read_text().replace('"accuracy": 0.75', '"accuracy": 0.99', 1))
        # As whoever forges it would.
        del content["digest"]
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match="the record of lora holds another accuracy than its predictions give"):
            load("cpu")

    @pytest.mark.parametrize("others", [(), (43, 45)])
    def test_of_other_seeds_the_first_is_compared(self, results, others):
        write_run(results, "base", right_on(200, 400))
        write_seeds(results, "lora", 0.9)
        write_run(results, "qlora", right_on(360, 400), settings=SETTINGS)
        for seed in others:
            write_variant(results, "qlora", f"seed-{seed}", right_on(350, 400))
        by_names = {(pair.first, pair.second): pair.over_seeds for pair in load("cpu").pairs}
        assert by_names["lora", "qlora"] is None and by_names["lora", "base"] is not None
        assert (by_names["qlora", "base"] is None) == (not others)

    def test_methods_are_compared_seed_by_seed(self, results):
        """Seeds that differ, but always by the same rows: the difference has no error between seeds."""
        write_run(results, "base", right_on(100, 400))
        for run, more in (("lora", 20), ("qlora", 0)):
            write_run(results, run, right_on(280 + more, 400), settings=SETTINGS)
            write_variant(results, run, "seed-43", right_on(340 + more, 400))
        over = load("cpu").pairs[-1].over_seeds
        assert over.points == pytest.approx(5) and over.p_value < 0.001
        assert over.high - over.low < 5

    def test_what_one_seed_shows_and_others_contradict_is_a_tie(self, results):
        write_run(results, "base", right_on(100, 400))
        write_run(results, "lora", right_on(360, 400), settings=SETTINGS)
        write_variant(results, "lora", "seed-43", right_on(300, 400))
        write_run(results, "qlora", right_on(320, 400), settings=SETTINGS)
        write_variant(results, "qlora", "seed-43", right_on(380, 400))
        pair = load("cpu").pairs[-1]
        assert pair.corrected_p < 0.001 and pair.is_tie
        assert pair.over_seeds.points == pytest.approx(-5) and pair.over_seeds.seeds == 2

    def test_what_all_seeds_show_is_a_difference_though_the_first_alone_does_not(self, results):
        write_run(results, "base", right_on(100, 400))
        for run, counts in (("lora", (361, 364, 367)), ("qlora", (357, 356, 358))):
            write_run(results, run, right_on(counts[0], 400), settings=SETTINGS)
            for seed, count in zip((43, 44), counts[1:], strict=True):
                write_variant(results, run, f"seed-{seed}", right_on(count, 400))
        pair = load("cpu").pairs[-1]
        assert pair.p_value > 0.05 and not pair.is_tie and pair.over_seeds.points == pytest.approx(1.75)


class TestAgainstBase:
    def test_is_the_pair_of_the_comparison(self, results):
        compared = compare(results, base=right_on(20, 40), lora=right_on(30, 40))
        assert comparison.against_base(compared.records["lora"]) == compared.pair("lora", "base")

    def test_does_not_mind_a_run_that_is_being_written_anew(self, results):
        """Its predictions are replaced before its record; and it may still be the record of other data."""
        compared = compare(results, base=right_on(20, 40), lora=right_on(30, 40))
        write_run(results, "full", right_on(10, 40), data={"fingerprint": "ffffffffffff"})
        (results / "full" / "predictions.parquet").write_bytes(b"")
        assert comparison.against_base(compared.records["lora"]).points == 25

    def test_without_a_base(self, results):
        record = compare(results, base=right_on(20, 40), lora=right_on(30, 40)).records["lora"]
        (results / "base" / "record.json").unlink()
        assert "run base_model_performance.ipynb" in comparison.against_base(record)

    def test_of_other_weights_under_the_same_name(self, results):
        record = compare(results, base=right_on(20, 40), lora=right_on(30, 40)).records["lora"]
        trained = record.training.model_copy(update={"base_digest": "aaaaaaaaaaaa"})
        records.write(record.model_copy(update={"training": trained}), results / "lora")
        # An older record of the base does not say which weights it judged.
        assert comparison.against_base(record).points == 25
        base = records.read(results / "base")
        judged = base.evaluation.model_copy(update={"artefact_digest": "bbbbbbbbbbbb"})
        records.write(base.model_copy(update={"evaluation": judged}), results / "base")
        with pytest.raises(DataError, match=r"cpu/lora: base weights is a{12}, and b{12} in .*cpu/base"):
            comparison.against_base(record)

    def test_of_another_question(self, results):
        record = compare(results, base=right_on(20, 40), lora=right_on(30, 40)).records["lora"]
        write_run(results, "base", right_on(20, 40), data={"prompt": "verbose-1"})
        with pytest.raises(DataError, match=r"cpu/lora: prompt is lean-1, and verbose-1 in .*cpu/base"):
            comparison.against_base(record)


class TestRefusals:
    @pytest.mark.parametrize("runs", [{}, {"lora": right_on(30, 40)}])
    def test_no_base(self, results, runs):
        with pytest.raises(DataError, match="the base model was not evaluated; run base_model_performance"):
            compare(results, **runs)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"data": {"fingerprint": "ffffffffffff"}}, "fingerprint is ffffffffffff, and 0123456789ab"),
            ({"data": {"prompt": "verbose-1"}}, "prompt is verbose-1, and lean-1"),
            ({"data": {"test_rows": 39}}, "test_rows is 39, and 40"),
            ({"model": "another-model"}, "model is another-model, and a-model"),
        ],
        ids=["data", "prompt", "rows", "model"],
    )
    def test_another_question_than_the_base_s_is_named(self, results, changes, said):
        write_run(results, "base", right_on(20, 40))
        write_run(results, "lora", right_on(30, 40), **changes)
        with pytest.raises(DataError, match=f"cpu/lora: {said} in .*cpu/base"):
            comparison.load("cpu")

    def test_another_number_of_training_rows_is_named(self, results):
        write_run(results, "base", right_on(20, 40))
        write_run(results, "lora", right_on(30, 40))
        write_run(results, "qlora", right_on(30, 40), data={"train_rows": 250})
        with pytest.raises(DataError, match=r"cpu/qlora: train_rows is 250, and 1000 in .*cpu/lora"):
            comparison.load("cpu")

    def test_other_rows_of_the_same_data(self, results):
        """Another seed draws other test rows, as many of them: a paired test of the two would mean nothing."""
        write_run(results, "base", right_on(20, 40))
        rows = [replace(row, id=f"test-{100 + n}") for n, row in enumerate(predictions([True] * 40))]
        write_run(results, "lora", [], rows=rows)
        with pytest.raises(DataError, match=r"cpu/lora: test rows and labels is .* in .*cpu/base"):
            comparison.load("cpu")

    def test_the_base_s_own_probabilities(self, results):
        write_run(results, "base", right_on(30, 40), confidence=0.6)
        write_run(results, "lora", right_on(30, 40), confidence=0.6)
        with pytest.raises(DataError, match="cpu/lora: gives exactly the base model's probabilities"):
            comparison.load("cpu")

    def test_the_base_s_answers_with_other_probabilities_are_a_result(self, results):
        assert compare(results, base=right_on(30, 40), lora=right_on(30, 40)).pair("lora", "base").is_tie

    def test_changed_predictions(self, results):
        write_run(results, "base", right_on(20, 40))
        write(results / "base", predictions(right_on(20, 40), confidence=0.5))
        with pytest.raises(DataError, match="not the predictions of"):
            comparison.load("cpu")

    def test_a_broken_record(self, results):
        write_run(results, "base", right_on(20, 40))
        (results / "lora").mkdir()
        (results / "lora" / "record.json").write_text("{")
        with pytest.raises(DataError, match=r"lora/record\.json: not a record of this version"):
            comparison.load("cpu")

    def test_a_curve_of_another_classifier(self, results):
        compare(results, base=right_on(20, 40), lora=right_on(30, 40))
        write_baseline(results, "svm", right_on(28, 40))
        write_baseline(results, "svm/rows-250", right_on(20, 40), data={"train_rows": 250}, description="another")
        with pytest.raises(DataError, match="svm/rows-250: classifier is another, and "):
            comparison.load("cpu")


def test_what_may_differ_is_not_compared():
    runs = {"one": {"model": "a", "seed": 1}, "two": {"model": "a", "seed": 2}}
    comparison.check_comparable({}), comparison.check_comparable(runs, may_differ={"seed"})
    with pytest.raises(DataError, match=r"^two: seed is 2, and 1 in one: compare runs with the same seed$"):
        comparison.check_comparable(runs)


class TestVariantRefusals:
    @pytest.mark.parametrize(
        ("variant", "settings", "changes", "said"),
        [
            ("seed-43", {"learning_rate": 1e-3}, {}, "learning_rate is 0.001, and 0.0001"),
            ("seed-43", {"train_rows": 10}, {}, "train_rows is 10, and None"),
            ("rows-250", {"seed": 43}, {}, "seed is 43, and 42"),
            ("seed-43", {}, {"data": {"fingerprint": "ffffffffffff"}}, "fingerprint is ffffffffffff, and 0123456789ab"),
            ("seed-43", {}, {"engine": "unsloth"}, "engine is unsloth, and transformers"),
            ("seed-43", {}, {"rows": predictions([True] * 41)}, "test rows and labels is .*"),
        ],
    )
    def test_a_variant_that_differs_in_more_is_refused_with_the_difference(
        self, results, variant, settings, changes, said
    ):
        write_run(results, "base", right_on(20, 40))
        write_run(results, "lora", right_on(30, 40), settings=SETTINGS)
        write_variant(results, "lora", variant, right_on(31, 40), settings, **changes)
        with pytest.raises(DataError, match=f"lora/{variant}/record.json: {said} in .*cpu/lora: compare runs"):
            load("cpu")

    def test_how_it_was_evaluated_may_differ(self, results):
        write_run(results, "base", right_on(20, 40))
        write_run(results, "lora", right_on(30, 40), settings=SETTINGS | {"generation_rows": 100})
        write_variant(results, "lora", "seed-43", right_on(31, 40), {"generation_rows": 0})
        assert len(load("cpu").seeds["lora"]) == 1

    def test_a_variant_that_was_not_evaluated_yet_is_left_out(self, results):
        write_run(results, "base", right_on(20, 40))
        write_run(results, "lora", right_on(30, 40), settings=SETTINGS)
        record = factories.record("lora", training=factories.training("lora"))
        records.write(record, results / "lora" / "seed-43")
        assert load("cpu").seeds["lora"] == []
