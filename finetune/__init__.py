"""The engine that the notebooks share.

A notebook begins with `plan`, `plan_training` or `find_run`. Unsloth has to come before anything that imports
transformers, peft or trl, so this file imports none of them: the other names are imported when they are asked for.
"""

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from finetune import paths as _paths
from finetune.config import plan as _plan
from finetune.config.plan import Settings

_paths.ensure_user()

_LAZY = {
    "load_data": "finetune.data",
    "resolve": "finetune.train.resolve",
    "housekeeping": "finetune.train.resolve",
    "load_model": "finetune.model.load",
    "add_lora": "finetune.model.load",
    "trainable_parameters": "finetune.model.load",
    "PackedSFTTrainer": "finetune.train.trainer",
    "HeadTrainer": "finetune.train.classifier",
    "newest_checkpoint": "finetune.train.save",
    "save_run": "finetune.train.save",
}
__all__ = ["Settings", "find_run", "plan", "plan_training", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'finetune' has no attribute '{name}'")
    return getattr(importlib.import_module(_LAZY[name]), name)


def plan(
    run: str, profile: str = "auto", overrides: Mapping[str, Any] | None = None, task: str = _plan.TASK
) -> Settings:
    """Settle what will run; see `finetune.config.plan.plan`."""
    with _forgetting():
        return _plan.plan(run, profile, overrides, task)


def plan_training(
    run: str, profile: str = "auto", overrides: Mapping[str, Any] | None = None, task: str = _plan.TASK
) -> Settings:
    """`plan`, and import Unsloth if it is the engine: it must come before anything that imports transformers or trl.

    Evaluation does without: Unsloth patches transformers, and artefacts are judged as plain libraries load them.
    """
    with _forgetting():
        settings = _plan.plan(run, profile, overrides, task)
        if settings.engine == "unsloth":
            # A plan alone needs no torch.
            from finetune.model.unsloth import import_unsloth

            import_unsloth()
        return settings


def find_run(run: str, profile: str = "auto", overrides: Mapping[str, Any] | None = None, task: str = _plan.TASK):
    """The model that a training left, or the base model; see `finetune.evaluate.find.find_run`."""
    with _forgetting():
        from finetune.evaluate import find

        return find.find_run(run, profile, overrides, task)


@contextlib.contextmanager
def _forgetting() -> Iterator[None]:
    """Where a notebook's first cell fails, forget what an earlier Run All left.

    Jupyter may go on with the cells below (ipykernel 7.4 does on slow machines). With the old `settings` they would
    train, and overwrite a record.
    """
    try:
        yield
    except Exception:
        ipython = sys.modules.get("IPython")
        shell = ipython.get_ipython() if ipython else None
        if shell:
            ours = [name for name, value in shell.user_ns.items() if type(value).__module__.startswith("finetune.")]
            for name in ours:
                del shell.user_ns[name]
        raise
