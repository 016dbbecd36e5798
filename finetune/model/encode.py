"""From messages to tokens: one encoding that training and evaluation share, so that they cannot drift apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_prep import Example, UserError
from data_prep.files import Message

IGNORED = -100  # the label that cross-entropy skips


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt (up to where the assistant begins to write) and of its answer (eos included)."""

    prompt: list[int]
    answer: list[int]

    def row(self, completion_only_loss: bool = True) -> dict[str, list[int]]:
        """Training row: `input_ids`, and `labels` that carry loss on the answer, or on all tokens."""
        prompt = [IGNORED] * len(self.prompt) if completion_only_loss else self.prompt
        return {"input_ids": self.prompt + self.answer, "labels": prompt + self.answer}

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def encode(tokenizer, examples: Sequence[Example], max_length: int) -> list[Encoded]:
    """Encode examples; an article that does not fit into `max_length` tokens loses its end, never its answer.

    Raises:
        UserError: `max_length` cannot hold even the prompt without an article.
    """
    answers = {
        text: answer_tokens(tokenizer, text) for text in {example.messages[-1]["content"] for example in examples}
    }
    prompts = encode_prompts(tokenizer, [example.prompt for example in examples])
    encoded = []
    for example, prompt in zip(examples, prompts, strict=True):
        answer = answers[example.messages[-1]["content"]]
        room = max_length - len(answer)
        if len(prompt) > room:
            prompt = _shortened(tokenizer, example.prompt, room)
        encoded.append(Encoded(prompt, answer))
    return encoded


def encode_prompts(tokenizer, prompts: Sequence[list[Message]]) -> list[list[int]]:
    """Token ids of each prompt, ending where the assistant's answer begins."""
    texts = [_render(tokenizer, prompt) for prompt in prompts]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def answer_tokens(tokenizer, answer: str) -> list[int]:
    """Token ids of an answer's text, ended by eos."""
    return tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]


def count_tokens(tokenizer, chats: Sequence[list[Message]]) -> list[int]:
    """Tokens of each whole chat, answer and eos included."""
    texts = [_render(tokenizer, chat[:-1]) + chat[-1]["content"] for chat in chats]
    return [len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


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


def _render(tokenizer, prompt: list[Message]) -> str:
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


def _shortened(tokenizer, prompt: list[Message], room: int) -> list[int]:
    """The prompt's tokens with as many of the article's words, from its start, as fit into `room`."""
    system, user = prompt
    words = user["content"].split(" ")
    # Bisect the number of words: tokens grow with them.
    fits, too_many = 0, len(words)
    best: list[int] | None = None
    while too_many - fits > 1 or best is None:
        middle = (fits + too_many) // 2
        ids = encode_prompts(tokenizer, [[system, {**user, "content": " ".join(words[:middle])}]])[0]
        if len(ids) <= room:
            fits, best = middle, ids
        elif middle == 0:
            raise UserError(
                f"max_length leaves {room} tokens for the prompt, which needs {len(ids)} without an article"
            )
        else:
            too_many = middle
    return best
