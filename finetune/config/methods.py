"""The methods: one entry for each way to use a model, which everything else asks.

A new method is an entry here and its notebook. Its figures, tables, colours and steps of the suite follow from that.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.recipes import DORA, FULL, FULL_UNSLOTH, HEAD, LORA, QLORA, Recipe


@dataclass(frozen=True)
class Method:
    """A way to use a model.

    Attributes:
        title: Its name in tables and pictures.
        spoken: Its name within a sentence.
        color, marker, line: Of its points and lines, which also differ without colour.
        recipe: How it trains; None where nothing is trained.
        evaluation: The notebook that evaluates it.
        notebook: The notebook that trains it.
        like: The method whose values of a profile it shares.
        by_default: Whether `run` includes it without being asked for it.
    """

    title: str
    spoken: str
    color: str
    marker: str
    line: str | tuple
    recipe: Recipe | None
    evaluation: str
    notebook: str | None = None
    like: str = ""
    by_default: bool = True


@dataclass(frozen=True)
class Baseline:
    """What a tuned model has to beat; its attributes are those of a `Method`.

    `learns`: it learns from the texts of the training rows, so that tuned models are tested against it.
    """

    title: str
    spoken: str
    color: str
    marker: str
    line: str | tuple = "-"
    learns: bool = False


# The colours are told apart by colour-blind readers too (Wong 2011, doi:10.1038/nmeth.1618).
METHODS = {
    "base": Method("base model", "the base model", "#999999", "v", ":", None, "base_model_performance"),
    "full": Method(
        "full",
        "full fine-tuning",
        color="#0072B2",
        marker="s",
        line="-",
        recipe=FULL,
        notebook="fine_tuning_full",
        evaluation="full_finetuning_performance",
    ),
    "full_unsloth": Method(
        "full (Unsloth)",
        "full fine-tuning with Unsloth",
        color="#56B4E9",
        marker="D",
        line=(0, (4, 1, 1, 1, 1, 1)),
        recipe=FULL_UNSLOTH,
        notebook="fine_tuning_full_unsloth",
        evaluation="full_finetuning_performance",
        like="full",
    ),
    "lora": Method(
        "LoRA",
        "LoRA",
        color="#E69F00",
        marker="o",
        line="--",
        recipe=LORA,
        notebook="fine_tuning_lora",
        evaluation="lora_finetuning_performance",
    ),
    "qlora": Method(
        "QLoRA",
        "QLoRA",
        color="#009E73",
        marker="^",
        line="-.",
        recipe=QLORA,
        notebook="fine_tuning_qlora",
        evaluation="qlora_finetuning_performance",
    ),
    "dora": Method(
        "DoRA",
        "DoRA",
        color="#D55E00",
        marker="p",
        line=(0, (3, 1, 1, 1)),
        recipe=DORA,
        notebook="fine_tuning_dora",
        evaluation="dora_finetuning_performance",
        like="lora",
        by_default=False,
    ),
    "head": Method(
        "LoRA + head",
        "LoRA with a classification head",
        color="#000000",
        marker="X",
        line=(0, (5, 1)),
        recipe=HEAD,
        notebook="fine_tuning_head",
        evaluation="head_finetuning_performance",
        by_default=False,
    ),
}

BASELINES = {
    "majority": Baseline("majority class", "the majority class", "#D9D9D9", "x"),
    "svm": Baseline("TF-IDF + linear SVM", "the linear SVM", "#CC79A7", "P", line=(0, (1, 1)), learns=True),
    "encoder": Baseline(
        "sentence encoder + logistic", "logistic regression on a sentence encoder", "#882255", "d", learns=True
    ),
    "logistic": Baseline(
        "base, logistic regression", "logistic regression on the base model", "#F0E442", "h", learns=True
    ),
    "few_shot": Baseline("base, few-shot", "the base model with examples in its prompt", "#666666", "*"),
}

# In the order of the tables and pictures.
ALL: dict[str, Method | Baseline] = {
    "majority": BASELINES["majority"],
    "svm": BASELINES["svm"],
    "encoder": BASELINES["encoder"],
    "base": METHODS["base"],
    "logistic": BASELINES["logistic"],
    "few_shot": BASELINES["few_shot"],
    **{run: method for run, method in METHODS.items() if method.recipe},
}
