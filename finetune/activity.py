"""What is busy in the container: notebooks that execute, and trainings with their step and the time that is left.

    python -I finetune/activity.py text|json

`start_docker.sh status` runs this file inside the container, where the token is in the environment. It is run by its
path and needs Python alone: importing the suite would take as long as importing torch.
"""

import json
import os
import sys
import time
from http.client import HTTPConnection
from pathlib import Path

# A training writes its progress at every step; after so long without one it was killed, or it hangs.
SILENT = 600


def busy_notebooks() -> list[dict]:
    """Of Jupyter's sessions, those whose kernel executes. Empty where no Jupyter server answers."""
    server = HTTPConnection("127.0.0.1", 8888, timeout=5)
    try:
        server.request("GET", "/api/sessions", headers={"Authorization": f"token {os.environ.get('JUPYTER_TOKEN')}"})
        answer = server.getresponse()
        sessions = json.load(answer) if answer.status == 200 else []
    except OSError:
        return []
    return [{"notebook": session["path"]} for session in sessions if session["kernel"]["execution_state"] == "busy"]


def unfinished_trainings(states: Path) -> list[dict]:
    """What trainings report in their folders; one that ends removes it."""
    found = []
    for progress in sorted(states.glob("*/progress.json")):
        try:
            run = json.loads(progress.read_bytes())
        except FileNotFoundError:
            continue
        item = {key: run[key] for key in ("run", "step", "total_steps")}
        item["seconds_left"] = round(run["seconds_left"])
        item["silent_seconds"] = round(time.time() - run["updated"])
        found.append(item)
    return found


def line(item: dict) -> str:
    """An item for people, as `name|text`."""
    if "notebook" in item:
        return f"notebook|{item['notebook']} is executing"
    at = f"step {item['step']} of {item['total_steps']}"
    if item["silent_seconds"] > SILENT:
        return f"training|{item['run']}: no sign of life for {duration(item['silent_seconds'])}, at {at}"
    return f"training|{item['run']}: {at}, {duration(item['seconds_left'])} left"


def duration(seconds: int) -> str:
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


if __name__ == "__main__":
    project = Path(__file__).resolve().parent.parent
    items = busy_notebooks() + unfinished_trainings(project / "checkpoints" / ".training")
    print(json.dumps(items) if sys.argv[1:] == ["json"] else "\n".join(map(line, items)))
