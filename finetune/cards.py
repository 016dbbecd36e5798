"""The model card that goes with every artefact."""

from __future__ import annotations

import json
import textwrap

from finetune.config.plan import Settings
from finetune.data import PreparedData

LOADING_ADAPTER = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")"""

# On another base than the one that it was trained on, an adapter is another model.
LOADING_4BIT_ADAPTER = """\
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, BitsAndBytesConfig

four_bit = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
model = AutoPeftModelForCausalLM.from_pretrained("{folder}", quantization_config=four_bit)
tokenizer = AutoTokenizer.from_pretrained("{folder}")"""

LOADING_WEIGHTS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")"""

CARD = """\
---
base_model: {model}
library_name: {library}
pipeline_tag: text-generation
---

# {model}, {method} on {data}

Classifies a text as {labels}, and answers in JSON: `{answer}`.

| | |
|---|---|
| base model | {model} (its licence applies) |
| method | {method} |
| data | {data}, fingerprint {fingerprint}, {rows:,} training rows |
| prompt | {prompt} |
| recipe | {recipe} |

{licence}## Load it

```python
{loading}
```

## Prompt

```json
{messages}
```
"""


def model_card(settings: Settings, data: PreparedData, model: str) -> str:
    """The card's text: what the model is, what it was trained on, how it is loaded and prompted."""
    adapter = settings.recipe.adapter
    loading = {"full": LOADING_WEIGHTS, "lora": LOADING_ADAPTER, "qlora": LOADING_4BIT_ADAPTER}[settings.recipe.method]
    return CARD.format(
        model=model,
        library="peft" if adapter else "transformers",
        method={"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}[settings.recipe.method],
        labels=", ".join(data.task.labels[:-1]) + f" or {data.task.labels[-1]}",
        answer=data.task.answer_for(data.task.labels[0]),
        licence=f"{textwrap.fill(data.task.licence, 120)}\n\n" if data.task.licence else "",
        data=data.title,
        fingerprint=data.manifest.fingerprint,
        rows=len(data.train),
        prompt=data.manifest.prompt,
        recipe=", ".join(f"{key} {value}" for key, value in settings.values.items() if key in _TOLD),
        loading=loading.format(folder="PATH/TO/THIS/FOLDER"),
        messages=json.dumps(data.task.form(data.manifest.prompt)[:-1], indent=2, ensure_ascii=False),
    )


def merged_card(settings: Settings, data: PreparedData, model: str, base: str) -> str:
    """The card of a model that an adapter was merged into; `base` says which weights those were."""
    card = model_card(settings, data, model)
    start, end = card.index("```python\n"), card.index("\n```\n")
    loading = LOADING_WEIGHTS.format(folder="PATH/TO/THIS/FOLDER")
    card = card[:start] + "```python\n" + loading + card[end:]
    return card.replace("library_name: peft", "library_name: transformers").replace(
        "\n## Load it", f"\nThe adapter is merged into {base}.\n\n## Load it"
    )


_TOLD = (
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "r",
    "lora_alpha",
    "target_modules",
    "dtype",
    "seed",
)
