"""Repairs of text artefacts, each a documented step that a task names and a user can switch off.

AG News names all of them. Its CSV files were cut out of web feeds, and lost characters on the way:

| in the file                  | becomes            | rows of the official test set |
|------------------------------|--------------------|-------------------------------|
| `it #39;s`, `companies #39;` | `it's`, `companies'` | 1,900                       |
| `&lt;b&gt;Apple&lt;/b&gt;`   | `Apple`            | 301                           |
| `on Wednesday\\said`         | `on Wednesday said` | 808                          |
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Collection

# "#39;", "quot;" and the like whose ampersand was lost.
_LOST_AMPERSAND = re.compile(r"(?<![&\w])(?<!&amp;)(#\d{2,4}|quot|amp|lt|gt|nbsp);")
# "it #39;s", "companies #39; profits": the feed put a space before an apostrophe that belongs to the word.
_DETACHED_APOSTROPHE = re.compile(r"(?<=\w) &#39;(?=(?:s|t|re|ve|ll|d|m)\b)|(?<=s) &#39;(?=\s|$)")
# A whole entity: "&copy" in an address, without its semicolon, is text.
_ENTITY = re.compile(r"&#?\w+;")
# HTML's own elements and attributes: "<RIMM.O>", "<desk@news.example>" and "a <b and c> d" are text.
_ELEMENTS = (
    "a|b|big|blockquote|br|center|cite|code|div|em|font|h[1-6]|hr|i|img|li|nobr|ol|p|pre|s|small|span|strong|sub|sup"
    "|table|tbody|td|th|thead|tr|tt|u|ul"
)
_ATTRIBUTES = (
    "align|alt|bgcolor|border|cell(?:pad|spac)ing|class|clear|color|colspan|data-[a-z-]+|dir|face|height|href|[hv]space"
    "|id|lang|name|on[a-z]+|rel|rowspan|size|src|style|target|title|type|valign|width"
)
_TAG = re.compile(
    rf"""<(/?)({_ELEMENTS})((?:[\s\\]+(?:{_ATTRIBUTES})\s*=\s*(?:"[^"<>]*"|'[^'<>]*'|[^\s"'<>]+))*)[\s\\]*/?>""",
    re.IGNORECASE,
)
_VOID = {"br", "hr"}


def _decoded(text: str) -> str:
    if "#" not in text and ";" not in text:
        return text
    text = _LOST_AMPERSAND.sub(r"&\1;", text)
    text = _DETACHED_APOSTROPHE.sub("&#39;", text)
    # Twice, because some feeds escaped what was escaped already ("&amp;lt;b&amp;gt;").
    for _ in range(2):
        text = _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
    return text


def _without_tags(text: str) -> str:
    """A tag is markup if it has an attribute, or its other half is in the text too: of "a<b>c" nothing goes."""
    if "<" not in text:
        return text
    tags = list(_TAG.finditer(text))
    halves = {(tag[1], tag[2].lower()) for tag in tags}

    def replaced(tag: re.Match) -> str:
        closing, name = tag[1], tag[2].lower()
        is_markup = name in _VOID or tag[3] or ("" if closing else "/", name) in halves
        return " " if is_markup else tag[0]

    return _TAG.sub(replaced, text)


# In the order in which they are made: a tag may have been written in entities, and hold backslashes.
REPAIRS: dict[str, Callable[[str], str]] = {
    "entities": _decoded,
    "tags": _without_tags,
    "backslashes": lambda text: text.replace("\\", " "),
    "spaces": lambda text: " ".join(text.split()),
}


def repaired(text: str, names: Collection[str]) -> str:
    """The text after the repairs of these names."""
    for name, repair in REPAIRS.items():
        if name in names:
            text = repair(text)
    return text
