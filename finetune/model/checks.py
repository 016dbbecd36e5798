"""What is checked of a model before its figures count: that it fits tokenizer and method, and that our logits are its
own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from data_prep import Task, UserError
from finetune.config.recipes import Recipe
from finetune.model import load
from finetune.model.encode import answer_tokens, common_prefix
from finetune.model.packing import Backbone, Forest, Row, comparing_flash
from finetune.model.padded import Padded

# Relative error of a place's logits. fp32 rounds by 0.000001 to 0.0001; articles that see each other gave 0.02 to 1.4.
LARGEST_ERROR = 0.001
# The same in bf16, for Unsloth's layers and FlashAttention: 0.003 to 0.02 by rounding.
LARGEST_BF16_ERROR = 0.1
# The check's last segment, which is behind an article as a label is.
ENDING = 3
# Places of a sequence whose logits are compared, at most: its first and last ones, and more between.
COMPARED = 128


def check_model(
    config,
    tokenizer,
    task: Task,
    sequences: Sequence[Sequence[int]],
    recipe: Recipe | None = None,
    new_tokens: int = 0,
) -> None:
    """Refuse what would end in a wrong figure or a traceback, before any weights are loaded.

    Args:
        config: The model's configuration.
        tokenizer: Its tokenizer.
        task: Its labels must be writable.
        sequences: Token ids of all that the model will read: prompts, or prompts with answers.
        recipe: How it is trained; None if it is not.
        new_tokens: How many tokens are generated behind a sequence.

    Raises:
        UserError: The tokenizer cannot write a label, or uses tokens that the model has no embedding for; sequences
            are longer than the model has positions; the weights are quantised, and the method needs plain ones; or
            the method needs a classification head, and transformers has none for this model.
    """
    if recipe:
        load.model_class(config, recipe.task_type)
    name, text_config = config.name_or_path or config.model_type, config.get_text_config()
    quantisation = getattr(config, "quantization_config", None)
    if quantisation and recipe and not recipe.load_in_4bit:
        kind = quantisation["quant_method"] if isinstance(quantisation, dict) else quantisation.quant_method
        raise UserError(
            f"{name} holds quantised weights ({getattr(kind, 'value', kind)}), which full fine-tuning and LoRA cannot "
            "train on; choose the model's plain weights, or QLoRA"
        )
    for label in task.labels:
        answer = task.answer_for(label)
        ids = answer_tokens(tokenizer, answer)[:-1]
        written = tokenizer.decode(ids)
        if tokenizer.unk_token_id in ids or "".join(written.split()) != "".join(answer.split()):
            raise UserError(
                f"the tokenizer of {name} cannot write the label {label!r}: {answer} becomes {written!r}; "
                "choose another model, or other names for the labels"
            )
    rows = text_config.vocab_size
    largest = max(map(max, sequences))
    if max(largest, tokenizer.pad_token_id or 0) >= rows:
        token = largest if largest >= rows else tokenizer.pad_token_id
        raise UserError(
            f"the tokenizer of {name} has tokens that the model has not: {tokenizer.convert_ids_to_tokens(token)!r} is "
            f"number {token}, and the embedding has {rows} rows; resize the model's embedding, or use its own tokenizer"
        )
    longest, positions = max(map(len, sequences)) + new_tokens, getattr(text_config, "max_position_embeddings", None)
    if positions and longest > positions and _learns_positions(config, positions):
        raise UserError(
            f"{name} has learnt {positions} positions, and the longest row needs {longest}; "
            "lower max_length, or choose a model with more positions"
        )


def _learns_positions(config, positions: int) -> bool:
    """Whether a model looks its positions up in a table of weights (GPT-2, OPT); others compute them."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    vocabulary = model.get_input_embeddings()
    tables = [part for part in model.modules() if isinstance(part, nn.Embedding) and part is not vocabulary]
    # OPT's table has two more rows than positions.
    return any(positions <= table.num_embeddings <= positions + 2 for table in tables)


@torch.no_grad()
def choose_backbone(model, sequences: Sequence[Sequence[int]]) -> tuple[Backbone | Padded, str]:
    """Compare our logits with the model's own, and choose how it reads its rows.

    The reference is `model(input_ids).logits` of each sequence alone, with the attention that is written out in the
    model's own code (`eager`): transformers' faster ones leave out what they do not know, such as Gemma 2's cap. Packed
    rows are chosen if they give the same, padded batches if only those do. Weights and products are fp32 meanwhile,
    one block at a time: in bf16 a mixture of experts may route a token elsewhere, which is rounding and no fault.

    Args:
        model: The model; it is left in the mode that it came in.
        sequences: Token ids of all that it will read. The longest one is compared, so that a sliding window shows.

    Returns:
        What computes logits, and a sentence that says which it is and why.

    Raises:
        UserError: Neither gives the model's own logits.
    """
    kind = load.backbone_kind(model)
    longest, shortest = max(sequences, key=len), min(sequences, key=len)
    if longest == shortest:
        # The same article twice would hide that one sees the other.
        shortest = list(reversed(longest))
    attention, modes = model.config._attn_implementation, [(part, part.training) for part in model.modules()]
    try:
        load.evaluating(model)
        tolerance, context = LARGEST_ERROR, _in_fp32(model)
        if kind.runs_in_fp32:
            model.set_attn_implementation("eager")
        else:
            tolerance, context = LARGEST_BF16_ERROR, torch.autocast("cuda", dtype=torch.bfloat16)
        with context:
            device = model.get_output_embeddings().weight.device
            try:
                # The longest last: dynamic rotary positions are those of the longest row so far.
                own = [model(input_ids=torch.tensor([ids], device=device)).logits[0] for ids in (shortest, longest)]
                own.reverse()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                # Mamba reads 4-bit weights past their layers; PhiMoE's router cannot have an adapter.
                raise UserError(
                    f"{model.config.name_or_path} cannot run its own forward pass ({str(error).splitlines()[0]}); "
                    "choose another model, other target_modules, or weights that are not in 4 bits"
                ) from error
            together = _Sample([longest, shortest])
            try:
                backbone = kind(model)
                with comparing_flash() as flash_errors:
                    error = together.error(backbone, own)
            except torch.OutOfMemoryError:
                raise
            except Exception as raised:
                # Layers that know no packed rows raise anything.
                reason = f"it cannot run them ({type(raised).__name__}: {str(raised).splitlines()[0][:80]})"
            else:
                flash_error = max(flash_errors, default=0.0)
                if error < tolerance and flash_error < LARGEST_BF16_ERROR:
                    lengths = f"articles of {len(shortest)} and {len(longest)} tokens"
                    return backbone, f"packed rows: logits within {error:.2g} of the model's own, for {lengths}"
                if error < tolerance:
                    reason = f"FlashAttention on this GPU is off by {flash_error:.0%}"
                elif (alone := _Sample([longest]).error(backbone, own[:1])) >= tolerance:
                    reason = (
                        f"even one article's logits are off by {alone:.1%}, as with a sliding window shorter than its "
                        f"{len(longest)} tokens"
                    )
                else:
                    reason = f"articles in one row see each other, and their logits are off by {error:.1%}"
            padded = Padded(model)
            for implementation in (attention, "eager"):
                model.set_attn_implementation(implementation)
                error = together.error(padded, own)
                if error < tolerance:
                    break
    finally:
        for part, mode in modes:
            part.training = mode
    if not error < tolerance:
        raise UserError(
            f"{model.config.name_or_path}: packed rows do not suit this model ({reason}), and in padded batches its "
            f"logits differ from its own by {error:.1%}; choose another model"
        )
    return padded, f"padded batches through plain transformers: packed rows do not suit this model; {reason}"


class _Sample:
    """A row laid out as training and scoring do: sequences behind what they share, and endings behind each.

    One sequence stands in its row as it is."""

    def __init__(self, sequences: Sequence[Sequence[int]]):
        forest = Forest()
        shared, root, ending = [], None, 0
        if len(sequences) > 1:
            # Each has at least a token between what is shared and its ending.
            ending = ENDING
            shared = common_prefix(sequences)[: max(0, min(map(len, sequences)) - ending - 1)]
            root = forest.add(shared) if shared else None
        self._columns: list[torch.Tensor] = []
        places: list[int] = []
        for sequence in sequences:
            middle = sequence[len(shared) : len(sequence) - ending]
            stem = forest.add(middle, root)
            last = forest.last(stem)
            seen = [*range(len(shared)), *range(last + 1 - len(middle), last + 1)]
            if ending:
                # Another label's ending first: the right one must not see it.
                forest.add(sequence[:ending], stem)
                last = forest.last(forest.add(sequence[-ending:], stem))
                seen += range(last + 1 - ending, last + 1)
            columns = _spread(len(shared), len(sequence))
            self._columns.append(torch.tensor(columns))
            places += [seen[column] for column in columns]
        self._row: Row = forest.row()
        self._places = torch.tensor(places)

    def error(self, backbone: Backbone | Padded, own: Sequence[torch.Tensor]) -> float:
        """The largest relative error of a place's logits against `own`, the sequences' logits of shape (T, V)."""
        device = backbone.device
        found = backbone(self._row.to(device), self._places.to(device), in_fp32=True).float()
        wanted = torch.cat([logits[columns.to(device)] for logits, columns in zip(own, self._columns, strict=True)])
        # What all tokens' logits have in common changes no probability, and would hide what differs.
        found, wanted = (logits - logits.mean(-1, keepdim=True) for logits in (found, wanted.float()))
        return ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()


def _spread(shared: int, length: int) -> list[int]:
    """Places to compare: where an article begins and ends, and evenly between."""
    if length <= COMPARED:
        return list(range(length))
    edges = {*range(shared, min(shared + 16, length)), *range(length - 16, length)}
    return sorted(edges | set(torch.linspace(0, length - 1, COMPARED - len(edges)).long().tolist()))


@contextlib.contextmanager
def _in_fp32(model) -> Iterator[None]:
    """Hold a model's weights in fp32 and multiply in it; the largest list of blocks only while each block runs.

    What was rounded to bf16 is exact in fp32, and the model's own tensors come back untouched."""
    from bitsandbytes.nn import Linear4bit

    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    blocks = list(max(lists, key=lambda part: sum(p.numel() for p in part.parameters()), default=[]))
    halves: dict[torch.Tensor, torch.Tensor] = {}

    def widen(tensors) -> None:
        for tensor in tensors:
            if tensor.dtype in (torch.bfloat16, torch.float16) and tensor not in halves:
                halves[tensor], tensor.data = tensor.data, tensor.data.float()

    def restore(tensors) -> None:
        for tensor in tensors:
            if tensor in halves:
                tensor.data = halves.pop(tensor)

    def tensors_of(module: nn.Module) -> list[torch.Tensor]:
        return [*module.parameters(), *module.buffers()]

    in_blocks = {tensor for block in blocks for tensor in tensors_of(block)}
    handles = []
    for block in blocks:
        handles.append(block.register_forward_pre_hook(lambda module, _: widen(tensors_of(module))))
        handles.append(block.register_forward_hook(lambda module, *_: restore(tensors_of(module)), always_call=True))
    four_bit = {part: part.compute_dtype for part in model.modules() if isinstance(part, Linear4bit)}
    try:
        widen(tensor for tensor in tensors_of(model) if tensor not in in_blocks)
        for part in four_bit:
            part.compute_dtype = torch.float32
        with torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        for handle in handles:
            handle.remove()
        restore(list(halves))
        for part, dtype in four_bit.items():
            part.compute_dtype = dtype
