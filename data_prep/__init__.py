"""From the rows of a task to chat examples: tasks, sources, repairs, duplicates, files. Imports no torch."""

from data_prep.errors import DataError, UserError
from data_prep.files import DATA_FILES, Example, Manifest, load_manifest, read_examples
from data_prep.prepare import prepare
from data_prep.task import TASKS, Columns, Prompt, Task, find_task

__all__ = [
    "DATA_FILES",
    "TASKS",
    "Columns",
    "DataError",
    "Example",
    "Manifest",
    "Prompt",
    "Task",
    "UserError",
    "find_task",
    "load_manifest",
    "prepare",
    "read_examples",
]
