"""From news articles to chat examples: sources, prompts, schema, validation. Imports no torch."""

from data_prep.errors import DataError, UserError
from data_prep.pipeline import Manifest, prepare
from data_prep.prompts import PROMPTS, Prompt
from data_prep.schema import LABELS, Article, Example, answer_for, parse_answer
from data_prep.store import DATA_FILES, load_manifest, read_examples

__all__ = [
    "DATA_FILES",
    "LABELS",
    "PROMPTS",
    "Article",
    "DataError",
    "Example",
    "Manifest",
    "Prompt",
    "UserError",
    "answer_for",
    "load_manifest",
    "parse_answer",
    "prepare",
    "read_examples",
]
