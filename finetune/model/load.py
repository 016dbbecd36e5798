"""Loading models, for training and for evaluation.

Training goes through Unsloth where CUDA is (`settings.engine`), and through transformers + PEFT + bitsandbytes
elsewhere; evaluation always loads artefacts with plain transformers and peft, as a user would.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from data_prep import UserError
from finetune import machine
from finetune.config.plan import Settings
from finetune.model import packing, precision, unsloth
from finetune.model.hub import loading, model_path
from finetune.model.precision import DTYPES, Precision

# It recommends a package that would fetch a faster 4-bit kernel from the hub; we run without either.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# Liger, for its part, warns of each kernel that it has for other accelerators.
logging.getLogger("liger_kernel.backends.registry").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Attention:
    """Which attention runs, and why."""

    implementation: str
    reason: str


def load_tokenizer(settings: Settings):
    """The tokenizer, checked for what chat training needs.

    Raises:
        UserError: The model cannot be found, has no chat template, or pads with its end-of-turn token.
    """
    from transformers import AutoTokenizer

    path = model_path(settings)
    with loading(path):
        tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.chat_template is None:
        raise UserError(f"{path} has no chat template; choose an instruct or chat model")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(f"{path}: the tokenizer has no pad token of its own; set one that is not its eos token")
    return tokenizer


def choose_attention(settings: Settings) -> Attention:
    """The attention that training runs, with its reason."""
    if settings.recipe.packing:
        return _packed_attention(choose_precision(settings).dtype)
    return Attention("sdpa", "packing is off: padded batches")


def _packed_attention(dtype: torch.dtype) -> Attention:
    if packing.kernel_for(torch.empty(1, 1, 1, 64, device=machine.device(), dtype=dtype)) == "flash":
        return Attention("flash", "FlashAttention-2 of PyTorch, all articles of a row at once")
    lacking = "bfloat16 and a GPU of compute capability 8.0 or later" if machine.has_cuda() else "a GPU"
    return Attention("padded", f"articles of similar length together, in fp32: FlashAttention needs {lacking}")


def configuration(settings: Settings):
    """The model's configuration, read without its weights."""
    from transformers import AutoConfig

    path = model_path(settings)
    with loading(path):
        return AutoConfig.from_pretrained(path)


def choose_precision(settings: Settings) -> Precision:
    """The type of all matrix products of a run, in training and evaluation."""
    if settings.recipe and settings.recipe.dtype == "bfloat16":
        return precision.choose("bfloat16", 0)
    hidden = configuration(settings).get_text_config().hidden_size
    return precision.choose(settings.experiment.compute_dtype, hidden)


def load_for_training(settings: Settings, checkpointing: str = "off"):
    """The model as its method trains it: whole, or frozen with an adapter.

    Args:
        settings: The run.
        checkpointing: Gradient checkpointing: `unsloth`, `plain` or `off`; on other engines than Unsloth it is the
            trainer's to turn on.
    """
    if settings.engine == "unsloth":
        return unsloth.load_for_training(settings, {"unsloth": "unsloth", "plain": True, "off": False}[checkpointing])
    compute, weights = choose_precision(settings).name, settings.recipe.dtype
    # What is only read lies in the type that it is multiplied in, so that no step converts it.
    model = _load_plain(
        model_path(settings), compute if weights == "auto" else weights, compute, settings.recipe.load_in_4bit
    )
    if uses_liger(settings):
        _fuse_kernels(model, "use_liger_kernel=False")
    return _with_adapter(model, settings) if settings.recipe.adapter else model


def uses_liger(settings: Settings) -> bool:
    """Whether Liger's kernels replace the model's own: Triton needs CUDA, and Unsloth has others."""
    return settings.recipe.use_liger_kernel and settings.engine == "transformers" and machine.has_cuda()


def _fuse_kernels(model, otherwise: str) -> None:
    """Put Liger's kernels into a model; `otherwise`: the setting that does without."""
    from transformers.integrations.liger import apply_liger_kernel

    try:
        # The loss is ours: it takes only few positions to the vocabulary.
        apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    except ImportError as error:
        raise UserError(
            f"Liger's kernels cannot be imported ({error}); install requirements/gpu.txt or set {otherwise}"
        ) from error


def training_backbone(model, settings: Settings) -> packing.Backbone:
    """A model in training as packed rows and validation use it."""
    # Unsloth trains all weights through transformers' own layers, and adapters through its own.
    fast = settings.engine == "unsloth" and settings.recipe.adapter
    return unsloth.UnslothBackbone(model) if fast else packing.Backbone(model)


def load_for_evaluation(settings: Settings, artefact: Path | None):
    """The base model (`artefact` None), a full checkpoint, or the base model with an adapter; ready to score.

    A QLoRA adapter is evaluated on the 4-bit base that it was trained on: on another base it is another model.

    Raises:
        UserError: The artefact cannot be loaded.
    """
    from peft import PeftModel

    dtype = choose_precision(settings).name
    has_adapter = artefact is not None and settings.recipe.adapter
    path = model_path(settings) if artefact is None or has_adapter else str(artefact)
    model = _load_plain(path, dtype, dtype, quantised=has_adapter and settings.recipe.load_in_4bit)
    if settings.experiment.evaluation_kernels == "fused" and machine.has_cuda():
        _fuse_kernels(model, "evaluation_kernels=plain")
    if has_adapter:
        with loading(str(artefact)):
            model = PeftModel.from_pretrained(model, str(artefact))
    return evaluating(model)


def merged(settings: Settings, adapter: Path):
    """The base model with an adapter merged into it; of a 4-bit base, into its dequantised weights.

    Merging into 4-bit weights themselves would round the merged ones to 4 bits again.
    """
    from peft import PeftModel

    dtype = choose_precision(settings).name
    base = _load_plain(model_path(settings), dtype, dtype, settings.recipe.load_in_4bit)
    if settings.recipe.load_in_4bit:
        base = base.dequantize()
    return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().eval()


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


def trainable_table(model) -> dict[str, int]:
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


def _load_plain(path: str, weights: str, compute: str, quantised: bool):
    from transformers import AutoModelForCausalLM

    with loading(path):
        return AutoModelForCausalLM.from_pretrained(
            path,
            dtype=DTYPES[weights],
            attn_implementation="sdpa",
            quantization_config=_four_bit(DTYPES[compute]) if quantised else None,
            device_map={"": machine.device()},
        )


def _four_bit(compute_dtype: torch.dtype):
    """QLoRA's settings (Dettmers et al. 2023): NormalFloat, with the block constants quantised once more."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def _with_adapter(model, settings: Settings):
    from peft import LoraConfig, get_peft_model

    recipe = settings.recipe
    return get_peft_model(
        model,
        LoraConfig(
            r=recipe.r,
            lora_alpha=recipe.lora_alpha,
            lora_dropout=recipe.lora_dropout,
            target_modules=recipe.target_modules,
            task_type="CAUSAL_LM",
        ),
    )
