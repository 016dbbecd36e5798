"""What our trainers add to the libraries': one process a folder, a clock, signals, and validation by scoring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from IPython import get_ipython
from transformers import EarlyStoppingCallback, ProgressCallback, TrainerCallback, TrainingArguments
from transformers.utils.notebook import NotebookProgressCallback

from data_prep import Task, UserError
from data_prep.files import writing
from finetune import files, machine, metrics
from finetune.evaluate import score
from finetune.model import load
from finetune.train.callbacks import Clock, EvaluateAtTheEnd, SaveOnSignal, ShowProgress, StopOnNonFiniteLoss
from finetune.train.portions import Portions


class Watched:
    """A part of a trainer, before transformers' `Trainer` among its bases.

    Attributes:
        scorer: Gives the labels' probabilities of validation rows.
        checks: What was found before the training, in words.
    """

    scorer: score.LabelScorer
    checks: dict[str, str]

    def watching(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        callbacks: Sequence[TrainerCallback],
        early_stopping_patience: int | None,
        collate: Callable | None = None,
    ) -> list[TrainerCallback]:
        """All callbacks of a training, in their order, before the trainer is made; `collate` gives batches that can be
        halved."""
        self.added_callbacks, self.early_stopping_patience = list(callbacks), early_stopping_patience
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.portions = Portions(collate, self._trained)
        self.clock, self.signals, self._is_silent = Clock(self.portions), SaveOnSignal(self.portions), False
        # Where several GPUs are visible the trainer would split each batch (DataParallel), and no row can be split.
        args._n_gpu = min(1, args.n_gpu)
        stopping = [EarlyStoppingCallback(early_stopping_patience)] if early_stopping_patience else []
        return [self.clock, EvaluateAtTheEnd(), StopOnNonFiniteLoss(), *stopping, *callbacks, self.signals]

    def watch(self, prompts: Sequence[list[int]], labels: Sequence[str], task: Task) -> None:
        """Watch validation rows, once the trainer is made."""
        self._watched, self._labels = (prompts, labels), task.labels
        shell = get_ipython()
        if shell and "IPKernelApp" in shell.config:
            # transformers decides when it is imported, which was before a forked kernel was one.
            for shown in (ProgressCallback, NotebookProgressCallback):
                self.remove_callback(shown)
            self.add_callback(ShowProgress)
        if getattr(self.model, "peft_config", None):
            # TRL rounds a 4-bit base's adapter to bf16 (1.14, SFTTrainer.__init__), in which small updates are lost,
            # and from which a resumed training departs: peft loads adapters in fp32. A head has the model's type.
            for parameter in self._trained:
                parameter.data = parameter.data.float()
        for name, check in self.checks.items():
            print(f"{name}: {check}")

    def train(self, resume_from_checkpoint: str | None = None, **named):
        """TRL's, except that an interrupted training saves a checkpoint first, and that `args.output_dir` belongs to
        this process until `save_run` has saved the model.

        Raises:
            UserError: Another process trains there; one article does not fit into the memory, or the optimiser does
                not; or a signal came or memory ran short, and the sentence says where the training goes on.
        """
        if machine.rank() == 0:
            files.own(Path(self.args.output_dir))
        # Where the training goes on is no point of the uninterrupted one's history.
        self._is_silent = self.args.eval_on_start and resume_from_checkpoint is not None
        try:
            with writing(Path(self.args.output_dir)), self.signals:
                ended = super().train(resume_from_checkpoint, **named)
        except (MemoryError, RuntimeError) as error:
            # On a CPU, PyTorch has no type of its own for it.
            if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            # A packed batch was halved before it came to this.
            what, change = "a batch does not fit beside the model", "a smaller per_device_train_batch_size"
            if self.packed:
                what, change = "gradients and optimiser do not fit beside the model", "LoRA or QLoRA, optim=adamw_8bit"
            raise UserError(
                f"out of memory after step {self.state.global_step}: {what}. Use {change}, or end other programs and "
                "kernels"
            ) from error
        if self.args.load_best_model_at_end:
            self.checks["kept weights"] = (
                f"those of step {self.state.best_global_step} of {self.state.global_step}, with "
                f"{self.state.best_metric:.1%} of the validation rows right"
            )
            print(f"kept weights: {self.checks['kept weights']}")
        return ended

    def autocast(self) -> torch.autocast:
        """A context in which fp32 weights are multiplied in bf16, where `args.bf16` says so."""
        return torch.autocast(machine.device(), dtype=torch.bfloat16, enabled=self.args.bf16)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Accuracy and log loss of the validation rows' labels by scoring; the training's clock stands still."""
        self.clock.pause()
        prompts, labels = self._watched
        load.evaluating(self.model)
        # The same products as in training; the labels' probabilities are formed in fp32.
        try:
            with self.autocast():
                probabilities = np.array(score.divided(self.scorer.score, prompts))
        except UserError:
            # Several processes save together, or not at all.
            if self.is_in_train and self.state.global_step and machine.processes() == 1:
                self._save_checkpoint(self.model, trial=None)
                self.callback_handler.on_save(self.args, self.state, self.control)
            raise
        # Scoring has taken smaller batches by now.
        self.signals.memory.shortage()
        if not np.isfinite(probabilities).all():
            # The last step's loss still was a number.
            raise UserError(
                f"the model's scores are no numbers after step {self.state.global_step}; lower learning_rate, or set "
                "dtype=float32"
            )
        self.model.train()
        accuracy = float(np.mean(np.equal(score.predicted_labels(probabilities, self._labels), labels)))
        found = {
            f"{metric_key_prefix}_accuracy": accuracy,
            f"{metric_key_prefix}_log_loss": metrics.log_loss(labels, probabilities, self._labels),
        }
        if not self._is_silent:
            self.log(found | {"training_seconds": self.clock.seconds})
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, dict(found))
        self._is_silent = False
        self.clock.go_on()
        return found
