"""Predictions: one file a run or a set, read back alike, refused when they are not what they should be."""

from dataclasses import replace

import factories
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from data_prep import DataError
from finetune import predictions, records
from finetune.predictions import Prediction

LABELS = factories.LABELS


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "results" / "cpu" / "lora"


@pytest.fixture
def evaluated(folder):
    """A record with training and evaluation, in `folder`."""
    return factories.write_run(folder.parent, "lora", factories.right_on(30, 40))


def row(probabilities, **changes) -> Prediction:
    found = dict(zip(LABELS, probabilities, strict=True))
    return replace(factories.predictions([True])[0], probabilities=found, **changes)


def alike(found: list[Prediction], written: list[Prediction]) -> bool:
    """Whether rows came back as they were, their probabilities to four digits."""
    assert [list(of.probabilities.values()) for of in found] == [
        pytest.approx(list(of.probabilities.values()), rel=2e-4, abs=1e-12) for of in written
    ]
    return [replace(of, probabilities={}) for of in found] == [replace(of, probabilities={}) for of in written]


class TestRoundTrip:
    def test_both_splits_come_back_as_they_were(self, folder):
        test, validation = factories.predictions(factories.right_on(30, 40)), factories.predictions([True, False, True])
        digest = predictions.write(folder, test, validation)
        assert alike(predictions.read(folder, digest), test)
        assert alike(predictions.read(folder, digest, "validation"), validation)

    def test_without_validation_rows_there_are_none(self, folder, evaluated):
        assert records.read_validation(evaluated, folder) == []

    @pytest.mark.parametrize("generated", ['{"category":\n"World"}', "東京\u2028\x85\r\nnext", "", None])
    def test_a_generated_answer_may_hold_anything(self, folder, generated):
        rows = [replace(of, generated=generated) for of in factories.predictions([True, False])]
        assert alike(predictions.read(folder, predictions.write(folder, rows)), rows)

    def test_rows_that_are_in_validation_too_are_marked_and_older_files_know_none(self, folder):
        rows = factories.predictions([True, False])
        digest = predictions.write(folder, rows)
        table = pq.read_table(folder / "predictions.parquet").drop_columns("in_validation")
        pq.write_table(table, folder / "predictions.parquet")
        assert alike(predictions.read(folder, digest), rows)
        marked = [replace(rows[0], in_validation=True), rows[1]]
        assert alike(predictions.read(folder, predictions.write(folder, marked)), marked)

    def test_a_classifier_has_no_probabilities(self, folder):
        rows = [replace(of, probabilities={}) for of in factories.predictions([True, False])]
        assert predictions.read(folder, predictions.write(folder, rows)) == rows

    def test_other_tools_read_the_file(self, folder):
        predictions.write(folder, [row([0.7, 0.1, 0.15, 0.05])])
        (found,) = pd.read_parquet(folder / "predictions.parquet").to_dict("records")
        assert found["logit(World)"] == 0
        assert found["logit(Sports)"] == pytest.approx(np.log(0.1 / 0.7), rel=1e-5)
        assert (found["run"], found["split"], found["has_duplicate"]) == (".", "test", False)

    @pytest.mark.parametrize(
        "probabilities",
        [[1, 0, 0, 0], [1 - 3e-9, 1e-9, 1e-9, 1e-9], [0.25, 0.25, 0.25, 0.25], [1e-30, 0.9999, 1e-9, 1e-4]],
    )
    def test_sure_models_keep_their_digits(self, folder, probabilities):
        found = predictions.read(folder, predictions.write(folder, [row(probabilities)]))
        assert list(found[0].probabilities.values()) == pytest.approx(probabilities, rel=2e-4)

    def test_the_most_probable_label_stays_so(self, folder):
        rows = [row(of) for of in ([0.4, 0.4 + 1e-9, 0.1, 0.1 - 1e-9], [0.4, 0.4 - 1e-9, 0.1, 0.1 + 1e-9])]
        first, second = predictions.read(folder, predictions.write(folder, rows))
        assert first.probabilities["World"] < first.probabilities["Sports"]
        assert second.probabilities["World"] > second.probabilities["Sports"]


class TestJoined:
    @pytest.fixture
    def joined(self, tmp_path):
        """Digests and rows by run, all in one file: a model with answers, a variant without, a classifier."""
        rows = {
            "lora": [replace(of, generated="World") for of in factories.predictions([True, False])],
            "lora/seed-43": factories.predictions([False, False]),
            "baselines/svm/rows-8": [replace(of, probabilities={}) for of in factories.predictions([True, True])],
        }
        digests = {run: predictions.write(tmp_path / "own" / run, of) for run, of in rows.items()}
        predictions.join({run: tmp_path / "own" / run for run in rows}, tmp_path / "set")
        return tmp_path / "set", rows, digests

    def test_each_run_is_read_as_from_its_own_file(self, joined):
        folder, rows, digests = joined
        for run, written in rows.items():
            assert alike(predictions.read(folder / run, digests[run]), written)

    @pytest.mark.parametrize(
        ("run", "digest", "said"),
        [("full", "lora", "has no predictions of .*set/full; run the"),
         ("lora", "lora/seed-43", r"not the predictions of .*set/lora/record\.json")],
    )  # fmt: skip
    def test_another_run_s(self, joined, run, digest, said):
        folder, _, digests = joined
        with pytest.raises(DataError, match=rf"set/predictions\.parquet: {said}"):
            predictions.read(folder / run, digests[digest])


class TestRefusals:
    @pytest.mark.parametrize("keep", [0, 1000, -10])
    def test_a_file_that_was_cut_short(self, folder, evaluated, keep):
        path = folder / "predictions.parquet"
        path.write_bytes(path.read_bytes()[:keep])
        said = r"lora/predictions\.parquet: cannot be read \(.*\); is the file cut short\?"
        with pytest.raises(DataError, match=said):
            records.read_predictions(evaluated, folder)

    def test_damaged_bytes_and_another_table(self, folder, evaluated):
        path = folder / "predictions.parquet"
        content = bytearray(path.read_bytes())
        content[100:200] = bytes(100)
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"lora/predictions\.parquet: (cannot be read|not the predictions of)"):
            records.read_predictions(evaluated, folder)
        pd.DataFrame({"a": [1]}).to_parquet(path)
        with pytest.raises(DataError, match=r"lora/predictions\.parquet: cannot be read"):
            records.read_predictions(evaluated, folder)

    @pytest.mark.parametrize(
        "change",
        [
            lambda rows: rows[:-1],
            lambda rows: [replace(rows[0], label="Sports"), *rows[1:]],
            lambda rows: [replace(rows[0], probabilities=rows[1].probabilities), *rows[1:]],
            lambda rows: rows[::-1],
        ],
        ids=["a row less", "another label", "other probabilities", "another order"],
    )
    def test_changed_predictions(self, folder, evaluated, change):
        predictions.write(folder, change(factories.predictions(factories.right_on(30, 40))))
        with pytest.raises(DataError, match=r"predictions\.parquet: not the predictions of .*lora/record\.json"):
            records.read_predictions(evaluated, folder)

    def test_missing_predictions(self, folder, evaluated):
        (folder / "predictions.parquet").unlink()
        with pytest.raises(DataError, match=r"lora/predictions\.parquet: no such file"):
            records.read_predictions(evaluated, folder)

    def test_a_variant_without_its_own(self, folder, evaluated):
        with pytest.raises(DataError, match=r"lora/predictions\.parquet: has no predictions of .*lora/seed-43"):
            predictions.read(folder / "seed-43", evaluated.evaluation.predictions_digest)
