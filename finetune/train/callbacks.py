"""What watches a training: its clock, the validation rows, and the end of one whose loss is no number."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import TrainerCallback
from trl import SFTTrainer

from data_prep import Example, UserError
from data_prep.files import write_json
from finetune import machine, metrics, paths
from finetune.config.plan import Settings
from finetune.evaluate import score
from finetune.model import encode, load, packing
from finetune.model.precision import Precision
from finetune.train import energy

# Written last into a checkpoint: one without it was cut short.
WHOLE = "whole.json"
SECONDS_BETWEEN_REPORTS = 1


def newest_whole_checkpoint(state: Path) -> Path | None:
    """The checkpoint to resume from; one that was cut short while it was written does not count."""
    whole = [path.parent for path in state.glob(f"checkpoint-*/{WHOLE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class Clock(TrainerCallback):
    """Counts seconds and energy of training, without those of validation, across interruptions; reports progress."""

    def __init__(self, settings: Settings):
        self.seconds = 0.0
        self.energy = energy.EnergyMeter()
        self._since = 0.0
        self._resumed_at = 0
        self._before = 0.0
        self._reported = 0.0
        # A variant's too: `lora/seed-43`.
        self._run = str(settings.run_folder.relative_to(paths.results_folder(settings.profile)))
        self._progress = settings.run_folder / "progress.json"

    def pause(self) -> None:
        # What was launched is not done yet; it must not count as validation.
        machine.wait_for_gpu()
        self.seconds += time.perf_counter() - self._since
        self.energy.stop()

    def go_on(self) -> None:
        self.energy.start()
        self._since = time.perf_counter()

    def on_train_begin(self, args, state, control, **_) -> None:
        checkpoint = newest_whole_checkpoint(Path(args.output_dir))
        if state.global_step and checkpoint:
            before = json.loads((checkpoint / WHOLE).read_text())
            self.seconds = before["seconds"]
            self.energy.go_on_from(before.get("joules"))
        self._resumed_at, self._before = state.global_step, self.seconds
        self.go_on()

    def on_step_end(self, args, state, control, **_) -> None:
        # Small models take a hundred steps a second; a file each would take longer.
        if time.time() - self._reported < SECONDS_BETWEEN_REPORTS:
            return
        self._reported = time.time()
        seconds = self.seconds + time.perf_counter() - self._since
        pace = (seconds - self._before) / (state.global_step - self._resumed_at)
        write_json(
            self._progress,
            {
                "run": self._run,
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
        write_json(
            checkpoint / WHOLE, {"step": state.global_step, "seconds": self.seconds, "joules": self.energy.joules}
        )

    def on_train_end(self, args, state, control, **_) -> None:
        self.pause()
        self._progress.unlink(missing_ok=True)


class ValidationWatch(TrainerCallback):
    """Scores the validation rows several times during a training, and logs accuracy and log loss."""

    trainer: SFTTrainer
    clock: Clock

    def __init__(
        self,
        backbone: packing.Backbone,
        precision: Precision,
        tokenizer,
        examples: Sequence[Example],
        encoded: Sequence[encode.Encoded],
        settings: Settings,
    ):
        self._scorer = score.LabelScorer(
            backbone, tokenizer, settings.task, settings.experiment.per_device_eval_batch_size
        )
        self._precision = precision
        self._classes = settings.task.labels
        self._labels = [example.label for example in examples]
        self._prompts = [row.prompt for row in encoded]
        self._share = settings.recipe.eval_steps
        self._on_start = settings.recipe.eval_on_start or settings.recipe.cuda_graphs

    def on_train_begin(self, args, state, control, model=None, **_) -> None:
        """The model as it begins: where the curve starts. It also is the longest row that the model will see, so that
        what grows with rows (Unsloth's tables of rotary embeddings) has its size and place before a CUDA graph reads
        it: replaced later, it left graphs with freed memory, and losses of NaN."""
        if self._on_start:
            self._validate(model, control)

    def on_step_end(self, args, state, control, model=None, **_) -> None:
        if state.global_step in _spread(state.max_steps, self._share):
            self._validate(model, control)

    def _validate(self, model, control) -> None:
        self.clock.pause()
        load.evaluating(model)
        # The same products as in training; the labels' probabilities are formed in fp32.
        with self._precision.autocast():
            probabilities = self._scorer.score(self._prompts)
        model.train()
        predicted = score.predicted_labels(probabilities, self._classes)
        # Logging clears the flag that this step's loss is due to be logged too.
        due = control.should_log
        self.trainer.log(
            {
                "validation_accuracy": float(np.mean(np.equal(predicted, self._labels))),
                "validation_log_loss": metrics.log_loss(self._labels, probabilities, self._classes),
                "training_seconds": self.clock.seconds,
            }
        )
        control.should_log = due
        self.clock.go_on()


class StopOnNonFiniteLoss(TrainerCallback):
    """Ends a training whose loss is no number: it never recovers, and would fill hours with nothing."""

    def on_log(self, args, state, control, logs=None, **_) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise UserError(
                f"the loss became {loss} at step {state.global_step}; lower learning_rate, or set dtype=float32"
            )


def _spread(steps: int, share: float) -> set[int]:
    """The steps after each `share` of all, and the last."""
    return {max(1, round(steps * min(1.0, share * part))) for part in range(1, math.ceil(1 / share) + 1)}
