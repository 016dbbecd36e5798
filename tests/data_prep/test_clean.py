"""Normalisation repairs the artefacts and leaves everything else alone."""

import pytest

from data_prep.clean import REPAIRS, repaired
from data_prep.sources import Files
from data_prep.task import AG_NEWS


def repair_feed(text):
    return repaired(text, AG_NEWS.repairs)


REPAIRED = {
    "it #39;s late": "it's late",
    "it&#39;s late": "it's late",
    "don #39;t go": "don't go",
    "they #39;ve won": "they've won",
    "the #39;80s": "the '80s",
    "companies #39; profits": "companies' profits",
    "for the companies #39;": "for the companies'",
    "&lt;b&gt;Apple&lt;/b&gt; rises": "Apple rises",
    '&lt;A HREF="http://www.example.com/a?b=c"&gt;Apple&lt;/A&gt; rises': "Apple rises",
    "<b>Apple</b> rises": "Apple rises",
    "profit &lt; 5 percent": "profit < 5 percent",
    "on Wednesday\\said": "on Wednesday said",
    "first\\\\second\\": "first second",
    "quot;Enough,quot; she said": '"Enough," she said',
    "R amp; D": "R & D",
    "AT&amp;T": "AT&T",
    "#36;10 million": "$10 million",
    "up 3 #151; a record": "up 3 — a record",
    "one  two\tthree\nfour ": "one two three four",
    "one&nbsp;two": "one two",
    "<p>One</p><p> Two</p><p> Three": "One Two Three",
    "One<br>two<BR/>three<br clear='all' />": "One two three",
    '<FONT face="verdana,arial" size="-2"\\ color="#666666"><B>\\By X</B></FONT>': "By X",
    '<img src="http://ad.example/a;b?" width="1" height="1" border="0"/>Story': "Story",
    "&lt;font size=-1 color=#6f6f6f&gt;Wire&lt;/font&gt;": "Wire",
    "<strong><a href=http://a.example/b>Link</a></strong>": "Link",
}
DOUBLY_ESCAPED = {
    "AT&amp;amp;T": "AT&T",
    "it&amp;#39;s late": "it's late",
    "&amp;quot;Enough": '"Enough',
    "&amp;lt;b&amp;gt;Apple&amp;lt;/b&amp;gt; rises": "Apple rises",
}
KEPT = [
    "profit < 5 percent",
    "3 > 2 and 2 < 3",
    "I <3 it",
    "R&D",
    "AT&T",
    "Q&A",
    "the No. #39 seed; the No. #12 seed",
    "C#; F#",
    "Research In Motion Ltd. RIM.TO <RIMM.O>, which makes",
    "Agilent <A> and Toronto-Dominion <TD> rise",
    "desk <news@quilby.example> or <http://quilby.example/a>",
    "a <b and c> d holds where x<y or y>z",
    "if a<b>c then <i = 5> and List<String>",
    "<Your Name>, dear <b> reader",
    "http://a.example/?a=1&copy=2&reg=3",
    "a semicolon; a #hashtag",
    "it's the players' fault",
    "São Paulo — 東京",
    "",
]


@pytest.mark.parametrize(("raw", "expected"), REPAIRED.items())
def test_repairs_the_artefact(raw, expected):
    assert repair_feed(raw) == expected


@pytest.mark.parametrize(("raw", "expected"), DOUBLY_ESCAPED.items())
def test_repairs_what_was_escaped_twice(raw, expected):
    assert repair_feed(raw) == expected


@pytest.mark.parametrize("text", KEPT)
def test_keeps_ordinary_text(text):
    assert repair_feed(text) == text


@pytest.mark.parametrize("raw", [*REPAIRED, *KEPT])
def test_is_idempotent(raw):
    assert repair_feed(repair_feed(raw)) == repair_feed(raw)


def test_is_idempotent_on_real_rows_and_leaves_no_artefact(ag_news):
    remains = ("#39;", "quot;", "amp;", "&lt;", "&gt;", "\\", "<b>", "</A>")
    changed = 0
    for row in Files(ag_news, AG_NEWS).rows("test"):
        text = repair_feed(row.texts[1])
        changed += text != row.texts[1]
        assert repair_feed(text) == text
        assert not [remain for remain in remains if remain in text], text
        assert text, "normalisation must not empty a real row"
    assert changed > 1900, "the test set has #39; alone in 1,900 rows"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], "a&amp;b <b>c</b>\\d  e"),
        (["tags"], "a&amp;b  c \\d  e"),
        (["entities", "spaces"], "a&b <b>c</b>\\d e"),
        (["backslashes"], "a&amp;b <b>c</b> d  e"),
    ],
)
def test_a_task_names_its_repairs(names, expected):
    assert repaired("a&amp;b <b>c</b>\\d  e", names) == expected
    assert set(REPAIRS) == set(AG_NEWS.repairs)
