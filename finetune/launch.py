"""A notebook's training or evaluation on several processes, through `accelerate launch`.

`run --processes N` gives each process the notebook, with its own recipe and edited cells: it runs the cells to the one
that saves. The first process prints, and writes the record. The notebook itself waits, reads the record and goes on.

On several machines, each runs `accelerate launch --config_file FILE ... -m finetune.launch NOTEBOOK`; see
docs/several-gpus.md.
"""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import nbformat

from data_prep import UserError
from data_prep.files import replacing
from finetune import machine, paths, records

CONFIGS = paths.PROJECT / "finetune" / "accelerate"
STRATEGIES = ("ddp", "fsdp2")
# The cell that the processes begin with what the notebook leaves to them, and the one that they end with.
BEGINS, ENDS = ("resolve(settings", "load_model("), ("save_run(settings", "evaluate(found")
# What a process writes before its last words.
FAILED = "PROCESS FAILED "
FAILURE = re.compile(r"host\s*: (\S+)\s+rank\s*: (\d+).*\s+exitcode\s*: (-?\d+)")


def processes_for(asked: str) -> int:
    """How many processes `--processes` asks for; plans that are made from here on know it.

    Raises:
        UserError: It is no number from 1, or there are fewer GPUs.
    """
    if asked == "1":
        return 1
    import torch

    gpus = torch.cuda.device_count()
    if asked != "auto" and (not asked.isdecimal() or int(asked) == 0):
        raise UserError(f"--processes {asked}: give a whole number from 1, or auto for all visible GPUs")
    count = max(1, gpus) if asked == "auto" else int(asked)
    if machine.has_cuda() and count > gpus:
        raise UserError(f"--processes {asked}: each needs a GPU of its own, and {gpus} can be seen here")
    if count > 1:
        os.environ["FINETUNE_PROCESSES"] = str(count)
    return count


def driver(notebook: nbformat.NotebookNode, file: Path, processes: int, strategy: str) -> nbformat.NotebookNode:
    """A notebook whose kernel starts processes for the cells that train or evaluate, and reads what they recorded.

    Args:
        notebook: With its parameters. It is written to `file`, which the processes run.
        file: A notebook's path.
        processes: How many.
        strategy: `ddp` or `fsdp2`; an evaluation takes `ddp`, as each process scores with the whole model.

    Returns:
        The notebook as it is, for one process.

    Raises:
        UserError: It has no such cells, or one that is not plain Python.
    """
    if processes == 1:
        return notebook
    cells = [number for number, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    last = _last(notebook)
    first = next(number for number in cells if any(text in notebook.cells[number].source for text in BEGINS))
    for number in cells[: cells.index(last) + 1]:
        if re.search(r"^\s*[%!]", notebook.cells[number].source, re.MULTILINE):
            raise UserError(f"cell {number + 1} has a line that begins with % or !, which the processes cannot run")
    with replacing(file) as written:
        nbformat.write(notebook, written)
    notebook = copy.deepcopy(notebook)
    for number in cells[cells.index(first) : cells.index(last) + 1]:
        notebook.cells[number].metadata.setdefault("tags", []).append("skip-execution")
    trains = "save_run(" in notebook.cells[last].source
    place, strategy = ("settings.run_folder", strategy) if trains else ("found.folder", "ddp")
    source = (
        "from finetune.compare import plots\nfrom finetune.launch import launch\n\n"
        f"# The cells above, from `{notebook.cells[first].source.splitlines()[-1]}` on, ran there.\n"
        f"record = launch({str(file)!r}, {processes}, {strategy!r}, {place})"
    )
    notebook.cells.insert(last + 1, nbformat.v4.new_code_cell(source))
    return notebook


def _last(notebook: nbformat.NotebookNode) -> int:
    """The number of the cell that saves."""
    sources = [cell.source if cell.cell_type == "code" else "" for cell in notebook.cells]
    found = [number for number, source in enumerate(sources) if any(text in source for text in ENDS)]
    if not found:
        raise UserError(f"the notebook has no cell with {' or '.join(ENDS)}: processes would not know where to end")
    return found[0]


def launch(notebook: str, processes: int, strategy: str, folder: Path) -> records.RunRecord:
    """Run a notebook's cells on several processes of this machine, show what the first one prints, and read the record.

    Raises:
        UserError: A process failed, or died; the sentence names it. All others have ended then.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{strategy}.yaml")]
    threads = max(1, machine.usable_cores() // processes)
    command += ["--num_processes", str(processes), "--main_process_port", "0"]
    command += ["--num_cpu_threads_per_process", os.environ.get("OMP_NUM_THREADS", str(threads))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(paths.PROJECT), os.environ.get("PYTHONPATH", "")])}
    log = Path(notebook).with_suffix(".log")
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [*command, "-m", "finetune.launch", notebook],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment | {"MPLBACKEND": "agg"},
        ) as running,
    ):
        try:
            for line in running.stdout:
                print(line, end="", flush=True)
        except KeyboardInterrupt:
            # The processes save a checkpoint, and say so.
            running.terminate()
            running.wait()
    if running.returncode:
        raise UserError(_failure(log.read_text(errors="replace"), log))
    log.unlink()
    return records.read(folder)


def _failure(said: str, log: Path) -> str:
    """What ended the processes, in a sentence: the first one that was killed, or the first that said why."""
    for host, rank, code in FAILURE.findall(said):
        if int(code) < 0 and -int(code) != signal.SIGTERM:
            return (
                f"process {rank} on {host} died ({signal.Signals(-int(code)).name}), and the others were ended: run "
                "this again to go on from the last checkpoint"
            )
    words = [line.removeprefix(FAILED) for line in said.splitlines() if line.startswith(FAILED)]
    return words[0] if words else f"the processes could not run: see {log}"


def main(notebook: str) -> None:
    """Be one of the processes: run a notebook's code cells to the one that saves."""
    import torch
    from accelerate import PartialState

    if machine.rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        PartialState(cpu=not machine.has_cuda())
        read = nbformat.read(notebook, as_version=4)
        names: dict[str, object] = {"__name__": "__main__"}
        for cell in read.cells[: _last(read) + 1]:
            if cell.cell_type == "code":
                exec(compile(cell.source, notebook, "exec"), names)
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc()
        words = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        first = "" if isinstance(error, UserError) else f"process {machine.rank()}: "
        print(f"{FAILED}{first}{words}".replace("\n", " "), file=sys.stderr, flush=True)
        # At once: to take leave of processes that wait for this one takes minutes.
        os._exit(1)
    finally:
        sys.stdout.flush()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
