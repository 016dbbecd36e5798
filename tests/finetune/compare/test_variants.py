"""Other seeds and fewer rows: where they lie, what they may differ in, and what they add to the comparison."""

import re

import factories
import numpy as np
import pytest
from factories import right_on, write_run

from data_prep import DataError
from finetune import paths, records
from finetune.compare import tables as costs
from finetune.compare.comparison import load
from finetune.settings import plan

SETTINGS = {"learning_rate": 1e-4, "packing": True, "data_path": None, "seed": 42, "train_rows": None, "variant": ""}


def random_right(accuracy: float, rows: int, seed: int) -> list[bool]:
    return (np.random.default_rng(seed).random(rows) < accuracy).tolist()


@pytest.fixture
def results(home):
    return paths.results_folder("cpu")


def write_variant(results, run: str, variant: str, right, settings=None, **changes) -> None:
    """A variant of `run`, written where it belongs."""
    name = {"seed": "seed", "rows": "train_rows"}[variant.partition("-")[0]]
    values = SETTINGS | {name: int(variant.partition("-")[2]), "variant": variant} | (settings or {})
    record = write_run(results, f"{run}/{variant}", right, settings=values, seed=values["seed"], **changes)
    folder = results / run / variant
    records.write(record.model_copy(update={"run": run}), folder)


def write_seeds(results, run: str, accuracy: float, rows: int = 400, seeds: int = 3) -> list[list[bool]]:
    outcomes = [random_right(accuracy, rows, 100 * len(run) + seed) for seed in range(seeds)]
    write_run(results, run, outcomes[0], settings=SETTINGS)
    for number, right in enumerate(outcomes[1:], 43):
        write_variant(results, run, f"seed-{number}", right)
    return outcomes


class TestPlaces:
    def test_the_default_stays_where_it_was(self, home):
        settings = plan("lora", "cpu")
        assert settings.run_folder == home / "results" / "cpu" / "lora"
        assert settings.artefact_folder == home / "adapters" / "cpu-lora"

    def test_a_variant_has_folders_of_its_own(self, home):
        settings = plan("full", "cpu", {"seed": 43, "variant": "seed-43"})
        assert settings.run_folder == home / "results" / "cpu" / "full" / "seed-43"
        assert settings.artefact_folder == home / "checkpoints" / "cpu-full-seed-43"
        assert settings.state_folder == home / "checkpoints" / ".training" / "cpu-full-seed-43"


class TestSeeds:
    def test_mean_and_spread_by_hand(self, results):
        write_run(results, "base", right_on(20, 40))
        write_run(results, "lora", right_on(30, 40), settings=SETTINGS)
        write_variant(results, "lora", "seed-43", right_on(32, 40))
        write_variant(results, "lora", "seed-44", right_on(28, 40))
        row = load("cpu").seeds_table().loc["LoRA"]
        assert (row["seeds"], row["lowest %"], row["highest %"]) == (3, 70, 80)
        assert row["mean accuracy %"] == pytest.approx(75)
        # √((0 + 25 + 25) / 2)
        assert row["standard deviation"] == pytest.approx(5)

    def test_pairs_carry_the_difference_over_seeds(self, results):
        write_run(results, "base", right_on(200, 400))
        lora, qlora = (np.array(write_seeds(results, run, 0.9)) for run in ("lora", "qlora"))
        base_pair, _, tuned = load("cpu").pairs
        assert tuned.over_seeds.seeds == 3
        assert tuned.over_seeds.points == pytest.approx(100 * (lora.mean() - qlora.mean()))
        assert base_pair.over_seeds.points == pytest.approx(100 * (lora.mean() - 0.5))
        assert re.search(
            r"LoRA beats the base model by \d+\.\d points \(\d+\.\d to \d+\.\d over 3 seeds, p < 0.001", str(base_pair)
        )

    def test_a_pair_of_which_one_has_a_single_seed_is_not_judged_over_seeds(self, results):
        write_run(results, "base", right_on(200, 400))
        write_seeds(results, "lora", 0.9)
        write_run(results, "qlora", right_on(360, 400), settings=SETTINGS)
        by_names = {(pair.first, pair.second): pair.over_seeds for pair in load("cpu").pairs}
        assert by_names["lora", "qlora"] is None and by_names["qlora", "base"] is None
        assert by_names["lora", "base"] is not None

    def test_the_answer_says_of_how_many_seeds_each_mean_is(self, results):
        write_run(results, "base", right_on(200, 400))
        write_seeds(results, "lora", 0.9)
        assert " (means over 3 seeds). " in load("cpu").answer()
        write_run(results, "qlora", right_on(360, 400), settings=SETTINGS)
        assert " (means over seeds: 3 of LoRA and 1 of QLoRA). " in load("cpu").answer()

    @pytest.mark.parametrize("variant", ["seed-43", "rows-250"])
    def test_a_figure_that_its_predictions_do_not_give_is_refused(self, results, variant):
        write_run(results, "base", right_on(20, 40))
        write_run(results, "lora", right_on(36, 40), settings=SETTINGS)
        write_variant(results, "lora", variant, right_on(30, 40))
        path = results / "lora" / variant / "record.json"
        path.write_text(path.read_text().replace('"accuracy": 0.75', '"accuracy": 0.99', 1))
        with pytest.raises(DataError, match="the record of lora holds another accuracy than its predictions give"):
            load("cpu")

    def test_other_seeds_are_no_pairs(self, results):
        write_run(results, "base", right_on(200, 400))
        write_seeds(results, "lora", 0.9)
        write_run(results, "qlora", right_on(360, 400), settings=SETTINGS)
        for seed in (43, 45):
            write_variant(results, "qlora", f"seed-{seed}", right_on(350, 400))
        by_names = {(pair.first, pair.second): pair.over_seeds for pair in load("cpu").pairs}
        assert by_names["lora", "qlora"] is None and by_names["qlora", "base"] is not None

    def test_the_same_seeds_stand_against_each_other(self, results):
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
        assert "LoRA and QLoRA cannot be told apart (-5.0 points, " in str(pair)
        assert re.search(r" over 2 seeds, p = 0\.\d{3}; a true difference of ", str(pair))

    def test_what_all_seeds_show_is_a_difference_though_the_first_alone_does_not(self, results):
        write_run(results, "base", right_on(100, 400))
        for run, counts in (("lora", (361, 364, 367)), ("qlora", (357, 356, 358))):
            write_run(results, run, right_on(counts[0], 400), settings=SETTINGS)
            for seed, count in zip((43, 44), counts[1:], strict=True):
                write_variant(results, run, f"seed-{seed}", right_on(count, 400))
        pair = load("cpu").pairs[-1]
        assert pair.p_value > 0.05 and not pair.is_tie and pair.winner == "lora"
        assert re.match(r"LoRA beats QLoRA by 1\.8 points \([\d.]+ to [\d.]+ over 3 seeds, p = 0\.0\d\d\)", str(pair))

    def test_costs_are_medians_and_the_time_has_its_range(self, results):
        write_run(results, "base", right_on(20, 40))
        write_run(results, "lora", right_on(30, 40), settings=SETTINGS, cost={"seconds": 50.0})
        for seed, seconds in ((43, 100.0), (44, 30.0)):
            write_variant(results, "lora", f"seed-{seed}", right_on(31, 40), cost={"seconds": seconds})
        assert load("cpu").cost_table().loc["LoRA", "training"] == "50 s (30 s to 100 s)"

    def test_times_that_are_written_alike_stand_once(self, results):
        write_run(results, "base", right_on(20, 40))
        write_run(results, "lora", right_on(30, 40), settings=SETTINGS, cost={"seconds": 15.1})
        write_variant(results, "lora", "seed-43", right_on(31, 40), cost={"seconds": 15.4})
        assert load("cpu").cost_table().loc["LoRA", "training"] == "15 s"


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

        table = costs.curve_table(load("cpu"))
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
        assert costs.curve_table(load("cpu")).empty


class TestRefusals:
    @pytest.mark.parametrize(
        ("variant", "settings", "changes", "said"),
        [
            ("seed-43", {"learning_rate": 1e-3}, {}, "learning_rate is 0.001, and 0.0001 in the record of lora"),
            ("seed-43", {"train_rows": 10}, {}, "train_rows is 10, and None in the record of lora"),
            ("rows-250", {"seed": 43}, {}, "seed is 43, and 42 in the record of lora"),
            ("seed-43", {}, {"data": {"fingerprint": "ffffffffffff"}}, "data is ffffffffffff, and 0123456789ab"),
            ("seed-43", {}, {"engine": "unsloth"}, "engine is unsloth, and transformers in the record of lora"),
        ],
    )
    def test_a_variant_that_differs_in_more_is_refused_with_the_difference(
        self, results, variant, settings, changes, said
    ):
        write_run(results, "base", right_on(20, 40))
        write_run(results, "lora", right_on(30, 40), settings=SETTINGS)
        write_variant(results, "lora", variant, right_on(31, 40), settings, **changes)
        with pytest.raises(DataError, match=f"lora/{variant}/record.json: {said}"):
            load("cpu")

    def test_on_other_rows_it_is_refused(self, results):
        write_run(results, "base", right_on(20, 40))
        write_run(results, "lora", right_on(30, 40), settings=SETTINGS)
        write_variant(results, "lora", "seed-43", right_on(31, 41))
        with pytest.raises(DataError, match=r"seed-43/record\.json: was evaluated on other test rows than lora"):
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
