"""The model card that goes with every artefact."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from finetune.config.methods import METHODS
from finetune.data import PreparedData
from finetune.records import RunRecord

# Not AutoPeftModel: it looks for a base that is a folder where that was in training.
LOADING_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")"""

# On another base than the one that it was trained on, an adapter is another model.
LOADING_4BIT_ADAPTER = """\
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

four_bit = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
model = AutoModelForCausalLM.from_pretrained("{base}", quantization_config=four_bit)
model = PeftModel.from_pretrained(model, "{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")"""

# Without the pad token, a padded row's last token would be padding.
LOADING_HEAD = """\
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForSequenceClassification.from_pretrained(
    "{base}",
    id2label=dict(enumerate({labels})),
    pad_token_id=tokenizer.pad_token_id,
)
model = PeftModel.from_pretrained(model, "{folder}")"""

LOADING_WEIGHTS = """\
from transformers import {loads}, AutoTokenizer

model = {loads}.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")"""

CARD = """\
---
base_model: {model}
library_name: {library}
pipeline_tag: {pipeline}
---

# {model}, {method} on {data}

Classifies a text as {labels}{answer}

| | |
|---|---|
| base model | {model} (its licence applies) |
| method | {method} |
| data | {data}, fingerprint {fingerprint}, {rows:,} training rows |
| prompt | {prompt} |
| recipe | {recipe} |

{licence}## Load it
{note}

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
    is_head = ran.get("task_type") == "SEQ_CLS"
    loading = LOADING_HEAD if is_head else LOADING_4BIT_ADAPTER if ran["load_in_4bit"] else LOADING_ADAPTER
    whole = bool(merged_into) or not ran["adapter"]
    base, note = ran["model"], f"\nThe adapter is merged into {merged_into}.\n" if merged_into else ""
    if not whole and (base == "embedded" or Path(base).is_dir()):
        base = f"PATH/TO/{Path(record.model).name}"
        note = "\nThe base model is a folder" + (
            f": `checkpoints/{record.model}` in this project, which is not the hub's model of that name.\n"
            if ran["model"] == "embedded"
            else ".\n"
        )
    return CARD.format(
        model=record.model,
        library="transformers" if whole else "peft",
        method=METHODS[record.run].spoken,
        labels=", ".join(data.task.labels[:-1]) + f" or {data.task.labels[-1]}",
        pipeline="text-classification" if is_head else "text-generation",
        answer=": a head reads the last token of the chat template with `add_generation_prompt=True`."
        if is_head
        else f", and answers in JSON: `{data.task.answer_for(data.task.labels[0])}`.",
        licence=f"{textwrap.fill(data.task.licence, 120)}\n\n"
        if data.task.licence and data.title == data.task.title
        else "",
        data=data.title,
        fingerprint=record.data.fingerprint,
        rows=record.data.train_rows,
        prompt=record.data.prompt,
        recipe=", ".join(f"{key} {value}" for key, value in ran.items() if key in _TOLD),
        note=note,
        loading=(LOADING_WEIGHTS if whole else loading).format(
            base=base,
            folder="PATH/TO/THIS/FOLDER",
            labels=ran.get("labels"),
            loads="AutoModelForSequenceClassification" if is_head else "AutoModelForCausalLM",
        ),
        messages=json.dumps(data.task.form(record.data.prompt)[:-1], indent=2, ensure_ascii=False),
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
