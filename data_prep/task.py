"""The tasks: labels, prompts, the answer's form, where the rows come from and how they are split.

A task is a file `tasks/NAME.yaml`: in this package, or in the folder of outputs (FINETUNE_HOME, or the project).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from data_prep.clean import REPAIRS
from data_prep.errors import DataError, UserError
from data_prep.files import Message, Split

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
Text = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
SourceKind = Literal["files", "hub", "csv"]
Repair = Literal[tuple(REPAIRS)]
BUILT_IN = Path(__file__).parent / "tasks"
NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def _several(value: Any) -> Any:
    """One name is a list of one."""
    return [value] if isinstance(value, str) else value


Texts = Annotated[tuple[Text, ...], BeforeValidator(_several), Field(min_length=1)]


@dataclass(frozen=True, config=STRICT)
class Prompt:
    """A system message. Change its text, and its version changes with it: records carry the version."""

    name: str
    version: int
    system: str

    @property
    def id(self) -> str:
        return f"{self.name}-{self.version}"


@dataclass(frozen=True, config=STRICT)
class Columns:
    """Where a task's rows are, which columns hold the texts and the label, and what the label's values stand for."""

    texts: Texts
    """One column or more; joined by a space they are the row's text."""
    label: Text
    """The label's column."""
    at: Text | dict[Split, Text] | None = None
    """A file, a folder of train, validation and test files, a file for each split, or a name on the hub."""
    names: tuple[str, ...] = ()
    """The columns of a CSV file without a header, in their order."""
    values: dict[str, Text] = Field(default_factory=dict)
    """The label column's value to the label: `{"1": "World"}`. Values that are not here are labels themselves."""
    merge_spellings: bool = False
    """Whether `sports ` and `Sports` are one label."""
    skip_incomplete: bool = False
    """Whether rows without a text or a label are left out. Without it they are refused."""
    encoding: Text | None = None
    """Of files that are not UTF-8, by Python's name: `cp1252`. A file's own mark, as of UTF-16, counts more."""


@dataclass(frozen=True, config=STRICT)
class Splits:
    """How rows become training, validation and test rows."""

    by: Literal["given", "stratified", "group", "time"]
    """`given`: by files; `stratified`: at random, with the same share of every class; `group`: rows with the same value
    of a column stay together; `time`: the latest rows are the test."""
    column: Text | None = None
    """The column of the group or time."""
    validation: Share = 0.1
    """Share of the rows; of the training rows, if validation rows are not given."""
    test: Share = 0.2
    """Share of the rows, if test rows are not given."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42

    def __post_init__(self) -> None:
        if (self.by in ("group", "time")) != (self.column is not None):
            raise ValueError("`column` is for splits by group and by time, which need it")
        if self.validation + self.test > 0.9:
            raise ValueError("validation and test take more than 0.9 of the rows; leave some for training")


@dataclass(frozen=True, config=STRICT)
class Task:
    """A classification task.

    Raises:
        ValueError: There are fewer than two labels, one is there twice, or a column's values are other labels.
    """

    name: str
    title: str
    """What people call it."""
    labels: tuple[Text, ...]
    """The labels as they are answered. All tables and matrices have this order."""
    sources: Annotated[dict[SourceKind, Columns], Field(min_length=1)]
    """Where rows may come from: `files`, a set on the `hub`, or a folder of `csv` files that data_path names."""
    prompts: dict[str, Prompt]
    """The system messages to choose from, by name."""
    description: str = ""
    """What it is and where it comes from, in a sentence or two."""
    licence: str = ""
    """What its data may be used for, in a sentence or two; empty where nothing is known."""
    meanings: dict[str, str] = Field(default_factory=dict)
    """What each label means, in a line; the verbose prompt lists them."""
    request: Text = "Classify the following text:"
    """Precedes every text in the prompt."""
    answer_key: Text = "category"
    """The key of the JSON answer."""
    splits: Splits | None = None
    """How the rows are split; None: given, with `validation_rows` of the experiment."""
    repairs: tuple[Repair, ...] = ()
    """Repairs of the texts' artefacts, see data_prep/clean.py; none leaves the texts as they are."""
    sample: Path | None = None
    """Folder of a built-in sample in the form of the CSV files."""
    published_rows: dict[Split, int] = Field(default_factory=dict)
    """How many rows the whole data set has; empty where that is not known."""
    published_test: str = ""
    """The SHA-256 of its `test.csv`. CSV files with another one are the user's own data."""
    folder: Path = Path()
    """What relative paths of files begin at."""

    def __post_init__(self) -> None:
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels: {list(self.labels)} must be two or more, each once")
        key = self.splits.column if self.splits else None
        for kind, columns in self.sources.items():
            if columns.label in columns.texts:
                raise ValueError(f"sources.{kind}.label: '{columns.label}' is one of the texts; name another column")
            needed = (columns.label, *columns.texts, *([key] if key else []))
            if columns.names and not set(needed) <= set(columns.names):
                lacking = ", ".join(name for name in needed if name not in columns.names)
                raise ValueError(f"sources.{kind}.names: lacks {lacking}; it has {', '.join(columns.names)}")
            if columns.values and set(columns.values.values()) != set(self.labels):
                raise ValueError(f"sources.{kind}.values: must stand for the labels, for each of them")
            if kind == "files" and columns.at is None:
                raise ValueError("sources.files.at: is missing; name a file or a folder")

    @property
    def is_split(self) -> bool:
        """Whether the source splits its rows; else we split one table."""
        return self.splits is None or self.splits.by == "given"

    @property
    def kinds(self) -> list[str]:
        """The sources that it has."""
        return [*(["sample"] if self.sample else []), *self.sources]

    @cached_property
    def digest(self) -> str:
        """12 hexadecimal digits that change with anything that the prepared rows depend on."""
        told = {"title", "description", "licence", "published_rows", "published_test", "folder"}
        seen = {name: value for name, value in asdict(self).items() if name not in told}
        return hashlib.sha256(json.dumps(seen, sort_keys=True, default=str).encode()).hexdigest()[:12]

    def title_of(self, source: Mapping[str, Any]) -> str:
        """What to call the data of a source, by its manifest's entry: other data is never called the data set."""
        if source["kind"] == "sample":
            return f"the built-in sample (not {self.title})"
        if source["kind"] == "hub":
            is_published = "hub" in self.sources and source.get("dataset") == self.sources["hub"].at
        else:
            is_published = source.get("sha256", {}).get("test.csv", "") == self.published_test
        return self.title if is_published or not self.published_rows else "your own data"

    def answer_for(self, label: str) -> str:
        """The assistant's message for a label: compact JSON, e.g. `{"category":"World"}`."""
        return _compact({self.answer_key: label})

    def parse_answer(self, text: str) -> str | None:
        """The label in a generated answer, or None if it is not exactly the JSON that was asked for."""
        try:
            # Pairs instead of a dict, which would hide a second "category".
            pairs = json.loads(text, object_pairs_hook=tuple)
        except (ValueError, RecursionError):
            # ValueError: not JSON, or a number of thousands of digits; RecursionError: brackets in brackets.
            return None
        # Compared by equality, so that a category that is a list is no error.
        return next((label for label in self.labels if pairs == ((self.answer_key, label),)), None)

    def find_prompt(self, name: str) -> Prompt:
        """The prompt of this name.

        Raises:
            UserError: There is none; the message lists those that there are.
        """
        if name not in self.prompts:
            raise UserError(f"unknown prompt '{name}'; task {self.name} has: {', '.join(self.prompts)}")
        return self.prompts[name]

    def messages(self, prompt: str, text: str, label: str) -> list[Message]:
        """System, user and assistant message of one row, under the prompt of this name."""
        return [
            {"role": "system", "content": self.find_prompt(prompt).system},
            {"role": "user", "content": f"{self.request}\n\n{text}"},
            {"role": "assistant", "content": self.answer_for(label)},
        ]

    def form(self, prompt_id: str) -> list[Message]:
        """The messages under a prompt by its id (`lean-1`), with the columns' names for a text.

        Empty where the task has no such prompt any more.
        """
        text = " ".join(next(iter(self.sources.values())).texts).upper()
        known = (name for name, prompt in self.prompts.items() if prompt.id == prompt_id)
        return next((self.messages(name, text, self.labels[0]) for name in known), [])


def _compact(answer: Mapping[str, str]) -> str:
    return json.dumps(answer, separators=(",", ":"), ensure_ascii=False)


def known_tasks() -> dict[str, Path]:
    """The files of all tasks by name: the built-in ones, then the user's."""
    return {path.stem: path for folder in (own_folder(), BUILT_IN) for path in sorted(folder.glob("*.yaml"))}


def home() -> Path:
    """Where all outputs are, and the user's tasks. A relative FINETUNE_HOME begins at the project's folder, so that it
    is one folder, whatever a process works in."""
    return Path(os.path.abspath(BUILT_IN.parent.parent / os.path.expanduser(os.environ.get("FINETUNE_HOME", ""))))


def own_folder() -> Path:
    """Where the user's tasks are: beside the outputs."""
    return home() / "tasks"


def find_task(name: str) -> Task:
    """The task of this name.

    Raises:
        UserError: There is none, and the message lists those that there are; or its file is wrong.
    """
    known = known_tasks()
    if name not in known:
        hint = "" if NAME.fullmatch(name) else "; a name has lower-case letters, digits, - and _"
        raise UserError(f"unknown task '{name}'; the tasks are: {', '.join(sorted(known))}{hint}")
    state = known[name].stat()
    return _read(known[name], state.st_mtime_ns, state.st_size)


@lru_cache
def _read(path: Path, *_: int) -> Task:
    """The task in a file; read again when its time or size change."""
    try:
        return parse_task(path.read_text(encoding="utf-8-sig"), path)
    except UnicodeDecodeError as error:
        raise DataError(path, f"not UTF-8 ({error.reason}); save the file as UTF-8") from error


def parse_task(text: str, path: Path) -> Task:
    """The task that a file describes.

    Args:
        text: What is in the file.
        path: Where it is or will be: the task's name, and what its relative paths begin at.

    Raises:
        DataError: It is no such description; with the key and what is allowed.
    """
    try:
        written = yaml.load(text, _AsText)
    except yaml.MarkedYAMLError as error:
        raise DataError(path, f"not YAML: {error.problem}", error.problem_mark.line + 1) from error
    except yaml.YAMLError as error:
        raise DataError(path, f"not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(written, dict):
        raise DataError(path, f"not a task; it has the keys {_keys(Task)}")
    written = {"title": path.stem, **written, "name": path.stem, "folder": path.parent.parent}
    labels, prompts = written.get("labels"), written.get("prompts", {})
    if isinstance(labels, dict):
        written |= {"labels": list(labels), "meanings": labels}
    if isinstance(prompts, dict):
        given = {key: {"system": of} if isinstance(of, str) else of for key, of in prompts.items()}
        named = {key: {"name": key, "version": 1, **of} if isinstance(of, dict) else of for key, of in given.items()}
        written["prompts"] = _usual_prompts(written) | named
    if "sample" in written:
        written["sample"] = path.parent.parent / written["sample"]
    try:
        return TypeAdapter(Task).validate_python(written)
    except ValidationError as error:
        raise DataError(path, _explained(error)) from error


class _AsText(yaml.BaseLoader):
    """YAML whose scalars all are text, so that the labels `no` and `1` stay what they are; a key twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _usual_prompts(written: Mapping[str, Any]) -> dict[str, Any]:
    """`lean` asks for one of the labels; `verbose` lists them with their meanings, and shows the answer's form."""
    labels, meanings = written.get("labels"), written.get("meanings", {})
    # What is wrong with the labels is said when they are validated.
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels) or len(labels) < 2:
        return {}
    means = [f"- {label}: {meanings[label]}" if meanings.get(label) else f"- {label}" for label in labels]
    example = json.dumps(
        {str(written.get("answer_key", "category")): labels[0]}, separators=(",", ":"), ensure_ascii=False
    )
    verbose = [
        f"Sort each text into exactly one of {len(labels)} categories.",
        "",
        "Categories:",
        *means,
        "",
        f"Answer with one line of JSON and nothing else, in this form: {example}",
    ]
    systems = {"lean": f"{', '.join(labels[:-1])} or {labels[-1]}?", "verbose": "\n".join(verbose)}
    return {name: {"name": name, "version": 1, "system": system} for name, system in systems.items()}


def _keys(part: type) -> str:
    """The keys that a description may have."""
    return ", ".join(field.name for field in fields(part) if field.name not in ("name", "folder", "meanings"))


def _explained(error: ValidationError) -> str:
    """One fault, unknown keys first: its key, what is wrong and what is allowed."""
    first = min(error.errors(), key=lambda fault: fault["type"] != "unexpected_keyword_argument")
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "unexpected_keyword_argument":
        part = {"sources": Columns, "splits": Splits, "prompts": Prompt}.get(place.partition(".")[0], Task)
        return f"unknown key '{place}'; known are: {_keys(part if '.' in place else Task)}"
    if first["type"] == "missing":
        return f"the key '{place}' is missing"
    if "at" in first["loc"]:
        place = place.partition(".at")[0]
        return (
            f"{place}.at: must be a file, a folder, a name on the hub, or a file for each of train, validation and test"
        )
    return f"{place}: {first['msg']}".removeprefix(": ").replace("Value error, ", "").replace(".[key]", "")


AG_NEWS = find_task("ag_news")
