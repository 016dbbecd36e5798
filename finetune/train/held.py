"""What a model's tensors, its adapter and its optimiser hold, counted on the meta device: there, tensors have sizes and
no memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from finetune import machine
from finetune.config.plan import Settings
from finetune.config.recipes import Recipe
from finetune.model import load
from finetune.model.precision import DTYPES

# bitsandbytes' 4-bit weights: a byte for each block of 64, fp32 for each 256 of these (double quantisation), and two
# tables of 16 and 256 numbers.
BLOCK, BLOCKS = 64, 256
# 8-bit moments: fp32 for each block of 256; tensors under 4,096 numbers keep fp32 moments. torchao's 4-bit ones have
# blocks of 128.
MOMENT_BLOCKS, LEAST = {"adamw_8bit": 256, "adamw_torch_8bit": 256, "adamw_torch_4bit": 128}, 4096


def on_device(size: float, cuda: bool) -> int:
    """Bytes that a tensor takes: CUDA's caching allocator rounds up to 512."""
    return -(-int(size) // 512) * 512 if cuda else int(size)


@dataclass(frozen=True)
class Work:
    """What is run: a recipe on a kind of machine.

    Attributes:
        checkpointing: `off`, or how activations are recomputed.
        dtype: The type of the weights, and of the matrix products.
        kernels: Whose kernels replace the model's code.
        cuda: Whether it is for a GPU.
        parts: Devices that share weights, gradients and optimiser (FSDP2).
        buckets: Whether gradients have a copy, for other processes (DDP).
    """

    recipe: Recipe
    checkpointing: str
    dtype: str
    compute_dtype: str
    kernels: Literal["none", "liger", "unsloth"]
    cuda: bool
    parts: int = 1
    buckets: bool = False

    @classmethod
    def of(cls, settings: Settings, dtype: str, compute_dtype: str, liger: bool, cuda: bool) -> Work:
        """A plan's work on this machine; checkpointing is decided later."""
        kernels = "liger" if liger else "none"
        if settings.engine == "unsloth":
            # Its full fine-tuning compiles transformers' own layers, to about what Liger's kernels are.
            kernels = "unsloth" if settings.recipe.adapter else "liger"
        strategy = machine.strategy()
        parts = machine.processes() if strategy == "FSDP2" else 1
        return cls(settings.recipe, "off", dtype, compute_dtype, kernels, cuda, parts, strategy == "DDP")


def build(configuration, recipe: Recipe, dtype: str) -> nn.Module:
    """The model with its adapter on the meta device, where tensors have sizes and no memory."""
    from peft import LoraConfig, get_peft_model

    loads = load.model_class(configuration, recipe.task_type)
    with torch.device("meta"):
        model = loads.from_config(configuration, dtype=DTYPES[dtype])
        if recipe.adapter:
            adapter = LoraConfig(
                r=recipe.r,
                target_modules=recipe.target_modules,
                use_dora=recipe.use_dora,
                task_type=recipe.task_type,
            )
            model = get_peft_model(model, adapter)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
    return model


class Held:
    """What a model's tensors and their optimiser hold, counted on the meta device."""

    def __init__(self, model: nn.Module, work: Work):
        self.model, self.work, recipe = model, work, work.recipe
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        base = [*model.parameters(), *model.buffers()]
        base = {id(tensor): tensor for tensor in base if not (recipe.adapter and tensor.requires_grad)}
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.trained = sum(parameter.nbytes for parameter in trained)
        self.adapter = sum(map(self._rounded, (p.nbytes for p in trained))) if recipe.adapter else 0
        self.gradients = sum(self._rounded(parameter.nbytes) for parameter in trained)
        self.constants = 0
        if recipe.load_in_4bit:
            for weight in self._quantized():
                del base[id(weight)]
                blocks = -(-weight.numel() // BLOCK)
                constants = (blocks, 4 * -(-blocks // BLOCKS), 16 * 4, 256 * 4, 4)
                self.constants += sum(map(self._rounded, constants))
        self.weights = sum(self._rounded(tensor.nbytes) for tensor in base.values())
        if recipe.load_in_4bit:
            self.weights += sum(self._rounded(weight.numel() // 2) for weight in self._quantized())
        if recipe.offload_embedding == "on":
            self.weights -= model.get_input_embeddings().weight.nbytes
        embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
        if recipe.update_in_backward:
            # bitsandbytes knows them by their place in the optimiser's groups, which is another there.
            embeddings = set()
        self.optimizer = sum(
            self._rounded(size) for p in trained for size in moment_bytes(p, recipe.optim, id(p) in embeddings)
        )
        if recipe.update_in_backward:
            self.gradients = max(self._rounded(parameter.nbytes) for parameter in trained)
        # CUDA's allocator takes memory for each block of 10 MiB or more, and keeps it: what activations leave is too
        # small for such gradients. Smaller blocks share memory and are joined again.
        large = [parameter.nbytes for parameter in trained if parameter.nbytes >= 10 * 2**20]
        self.apart = min(self.gradients, sum(large))
        # PyTorch's AdamW makes a copy of all second moments, unless it is fused.
        self.step = self.gradients if work.cuda and recipe.optim == "adamw_torch" else 0
        if work.parts > 1:
            for name in ("weights", "adapter", "optimizer", "gradients", "apart", "step"):
                setattr(self, name, getattr(self, name) // work.parts)
            # What is whole at a time: a layer, and the next one.
            self.weights += 2 * max(sum(p.nbytes for p in part.parameters()) for part in self._blocks())
        self.least = self.weights + self.constants + self.adapter + self.optimizer + self.gradients

    def check(self, longest: int, shortest: int) -> int:
        """What the check of a model's logits takes beside it, for sequences of so many tokens: in fp32, what is outside
        of its blocks, the largest of these, a layer's products and the logits; and two unpacked 4-bit weights."""
        if self.work.parts > 1:
            # It is made in the host's memory.
            return 0
        blocks = self._blocks()
        inside = {id(parameter) for parameter in blocks.parameters()}
        packed = {id(weight): weight for weight in self._quantized()} if self.work.recipe.load_in_4bit else {}
        halves = {id(p): p for p in self.model.parameters() if p.element_size() == 2 and id(p) not in packed}
        outside = sum(4 * p.numel() for key, p in halves.items() if key not in inside)
        block = max(
            sum(4 * p.numel() for p in part.parameters() if p.element_size() == 2 and id(p) not in packed)
            for part in blocks
        )
        # In bf16, and from there in fp32.
        unpacked = 6 * max((weight.numel() for weight in packed.values()), default=0)
        table = self.model.get_input_embeddings().weight
        widest = max(max(p.shape) for p in blocks.parameters())
        copies = 0 if self.work.kernels == "unsloth" else outside + block + unpacked
        return copies + 4 * len(table) * (longest + shortest) + 3 * 4 * widest * longest

    def _blocks(self) -> nn.ModuleList:
        lists = [part for part in self.model.modules() if isinstance(part, nn.ModuleList)]
        return max(lists, key=lambda part: sum(p.numel() for p in part.parameters()))

    def _quantized(self) -> Iterator[torch.Tensor]:
        """The weights that `load_in_4bit` packs: of all linear layers but the output layer."""
        from transformers.pytorch_utils import Conv1D

        # GPT-2's Conv1D is a linear layer, its weight transposed.
        for name, part in self.model.named_modules():
            is_linear = isinstance(part, nn.Linear | Conv1D) and part is not self.model.get_output_embeddings()
            if is_linear and ".lora_" not in name:
                yield part.weight

    def _rounded(self, size: float) -> int:
        return on_device(size, self.work.cuda)


def moment_bytes(parameter: torch.Tensor, optim: str, is_embedding: bool) -> list[float]:
    """Bytes of AdamW's two moments of a weight, and of their blocks' constants.

    transformers has bitsandbytes keep an embedding's in fp32; torchao keeps small or uneven tensors' in their type.
    """
    count, block = parameter.numel(), MOMENT_BLOCKS.get(optim)
    if block is None:
        return [parameter.nbytes] * 2
    if optim == "adamw_8bit" and (is_embedding or count < LEAST):
        return [4 * count] * 2
    if optim != "adamw_8bit" and (count < LEAST or count % block):
        return [parameter.nbytes] * 2
    return [count * (0.5 if optim == "adamw_torch_4bit" else 1), 4 * -(-count // block)] * 2
