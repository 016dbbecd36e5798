"""One training on several processes: the same updates as on one, whatever their number.

Accelerate wraps the model in PyTorch's DDP, or cuts it into parts (FSDP2). What is ours is the share of each process:
its part of every update's rows, and checkpoints that any number of processes can go on from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import DistributedType
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import Sampler
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from trl import SFTConfig, SFTTrainer

from data_prep import UserError
from finetune import machine
from finetune.model.encode import IGNORED


def share(batch: int, accumulation: int, processes: int) -> tuple[int, int]:
    """Articles of a forward pass and passes of an update for each process, so that all together make the update of one.

    Raises:
        UserError: An update's articles cannot be shared out evenly.
    """
    update = batch * accumulation
    if update % processes:
        fit = [str(number) for number in range(1, update + 1) if update % number == 0]
        raise UserError(
            f"{processes} processes cannot share updates of {update} articles ({batch} x {accumulation}) evenly: take "
            f"{', '.join(fit[:-1])} or {fit[-1]} processes, or another per_device_train_batch_size"
        )
    own = update // processes
    size = max(number for number in range(1, min(batch, own) + 1) if own % number == 0)
    return size, own // size


class Rounded(Sampler[int]):
    """The rows in the order of one process, then blank ones until each process gets as many batches.

    Args:
        rows: The training rows.
        blank: The number of a row without loss.
        multiple: Rows of a batch, times processes.
        seed: Of the order.
        epoch: Says which one it is. Accelerate tells its samplers, but not where a resumed training skips batches.
    """

    def __init__(self, rows: Dataset, blank: int, multiple: int, seed: int | None, epoch: Callable[[], int]):
        self._sampler = SeedableRandomSampler(rows, data_seed=seed)
        self._blank, self._blanks, self._epoch = blank, -len(rows) % multiple, epoch

    def __len__(self) -> int:
        return len(self._sampler) + self._blanks

    def __iter__(self) -> Iterator[int]:
        self._sampler.set_epoch(self._epoch())
        yield from self._sampler
        yield from repeat(self._blank, self._blanks)


def with_blank(rows: Dataset, shared: int) -> Dataset:
    """The rows, and behind them one that carries no loss: what all begin with, and a token."""
    row = {name: values[: shared + 1] for name, values in rows[0].items()}
    blank = Dataset.from_list([row | {"labels": [IGNORED] * len(row["labels"])}], features=rows.features)
    return concatenate_datasets([rows, blank])


def _whole(value: Any, keep: bool) -> Any:
    """A part's tensor with all parts together, on the CPU; all processes ask for it, and some keep it."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.cpu() if keep and isinstance(value, torch.Tensor) else value


def whole_weights(model: nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """What is trained of a model in parts, by name, with its buffers: as if it was in one piece."""
    saved = model.state_dict()
    trained = [(name, parameter.detach()) for name, parameter in model.named_parameters() if parameter.requires_grad]
    found = [*trained, *model.named_buffers()]
    whole = ((name, _whole(value, keep)) for name, value in found if name in saved)
    return {name: value for name, value in whole if keep}


def whole_optimizer(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """The state of an optimiser in parts, in the form that it has in one piece."""
    state = optimizer.state_dict()
    moments = {
        number: {name: _whole(value, keep) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return state | {"state": moments}


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Load a checkpoint in one piece into a model in parts."""
    saved = {name: value for file in checkpoint.glob("*model*.safetensors") for name, value in load_file(file).items()}
    for name, value in model.state_dict().items():
        # PEFT leaves the adapter's name out.
        whole = saved.get(name.replace(".default.", "."))
        if whole is not None:
            value.copy_(_parted(whole, value) if isinstance(value, DTensor) else whole)


def load_optimizer(optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Load an optimiser's state in one piece into one in parts."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["state"].items():
        like = parameters[number]
        for name, value in values.items():
            if isinstance(like, DTensor) and value.shape == like.shape:
                values[name] = _parted(value, like)
    optimizer.load_state_dict(state)


def _parted(whole: torch.Tensor, like: DTensor) -> DTensor:
    return distribute_tensor(whole.to(like.device, like.dtype), like.device_mesh, like.placements)


class SharedTraining(SFTTrainer):
    """What a trainer needs besides to be one of several processes. In one process it is TRL's.

    Attributes:
        update: Articles of a pass and passes of an update, as the recipe has them.
    """

    update: tuple[int, int]
    update_in_backward: bool
    _shared = 0
    _several = False

    def divide(self, args: SFTConfig, reads_images: bool) -> None:
        """Set the arguments of one of several processes.

        Raises:
            UserError: The update cannot be shared out, or the recipe is for one process.
        """
        if not args.packing or self.update_in_backward:
            raise UserError("packing=False and update_in_backward=True train in one process: leave --processes out")
        args.per_device_train_batch_size, args.gradient_accumulation_steps = share(*self.update, machine.processes())
        # An image's tower has no part in the loss.
        args.ddp_find_unused_parameters, args.ddp_broadcast_buffers = reads_images, False
        if machine.strategy() == "FSDP2":
            if args.optim == "adamw_8bit":
                raise UserError("adamw_8bit knows no weights in parts (fsdp2): set optim=adamw_torch_fused")
            # The loss's own autocast does what it does in one process; Accelerate's would hold bf16 weights in fp32.
            args.mixed_precision = "no"
            # Gradients that wait for the update's last pass would be those of the whole model.
            args.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True}
            if args.use_cpu:
                # Accelerate knows FSDP2 on accelerators alone, PyTorch on a CPU too.
                args.distributed_state.distributed_type = DistributedType.MULTI_GPU

    def get_train_dataloader(self):
        if not self._several:
            return super().get_train_dataloader()
        rows, multiple = self.train_dataset, self.args.per_device_train_batch_size * machine.processes()
        order = Rounded(rows, len(rows), multiple, self.args.data_seed, lambda: int(self.state.epoch or 0))
        return self._get_dataloader(
            with_blank(rows, self._shared), "Training", self._train_batch_size, lambda _: order, True
        )

    # Checkpoints of a model in parts are those of a model in one piece, so that one process can go on from them.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        weights = whole_weights(self.model, self.args.should_save)
        if self.args.should_save:
            self._save(output_dir, weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = whole_optimizer(self.optimizer, self.args.should_save)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_weights(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_best_model()
        load_weights(self.model, Path(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._several:
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer(self.optimizer, Path(checkpoint) / OPTIMIZER_NAME)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
