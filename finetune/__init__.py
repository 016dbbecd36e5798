"""The engine that the notebooks share.

A notebook begins with `plan`, or with `plan_training`, which also imports the training engine: Unsloth has to come
before anything that imports transformers, peft or trl, so this file imports none of them.
"""

from finetune.settings import Settings, plan, plan_training

__all__ = ["Settings", "plan", "plan_training"]
