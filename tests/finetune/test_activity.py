"""What `start_docker.sh status` says of trainings; test_lifecycle.py asks the same of a container."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune import activity, paths


@pytest.fixture
def progress(tmp_path):
    """A training's progress file, written `ago` seconds ago."""

    def write(ago, run="lora"):
        path = tmp_path / f"cpu-{run}" / "progress.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"run": run, "step": 12, "total_steps": 36, "seconds_left": 8000.4, "updated": time.time() - ago}
        path.write_text(json.dumps(state))
        return path

    return write


def test_a_training_with_its_step_and_the_time_that_is_left(progress, tmp_path):
    progress(ago=3)
    [item] = activity.unfinished_trainings(tmp_path)
    assert item == {"run": "lora", "step": 12, "total_steps": 36, "seconds_left": 8000, "silent_seconds": 3}
    assert activity.line(item) == "training|lora: step 12 of 36, 2 h 13 min left"


def test_a_training_that_is_silent_for_too_long(progress, tmp_path):
    progress(ago=activity.SILENT + 60)
    [item] = activity.unfinished_trainings(tmp_path)
    assert activity.line(item) == "training|lora: no sign of life for 11 min, at step 12 of 36"


def test_a_training_reports_where_it_is_looked_for(progress):
    """The trainer writes into its own folder, and the container mounts the project."""
    states = paths.state_folder("cpu", "lora").parent
    assert f'"{states.parent.name}" / "{states.name}"' in Path(activity.__file__).read_text()


def test_it_needs_nothing_but_python():
    """-S: without any installed package, as the container's Python runs it."""
    done = subprocess.run([sys.executable, "-IS", activity.__file__, "json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), list)
