"""The comparison's figures, its refusals, and an answer that is true whatever the figures are."""

import re

import factories
import numpy as np
import pytest
from factories import predictions, right_on, write_run
from test_variants import SETTINGS, write_variant

from data_prep import DataError
from finetune import paths, records
from finetune.compare import comparison
from finetune.compare.comparison import load_folder
from finetune.wording import format_p, spoken


@pytest.fixture
def results(home):
    return paths.results_folder("cpu")


def compare(results, **right) -> comparison.Comparison:
    """A comparison of runs that are right on the given rows; confidences differ, so that probabilities do."""
    for number, (run, rows) in enumerate(right.items()):
        write_run(results, run, rows, confidence=0.4 + 0.05 * number)
    return load_folder(results, "cpu")


class TestFigures:
    def test_quality_is_that_of_the_records(self, results):
        table = compare(results, base=right_on(20, 40), lora=right_on(30, 40)).quality_table()
        assert list(table.index) == ["base model", "LoRA"]
        low, high = map(float, table.loc["LoRA", "macro-F1 interval"].split(" to "))
        assert low < table.loc["LoRA", "macro-F1 %"] < high
        assert table.loc["base model", "accuracy %"] == pytest.approx(50)
        assert table.loc["LoRA", "accuracy %"] == pytest.approx(75)
        assert table.loc["LoRA", "against base"] == pytest.approx(25)
        assert table.loc["base model", "against base"] == 0
        # Wilson's interval of 30 in 40, by hand: (0.75 + z²/80 ± z √(0.75·0.25/40 + z²/6400)) / (1 + z²/40)
        assert table.loc["LoRA", "95 % interval"] == "59.8 to 85.8"

    def test_f1_per_class_by_hand(self, results):
        """Each class has 10 rows. LoRA is right on rows 0 to 29, and gives the next label on rows 30 to 39."""
        compared = compare(results, base=right_on(0, 40), lora=right_on(30, 40))
        classes, quality = compared.class_table(), compared.quality_table()
        # Rows 30 to 39 are 2 World, 2 Sports, 3 Business and 3 Sci/Tech; each goes to the class after it.
        wrong, received = (2, 2, 3, 3), (3, 2, 2, 3)
        names = ("World", "Sports", "Business", "Sci/Tech")
        f1 = [100 * 2 * (10 - w) / (2 * (10 - w) + w + r) for w, r in zip(wrong, received, strict=True)]
        for name, expected in zip(names, f1, strict=True):
            assert classes.loc["LoRA", f"{name} F1 %"] == pytest.approx(expected)
            low, high = map(float, classes.loc["LoRA", f"{name} interval"].split(" to "))
            assert low < expected < high
        assert quality.loc["LoRA", "macro-F1 %"] == pytest.approx(np.mean(f1))
        assert quality.loc["LoRA", "macro-F1 against base"] == pytest.approx(np.mean(f1))

    def test_rows_without_a_twin_by_hand(self, results):
        """LoRA is right on rows 0 to 29; rows 0 to 9 have twins: 20 of 30 are right on the others."""
        rows = [
            row.model_copy(update={"has_twin": number < 10}) for number, row in enumerate(predictions(right_on(30, 40)))
        ]
        other = dict.fromkeys(("World", "Sports", "Business", "Sci/Tech"), 0.25)
        write_run(results, "base", [], rows=[row.model_copy(update={"probabilities": other}) for row in rows])
        write_run(results, "lora", [], rows=rows)
        alone = load_folder(results, "cpu").without_twins["lora"]
        assert (alone.rows, alone.accuracy) == (30, pytest.approx(20 / 30))

    def test_without_such_rows_there_is_no_figure(self, results):
        rows = [row.model_copy(update={"has_twin": True}) for row in predictions(right_on(30, 40))]
        write_run(results, "base", [], rows=rows)
        assert load_folder(results, "cpu").without_twins == {"base": None}

    def test_cost_is_that_of_the_records(self, results):
        write_run(results, "base", right_on(20, 40))
        write_run(results, "full", right_on(30, 40), cost={"seconds": 120.0, "trainable_parameters": 1_000_000})
        write_run(results, "lora", right_on(30, 40), cost={"seconds": 90.0, "peak_memory_bytes": 1_500_000_000})
        table = load_folder(results, "cpu").cost_table()
        assert list(table.index) == ["full", "LoRA"]
        assert list(table["training"]) == ["2.0 min", "90 s"]
        assert list(table["share of parameters %"]) == [100, 2]
        assert list(table["peak memory GB"]) == [2.5, 1.5]
        assert list(table["artefact MB"]) == [4, 4]

    def test_confusions_by_hand(self, results):
        """LoRA gives the next label on rows 30 to 39: 2 World, 2 Sports, 3 Business and 3 Sci/Tech."""
        table = compare(results, base=right_on(0, 40), lora=right_on(30, 40)).confusion_table()
        assert list(table.index[:2]) == ["Business taken for Sci/Tech", "Sci/Tech taken for World"]
        assert list(table["LoRA"][:4]) == [3, 3, 2, 2]
        assert list(table["base model"][:4]) == [10, 10, 10, 10]
        assert table.shape == (12, 2) and table["LoRA"].sum() == 10

    def test_calibration_by_hand(self, results):
        """LoRA is sure by 0.45 on all 40 rows and right on 30: no bin but one."""
        table = compare(results, base=right_on(20, 40), lora=right_on(30, 40)).calibration_table()
        assert table.loc["LoRA", "ECE %, as it is"].startswith("30.0 (")
        right, wrong = 0.55**2 + 3 * (0.55 / 3) ** 2, 0.45**2 + (1 - 0.55 / 3) ** 2 + 2 * (0.55 / 3) ** 2
        assert table.loc["LoRA", "Brier, as it is"].startswith(f"{0.75 * right + 0.25 * wrong:.3f} (")
        assert table.loc["LoRA", "temperature"] == "not recorded"
        # Wilson's interval of 30 in 32.
        assert table.loc["LoRA", "accuracy % of the surest 80%"] == "93.8 (79.9 to 98.3)"

    def test_without_a_tuned_run_there_is_no_cost(self, results):
        assert compare(results, base=right_on(20, 40)).cost_table().empty

    def test_a_pair_counts_rows_on_which_one_alone_is_right(self, results):
        pair = compare(results, base=right_on(20, 40, start=5), lora=right_on(30, 40)).pair("lora", "base")
        assert (pair.only_first, pair.only_second) == (10, 0)
        assert pair.points == pytest.approx(25)
        assert pair.p_value == pytest.approx(2 / 2**10)
        assert pair.low < 25 < pair.high

    def test_exchanging_a_pair_exchanges_its_figures(self, results):
        runs = compare(results, base=right_on(20, 40, start=10), lora=right_on(30, 40))
        forth, back = runs.pair("lora", "base"), runs.pair("base", "lora")
        assert back.points == -forth.points
        assert (back.only_first, back.only_second) == (forth.only_second, forth.only_first)
        assert back.p_value == forth.p_value
        assert (-back.high, -back.low) == pytest.approx((forth.low, forth.high), abs=2.6)

    @pytest.mark.parametrize(("only_first", "only_second"), [(120, 80), (30, 10), (300, 300)])
    def test_the_interval_of_a_large_sample_is_wald_s(self, results, only_first, only_second):
        rows = 2000
        first = [row < only_first or row >= 1000 for row in range(rows)]
        second = [only_first <= row < only_first + only_second or row >= 1000 for row in range(rows)]
        pair = compare(results, base=second, lora=first).pair("lora", "base")
        share = (only_first - only_second) / rows
        error = ((only_first + only_second) / rows - share**2) ** 0.5 / rows**0.5
        wald = (100 * (share - 1.96 * error), 100 * (share + 1.96 * error))
        assert (pair.low, pair.high) == pytest.approx(wald, abs=0.1 * 100 * 1.96 * error)

    def test_runs_that_agree_on_every_row_differ_by_nothing(self, results):
        pair = compare(results, base=right_on(0, 40), lora=right_on(30, 40), qlora=right_on(30, 40)).pair(
            "lora", "qlora"
        )
        assert (pair.points, pair.low, pair.high, pair.p_value) == (0, 0, 0, 1)
        assert pair.is_tie

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

    @pytest.mark.parametrize(
        ("p_value", "text"), [(0.0009, "< 0.001"), (0.001, "= 0.001"), (0.0496, "= 0.050"), (1.0, "= 1.000")]
    )
    def test_p_values_are_written_with_three_digits(self, p_value, text):
        assert format_p(p_value) == text


class TestAnswer:
    def test_of_the_base_alone(self, results):
        answer = compare(results, base=right_on(100, 200)).answer()
        assert answer.startswith("On 200 test rows of ")
        assert answer.endswith("AG News, a-model without tuning gets 50.0% right (43.1% to 56.9%).")

    def test_of_a_clear_win(self, results):
        answer = compare(results, base=right_on(100, 200), lora=right_on(180, 200)).answer()
        assert "LoRA beats the base model by 40.0 points (" in answer
        assert "p < 0.001" in answer
        assert "cannot be told apart" not in answer
        assert "cost decides" not in answer, "there is nothing to decide between"

    def test_of_a_loss_against_the_base(self, results):
        answer = compare(results, base=right_on(180, 200), full=right_on(100, 200)).answer()
        assert "The base model beats full fine-tuning by 40.0 points" in answer
        assert "full beats" not in answer

    def test_of_a_tie_with_the_base(self, results):
        answer = compare(results, base=right_on(100, 200), full=right_on(101, 200)).answer()
        assert "Full fine-tuning and the base model cannot be told apart (+0.5 points, " in answer
        assert "beats" not in answer

    def test_of_tuned_models_that_tie(self, results):
        answer = compare(results, base=right_on(100, 200), lora=right_on(180, 200), qlora=right_on(179, 200)).answer()
        assert "LoRA and QLoRA cannot be told apart" in answer
        [points] = re.findall(
            r"taken one by one, the intervals allow differences of up to (\d\.\d) points\. Where that does not", answer
        )
        pair = load_folder(results, "cpu").pairs[-1]
        assert float(points) == pytest.approx(max(-pair.low, pair.high), abs=0.05)
        assert "cost decides between the tuned models." in answer

    def test_of_tuned_models_of_which_one_stands_out(self, results):
        answer = compare(
            results, base=right_on(60, 200), full=right_on(120, 200), lora=right_on(180, 200), qlora=right_on(179, 200)
        ).answer()
        assert "LoRA beats full fine-tuning by 30.0 points (" in answer
        assert "and QLoRA by 29.5 points (" in answer
        assert "LoRA and QLoRA cannot be told apart" in answer
        assert "cost decides" not in answer

    def test_it_says_what_the_tuned_models_reach(self, results):
        rows = {"full": right_on(180, 200), "lora": right_on(178, 200), "qlora": right_on(180, 200, start=3)}
        answer = compare(results, base=right_on(60, 200), **rows).answer()
        assert "Tuned, the model gets 89.0% with LoRA and 90.0% with full fine-tuning and QLoRA. " in answer

    def test_three_who_beat_the_same_runs_are_told_of_together(self, results):
        rows = {"full": right_on(180, 200), "lora": right_on(178, 200), "qlora": right_on(182, 200)}
        compared = compare(results, base=right_on(60, 200), **rows)
        won = [pair for pair in compared.pairs if pair.second == "base"]
        low, high = min(pair.low for pair in won), max(pair.high for pair in won)
        assert (
            "Full fine-tuning, LoRA and QLoRA beat the base model by 59.0 to 61.0 points "
            f"(intervals within {low:.1f} to {high:.1f}, p < 0.001)."
        ) in compared.answer()

    def test_of_three_ties_with_one_the_rest_is_told_one_by_one(self, results):
        rows = {"full": right_on(180, 200), "lora": right_on(178, 200), "qlora": right_on(62, 200)}
        answer = compare(results, base=right_on(60, 200), **rows).answer()
        assert "Full fine-tuning beats the base model by 60.0 points (" in answer
        assert "and LoRA by 59.0 points (" in answer
        assert "beat the base model by" not in answer.replace("beats", "")

    def test_several_ties_are_one_sentence_each_with_what_could_have_been_shown(self, results):
        rows = {"full": right_on(180, 200), "lora": right_on(179, 200), "qlora": right_on(175, 200, start=15)}
        answer = compare(results, base=right_on(60, 200), **rows).answer()
        said = "Cannot be told apart, each with the true difference that would have been found four times in five: "
        tie = "full fine-tuning and LoRA (+0.5 points, +0.0 to +1.5, p = 1.000), none, with one row that one of them "
        assert said + tie + "alone gets right; " in answer
        last = r"LoRA and QLoRA \(\+2\.0 points, -\d+\.\d to \+\d+\.\d, p = \d\.\d{3}\), \d\.\d points\."
        assert re.search(last, answer)

    def test_several_of_which_no_two_differ_are_one_sentence(self, results):
        rows = {"full": right_on(180, 200), "lora": right_on(178, 200, start=8), "qlora": right_on(181, 200, start=16)}
        compared = compare(results, base=right_on(60, 200), **rows)
        among = [pair for pair in compared.pairs if "base" not in (pair.first, pair.second)]
        assert len(among) == 3 and all(pair.is_tie for pair in among)
        widest = max(among, key=lambda pair: pair.high - pair.low)
        assert (
            "No two of full fine-tuning, LoRA and QLoRA can be told apart: they differ by up to 1.5 points (least "
            f"p = 1.000; the widest interval, of {spoken(widest.first)} minus {spoken(widest.second)}, is "
            f"{widest.low:+.1f} to {widest.high:+.1f}), and a true difference of "
            f"{max(pair.detectable for pair in among):.1f} points would have been found four times in five between any "
            "two."
        ) in compared.answer()

    def test_it_tells_time_and_memory_of_all_the_least_first(self, results):
        write_run(results, "base", right_on(20, 40))
        for run, seconds, memory in (("full", 150.0, 3e9), ("lora", 60.0, 2e9), ("qlora", 90.0, 1e9)):
            cost = {"seconds": seconds, "peak_memory_bytes": int(memory)}
            write_run(results, run, right_on(30, 40), confidence=0.5 + seconds / 1000, cost=cost)
        assert (
            load_folder(results, "cpu")
            .answer()
            .endswith(
                "Training took 60 seconds with LoRA, 90 seconds with QLoRA and 2.5 minutes with full fine-tuning; its "
                "peak memory was 1.0 GB with QLoRA, 2.0 GB with LoRA and 3.0 GB with full fine-tuning."
            )
        )

    @pytest.mark.parametrize(
        ("slowest", "said"), [(40.0, "(none was always the fastest)"), (34.0, "(LoRA was always the fastest)")]
    )
    def test_the_fastest_is_named_only_if_it_was_so_with_every_seed(self, results, slowest, said):
        write_run(results, "base", right_on(20, 40))
        for run, times in (("full", (36.0, 50.0)), ("lora", (30.0, slowest))):
            write_run(results, run, right_on(30, 40), settings=SETTINGS, cost={"seconds": times[0]})
            write_variant(results, run, "seed-43", right_on(31, 40), cost={"seconds": times[1]})
        assert (
            f"Training took 30 to {slowest:.0f} seconds with LoRA and 36 to 50 seconds with full fine-tuning {said}; "
            "its peak memory was 2.5 GB with full fine-tuning and 2.5 GB with LoRA."
        ) in load_folder(results, "cpu").answer()


class TestAgainstBase:
    def test_is_the_pair_of_the_comparison(self, results):
        compared = compare(results, base=right_on(20, 40), lora=right_on(30, 40))
        assert comparison.against_base(compared.records["lora"]) == compared.pair("lora", "base")

    def test_does_not_mind_a_run_that_is_being_written_anew(self, results):
        """Its predictions are replaced before its record; and it may still be the record of other data."""
        compared = compare(results, base=right_on(20, 40), lora=right_on(30, 40))
        write_run(results, "full", right_on(10, 40), data={"fingerprint": "ffffffffffff"})
        (results / "full" / "predictions.jsonl").write_text("")
        assert comparison.against_base(compared.records["lora"]).points == 25

    def test_without_a_base(self, results):
        record = compare(results, base=right_on(20, 40), lora=right_on(30, 40)).records["lora"]
        (results / "base" / "record.json").unlink()
        with pytest.raises(DataError, match="the base model was not evaluated; run base_model_performance"):
            comparison.against_base(record)

    def test_of_another_question(self, results):
        record = compare(results, base=right_on(20, 40), lora=right_on(30, 40)).records["lora"]
        write_run(results, "base", right_on(20, 40), data={"prompt": "verbose-1"})
        with pytest.raises(DataError, match="cpu/lora: prompt is lean-1, and verbose-1 in the base's record"):
            comparison.against_base(record)


class TestRefusals:
    def test_no_run_at_all(self, results):
        with pytest.raises(DataError, match="the base model was not evaluated; run base_model_performance"):
            comparison.load("cpu")

    def test_no_base(self, results):
        with pytest.raises(DataError, match="the base model was not evaluated"):
            compare(results, lora=right_on(30, 40))

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"data": {"fingerprint": "ffffffffffff"}}, "fingerprint is ffffffffffff, and 0123456789ab"),
            ({"data": {"prompt": "verbose-1"}}, "prompt is verbose-1, and lean-1"),
            ({"data": {"test_rows": 39}}, "test_rows is 39, and 40"),
            ({"model": "another-model"}, "the model is another-model, and a-model"),
        ],
        ids=["data", "prompt", "rows", "model"],
    )
    def test_another_question_than_the_base_s_is_named(self, results, changes, said):
        write_run(results, "base", right_on(20, 40))
        write_run(results, "lora", right_on(30, 40), **changes)
        with pytest.raises(DataError, match=f"cpu/lora: {said} in the base's record"):
            comparison.load("cpu")

    def test_another_number_of_training_rows_is_named(self, results):
        write_run(results, "base", right_on(20, 40))
        write_run(results, "lora", right_on(30, 40))
        write_run(results, "qlora", right_on(30, 40), data={"train_rows": 250})
        with pytest.raises(DataError, match="cpu/qlora: train_rows is 250, and 1000 in the record of lora"):
            comparison.load("cpu")

    def test_other_rows_of_the_same_data(self, results):
        """Another seed draws other test rows, as many of them: a paired test of the two would mean nothing."""
        write_run(results, "base", right_on(20, 40))
        rows = [row.model_copy(update={"id": f"test-{100 + n}"}) for n, row in enumerate(predictions([True] * 40))]
        write_run(results, "lora", [], rows=rows)
        with pytest.raises(DataError, match=r"cpu/lora: .*rows"):
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
        (results / "base" / "predictions.jsonl").write_text("")
        with pytest.raises(DataError, match="not the predictions of"):
            comparison.load("cpu")

    def test_a_broken_record(self, results):
        write_run(results, "base", right_on(20, 40))
        (results / "lora").mkdir()
        (results / "lora" / "record.json").write_text("{")
        with pytest.raises(DataError, match=r"lora/record\.json: not a record of this version"):
            comparison.load("cpu")
