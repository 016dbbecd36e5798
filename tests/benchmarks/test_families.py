"""The page of model families: measured against plain transformers, and shown as it was recorded."""

import json

import pytest

from benchmarks import families, render
from data_prep import DataError

CONTENT = json.loads(render.FAMILIES.read_text())


@pytest.mark.parametrize(("name", "rows"), [("Qwen3", "packed"), ("Mistral, a window of 64 tokens", "padded")])
def test_a_family_is_measured_anew_as_it_was_recorded(name, rows):
    found = families.measure(name)
    [recorded] = [line for line in CONTENT["families"] if line["family"] == name]
    assert found.keys() == recorded.keys() and found["rows"] == recorded["rows"] == rows
    assert found["loss"] == pytest.approx(recorded["loss"], rel=1e-3)


def test_all_families_are_recorded_and_ours_are_the_models_own_figures():
    assert [line["family"] for line in CONTENT["families"]] == list(families.FAMILIES)
    for line in CONTENT["families"]:
        assert max(line["scores_1"], line["scores_8"], line["loss_difference"]) < 1e-4


def test_the_committed_page_is_what_the_record_gives():
    page = render.families_page(render.FAMILIES)
    assert page == (render.PROJECT / "docs" / "families.md").read_text()
    assert all(f"| {name} | `{kind}` |" in page for name, (kind, _) in families.FAMILIES.items())


def test_a_refusal_is_shown_and_what_nobody_could_repeat_is_not(tmp_path):
    file = tmp_path / "families.json"
    refused = {"family": "Odd", "model_type": "odd", "refusal": "odd: choose another model"}
    file.write_text(json.dumps(CONTENT | {"families": [*CONTENT["families"], refused]}))
    assert "| Odd | `odd` | odd: choose another model | - | - | - |" in render.families_page(file)
    file.write_text(json.dumps(CONTENT | {"environment": CONTENT["environment"] | {"dirty": True}}))
    with pytest.raises(DataError, match="commit, then measure again"):
        render.families_page(file)
