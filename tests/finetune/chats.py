"""Chat templates of model families, and tokenizers that know their control tokens."""

from __future__ import annotations

import functools
import importlib.resources
import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from data_prep.sources import sample
from data_prep.task import AG_NEWS

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM3 = (
    "{% if enable_thinking is not defined or enable_thinking %}{% set mode = '/think' %}{% else %}"
    "{% set mode = '/no_think' %}{% endif %}"
    "{{ '<|im_start|>system\n## Metadata\n\nToday Date: ' + strftime_now('%d %B %Y') + '\nReasoning Mode: ' + mode }}"
    "{{ '\n\n## Custom Instructions\n\n' + messages[0]['content'].replace('/no_think', '') + '\n\n<|im_end|>\n' }}"
    "{% set think = '' if mode == '/think' else '<think>\n\n</think>\n' %}{% for m in messages[1:] %}"
    "{% if m['role'] == 'user' %}{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>assistant\n' + think + m['content'].lstrip('\n') + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + think }}{% endif %}"
)
# The system text stands in the last user turn.
MISTRAL = (
    "{{ bos_token }}{% set loop_messages = messages[1:] if messages[0]['role'] == 'system' else messages %}"
    "{% for m in loop_messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
    "{% if loop.last or loop.index == loop_messages | length - 1 %}{% if messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] + '\n\n' }}{% endif %}{% endif %}{{ m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
OLMO2 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
GRANITE = (
    "{% for m in messages %}{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] "
    "+ '<|end_of_text|>\n' }}{% if loop.last and add_generation_prompt %}"
    "{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}{% endfor %}"
)
FALCON = (
    "{% for m in messages %}{% if not loop.first %}{{ '\n\n' }}{% endif %}"
    "{{ m['role'].title() + ': ' + m['content'].strip() }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
NO_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
NO_GENERATION_PROMPT = CHATML.partition("{% if add")[0]
IN_PARTS = CHATML.replace("m['content']", "m['content'][0]['text']")


def _trl(name: str) -> str:
    return (importlib.resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


IM = ["<|im_start|>", "<|im_end|>"]
LLAMA3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
PHI3 = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]
GEMMA = ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"]
# Template, control tokens, and of these the first and the last of a conversation. None: it has no BOS of its own.
FAMILIES = {
    "SmolLM2": (CHATML, IM, None, "<|im_end|>"),
    "Qwen2.5": (_trl("qwen2_5"), IM, None, "<|im_end|>"),
    "Qwen3": (_trl("qwen3"), IM, None, "<|im_end|>"),
    "SmolLM3": (SMOLLM3, IM, None, "<|im_end|>"),
    "Llama 3": (_trl("llama3"), LLAMA3, "<|begin_of_text|>", "<|eot_id|>"),
    "Llama 3.2": (_trl("llama3_2"), LLAMA3, "<|begin_of_text|>", "<|eot_id|>"),
    "Mistral v0.3": (MISTRAL, ["<s>", "[INST]", "[/INST]", "</s>"], "<s>", "</s>"),
    "Gemma 2": (_trl("gemma"), GEMMA, "<bos>", "<eos>"),
    "Gemma 3": (_trl("gemma3"), GEMMA, "<bos>", "<eos>"),
    "Phi-3": (_trl("phi3"), PHI3, None, "<|endoftext|>"),
    "OLMo 2": (OLMO2, ["<|endoftext|>"], "<|endoftext|>", "<|endoftext|>"),
    "Granite": (GRANITE, ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"], None, "<|end_of_text|>"),
    "Falcon": (FALCON, ["<|endoftext|>"], None, "<|endoftext|>"),
    "a list of parts": (IN_PARTS, IM, None, "<|im_end|>"),
    "no system turn": (NO_SYSTEM, IM, None, "<|im_end|>"),
    "no generation prompt": (NO_GENERATION_PROMPT, IM, None, "<|im_end|>"),
}  # fmt: skip
# Where a blank is a letter as in SentencePiece, one precedes each stretch of text, or the first. Else it is a byte.
BLANKS = {"Mistral v0.3": "each", "Phi-3": "first", "Gemma 2": "first"}


def tokenizer(family: str):
    """A tokenizer learnt from the sample, with the template and control tokens of a family, and two more of Qwen3's.

    Where it has a BOS, it adds that on its own.
    """
    template, control, bos, eos = FAMILIES[family]
    backend = Tokenizer.from_str(_learnt("bytes" if family not in BLANKS else "letter"))
    if BLANKS.get(family) == "each":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token="<pad>")
    made.add_tokens(control, special_tokens=True)
    made.add_tokens(["<think>", "</think>", "<tool_call>", "  "])
    if bos:
        single = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, made.bos_token_id)]
        )
        made.backend_tokenizer.post_processor = single
    made.chat_template = template
    return made


@functools.cache
def _learnt(blanks: str) -> str:
    letters = blanks == "letter"
    backend = Tokenizer(models.BPE(byte_fallback=letters, unk_token="<unk>" if letters else None))
    if letters:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<unk>", *(f"<0x{number:02X}>" for number in range(256))],
        initial_alphabet=[] if letters else pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=8,
        show_progress=False,
    )
    backend.train_from_iterator((row.text for row in sample(AG_NEWS).rows("train")), trainer)
    # The trainer's special tokens are the model's own: of no use to a template.
    return json.dumps(json.loads(backend.to_str()) | {"added_tokens": []})
