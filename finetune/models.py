"""Loading models. The only module that knows Unsloth exists.

Training goes through Unsloth where CUDA is (`settings.engine`), and through transformers + PEFT + bitsandbytes
elsewhere; evaluation always loads artefacts with plain transformers and peft, as a user would.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from data_prep import UserError
from finetune import embedded, hardware, paths
from finetune.settings import Settings

# It recommends a package that would fetch a faster 4-bit kernel from the hub; we run without either.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Attention:
    """Which attention runs, and whether it keeps the articles of a packed row apart."""

    implementation: str
    reason: str
    isolates: bool


def import_unsloth() -> None:
    """Import Unsloth, which patches transformers, peft and trl: before they are imported elsewhere.

    Raises:
        UserError: It is not installed.
    """
    # It writes the trainers that it generates to the working folder otherwise, beside the notebooks.
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(paths.home().resolve() / "checkpoints" / ".unsloth"))
    try:
        import unsloth  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"CUDA is present but Unsloth cannot be imported ({error}); use the container (./start_docker.sh start "
            "finetune) or install requirements/gpu.txt"
        ) from error


def model_path(settings: Settings) -> str:
    """What `from_pretrained` takes: a hub name or a folder; fetches the embedded model if that is asked for."""
    if settings.experiment.model == "embedded":
        return str(embedded.ensure())
    return settings.experiment.model


def model_name(settings: Settings) -> str:
    """The model's name for people."""
    return embedded.NAME if settings.experiment.model == "embedded" else settings.experiment.model


def load_tokenizer(settings: Settings):
    """The tokenizer, checked for what chat training needs.

    Raises:
        UserError: The model cannot be found, has no chat template, or pads with its end-of-turn token.
    """
    from transformers import AutoTokenizer

    path = model_path(settings)
    with _loading(path):
        tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.chat_template is None:
        raise UserError(f"{path} has no chat template; choose an instruct or chat model")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(f"{path}: the tokenizer has no pad token of its own; set one that is not its eos token")
    return tokenizer


def choose_attention(settings: Settings) -> Attention:
    """The attention that suits the engine and the device, with its reason."""
    if settings.engine == "unsloth":
        return _unsloth_attention()
    if not hardware.has_cuda():
        return Attention(
            "eager", "on CPU cores the fused kernel's bf16 backward pass makes a step a quarter longer", isolates=False
        )
    if _has_flash_attention():
        return Attention("flash_attention_2", "flash-attn is installed", isolates=True)
    return Attention("sdpa", "flash-attn is not installed", isolates=False)


def load_for_training(settings: Settings, attention: Attention):
    """The model as its method trains it: whole, or frozen with an adapter."""
    if settings.engine == "unsloth":
        return _load_with_unsloth(settings)
    model = _load_plain(
        model_path(settings),
        weights=settings.recipe.weights,
        quantised=settings.recipe.load_in_4bit,
        attention=attention.implementation,
    )
    return _with_adapter(model, settings) if settings.recipe.adapter else model


def load_for_evaluation(settings: Settings, artefact: Path | None):
    """The base model (`artefact` None), a full checkpoint, or the base model with an adapter; ready to score.

    A QLoRA adapter is evaluated on the 4-bit base that it was trained on: on another base it is another model.

    Raises:
        UserError: The artefact cannot be loaded.
    """
    from peft import PeftModel

    dtype = settings.experiment.evaluation_dtype
    attention = "sdpa"
    if artefact is None:
        model = _load_plain(model_path(settings), dtype, quantised=False, attention=attention)
    elif not settings.recipe.adapter:
        model = _load_plain(str(artefact), dtype, quantised=False, attention=attention)
    else:
        base = _load_plain(model_path(settings), dtype, settings.recipe.load_in_4bit, attention)
        with _loading(str(artefact)):
            model = PeftModel.from_pretrained(base, str(artefact))
    return evaluating(model)


def evaluating(model):
    """The model in evaluation mode; its 4-bit layers stay in training mode where there is no GPU.

    In evaluation mode on a CPU with AVX512-BF16, bitsandbytes 0.50 repacks a 4-bit layer's weights for a bf16 kernel,
    for good: label probabilities then shift by up to 0.025 with the batch size, whatever the dtype, and a training
    that goes on after a validation gets no gradient through the layer any more. The flag governs nothing else there.
    """
    # Not at the top: it would come before the line that silences bitsandbytes, and before Unsloth.
    from bitsandbytes.nn import Linear4bit

    model.eval()
    if not hardware.has_cuda():
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.train()
    return model


def for_scoring(model):
    """A model in training as `evaluation.LabelScorer` takes it: one that fills the cache it is given."""
    return _FillsCache(model)


class _FillsCache:
    """Fills the cache that a model was given, as transformers' own forward passes do.

    Unsloth's (2026.10.9) only read it, and return the keys and values of all layers as a tuple instead.
    """

    def __init__(self, model):
        self._model = model
        self.device, self.dtype = model.device, model.dtype

    def __call__(self, *, past_key_values, **inputs):
        output = self._model(past_key_values=past_key_values, **inputs)
        if isinstance(output.past_key_values, tuple):
            known = past_key_values.get_seq_length()
            for layer, pair in enumerate(output.past_key_values):
                # accelerate returns all outputs in fp32; attention wants the model's precision.
                past_key_values.update(*(part[:, :, known:].to(self.dtype) for part in pair), layer)
        return output


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


def _load_plain(path: str, weights: str, quantised: bool, attention: str):
    from transformers import AutoModelForCausalLM

    with _loading(path):
        return AutoModelForCausalLM.from_pretrained(
            path,
            dtype=DTYPES[weights],
            attn_implementation=attention,
            quantization_config=_four_bit(DTYPES[weights]) if quantised else None,
            device_map={"": hardware.device()},
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
            r=recipe.lora_rank,
            lora_alpha=recipe.lora_alpha,
            lora_dropout=recipe.lora_dropout,
            target_modules=recipe.target_modules,
            task_type="CAUSAL_LM",
        ),
    )


def _load_with_unsloth(settings: Settings):
    from unsloth import FastLanguageModel

    recipe, path = settings.recipe, model_path(settings)
    with _loading(path):
        model, _ = FastLanguageModel.from_pretrained(
            model_name=path,
            # Or it takes its own 4-bit file of a hub model, which quantises other layers than evaluation's base does.
            use_exact_model_name=True,
            max_seq_length=recipe.max_length,
            load_in_4bit=recipe.load_in_4bit,
            full_finetuning=not recipe.adapter,
            dtype=torch.bfloat16,
            # Unsloth's name for fp32 weights under bf16 products.
            float32_mixed_precision=recipe.weights == "float32",
            use_gradient_checkpointing=_checkpointing_for_unsloth(settings),
        )
    if not recipe.adapter:
        return model
    return FastLanguageModel.get_peft_model(
        model,
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=recipe.target_modules,
        use_gradient_checkpointing=_checkpointing_for_unsloth(settings),
        random_state=settings.experiment.seed,
    )


def _unsloth_attention() -> Attention:
    """Which kernel Unsloth runs packed rows with; all of them keep the articles apart, at very different speeds."""
    from unsloth.utils.attention_dispatch import select_attention_backend

    backend = select_attention_backend(use_varlen=True)
    if backend != "sdpa":
        return Attention(f"unsloth ({backend})", "the fastest kernel that Unsloth found", isolates=True)
    # Unsloth (2026.10.9) wants torch's kernel for rows of several lengths to group heads itself: torch 2.12 does.
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12):
        return Attention("unsloth (torch varlen)", "neither flash-attn nor xformers is usable", isolates=True)
    slow = "SLOW, one article at a time: install flash-attn or xformers for this torch, or torch 2.12 or later"
    return Attention("unsloth (sdpa)", slow, isolates=True)


def _checkpointing_for_unsloth(settings: Settings) -> str | bool:
    return {"unsloth": "unsloth", "plain": True, "off": False}[settings.recipe.gradient_checkpointing]


def _has_flash_attention() -> bool:
    from transformers.utils import is_flash_attn_2_available

    return is_flash_attn_2_available()


@contextlib.contextmanager
def _loading(path: str) -> Iterator[None]:
    """Turn the libraries' long messages about a model that is not there into one sentence."""
    try:
        yield
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"the model {path} could not be loaded ({first}); check its name or folder, and that the hub can be reached"
        ) from error
