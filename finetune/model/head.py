"""The output layer, told which places to compute and in which type, within the model's own forward pass.

Some models scale or cap what the output layer gives (Cohere's `logit_scale`, Granite's `logits_scaling`, Gemma 2's
`final_logit_softcapping`), and each has its own name for it. So we never call the layer ourselves: the model's forward
runs as it is, and only the layer's input is narrowed to the places that we need.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional

# Rows of a half-precision head that a CPU converts to fp32 at a time: 38 MB of SmolLM2-135M's.
CONVERTED_ROWS = 16_384


@contextlib.contextmanager
def only_at(head: nn.Module, places: torch.Tensor, in_fp32: bool = False) -> Iterator[None]:
    """Have a model's output layer compute few places alone.

    Args:
        head: The output layer. Within this context it takes hidden states of shape (batch, tokens, width), and returns
            logits of shape (1, N, vocabulary).
        places: Which of the batch x tokens hidden states it reads, shape (N).
        in_fp32: Give logits in fp32, and not rounded to the model's type. bf16 has 8 bits: logits between 16 and 32 are
            multiples of 0.125, and labels tie.
    """

    def select(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (arguments[0].flatten(0, 1).index_select(0, places)[None],)

    handle = head.register_forward_pre_hook(select)
    try:
        with fp32_logits(head) if in_fp32 else contextlib.nullcontext():
            yield
    finally:
        handle.remove()


@contextlib.contextmanager
def fp32_logits(head: nn.Module) -> Iterator[None]:
    """Have an output layer give logits in fp32, and not rounded to the model's type."""
    # An adapter on the head, or a trained copy of it (peft's modules_to_save), has more than one.
    linears = [part for part in head.modules() if isinstance(part, nn.Linear) and part.weight.is_floating_point()]
    # accelerate keeps a forward of its own there.
    before = [part.__dict__.get("forward") for part in linears]
    for part in linears:
        part.forward = lambda hidden, part=part: _fp32_linear(part, hidden)
    try:
        yield
    finally:
        for part, forward in zip(linears, before, strict=True):
            part.__dict__.pop("forward", None)
            if forward is not None:
                part.forward = forward


def padded(tokenizer, prompts: Sequence[Sequence[int]]) -> Mapping[str, torch.Tensor]:
    """A batch, shape (prompts, tokens). Padding follows a prompt: nothing that a causal model computes at a token
    depends on what comes after it."""
    return tokenizer.pad({"input_ids": prompts}, padding_side="right", return_tensors="pt")


def class_logits(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Logits of a model with a classification head, in fp32, shape (prompts, labels). Its own forward pass takes each
    row's last token that is no padding."""
    with fp32_logits(model.score):
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def _fp32_linear(linear: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """A linear layer whose products are neither rounded nor added up in less than fp32."""
    weight, bias = linear.weight, linear.bias
    # Autocast would round them again.
    with torch.autocast(hidden.device.type, enabled=False):
        if weight.dtype == torch.float32:
            logits = functional.linear(hidden.float(), weight)
        elif hidden.is_cuda and hidden.dtype == weight.dtype:
            # Tensor cores multiply bf16 exactly and add in fp32: only the rounding of the sum is left out.
            logits = torch.mm(hidden.flatten(0, -2), weight.T, out_dtype=torch.float32).unflatten(0, hidden.shape[:-1])
        else:
            parts = weight.split(CONVERTED_ROWS)
            logits = torch.cat([functional.linear(hidden.float(), part.float()) for part in parts], dim=-1)
        return logits if bias is None else logits + bias.float()
