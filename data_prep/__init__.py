"""From the rows of a task to chat examples: tasks, sources, repairs, duplicates, files. Imports no torch."""

from data_prep.errors import DataError, UserError
from data_prep.files import DATA_FILES, Example, Manifest, load_manifest, read_examples
from data_prep.prepare import prepare
from data_prep.task import Columns, Prompt, Splits, Task, find_task, known_tasks

__all__ = [
    "DATA_FILES",
    "Columns",
    "DataError",
    "Example",
    "Manifest",
    "Prompt",
    "Splits",
    "Task",
    "UserError",
    "find_task",
    "known_tasks",
    "load_manifest",
    "prepare",
    "read_examples",
]
