"""What watches a training: its clock, last evaluation, table of progress, signals, and a loss that is no number."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from pathlib import Path

from transformers import TrainerCallback
from transformers.utils.notebook import NotebookProgressCallback, NotebookTrainingTracker

from data_prep import UserError
from data_prep.files import write_json
from finetune import machine
from finetune.files import file_digests, sync_folder
from finetune.train import energy
from finetune.train.portions import Portions

# Written last into a checkpoint, with the digest of each of its files: one without it was cut short.
WHOLE = "whole.json"
PROGRESS = "progress.json"
SECONDS_BETWEEN_REPORTS = 1


class Clock(TrainerCallback):
    """Counts seconds, energy and peak memory of training, without those of validation, across interruptions; reports
    progress in the trainer's output folder, and marks checkpoints that are whole.

    Args:
        portions: How many articles a pass has; a training that goes on takes no more than before.

    Attributes:
        training: Digest of what decides the training's weights; its checkpoints carry it.
    """

    def __init__(self, portions: Portions):
        self._portions = portions
        self.training: str | None = None
        self.seconds = 0.0
        self.energy = energy.EnergyMeter()
        self.peak_memory: tuple[int, str] | None = None
        self._since = 0.0
        self._resumed_at = 0
        self._before = 0.0
        self._reported = -math.inf

    def pause(self) -> None:
        # What was launched is not done yet; it must not count as validation.
        machine.wait_for_gpu()
        self.seconds += time.perf_counter() - self._since
        self.energy.stop()

    def go_on(self) -> None:
        self.energy.start()
        self._since = time.perf_counter()

    def on_train_begin(self, args, state, control, **_) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE
        if state.global_step and checkpoint.is_file():
            before = json.loads(checkpoint.read_bytes())
            self.seconds = before["seconds"]
            self.energy.go_on_from(before.get("joules"))
            self._portions.largest, self._portions.note = before.get("largest"), before.get("note", "")
        self._resumed_at, self._before = state.global_step, self.seconds
        machine.reset_peak_memory()
        self.go_on()

    def on_step_end(self, args, state, control, **_) -> None:
        # Small models take a hundred steps a second; a file each would take longer.
        if time.monotonic() - self._reported < SECONDS_BETWEEN_REPORTS:
            return
        self._reported = time.monotonic()
        seconds = self.seconds + time.perf_counter() - self._since
        pace = (seconds - self._before) / (state.global_step - self._resumed_at)
        write_json(
            Path(args.output_dir) / PROGRESS,
            {
                "run": Path(args.output_dir).name,
                "step": state.global_step,
                "total_steps": state.max_steps,
                "seconds_left": round(pace * (state.max_steps - state.global_step)),
                "updated": time.time(),
            },
        )

    def on_save(self, args, state, control, **_) -> None:
        self.pause()
        self.go_on()
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        sync_folder(checkpoint)
        mark = {"training": self.training, "seconds": self.seconds, "joules": self.energy.joules}
        mark |= {"largest": self._portions.largest, "note": self._portions.note}
        write_json(checkpoint / WHOLE, mark | {"files": file_digests(checkpoint)})

    def on_train_end(self, args, state, control, **_) -> None:
        self.pause()
        self.peak_memory = machine.peak_memory()
        (Path(args.output_dir) / PROGRESS).unlink(missing_ok=True)


class EvaluateAtTheEnd(TrainerCallback):
    """Evaluates after the last step, which is not always a multiple of `eval_steps`, and saves what may be the best."""

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True
            control.should_save |= args.load_best_model_at_end


class ShowProgress(NotebookProgressCallback):
    """transformers' bar and table in a notebook, whose table has the validation rows' figures, to a few digits."""

    def on_train_begin(self, args, state, control, **_) -> None:
        self.training_tracker = NotebookTrainingTracker(state.max_steps)

    def on_log(self, args, state, control, **_) -> None:
        """A line for each evaluation, not for each loss: the notebook draws those."""

    def on_evaluate(self, args, state, control, metrics=None, **_) -> None:
        # Outside a training its caller gets the figures.
        if self.training_tracker is None:
            return
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        self.training_tracker.write_line(
            {
                "step": state.global_step,
                "training loss": f"{losses[-1]:.3f}" if losses else "",
                "validation accuracy": f"{metrics['eval_accuracy']:.1%}",
                "validation log loss": f"{metrics['eval_log_loss']:.3f}",
            }
        )
        self.training_tracker.remove_child()
        self._force_next_update = True


class StopOnNonFiniteLoss(TrainerCallback):
    """Ends a training whose loss is no number: it never recovers, and would fill hours with nothing."""

    def on_log(self, args, state, control, logs=None, **_) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise UserError(
                f"the loss became {loss} at step {state.global_step}; lower learning_rate, or set dtype=float32"
            )


class SaveOnSignal(TrainerCallback):
    """Saves a checkpoint after the step during which SIGINT, SIGTERM or SIGHUP came or memory ran short, and ends the
    training; a second signal ends it at once. A context manager around the training.

    Args:
        portions: Has smaller passes when a training goes on that memory ended.

    Attributes:
        received: The signal's name, or how memory ran short, once it has.
        memory: What is read of the memory meanwhile.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, portions: Portions):
        self._portions = portions
        self.received: str | None = None
        self.memory = machine.MemoryWatch()

    def __enter__(self) -> SaveOnSignal:
        self.received, self._interrupted = None, False
        # Only the main thread may set handlers; a signal in a training of another thread ends the process as before.
        # What is ignored stays so: under nohup, SIGHUP is to end nothing.
        here = threading.current_thread() is threading.main_thread()
        heard = [number for number in self.SIGNALS if here and signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heard}
        self.memory.__enter__()
        return self

    def __exit__(self, *_) -> None:
        self.memory.__exit__()
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, _) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self.received, self._interrupted = signal.Signals(number).name, True
        print(f"{self.received}: we save a checkpoint after this step. Interrupt again to stop at once.", flush=True)

    def on_step_end(self, args, state, control, **_) -> None:
        shortage = self.memory.shortage()
        # A last step ends the training anyway, and its artefact is saved.
        if state.global_step >= state.max_steps:
            return
        if shortage and not self.received:
            self.received = f"Too little memory ({shortage})"
            self._portions.halve(state.global_step)
            # It would come before the checkpoint, and takes memory.
            control.should_evaluate = False
        if self.received:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **_) -> None:
        if self.received and state.global_step < state.max_steps:
            first = "" if self._interrupted else "end other programs and kernels, then "
            raise UserError(
                f"{self.received} ended the training after step {state.global_step} of {state.max_steps}. A checkpoint "
                f"is saved: {first}run this notebook or command again to go on"
            )
        self.received = None
