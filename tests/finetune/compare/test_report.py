"""The report: one file that holds everything, answers first, and runs nothing that it was given."""

import base64
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import factories
import matplotlib.pyplot as plt
import numpy as np
import pytest
from factories import SETTINGS, generation, predictions, right_on, write_run, write_variant
from statsmodels.stats.proportion import proportion_confint
from test_baselines import write_baseline

from data_prep.task import AG_NEWS
from finetune import paths, records
from finetune.__main__ import main
from finetune.compare import ablation, calibration, plots, report, tables
from finetune.compare.comparison import Comparison, load, load_folder
from finetune.compare.verdict import decide

HOSTILE = "<script>alert('x')</script>&\"{{ 7 * 7 }}"
RUNS = ("base", "full", "full_unsloth", "lora", "qlora")
ADDRESS = report.data_address
TEXTS = {f"test-{row}": f"text {row}" for row in range(40)}


def compare(folder, runs=("base", "lora"), **changes) -> Comparison:
    """Runs of 40 rows, one more right than the other."""
    for number, run in enumerate(runs):
        write_run(folder, run, right_on(20 + 4 * number, 40), confidence=0.5 + number / 100, **changes)
    return load_folder(folder, "cpu")


def text_of(html: str) -> str:
    return " ".join(unescape(re.sub("<[^>]+>", " ", html)).split())


@pytest.fixture(scope="module", autouse=True)
def not_drawn():
    """Drawing takes three quarters of a report's time; who looks at pictures asks for `drawn`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "data_address", lambda figure: plt.close(figure) or "data:,")
        yield


@pytest.fixture
def drawn(monkeypatch):
    monkeypatch.setattr(report, "data_address", ADDRESS)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Comparison:
    """The base, right on rows 0 to 19, and LoRA, right on rows 0 to 23."""
    return compare(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def page(pair, not_drawn) -> str:
    return report.render(pair, TEXTS)


@pytest.fixture(scope="module")
def five(tmp_path_factory) -> Comparison:
    return compare(tmp_path_factory.mktemp("five"), RUNS)


@pytest.fixture(scope="module")
def page_of_five(five, not_drawn) -> str:
    return report.render(five, TEXTS)


class TestReport:
    def test_it_is_self_contained_and_the_same_each_time(self, pair, drawn):
        html = report.render(pair, {})
        assert html == report.render(pair, {})
        assert not re.findall(r"""(?:src|href|action)\s*=\s*["']?(?!data:|#)[^"'>\s]""", html)
        assert not any(part in html for part in ("http://", "https://", "<link", "@import", "<script"))
        pictures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', html)
        assert len(pictures) == html.count("<img") == 4
        assert all(b"<svg" in base64.b64decode(picture, validate=True) for picture in pictures)

    def test_verdict_picture_and_table_come_before_everything_that_folds(self, five, page_of_five):
        first, folded = page_of_five.partition("<details>")[::2]
        assert decide(five).text in text_of(first)
        assert first.count("<img") == first.count("<table") == 1
        summary = tables.summary(five)
        assert list(summary.index) == ["base model", "full", "full (Unsloth)", "LoRA", "QLoRA"]
        for name, accuracy in summary["accuracy %"].items():
            assert f'<th scope="row">{name}</th><td>{accuracy}</td>' in first
        assert folded.count("<summary>") == page_of_five.count("<details>") == 6

    def test_every_picture_has_a_text_and_every_table_its_heads(self, page_of_five):
        """For screen readers; and each table scrolls in a box of its own, that the keyboard reaches."""
        checker = Checker()
        checker.feed(page_of_five)
        assert checker.tables >= 10 and checker.faults == []

    @pytest.mark.parametrize(("source", "warned"), [("sample", True), ("csv", False)])
    def test_the_sample_s_warning_is_there_for_the_sample_alone(self, tmp_path, source, warned):
        said = " ".join(report.notes(compare(tmp_path, data={"source": source})))
        assert ("These are not AG News results." in said) == warned

    def test_hostile_names_texts_and_settings_are_shown_and_not_obeyed(self, tmp_path):
        for name, loss in (("mine", "answer"), ("other", HOSTILE)):
            settings = SETTINGS | {"completion_only_loss": loss}
            for run, right in (("base", 20), ("lora", 30)):
                how = {"settings": settings if run == "lora" else {}, "model": HOSTILE, "data": {"title": HOSTILE}}
                write_run(tmp_path / name, run, right_on(right, 40), **how)
        sides = [load_folder(tmp_path / name, f"{HOSTILE}{name}") for name in ("other", "mine")]
        html = report.render(sides[1], {"test-30": HOSTILE}, [ablation.between(*sides)], {HOSTILE: HOSTILE})
        shown = unescape(html)
        assert "<script" not in html and f"completion_only_loss={HOSTILE}" in shown and f"<td>{HOSTILE}</td>" in shown
        assert "49" not in re.search("<title>(.*?)</title>", html).group(1)

    def test_how_each_was_trained_is_told(self, tmp_path):
        write_run(tmp_path, "base", right_on(20, 40))
        both = SETTINGS | {"num_train_epochs": 3, "r": 16}
        write_run(tmp_path, "full", right_on(30, 40), settings=both | {"adapter": False, "dtype": "float32"})
        write_run(tmp_path, "lora", right_on(31, 40), settings=both | {"adapter": True, "dtype": "bfloat16"})
        compared = load_folder(tmp_path, "cpu")
        table, shared = tables.recipes(compared)
        assert dict(table["full"]) == {"adapter": "False", "dtype": "float32", "r": "-"}
        assert dict(table["LoRA"]) == {"adapter": "True", "dtype": "bfloat16", "r": "16"}
        assert shared["num_train_epochs"] == "3" and "seed" not in shared
        assert "num_train_epochs=3" in text_of(report.render(compared, {}))

    def test_the_prompt_is_the_record_s_with_placeholders(self, tmp_path):
        for name in ("lean", "verbose"):
            html = report.render(compare(tmp_path, ("base",), data={"prompt": AG_NEWS.prompts[name].id}), {})
            _, user, answer = re.findall("<dd>(.*?)</dd>", html, re.DOTALL)
            assert unescape(user) == "Classify the following news article:\n\nTITLE DESCRIPTION"
            assert unescape(answer) == '{"category":"World"}'
        assert "<dd>" not in report.render(compare(tmp_path, ("base",), data={"prompt": "lean-0"}), {})

    def test_the_figures_of_guessing_are_right(self, page):
        """All four alike: (3/4)² + 3 (1/4)² and ln 4, as this suite scores them."""
        guess = calibration.score(np.arange(4), np.full((4, 4), 0.25))
        said = f"a Brier score of {guess.brier.value:.2f} and a log loss of {guess.log_loss.value:.3f}"
        assert said in text_of(page)

    def test_wrong_rows_can_be_filtered_by_run_and_label(self, page):
        """LoRA is right on rows 0 to 23: the other 16 are listed, with the classes that the filters go by."""
        rows = re.findall(r'<tr class="label-(\d)( by-all)? run-lora">\s*<th scope="row">test-(\d+)', page)
        assert sorted(int(row) for _, _, row in rows) == list(range(24, 40))
        assert all(int(label) == int(row) % 4 and by_all for label, by_all, row in rows)
        for choice in ("#run-lora:checked) tbody tr:not(.run-lora)", "#label-3:checked) tbody tr:not(.label-3)"):
            assert choice in page
        assert 'id="run-lora"' in page and 'id="label-3"' in page

    def test_rows_without_their_text_are_not_listed(self, pair):
        assert re.findall(r'<th scope="row">(test-\d+)', report.render(pair, {"test-30": "a text"})) == ["test-30"] * 2

    def test_the_base_alone_makes_a_report(self, tmp_path):
        text = text_of(report.render(compare(tmp_path, ("base",)), {}))
        assert "Only the base model was evaluated. It gets 50.0 %." in text
        assert "Empty DataFrame" not in text and "Index: []" not in text

    def test_a_perfect_and_a_hopeless_run_can_be_drawn(self, tmp_path, drawn):
        write_run(tmp_path, "base", right_on(0, 40))
        write_run(tmp_path, "lora", right_on(40, 40))
        assert "100.0" in text_of(report.render(load_folder(tmp_path, "cpu"), {}))

    def test_a_class_without_test_rows_is_said(self, home):
        for name, right in (("base", 20), ("lora", 30)):
            rows = [row for row in predictions(right_on(right, 40)) if row.label != "World"]
            write_run(paths.results_folder("cpu"), name, (), rows=rows)
        compared = load("cpu")
        text = text_of(report.render(compared, {}))
        assert "No test row has the class World: macro-F1 is the mean of the other classes." in text
        assert tables.classes(compared).loc["World", "LoRA"] == "no test row"

    def test_a_failure_while_writing_keeps_the_earlier_report(self, pair, tmp_path):
        path = report.write_report(pair, tmp_path / "report.html", {})
        before = path.read_text(encoding="utf-8")
        unwritable = {run: record.model_copy(update={"model": "\ud800"}) for run, record in pair.records.items()}
        with pytest.raises(UnicodeEncodeError):
            report.write_report(replace(pair, records=unwritable), path, {})
        assert [of.name for of in tmp_path.iterdir()] == ["report.html"]
        assert path.read_text(encoding="utf-8") == before

    def test_the_colours_are_those_of_the_pictures(self, monkeypatch, pair):
        monkeypatch.setitem(plots.COLOURS, "full", "#123456")
        assert "#123456" in report.render(pair, {})

    def test_what_was_not_recorded_is_called_so(self, page):
        text = text_of(page)
        assert "Time to accuracy" not in text and "energy" not in text
        assert "Not recorded: no model was trained on fewer rows" in text
        assert "Each method was trained with one seed" in text
        assert "these records have no scores of validation rows" in text

    def test_rows_without_a_duplicate_have_a_table_where_there_are_duplicates(self, page, tmp_path):
        rows = [replace(row, has_duplicate=number < 9) for number, row in enumerate(predictions(right_on(20, 40)))]
        write_run(tmp_path, "base", [], rows=rows)
        head = '<th scope="col">rows without a duplicate</th>'
        assert head not in page and head in report.render(load_folder(tmp_path, "cpu"), {})


class Checker(HTMLParser):
    """Faults of pictures and tables."""

    def __init__(self):
        super().__init__()
        self.faults, self.tables, self._opened = [], 0, []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "img" and not values.get("alt"):
            self.faults.append("a picture without a text")
        if tag == "th" and values.get("scope") not in ("col", "row"):
            self.faults.append("a head without a scope")
        if tag == "table":
            self.tables += 1
            box = self._opened[-1] if self._opened else {}
            if not values.get("aria-label") or "scroll" not in box.get("class", "") or box.get("tabindex") != "0":
                self.faults.append(f"a table without a name or a box: {self.getpos()}")
        if tag == "div":
            self._opened.append(values)

    def handle_endtag(self, tag):
        if tag == "div":
            self._opened.pop()


class TestNotes:
    def test_the_share_of_ag_news_counts_what_was_trained_on(self, tmp_path):
        write_run(tmp_path, "base", right_on(20, 40), data={"train_rows": 9_000})
        write_run(tmp_path, "lora", right_on(24, 40), data={"train_rows": 1_100})
        said = report.notes(load_folder(tmp_path, "cpu"))
        assert "Training and validation used 1,200 of AG News' 120,000 rows, the test 40 of 7,600." in said

    def test_a_user_s_own_rows_are_no_share_of_ag_news(self, tmp_path):
        html = report.render(compare(tmp_path, data={"title": "your own data", "train_rows": 1_100}), {})
        assert "Training and validation used 1,200 rows, the test 40." in html
        assert "AG News" not in html and "120,000" not in html

    @pytest.mark.parametrize(("model", "is_said"), [("embedded", True), ("unsloth/Qwen2.5-7B-Instruct", False)])
    def test_the_embedded_model_was_rounded_before_and_qlora_rounds_again(self, tmp_path, model, is_said):
        said = " ".join(report.notes(compare(tmp_path, ("base", "qlora"), settings=SETTINGS | {"model": model})))
        assert ("4-bit file (Q4_1)" in said) == ("QLoRA rounds them a second time" in said) == is_said

    def test_what_the_base_writes_when_it_is_free(self, tmp_path):
        # Of 30 answers every tenth is invalid.
        rows = predictions(right_on(20, 40), 0.4)
        write_run(tmp_path, "base", [], rows=rows, results_of_generation=generation(rows, 30))
        assert "gave a valid answer to 27 of 30 test rows" in " ".join(report.notes(load_folder(tmp_path, "cpu")))

    @pytest.mark.parametrize("jobs", ["", " --jobs 6", " --jobs=6"])
    def test_notebooks_at_once_make_seconds_doubtful(self, tmp_path, jobs):
        where = factories.environment().model_copy(update={"command": f"python -m finetune run{jobs}"})
        said = " ".join(report.notes(compare(tmp_path, cost={"environment": where})))
        assert ("Up to 6 notebooks ran at once" in said) == bool(jobs)


class TestProvenance:
    def test_every_record_has_its_line_and_other_versions_are_beside_each_other(self, tmp_path):
        other = factories.environment().model_copy(update={"packages": {"torch": "3.0.0", "unsloth": "1"}})
        write_run(tmp_path, "base", right_on(20, 40))
        write_run(tmp_path, "lora", right_on(30, 40), settings=SETTINGS, cost={"environment": other})
        write_variant(tmp_path, "lora", "seed-43", right_on(32, 40))
        write_variant(tmp_path, "lora", "rows-250", right_on(24, 40), data={"train_rows": 250})
        write_baseline(tmp_path, "svm", right_on(28, 40))
        compared = load_folder(tmp_path, "cpu")
        assert dict(tables.sources(compared)["seed"]) == {
            "baselines/svm/record.json": "-",
            "base/record.json": "-",
            "lora/record.json": "42",
            "lora/seed-43/record.json": "43",
            "lora/rows-250/record.json": "42",
        }
        text = text_of(report.render(compared, {}))
        assert "TF-IDF + linear SVM: as it was made" in text and text.count("make demo") == 5
        assert "torch 2.0.0 or 3.0.0" in text

    def test_each_training_and_evaluation_has_its_machine(self, tmp_path):
        trained, evaluated = (
            factories.environment().model_copy(update={"hardware": {"cpu": "A processor", "cores": 8, "gpu": gpu}})
            for gpu in ("GPU one", "GPU two")
        )
        write_run(tmp_path, "base", right_on(20, 40))
        lora = write_run(tmp_path, "lora", right_on(30, 40), cost={"environment": trained})
        write_baseline(tmp_path, "svm", right_on(28, 40), environment=evaluated)
        write_baseline(tmp_path, "few_shot", right_on(29, 40), environment=evaluated)
        moved = lora.model_copy(update={"evaluation": lora.evaluation.model_copy(update={"environment": evaluated})})
        records.write(moved, tmp_path / "lora")
        found = tables.sources(load_folder(tmp_path, "cpu"))
        assert found.loc["lora/record.json", "trained"] == "0123456789; GPU one, 8 cores"
        assert {place: text.split("; ")[1] for place, text in found["evaluated"].items()} == {
            "baselines/svm/record.json": "A processor, 8 cores",
            "base/record.json": "A processor, 2 cores",
            "baselines/few_shot/record.json": "GPU two, 8 cores",
            "lora/record.json": "GPU two, 8 cores",
        }

    def test_merged_models_are_traced_to_their_files(self, tmp_path):
        write_run(tmp_path, "base", right_on(20, 40))
        record = write_run(tmp_path, "lora", right_on(30, 40))
        merged = records.Merged(
            environment=factories.environment(), run="lora", base="the base", artefact="a", artefact_bytes=273_100_000,
            adapter_digest=record.training.artefact_digest, artefact_digest="b", scoring=record.evaluation.scoring,
            adapter_accuracy=0.775, agreement=0.95, largest_difference=0.0625,
        )  # fmt: skip
        (tmp_path / "lora" / "merged.json").write_text(merged.model_dump_json())
        text = text_of(report.render(load_folder(tmp_path, "cpu"), {}))
        assert "lora/merged.json (commit 0123456789 ; A processor, 2 cores, no GPU)" in text
        # Of 40 rows 30 are right when merged, and 31 with the separate adapter; 38 get the same label.
        low, high = (f"{100 * end:.1f}" for end in proportion_confint(30, 40, method="wilson"))
        assert f"LoRA the base 77.5 75.0 {low} to {high} 95.0 0.062 273.1" in text


def test_the_command_has_margin_and_save(home, capsys):
    folder = paths.results_folder("cpu")
    compare(folder, RUNS)
    assert main(["report", str(folder), "--margin", "60", "--save", "artefact size"]) == 0
    html = (folder / "report.html").read_text()
    assert decide(load("cpu"), 60, "artefact size").text in text_of(html) and "size of the artefact" in html
    assert main(["report", str(folder), "--margin", "0"]) == 2
    assert "error: the margin is 0.0: give points" in capsys.readouterr().err
