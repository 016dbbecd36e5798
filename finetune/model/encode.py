"""From messages to tokens: one encoding that training and evaluation share, so that they cannot drift apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from data_prep import Example, UserError
from data_prep.files import Message
from finetune.model.template import TRIAL, Template

IGNORED = -100  # the label that cross-entropy skips


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt (up to where the assistant begins to write) and of its answer (its end included).

    `lost` counts the tokens at the article's end that were cut off.
    """

    prompt: list[int]
    answer: list[int]
    lost: int = 0

    def row(self, completion_only_loss: bool = True) -> dict[str, list[int]]:
        """Training row: `input_ids`, and `labels` that carry loss on the answer, or on all tokens."""
        prompt = [IGNORED] * len(self.prompt) if completion_only_loss else self.prompt
        return {"input_ids": self.prompt + self.answer, "labels": prompt + self.answer}

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def encode(tokenizer, examples: Sequence[Example], max_length: int) -> list[Encoded]:
    """Encode examples; an article that does not fit into `max_length` tokens loses its end, never its answer.

    Raises:
        UserError: `max_length` cannot hold even the prompt without an article, or the model's template loses a part.
    """
    template = Template(tokenizer)
    prompts = _prompt_tokens(template, [example.prompt for example in examples])
    texts = {example.messages[-1]["content"] for example in examples}
    answers = {text: _answer_tokens(template, text) for text in texts}
    encoded = []
    for example, prompt in zip(examples, prompts, strict=True):
        answer, lost = answers[example.messages[-1]["content"]], 0
        room = max_length - len(answer)
        if len(prompt) > room:
            prompt, lost = _cut(template, example, room)
        encoded.append(Encoded(prompt, answer, lost))
    return encoded


def cuts(encoded: Sequence[Encoded], max_length: int) -> str:
    """How many articles were cut, and how much they lost."""
    lost = [row.lost for row in encoded if row.lost]
    if not lost:
        return f"all {len(encoded):,} fit into {max_length:,} tokens"
    return (
        f"{len(lost):,} of {len(encoded):,} do not fit into {max_length:,} tokens and lose their end: "
        f"{sum(lost):,} tokens, {max(lost):,} of the longest"
    )


def encode_prompts(tokenizer, prompts: Sequence[list[Message]]) -> list[list[int]]:
    """Token ids of each prompt, ending where the assistant's answer begins."""
    return _prompt_tokens(Template(tokenizer), prompts)


def answer_tokens(tokenizer, answer: str) -> list[int]:
    """Token ids of an answer's text behind a prompt, with the token that ends it."""
    return _answer_tokens(Template(tokenizer), answer)


def count_tokens(tokenizer, chats: Sequence[list[Message]]) -> list[int]:
    """Tokens of each whole chat, answer and its end included."""
    template = Template(tokenizer)
    answers = {text: len(_answer_tokens(template, text)) for text in {chat[-1]["content"] for chat in chats}}
    prompts = _prompt_tokens(template, [chat[:-1] for chat in chats])
    return [len(prompt) + answers[chat[-1]["content"]] for prompt, chat in zip(prompts, chats, strict=True)]


def shortened(tokenizer, example: Example, tokens: int) -> Example:
    """The example with the first tokens of its article, at most so many."""
    ends = Template(tokenizer).control.ends(example.text)
    return example if len(ends) <= tokens else _with_text(example, example.text[: ends[tokens - 1]])


def common_prefix(sequences: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all sequences begin with."""
    shared = []
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return shared


def shared_length(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with; each keeps at least one of its own."""
    return min(len(common_prefix(prompts)), min(map(len, prompts)) - 1)


def _prompt_tokens(template: Template, prompts: Sequence[list[Message]]) -> list[list[int]]:
    return template.control.ids([template.render(prompt) for prompt in prompts])


def _answer_tokens(template: Template, answer: str) -> list[int]:
    """What an answer adds to the tokens of a prompt; by itself where its first token would reach into the prompt."""
    prompt, answer = template.render(TRIAL[:-1]), template.before_answer + template.control.mask(answer)
    before, whole, alone = template.control.ids([prompt, prompt + answer, answer])
    return (whole[len(before) :] if whole[: len(before)] == before else alone) + [template.turn_end]


def _cut(template: Template, example: Example, room: int) -> tuple[list[int], int]:
    """The tokens of a prompt whose article is cut to fit into `room`, and how many of the article's are lost."""
    ends = [0, *template.control.ends(example.text)]
    [bare] = _prompt_tokens(template, [_with_text(example, "").prompt])
    kept = min(room - len(bare), len(ends) - 1)
    while kept >= 0:
        [prompt] = _prompt_tokens(template, [_with_text(example, example.text[: ends[kept]]).prompt])
        if len(prompt) <= room:
            return prompt, len(ends) - 1 - kept
        # Tokens at the cut may be others than in the whole article.
        kept -= len(prompt) - room
    raise UserError(
        f"max_length leaves {room} tokens for the prompt, which needs {len(bare)} without an article: set max_length "
        f"{len(bare) - room} tokens higher, and by as many more as an article needs"
    )


def _with_text(example: Example, text: str) -> Example:
    """An example of another text, under the same prompt."""
    *before, user, answer = example.messages
    user = {**user, "content": user["content"].removesuffix(example.text) + text}
    return replace(example, text=text, messages=[*before, user, answer])
