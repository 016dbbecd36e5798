"""A micro-batch that computes nothing: PyTorch's fake tensors run the model's own code, and we add up their bytes.

Two and three layers are run; each further layer adds what the third one did. So the memory of a pass comes from the
model's and PEFT's own code, whatever the architecture. Where kernels replace that code on a GPU (Liger's, Unsloth's,
4-bit products), functions stand for them that hold what their sources hold.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import weakref
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations.moe import ExpertsInterface

from finetune.config.recipes import Recipe
from finetune.model import packing
from finetune.train import held
from finetune.train.held import Work

BALANCED = "balanced"
MIB = 2**20
# What the model's code raises is ours to say.
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Batch:
    """A packed row, as `RowCollator` makes it.

    Attributes:
        articles: How many.
        own: Tokens of each, behind those that all share.
        shared: Tokens that all begin with.
        predicted: Tokens of each that the loss is of, or places that scoring takes to the vocabulary.
    """

    articles: int
    own: int
    shared: int
    predicted: int


@dataclass(frozen=True)
class Pass:
    """Bytes of a pass besides weights and optimiser, at its fullest moments: in the forward pass, where the backward
    pass leaves the last layer, with all activations, and where it leaves the first one, with all gradients.

    Attributes:
        forward: Bytes in the forward pass.
        start: Bytes when the backward pass begins, gradients that are there by then included.
        start_gradients: Those gradients.
        end: Bytes when it ends.
        end_gradients: The gradients among them.
        logits: What the vocabulary takes, of `start`.
        scoring: Bytes of a scoring batch.
    """

    forward: float
    start: float
    start_gradients: float
    end: float
    end_gradients: float
    logits: float
    scoring: float


# By all that a pass depends on: one takes 2 to 4 s of an AMD EPYC, and a notebook that runs again asks the same.
_known: dict[str, Pass] = {}


def run(configuration, work: Work, batch: Batch, scored: Batch) -> Pass:
    """Simulate a training's micro-batch and a scoring batch of any language model that transformers builds.

    Raises:
        Exception: Whatever the model's code raises where it needs numbers, or cannot read packed rows.
    """
    asked = repr((configuration.to_json_string(use_diff=False), work, batch, scored))
    if asked in _known:
        return _known[asked]
    layers = configuration.get_text_config().num_hidden_layers
    two, three = (_trace(_shortened(configuration, min(layers, count)), work, batch, scored) for count in (2, 3))
    found = {name: two[name] + (layers - 2) * (three[name] - two[name]) for name in two}
    if work.checkpointing == "unsloth":
        # Each layer's input goes to the host's memory.
        found |= {name: three[name] for name in ("forward", "start")}
    _known[asked] = Pass(**found)
    return _known[asked]


def _shortened(configuration, layers: int):
    """The configuration of the same model with fewer layers."""
    short = copy.deepcopy(configuration)
    text = short.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return short


def _block(size: int) -> int:
    """Bytes of the block that CUDA's caching allocator takes for a tensor that comes and goes: from 1 MiB on one of
    equal parts of 20 MiB, from 10 MiB on a multiple of 2 MiB (PyTorch's c10/cuda/CUDACachingAllocator)."""
    if size <= MIB:
        return held.on_device(size, cuda=True)
    return 20 * MIB // (20 * MIB // size) if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB


class _Meter(TorchDispatchMode):
    """Adds up the bytes of all tensors that are alive, by the storages that operations return."""

    def __init__(self, model: nn.Module, cuda: bool):
        super().__init__()
        self.cuda = cuda
        self.now, self.gradients, self.phase = 0, 0, ""
        self.peaks: dict[str, tuple[int, int]] = {}
        # What is there before is counted apart.
        self._seen: weakref.WeakSet = weakref.WeakSet()
        for tensor in (*model.parameters(), *model.buffers()):
            self.ignore(tensor)

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self._seen:
                storage = tensor.untyped_storage()
                size = _block(storage.nbytes()) if self.cuda else storage.nbytes()
                self._seen.add(storage)
                weakref.finalize(storage, self._free, size)
                self.now += size
        self.peaks[self.phase] = max(self.peaks.get(self.phase, (0, 0)), (self.now, self.gradients))
        return result

    def _free(self, size: int) -> None:
        self.now -= size

    def enter(self, phase: str) -> None:
        """The pass comes to its next phase: `forward`, `start`, `between`, `end` or `scoring`."""
        self.phase = phase

    def ignore(self, tensor: torch.Tensor) -> None:
        """Leave out a tensor that is counted apart."""
        self._seen.add(tensor.untyped_storage())


def _trace(configuration, work: Work, batch: Batch, scored: Batch) -> dict[str, float]:
    recipe = work.recipe
    # A head's logits are no memory to speak of: a language model's at one token of a row stand for them.
    model = held.build(configuration, replace(recipe, task_type="CAUSAL_LM"), work.dtype)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # Tied weights stay one.
    fake = functools.cache(
        lambda tensor: mode.fake_tensor_converter.from_meta_and_device(mode, tensor, torch.device("cpu"))
    )
    model._apply(fake)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with contextlib.ExitStack() as stack:
        if work.cuda:
            stack.enter_context(mock.patch.object(packing, "kernel_for", lambda query: "flash"))
        stack.enter_context(mode)
        _replace_kernels(model, work)
        model.train()
        if work.checkpointing != "off":
            if recipe.adapter:
                model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.get_text_config()._experts_implementation = BALANCED
        backbone = packing.Backbone(model)
        meter = _Meter(model, work.cuda)
        _mark_phases(model, meter)
        for parameter in trained:
            if recipe.gradient_accumulation_steps == 1:
                parameter.register_post_accumulate_grad_hook(functools.partial(_count, meter, recipe))
            else:
                # Of the passes before; they are counted apart.
                parameter.grad = torch.empty_like(parameter)
                meter.ignore(parameter.grad)
        row, places = _row(batch, work.cuda)
        stack.enter_context(meter)
        meter.enter("forward")
        embeddings = None
        if not work.cuda and not recipe.adapter and backbone.head.weight is model.get_input_embeddings().weight:
            # As the trainer does, where a table's gradient would be as large as the table.
            embeddings = backbone.embed(row).detach().requires_grad_()
        before = []
        backbone.head.register_forward_pre_hook(lambda *_: before.append(meter.now))
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=work.compute_dtype == "bfloat16")
        with packing.within(row):
            with autocast:
                logits = backbone(row, places, embeddings)
            losses = functional.cross_entropy(logits.float(), places, reduction="none")
            loss = (losses * losses.detach()).sum()
            del logits, losses
            kept = meter.now - before[0]
            meter.enter("start")
            loss.backward()
        del loss
        for parameter in trained:
            parameter.grad = None
        meter.enter("scoring")
        left = meter.now
        row, places = _row(scored, work.cuda)
        with torch.no_grad(), autocast:
            # The last hidden states alone: logits of these places are added.
            backbone(row, places[:1])
    start, end = (meter.peaks.get(phase, (0, 0)) for phase in ("start", "end"))
    # Logits and their log-softmax, both in fp32.
    tables = 8 * scored.articles * scored.predicted * configuration.get_text_config().vocab_size
    return {
        "forward": meter.peaks["forward"][0],
        "start": start[0],
        "start_gradients": start[1],
        "end": end[0],
        "end_gradients": end[1],
        "logits": kept,
        "scoring": meter.peaks["scoring"][0] - left + tables,
    }


def _row(batch: Batch, cuda: bool) -> tuple[packing.Row, torch.Tensor]:
    """A row without numbers, and as many places of it as are predicted."""
    segments = batch.articles + bool(batch.shared)
    tokens = -(-(batch.shared + batch.articles * batch.own) // 8) * 8
    sees = batch.shared + batch.own
    numbers = functools.partial(torch.empty, dtype=torch.long)
    row = packing.Row(
        input_ids=numbers(1, tokens),
        position_ids=numbers(1, tokens),
        query_ends=torch.empty(segments + 1, dtype=torch.int32),
        key_index=numbers(batch.shared + batch.articles * sees),
        key_ends=torch.empty(segments + 1, dtype=torch.int32),
        longest_query=max(batch.own, batch.shared),
        longest_keys=sees,
    )
    if not cuda:
        sizes = [(1, batch.shared, batch.shared)] if batch.shared else []
        sizes.append((batch.articles, batch.own, sees))
        # What `Row.groups` would hold, with indices instead of a mask, whose result has no size without numbers.
        row.__dict__["groups"] = [
            packing.Group(
                numbers(count, queries),
                (numbers(count * queries), numbers(count * queries)),
                numbers(count, keys),
                torch.empty(count, queries, keys, dtype=torch.bool),
            )
            for count, queries, keys in sizes
        ]
        row.__dict__["places"] = numbers(tokens)
    return row, numbers(batch.articles * batch.predicted)


def _mark_phases(model: nn.Module, meter: _Meter) -> None:
    """Tell the meter when the backward pass has left the last layer, and when it comes to the first one."""
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    layers = max(lists, key=lambda part: sum(parameter.numel() for parameter in part.parameters()))

    def hook(phase: str, _, __, output) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda _: meter.enter(phase))

    layers[-min(2, len(layers))].register_forward_hook(functools.partial(hook, "between"))
    layers[0].register_forward_hook(functools.partial(hook, "end"))


def _balanced(module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """A mixture of experts without a routing that needs numbers: all tokens go through one expert's matrices, as often
    as they are sent to one."""
    rows = hidden.repeat_interleave(index.shape[-1], dim=0)
    up, down = (module.gate_up_proj if module.has_gate else module.up_proj)[0], module.down_proj[0]
    if not module.is_transposed:
        up, down = up.T, down.T
    inner = module._apply_gate(rows @ up) if module.has_gate else module.act_fn(rows @ up)
    outer = (inner @ down) * weights.reshape(-1, 1)
    return outer.view(*index.shape, -1).sum(dim=1).to(hidden.dtype)


ExpertsInterface.register(BALANCED, _balanced)


def _count(meter: _Meter, recipe: Recipe, parameter: torch.Tensor) -> None:
    if recipe.update_in_backward:
        parameter.grad = None
    else:
        size = parameter.grad.untyped_storage().nbytes()
        meter.gradients += _block(size) if meter.cuda else size


def _replace_kernels(model: nn.Module, work: Work) -> None:
    """Put functions in the place of modules whose work other kernels do on a GPU."""
    from peft.tuners.lora.layer import Linear as LoraLinear

    for name, module in model.named_modules():
        if work.kernels != "none" and type(module).__name__.endswith("RMSNorm") and work.cuda:
            module.forward = functools.partial(_norm, module)
        if work.kernels != "none" and hasattr(module, "gate_proj") and hasattr(module, "act_fn"):
            module.forward = functools.partial(_gated, module)
        if isinstance(module, LoraLinear):
            if work.kernels == "unsloth":
                module.forward = functools.partial(_fused_lora, module, name.endswith("down_proj"))
            elif work.recipe.load_in_4bit:
                # PEFT's layer for 4-bit weights takes its input as it is.
                module.cast_input_dtype_enabled = False
                module.base_layer.forward = functools.partial(_four_bit, module.base_layer)


def _norm(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return _Norm.apply(hidden, module.weight)


class _Norm(torch.autograd.Function):
    """Liger's and Unsloth's root mean square norm: the input and a number a token are held."""

    @staticmethod
    def forward(context, hidden, weight):
        context.save_for_backward(hidden, weight, hidden.new_empty(hidden.shape[:-1], dtype=torch.float32))
        return torch.empty_like(hidden)

    @staticmethod
    def backward(context, gradient):
        weight = context.saved_tensors[1]
        return gradient, torch.empty_like(weight) if weight.requires_grad else None


def _gated(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return module.down_proj(_Gated.apply(module.gate_proj(hidden), module.up_proj(hidden)))


class _Gated(torch.autograd.Function):
    """Their activation of the MLP: both factors are held, and overwritten by their gradients."""

    @staticmethod
    def forward(context, gate, up):
        context.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(context, gradient):
        return context.saved_tensors


def _four_bit(layer: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    product = _FourBit.apply(hidden.to(layer.weight.dtype), layer.weight)
    return product if layer.bias is None else product + layer.bias


class _FourBit(torch.autograd.Function):
    """bitsandbytes' product: the 4-bit weight is held, and unpacked in both passes."""

    @staticmethod
    def forward(context, hidden, weight):
        context.save_for_backward(weight)
        return hidden @ torch.empty_like(weight).T

    @staticmethod
    def backward(context, gradient):
        return gradient @ torch.empty_like(context.saved_tensors[0]), None


def _fused_lora(module: nn.Module, recomputes: bool, hidden: torch.Tensor) -> torch.Tensor:
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    return _FusedLora.apply(hidden, module.base_layer.weight, a, b, recomputes)


class _FusedLora(torch.autograd.Function):
    """Unsloth's layer with its adapter: the input is held, but that of the MLP's last projection, which is computed
    again."""

    @staticmethod
    def forward(context, hidden, weight, a, b, recomputes):
        context.shape = hidden.shape
        context.save_for_backward(a, b, *([] if recomputes else [hidden]))
        return hidden.new_empty(*hidden.shape[:-1], len(weight))

    @staticmethod
    def backward(context, gradient):
        a, b, *_ = context.saved_tensors
        return gradient.new_empty(context.shape), None, torch.empty_like(a), torch.empty_like(b), None
