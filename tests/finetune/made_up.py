"""Three invented tasks, in files as people have them."""

from __future__ import annotations

import random
from pathlib import Path

import pandas as pd

WORDS = ["lamp", "river", "invoice", "garden", "printer", "ticket", "window", "engine", "coffee", "bridge", "letter"]
CLASSES = ("Billing", "Delivery", "Other", "Other issue", "Password reset", "Störung")


def texts(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [f"{' '.join(generator.choices(WORDS, k=8))} {row}" for row in range(count)]


def tickets(folder: Path) -> Path:
    """Six classes in JSON lines, with an id, a title and a body."""
    frame = pd.DataFrame({"id": range(240), "title": texts(240, 1), "body": texts(240), "queue": CLASSES * 40})
    frame.to_json(folder / "tickets.jsonl", orient="records", lines=True, force_ascii=False)
    return folder / "tickets.jsonl"


def reviews(folder: Path) -> Path:
    """Three imbalanced classes in CSV, under odd headers: blanks, capitals, no name, an index."""
    frame = pd.DataFrame({" The Review ": texts(300), "Stars?": ["good"] * 240 + ["bad"] * 50 + ["odd"] * 10})
    frame.to_csv(folder / "My Reviews.csv", sep=";", encoding="utf-8-sig")
    return folder / "My Reviews.csv"


def mails(folder: Path) -> Path:
    """Two classes in Parquet, as truth values."""
    frame = pd.DataFrame({"mail": texts(200), "is_spam": [row % 4 == 0 for row in range(200)]})
    frame.to_parquet(folder / "mails.parquet")
    return folder / "mails.parquet"


# Each with its name as a task and its labels.
TASKS = {
    "tickets": (tickets, CLASSES),
    "my-reviews": (reviews, ("bad", "good", "odd")),
    "mails": (mails, ("false", "true")),
}
