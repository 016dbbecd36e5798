"""A few faults of each kind, provoked anew: nothing is lost, nothing is silently different, no traceback."""

import json
import subprocess
import sys

from benchmarks import render
from finetune.paths import PROJECT


def test_no_fault_loses_anything_or_changes_it_silently_or_ends_in_a_traceback(tmp_path):
    """In a process of its own, whose children are forked: this one has threads."""
    command = [sys.executable, "-m", "benchmarks.faults", "--short", "--out", str(tmp_path / "faults.json")]
    ended = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-2000:]
    content = json.loads((tmp_path / "faults.json").read_text())
    assert content["failures"] == []
    assert sum(line["times"] for line in content["faults"]) >= 85


def test_the_committed_page_is_what_the_record_gives():
    assert render.faults_page(render.FAULTS) == (PROJECT / "docs" / "faults.md").read_text()
    content = json.loads(render.FAULTS.read_text())
    assert all(
        f"| {line['fault']} | {line['times']} | " in render.faults_page(render.FAULTS) for line in content["faults"]
    )
