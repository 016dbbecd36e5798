"""The model card that goes with every artefact."""

from __future__ import annotations

import json
import textwrap

from finetune.config.methods import METHODS
from finetune.data import PreparedData
from finetune.records import RunRecord

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


def model_card(record: RunRecord, data: PreparedData, merged_into: str = "") -> str:
    """The card's text: what the model is, what it was trained on, how it is loaded and prompted.

    Args:
        record: What ran.
        data: What it was trained on.
        merged_into: The weights that its adapter was merged into, if it was.
    """
    ran = record.settings
    loading = LOADING_4BIT_ADAPTER if ran["load_in_4bit"] else LOADING_ADAPTER
    whole = bool(merged_into) or not ran["adapter"]
    card = CARD.format(
        model=record.model,
        library="transformers" if whole else "peft",
        method=METHODS[record.run].spoken,
        labels=", ".join(data.task.labels[:-1]) + f" or {data.task.labels[-1]}",
        answer=data.task.answer_for(data.task.labels[0]),
        licence=f"{textwrap.fill(data.task.licence, 120)}\n\n"
        if data.task.licence and data.title == data.task.title
        else "",
        data=data.title,
        fingerprint=record.data.fingerprint,
        rows=record.data.train_rows,
        prompt=record.data.prompt,
        recipe=", ".join(f"{key} {value}" for key, value in ran.items() if key in _TOLD),
        loading=(LOADING_WEIGHTS if whole else loading).format(folder="PATH/TO/THIS/FOLDER"),
        messages=json.dumps(data.task.form(record.data.prompt)[:-1], indent=2, ensure_ascii=False),
    )
    return (
        card.replace("\n## Load it", f"\nThe adapter is merged into {merged_into}.\n\n## Load it")
        if merged_into
        else card
    )


_TOLD = {
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "lr_scheduler_type",
    "r",
    "lora_alpha",
    "target_modules",
    "dtype",
    "seed",
}
