"""Which rows were wrong, whose labels are doubted, and which texts may be shown."""

import factories
import numpy as np
import pytest
from factories import right_on, write_run

from data_prep import prepare
from data_prep.sources import sample
from data_prep.task import AG_NEWS
from finetune import paths
from finetune.compare import mistakes
from finetune.compare.comparison import load_folder
from finetune.predictions import Prediction

LABELS = AG_NEWS.labels


@pytest.fixture
def results(home):
    return paths.results_folder("cpu")


def near(probability: float):
    """As it is stored."""
    return pytest.approx(probability, abs=1e-5)


def answer(row: int, label: str, says: str, confidence: float) -> Prediction:
    probabilities = {name: confidence if name == says else (1 - confidence) / 3 for name in LABELS}
    return Prediction(
        id=f"test-{row}", label=label, prediction=says, probabilities=probabilities, generated=None, has_duplicate=False
    )


def run_of(mistaken: dict[int, tuple[str, float]], rows: int = 40, sure: float = 0.9) -> list[Prediction]:
    """Right on every row by `sure`, but for some, with their label and confidence."""
    labels = [LABELS[row % 4] for row in range(rows)]
    return [answer(row, label, *mistaken.get(row, (label, sure))) for row, label in enumerate(labels)]


def compare(results, **runs):
    write_run(results, "base", right_on(20, 40))
    for run, rows in runs.items():
        write_run(results, run, [], rows=rows)
    return load_folder(results, "cpu")


class TestMistakes:
    def test_every_wrong_row_is_listed_the_surest_first(self, results):
        compared = compare(
            results,
            lora=run_of({0: ("Sports", 0.6), 5: ("World", 0.8)}),
            qlora=run_of({0: ("Business", 0.7), 6: ("World", 0.95)}),
        )
        found = mistakes.mistakes(compared, {"test-0": "a text"})
        assert [mistake.id for mistake in found] == ["test-6", "test-5", "test-0"]
        last = found[-1]
        assert last.wrong == {"lora": ("Sports", near(0.6)), "qlora": ("Business", near(0.7))}
        assert (last.label, last.text, last.by_all, last.confidence) == ("World", "a text", True, near(0.7))
        assert (found[0].text, found[0].by_all, found[0].wrong) == (None, False, {"qlora": ("World", near(0.95))})

    def test_the_base_s_errors_are_listed_where_nothing_was_tuned(self, results):
        assert len(mistakes.mistakes(compare(results), {})) == 20


class TestSuspects:
    def test_they_are_those_of_the_definition(self, results):
        """Confident learning by hand: another class at no less than its own rows' mean confidence, for every run."""
        generator = np.random.default_rng(2)
        runs = {}
        for run in ("lora", "qlora"):
            mistaken = {row: (LABELS[(row + 1) % 4], generator.uniform(0.4, 1)) for row in range(0, 24)}
            runs[run] = run_of(mistaken, rows=120, sure=0.8)
        write_run(results, "base", right_on(60, 120))
        for run, rows in runs.items():
            write_run(results, run, [], rows=rows)
        compared = load_folder(results, "cpu")

        def doubted(rows: list[Prediction]) -> set[int]:
            thresholds = {
                label: np.mean([row.probabilities[label] for row in rows if row.label == label]) for label in LABELS
            }
            return {
                number
                for number, row in enumerate(rows)
                if row.prediction != row.label and row.probabilities[row.prediction] >= thresholds[row.prediction]
            }

        expected = doubted(runs["lora"]) & doubted(runs["qlora"])
        assert expected and expected != set(range(24))
        assert set(mistakes.suspects(compared)) == expected
        assert {m.id for m in mistakes.mistakes(compared, {}) if m.is_suspect} == {f"test-{row}" for row in expected}

    @pytest.mark.parametrize("other", [{0: ("Business", 0.99)}, {}], ids=["another class", "the label"])
    def test_runs_that_disagree_suspect_nothing(self, results, other):
        assert mistakes.suspects(compare(results, lora=run_of({0: ("Sports", 0.99)}), qlora=run_of(other))) == []

    def test_the_least_credible_comes_first(self, results):
        rows = run_of({0: ("Sports", 0.95), 1: ("World", 0.99), 2: ("World", 0.97)})
        assert mistakes.suspects(compare(results, lora=rows)) == [1, 2, 0]

    def test_without_a_class_there_is_nothing_to_compare_with(self, results):
        rows = [answer(row, "World", "Sports", 0.9) for row in range(8)]
        write_run(results, "base", [], rows=rows)
        assert mistakes.suspects(load_folder(results, "cpu")) == []


class TestArticles:
    def reference(self, folder=None, **changes):
        manifest, _ = prepare(sample(AG_NEWS), folder, prompt="lean")
        return factories.data_reference(128, **{"source": "sample", "fingerprint": manifest.fingerprint} | changes)

    def test_the_sample_s_texts_may_be_published(self, tmp_path):
        texts = mistakes.publishable_articles(self.reference(tmp_path))
        assert len(texts) == 128
        assert texts["test-0"] == next(sample(AG_NEWS).rows("test")).text

    @pytest.mark.parametrize("change", [{"source": "csv"}, {"fingerprint": "ffffffffffff"}])
    def test_those_of_other_data_may_not(self, tmp_path, change):
        assert mistakes.publishable_articles(self.reference(tmp_path, **change)) == {}

    def test_prepared_data_gives_its_texts_where_it_is_the_record_s(self, home):
        data = self.reference(paths.dataset_folder("csv", "cpu"), source="csv")
        mine = factories.record("lora", 128).model_copy(update={"data": data})
        assert len(mistakes.articles(mine)) == 128
        other = data.model_copy(update={"fingerprint": "ffffffffffff"})
        assert mistakes.articles(mine.model_copy(update={"data": other})) == {}
        # Another task's rows are elsewhere, and not prepared.
        assert mistakes.articles(mine.model_copy(update={"profile": "cpu+tickets"})) == {}
