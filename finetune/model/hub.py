"""Where a model is, and what is said if it is not there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from data_prep import UserError
from finetune.model import smollm2


def model_path(name: str) -> str:
    """What `from_pretrained` takes: a hub name or a folder; `embedded` is fetched once and lies in a folder."""
    return str(smollm2.ensure()) if name == "embedded" else str(name)


@contextlib.contextmanager
def loading(path: str) -> Iterator[None]:
    """Turn the libraries' long messages about a model that is not there into one sentence."""
    try:
        yield
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"the model {path} could not be loaded ({first}); check its name or folder, and that the hub can be reached"
        ) from error
