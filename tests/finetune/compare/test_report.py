"""The report: one file that holds everything, says what it must, and runs nothing that it was given."""

import base64
import re
from dataclasses import replace
from html import unescape

import factories
import numpy as np
import pandas as pd
import pytest
from factories import right_on, write_run
from statsmodels.stats.proportion import proportion_confint
from test_baselines import write_baseline
from test_variants import SETTINGS, write_variant

from data_prep import LABELS
from finetune import paths, records
from finetune.compare import ablation as contrasts
from finetune.compare import calibration, captions, report
from finetune.compare.comparison import load, load_folder

HOSTILE = "<script>alert('x')</script>&\"{{ 7 * 7 }}"
RUNS = ("base", "full", "full_unsloth", "lora", "qlora")


def write_report(runs=("base", "lora"), articles=None, **changes) -> str:
    """The report on runs of 40 rows, one more right than the other."""
    results = paths.results_folder("cpu")
    for number, run in enumerate(runs):
        write_run(results, run, right_on(20 + 4 * number, 40), confidence=0.5 + number / 100, **changes)
    return report.write_report(load("cpu"), results / "report.html", articles or {}).read_text(encoding="utf-8")


def text_of(html: str) -> str:
    return unescape(re.sub("<[^>]+>", " ", html))


@pytest.mark.usefixtures("home")
class TestReport:
    def test_it_is_self_contained(self):
        html = write_report()
        assert not re.findall(r"""(?:src|href|action)\s*=\s*["']?(?!data:|#)[^"'>\s]""", html)
        assert "http://" not in html and "https://" not in html
        assert "<link" not in html and "@import" not in html and "<script" not in html
        pictures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', html)
        assert len(pictures) == html.count("<img") == 7
        for picture in pictures:
            assert b"<svg" in base64.b64decode(picture, validate=True)

    def test_it_holds_the_answer_and_every_run(self):
        html = write_report(RUNS)
        assert load("cpu").answer() in text_of(html)
        for name in ("base model", "full", "full (Unsloth)", "LoRA", "QLoRA"):
            assert f"<th>{name}</th>" in html
            assert f'">{name}</a>' in html
        assert text_of(html).count(" against ") >= len(load("cpu").pairs)

    @pytest.mark.parametrize(("source", "warned"), [("sample", True), ("csv", False), ("hub", False)])
    def test_the_sample_s_warning_is_there_for_the_sample_alone(self, source, warned):
        html = write_report(data={"source": source})
        assert ("they are not AG News results" in " ".join(html.split())) == warned

    def test_a_hostile_name_is_shown_and_not_obeyed(self):
        html = write_report(model=HOSTILE, data={"title": HOSTILE})
        assert "<script" not in html
        assert HOSTILE in unescape(html)
        assert "49" not in re.search("<title>(.*?)</title>", html).group(1)

    def test_an_article_is_shown_and_not_obeyed(self):
        html = write_report(articles={"test-30": HOSTILE})
        assert "<script" not in html
        assert HOSTILE in unescape(html)

    def test_a_hostile_folder_and_setting_are_shown_and_not_obeyed(self):
        results = paths.results_folder("cpu")
        for name, loss in (("mine", "answer"), ("other", HOSTILE)):
            write_run(results / name, "base", right_on(20, 40))
            write_run(results / name, "lora", right_on(30, 40), settings=SETTINGS | {"supervise": loss})
        sides = [load_folder(results / name, HOSTILE) for name in ("other", "mine")]
        html = report.render(sides[1], {}, [contrasts.between(*sides)], {HOSTILE: HOSTILE})
        assert "<script" not in html
        assert unescape(html).count(f"supervise={HOSTILE}") == 2, "title and answer"

    def test_how_each_was_trained_is_told(self):
        results = paths.results_folder("cpu")
        write_run(results, "base", right_on(20, 40))
        both = {"epochs": 3, "lora_rank": 16}
        write_run(
            results, "full", right_on(30, 40), settings=SETTINGS | both | {"adapter": False, "weights": "float32"}
        )
        write_run(
            results, "lora", right_on(31, 40), settings=SETTINGS | both | {"adapter": True, "weights": "bfloat16"}
        )
        table, shared = report._recipes(load("cpu"))
        assert dict(table["full"]) == {"adapter": "False", "weights": "float32", "lora_rank": "-"}
        assert dict(table["LoRA"]) == {"adapter": "True", "weights": "bfloat16", "lora_rank": "16"}
        assert shared["epochs"] == "3" and "seed" not in shared
        assert "epochs=3" in text_of(report.render(load("cpu"), {}))

    def test_the_prompt_and_how_figures_are_to_be_read_are_told(self):
        results = paths.results_folder("cpu")
        write_run(results, "base", right_on(20, 40), settings=SETTINGS | {"model": "embedded"})
        html = report.write_report(load("cpu"), results / "report.html", {}).read_text()
        assert "<dd>World, Sports, Business or Sci/Tech?</dd>" in html
        text = " ".join(text_of(html).split())
        for caption in (captions.origin, captions.share_of_ag_news, captions.classes, captions.forced):
            assert caption(load("cpu")) in text

    def test_the_figures_of_guessing_are_right(self):
        """All four alike: (3/4)² + 3 (1/4)² and ln 4, as this suite scores them."""
        guess = calibration.score(list(LABELS), np.full((4, 4), 0.25))
        said = f"a Brier score of {guess.brier.value:.2f} and a log loss of ln 4 = {guess.log_loss.value:.3f}"
        assert said in " ".join(text_of(write_report()).split())

    def test_wrong_rows_can_be_filtered_by_run_and_label(self):
        """LoRA is right on rows 0 to 23: the other 16 are listed, with the classes that the filters go by."""
        html = write_report()
        rows = re.findall(r'<tr class="label-(\d)( by-all)? run-lora">\s*<td><code>test-(\d+)</code>', html)
        assert sorted(int(row) for _, _, row in rows) == list(range(24, 40))
        assert all(int(label) == int(row) % 4 and by_all for label, by_all, row in rows)
        for choice in ("#run-lora:checked) tbody tr:not(.run-lora)", "#label-3:checked) tbody tr:not(.label-3)"):
            assert choice in html
        assert 'id="run-lora"' in html and 'id="label-3"' in html

    def test_without_texts_it_says_so(self):
        assert "Without the articles' texts" in text_of(write_report())
        assert "Without the articles' texts" not in text_of(write_report(articles={"test-30": "a text"}))

    def test_accuracy_without_doubted_rows_is_marked(self):
        html = " ".join(text_of(write_report()).split())
        # All of LoRA's answers are as sure, so that its 16 errors are doubted, and with them its accuracy is 24 of 24.
        assert "16 rows of 40 of which every tuned model is at least as sure" in html
        assert "biased upwards, in favour of the models that chose them" in html
        assert "Not a result: accuracy without the suspected rows." in html
        assert "LoRA 60.0 100.0 86.2 to 100.0" in html

    def test_the_base_alone_makes_a_report(self):
        text = text_of(write_report(("base",)))
        assert "without tuning gets 50.0% right" in text
        assert "Empty DataFrame" not in text
        assert "Index: []" not in text

    def test_a_perfect_and_a_hopeless_run_can_be_drawn(self):
        results = paths.results_folder("cpu")
        write_run(results, "base", right_on(0, 40))
        write_run(results, "lora", right_on(40, 40))
        assert "100.0" in text_of(report.write_report(load("cpu"), results / "report.html", {}).read_text())

    def test_the_same_records_give_the_same_file(self):
        assert write_report() == write_report()

    def test_a_failure_while_writing_keeps_the_earlier_report(self):
        before = write_report()
        path = paths.results_folder("cpu") / "report.html"
        comparison = load("cpu")
        unwritable = {run: record.model_copy(update={"model": "\ud800"}) for run, record in comparison.records.items()}
        with pytest.raises(UnicodeEncodeError):
            report.write_report(replace(comparison, records=unwritable), path, {})
        assert path.read_text(encoding="utf-8") == before
        assert not list(path.parent.glob("*.partial"))


@pytest.mark.usefixtures("home")
class TestProvenance:
    def test_every_name_leads_to_its_record_commit_and_command(self):
        html = write_report(RUNS)
        for run in RUNS:
            assert f'<a href="#record-{run}">' in html
            row = re.search(rf'<tr id="record-{run}">(.*?)</tr>', html, re.DOTALL).group(1)
            assert f"<code>{run}/record.json</code>" in row
            assert "<code>0123456789</code>" in row and "<code>make demo</code>" in row

    def test_baselines_and_variants_are_there_too(self):
        results = paths.results_folder("cpu")
        write_run(results, "base", right_on(20, 40))
        write_run(results, "lora", right_on(30, 40), settings=SETTINGS)
        write_variant(results, "lora", "seed-43", right_on(32, 40))
        write_variant(results, "lora", "rows-250", right_on(24, 40), data={"train_rows": 250})
        write_baseline(results, "svm", right_on(28, 40))
        found = report.provenance(load("cpu"))
        assert [source.record for source in found] == [
            "baselines/svm/record.json",
            "base/record.json",
            "lora/record.json",
            "lora/seed-43/record.json",
            "lora/rows-250/record.json",
        ]
        assert [source.seed for source in found] == ["-", "-", "42", "43", "42"]
        html = report.write_report(load("cpu"), results / "report.html", {}).read_text()
        assert html.count('id="record-lora"') == 1
        assert "baselines/svm/record.json" in html and "as it was made" in html

    def test_each_training_and_evaluation_has_its_machine(self):
        results = paths.results_folder("cpu")
        trained, evaluated = (
            factories.environment().model_copy(update={"hardware": {"cpu": "A processor", "cores": 8, "gpu": gpu}})
            for gpu in ("GPU one", "GPU two")
        )
        base = write_run(results, "base", right_on(20, 40))
        lora = write_run(results, "lora", right_on(30, 40), cost={"environment": trained})
        write_baseline(results, "svm", right_on(28, 40), environment=evaluated)
        write_baseline(results, "few_shot", right_on(29, 40), environment=evaluated)
        moved = lora.model_copy(update={"evaluation": lora.evaluation.model_copy(update={"environment": evaluated})})
        records.write(moved, results / "lora")
        found = {source.name: (source.trained_on, source.evaluated_on) for source in report.provenance(load("cpu"))}
        assert found == {
            "svm": ("-", "A processor, 8 cores"),
            "base": ("-", f"{base.evaluation.environment.hardware['cpu']}, 2 cores"),
            "few_shot": ("-", "GPU two, 8 cores"),
            "lora": ("GPU one, 8 cores", "GPU two, 8 cores"),
        }
        html = report.render(load("cpu"), {})
        assert '<td data-head="trained on">GPU one, 8 cores</td>' in html

    def test_merged_models_are_traced_to_their_files(self):
        results = paths.results_folder("cpu")
        write_run(results, "base", right_on(20, 40))
        record = write_run(results, "lora", right_on(30, 40))
        merged = records.Merged(
            environment=factories.environment(), run="lora", base="the base", artefact="a", artefact_bytes=273_100_000,
            adapter_digest=record.training.artefact_digest, artefact_digest="b", scoring=record.evaluation.scoring,
            adapter_accuracy=0.775, agreement=0.95, largest_difference=0.0625,
        )  # fmt: skip
        (results / "lora" / "merged.json").write_text(merged.model_dump_json())
        text = " ".join(text_of(report.render(load("cpu"), {})).split())
        assert "From lora/merged.json (commit 0123456789 ; A processor, 2 cores, no GPU)." in text
        # Of 40 rows 30 are right when merged, and 31 with the adapter apart; 38 are labelled alike.
        low, high = (f"{100 * end:.1f}" for end in proportion_confint(30, 40, method="wilson"))
        assert f"LoRA the base 77.5 75.0 {low} to {high} 95.0 0.062 273.1" in text


@pytest.mark.parametrize(
    ("value", "shown"), [(0.04, "+0.04"), (-0.01, "-0.01"), (0.0, "+0.0"), (0.06, "+0.1"), (1e-14, "+0.0")]
)
def test_a_small_difference_is_not_shown_as_none(value, shown):
    table = report.formatted(pd.DataFrame({"against base": [value, 3.26]}))
    assert list(table["against base"]) == [shown, "+3.3"]


@pytest.mark.usefixtures("home")
def test_what_was_not_recorded_is_called_so():
    text = " ".join(text_of(write_report()).split())
    assert "Not recorded: these records hold no times of validations." in text
    assert "Not recorded: no model of these records was trained on fewer rows" in text
    assert "Each method was trained with one seed" in text
    assert "these records hold no scores of validation rows" in text
