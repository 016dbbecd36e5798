"""The tasks: labels, prompts, the answer's form and where the rows come from. A task is an entry of TASKS, no code."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.clean import repair_feed
from data_prep.errors import UserError
from data_prep.files import Message, Split


@dataclass(frozen=True)
class Prompt:
    """A system message. Change its text, and its version changes with it: records carry the version."""

    name: str
    version: int
    system: str

    @property
    def id(self) -> str:
        return f"{self.name}-{self.version}"


@dataclass(frozen=True)
class Columns:
    """Which columns of a source hold the texts and the label, and what the label column's values stand for.

    Attributes:
        texts: One column or more; joined by a space they are the row's text.
        label: The label's column.
        values: The source's value to the label: `{"1": "World"}`.
    """

    texts: tuple[str, ...]
    label: str
    values: Mapping[str, str]


@dataclass(frozen=True)
class Task:
    """A classification task.

    Attributes:
        name: Its key in TASKS.
        title: What people call it.
        description: What it is and where it comes from, in a sentence or two.
        licence: What its data may be used for, in a sentence or two; empty where nothing is known.
        labels: The labels as they are answered. All tables and matrices have this order.
        request: Precedes every text in the prompt.
        prompts: The system messages to choose from, by name.
        csv: Columns of `train.csv`, `test.csv` and perhaps `validation.csv`; without a header the label comes first.
        hub_dataset: A data set of the Hugging Face hub, for source=hub.
        hub: Its columns; None where the task is not on the hub.
        answer_key: The key of the JSON answer.
        clean: Repairs the artefacts of a text column; None leaves the texts as they are.
        sample: Folder of a built-in sample in the CSV form; None where there is none.
        published_rows: How many rows the whole data set has; empty where that is not known.
        published_test: The SHA-256 of its `test.csv`. CSV files with another one are the user's own data.

    Raises:
        UserError: There are fewer than two labels, one is there twice, or a column's values are other labels.
    """

    name: str
    title: str
    description: str
    labels: tuple[str, ...]
    request: str
    prompts: Mapping[str, Prompt]
    csv: Columns
    hub_dataset: str | None = None
    hub: Columns | None = None
    licence: str = ""
    answer_key: str = "category"
    clean: Callable[[str], str] | None = None
    sample: Path | None = None
    published_rows: Mapping[Split, int] = field(default_factory=dict)
    published_test: str = ""

    def __post_init__(self) -> None:
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise UserError(f"task {self.name}: the labels {list(self.labels)} must be two or more, each once")
        for columns in filter(None, (self.csv, self.hub)):
            if set(columns.values.values()) != set(self.labels):
                raise UserError(f"task {self.name}: the values of column '{columns.label}' must stand for the labels")

    def title_of(self, source: Mapping[str, Any]) -> str:
        """What to call the data of a source, by its manifest's entry: other data is never called the data set."""
        if source["kind"] == "sample":
            return f"the built-in sample (not {self.title})"
        digest = source.get("sha256", {}).get("test.csv", "")
        is_published = (
            source.get("dataset") == self.hub_dataset if source["kind"] == "hub" else digest == self.published_test
        )
        return self.title if is_published or not self.published_rows else "your own data"

    def answer_for(self, label: str) -> str:
        """The assistant's message for a label: compact JSON, e.g. `{"category":"World"}`."""
        return json.dumps({self.answer_key: label}, separators=(",", ":"), ensure_ascii=False)

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
        text = " ".join(self.csv.texts).upper()
        known = (name for name, prompt in self.prompts.items() if prompt.id == prompt_id)
        return next((self.messages(name, text, self.labels[0]) for name in known), [])


def find_task(name: str) -> Task:
    """The task of this name.

    Raises:
        UserError: There is none; the message lists those that there are.
    """
    if name not in TASKS:
        raise UserError(f"unknown task '{name}'; the tasks are: {', '.join(TASKS)}")
    return TASKS[name]


# In the order of the class indices: 1 to 4 in the CSV files, 0 to 3 on the hub.
_AG_NEWS_LABELS = ("World", "Sports", "Business", "Sci/Tech")

AG_NEWS = Task(
    name="ag_news",
    title="AG News",
    description="News items by topic, cut out of web feeds (Zhang, Zhao and LeCun 2015).",
    # Its own readme allows this; no licence is named, so we name none.
    licence="AG News is given for research and other non-commercial use; what that means for a model trained on it is "
    "for its user to settle.",
    labels=_AG_NEWS_LABELS,
    request="Classify the following news article:",
    prompts={
        # The shortest of six wordings, and the best of them zero-shot: 61.7 % of 256 real training rows with
        # SmolLM2-135M, where "Categories: World, ..." got 25.4 % and a request for JSON 47.3 %.
        "lean": Prompt(name="lean", version=1, system="World, Sports, Business or Sci/Tech?"),
        "verbose": Prompt(
            name="verbose",
            version=1,
            system="""You are an editor who sorts news articles into exactly one of four categories.

Categories:
- World: politics, governments, elections, diplomacy, armed conflict, disasters, courts, public affairs anywhere
- Sports: matches, athletes, teams, leagues, tournaments, transfers and results
- Business: companies, earnings, markets, the economy, trade, jobs, mergers and finance
- Sci/Tech: science, space, medicine research, computers, software, the internet and new devices

Rules:
1. Judge by what the article is mainly about, not by a single word in it.
2. A company's product or invention is Sci/Tech; its shares, sales or deals are Business.
3. A government's action is World, also when it moves markets.
4. Answer with one line of JSON and nothing else, in this form: {"category":"World"}""",
        ),
    },
    csv=Columns(
        texts=("title", "description"),
        label="class index",
        values={str(index): label for index, label in enumerate(_AG_NEWS_LABELS, start=1)},
    ),
    hub_dataset="fancyzhx/ag_news",
    hub=Columns(
        texts=("text",),
        label="label",
        values={str(index): label for index, label in enumerate(_AG_NEWS_LABELS)},
    ),
    clean=repair_feed,
    sample=Path(__file__).parent / "sample",
    published_rows={"train": 120_000, "test": 7_600},
    published_test="521465c2428ed7f02f8d6db6ffdd4b5447c1c701962353eb2c40d548c3c85699",
)

TASKS: dict[str, Task] = {task.name: task for task in (AG_NEWS,)}
