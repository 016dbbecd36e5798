"""Records: written whole, read back alike, refused when they are not what they should be."""

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
from finetune.records import LogPoint


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
        assert sorted(path.name for path in folder.iterdir()) == ["predictions.parquet", "record.json"]

    def test_a_diverged_training_is_recorded_as_such(self, folder):
        history = [LogPoint(step=1, epoch=0.1, loss=math.nan, grad_norm=math.inf)]
        records.write(factories.record("lora", training=factories.training("lora", history=history)), folder)
        (point,) = records.read(folder).training.history
        assert point.grad_norm == math.inf
        assert math.isnan(point.loss)


class TestRefusals:
    def test_a_missing_record(self, folder):
        with pytest.raises(DataError, match=r"lora/record\.json: no such file; run the notebook"):
            records.read(folder)

    @pytest.mark.parametrize("keep", [0, 500])
    def test_a_truncated_record(self, folder, evaluated, keep):
        path = folder / "record.json"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(DataError, match=r"record\.json: not a record of this version \(file: "):
            records.read(folder)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (lambda record: record.update(schema_version=2), "schema_version"),
            (lambda record: record.update(remark="hello"), "remark"),
            (lambda record: record["training"].update(seconds="long"), r"training\.seconds"),
            (lambda record: record["training"].pop("artefact_digest"), r"training\.artefact_digest"),
            (lambda record: record["training"]["history"][1].pop("step"), r"training\.history\.1\.step"),
        ],
        ids=["version", "extra", "type", "missing", "list"],
    )
    def test_a_record_of_another_form_is_refused_with_the_field(self, folder, evaluated, change, named):
        edit(folder, change)
        with pytest.raises(DataError, match=rf"not a record of this version \({named}: .*run its notebook again"):
            records.read(folder)

    def test_a_figure_that_is_another_than_was_written_is_refused(self, folder, evaluated):
        edit(folder, lambda record: record["training"].update(seconds=91.0))
        with pytest.raises(DataError, match="was changed after it was written, or is damaged; run its notebook again"):
            records.read(folder)
        edit(folder, lambda record: record.pop("digest"))
        assert records.read(folder).training.seconds == 91, "older records have no digest"

    def test_predictions_of_a_run_that_was_not_evaluated(self, folder):
        with pytest.raises(DataError, match="lora was not evaluated yet"):
            records.read_predictions(factories.record("lora"), folder)


class TestWriting:
    def test_a_new_training_removes_the_old_predictions(self, folder, evaluated):
        records.write(factories.record("lora", training=factories.training("lora")), folder)
        assert [path.name for path in folder.iterdir()] == ["record.json"]
        assert records.read(folder).evaluation is None

    def test_an_evaluation_keeps_its_predictions(self, folder, evaluated):
        records.write(evaluated, folder)
        assert records.read_predictions(records.read(folder), folder)


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
