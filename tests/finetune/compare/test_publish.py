"""Publishing: what is copied, what is refused, and that reports and README come from the records alone."""

import json
import re
from collections import defaultdict
from html import unescape

import factories
import pytest
from factories import right_on, write_run
from test_baselines import write_baseline
from test_variants import SETTINGS, write_variant

from data_prep import DataError, UserError
from finetune import paths
from finetune.__main__ import main
from finetune.compare import publish as reference
from finetune.compare import report
from finetune.compare.ablation import NoContrast
from finetune.compare.publish import References

README = "# A page\n\n<!-- results:agnews -->\nold figures\n<!-- /results -->\n\nThe end.\n"


@pytest.fixture
def public(tmp_path, monkeypatch):
    """A project of the test's own: README and reference folder."""
    # Drawing takes most of the time, and is tested elsewhere.
    monkeypatch.setattr(report, "_pictures", lambda comparison: defaultdict(str))
    monkeypatch.setattr(reference, "README", tmp_path / "README.md")
    monkeypatch.setattr(reference, "FOLDER", tmp_path / "results" / "reference")
    (tmp_path / "README.md").write_text(README)
    return tmp_path


@pytest.fixture
def results(home):
    results = paths.results_folder("cpu")
    write_run(results, "base", right_on(20, 40))
    write_run(results, "lora", right_on(36, 40), settings=SETTINGS, validation=factories.predictions([True] * 8))
    write_variant(results, "lora", "seed-43", right_on(35, 40))
    write_baseline(results, "svm", right_on(28, 40))
    return results


@pytest.fixture
def beside(public, results):
    """`agnews`, published, and `agnews-all`: the same with the loss on all tokens, both seeds worse."""
    reference.publish("cpu", "agnews")
    other = paths.results_folder("gpu")
    settings = SETTINGS | {"supervise": "all"}
    write_run(other, "base", right_on(20, 40))
    write_run(other, "lora", right_on(22, 40), settings=settings)
    write_variant(other, "lora", "seed-43", right_on(23, 40), settings={"supervise": "all"})
    reference.publish("gpu", "agnews-all")
    return public


BLOCK = "<!-- contrast:agnews-all:agnews -->\nold\n<!-- /contrast -->\n"


def text_of(page: str) -> str:
    return " ".join(unescape(re.sub("<[^>]+>", " ", page)).split())


def without_pictures(page: str) -> str:
    return re.sub(r'src="data:[^"]*"', "", page)


class TestPublish:
    def test_every_record_and_its_predictions_are_copied(self, public, results):
        folder = reference.publish("cpu", "agnews")
        assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
            "base/predictions.jsonl",
            "base/record.json",
            "baselines/svm/predictions.jsonl",
            "baselines/svm/record.json",
            "lora/predictions.jsonl",
            "lora/record.json",
            "lora/seed-43/predictions.jsonl",
            "lora/seed-43/record.json",
            "lora/validation.jsonl",
            "report.html",
        ]

    def test_the_readme_s_table_is_made_from_them(self, public, results):
        reference.publish("cpu", "agnews")
        text = reference.README.read_text()
        assert (
            "| LoRA | 90.0% (76.9% to 96.0%) |" in text and "| TF-IDF + linear SVM | 70.0% (54.6% to 81.9%) |" in text
        )
        assert "records in `results/reference/agnews/`" in text
        assert "old figures" not in text and text.startswith("# A page") and text.endswith("The end.\n")

    def test_how_its_figures_are_to_be_read_is_said_below(self, public, results):
        """1,000 training and 100 validation rows of 120,000."""
        reference.publish("cpu", "agnews")
        text = reference.README.read_text()
        assert "together are 1,100: 0.9 % of the 120,000" in text and "a label must follow." in text

    def test_what_was_published_before_is_replaced_and_other_files_stay(self, public, results):
        folder = reference.publish("cpu", "agnews")
        (folder / "report.png").write_text("a picture")
        for path in sorted((results / "lora" / "seed-43").iterdir()):
            path.unlink()
        reference.publish("cpu", "agnews")
        assert not (folder / "lora" / "seed-43" / "record.json").exists()
        assert (folder / "report.png").exists()

    def test_large_predictions_are_packed_and_read(self, public, results, monkeypatch):
        monkeypatch.setattr(reference, "PACKED_FROM", 1000)
        folder = reference.publish("cpu", "agnews")
        assert (folder / "lora" / "predictions.jsonl.gz").is_file()
        assert not (folder / "lora" / "predictions.jsonl").exists()
        assert reference.regenerate() == []

    @pytest.mark.parametrize("place", ["lora", "lora/seed-43", "baselines/svm"])
    @pytest.mark.parametrize("change", [{"dirty": True}, {"commit": None}])
    def test_what_nobody_could_reproduce_is_refused(self, public, results, place, change):
        path = results / place / "record.json"
        content = json.loads(path.read_text())
        part = content.get("training", content)
        part["environment"].update(change)
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=rf"{place}/record\.json was measured on a tree with uncommitted changes"):
            reference.publish("cpu", "agnews")
        assert not reference.FOLDER.exists()

    def test_article_texts_are_not_published(self, public, results, monkeypatch):
        monkeypatch.setattr(reference.errors, "articles", lambda data: pytest.fail("asked for texts"))
        assert "Without the articles" in (reference.publish("cpu", "agnews") / "report.html").read_text()


class TestSeveralSeeds:
    def test_their_mean_has_a_column_beside_the_first_s(self, public, results):
        reference.publish("cpu", "agnews")
        head, _, *rows = re.findall(r"^\|.*\|$", reference.README.read_text(), re.MULTILINE)
        accuracy, mean = (
            head.split(" | ").index(f"{name} (95 % interval)") for name in ("accuracy, seed 42", "mean over seeds")
        )
        assert mean == accuracy + 1
        cells = {row.split(" | ")[0]: row.split(" | ") for row in rows}
        assert cells["| LoRA"][accuracy] == "90.0% (76.9% to 96.0%)"
        low, high = map(
            float, re.fullmatch(r"88\.8% \(([\d.]+)% to ([\d.]+)%\), 2 seeds", cells["| LoRA"][mean]).groups()
        )
        assert low < 88.8 < high
        assert cells["| base model"][mean] == cells["| TF-IDF + linear SVM"][mean] == "-"

    def test_without_them_there_is_no_column(self, public, results):
        for path in (results / "lora" / "seed-43").iterdir():
            path.unlink()
        reference.publish("cpu", "agnews")
        assert "over seeds" not in reference.README.read_text()


class TestContrasts:
    def test_the_readme_s_block_is_made_from_both_folders(self, beside):
        reference.README.write_text(README + BLOCK)
        assert reference.regenerate() == [reference.README]
        block = reference.README.read_text().partition("<!-- contrast:agnews-all:agnews -->\n")[2]
        assert block.startswith("**With supervise=all instead of supervise=not recorded**")
        assert "| accuracy % (seed 42) | 90.0 → 55.0 |" in block
        assert "LoRA loses 32.5 points (" in block and " over 2 seeds, p < 0.001)" in block
        assert "agnews-all (commit 0123456789; A processor, 2 cores, no GPU) against agnews (commit" in block
        assert "`supervise`: Which tokens carry loss" in block
        assert block.endswith("<!-- /contrast -->\n") and "old" not in block
        assert reference.regenerate() == []

    def test_a_block_of_two_folders_that_are_no_contrast_is_refused(self, beside):
        reference.README.write_text(BLOCK.replace("agnews-all:agnews", "agnews:agnews"))
        with pytest.raises(NoContrast, match="agnews and agnews differ in no setting"):
            reference.regenerate()

    @pytest.mark.parametrize("block", ["<!-- results:lost -->\n<!-- /results -->", BLOCK.replace("agnews-all", "lost")])
    def test_a_block_of_a_folder_that_is_not_there_is_refused(self, beside, block):
        reference.README.write_text(block)
        with pytest.raises(DataError, match="lost: no such folder of reference results"):
            reference.regenerate()

    def test_the_report_says_what_the_folders_beside_it_show(self, beside):
        page = (reference.FOLDER / "agnews" / "report.html").read_text()
        found = References().contrast("agnews-all", "agnews")
        text = text_of(page.partition("<h2>One thing changed</h2>")[2].partition("<h2>")[0])
        assert found.title in text and found.answer() in text and found.provenance() in text
        assert "90.0 → 55.0" in text and "Not held against" not in text
        assert "One thing changed" not in (reference.FOLDER / "agnews-all" / "report.html").read_text()

    def test_a_folder_that_is_no_contrast_is_named_with_the_reason(self, beside):
        path = reference.FOLDER / "agnews-all" / "lora"
        for place in (path, path / "seed-43"):
            record = json.loads((place / "record.json").read_text())
            record["settings"]["learning_rate"] = 0.5
            (place / "record.json").write_text(json.dumps(record))
        reference.regenerate()
        text = text_of((reference.FOLDER / "agnews" / "report.html").read_text())
        assert (
            "Not held against this folder: agnews-all : agnews-all and agnews differ in more than one thing, and a "
            "contrast is of one: learning_rate (0.5, and 0.0001; LoRA) and supervise (all, and not recorded; LoRA)."
        ) in text

    def test_a_broken_folder_is_no_refusal(self, beside):
        (reference.FOLDER / "agnews-all" / "base" / "record.json").write_text("{")
        with pytest.raises(DataError, match="not a record of this version"):
            reference.regenerate()

    def test_a_report_that_is_written_alone_has_them_too(self, beside, capsys):
        page = reference.FOLDER / "agnews" / "report.html"
        before = page.read_text()
        page.unlink()
        assert main(["report", str(page.parent)]) == 0
        assert str(page) in capsys.readouterr().out and page.read_text() == before


class TestRegenerate:
    def test_nothing_changes_where_nothing_did(self, public, results):
        reference.publish("cpu", "agnews")
        assert reference.regenerate() == []

    def test_what_was_edited_or_lost_comes_back(self, public, results):
        folder = reference.publish("cpu", "agnews")
        readme, page = reference.README.read_text(), (folder / "report.html").read_text()
        reference.README.write_text(readme.replace("90.0%", "99.0%"))
        (folder / "report.html").unlink()
        assert reference.regenerate() == [folder / "report.html", reference.README]
        assert reference.README.read_text() == readme
        assert (folder / "report.html").read_text() == page

    @pytest.mark.parametrize(("place", "name"), [("lora", "lora"), ("baselines/svm", "svm")])
    def test_a_record_that_claims_more_than_its_predictions_is_refused(self, public, results, place, name):
        path = reference.publish("cpu", "agnews") / place / "record.json"
        content = json.loads(path.read_text())
        content.get("evaluation", content)["scoring"]["accuracy"] += 0.01
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match=f"the record of {name} holds another accuracy"):
            reference.regenerate()


def test_the_command_says_what_it_wrote(public, results, capsys):
    reference.publish("cpu", "agnews")
    assert main(["results"]) == 0
    assert "are those of the records" in capsys.readouterr().out
    reference.README.write_text(README)
    assert main(["results"]) == 0
    assert f"written anew: {reference.README}" in capsys.readouterr().out


def test_the_committed_reports_are_those_of_their_records():
    """But for the pictures, whose curves may differ in a digit with the machine."""
    references = References()
    for name in reference.published():
        committed = (reference.FOLDER / name / "report.html").read_text(encoding="utf-8")
        assert without_pictures(reference.render(name, references)) == without_pictures(committed)
