"""Publishing: what is copied, what is refused, and that reports and README come from the records alone."""

import json
import re

import factories
import pytest
from factories import right_on, write_run
from test_baselines import write_baseline
from test_variants import SETTINGS, write_variant

from data_prep import DataError, UserError
from finetune import comparison, errors, paths, reference, report
from finetune.__main__ import main

README = "# A page\n\n<!-- results:agnews -->\nold figures\n<!-- /results -->\n\nThe end.\n"


@pytest.fixture
def public(tmp_path, monkeypatch):
    """A project of the test's own: README and reference folder."""
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
    for folder in (path.parent for path in reference.FOLDER.glob("*/base")):
        compared = comparison.load_folder(folder, folder.name)
        reference.require_own_figures(compared, folder)
        committed = (folder / "report.html").read_text(encoding="utf-8")
        page = report.render(compared, errors.publishable_articles(compared.any_record.data))
        assert without_pictures(page) == without_pictures(committed)
