"""Control tokens: only a template writes them. In our texts the same letters are text."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from functools import cached_property

import tokenizers

from data_prep import UserError

# What stands for a control token: no article can know it.
MASK = re.compile(f"\ue000{secrets.token_hex(8)}-([0-9]+)\ue001")


class ControlTokens:
    """The tokens of a tokenizer that are no text: `<|im_end|>`, `[INST]`, `<tool_call>`.

    Words and blanks that a tokenizer holds as added tokens are text.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._added = tokenizer.added_tokens_decoder
        control = {
            token.content: MASK.pattern.replace("([0-9]+)", str(number))
            for number, token in self._added.items()
            if token.special or not (token.content.isspace() or token.content.isalnum())
        }
        self._masks = control
        longest_first = sorted(control, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) if control else "(?!)")

    def mask(self, text: str) -> str:
        """A text whose control tokens are hidden from the template, and from its control tokens."""
        return self._pattern.sub(lambda found: self._masks[found[0]], text)

    def unmask(self, text: str) -> str:
        """The text with what `mask` hid."""
        return MASK.sub(lambda found: self._added[int(found[1])].content, text)

    def at_the_start_of(self, text: str) -> str | None:
        """The control token that a text begins with."""
        found = self._pattern.match(text)
        return found and found[0]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts; what was masked in them is text."""
        masked = [number for number, text in enumerate(texts) if MASK.search(text)]
        plain = [text for text in texts if not MASK.search(text)] if masked else texts
        found = self._tokenizer(list(plain), add_special_tokens=False)["input_ids"] if plain else []
        if not masked:
            return found
        # The template's control tokens get the names that this tokenizer knows; what was masked comes back.
        numbers = {self._name(number): number for number in self._added}
        for row in masked:
            pieces = MASK.split(texts[row])
            pieces[::2] = map(self.mask, pieces[::2])
            pieces[1::2] = (self._added[int(number)].content for number in pieces[1::2])
            encoding = self._reader.encode("".join(pieces), add_special_tokens=False)
            ids = [numbers.get(token, number) for token, number in zip(encoding.tokens, encoding.ids, strict=True)]
            found.insert(row, ids)
        return found

    def ends(self, text: str) -> list[int]:
        """Where each token of a text ends, in characters, all of it read as text."""
        return [end for _, end in self._reader.encode(text, add_special_tokens=False).offsets]

    def _name(self, number: int) -> str:
        content = self._added[number].content
        return self._masks.get(content, content)

    @cached_property
    def _reader(self) -> tokenizers.Tokenizer:
        """The same tokenizer, with other names for its control tokens."""
        if not self._tokenizer.is_fast:
            raise UserError(
                f"{self._tokenizer.name_or_path}: a text is too long, or holds a control token, and this tokenizer "
                "is not of the tokenizers library, which could tell them apart; choose another model"
            )
        backend = self._tokenizer.backend_tokenizer
        known = tokenizers.Tokenizer(backend.model)
        known.normalizer, known.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
        flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
        known.add_tokens(
            [
                tokenizers.AddedToken(self._name(number), **{flag: getattr(token, flag) for flag in flags})
                for number, token in self._added.items()
            ]
        )
        return known
