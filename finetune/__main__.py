"""The command line.

python -m finetune run      [--profile P] [--task T] [--set NAME=VALUE ...] [--only RUN ...] [--fresh] [--seeds N]
                            [--force] [--processes N] [--strategy ddp|fsdp2]
python -m finetune curve    [--profile P] [--task T] [--set NAME=VALUE ...] [--only RUN ...] [--fresh] [--rows N ...]
python -m finetune plan     RUN [--profile P] [--task T] [--set NAME=VALUE ...]
python -m finetune plan     --memory [SIZE]
python -m finetune data     [--profile P] [--task T] [--set NAME=VALUE ...]
python -m finetune merge    RUN [--profile P] [--task T] [--set NAME=VALUE ...]
python -m finetune report   FOLDER [--margin POINTS] [--save WHAT]
python -m finetune ablation FOLDER OTHER
python -m finetune publish  [--profile P] [--task T] [--name NAME]
python -m finetune results
python -m finetune new      FILE [--name NAME] [--text COLUMN ...] [--label COLUMN] [--group COLUMN | --time COLUMN]
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep import UserError
from finetune import machine, paths, wording
from finetune.config.methods import METHODS
from finetune.config.plan import DEFAULT, PLACES, Settings, applicable, fewer_rows, located, parse_assignments, plan
from finetune.config.profiles import PROFILES
from finetune.launch import STRATEGIES, processes_for

if TYPE_CHECKING:
    from rich.table import Table

# What `curve --only` knows besides the suite's runs.
SVM = "svm"


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 if all went well, 1 if a step failed, 2 if the command or its input was wrong."""
    # A terminal or a file in an old encoding gets "?" for what it cannot hold, and not a traceback.
    for stream in filter(lambda stream: isinstance(stream, io.TextIOWrapper), (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")
    options = _parser().parse_args(arguments)
    # Records name the command that made them; a notebook's kernel, too, finds it here.
    given = sys.argv[1:] if arguments is None else arguments
    os.environ.setdefault("FINETUNE_COMMAND", shlex.join(["python", "-m", "finetune", *given]))
    try:
        return options.command(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m finetune", description="Full fine-tuning, LoRA or QLoRA?")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--profile", default="auto", help=f"auto (by hardware), {', '.join(PROFILES)}")
    common.add_argument("--task", metavar="NAME", help="ag_news, or a file tasks/NAME.yaml of your own")
    common.add_argument(
        "--set",
        dest="assignments",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="override a parameter; repeat for several",
    )

    suite = argparse.ArgumentParser(add_help=False)
    methods = ", ".join(METHODS)
    runs = f"{methods} or compare (curve: svm too); repeat for several"
    suite.add_argument("--only", action="append", default=[], metavar="RUN", help=runs)
    suite.add_argument("--fresh", action="store_true", help="run every step again, and reuse none")
    suite.add_argument("--force", action="store_true", help="train although memory or disk are too small")

    run = commands.add_parser("run", parents=[common, suite], help="execute the notebooks headless, in their order")
    run.add_argument("--seeds", type=_positive, default=1, metavar="N", help="train each method with N seeds")
    run.add_argument("--processes", default="1", metavar="N", help="train on N GPUs, or CPU processes; auto: all GPUs")
    run.add_argument("--strategy", default="ddp", choices=STRATEGIES, help="each GPU holds the model, or a part of it")
    run.set_defaults(command=_run)

    curve = commands.add_parser("curve", parents=[common, suite], help="train each method, and an SVM, on fewer rows")
    curve.add_argument(
        "--rows",
        type=_positive,
        action="append",
        metavar="N",
        help="training rows of a point; repeat for several (default: 250, 1000 and 4000, or a quarter and half of all)",
    )
    curve.set_defaults(command=_curve)

    plan = commands.add_parser("plan", parents=[common], help="print every parameter, and where its value comes from")
    plan.add_argument("run", metavar="RUN", nargs="?", help=methods)
    plan.add_argument(
        "--memory",
        type=_bytes,
        nargs="?",
        const=0,
        metavar="SIZE",
        help="which methods, models and batch sizes fit into a GPU of 24GB, say; into this machine without a SIZE",
    )
    plan.set_defaults(command=_plan)

    data = commands.add_parser("data", parents=[common], help="prepare the data")
    data.set_defaults(command=_data)

    merge = commands.add_parser("merge", parents=[common], help="merge an adapter into its base and evaluate it again")
    merge.add_argument("run", metavar="RUN", help="lora, qlora, dora or head")
    merge.set_defaults(command=_merge)

    report = commands.add_parser("report", help="write FOLDER/report.html from the records in FOLDER")
    report.add_argument("folder", type=Path, metavar="FOLDER")
    within = "points of accuracy that a cheaper method may lose (default: 1)"
    report.add_argument("--margin", type=float, default=1.0, metavar="POINTS", help=within)
    report.add_argument(
        "--save", default="time", metavar="WHAT", help="what to save: time (default), memory or 'artefact size'"
    )
    report.set_defaults(command=_report)

    ablation = commands.add_parser("ablation", help="compare two folders of records that differ in one setting")
    ablation.add_argument("folder", type=Path, metavar="FOLDER")
    ablation.add_argument("other", type=Path, metavar="OTHER", help="the folder that FOLDER is compared with")
    ablation.set_defaults(command=_ablation)

    publish = commands.add_parser("publish", parents=[common], help="copy a profile's records to results/reference")
    publish.add_argument("--name", metavar="NAME", help="folder in results/reference (default: the profile's name)")
    publish.set_defaults(command=_publish)

    new = commands.add_parser("new", help="describe a task of your own, from a table of texts and labels")
    new.add_argument("file", metavar="FILE", help="a file, a folder with train and test files, or a hub data set")
    new.add_argument("--name", metavar="NAME", help="the task's name (default: the file's)")
    new.add_argument("--text", action="append", default=[], metavar="COLUMN", help="a text column; repeat for several")
    new.add_argument("--label", metavar="COLUMN", help="the label's column")
    split = new.add_mutually_exclusive_group()
    split.add_argument("--group", metavar="COLUMN", help="rows with the same value here stay in one split")
    split.add_argument("--time", metavar="COLUMN", help="the latest rows become the test")
    new.add_argument("--encoding", metavar="NAME", help="of a file that is not UTF-8: cp1252, say")
    new.add_argument("--merge-spellings", action="store_true", help="'sports ' and 'Sports' are one label")
    new.add_argument("--skip-incomplete", action="store_true", help="leave out rows without a text or a label")
    new.set_defaults(command=_new)

    results = commands.add_parser("results", help="write the figures of README and docs from results/reference")
    results.set_defaults(command=_results)
    return parser


def _overrides(options: argparse.Namespace) -> dict[str, str]:
    return ({"task": options.task} if options.task else {}) | parse_assignments(options.assignments)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return int(text)


def _bytes(text: str) -> int:
    number, unit = text[:-2], {"GB": 10**9, "MB": 10**6}.get(text[-2:].upper())
    try:
        return int(float(number) * unit)
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text} is no size such as 24GB") from None


def _run(options: argparse.Namespace) -> int:
    return _execute(options, seeds=options.seeds, shared=(processes_for(options.processes), options.strategy))


def _curve(options: argparse.Namespace) -> int:
    rows, runs = _fewer_rows(options), [name for name in options.only if name != SVM]
    if not options.only or SVM in options.only:
        _fit_svms(options, rows)
        if options.only and not runs:
            return 0
    options.only = runs
    return _execute(options, curve=rows)


def _fewer_rows(options: argparse.Namespace) -> tuple[int, ...]:
    """Those that were asked for; if none were, the usual numbers that are fewer than all."""
    from finetune.data import load_data
    from finetune.runner import CURVE_ROWS

    every = len(load_data(_plan_of_base(options)).train)
    usual = tuple(count for count in CURVE_ROWS if count < every) or (every // 4, every // 2)
    rows = tuple(options.rows or usual)
    if not rows or max(rows) >= every:
        raise UserError(f"there are {every:,} training rows; ask for fewer than all of them: --rows {every // 2}")
    print(f"A learning curve of {wording.listed([f'{count:,}' for count in rows])} of {every:,} training rows")
    return rows


def _fit_svms(options: argparse.Namespace, rows: tuple[int, ...]) -> None:
    """The linear SVM on fewer rows, before the comparison reads it; no notebook, because it takes a second."""
    from finetune.data import load_data
    from finetune.evaluate import baselines

    for count in rows:
        resolved = _plan_of_base(options, fewer_rows(count))
        data = load_data(resolved)
        if not options.fresh and baselines.svm_is_fitted(resolved, data):
            print(f"reused: the linear SVM on {count:,} rows")
        else:
            fitted = baselines.fit_svm(resolved, data)
            alone = baselines.without_duplicates(fitted)
            print(f"the linear SVM on {count:,} rows: {fitted.scoring.accuracy:.1%} right; without duplicates {alone}")


def _plan_of_base(options: argparse.Namespace, variant: Mapping[str, Any] | None = None) -> Settings:
    overrides = applicable(_overrides(options), "base")
    return plan("base", options.profile, overrides | dict(variant or {}))


def _execute(options: argparse.Namespace, **trainings: Any) -> int:
    from finetune.runner import Suite

    # pyzmq's advice about event loops on Windows, and nbclient's about cell ids, are not for our users.
    warnings.filterwarnings("ignore", module="(zmq|nbformat|nbclient|papermill)")
    if options.force:
        os.environ["FINETUNE_FORCE"] = "1"
    # The notebooks work in another folder.
    for name in PLACES:
        if value := os.environ.get(f"FINETUNE_{name.upper()}"):
            os.environ[f"FINETUNE_{name.upper()}"] = located(name, value)
    overrides = _overrides(options)
    suite = Suite(options.profile, overrides, tuple(options.only), options.fresh, **trainings)
    reason = plan("base", options.profile, suite.overrides_for("base")).profile_reason
    print(f"Profile {suite.profile} ({reason}); the executed notebooks go to {suite.folder}")
    outcomes = suite.execute()
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if failed:
        print(f"failed: {wording.listed([one.step.name for one in failed])}; see {suite.folder}", file=sys.stderr)
        return 1
    if any(outcome.step.run is None for outcome in outcomes):
        _print_comparison(suite.place)
    return 0


def _print_comparison(place: str) -> None:
    from finetune.compare import comparison, tables, verdict

    compared = comparison.load(place)
    found = verdict.decide(compared)
    print(f"\n{tables.summary(compared).to_string()}\n\n{wrapped(found.text)}\n\n{wrapped(found.method)}")
    print(f"\nReport: {paths.results_folder(place) / 'report.html'}")


def wrapped(text: str) -> str:
    """A paragraph for a terminal of 80 columns."""
    return textwrap.fill(text, 79)


def _plan(options: argparse.Namespace) -> int:
    from rich.box import SIMPLE
    from rich.table import Table

    if options.memory is not None:
        return _plan_memory(options.memory)
    if options.run is None:
        raise UserError(f"name a run ({', '.join(METHODS)}), or a memory such as --memory 24GB")
    resolved = plan(options.run, options.profile, _overrides(options))
    profile = wrapped(f"{resolved.run}: profile {resolved.profile} ({resolved.profile_reason})")
    print(profile, wrapped(f"engine {resolved.engine} ({resolved.engine_reason})"), sep="\n")
    shown = Table(box=SIMPLE, pad_edge=False)
    shown.add_column("parameter", no_wrap=True)
    for name in ("value", "from"):
        shown.add_column(name, overflow="fold")
    chosen = True
    for name, line in resolved.table().iterrows():
        if chosen and line["from"] in DEFAULT:
            # Below the line nobody chose anything.
            shown.add_section()
        chosen = line["from"] not in DEFAULT
        shown.add_row(name, line["value"], line["from"])
    _print_table(shown)
    print("docs/parameters.md explains each parameter.")
    if resolved.recipe:
        from finetune.train import outlook

        there = machine.available_memory_bytes() / 1e9
        print(wrapped(f"memory, about: {outlook.of_run(resolved)}; {there:.1f} GB are free here"))
    return 0


def _print_table(shown: Table) -> None:
    from rich.console import Console

    # In a file, too, lines are for people.
    Console(width=None if sys.stdout.isatty() else 80, highlight=False, markup=False).print(shown)


def _plan_memory(size: int) -> int:
    from rich.box import SIMPLE
    from rich.table import Table
    from tqdm.auto import tqdm

    from finetune.config.shapes import SHAPES
    from finetune.train import outlook

    cuda = bool(size) or machine.has_cuda()
    size = size or machine.available_memory_bytes()
    kind = "on a GPU" if cuda else "on this CPU"
    print(f"Articles at once that fit into {size / 1e9:.0f} GB {kind}:")
    shown = Table(box=SIMPLE, pad_edge=False)
    shown.add_column("model", no_wrap=True)
    for name in outlook.COLUMNS:
        shown.add_column(name, justify="right")
    for name, cells in tqdm(outlook.table(size, cuda), total=len(SHAPES), leave=False):
        shown.add_row(name, *cells)
    _print_table(shown)
    print(
        wrapped(
            f"At most {outlook.LARGEST} are tried, of {outlook.TYPICAL.own[0]} tokens each. *: with "
            "gradient_checkpointing=plain. thrifty: "
            f"{' '.join(f'{name}={value}' for name, value in outlook.THRIFTY.items())}. Adapters of rank 16 on all "
            "linear layers, with transformers and Liger's kernels on a GPU."
        )
    )
    return 0


def _data(options: argparse.Namespace) -> int:
    from finetune.data import load_data

    print(load_data(plan("base", options.profile, _overrides(options))).table().to_string())
    return 0


def _merge(options: argparse.Namespace) -> int:
    from finetune.data import load_data
    from finetune.evaluate.find import find_run
    from finetune.evaluate.merge import merge

    found = find_run(options.run, options.profile, _overrides(options))
    print(merge(found, load_data(found)))
    return 0


def _report(options: argparse.Namespace) -> int:
    from finetune.compare import comparison, mistakes, publish, report

    asked = {"margin": options.margin, "save": options.save}
    # What is among the reference results may be published.
    if publish.FOLDER in options.folder.resolve().parents:
        print(publish.write_report(options.folder.resolve().name, **asked))
        return 0
    compared = comparison.load_folder(options.folder, options.folder.name)
    articles = mistakes.articles(compared.any_record)
    print(report.write_report(compared, options.folder / "report.html", articles, **asked))
    return 0


def _ablation(options: argparse.Namespace) -> int:
    from finetune.compare import ablation

    found = ablation.load(options.folder, options.other)
    print(f"{found.title}\n")
    for table in found.tables():
        print(f"{table.to_string()}\n")
    for note in (*found.notes(), found.provenance()):
        print(wrapped(note))
    return 0


def _publish(options: argparse.Namespace) -> int:
    from finetune.compare.publish import publish

    place = _plan_of_base(options).place
    print(publish(place, options.name or place))
    return 0


def _new(options: argparse.Namespace) -> int:
    from finetune.new import new

    by = "group" if options.group else "time" if options.time else None
    said = (options.group or options.time, options.merge_spellings, options.skip_incomplete, options.encoding)
    new(options.file, options.name, options.text, options.label, by, *said)
    return 0


def _results(options: argparse.Namespace) -> int:
    from finetune.compare.publish import regenerate

    changed = [f"written anew: {path}" for path in regenerate()]
    print("\n".join(changed) or "The figures in README and docs are those of the records.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
