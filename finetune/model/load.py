"""Loading models, for training and for evaluation.

Training goes through Unsloth where CUDA is, and through transformers, PEFT and bitsandbytes elsewhere; evaluation
always loads artefacts with plain transformers and peft, as a user would.
"""

from __future__ import annotations

import logging
import re
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from data_prep import UserError
from finetune import machine
from finetune.config.plan import Experiment
from finetune.model import packing, precision, smollm2, unsloth
from finetune.model.hub import loading, model_path
from finetune.model.precision import DTYPES, Precision

if TYPE_CHECKING:
    import pandas as pd
    from peft import LoraConfig

# It recommends a package that would fetch a faster 4-bit kernel from the hub; we run without either.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# Liger, for its part, warns of each kernel that it has for other accelerators.
logging.getLogger("liger_kernel.backends.registry").setLevel(logging.ERROR)


# Tokens that a tokenizer holds for nothing, or for padding: Llama 3's `<|finetune_right_pad_id|>`, Gemma's `<unused0>`.
SPARE_TOKEN = re.compile("pad|reserved|unused", re.IGNORECASE)


def load_model(
    name: str | Path,
    *,
    engine: Literal["transformers", "unsloth"] = "transformers",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    load_in_4bit: bool = False,
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16",
    use_liger_kernel: bool = False,
    labels: Sequence[str] | None = None,
    **unsloth_only: Any,
):
    """A causal language model with its tokenizer, on the GPU if there is one.

    Args:
        name: A hub name, a folder, or `embedded`.
        engine: `transformers`, or `unsloth` for training with Unsloth's layers.
        dtype: The type that weights are held in.
        load_in_4bit: Hold them in 4-bit NormalFloat with double quantisation (QLoRA, Dettmers et al. 2023).
        compute_dtype: The type that 4-bit weights are multiplied in.
        use_liger_kernel: Replace norms, rotary embeddings and the MLP's activation by Liger's kernels (CUDA alone).
        labels: With labels, a new classification head for them takes the output layer's place
            (AutoModelForSequenceClassification); its weights are random.
        unsloth_only: What `unsloth.from_pretrained` takes besides; plain transformers needs none of it.

    Returns:
        The model and the tokenizer.

    Raises:
        UserError: The model cannot be found, or lacks what chat training needs; or there is no such head for it.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    machine.limit_gpu_memory()
    path = model_path(name)
    if name == "embedded":
        smollm2.check()
    tokenizer = load_tokenizer(name)
    if engine == "unsloth":
        return unsloth.from_pretrained(path, dtype, load_in_4bit, **unsloth_only), tokenizer
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[compute_dtype],
        # FSDP2 cuts tensors of numbers alone, and of one type.
        bnb_4bit_quant_storage=DTYPES[compute_dtype] if machine.strategy() == "FSDP2" else torch.uint8,
    )
    loads, head = AutoModelForCausalLM, {}
    if labels:
        loads = model_class(configuration(name), "SEQ_CLS")
        head = {"id2label": dict(enumerate(labels)), "label2id": {label: row for row, label in enumerate(labels)}}
    with loading(path):
        model = loads.from_pretrained(
            path,
            dtype=DTYPES[dtype],
            quantization_config=four_bit if load_in_4bit else None,
            device_map=_place(path, DTYPES[dtype], load_in_4bit),
            **head,
        )
    if labels:
        # By it transformers finds a row's last token.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if use_liger_kernel:
        _fuse_kernels(model)
    return model, tokenizer


def _place(path: str | Path, dtype: torch.dtype, load_in_4bit: bool) -> dict[str, str | int] | None:
    """Where a model is loaded. FSDP2 puts a part of each layer on each device: none need hold the model, but one that
    can has its logits checked sooner."""
    if machine.strategy() == "FSDP2":
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            count = parameter_count(AutoModelForCausalLM.from_config(configuration(path)))
        if load_in_4bit or count * dtype.itemsize > machine.available_memory_bytes() / 2:
            return None
    # By its number: bitsandbytes' weights are refused on a device that has none.
    several = machine.processes() > 1 and machine.has_cuda()
    return {"": torch.cuda.current_device() if several else machine.device()}


def model_class(configuration, task_type: str):
    """The class of transformers that loads a model: a language model, or with SEQ_CLS one with a classification head.

    Raises:
        UserError: transformers has no classification head for this architecture.
    """
    from transformers import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    if task_type == "CAUSAL_LM":
        return AutoModelForCausalLM
    if type(configuration) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(
            f"transformers has no classification head for {configuration.model_type} models "
            f"({configuration.name_or_path}): choose LoRA, or another model"
        )
    return AutoModelForSequenceClassification


def add_lora(model, config: LoraConfig):
    """The model with an adapter to train, and its own weights frozen: PEFT's `get_peft_model`, or Unsloth's.

    A model that reads images too gets it in its language model alone. Which layers got it is printed.

    Args:
        model: From `load_model`.
        config: Rank, scale and target modules; with the Unsloth engine those fields that Unsloth knows.

    Raises:
        UserError: The model has no module of a name in `target_modules`, and an adapter on the others alone is another
            method; PEFT refuses it; or the engine puts it outside the language model.
    """
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    wanted = [] if isinstance(config.target_modules, str) else sorted(config.target_modules or [])
    linear = linear_names(model)
    if missing := [name for name in wanted if name not in linear]:
        raise UserError(
            f"target_modules names {', '.join(missing)}, and this model has no such layer; it has "
            f"{', '.join(sorted(linear))}. Choose among these, or set target_modules=all-linear"
        )
    part = _language_model(model)
    language = next(f"{path}." for path, module in model.named_modules() if module is part).removeprefix(".")
    if language:
        # A vision tower has layers of the same names.
        config.exclude_modules = rf"(?!{re.escape(language)}).*"
    try:
        adapted = unsloth.add_lora(model, config) if unsloth.has_loaded(model) else get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            f"PEFT puts no such adapter on this model ({error}); set target_modules to some of "
            f"{', '.join(sorted(linear))}, or train all weights"
        ) from error
    places = [path for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if outside := [path for path in places if not path.startswith(language)]:
        raise UserError(f"{outside[0]} got an adapter, and is not in the language model: set engine=transformers")
    counts = Counter(path.rpartition(".")[2] for path in places)
    kinds = {count: ", ".join(sorted(name for name in counts if counts[name] == count)) for count in counts.values()}
    shown = "; ".join(f"{count} x {names}" for count, names in kinds.items())
    print(f"adapter: {shown}; the model has {model.config.get_text_config().num_hidden_layers} layers")
    return adapted


def linear_names(model: torch.nn.Module) -> set[str]:
    """The names of the linear layers of a language model, but for the output layer."""
    from transformers.pytorch_utils import Conv1D

    # GPT-2's are called Conv1D.
    kinds, head = (torch.nn.Linear, Conv1D), {*(model.get_output_embeddings() or model.score).modules()}
    modules = _language_model(model).named_modules()
    layers = [path for path, module in modules if isinstance(module, kinds) and module not in head]
    # Of a layer that has an adapter by now, it and its parts are called by the layer's name, or by the adapter's.
    paths = {path.partition(".base_layer")[0] for path in layers}
    return {path.rpartition(".")[2] for path in paths if ".lora_" not in path}


def _language_model(model: torch.nn.Module) -> torch.nn.Module:
    """The part of a model that reads text; all of it where it reads nothing else."""
    return model if model.config.get_text_config() is model.config else model.get_decoder()


def load_tokenizer(name: str | Path):
    """The tokenizer, checked for what chat training needs.

    Raises:
        UserError: The model cannot be found, has no chat template, or has no token to pad with but its end of turn.
    """
    from transformers import AutoTokenizer

    path = model_path(name)
    with loading(path):
        tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.chat_template is None:
        raise UserError(f"{path} has no chat template; choose an instruct or chat model")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        # Never eos: a model that is trained to end its answer must not see that token hidden as padding.
        spare = [token for token in tokenizer.get_added_vocab() if SPARE_TOKEN.search(token)]
        spare = sorted(set(spare) - {tokenizer.eos_token}, key=lambda token: ("pad" not in token.lower(), token))
        if not spare:
            raise UserError(f"{path}: the tokenizer has no pad token, and no reserved token to take; add one to it")
        tokenizer.pad_token = spare[0]
        print(f"pad token: {spare[0]}, which the model reserves; the tokenizer names none of its own")
    return tokenizer


def configuration(name: str | Path):
    """The model's configuration, read without its weights."""
    from transformers import AutoConfig

    path = model_path(name)
    with loading(path):
        return AutoConfig.from_pretrained(path)


def choose_precision(experiment: Experiment, dtype: str | None = None) -> Precision:
    """The type of all matrix products of a run, in training and evaluation.

    Args:
        experiment: Its model, and the type that it asks for.
        dtype: The type that weights are trained in; bfloat16 weights multiply in bfloat16.
    """
    if dtype == "bfloat16":
        return precision.choose("bfloat16", 0)
    hidden = configuration(experiment.model).get_text_config().hidden_size
    return precision.choose(experiment.compute_dtype, hidden)


def packed_attention(dtype: torch.dtype) -> tuple[str, str]:
    """The attention that packed rows get, and why."""
    if packing.kernel_for(torch.empty(1, 1, 1, 64, device=machine.device(), dtype=dtype)) == "flash":
        return "flash", "FlashAttention-2 of PyTorch, all articles of a row at once"
    lacking = "bfloat16 and a GPU of compute capability 8.0 or later" if machine.has_cuda() else "a GPU"
    return "padded", f"articles of similar length together, in fp32: FlashAttention needs {lacking}"


def backbone_kind(model) -> type[packing.Backbone]:
    """How a model reads packed rows."""
    # Unsloth trains all weights through transformers' own layers, and adapters through its own.
    fast = unsloth.has_loaded(model) and getattr(model, "peft_config", None) is not None
    return unsloth.UnslothBackbone if fast else packing.Backbone


# Models that have Liger's kernels.
_FUSED: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def has_liger(model: torch.nn.Module) -> bool:
    """Whether `load_model` put Liger's kernels into a model, or into the one that an adapter was put on."""
    return any(module in _FUSED for module in model.modules())


def _fuse_kernels(model) -> None:
    from transformers.integrations.liger import apply_liger_kernel

    try:
        # The loss is ours: it takes only few positions to the vocabulary.
        apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    except ImportError as error:
        raise UserError(
            f"Liger's kernels cannot be imported ({error}); install requirements/gpu.txt, or set "
            "use_liger_kernel=False and evaluation_kernels=plain"
        ) from error
    _FUSED.add(model)


def trainable_parameters(model) -> pd.DataFrame:
    """Trainable parameters by kind of tensor, with their share of the model."""
    import pandas as pd

    counts, total = trainable_counts(model), parameter_count(model)
    counts |= {"all": sum(counts.values())}
    shown = [(f"{count:,}", f"{count / total:.3%}") for count in counts.values()]
    return pd.DataFrame(shown, list(counts), ["parameters", "share of the model"])


def compute_dtype_of_4bit(model: torch.nn.Module) -> torch.dtype | None:
    """The type that a model's 4-bit layers multiply in; None if it has none."""
    from bitsandbytes.nn import Linear4bit

    return next((module.compute_dtype for module in model.modules() if isinstance(module, Linear4bit)), None)


def evaluating(model):
    """The model in evaluation mode; its 4-bit layers stay in training mode where there is no GPU.

    In evaluation mode on a CPU with AVX512-BF16, bitsandbytes 0.50 repacks a 4-bit layer's weights for a bf16 kernel,
    for good: label probabilities then shift by up to 0.025 with the batch size, whatever the dtype, and a training
    that goes on after a validation gets no gradient through the layer any more. The flag governs nothing else there.
    """
    # Not at the top: it would come before the line that silences bitsandbytes, and before Unsloth.
    from bitsandbytes.nn import Linear4bit

    model.eval()
    if not machine.has_cuda():
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.train()
    return model


def trainable_counts(model) -> dict[str, int]:
    """Trainable parameters by kind of tensor (`q_proj.lora_A`, `embed_tokens`, ...), and how many there are of each."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = ".".join(part for part in name.split(".") if part not in _STRUCTURE and not part.isdigit())
            counts[kind] = counts.get(kind, 0) + parameter.numel()
    return counts


# Parts of a tensor's name that say where it hangs, not what it is.
_STRUCTURE = {"base_model", "model", "layers", "self_attn", "mlp", "default", "weight"}


def parameter_count(model) -> int:
    """Parameters of the model, 4-bit ones counted one by one and not by the bytes that they are packed in."""
    return sum(
        2 * parameter.numel() if parameter.__class__.__name__ == "Params4bit" else parameter.numel()
        for parameter in model.parameters()
    )
