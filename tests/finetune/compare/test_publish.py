"""Publishing: what is copied, what is refused, and that README and docs come from the records alone."""

import json
import re
from html import unescape

import factories
import matplotlib.pyplot as plt
import pandas as pd
import pytest
from factories import SETTINGS, right_on, write_run, write_variant
from test_baselines import write_baseline

from data_prep import DataError, UserError
from finetune import paths
from finetune.__main__ import main
from finetune.compare import publish, report
from finetune.compare.ablation import NoAblation
from finetune.compare.comparison import load_folder
from finetune.compare.publish import References
from finetune.compare.verdict import decide

README = "# A page\n\n<!-- results:agnews -->\nold figures\n<!-- /results -->\n\nThe end.\n"


@pytest.fixture
def public(tmp_path, monkeypatch):
    """A project of the test's own: README and reference folder."""
    # Drawing takes most of the time, and is tested elsewhere.
    monkeypatch.setattr(report, "data_address", lambda figure: plt.close(figure) or "")
    monkeypatch.setattr(publish, "README", tmp_path / "README.md")
    monkeypatch.setattr(publish, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(publish, "FOLDER", tmp_path / "results" / "reference")
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
    publish.publish("cpu", "agnews")
    other = paths.results_folder("gpu")
    settings = SETTINGS | {"completion_only_loss": False}
    write_run(other, "base", right_on(20, 40))
    write_run(other, "lora", right_on(22, 40), settings=settings)
    write_variant(other, "lora", "seed-43", right_on(23, 40), settings={"completion_only_loss": False})
    publish.publish("gpu", "agnews-all")
    return public


BLOCK = "<!-- ablation:agnews-all:agnews -->\nold\n<!-- /ablation -->\n"


def text_of(page: str) -> str:
    return " ".join(unescape(re.sub("<[^>]+>", " ", page)).split())


class TestPublish:
    def test_every_record_and_its_predictions_are_copied(self, public, results):
        folder = publish.publish("cpu", "agnews")
        assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
            "base/record.json",
            "baselines/svm/record.json",
            "lora/record.json",
            "lora/seed-43/record.json",
            "predictions.parquet",
        ]
        # Base, SVM, LoRA and its second seed have 40 test rows each, and LoRA has 8 validation rows.
        rows = pd.read_parquet(folder / "predictions.parquet").value_counts(["run", "split"]).to_dict()
        assert rows == {
            ("base", "test"): 40, ("baselines/svm", "test"): 40, ("lora", "test"): 40, ("lora", "validation"): 8,
            ("lora/seed-43", "test"): 40,
        }  # fmt: skip

    def test_the_blocks_of_readme_and_docs_are_made_from_them(self, public, results):
        (public / "docs").mkdir()
        page = public / "docs" / "results.md"
        page.write_text("<!-- summary:agnews -->\n<!-- /summary -->\n<!-- results:agnews -->\n<!-- /results -->\n")
        publish.publish("cpu", "agnews")
        compared = References()["agnews"]
        text = publish.README.read_text()
        assert "old figures" not in text and text.startswith("# A page") and text.endswith("The end.\n")
        for part in (f"**{decide(compared)}**", *report.notes(compared), "records in `results/reference/agnews/`"):
            assert part in text
        accuracy, low, high = compared.accuracy("lora")
        assert f"| LoRA | {100 * accuracy:.1f} | {100 * low:.1f} to {100 * high:.1f} | 2 | " in text
        assert "| TF-IDF + linear SVM | 70.0 | 54.6 to 81.9 | - | 2 s | - | - |" in text
        # Of the first seed alone.
        assert "| LoRA | 90.0 (76.9 to 96.0) | " in text
        assert f"<!-- summary:agnews -->\n**{decide(compared)}**\n\n|  | accuracy % (" in page.read_text()
        assert f"| LoRA | {100 * accuracy:.1f} ({100 * low:.1f} to {100 * high:.1f}) | " in page.read_text()
        assert publish.regenerate() == []

    def test_what_was_published_before_is_replaced_and_other_files_stay(self, public, results):
        folder = publish.publish("cpu", "agnews")
        mine, theirs = load_folder(results, "cpu"), load_folder(folder, "cpu")
        assert (mine.predictions, mine.validation) == (theirs.predictions, theirs.validation)
        # What is published again is the same file.
        before = (folder / "predictions.parquet").read_bytes()
        publish.publish("cpu", "agnews")
        assert (folder / "predictions.parquet").read_bytes() == before
        (folder / "report.png").write_text("a picture")
        for path in sorted((results / "lora" / "seed-43").iterdir()):
            path.unlink()
        publish.publish("cpu", "agnews")
        assert not (folder / "lora" / "seed-43" / "record.json").exists()
        assert (folder / "report.png").exists()

    @pytest.mark.parametrize(
        ("place", "change"),
        [("lora", {"dirty": True}), ("lora/seed-43", {"commit": None}), ("baselines/svm", {"dirty": True})],
    )
    def test_what_nobody_could_reproduce_is_refused(self, public, results, place, change):
        path = results / place / "record.json"
        content = json.loads(path.read_text())
        content.pop("digest", None)
        part = content.get("training", content)
        part["environment"].update(change)
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=rf"{place}/record\.json was measured on a tree with uncommitted changes"):
            publish.publish("cpu", "agnews")
        assert not publish.FOLDER.exists()

    def test_article_texts_are_not_published(self, public, results, monkeypatch):
        publish.publish("cpu", "agnews")
        monkeypatch.setattr(publish.mistakes, "articles", lambda data: pytest.fail("asked for texts"))
        assert "We list no rows" in publish.write_report("agnews").read_text()


class TestAblations:
    def test_the_readme_s_block_is_made_from_both_folders(self, beside):
        publish.README.write_text(README + BLOCK)
        assert publish.regenerate() == [publish.README]
        block = publish.README.read_text().partition("<!-- ablation:agnews-all:agnews -->\n")[2]
        assert block.startswith("**With completion_only_loss=False instead of completion_only_loss=not recorded**")
        # Means of 36 and 35, and of 22 and 23, in 40.
        assert "| LoRA | 88.8 → 56.2 | -32.5 (" in block and "| LoRA | 90.0 → 55.0 | -35.0 (" in block
        assert "agnews-all (commit 0123456789; A processor, 2 cores, no GPU) against agnews (commit" in block
        assert "- completion_only_loss: Only the answer" in block
        assert block.endswith("<!-- /ablation -->\n") and "old" not in block
        assert publish.regenerate() == []

    def test_a_block_of_two_folders_that_are_no_ablation_is_refused(self, beside):
        publish.README.write_text(BLOCK.replace("agnews-all:agnews", "agnews:agnews"))
        with pytest.raises(NoAblation, match="agnews and agnews differ in no setting"):
            publish.regenerate()

    @pytest.mark.parametrize("block", ["<!-- results:lost -->\n<!-- /results -->", BLOCK.replace("agnews-all", "lost")])
    def test_a_block_of_a_folder_that_is_not_there_is_refused(self, beside, block):
        publish.README.write_text(block)
        with pytest.raises(DataError, match="lost: no such folder of reference results"):
            publish.regenerate()

    def test_the_report_says_what_the_folders_beside_it_show(self, beside, capsys):
        page = publish.FOLDER / "agnews" / "report.html"
        assert main(["report", str(page.parent), "--margin", "2"]) == 0
        assert str(page) in capsys.readouterr().out
        text = text_of(page.read_text())
        ([found], refused) = References().beside("agnews")
        assert refused == {}
        for part in (found.title, *(note.replace("`", " ") for note in found.notes()[1:]), found.provenance()):
            assert part in text
        assert "88.8 → 56.2" in text and "Not comparable" not in text and "Margin 2 points" in text
        assert "One setting changed" not in text_of(publish.write_report("agnews-all").read_text())

    @pytest.mark.parametrize(
        ("change", "reason"),
        [({"settings": {"learning_rate": 0.5}}, "agnews-all and agnews differ in more than one setting: "),
         ({"model": "another"}, "agnews-all/base: model is another, and a-model in agnews/base")],
    )  # fmt: skip
    def test_a_folder_that_is_no_ablation_is_named_with_the_reason(self, beside, change, reason):
        folder = publish.FOLDER / "agnews-all"
        for place in (folder / "lora", folder / "lora" / "seed-43", *([folder / "base"] if "model" in change else [])):
            record = json.loads((place / "record.json").read_text())
            record.pop("digest", None)
            settings = record["settings"] | change.get("settings", {})
            (place / "record.json").write_text(json.dumps(record | change | {"settings": settings}))
        text = text_of(publish.write_report("agnews").read_text())
        assert f"Not comparable with this folder: agnews-all : {reason}" in text

    def test_a_broken_folder_is_no_refusal(self, beside):
        (publish.FOLDER / "agnews-all" / "base" / "record.json").write_text("{")
        with pytest.raises(DataError, match="not a record of this version"):
            publish.regenerate()


class TestRegenerate:
    def test_what_was_edited_comes_back_and_the_command_says_so(self, public, results, capsys):
        publish.publish("cpu", "agnews")
        assert main(["results"]) == 0
        assert "are those of the records" in capsys.readouterr().out
        readme = publish.README.read_text()
        publish.README.write_text(readme.replace("90.0", "99.0"))
        assert main(["results"]) == 0 and publish.README.read_text() == readme
        assert f"written anew: {publish.README}" in capsys.readouterr().out

    @pytest.mark.parametrize(("place", "name"), [("lora", "lora"), ("lora/seed-43", "lora"), ("baselines/svm", "svm")])
    def test_a_record_that_claims_more_than_its_predictions_is_refused(self, public, results, place, name):
        path = publish.publish("cpu", "agnews") / place / "record.json"
        content = json.loads(path.read_text())
        content.pop("digest", None)
        content.get("evaluation", content)["scoring"]["accuracy"] += 0.01
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match=f"the record of {name} holds another accuracy"):
            publish.regenerate()
