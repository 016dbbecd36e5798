"""Where faults are provoked: what users do with a tiny model, in children that are forked from this process, and the
judgement of what a fault leaves."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from benchmarks.families import tiny_model, tiny_tokenizer
from data_prep import UserError
from data_prep.files import write_json
from finetune import __main__ as command_line
from finetune import paths, runner
from finetune.config import profiles
from finetune.notebooks import run_cells

TRAININGS = ("full", "lora", "qlora")
DATA = {"validation_rows": 24, "compute_dtype": "float32"}
EVALUATION = {"test_rows": 24, "generation_rows": 4}
TRAINING = {"test_rows": 24, "train_rows": 16, "num_train_epochs": 2, "eval_steps": 0.5, "save_steps": 0.25}
# What differs between two runs of the same: when, how long, and how much memory was free.
VOLATILE = re.compile(
    r"environment|.*seconds|.*per_second|peak_memory.*|device_peak_bytes|energy_joules|choices|precision|digest"
)
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


class Ended(NamedTuple):
    """How a child ended: its exit code, or the negative number of the signal; and what it printed."""

    code: int
    text: str

    @property
    def sentence(self) -> str:
        said = re.findall(r"(?:error: |Resuming|Discarding|interrupted)[^\r\n]*", self.text)
        return said[-1].removeprefix("error: ") if said else ""


class Lab:
    """A tiny model, what users do with it, and what an uninterrupted run leaves.

    Attributes:
        works: What users do, by name.
        before: The folder of outputs before each.
        whole: The digest of every file after it.
        events: The files that it opened to write, renamed or removed, in their order.
        found: A line for each provoked fault.
    """

    def __init__(self, folder: Path):
        self.folder, self.model, self.home = folder, folder / "model", folder / "home"
        self.before, self.whole, self.events = {}, {}, {}
        self.found: list[dict[str, Any]] = []
        self._noted: list[str] = []
        self._fault: tuple[int, Callable[[str], None], float] = (0, print, 0)
        model, self.place = {"model": str(self.model)}, profiles.place("cpu", "ag_news", str(self.model))
        self.works: dict[str, Callable[[], Any]] = {
            "data": command("data", model | DATA),
            "base": notebook("base_model_performance", "class_table", model | EVALUATION | DATA | {"train_rows": 16}),
            **{run: notebook(f"fine_tuning_{run}", "training_curves", model | DATA | TRAINING) for run in TRAININGS},
            "evaluation": notebook("lora_finetuning_performance", "plots.confusion", model | EVALUATION),
            "merge": command("merge", model | EVALUATION, "lora"),
            "report": lambda: command_line.main(["report", str(paths.results_folder(self.place))]),
            "run": partial(run_again, model | EVALUATION | DATA | TRAINING),
        }
        tokenizer = tiny_tokenizer()
        tiny_model("llama", {}, tokenizer).save_pretrained(self.model)
        tokenizer.save_pretrained(self.model)
        sys.addaudithook(self._note)
        for name in self.works:
            self.keep(name)

    def _note(self, event: str, given: tuple) -> None:
        """Note what is changed in the folder of outputs, and inject a fault at its time."""
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
        if event not in CHANGES or (event == "open" and not (isinstance(given[2], int) and given[2] & writes)):
            return
        if str(given[0]).startswith(f"{self.home}/"):
            self._noted.append(f"{event} {Path(str(given[0])).relative_to(self.home)}")
            at, act, times = self._fault
            if at <= len(self._noted) < at + times:
                act(event)

    def watch(self, at: int, act: Callable[[str], None], times: float = 1) -> None:
        """In a child: call `act` at the at-th change in the folder of outputs, and so many times."""
        self._noted, self._fault = [], (at, act, times)

    def keep(self, name: str) -> None:
        """Do a work undisturbed, and keep what was there before and after. In this process: late imports, compiled
        expressions and templates, and what a training will take are there for all children."""
        self.home.mkdir(exist_ok=True)
        self.before[name] = shutil.copytree(self.home, self.folder / "before" / name)
        os.environ["FINETUNE_HOME"], self._noted = str(self.home), []
        with (self.folder / "log").open("w") as log, contextlib.redirect_stdout(log):
            code = self.works[name]()
        if code:
            raise RuntimeError(f"{name} fails even undisturbed:\n{(self.folder / 'log').read_text()}")
        self.whole[name], self.events[name] = left(self.home), self._noted
        gc.freeze()

    def run(self, work: Callable[[], Any], fault: Callable[[], None] = lambda: None) -> Ended:
        """Do something in a child, with a fault."""
        log = self.folder / "log"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            return Ended(code, log.read_text(errors="replace"))
        code = 1
        try:
            with log.open("wb", 0) as file:
                os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            os.environ["FINETUNE_HOME"] = str(self.home)
            signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGHUP, signal.SIG_DFL)
            # What hangs has failed.
            signal.alarm(300)
            fault()
            code = work() or 0
        except UserError as error:
            print(f"error: {error}")
            code = 2
        except KeyboardInterrupt:
            print("interrupted")
            code = 130
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)

    def start(self, name: str) -> None:
        """The folder of outputs as it was before a work."""
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.copytree(self.before[name], self.home)

    def interrupt(
        self, fault: str, work: str, inject: Callable[[], None], after: Callable[[], None] = lambda: None
    ) -> None:
        """Do a work with a fault, and then again without."""
        first = self.run(self.works[work], inject)
        after()
        could_resume = any(self.home.glob("checkpoints/.training/*/checkpoint-*/whole.json"))
        again = self.run(self.works[work])
        lost = again.code != 0 or (could_resume and "Resuming" not in again.text)
        self.judge(fault, work, lost, again.code == 0 and left(self.home) != self.whole[work], first, again)

    def endure(self, fault: str, case: str, work: str, inject: Callable[[], None] = lambda: None) -> None:
        """Do a work with a fault that must end in a sentence, or in the bytes of the undisturbed work."""
        ended = self.run(self.works[work], inject)
        # What is damaged is not reused.
        differs = "done  " not in ended.text if work == "run" else left(self.home) != self.whole.get(work)
        silent = ended.code == 0 and differs
        self.judge(fault, case, ended.code not in (0, 2), silent, ended)

    def judge(self, fault: str, case: str, lost: bool, silent: bool, *ended: Ended) -> None:
        shown = "".join(of.text for of in ended)
        sentence = next((of.sentence for of in ended if of.sentence), "").replace(str(self.folder), "")
        line = {"fault": fault, "case": case, "codes": [of.code for of in ended], "lost": lost, "silent": silent}
        self.found.append(line | {"traceback": "Traceback (most recent" in shown, "sentence": sentence})
        print(f"{len(self.found):4} {fault}: {case}", flush=True)
        if lost or silent or self.found[-1]["traceback"]:
            print(self.found[-1], shown[-3000:], sep="\n", flush=True)


def command(name: str, values: dict[str, Any], *more: str) -> Callable[[], int]:
    """A command as a user gives it."""
    arguments = [name, *more, "--profile=cpu", *(f"--set={key}={value}" for key, value in values.items())]
    return lambda: command_line.main(arguments)


def notebook(name: str, until: str, values: dict[str, Any]) -> Callable[[], int]:
    """A notebook's cells, up to the first with this text."""
    return lambda: run_cells(name, until, PROFILE="cpu", OVERRIDES=values) and 0


def run_again(values: dict[str, Any]) -> int:
    """The command `run`, of which a step that would be executed is only named."""

    def execute(suite: runner.Suite, step: runner.Step, *_: Any) -> runner.Outcome:
        write_json(suite._stamp(step), {"key": suite._key(step), "seconds": 1.0, "commit": "here"})
        return runner.Outcome(step, "done")

    with (
        mock.patch.object(runner.Suite, "_execute", execute),
        mock.patch.object(runner, "Kernels", contextlib.nullcontext),
    ):
        for outcome in runner.Suite("cpu", values, ("base", "lora")).execute():
            print(outcome)
    return 0


def left(home: Path) -> dict[str, str]:
    """The digest of every file that a user sees, by its path; of records without what is never the same twice."""
    found = {}
    for path in sorted(path for path in home.rglob("*") if path.is_file()):
        name = path.relative_to(home)
        if name.name == "README.md" or any(part.startswith((".", "tensorboard")) for part in name.parts):
            continue
        content = path.read_bytes()
        if name.name in ("record.json", "merged.json"):
            with contextlib.suppress(ValueError):
                content = json.dumps(lasting(json.loads(content))).encode()
        found[str(name)] = hashlib.sha256(content).hexdigest()
    return found


def lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: lasting(of) for key, of in value.items() if not VOLATILE.fullmatch(key)}
    return [lasting(of) for of in value] if isinstance(value, list) else value
