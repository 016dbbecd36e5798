"""With 77 labels, tables and pictures show the worst, and the page stays small."""

import factories
import numpy as np
import pytest
from factories import predictions, write_run
from matplotlib import pyplot as plt
from sklearn.metrics import f1_score

from data_prep.task import AG_NEWS
from finetune import metrics, paths
from finetune.compare import plots, report, tables
from finetune.compare.comparison import Comparison, load, load_folder
from finetune.evaluate.run import class_table
from finetune.predictions import Prediction

NAMES = [f"card_payment_wrong_exchange_rate_{number}" for number in range(77)]


def rows(seed: int, skill: float) -> list[Prediction]:
    """310 rows of 77 labels: label 5 is taken for label 6 always, label 76 has two rows, and others err at random."""
    generator = np.random.default_rng(seed)
    found = []
    for row in range(310):
        label = row % 77 if row < 306 else row % 4
        answer = label if generator.random() < skill else int(generator.integers(77))
        answer = 6 if label == 5 else answer
        probabilities = dict.fromkeys(NAMES, 0.3 / 76) | {NAMES[answer]: 0.7}
        found.append(Prediction(f"test-{row}", NAMES[label], NAMES[answer], probabilities, None, False))
    return found


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Comparison:
    folder = tmp_path_factory.mktemp("many-labels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factories, "LABELS", tuple(NAMES))
        for run, seed, skill in (("base", 1, 0.3), ("full", 2, 0.9), ("lora", 3, 0.85)):
            write_run(folder, run, [], rows=rows(seed, skill))
    return load_folder(folder, "cpu")


def test_tables_show_the_worst_classes(compared):
    shown = metrics.shown_classes(compared.scoring.values())
    found = [
        f1_score(compared.labels, compared.answers(run), labels=NAMES, average=None, zero_division=0)
        for run in compared.scoring
    ]
    mean = np.mean(found, axis=0)
    assert len(shown) == 10 and NAMES[5] in shown
    assert sorted(mean)[9] == pytest.approx(max(mean[NAMES.index(name)] for name in shown))
    assert list(tables.classes(compared).index) == shown
    assert list(tables.classes(compared)) == ["base model", "full", "LoRA"]
    assert list(class_table(compared.records["full"]).index)[:1] == [NAMES[5]]


def test_of_few_classes_tables_show_all(home):
    write_run(paths.results_folder("cpu"), "base", [], rows=predictions([True, False] * 20))
    compared = load("cpu")
    assert metrics.shown_classes(compared.scoring.values()) == list(AG_NEWS.labels)
    assert list(tables.classes(compared).index) == list(AG_NEWS.labels)
    assert "test rows, too few" not in " ".join(report.notes(compared))


def test_the_picture_names_the_most_confused_pairs(compared):
    figure = plots.confusion_grid(compared)
    names = [text.get_text() for text in figure.axes[1].get_yticklabels()]
    assert len(figure.axes) == 3 and names[0] == f"{NAMES[5]} → {NAMES[6]}" and len(names) == 10
    assert figure.axes[1].texts[0].get_text() == " 4 of 4"
    plt.close("all")


def test_the_page_is_small_and_says_which_classes_have_few_rows(compared):
    html = report.render(compared, {row.id: "A text." for row in compared.predictions["base"]})
    assert len(html) < 1_500_000
    assert 'name="label"' not in html and "confusion.csv" in html
    assert "F1 of the 10 worst of 77 classes" in html
    few = [number for number in range(77) if compared.labels.count(NAMES[number]) < 5]
    [note] = [note for note in report.notes(compared) if "too few" in note]
    assert note.startswith("Fewer than 5 test rows") and note.endswith(f" and {len(few) - 10} more.")
