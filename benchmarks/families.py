"""Whether our figures are plain transformers': tiny models of many families with random weights, scored and trained.

    python -m benchmarks.families    # a minute on two cores

Writes results/reference/families.json, from which `python -m benchmarks.render` makes docs/families.md.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from trl import SFTConfig

from data_prep import Example, UserError
from data_prep.files import replacing
from data_prep.sources import sample
from data_prep.task import AG_NEWS
from finetune import paths, records
from finetune.evaluate.score import LabelScorer
from finetune.model import encode
from finetune.train.trainer import PackedSFTTrainer

FILE = paths.PROJECT / "results" / "reference" / "families.json"
ROWS = 8
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    # Large, so that a random model's answers depend on the article.
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Name to model type and configuration. The rows have 141 to 221 tokens.
FAMILIES = {
    "Llama 3": ("llama", {"rope_parameters": LLAMA_3 | {"rope_theta": 5e5, "original_max_position_embeddings": 512}}),
    "Mistral, a window of 64 tokens": ("mistral", {"sliding_window": 64}),
    "Gemma 2": ("gemma2", {"head_dim": 8}),
    "Gemma 3": ("gemma3_text", {"head_dim": 8}),
    "Gemma 3, a window of 64 tokens": ("gemma3_text", {"head_dim": 8, "sliding_window": 64, "num_hidden_layers": 6}),
    "Qwen2.5": ("qwen2", {}),
    "Qwen3": ("qwen3", {"head_dim": 8}),
    "Qwen3-MoE": ("qwen3_moe", EXPERTS | {"head_dim": 8}),
    "Phi-3": ("phi3", {}),
    "SmolLM3": ("smollm3", {"num_hidden_layers": 4}),
    "OLMo 2": ("olmo2", {}),
    "Granite": ("granite", {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0}),
    "GPT-2": ("gpt2", {}),
    "Falcon": ("falcon", {"new_decoder_architecture": True}),
    "Jamba, a hybrid": (
        "jamba",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
    ),
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE tokenizer of 600 tokens with a chat template, learnt from the sample."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The answers often, so that a label is a token or two, as with a real tokenizer.
    texts = [row.text for row in sample(AG_NEWS).rows("train")]
    backend.train_from_iterator(texts + [AG_NEWS.answer_for(label) for label in AG_NEWS.labels] * 200, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(kind: str, changes: dict[str, Any], tokenizer) -> PreTrainedModel:
    """A model of this type in fp32, in evaluation mode; the same weights at each call."""
    tokens = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**COMMON | tokens | changes)).eval()


def measure(name: str) -> dict[str, Any]:
    """The outcome of a family: how it reads rows, and our differences from plain transformers; or why it is refused."""
    kind, changes = FAMILIES[name]
    tokenizer = tiny_tokenizer()
    model, plain = (tiny_model(kind, changes, tokenizer) for _ in range(2))
    examples = [
        Example(f"test-{number}", row.text, row.label, AG_NEWS.messages("lean", row.text, row.label))
        for number, row in zip(range(ROWS), sample(AG_NEWS).rows("test"), strict=False)
    ]
    line = {"family": name, "model_type": kind}
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(folder, packing=True, max_length=1024, use_cpu=True, bf16=False, report_to=[])
        try:
            trainer = PackedSFTTrainer(model, args, tokenizer, examples, examples, AG_NEWS)
        except UserError as error:
            return line | {"refusal": str(error)}
    way, _, reason = trainer.checks["rows"].partition(" ")
    line |= {"rows": way, "reason": reason.rpartition("; ")[2] if way == "padded" else ""}

    rows = [trainer.train_dataset[number] for number in range(ROWS)]
    count = sum(label != encode.IGNORED for row in rows for label in row["labels"])
    prompts = [row.prompt for row in encode.encode(tokenizer, examples, 1024)]
    answers = [encode.answer_tokens(tokenizer, AG_NEWS.answer_for(label))[:-1] for label in AG_NEWS.labels]
    with torch.no_grad():
        own = sum(
            plain(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]), num_items_in_batch=count).loss
            for row in rows
        )
        model.eval()
        loss = trainer.compute_loss(model, trainer.data_collator(rows), num_items_in_batch=count)
        wanted = torch.zeros(ROWS, len(answers), dtype=torch.float64)
        for number, prompt in enumerate(prompts):
            for label, answer in enumerate(answers):
                logits = plain(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
                scores = logits.double().log_softmax(-1)
                wanted[number, label] = scores[range(len(answer)), answer].sum()
    wanted = wanted.softmax(1).numpy()
    for size in (1, ROWS):
        found = LabelScorer(trainer.backbone, tokenizer, AG_NEWS, size).score(prompts)
        line[f"scores_{size}"] = float(abs(found - wanted).max())
    return line | {"loss": float(own), "loss_difference": abs(float(loss - own))}


def main() -> int:
    """Measure all families, and write the file."""
    os.environ.setdefault("FINETUNE_COMMAND", "python -m benchmarks.families")
    # Tiny tensors gain nothing from threads.
    torch.set_num_threads(1)
    lines = [measure(name) for name in FAMILIES]
    content = {"environment": records.environment().model_dump(), "families": lines}
    with replacing(FILE) as file:
        file.write(json.dumps(content, indent=1) + "\n")
    for line in lines:
        print(*line.values(), sep=" | ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
