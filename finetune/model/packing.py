"""Many sequences in one row, without padding, and what they share computed once: what training and scoring read.

A row is a forest of segments. A segment's tokens see their ancestors' tokens, all of them, and of their own segment
what precedes them; nothing else. Training: the tokens that all prompts begin with, and every article behind them.
Scoring: behind each article also one segment per label. The mathematics is that of separate sequences, since a token of
a causal model depends on what precedes it and on nothing else, and gradients of what is shared add up.

Attention is the one operation in which tokens meet, so it alone has to know the row. It is registered with
transformers (AttentionInterface); `unsloth` sends Unsloth's attention here too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
from torch.nn import functional

from finetune.model.head import only_at

NAME = "segments"
Kernel = Literal["flash", "padded"]
# Keys of a group of padded segments, at most: on a CPU 16,384 of them take 25 MB a layer of SmolLM2-135M.
GROUP_KEYS = 16_384


@dataclass(frozen=True)
class Group:
    """S segments of a row, padded to L queries and K keys: how attention without FlashAttention reads them.

    Attributes:
        queries: Place in the row of each query, shape (S, L).
        is_query: Which of them are real, shape (S, L).
        keys: Place in the row of each key, shape (S, K).
        mask: Which keys a query sees, shape (S, L, K).
    """

    queries: torch.Tensor
    is_query: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Row:
    """A row of T tokens in S segments.

    Attributes:
        input_ids: Token ids, shape (1, T).
        position_ids: Each token's distance from the beginning of its sequence, shape (1, T).
        query_ends: Where each segment's tokens end in the row, from 0 on, shape (S + 1), int32.
        key_index: For each segment, the tokens that it sees: its ancestors', then its own; shape (K).
        key_ends: Where each segment's part of `key_index` ends, from 0 on, shape (S + 1), int32.
        longest_query: Tokens of the longest segment.
        longest_keys: Tokens that the segment with the most of them sees.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    query_ends: torch.Tensor
    key_index: torch.Tensor
    key_ends: torch.Tensor
    longest_query: int
    longest_keys: int

    @functools.cached_property
    def groups(self) -> list[Group]:
        """The segments in groups of similar length."""
        lengths, sees = np.diff(self.query_ends.cpu().numpy()), np.diff(self.key_ends.cpu().numpy())
        groups, members = [], []
        for segment in np.argsort(lengths, kind="stable"):
            together = [*members, segment]
            is_alike = lengths[segment] <= 2 * lengths[together[0]]
            if members and not (is_alike and len(together) * sees[together].max() <= GROUP_KEYS):
                groups.append(self._group(members))
                together = [segment]
            members = together
        return [*groups, self._group(members)]

    @functools.cached_property
    def places(self) -> torch.Tensor:
        """Where in the groups' queries, one group behind the other, each token of the row stands, shape (T)."""
        return torch.cat([group.queries[group.is_query] for group in self.groups]).argsort()

    def _group(self, members: Sequence[int]) -> Group:
        query_ends, key_ends = self.query_ends.cpu(), self.key_ends.cpu()
        device, starts, seen = self.input_ids.device, query_ends[members], key_ends[members]
        lengths, sees = query_ends.diff()[members], key_ends.diff()[members]
        query, key = torch.arange(int(lengths.max())), torch.arange(int(sees.max()))
        is_query = query < lengths[:, None]
        # Places of padding stay within the row; what is computed there is dropped.
        queries = torch.where(is_query, starts[:, None] + query, 0)
        places = torch.where(key < sees[:, None], seen[:, None] + key, 0)
        # A segment's last query sees all of its keys, the one before it all but one.
        last = (sees - lengths)[:, None] + query
        mask = key <= torch.minimum(last, sees[:, None] - 1)[:, :, None]
        return Group(queries.to(device), is_query.to(device), self.key_index.cpu()[places].to(device), mask.to(device))

    def to(self, device, non_blocking: bool = True) -> Row:
        """The row with its tensors on a device."""
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=non_blocking)
            for field in fields(self)
            if isinstance(getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **moved)


class Forest:
    """Builds a row, segment by segment."""

    def __init__(self):
        self.ids: list[int] = []
        self._positions: list[np.ndarray] = []
        self._keys: list[np.ndarray] = []
        self._ends: list[int] = [0]

    def add(self, tokens: Sequence[int], parent: int | None = None) -> int:
        """Add a segment behind another, or at the beginning of a sequence; returns its number."""
        seen = self._keys[parent] if parent is not None else np.empty(0, np.int64)
        own = np.arange(len(self.ids), len(self.ids) + len(tokens))
        self.ids.extend(tokens)
        self._positions.append(np.arange(len(seen), len(seen) + len(tokens)))
        self._keys.append(np.concatenate([seen, own]))
        self._ends.append(len(self.ids))
        return len(self._keys) - 1

    def last(self, segment: int) -> int:
        """The place in the row of a segment's last token."""
        return self._ends[segment + 1] - 1

    def row(self) -> Row:
        lengths = [len(keys) for keys in self._keys]
        return Row(
            input_ids=torch.tensor([self.ids]),
            position_ids=torch.from_numpy(np.concatenate(self._positions))[None],
            query_ends=torch.tensor(self._ends, dtype=torch.int32),
            key_index=torch.from_numpy(np.concatenate(self._keys)),
            key_ends=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
            longest_query=int(np.diff(self._ends).max()),
            longest_keys=max(lengths),
        )


# The row in flight. Not a keyword through the model: Unsloth's attention drops those that it does not know.
_row: Row | None = None


def active() -> Row | None:
    """The row that attention now works on, None outside of one."""
    return _row


@contextlib.contextmanager
def within(row: Row) -> Iterator[None]:
    """Make a row the one that attention works on."""
    global _row
    before, _row = _row, row
    try:
        yield
    finally:
        _row = before


# Where a check collects how far FlashAttention is from the exact attention, a number per layer.
_flash_errors: list[float] | None = None


@contextlib.contextmanager
def comparing_flash() -> Iterator[list[float]]:
    """Compute each layer's attention by FlashAttention too, where that runs, and yield its relative errors."""
    global _flash_errors
    _flash_errors = []
    try:
        yield _flash_errors
    finally:
        _flash_errors = None


class Backbone:
    """A causal language model as training and scoring use it: the logits at few places of a row.

    Args:
        model: A model of transformers, or one wrapped by peft. Its attention becomes this module's, which outside of
            a row is transformers' sdpa.

    Raises:
        ValueError: transformers cannot replace the model's attention.
    """

    # Unsloth's layers multiply in bf16 alone.
    runs_in_fp32 = True

    def __init__(self, model):
        self.model = model
        self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()
        # Not the model's: its input embeddings may lie in the host's memory.
        self.device = self.head.weight.device
        self.embeds_on_device = model.get_input_embeddings().weight.device == self.device
        _register()
        model.set_attn_implementation(NAME)
        # transformers only warns.
        if model.config._attn_implementation != NAME:
            raise ValueError("its attention cannot be replaced")

    def __call__(
        self, row: Row, places: torch.Tensor, embeddings: torch.Tensor | None = None, in_fp32: bool = False
    ) -> torch.Tensor:
        """Logits at places of a row on the model's device, by the model's own path, shape (N, vocabulary).

        Args:
            row: The row.
            places: Whose logits, shape (N).
            embeddings: The row's input embeddings if they are known, shape (1, T, width).
            in_fp32: Give logits in fp32, not rounded to the model's type.
        """
        tokens = {"input_ids": row.input_ids} if embeddings is None else {"inputs_embeds": embeddings}
        with within(row), only_at(self.head, places, in_fp32):
            return self._logits(row, **tokens)[0]

    def embed(self, row: Row) -> torch.Tensor:
        """Input embeddings of a row on the model's device, shape (1, T, width)."""
        return self.model.get_input_embeddings()(row.input_ids).to(self.device)

    def _logits(self, row: Row, **tokens: torch.Tensor) -> torch.Tensor:
        # transformers takes a mask of four dimensions as it is; without one it would build (T, T) of them.
        mask = row.input_ids.new_zeros(1, 1, 1, 1)
        output = self.model(
            **tokens, position_ids=row.position_ids, attention_mask=mask, use_cache=False, return_dict=True
        )
        return output.logits


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: Row, scale: float | None) -> torch.Tensor:
    """Attention within a row.

    Args:
        query: Shape (1, heads, T, width).
        key: Shape (1, key heads, T, width); a head of keys serves heads / key heads of queries.
        value: Shape (1, key heads, T, width).
        row: The segments.
        scale: Factor of the products; 1 / sqrt(width) if None.

    Returns:
        Shape (1, T, heads, width).
    """
    run = _flash if kernel_for(query) == "flash" else _padded
    parts = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    output = run(*parts, row, scale)
    if _flash_errors is not None and kernel_for(query.bfloat16()) == "flash":
        # Of the same rounded numbers: rounding alone moves the first layer of Qwen2.5-Coder-0.5B by 13 %, whose keys
        # have biases of up to 158, and that is bf16's matter, not the kernel's.
        exact = _padded(*(part.bfloat16().float() for part in parts), row, scale)
        _flash_errors.append(((_flash(*parts, row, scale).float() - exact).norm() / exact.norm()).item())
    return output[None]


def kernel_for(query: torch.Tensor) -> Kernel:
    """`flash`: FlashAttention-2 in PyTorch, for all segments at once, in bf16 (compute capability 8.0 or later, heads
    of up to 256). `padded`: segments of similar length together, in fp32, through PyTorch's own attention."""
    fits = query.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    half = query.dtype == torch.bfloat16 or torch.is_autocast_enabled(query.device.type)
    return "flash" if query.is_cuda and fits and half and torch.cuda.get_device_capability()[0] >= 8 else "padded"


def _flash(query, key, value, row: Row, scale: float | None) -> torch.Tensor:
    keys, values = (_repeated(part, row.key_index) for part in (key, value))
    # torch.nn.attention.varlen does this in public, but groups heads from torch 2.12 on only; its operator always has.
    # Where a segment sees more than itself, the causal mask is aligned to the end, as in FlashAttention 2.1.
    return torch.ops.aten._flash_attention_forward(
        query.bfloat16().contiguous(),
        keys,
        values,
        row.query_ends,
        row.key_ends,
        row.longest_query,
        row.longest_keys,
        0.0,
        True,
        False,
        scale=scale,
    )[0]


def _repeated(part: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Keys or values of all segments, those of shared segments repeated; their gradients are added up in fp32."""
    return (part.float() if part.requires_grad else part).index_select(0, index).bfloat16()


def _padded(query, key, value, row: Row, scale: float | None) -> torch.Tensor:
    # fp32: on a CPU that is no slower for so few products, and without it gradients of what is shared would be rounded
    # at each addition. Autocast would take it back.
    with torch.autocast(query.device.type, enabled=False):
        parts = [_group(query.float(), key.float(), value.float(), group, scale) for group in row.groups]
    return torch.cat(parts).index_select(0, row.places).to(value.dtype)


def _group(query, key, value, group: Group, scale: float | None) -> torch.Tensor:
    """Attention of the segments of a group, padded; of queries those that are real, shape (queries, heads, width)."""
    segments, longest = group.queries.shape
    heads, key_heads = query.shape[1], key.shape[1]
    # The heads that share keys stand behind one another as further queries, so that no key is repeated for them.
    queries = query[group.queries].view(segments, longest, key_heads, heads // key_heads, -1)
    queries = queries.permute(0, 2, 3, 1, 4).flatten(2, 3)
    keys, values = (part[group.keys].transpose(1, 2) for part in (key, value))
    mask = group.mask.repeat(1, heads // key_heads, 1)[:, None]
    output = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    output = output.view(segments, key_heads, heads // key_heads, longest, -1).permute(0, 3, 1, 2, 4)
    return output.flatten(2, 3)[group.is_query]


@functools.cache
def _register() -> None:
    """Make this module's attention known to transformers, which is imported here: Unsloth wants to come before it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    @torch.compiler.disable
    def attention_forward(module, query, key, value, attention_mask, scaling=None, **keywords):
        row = active()
        if row is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **keywords)
        return attend(query, key, value, row, scaling), None

    AttentionInterface.register(NAME, attention_forward)
    # Outside of a row (generation) the masks are those of sdpa.
    AttentionMaskInterface.register(NAME, sdpa_mask)
