"""What a model's chat template makes of our messages, so that nothing of them is lost."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from itertools import product

from data_prep import UserError
from data_prep.files import Message
from finetune.model.control import ControlTokens

# Llama 3's own where its template knows no clock. A prompt that changes by the day is another prompt.
DATE = datetime(2024, 7, 26)
TRIAL = [
    {"role": "system", "content": "What stands first?"},
    {"role": "user", "content": "What is asked here?"},
    {"role": "assistant", "content": "What is the answer?"},
]


class Template:
    """How a tokenizer's chat template is asked to write a prompt.

    Attributes:
        control: The tokenizer's control tokens.
        note: What was done so that the prompt is whole, in a sentence.
        before_answer: Blanks that the template writes between a prompt and its answer.
        turn_end: The token that ends an answer.

    Args:
        tokenizer: The tokenizer, with its chat template.

    Raises:
        UserError: The template loses a part of the messages, or writes a prompt that no answer of its own follows.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.control = ControlTokens(tokenizer)
        whole = self._find_form()
        answer = TRIAL[-1]["content"]
        before, _, after = whole.rpartition(answer)
        asked = self._write(TRIAL[:-1], True)
        # A thought that is opened and not closed would hold the answer, and behind an end of turn none follows.
        thinks = asked.count("<think>") > asked.count("</think>")
        ends = tokenizer.eos_token and tokenizer.eos_token in asked[len(before) :]
        alike = before.rstrip() == asked.rstrip()
        self._cut = bool(thinks or ends) or not (alike or asked.startswith(before))
        prompt = before if self._cut else asked
        if not (alike or before.startswith(asked) or asked.startswith(before)):
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} begins an answer otherwise than it writes one; choose "
                "another model"
            )
        self.before_answer = before.removeprefix(prompt) if before.startswith(prompt) else ""
        end = self.control.at_the_start_of(after.lstrip())
        self.turn_end = tokenizer.eos_token_id if end is None else tokenizer.convert_tokens_to_ids(end)

        bos, own = tokenizer.bos_token, tokenizer("")["input_ids"][:1]
        if bos and prompt.startswith(2 * bos):
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} writes {bos} twice at its start; repair it, or choose "
                "another model"
            )
        self._bos = bos if bos and own == [tokenizer.bos_token_id] and not prompt.startswith(bos) else ""
        notes = {
            "the system text stands in the first user turn, since it takes no system turn": self._merges_system,
            "contents are lists of parts": self._in_parts,
            f"{bos} precedes it, as the tokenizer adds it": self._bos,
            "the prompt ends where its answers begin": self._cut,
            "thinking is off": asked != self._write(TRIAL[:-1], True, enable_thinking=True),
            f"its date is always {DATE:%d %B %Y}": asked
            != self._write(TRIAL[:-1], True, strftime_now=DATE.replace(year=2000).strftime),
        }
        done = "; ".join(note for note, holds in notes.items() if holds)
        self.note = f"by the model's template: {done or 'system, user and assistant turns'}"

    def render(self, prompt: Sequence[Message]) -> str:
        """The text of a prompt, which ends where the assistant's answer begins; control tokens of ours are masked.

        Raises:
            UserError: The template leaves out a part of a message.
        """
        masked = [{**message, "content": self.control.mask(message["content"])} for message in prompt]
        if self._cut:
            text = self._write([*masked, TRIAL[-1]], False).rpartition(TRIAL[-1]["content"])[0]
        else:
            text = self._write(masked, True)
        for message in masked:
            if message["content"].strip() not in text:
                raise UserError(
                    f"the chat template of {self._tokenizer.name_or_path} leaves out a part of the {message['role']} "
                    f"text {message['content'].strip()[:60]!r}; change that text, or choose another model"
                )
        return self._bos + text

    def shown(self, prompt: Sequence[Message]) -> str:
        """A prompt's text as people read it, with the control tokens of ours."""
        return self.control.unmask(self.render(prompt))

    def _find_form(self) -> str:
        """Choose how messages are given to the template; returns the trial as it writes it."""
        reasons = []
        for self._in_parts, self._merges_system in product((False, True), repeat=2):
            try:
                self._write(TRIAL[:-1], True)
                whole = self._write(TRIAL, False)
            except Exception as error:
                # A template is a program, and may raise anything.
                reasons.append(str(error) or type(error).__name__)
                continue
            lost = [message["role"] for message in TRIAL if message["content"] not in whole]
            if not lost and "{'type'" not in whole and '{"type"' not in whole:
                return whole
            reasons.append(f"it leaves out the {' and '.join(lost)} text" if lost else "it writes parts as a list")
        raise UserError(
            f"the chat template of {self._tokenizer.name_or_path} cannot write a system, a user and an assistant text "
            f"({reasons[0]}); choose another model"
        )

    def _write(self, messages: Sequence[Message], add_generation_prompt: bool, **how) -> str:
        if self._merges_system:
            system, user, *rest = messages
            messages = [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]
        if self._in_parts:
            messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        how = {"enable_thinking": False, "strftime_now": DATE.strftime} | how
        return self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **how
        )
