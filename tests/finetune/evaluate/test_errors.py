"""The table of confident errors: an article is a text."""

from types import SimpleNamespace

import factories

from data_prep import Example
from finetune import paths, predictions
from finetune.evaluate.run import confident_errors
from finetune.predictions import Prediction

HOSTILE = "<script>alert(1)</script> <b>bold</b> $x^2$ & co"


def test_no_markup_and_no_formula_of_an_article_works(home):
    sure = Prediction("test-0", "World", "Sports", {"World": 0.1, "Sports": 0.9}, None, False)
    right = Prediction("test-1", "World", "World", {"World": 0.6, "Sports": 0.4}, None, False)
    folder = paths.run_folder("cpu", "lora")
    record = factories.record("lora")
    digest = predictions.write(folder, [sure, right])
    evaluation = factories.evaluation(["World"] * 2, ["Sports", "World"], digest)
    record = record.model_copy(update={"profile": "cpu", "evaluation": evaluation})
    data = SimpleNamespace(test=[Example(f"test-{n}", HOSTILE, "World", []) for n in range(2)])

    html = confident_errors(record, data).to_html()
    assert html.count("alert(1)") == 1, "the right answer is none"
    assert "<script" not in html and "<b>" not in html
    assert "&lt;script&gt;" in html and "&amp; co" in html
    assert "mathjax_ignore" in html and "tex2jax_ignore" in html
