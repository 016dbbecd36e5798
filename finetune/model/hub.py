"""Where a model is, and what is said if it is not there."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from data_prep import UserError
from finetune.files import BASE, folder_digest
from finetune.model import smollm2


def model_path(name: str) -> str:
    """What `from_pretrained` takes: a hub name or a folder; `embedded` is fetched once and lies in a folder."""
    return str(smollm2.ensure()) if name == "embedded" else str(name)


def base_digest(config, names: re.Pattern = BASE) -> str:
    """12 hexadecimal digits of the weights and the configuration that a model was loaded from.

    They are those of the files' content, which takes about 10 s for 15 GB. A hub model has the same digits after a
    commit that changed its page alone. Empty where the files are gone: that is no reason to lose a training.

    Args:
        config: The loaded model's.
        names: Which files count.
    """
    from transformers.utils import cached_file

    try:
        # Of a hub model, the one in the cache beside its weights.
        file = cached_file(config.name_or_path, "config.json", revision=config._commit_hash)
    except (OSError, ValueError):
        return ""
    return folder_digest(Path(file).parent, names)


@contextlib.contextmanager
def loading(path: str) -> Iterator[None]:
    """Turn the libraries' long messages about a model that is not there into one sentence."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"the model {path} could not be loaded ({first}); check its name or folder, that its files are whole, and "
            "that the hub can be reached"
        ) from error
