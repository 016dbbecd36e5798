"""Ablations: figures against computations that share no code with them, and refusals."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from factories import SETTINGS, environment, predictions, right_on, write_run, write_variant
from statsmodels.stats.contingency_tables import mcnemar
from test_baselines import write_baseline
from test_report_numbers import NAMES, WANDER, SeedsAndRows, draws, ends, holm, read_rows, right, written_p
from test_report_numbers import predictions as shared_errors

from data_prep import DataError
from finetune.__main__ import main
from finetune.compare import ablation
from finetune.compare.ablation import Change, NoAblation
from finetune.compare.comparison import NotComparable, load_folder

ANSWER = SETTINGS | {"completion_only_loss": True, "prompt": "lean", "source": "csv"}
ALL = ANSWER | {"completion_only_loss": False}
VERBOSE = {"prompt": "verbose-1", "fingerprint": "ba9876543210"}


def beside(settings):
    """Of these, what a variant does not set itself."""
    return {name: settings[name] for name in ("completion_only_loss", "prompt", "source")}


def write(folder, settings=ANSWER, base=100, data=None, model="a-model", engine="transformers", **right):
    """A folder of records: the base, and runs that are right on so many of 200 rows, from row 0 on."""
    asked = {name: settings[name] for name in ("prompt", "data_path")}
    write_run(folder, "base", right_on(base, 200), settings=asked, data=data, model=model)
    for number, (run, count) in enumerate(right.items()):
        how = {"settings": settings, "data": data, "model": model, "engine": engine}
        write_run(folder, run, right_on(count, 200), confidence=0.5 + number / 100, **how)
    return folder


@pytest.fixture
def ablated(tmp_path):
    """Writes `all` and `answer`, with other keywords for the first if they are given, and their ablation."""

    def build(mine=None, **other):
        write(tmp_path / "all", **(mine or {"settings": ALL}))
        write(tmp_path / "answer", **other)
        sides = (load_folder(tmp_path / name, name) for name in ("all", "answer"))
        return ablation.between(*sides)

    return build


class TestNumbers:
    """Of three methods with three seeds, each with its errors shared with the others, as real ones are."""

    RUNS = ("full", "lora", "qlora")

    @pytest.fixture(scope="class")
    def folders(self, tmp_path_factory):
        root = tmp_path_factory.mktemp("ablation")
        for name, loss, settings in (("all", 0.5, ALL), ("answer", 0, ANSWER)):
            write_run(root / name, "base", [], rows=shared_errors(1.0, 1), settings={"prompt": "lean"})
            for number, run in enumerate(self.RUNS):
                # QLoRA loses next to nothing by it.
                skill = 2.2 + 0.15 * number - loss * (run != "qlora") * (1 + number)
                cost = {
                    "seconds": 80.5 * (2 - loss) * (1 + number),
                    "peak_memory_bytes": 7_000_000_000 + number * 10**8,
                }
                first = shared_errors(skill, 10 + number + ord(name[1]))
                write_run(root / name, run, [], rows=first, settings=settings, cost=cost)
                for seed in (43, 44):
                    rows = shared_errors(skill, 100 * number + seed + ord(name[1]))
                    write_variant(root / name, run, f"seed-{seed}", [], rows=rows, settings=beside(settings))
        return root

    @pytest.fixture(scope="class")
    def tables(self, folders):
        return ablation.load(folders / "all", folders / "answer").tables()

    def outcomes(self, folders, name: str, run: str) -> np.ndarray:
        places = [folders / name / run, *(folders / name / run / f"seed-{seed}" for seed in (43, 44))]
        return np.array([right(read_rows(place)) for place in places])

    def check(self, row, sides, interval, near) -> None:
        """Accuracies, difference and interval of a line against outcomes."""
        mine, other = sides
        points, shown = re.fullmatch(r"(\S+) \((.*)\)", row["points (95 % interval)"]).groups()
        assert f"{100 * other.mean():.1f} → {100 * mine.mean():.1f}" == row.iloc[0]
        assert points == f"{100 * (mine.mean() - other.mean()):+.1f}"
        assert ends(shown) == pytest.approx(interval, abs=near)

    def test_over_the_seeds(self, folders, tables):
        both = {run: [self.outcomes(folders, name, run) for name in ("all", "answer")] for run in self.RUNS}
        over = {run: SeedsAndRows(mine - other.astype(float)) for run, (mine, other) in both.items()}
        corrected = holm([of.p_value for of in over.values()])
        for (run, of), p in zip(over.items(), corrected, strict=True):
            row = tables[0].loc[NAMES[run]]
            self.check(row, both[run], of.interval, 0.051)
            assert row["p, corrected"] == written_p(p)
            assert row["result"] == ("tie" if p >= 0.05 else "better" if of.mean > 0 else "worse")
        assert set(tables[0]["result"]) == {"tie", "worse"}, "one of the two was not tested"

    def test_the_first_seed_alone(self, folders, tables):
        both = {run: [self.outcomes(folders, name, run)[0] for name in ("all", "answer")] for run in self.RUNS}
        only = [(int((mine & ~other).sum()), int((other & ~mine).sum())) for mine, other in both.values()]
        corrected = holm([mcnemar([[0, first], [second, 0]], exact=True).pvalue for first, second in only])
        for (run, (mine, other)), p in zip(both.items(), corrected, strict=True):
            row = tables[1].loc[NAMES[run]]
            assert row["McNemar's p, corrected"] == written_p(p)
            expected = [100 * (mine[drawn].mean() - other[drawn].mean()) for drawn in draws()]
            self.check(row, (mine, other), np.percentile(expected, [2.5, 97.5]), WANDER)

    @pytest.mark.parametrize("run", RUNS)
    def test_costs(self, folders, tables, run):
        def middle(name: str, what: str) -> float:
            places = (folders / name / run / place / "record.json" for place in ("", "seed-43", "seed-44"))
            return sorted(json.loads(path.read_text())["training"][what] for path in places)[1]

        row = tables[2].loc[NAMES[run]]
        seconds, memory = (
            [middle(name, what) for name in ("answer", "all")] for what in ("seconds", "peak_memory_bytes")
        )
        assert row["training s"] == "{:.0f} → {:.0f}".format(*seconds)
        assert row["memory GB"] == "{:.1f} → {:.1f}".format(*(size / 1e9 for size in memory))
        assert (row["samples/s"], row["tokens/s"]) == ("11 → 11", "556 → 556")


class TestTheOneThing:
    def test_it_is_found_and_put_into_words(self, ablated):
        found = ablated({"settings": ALL, "lora": 150}, lora=180)
        assert found.change == Change("completion_only_loss", False, True)
        assert found.title == "With completion_only_loss=False instead of completion_only_loss=True"
        assert found.meaning.startswith("Only the answer")

    def test_how_a_run_is_judged_or_stored_is_none(self, ablated):
        other = ANSWER | {
            "per_device_eval_batch_size": 512,
            "generation_rows": 0,
            "test_rows": 200,
            "data_path": "/elsewhere",
        }
        assert ablated({"settings": ALL, "lora": 150}, settings=other, lora=180).change.name == "completion_only_loss"

    def test_the_engine_is_the_one_that_ran(self, ablated):
        auto, named = ANSWER | {"engine": "auto"}, ANSWER | {"engine": "transformers"}
        with pytest.raises(NoAblation, match="all and answer differ in no setting: there is nothing to compare"):
            ablated({"settings": auto, "lora": 150}, settings=named, lora=180)
        found = ablated({"settings": auto, "lora": 150, "engine": "unsloth"}, settings=named, lora=180)
        assert found.change == Change("engine", "unsloth", "transformers")

    def test_a_run_that_it_does_not_concern_is_left_out_and_named(self, ablated, tmp_path):
        """Full fine-tuning runs on transformers either way, and QLoRA was not trained with the other engine."""
        write(tmp_path / "answer", lora=180, full=185, qlora=170)
        write(tmp_path / "all", lora=180, full=185)
        write_run(tmp_path / "all", "lora", right_on(150, 200), settings=ANSWER, engine="unsloth")
        found = ablation.between(*(load_folder(tmp_path / name, name) for name in ("all", "answer")))
        assert [pair.first for pair in found.pairs] == ["lora"]
        assert list(found.left_out) == ["base", "full", "qlora"]
        assert found.notes()[-1] == (
            "Left out: base model (the same in both), full (the same in both) and QLoRA (only in answer)."
        )

    def test_baselines_are_no_runs(self, ablated, tmp_path):
        write_baseline(tmp_path / "answer", "svm", right_on(150, 200), data={"train_rows": 1000})
        assert list(ablated({"settings": ALL, "lora": 150}, lora=180).tables()[0].index) == ["LoRA"]


class TestPrompts:
    def verbose(self, data=None, **changes):
        return {
            "settings": ANSWER | {"prompt": "verbose"} | changes,
            "data": VERBOSE | (data or {}),
            "base": 140,
            "lora": 181,
        }

    def test_the_base_is_held_against_itself_too(self, ablated):
        found = ablated(self.verbose(), lora=180)
        assert list(found.tables()[0].index) == ["base model", "LoRA"]
        assert list(found.tables()[1].index) == ["LoRA"], "the base has no costs"
        assert found.tables()[0].loc["base model", "points (95 % interval)"].startswith("+20.0 (")

    @pytest.mark.parametrize(
        "changed",
        [{"source": "hub"}, {"title": "other news"}, {"train_rows": 250}, {"validation_rows": 8}, {"test_rows": 199}],
    )
    def test_all_else_of_the_data_is_the_same(self, ablated, changed):
        (name,), (value,) = changed.keys(), changed.values()
        with pytest.raises(
            NotComparable, match=f"^all/base: {name} is {value}, and .* in answer/base: .* same {name}$"
        ):
            ablated(self.verbose(changed), lora=180)

    def test_where_it_lay_counts_where_the_fingerprint_cannot_tell(self, ablated):
        with pytest.raises(NoAblation, match=r"more than one setting.*: data_path \(/elsewhere, and None; "):
            ablated(self.verbose(data_path="/elsewhere"), lora=180)


class TestRefusals:
    @pytest.mark.parametrize("change", [{"data": {"fingerprint": "another"}}, {"data": {"prompt": "another"}},
                                        {"model": "another"}])  # fmt: skip
    def test_other_data_or_another_model(self, ablated, change):
        [what] = change.get("data", change)
        with pytest.raises(NotComparable, match=f"all/base: {what} is another, and .* in answer/base: compare runs"):
            ablated({"settings": ALL, "lora": 150} | change, lora=180)

    def test_two_things(self, ablated):
        with pytest.raises(NoAblation) as refused:
            ablated({"settings": ALL | {"learning_rate": 1e-3}, "lora": 150, "qlora": 150}, lora=180, qlora=180)
        assert str(refused.value) == (
            "all and answer differ in more than one setting: "
            "completion_only_loss (False, and True; LoRA and QLoRA) and "
            "learning_rate (0.001, and 0.0001; LoRA and QLoRA); "
            "compare folders with one change"
        )

    def test_one_thing_that_changes_in_two_ways(self, ablated, tmp_path):
        write(tmp_path / "answer", lora=180, full=180)
        write(tmp_path / "all", settings=ANSWER | {"learning_rate": 1e-3}, lora=150, full=150)
        write_run(tmp_path / "answer", "full", right_on(180, 200), settings=ANSWER | {"learning_rate": 2e-5})
        with pytest.raises(
            NoAblation, match=r"learning_rate \(0\.001, and 2e-05; full\) and learning_rate \(0\.001, and 0\.0001"
        ):
            ablation.load(tmp_path / "all", tmp_path / "answer")

    def test_a_setting_that_one_of_the_two_is_older_than(self, ablated):
        older = {name: value for name, value in ANSWER.items() if name != "packing"}
        with pytest.raises(NoAblation, match=r"packing \(True, and not recorded; LoRA\)"):
            ablated({"settings": ALL, "lora": 150}, settings=older, lora=180)

    @pytest.mark.parametrize("change", [{"id": "test-999"}, {"label": "Business"}], ids=["id", "label"])
    def test_other_rows(self, ablated, tmp_path, change):
        write(tmp_path / "all", settings=ALL, lora=150)
        write(tmp_path / "answer", lora=180)
        for run, count in (("base", 100), ("lora", 180)):
            rows = predictions(right_on(count, 200), confidence=0.4 if run == "base" else 0.5)
            rows[0] = replace(rows[0], **change)
            settings = {"prompt": "lean", "data_path": None} if run == "base" else ANSWER
            write_run(tmp_path / "answer", run, [], rows=rows, settings=settings)
        with pytest.raises(NotComparable, match="all/base: test rows and labels is "):
            ablation.load(tmp_path / "all", tmp_path / "answer")

    def test_other_seeds(self, ablated, tmp_path):
        write_variant(tmp_path / "all", "lora", "seed-43", right_on(150, 200), settings=beside(ALL))
        with pytest.raises(
            NotComparable, match=r"all/lora: seeds is \(42, 43\), and \(42,\) in answer/lora: compare runs"
        ):
            ablated({"settings": ALL, "lora": 150}, lora=180)

    def test_a_folder_that_is_not_there(self, tmp_path):
        write(tmp_path / "all", settings=ALL, lora=150)
        with pytest.raises(DataError, match="answer: no such folder"):
            ablation.load(tmp_path / "all", tmp_path / "answer")


class TestTables:
    @pytest.mark.parametrize(
        ("mine", "other", "result"), [(172, 180, "worse"), (180, 172, "better"), (181, 180, "tie")]
    )
    def test_a_change_has_one_direction(self, ablated, mine, other, result):
        row = ablated({"settings": ALL, "lora": mine}, lora=other).tables()[0].loc["LoRA"]
        points, low, high = map(float, re.findall(r"[+-]\d+\.\d+", row["points (95 % interval)"]))
        assert row["result"] == result and points == (mine - other) / 2 and low <= points <= high

    def test_of_a_model_without_tuning_the_preferred_label_is_said(self, tmp_path):
        """All wrong answers are the label after the right one: of 200 rows 50 of each label, or 100 of World."""
        labels = [row.label for row in predictions(right_on(200, 200))]
        for name, prompt, wrong in (("lean", "lean", []), ("verbose", "verbose", [labels[3]])):
            rows = [
                replace(row, prediction=labels[0]) if row.label in wrong else row
                for row in predictions(right_on(200, 200))
            ]
            write_run(tmp_path / name, "base", [], rows=rows, settings={"prompt": prompt}, data={"prompt": prompt})
        said = " ".join(ablation.load(tmp_path / "verbose", tmp_path / "lean").notes())
        assert f"The base model now answers {labels[0]} most often, for 50% of the rows. Before, it was " in said
        assert "for 25%." in said

    def test_a_significant_difference_that_other_seeds_contradict_is_a_tie(self, tmp_path):
        for name, settings, counts in (("all", ALL, (150, 180, 185)), ("answer", ANSWER, (180, 150, 150))):
            write(tmp_path / name, settings=settings, lora=counts[0])
            for seed, count in zip((43, 44), counts[1:], strict=True):
                write_variant(tmp_path / name, "lora", f"seed-{seed}", right_on(count, 200), settings=beside(settings))
        found = ablation.load(tmp_path / "all", tmp_path / "answer")
        assert found.pairs[0].p_value < 0.001 and found.tables()[0].loc["LoRA", "result"] == "tie"

    def test_costs_of_other_machines_are_not_compared(self, tmp_path):
        write(tmp_path / "all", settings=ALL, lora=150)
        write(tmp_path / "answer", lora=180)
        other = environment().model_copy(update={"hardware": {"cpu": "A processor", "cores": 2, "gpu": "A GPU"}})
        confidence, cost = 0.5, {"environment": other}
        write_run(tmp_path / "answer", "lora", right_on(180, 200), settings=ANSWER, confidence=confidence, cost=cost)
        found = ablation.load(tmp_path / "all", tmp_path / "answer")
        assert len(found.tables()) == 1 and "different machines" in " ".join(found.notes())


class TestCommand:
    def test_it_prints_tables_and_notes_in_80_columns(self, tmp_path, capsys):
        folders = [write(tmp_path / name, settings=of, lora=150, full_unsloth=160 + len(name)) for name, of in
                   (("all", ALL), ("answer", ANSWER))]  # fmt: skip
        assert main(["ablation", *map(str, folders)]) == 0
        printed = capsys.readouterr().out
        found = ablation.load(*folders)
        assert printed.startswith(found.title)
        assert all(table.to_string() in printed for table in found.tables())
        assert max(len(line) for line in printed.splitlines() if str(tmp_path) not in line) <= 80
        assert str(folders[1]) in found.provenance(), "two folders may have the same name"

    def test_a_refusal_is_one_sentence(self, tmp_path, capsys):
        folder = write(tmp_path / "all", settings=ALL, lora=150)
        assert main(["ablation", str(folder), str(folder)]) == 2
        assert capsys.readouterr().err == (
            f"error: {folder} and {folder} differ in no setting: there is nothing to compare\n"
        )
