"""The pictures show the records' figures."""

import factories
import matplotlib.pyplot as plt
import numpy as np
import pytest
from factories import SETTINGS, right_on, write_run, write_variant
from test_baselines import write_baseline

from data_prep.task import AG_NEWS
from finetune import paths
from finetune.compare import plots
from finetune.compare.comparison import load
from finetune.compare.verdict import decide
from finetune.config.methods import METHODS
from finetune.wording import NAMES

RUNS = [run for run, method in METHODS.items() if method.by_default]


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


@pytest.fixture
def comparison(home):
    for number, run in enumerate(RUNS):
        write_run(
            paths.results_folder("cpu"),
            run,
            right_on(20 + 4 * number, 40),
            confidence=0.5 + number / 100,
            cost={"seconds": 60.0 * number},
        )
    return load("cpu")


def test_every_run_has_a_colour_and_every_tuned_one_a_marker():
    assert plots.COLOURS.keys() == NAMES.keys()
    assert plots.MARKERS.keys() == NAMES.keys()
    assert len(set(plots.COLOURS.values())) == len(plots.COLOURS)
    assert len(set(plots.MARKERS.values())) == len(plots.MARKERS)


def test_training_curves_show_loss_and_accuracy_by_step():
    record = factories.record("lora", training=factories.training("lora"))
    loss, accuracy = plots.training_curves(record).axes
    np.testing.assert_allclose(loss.lines[0].get_xydata(), [(1, 1.4), (10, 0.7)])
    np.testing.assert_allclose(accuracy.lines[0].get_xydata(), [(5, 60), (10, 80)])


def test_the_overview_has_accuracies_with_intervals_against_the_cost(home):
    """In points, 0.75 apart, beside a base at half their accuracy, which is named instead of drawn."""
    results = paths.results_folder("cpu")
    for run, right in (("base", 200), ("lora", 376), ("qlora", 373)):
        cost = {"seconds": right / 4, "peak_memory_bytes": right * 10**7}
        write_run(results, run, right_on(right, 400), confidence=0.5 + right / 1000, cost=cost)
    compared = load("cpu")
    for save, scale, unit in (("time", 1 / 4, "s"), ("memory", 1 / 100, "GB")):
        (axes,) = plots.overview(compared, decide(compared, save=save)).axes
        points = {bars.get_label(): bars.lines[0].get_xydata()[0] for bars in axes.containers}
        np.testing.assert_allclose(points["LoRA"], (376 * scale, 94))
        np.testing.assert_allclose(points["QLoRA"], (373 * scale, 93.25))
        assert axes.get_xlabel().endswith(f"({unit})\nfar below: base model 50.0 %")
        (band,) = axes.patches
        np.testing.assert_allclose((band.get_y(), band.get_height()), (93, 1))
        low, high = axes.get_ylim()
        assert 0.75 / (high - low) > 0.03
        scoring = compared.scoring["qlora"]
        bars = next(of for of in axes.containers if of.get_label() == "QLoRA")
        ((_, below), (_, above)) = bars.lines[2][0].get_segments()[0]
        np.testing.assert_allclose((below, above), (100 * scoring.accuracy_low, 100 * scoring.accuracy_high))


def test_of_several_seeds_pictures_have_mean_and_median(home):
    results = paths.results_folder("cpu")
    write_run(results, "base", right_on(20, 40))
    write_run(results, "lora", right_on(36, 40), settings=SETTINGS, cost={"seconds": 20.0})
    write_variant(results, "lora", "seed-43", right_on(30, 40), cost={"seconds": 40.0})
    (axes,) = plots.overview(load("cpu"), decide(load("cpu"))).axes
    np.testing.assert_allclose(axes.containers[0].lines[0].get_xydata(), [(30, 82.5)])
    panel = plots.pareto(load("cpu")).axes[0]
    np.testing.assert_allclose(panel.containers[0].lines[0].get_xydata(), [(0.5, 82.5)])


def test_pareto_has_a_point_per_training_in_each_panel(comparison):
    panels = [axes for axes in plots.pareto(comparison).axes if axes.get_visible()]
    assert [axes.get_xlabel() for axes in panels] == [
        "training time (minutes)",
        "peak memory (GB)",
        "artefact (MB)",
        "trained parameters (millions)",
    ], "energy was not measured"
    points = [tuple(container.lines[0].get_xydata()[0]) for container in panels[0].containers]
    np.testing.assert_allclose(points, [(1, 60), (2, 70), (3, 80), (4, 90)])
    np.testing.assert_allclose(panels[0].lines[-1].get_xydata(), points), "each costs more and is better"
    np.testing.assert_allclose(panels[1].lines[-1].get_xydata(), [(2.5, 90)]), "for the same memory"


def test_a_learning_curve_joins_its_points(home):
    results = paths.results_folder("cpu")
    write_run(results, "base", right_on(20, 40))
    write_run(results, "lora", right_on(36, 40), settings=SETTINGS)
    write_variant(results, "lora", "rows-250", right_on(28, 40), data={"train_rows": 250})
    write_baseline(results, "svm", right_on(34, 40))
    write_baseline(results, "svm/rows-500", right_on(30, 40), data={"train_rows": 500})
    (axes,) = plots.learning_curve(load("cpu")).axes
    drawn = [bars.lines[0].get_xydata() for bars in axes.containers]
    np.testing.assert_allclose(drawn, [[(250, 70), (1000, 90)], [(500, 75), (1000, 85)]])


def test_without_trainings_the_pictures_say_so(home):
    write_run(paths.results_folder("cpu"), "base", right_on(20, 40))
    compared = load("cpu")
    assert "No model was trained" in plots.pareto(compared).axes[0].texts[0].get_text()
    assert len(plots.overview(compared, decide(compared)).axes) == 1
    assert "No model was trained on fewer rows" in plots.learning_curve(compared).axes[0].texts[0].get_text()


def test_confusion_matrices_show_their_counts_three_in_a_row(comparison):
    scoring = comparison.records["lora"].evaluation.scoring
    (axes,) = plots.confusion(scoring, "lora").axes
    panels = plots.confusion_grid(comparison).axes
    for of in (axes, panels[RUNS.index("lora")]):
        assert [int(text.get_text()) for text in of.texts] == np.ravel(scoring.confusion).tolist()
        assert of.get_title() == "LoRA: 80.0%"
        assert [label.get_text() for label in of.get_xticklabels()] == list(AG_NEWS.labels)
    assert [axes.get_subplotspec().rowspan.start for axes in panels] == [0, 0, 0, 1, 1]


def test_reliability_has_a_panel_per_run_with_its_bins(comparison):
    panels = plots.reliability(comparison).axes
    assert len(panels) == len(RUNS)
    # The fourth run is sure by 0.53 on every row, and right on 32 of 40.
    np.testing.assert_allclose(panels[3].collections[0].get_offsets(), [(53, 80)], rtol=1e-5)
    assert panels[3].get_title() == "LoRA: ECE 27.0%"
