"""The records that data preparation passes on, and the one place that knows the answer's form."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Literal

# In the order of AG News' class indices (1 World ... 4 Sci/Tech in the CSV files, 0 ... 3 on the hub).
LABELS = ("World", "Sports", "Business", "Sci/Tech")

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Article:
    """One news item. `title` is empty where the source holds a single text."""

    title: str
    description: str
    label: str

    @property
    def text(self) -> str:
        """Title and description joined by one space, alike whether or not the title is empty."""
        return f"{self.title} {self.description}".strip()


@dataclass(frozen=True, slots=True)
class Example:
    """One chat example: system, user and assistant message.

    `has_twin` marks a test row whose article is repeated, exactly or nearly, in the training rows.
    """

    id: str
    messages: list[Message]
    has_twin: bool = False

    @property
    def prompt(self) -> list[Message]:
        return self.messages[:-1]

    @property
    def article(self) -> str:
        """The article's text: what follows the request."""
        return self.prompt[-1]["content"].partition("\n\n")[2]

    @property
    def label(self) -> str:
        return json.loads(self.messages[-1]["content"])["category"]


@cache
def answer_for(label: str) -> str:
    """The assistant's message for a label: compact JSON, e.g. `{"category":"World"}`."""
    return json.dumps({"category": label}, separators=(",", ":"))


def parse_answer(text: str) -> str | None:
    """The label in a generated answer, or None if it is not exactly the JSON that was asked for."""
    try:
        # Pairs instead of a dict, which would hide a second "category".
        pairs = json.loads(text, object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        # ValueError: not JSON, or a number of thousands of digits; RecursionError: brackets in brackets in brackets.
        return None
    # `in` on a tuple compares by equality, so a category that is a list is no error.
    allowed = tuple(((("category", label),), label) for label in LABELS)
    return next((label for form, label in allowed if pairs == form), None)
