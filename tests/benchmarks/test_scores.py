"""Scores in bf16 and in fp32: what differs, counted; and the committed figures, shown as they were measured."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import render, scores
from data_prep import DataError
from finetune.model.packing import Backbone, Forest

LABELS = ["World", "Business", "Sci/Tech"]


def test_differences_are_counted_by_hand():
    # Log-odds of the two best, in bf16: 0, 0, 0.125, 3; in fp32: 0.06, -0.04, 0.1, 3. The third label is far behind.
    log = {
        "bf16": [[0, -9, 0], [0, 0, -9], [0.125, 0, -9], [0, 3, -9]],
        "fp32": [[0, -9, 0.06], [0, -0.04, -9], [0.1, 0, -9], [0, 3, -9]],
    }
    odds = {name: np.exp(np.array(of, dtype=float)) for name, of in log.items()}
    # argmax takes the first of equals, and the scorer's last token decides there: a hair for World, with fewer tokens.
    odds["bf16"][:2, 0] *= 1.0001
    probabilities = {name: of / of.sum(axis=1, keepdims=True) for name, of in odds.items()}
    truth = ["Sci/Tech", "World", "World", "World"]
    found = scores.difference(probabilities, truth, LABELS, [1, 1, 3])
    assert found["accuracy"] == {"bf16": 0.5, "fp32": 0.75}
    assert found["ties"] == {"bf16": 2, "fp32": 0}
    assert found["within_two_steps"] == {"bf16": 3, "fp32": 3}
    assert found["multiples"] == {"bf16": 4, "fp32": 1}
    # Of the ties only the first is between labels of one and of three tokens.
    assert found["unequal_ties"] == 1 and found["to_longer"] == {"bf16": 0, "fp32": 1}
    assert (found["changed"], found["only_bf16_right"], found["only_fp32_right"]) == (1, 0, 1)
    # One row that tells them apart.
    assert found["p_value"] == 1


@torch.no_grad()
def test_logits_in_bf16_are_those_in_fp32_rounded(tiny_model):
    backbone = Backbone(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).eval())
    forest = Forest()
    forest.add(range(5, 45))
    row, places = forest.row(), torch.tensor([3, 39])
    exact, rounded = backbone(row, places, in_fp32=True), scores.InBf16(backbone)(row, places, in_fp32=True)
    assert exact.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    assert not torch.equal(exact, exact.bfloat16().float())
    # A CPU may add up in another order.
    torch.testing.assert_close(rounded.float(), exact, rtol=2**-7, atol=1e-3)


def test_the_committed_page_shows_the_record():
    page, content = render.METHOD.read_text(), json.loads(scores.FILE.read_text())
    assert render.with_scores(page, scores.FILE) == page
    assert [run["run"] for run in content["runs"]] == list(scores.RUNS)
    for run in content["runs"]:
        bf16, fp32 = run["ties"].values()
        assert f"| {bf16} | {fp32} | {100 * run['accuracy']['bf16']:.2f} |" in page
    assert all(run["ties"]["fp32"] == 0 for run in content["runs"] if run["run"] != "base")


def test_what_nobody_could_repeat_is_not_shown(tmp_path):
    content = json.loads(scores.FILE.read_text())
    file = tmp_path / "scores.json"
    file.write_text(json.dumps(content | {"environment": content["environment"] | {"dirty": True}}))
    with pytest.raises(DataError, match="commit, then measure again"):
        render.with_scores("", file)
