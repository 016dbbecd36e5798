"""Ablations: figures against computations that share no code with them, and refusals."""

import re
from dataclasses import replace

import numpy as np
import pytest
from factories import SETTINGS, environment, predictions, right_on, write_run, write_variant
from statsmodels.stats.contingency_tables import mcnemar
from test_baselines import write_baseline
from test_report_numbers import holm, written_p

from data_prep import DataError
from finetune.__main__ import main
from finetune.compare import ablation, stats
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


def test_each_table_has_its_figures(tmp_path):
    """Two methods with three seeds, by hand; test_report_numbers.py has the same tests' own numbers."""
    counts = {"all": {"lora": (150, 160, 164), "qlora": (170, 171, 172)},
              "answer": {"lora": (180, 182, 184), "qlora": (169, 172, 174)}}  # fmt: skip
    for name, settings in (("all", ALL), ("answer", ANSWER)):
        write(tmp_path / name, settings=settings, **{run: of[0] for run, of in counts[name].items()})
        for run, of in counts[name].items():
            for seed, count in zip((43, 44), of[1:], strict=True):
                cost = {"seconds": float(count), "peak_memory_bytes": count * 10**8}
                rows = right_on(count, 200)
                write_variant(tmp_path / name, run, f"seed-{seed}", rows, settings=beside(settings), cost=cost)
    found = ablation.load(tmp_path / "all", tmp_path / "answer")
    over, first, costs = found.tables()
    # Means of three in 200, and the test of these rows and seeds that the comparison has too.
    assert over["accuracy %"].to_dict() == {"LoRA": "91.0 → 79.0", "QLoRA": "85.8 → 85.5"}
    assert [text.split(" ")[0] for text in over["points (95 % interval)"]] == ["-12.0", "-0.3"]
    p_values = []
    for run in ("lora", "qlora"):
        mine, other = (np.array([right_on(count, 200) for count in counts[name][run]]) for name in counts)
        labels = [row.label for row in predictions(right_on(0, 200))]
        p_values.append(stats.over_seeds(labels, mine, other).p_value)
    assert list(over["p, corrected"]) == [written_p(p) for p in holm(p_values)]
    assert list(over["result"]) == ["worse", "tie"]
    # Of the first seed: 30 rows and one row that only one side gets right.
    assert first["accuracy %, seed 42"].to_dict() == {"LoRA": "90.0 → 75.0", "QLoRA": "84.5 → 85.0"}
    exact = [mcnemar([[0, 0], [30, 0]], exact=True).pvalue, mcnemar([[0, 1], [0, 0]], exact=True).pvalue]
    assert list(first["McNemar's p, corrected"]) == [written_p(p) for p in holm(exact)]
    # The middle one of 90 s and 2.5 GB of the first training, and of the other two.
    assert costs["training s"].to_dict() == {"LoRA": "182 → 160", "QLoRA": "172 → 171"}
    assert costs["memory GB"].to_dict() == {"LoRA": "18.2 → 16.0", "QLoRA": "17.2 → 17.1"}
    assert set(costs["samples/s"]) == {"11 → 11"} and set(costs["tokens/s"]) == {"556 → 556"}


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
