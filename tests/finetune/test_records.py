"""Records and predictions: written whole, read back alike, refused when they are not what they should be."""

import gzip
import json
import math
import os
import re
import subprocess
from importlib import metadata

import factories
import pytest

from data_prep import DataError
from finetune import paths, records
from finetune.records import LogPoint, Prediction


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "results" / "cpu" / "lora"


@pytest.fixture
def evaluated(tmp_path):
    """A record with training and evaluation, in `folder`."""
    return factories.write_run(tmp_path / "results" / "cpu", "lora", factories.right_on(30, 40))


def edit(folder, change) -> None:
    path = folder / "record.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


class TestRoundTrip:
    def test_a_record_comes_back_as_it_was(self, folder, evaluated):
        assert records.read(folder) == evaluated
        assert sorted(path.name for path in folder.iterdir()) == ["predictions.jsonl", "record.json"]

    def test_predictions_come_back_as_they_were(self, folder, evaluated):
        assert records.read_predictions(evaluated, folder) == factories.predictions(factories.right_on(30, 40))

    @pytest.mark.parametrize("generated", ['{"category":\n"World"}', "東京\u2028\x85\r\nnext", "", None])
    def test_a_generated_answer_may_hold_anything(self, folder, generated):
        rows = [row.model_copy(update={"generated": generated}) for row in factories.predictions([True, False])]
        record = factories.write_run(folder.parent, "lora", [], rows=rows)
        assert records.read_predictions(record, folder) == rows

    def test_a_diverged_training_is_recorded_as_such(self, folder):
        history = [LogPoint(step=1, epoch=0.1, loss=math.nan, grad_norm=math.inf)]
        records.write(factories.record("lora", training=factories.training("lora", history=history)), folder)
        (point,) = records.read(folder).training.history
        assert point.grad_norm == math.inf
        assert math.isnan(point.loss)

    def test_a_record_without_its_parts_is_one_too(self, folder):
        record = factories.record("lora")
        records.write(record, folder)
        assert records.read(folder) == record


class TestValidationRows:
    def test_they_come_back_as_they_were(self, folder):
        rows = factories.predictions([True, False, True])
        record = factories.write_run(folder.parent, "lora", factories.right_on(30, 40), validation=rows)
        assert records.read_validation(record, folder) == rows

    def test_a_record_that_is_older_than_them_has_none(self, folder, evaluated):
        edit(folder, lambda record: record["evaluation"].pop("validation_digest"))
        assert records.read_validation(records.read(folder), folder) is None

    def test_changed_ones_are_refused(self, folder):
        record = factories.write_run(folder.parent, "lora", [True], validation=factories.predictions([True]))
        (folder / "validation.jsonl").write_text("")
        with pytest.raises(DataError, match=r"validation\.jsonl: not the predictions of record\.json"):
            records.read_validation(record, folder)

    def test_a_new_training_removes_them(self, folder):
        factories.write_run(folder.parent, "lora", [True], validation=factories.predictions([True]))
        records.write(factories.record("lora", training=factories.training("lora")), folder)
        assert [path.name for path in folder.iterdir()] == ["record.json"]


class TestPackedPredictions:
    @pytest.fixture
    def packed(self, folder, evaluated):
        path = folder / "predictions.jsonl"
        path.with_name("predictions.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
        return path.with_name("predictions.jsonl.gz")

    def test_they_are_read_as_the_others(self, folder, evaluated, packed):
        assert records.read_predictions(evaluated, folder) == factories.predictions(factories.right_on(30, 40))

    @pytest.mark.parametrize("keep", [0, 10, -10])
    def test_cut_short_they_are_refused(self, folder, evaluated, packed, keep):
        packed.write_bytes(packed.read_bytes()[:keep])
        with pytest.raises(DataError, match=r"predictions\.jsonl"):
            records.read_predictions(evaluated, folder)

    def test_others_are_refused(self, folder, evaluated, packed):
        packed.write_bytes(gzip.compress(b""))
        with pytest.raises(DataError, match="not the predictions of"):
            records.read_predictions(evaluated, folder)


class TestRefusals:
    def test_a_missing_record(self, folder):
        with pytest.raises(DataError, match=r"lora/record\.json: no such file; run the notebook"):
            records.read(folder)

    @pytest.mark.parametrize("keep", [0, 1, 500, -10])
    def test_a_truncated_record(self, folder, evaluated, keep):
        path = folder / "record.json"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(DataError, match=r"record\.json: not a record of this version \(file: "):
            records.read(folder)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (lambda record: record.update(schema_version=2), "schema_version"),
            (lambda record: record.update(schema_version="1"), "schema_version"),
            (lambda record: record.update(remark="hello"), "remark"),
            (lambda record: record["data"].update(rows=1), r"data\.rows"),
            (lambda record: record["training"].update(seconds="long"), r"training\.seconds"),
            (lambda record: record["training"].pop("artefact_digest"), r"training\.artefact_digest"),
            (lambda record: record["training"]["history"][1].pop("step"), r"training\.history\.1\.step"),
            (lambda record: record["evaluation"]["scoring"].pop("macro_f1"), r"evaluation\.scoring\.macro_f1"),
            (lambda record: record.pop("settings_digest"), "settings_digest"),
        ],
        ids=["version 2", "version 1 as text", "extra", "extra below", "type", "missing", "list", "metric", "digest"],
    )
    def test_a_record_of_another_form_is_refused_with_the_field(self, folder, evaluated, change, named):
        edit(folder, change)
        with pytest.raises(DataError, match=rf"not a record of this version \({named}: .*run its notebook again"):
            records.read(folder)

    @pytest.mark.parametrize(
        "change",
        [
            lambda content: content[:-1],
            lambda content: content[: content.rindex(b"{")],
            lambda content: content + b"\n",
            lambda content: content.replace(b'"World"', b'"Sports"', 1),
            lambda content: b"",
        ],
        ids=["cut within a row", "a row less", "a row more", "another label", "empty"],
    )
    def test_changed_predictions(self, folder, evaluated, change):
        path = folder / "predictions.jsonl"
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(DataError, match=r"predictions\.jsonl: not the predictions of record\.json"):
            records.read_predictions(evaluated, folder)

    def test_predictions_of_another_run(self, folder, evaluated):
        other = factories.write_run(folder.parent, "qlora", factories.right_on(20, 40))
        with pytest.raises(DataError, match="another run's"):
            records.read_predictions(other, folder)

    def test_missing_predictions(self, folder, evaluated):
        (folder / "predictions.jsonl").unlink()
        with pytest.raises(DataError, match=r"predictions\.jsonl: no such file"):
            records.read_predictions(evaluated, folder)

    def test_predictions_of_a_run_that_was_not_evaluated(self, folder):
        with pytest.raises(DataError, match="lora was not evaluated yet"):
            records.read_predictions(factories.record("lora"), folder)

    def test_a_prediction_takes_no_other_field(self):
        row = factories.predictions([True])[0].model_dump()
        with pytest.raises(ValueError):
            Prediction(**row, score=1)


class TestWriting:
    def test_a_new_training_removes_the_old_predictions(self, folder, evaluated):
        records.write(factories.record("lora", training=factories.training("lora")), folder)
        assert [path.name for path in folder.iterdir()] == ["record.json"]
        assert records.read(folder).evaluation is None

    def test_an_evaluation_keeps_its_predictions(self, folder, evaluated):
        records.write(evaluated, folder)
        assert records.read_predictions(records.read(folder), folder)

    def test_the_same_predictions_have_the_same_digest(self, tmp_path):
        rows = factories.predictions([True, False])
        digests = {records.write_predictions(rows, tmp_path / name) for name in "ab"}
        assert len(digests) == 1
        assert records.write_predictions(rows[:1], tmp_path / "c") not in digests


class TestEnvironment:
    def test_it_names_the_commit_of_the_code(self):
        environment = records.environment()
        head = subprocess.run(["git", "-C", paths.PROJECT, "rev-parse", "HEAD"], capture_output=True, text=True)
        if head.returncode:
            assert (environment.commit, environment.dirty) == (None, None)
        else:
            assert re.fullmatch("[0-9a-f]{40}", environment.commit)
            assert environment.commit == head.stdout.strip()
            assert isinstance(environment.dirty, bool)

    def test_outside_a_checkout_there_is_no_commit(self, monkeypatch, tmp_path):
        monkeypatch.setattr(paths, "PROJECT", tmp_path)
        assert (records.environment().commit, records.environment().dirty) == (None, None)

    def test_it_tells_changed_files(self, monkeypatch, tmp_path):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "first"]):
            subprocess.run(["git", "-C", tmp_path, *command], check=True)
        monkeypatch.setattr(paths, "PROJECT", tmp_path)
        assert records.environment().dirty is False
        (tmp_path / "new.py").touch()
        assert records.environment().dirty is True

    def test_it_names_packages_and_machine(self):
        environment = records.environment()
        assert environment.packages["torch"] == metadata.version("torch")
        # What computes the statistics, too.
        for package in ("transformers", "scikit-learn", "scipy", "statsmodels", "cleanlab"):
            assert environment.packages[package] == metadata.version(package)
        assert environment.hardware["cores"] == os.cpu_count()
        assert environment.hardware["memory_bytes"] > 1e8

    def test_the_command_is_the_one_that_was_typed(self, monkeypatch):
        monkeypatch.delenv("FINETUNE_COMMAND", raising=False)
        assert records.environment().command == "Run All in Jupyter"
        monkeypatch.setenv("FINETUNE_COMMAND", "make demo")
        assert records.environment().command == "make demo"
