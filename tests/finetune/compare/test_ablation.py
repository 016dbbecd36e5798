"""Contrasts: figures against computations that share no code with them, refusals, and words that are always true."""

import json
import re
from dataclasses import replace
from typing import get_args, get_type_hints

import numpy as np
import pytest
from factories import environment, predictions, right_on, write_run
from statsmodels.stats.contingency_tables import mcnemar
from test_baselines import write_baseline
from test_report_numbers import NAMES, WANDER, SeedsAndRows, draws, ends, holm, read_rows, right, written_p
from test_report_numbers import predictions as shared_errors
from test_variants import SETTINGS, write_variant

from data_prep import DataError
from finetune.__main__ import main
from finetune.compare import ablation as contrasts
from finetune.compare.ablation import Change, NoContrast
from finetune.compare.comparison import load_folder
from finetune.recipes import Recipe
from finetune.settings import RUNS, Experiment
from finetune.wording import IN_WORDS

ANSWER = SETTINGS | {"supervise": "answer", "prompt": "lean", "source": "csv"}
ALL = ANSWER | {"supervise": "all"}
VERBOSE = {"prompt": "verbose-1", "fingerprint": "ba9876543210"}


def beside(settings):
    """Of these, what a variant does not set itself."""
    return {name: settings[name] for name in ("supervise", "prompt", "source")}


def write(folder, settings=ANSWER, base=100, data=None, model="a-model", engine="transformers", **right):
    """A folder of records: the base, and runs that are right on so many of 200 rows, from row 0 on."""
    asked = {name: settings[name] for name in ("prompt", "data_path")}
    write_run(folder, "base", right_on(base, 200), settings=asked, data=data, model=model)
    for number, (run, count) in enumerate(right.items()):
        how = {"settings": settings, "data": data, "model": model, "engine": engine}
        write_run(folder, run, right_on(count, 200), confidence=0.5 + number / 100, **how)
    return folder


@pytest.fixture
def contrast(tmp_path):
    """Writes `all` and `answer`, with other keywords for the first if they are given, and contrasts them."""

    def build(mine=None, **other):
        write(tmp_path / "all", **(mine or {"settings": ALL}))
        write(tmp_path / "answer", **other)
        sides = (load_folder(tmp_path / name, name) for name in ("all", "answer"))
        return contrasts.between(*sides)

    return build


class TestNumbers:
    """Of three methods with three seeds, each with its errors shared with the others, as real ones are."""

    RUNS = ("full", "lora", "qlora")

    @pytest.fixture(scope="class")
    def folders(self, tmp_path_factory):
        root = tmp_path_factory.mktemp("contrast")
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
    def table(self, folders):
        return contrasts.load(folders / "all", folders / "answer").table()

    def outcomes(self, folders, name: str, run: str) -> np.ndarray:
        places = [folders / name / run, *(folders / name / run / f"seed-{seed}" for seed in (43, 44))]
        return np.array([right(read_rows(place / "predictions.jsonl")) for place in places])

    def test_tests_and_corrections(self, folders, table):
        """The verdict is of the seeds; the first one's own test stands below."""
        both = {run: [self.outcomes(folders, name, run) for name in ("all", "answer")] for run in self.RUNS}
        over = {run: SeedsAndRows(mine - other.astype(float)) for run, (mine, other) in both.items()}
        corrected = holm([of.p_value for of in over.values()])
        level = 0.05 / max(1, sum(p >= 0.05 for p in corrected))
        for (run, of), p in zip(over.items(), corrected, strict=True):
            row = table.loc[NAMES[run]]
            assert row["p, corrected"] == written_p(p)
            assert of.power(float(row["detectable points"]), level) == pytest.approx(0.8, abs=0.03)
            assert row["verdict"] == ("tie" if p >= 0.05 else "gains" if of.mean > 0 else "loses")
        assert set(table["verdict"]) == {"tie", "loses"}, "one of the two was not tested"

    def test_the_first_seed_alone(self, folders, table):
        both = {run: [self.outcomes(folders, name, run)[0] for name in ("all", "answer")] for run in self.RUNS}
        only = [(int((mine & ~other).sum()), int((other & ~mine).sum())) for mine, other in both.values()]
        corrected = holm([mcnemar([[0, first], [second, 0]], exact=True).pvalue for first, second in only])
        for (run, (mine, other)), p in zip(both.items(), corrected, strict=True):
            row = table.loc[NAMES[run]]
            assert row["McNemar's p, corrected (seed 42)"] == written_p(p)
            assert row["accuracy % (seed 42)"] == f"{100 * other.mean():.1f} → {100 * mine.mean():.1f}"
            points, interval = re.fullmatch(r"(\S+) \((.*)\)", row["points (seed 42)"]).groups()
            assert points == f"{100 * (mine.mean() - other.mean()):+.1f}"
            expected = [100 * (mine[drawn].mean() - other[drawn].mean()) for drawn in draws()]
            assert ends(interval) == pytest.approx(np.percentile(expected, [2.5, 97.5]), abs=WANDER)

    @pytest.mark.parametrize("run", RUNS)
    def test_over_the_seeds(self, folders, table, run):
        mine, other = (self.outcomes(folders, name, run) for name in ("all", "answer"))
        row = table.loc[NAMES[run]]
        assert row["mean accuracy %"] == f"{100 * other.mean():.1f} → {100 * mine.mean():.1f}"
        points, interval = re.fullmatch(r"(\S+) \((.*)\)", row["points (95 % interval)"]).groups()
        assert points == f"{100 * (mine.mean() - other.mean()):+.1f}"
        assert ends(interval) == pytest.approx(SeedsAndRows(mine - other.astype(float)).interval, abs=0.051)

    @pytest.mark.parametrize("run", RUNS)
    def test_costs(self, folders, table, run):
        mine, other = (
            {
                what: sorted(
                    json.loads((folders / name / run / place / "record.json").read_text())["training"][what]
                    for place in ("", "seed-43", "seed-44")
                )[1]
                for what in ("seconds", "peak_memory_bytes")
            }
            for name in ("all", "answer")
        )
        row = table.loc[NAMES[run]]
        assert row["training s"] == f"{other['seconds']:.0f} → {mine['seconds']:.0f}"
        assert (
            row["peak memory GB"] == f"{other['peak_memory_bytes'] / 1e9:.1f} → {mine['peak_memory_bytes'] / 1e9:.1f}"
        )
        assert (row["articles/s"], row["real tokens/s"]) == ("11 → 11", "556 → 556")

    def test_the_paragraph_has_the_table_s_figures(self, folders, table):
        answer = contrasts.load(folders / "all", folders / "answer").answer()
        for run, spoken in (("full", "full fine-tuning"), ("lora", "LoRA"), ("qlora", "QLoRA")):
            row = table.loc[NAMES[run]]
            points, low, high = re.findall(r"[+-]\d+\.\d+", row["points (95 % interval)"])
            if row["verdict"] == "tie":
                said = f"{spoken} cannot be told apart ({points} points, {low} to {high} over 3 seeds, p "
            else:
                said = f"{points[1:]} points ({high[1:]} to {low[1:]} over 3 seeds, p {row['p, corrected']})"
            assert said in answer


class TestTheOneThing:
    def test_it_is_found_and_put_into_words(self, contrast):
        found = contrast({"settings": ALL, "lora": 150}, lora=180)
        assert found.change == Change("supervise", "all", "answer")
        assert found.title == "Loss on all tokens instead of loss on the answer alone"
        assert found.meaning.startswith("Which tokens carry loss")

    def test_a_value_without_words_is_named(self):
        assert Change("lora_rank", 8, 16).title == "With lora_rank=8 instead of lora_rank=16"
        assert Change("weights", "bfloat16", "not recorded").title == (
            "With weights=bfloat16 instead of weights=not recorded"
        )

    @pytest.mark.parametrize("name", IN_WORDS)
    def test_words_are_of_values_that_exist(self, name):
        (part,) = (part for part in (Experiment, Recipe) if name in get_type_hints(part))
        hint = get_type_hints(part)[name]
        possible = {True, False} if hint is bool else {value for value in get_args(hint) if isinstance(value, str)}
        words = IN_WORDS[name].keys()
        assert words == possible - {"auto"} or all(isinstance(value, float) for value in words)

    def test_how_a_run_is_judged_or_stored_is_none(self, contrast):
        other = ANSWER | {
            "evaluation_batch_size": 512,
            "generation_rows": 0,
            "test_rows": 200,
            "data_path": "/elsewhere",
        }
        assert contrast({"settings": ALL, "lora": 150}, settings=other, lora=180).change.name == "supervise"

    def test_the_engine_is_the_one_that_ran(self, contrast):
        auto, named = ANSWER | {"engine": "auto"}, ANSWER | {"engine": "transformers"}
        with pytest.raises(NoContrast, match="all and answer differ in no setting: there is nothing to contrast"):
            contrast({"settings": auto, "lora": 150}, settings=named, lora=180)
        found = contrast({"settings": auto, "lora": 150, "engine": "unsloth"}, settings=named, lora=180)
        assert found.title == "Training with Unsloth instead of training with transformers"

    def test_a_run_that_it_does_not_concern_is_left_out_and_named(self, contrast, tmp_path):
        """Full fine-tuning runs on transformers either way, and QLoRA was not trained with the other engine."""
        write(tmp_path / "answer", lora=180, full=185, qlora=170)
        write(tmp_path / "all", lora=180, full=185)
        write_run(tmp_path / "all", "lora", right_on(150, 200), settings=ANSWER, engine="unsloth")
        found = contrasts.between(*(load_folder(tmp_path / name, name) for name in ("all", "answer")))
        assert [pair.first for pair in found.pairs] == ["lora"]
        assert list(found.left_out) == ["base", "full", "qlora"]
        assert found.answer().endswith(
            "Left out: the base model (the same in both), full fine-tuning (the same in both) and "
            "QLoRA (only in answer)."
        )

    def test_baselines_are_no_runs(self, contrast, tmp_path):
        write_baseline(tmp_path / "answer", "svm", right_on(150, 200), data={"train_rows": 1000})
        assert list(contrast({"settings": ALL, "lora": 150}, lora=180).table().index) == ["LoRA"]


class TestPrompts:
    def verbose(self, data=None, **changes):
        return {
            "settings": ANSWER | {"prompt": "verbose"} | changes,
            "data": VERBOSE | (data or {}),
            "base": 140,
            "lora": 181,
        }

    def test_the_base_is_held_against_itself_too(self, contrast):
        found = contrast(self.verbose(), lora=180)
        assert list(found.table().index) == ["base model", "LoRA"]
        assert found.table().loc["base model", "training s"] == "-"
        assert found.answer().startswith(
            "The verbose prompt instead of the lean prompt, on 200 test rows of AG News (a-model): "
            "The base model gains 20.0 points ("
        )

    def test_the_base_alone_has_no_costs(self, contrast):
        mine = self.verbose()
        del mine["lora"]
        answer = contrast(mine).answer()
        assert "Training time" not in answer and "machines" not in answer

    @pytest.mark.parametrize(
        "changed",
        [{"source": "hub"}, {"title": "other news"}, {"train_rows": 250}, {"validation_rows": 8}, {"test_rows": 199}],
    )
    def test_all_else_of_the_data_is_the_same(self, contrast, changed):
        (name,), (value,) = changed.keys(), changed.values()
        with pytest.raises(
            NoContrast, match=f"^{name} is {value} in all/base, and .* in answer/base: .* the same data$"
        ):
            contrast(self.verbose(changed), lora=180)

    def test_where_it_lay_counts_where_the_fingerprint_cannot_tell(self, contrast):
        with pytest.raises(NoContrast, match=r"more than one thing.*: data_path \(/elsewhere, and None; "):
            contrast(self.verbose(data_path="/elsewhere"), lora=180)


class TestRefusals:
    @pytest.mark.parametrize("what", ["fingerprint", "prompt"])
    def test_other_data(self, contrast, what):
        with pytest.raises(NoContrast, match=f"{what} is another in all/base, and .* in answer/base: a contrast needs"):
            contrast({"settings": ALL, "data": {what: "another"}, "lora": 150}, lora=180)

    def test_another_model(self, contrast):
        said = "the model is another in all, and a-model in answer: a contrast needs the same model"
        with pytest.raises(NoContrast, match=said):
            contrast({"settings": ALL, "model": "another", "lora": 150}, lora=180)

    def test_two_things(self, contrast):
        with pytest.raises(NoContrast) as refused:
            contrast({"settings": ALL | {"learning_rate": 1e-3}, "lora": 150, "qlora": 150}, lora=180, qlora=180)
        assert str(refused.value) == (
            "all and answer differ in more than one thing, and a contrast is of one: "
            "learning_rate (0.001, and 0.0001; LoRA and QLoRA) and supervise (all, and answer; LoRA and QLoRA)"
        )

    def test_one_thing_that_changes_in_two_ways(self, contrast, tmp_path):
        write(tmp_path / "answer", lora=180, full=180)
        write(tmp_path / "all", settings=ANSWER | {"learning_rate": 1e-3}, lora=150, full=150)
        write_run(tmp_path / "answer", "full", right_on(180, 200), settings=ANSWER | {"learning_rate": 2e-5})
        with pytest.raises(
            NoContrast, match=r"learning_rate \(0\.001, and 2e-05; full\) and learning_rate \(0\.001, and 0\.0001"
        ):
            contrasts.load(tmp_path / "all", tmp_path / "answer")

    def test_a_setting_that_one_of_the_two_is_older_than(self, contrast):
        older = {name: value for name, value in ANSWER.items() if name != "packing"}
        with pytest.raises(NoContrast, match=r"packing \(True, and not recorded; LoRA\) and supervise"):
            contrast({"settings": ALL, "lora": 150}, settings=older, lora=180)

    @pytest.mark.parametrize("change", [{"id": "test-999"}, {"label": "Business"}], ids=["id", "label"])
    def test_other_rows(self, contrast, tmp_path, change):
        write(tmp_path / "all", settings=ALL, lora=150)
        write(tmp_path / "answer", lora=180)
        for run, count in (("base", 100), ("lora", 180)):
            rows = predictions(right_on(count, 200), confidence=0.4 if run == "base" else 0.5)
            rows[0] = rows[0].model_copy(update=change)
            settings = {"prompt": "lean", "data_path": None} if run == "base" else ANSWER
            write_run(tmp_path / "answer", run, [], rows=rows, settings=settings)
        with pytest.raises(
            NoContrast, match="were evaluated on other test rows, in another order, or with other labels"
        ):
            contrasts.load(tmp_path / "all", tmp_path / "answer")

    def test_other_seeds(self, contrast, tmp_path):
        write_variant(tmp_path / "all", "lora", "seed-43", right_on(150, 200), settings=beside(ALL))
        with pytest.raises(
            NoContrast, match="the seeds of LoRA are 42 and 43 in all, and 42 in answer: a contrast needs"
        ):
            contrast({"settings": ALL, "lora": 150}, lora=180)

    def test_a_folder_that_is_not_there(self, tmp_path):
        write(tmp_path / "all", settings=ALL, lora=150)
        with pytest.raises(DataError, match="answer: no such folder"):
            contrasts.load(tmp_path / "all", tmp_path / "answer")


class TestWords:
    def test_of_losses_and_gains(self, contrast):
        answer = contrast(
            {"settings": ALL, "full": 120, "lora": 150, "qlora": 190}, full=180, lora=180, qlora=160
        ).answer()
        assert answer.startswith(
            "Loss on all tokens instead of loss on the answer alone, on 200 test rows of AG News (a-model): "
            "Full fine-tuning loses 30.0 points ("
        )
        assert re.search(r"p < 0\.001\) and LoRA 15\.0 points \(", answer)
        assert "QLoRA gains 15.0 points (" in answer
        assert "told apart" not in answer
        assert "corrected for 3 pairs by Holm's method, level 5 %.)" in answer

    @pytest.mark.parametrize(("mine", "other", "verb"), [(172, 180, "loses"), (180, 172, "gains")])
    def test_a_change_has_one_direction(self, contrast, mine, other, verb):
        answer = contrast({"settings": ALL, "lora": mine}, lora=other).answer()
        points, low, high = map(float, re.search(rf"LoRA {verb} (\S+) points \((\S+) to (\S+),", answer).groups())
        assert points == 4 and 0 < low < points < high

    def test_of_a_model_without_tuning_the_preferred_label_is_said(self, tmp_path):
        """All wrong answers are the label after the right one: of 200 rows 50 of each label, or 100 of World."""
        labels = [row.label for row in predictions(right_on(200, 200))]
        for name, prompt, wrong in (("lean", "lean", []), ("verbose", "verbose", [labels[3]])):
            rows = [
                row.model_copy(update={"prediction": labels[0]}) if row.label in wrong else row
                for row in predictions(right_on(200, 200))
            ]
            write_run(tmp_path / name, "base", [], rows=rows, settings={"prompt": prompt}, data={"prompt": prompt})
        said = contrasts.load(tmp_path / "verbose", tmp_path / "lean").answer()
        assert f"most frequent label of the base model is {labels[0]}, for 50% of the rows, instead of " in said
        assert "for 25%." in said

    @pytest.mark.parametrize("jobs", ["", " --jobs 4"])
    def test_other_notebooks_make_seconds_doubtful(self, contrast, jobs):
        where = environment().model_copy(update={"command": f"python -m finetune run{jobs}"})
        found = contrast({"settings": ALL, "lora": 150}, lora=180)
        training = found.mine.records["lora"].training.model_copy(update={"environment": where})
        record = found.mine.records["lora"].model_copy(update={"training": training})
        mine = replace(found.mine, records=found.mine.records | {"lora": record})
        said = replace(found, mine=mine).answer()
        assert ("the load may have a part in the difference of the seconds" in said) == bool(jobs)

    def test_of_one_tie(self, contrast):
        answer = contrast({"settings": ALL, "lora": 181}, lora=180).answer()
        assert (
            "The two results of LoRA cannot be told apart (+0.5 points, +0.0 to +1.5, p = 1.000; with one row that one "
            "of them alone gets right, no difference could have been shown)."
        ) in answer
        assert "gains" not in answer and "loses" not in answer

    def test_of_several_ties(self, contrast):
        answer = contrast({"settings": ALL, "lora": 181, "qlora": 180}, lora=180, qlora=180).answer()
        assert (
            "The two results cannot be told apart, each with the true difference that would have been found four times "
            "in five: LoRA (+0.5 points, +0.0 to +1.5, p = 1.000), none, with one row that one of them alone gets "
            "right; QLoRA (+0.0 points, +0.0 to +0.0, p = 1.000), none, with no row that one of them alone gets right."
        ) in answer

    def test_a_significant_difference_that_other_seeds_contradict_is_a_tie(self, tmp_path):
        for name, settings, counts in (("all", ALL, (150, 180, 185)), ("answer", ANSWER, (180, 150, 150))):
            write(tmp_path / name, settings=settings, lora=counts[0])
            for seed, count in zip((43, 44), counts[1:], strict=True):
                write_variant(tmp_path / name, "lora", f"seed-{seed}", right_on(count, 200), settings=beside(settings))
        found = contrasts.load(tmp_path / "all", tmp_path / "answer")
        assert found.pairs[0].p_value < 0.001 and found.table().loc["LoRA", "verdict"] == "tie"
        assert "The two results of LoRA cannot be told apart (+" in found.answer()

    def test_of_costs(self, contrast, tmp_path):
        write(tmp_path / "all", settings=ALL, lora=150)
        cost = {"seconds": 120.0, "peak_memory_bytes": 3_500_000_000}
        write(tmp_path / "answer", lora=180)
        write_run(tmp_path / "answer", "lora", right_on(180, 200), settings=ANSWER, cost=cost)
        answer = contrasts.load(tmp_path / "all", tmp_path / "answer").answer()
        assert "Training time: LoRA 90 s instead of 120 s; peak memory: LoRA 2.5 GB instead of 3.5 GB." in answer

    def test_costs_of_other_machines_are_not_compared(self, tmp_path):
        write(tmp_path / "all", settings=ALL, lora=150)
        write(tmp_path / "answer", lora=180)
        other = environment().model_copy(update={"hardware": {"cpu": "A processor", "cores": 2, "gpu": "A GPU"}})
        write_run(tmp_path / "answer", "lora", right_on(180, 200), settings=ANSWER, cost={"environment": other})
        found = contrasts.load(tmp_path / "all", tmp_path / "answer")
        assert "The trainings ran on different machines: their costs say nothing of the change." in found.answer()
        assert "training s" not in found.table()
        assert "A processor, 2 cores, no GPU) against" in found.provenance() and "A GPU" in found.provenance()

    def test_both_folders_are_named_with_their_commits(self, contrast):
        assert contrast({"settings": ALL, "lora": 150}, lora=180).provenance() == (
            "all (commit 0123456789; A processor, 2 cores, no GPU) against "
            "answer (commit 0123456789; A processor, 2 cores, no GPU)"
        )


class TestCommand:
    def test_it_prints_table_and_answer(self, tmp_path, capsys):
        folders = [write(tmp_path / "all", settings=ALL, lora=150), write(tmp_path / "answer", lora=180)]
        assert main(["contrast", *map(str, folders)]) == 0
        printed = capsys.readouterr().out
        found = contrasts.load(*folders)
        assert printed.startswith(found.title) and found.answer() in printed and found.provenance() in printed
        assert re.search(r"accuracy % +90\.0 → 75\.0", printed)
        assert str(folders[1]) in found.provenance(), "two folders may have the same name"

    def test_a_refusal_is_one_sentence(self, tmp_path, capsys):
        folder = write(tmp_path / "all", settings=ALL, lora=150)
        assert main(["contrast", str(folder), str(folder)]) == 2
        assert capsys.readouterr().err == (
            f"error: {folder} and {folder} differ in no setting: there is nothing to contrast\n"
        )


def test_every_run_has_its_place():
    """Runs that are left out are looked for by these names."""
    assert set(RUNS) <= set(contrasts.NAMES)
