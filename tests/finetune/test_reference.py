"""The reference results: every record's figures follow from the predictions, by pandas alone."""

import json
import subprocess

import numpy as np
import pandas as pd
import pytest

from finetune import paths
from finetune.compare import comparison

FOLDER = paths.PROJECT / "results" / "reference"
SETS = sorted(path.parent for path in FOLDER.glob("*/predictions.parquet"))


def assert_figures(scoring, counts: pd.Series) -> None:
    """`counts` has how many rows have each label and prediction."""
    labels = list(scoring["classes"])
    confusion = counts.unstack(fill_value=0).reindex(index=labels, columns=labels, fill_value=0).to_numpy()
    assert confusion.tolist() == scoring["confusion"]
    assert scoring["rows"] == counts.sum()
    assert scoring["accuracy"] == pytest.approx(np.trace(confusion) / counts.sum())
    f1 = 2 * np.diag(confusion) / (confusion.sum(axis=0) + confusion.sum(axis=1))
    assert scoring["macro_f1"] == pytest.approx(f1.mean())


@pytest.mark.parametrize("folder", SETS, ids=lambda folder: folder.name)
def test_every_figure_is_that_of_the_predictions(folder):
    table = pd.read_parquet(folder / "predictions.parquet").query("split == 'test'")
    columns = [name for name in table.columns if name.startswith("logit(")]
    odds = np.exp(table[columns].to_numpy(float))
    truth = table["label"].map({name[6:-1]: place for place, name in enumerate(columns)})
    table["loss"] = -np.log(odds[np.arange(len(table)), truth] / odds.sum(axis=1))
    losses = table.groupby("run")["loss"].mean()
    counts = table.groupby(["run", "has_duplicate", "label", "prediction"]).size()
    records = {path.parent.relative_to(folder).as_posix(): path for path in folder.rglob("record.json")}
    assert sorted(records) == sorted(losses.index)
    for run, path in records.items():
        record = json.loads(path.read_text())
        found = record.get("evaluation", record)
        assert_figures(found["scoring"], counts[run].groupby(["label", "prediction"]).sum())
        assert_figures(found["without_duplicates"], counts[run][False])
        if "log_loss" in found:
            assert found["log_loss"] == pytest.approx(losses[run], abs=1e-4)


def test_a_set_that_no_page_shows_is_read():
    assert comparison.load_folder(FOLDER / "cpu", "cpu").scoring["base"].rows == 128


def test_git_holds_small_files_of_few_kinds():
    listed = subprocess.run(["git", "-C", paths.PROJECT, "ls-files", "results"], capture_output=True, text=True)
    files = [paths.PROJECT / name for name in listed.stdout.splitlines()]
    assert {path.suffix for path in files} <= {".json", ".parquet", ".md", ""}
    assert sum(path.stat().st_size for path in files) < 8e6
