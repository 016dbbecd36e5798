"""Other seeds and fewer rows: where they lie, what they may differ in, and what they add to the comparison."""

import re

import factories
import numpy as np
import pytest
from factories import right_on, write_run

from data_prep import DataError
from finetune import costs, paths, records, resampling
from finetune.comparison import load
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

    def test_the_interval_has_the_variance_of_seeds_and_rows(self, results):
        """Of independent trainings: between seeds s²/3, and between rows that of the rows' mean outcomes."""
        labels = [("World", "Sports", "Business", "Sci/Tech")[row % 4] for row in range(2000)]
        easy = np.random.default_rng(0).random(2000)
        right = np.array(
            [easy + np.random.default_rng(seed).normal(0, 0.2, 2000) > 0.2 + 0.02 * seed for seed in (1, 2, 3)]
        )
        drawn = resampling.over_seeds(labels, [right])[0]
        between_seeds = right.mean(axis=1).var(ddof=1) / 3
        within = [right.mean(axis=0)[c::4] for c in range(4)]
        between_rows = sum(of.var() / len(of) for of in within) / 16
        # What is left, seeds and rows together, only adds to it.
        assert drawn.mean() == pytest.approx(right.mean(), abs=1e-3)
        assert between_seeds + between_rows < drawn.var() < 1.6 * (between_seeds + between_rows)

    def test_it_is_that_of_a_bootstrap_seed_by_seed_and_row_by_row(self):
        labels = [("World", "Sports", "Business", "Sci/Tech")[row % 4] for row in range(80)]
        first = np.array([random_right(0.8, 80, seed) for seed in (1, 2, 3)])
        second = np.array([random_right(0.7, 80, seed) for seed in (4, 5)])
        generator = np.random.default_rng(9)
        classes = [np.arange(c, 80, 4) for c in range(4)]
        differences = []
        for _ in range(4000):
            rows = np.concatenate([generator.choice(of_class, 20) for of_class in classes])
            means = [right[generator.choice(len(right), len(right) - 1)][:, rows].mean() for right in (first, second)]
            differences.append(means[0] - means[1])
        drawn = resampling.over_seeds(labels, [first, second])
        ours = resampling.interval(drawn[0] - drawn[1])
        assert ours == pytest.approx(np.percentile(differences, [2.5, 97.5]), abs=0.012)

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

    def test_what_one_seed_shows_and_others_contradict_is_a_tie(self, results):
        write_run(results, "base", right_on(100, 400))
        write_run(results, "lora", right_on(360, 400), settings=SETTINGS)
        write_variant(results, "lora", "seed-43", right_on(300, 400))
        write_run(results, "qlora", right_on(320, 400), settings=SETTINGS)
        write_variant(results, "qlora", "seed-43", right_on(380, 400))
        pair = load("cpu").pairs[-1]
        assert pair.corrected_p < 0.001 and pair.is_tie
        assert "LoRA and QLoRA cannot be told apart (-5.0 points, " in str(pair)
        assert " over 2 seeds, p < 0.001; " in str(pair)


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
