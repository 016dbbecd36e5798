"""The engine that the notebooks share.

A notebook begins with `plan`, or with `plan_training`, which also imports the training engine: Unsloth has to come
before anything that imports transformers, peft or trl, so this file imports none of them.
"""

from collections.abc import Mapping
from typing import Any

from finetune.config.plan import Settings, plan

__all__ = ["Settings", "plan", "plan_training"]


def plan_training(run: str, profile: str = "auto", overrides: Mapping[str, Any] | None = None) -> Settings:
    """`plan`, and import Unsloth if it is the engine: it must come before anything that imports transformers or trl.

    Evaluation does without: Unsloth patches transformers, and artefacts are judged as plain libraries load them.
    """
    settings = plan(run, profile, overrides)
    if settings.engine == "unsloth":
        # A plan alone needs no torch.
        from finetune.model.unsloth import import_unsloth

        import_unsloth()
    return settings
