"""The experiment behind the reference results: every training, evaluation and merge of it, from one command.

    python -m benchmarks.evidence --profile gpu --set source=csv --set data_path=FOLDER --seeds 3 --publish
    make evidence ARGS="--seeds 3"

We run the suite once for each set of records, one after the other, each in its own folder in `results/evidence/`. The
first set is the profile as it is, with a learning curve. Each other set changes one thing (the prompt, the loss or the
engine), so that `python -m finetune ablation` can say what that costs. A set that changes nothing on this machine is
skipped, with the reason. After an interrupt or a failure, the same command goes on from there. `--publish` copies each
whole set to results/reference/NAME.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep import UserError
from finetune import paths
from finetune.compare import publish
from finetune.config.plan import applicable, parse_assignments, plan
from finetune.model import smollm2

# The exit status of a command that Ctrl-C ended.
INTERRUPTED = 130
METHODS = ("full", "lora", "qlora")
# Before any set's own folder is made the home.
HOME = paths.home().resolve() / "results" / "evidence"


@dataclass(frozen=True)
class RecordSet:
    """Records that are compared in one report.

    Attributes:
        suffix: Of its name, behind the profile's; its parent is the set whose name is the longest beginning of it.
        change: In the profile's parameters.
        runs: What is trained, besides the base, which is evaluated in each set.
        is_main: Whether it has a learning curve, and its adapters are merged.
    """

    suffix: str = ""
    change: Mapping[str, Any] = field(default_factory=dict)
    runs: tuple[str, ...] = METHODS
    is_main: bool = False


SETS = (
    RecordSet(runs=("full", "full_unsloth", "lora", "qlora"), is_main=True),
    RecordSet("-answer", {"article_loss": 0.0}),
    RecordSet("-answer-all", {"article_loss": 0.0, "completion_only_loss": False}),
    RecordSet("-verbose", {"prompt": "verbose"}),
    RecordSet("-transformers", {"engine": "transformers"}, ("lora", "qlora")),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the sets; returns 0 if all are whole, 1 if a step failed, 2 if the command was wrong, 130 after Ctrl-C."""
    options = _options(arguments)
    try:
        asked = parse_assignments(options.assignments)
        base = plan("base", options.profile, applicable(asked, "base"))
        options.profile = base.profile
        sets = [each for each in SETS if _is_wanted(each, options.profile, asked)]
        smollm2.ensure()
        failed = [each for each in sets if not _run(each, options)]
        if options.publish:
            _publish([each for each in sets if each not in failed], base.profile, base.place)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    for each in failed:
        print(f"{options.profile}{each.suffix} is not whole: see {_home(options.profile, each)}", file=sys.stderr)
    return 1 if failed else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="auto")
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="*", default=[250, 1000, 4000], help="of the learning curve")
    parser.add_argument("--publish", action="store_true", help="copy whole sets to results/reference")
    return parser.parse_args(arguments)


def _is_wanted(each: RecordSet, profile: str, asked: Mapping[str, str]) -> bool:
    """Whether the change changes anything of what its parent does."""
    parent = max(
        (other for other in SETS if _is_behind(each, other)), key=lambda other: len(other.suffix), default=None
    )
    if parent is None or any(
        _planned(run, profile, asked, each) != _planned(run, profile, asked, parent) for run in each.runs
    ):
        return True
    print(f"skipped {profile}{each.suffix}: {each.change} is what {profile}{parent.suffix} does here", flush=True)
    return False


def _is_behind(each: RecordSet, other: RecordSet) -> bool:
    return each is not other and f"{each.suffix}-".startswith(f"{other.suffix}-")


def _planned(run: str, profile: str, asked: Mapping[str, str], each: RecordSet) -> tuple:
    planned = plan(run, profile, dict(asked) | dict(each.change))
    # An engine that is asked for by name may be what would be chosen.
    return planned.engine, {name: value for name, value in planned.values.items() if name != "engine"}


def _run(each: RecordSet, options: argparse.Namespace) -> bool:
    """Execute a set's commands; whether all went well."""
    checkpoints = _home(options.profile, each) / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    model = checkpoints / smollm2.NAME
    if not model.exists():
        model.symlink_to(smollm2.folder().resolve())
    # One that fails must not cost the others their results.
    statuses = []
    for command in _commands(each, options):
        statuses.append(_finetune(command, each, options.profile))
        if statuses[-1] == INTERRUPTED:
            raise KeyboardInterrupt
    return not any(statuses)


def _commands(each: RecordSet, options: argparse.Namespace) -> Iterator[list[str]]:
    asked = [*options.assignments, *(f"{name}={value}" for name, value in each.change.items())]
    common = ["--profile", options.profile, *(part for one in asked for part in ("--set", one))]
    runs = [part for run in ("base", *each.runs) for part in ("--only", run)]
    yield ["run", *common, *runs, "--seeds", str(options.seeds)]
    if each.is_main:
        rows = [part for count in options.rows for part in ("--rows", str(count))]
        yield ["curve", *common, "--only", "svm", *runs[2:], *rows]
        yield from (["merge", run, *common] for run in each.runs if run in ("lora", "qlora"))


def _publish(sets: Sequence[RecordSet], profile: str, place: str) -> None:
    """Copy whole sets to the reference results, then renew reports and README once."""
    for each in sets:
        print(publish.copy(_home(profile, each) / "results" / place, place + each.suffix))
    publish.regenerate()


def _finetune(command: list[str], each: RecordSet, profile: str) -> int:
    line = ["python", "-m", "finetune", *command]
    print(f"{profile}{each.suffix}: {shlex.join(line)}", flush=True)
    environment = os.environ | {"FINETUNE_HOME": str(_home(profile, each)), "FINETUNE_COMMAND": shlex.join(line)}
    return subprocess.run([sys.executable, *line[1:]], cwd=paths.PROJECT, env=environment, check=False).returncode


def _home(profile: str, each: RecordSet) -> Path:
    return HOME / f"{profile}{each.suffix}"


if __name__ == "__main__":
    sys.exit(main())
