"""Encoding: what training learns and what evaluation asks are the same tokens."""

import copy

import pytest
from transformers import AutoTokenizer

from data_prep import Example, UserError
from data_prep.sources import open_source
from data_prep.task import AG_NEWS
from finetune.model import encode, load


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def example(description: str, label: str = "World", prompt: str = "lean") -> Example:
    text = f"Title {description}"
    return Example("test-0", text, label, AG_NEWS.messages(prompt, text, label))


@pytest.mark.parametrize("label", AG_NEWS.labels)
@pytest.mark.parametrize("prompt", AG_NEWS.prompts)
def test_an_encoded_example_is_the_rendered_chat(tokenizer, label, prompt):
    one = example("Some description.", label, prompt)
    [encoded] = encode.encode(tokenizer, [one], 512)
    rendered = tokenizer.apply_chat_template(one.messages, tokenize=False)
    assert tokenizer.decode(encoded.prompt + encoded.answer) + "\n" == rendered


def test_only_the_answer_carries_loss(tokenizer):
    [encoded] = encode.encode(tokenizer, [example("Some description.", "Sci/Tech")], 512)
    labelled = [token for token in encoded.row()["labels"] if token != encode.IGNORED]
    assert tokenizer.decode(labelled) == '{"category":"Sci/Tech"}<|im_end|>'
    assert len(encoded.row()["labels"]) == len(encoded.row()["input_ids"]) == len(encoded)


@pytest.mark.parametrize("max_length", [100, 128, 200])
def test_a_long_article_loses_its_end_and_keeps_its_answer(tokenizer, max_length):
    one = example(" ".join(f"word{number}" for number in range(300)), "Business")
    [encoded] = encode.encode(tokenizer, [one], max_length)
    text = tokenizer.decode(encoded.prompt)
    assert max_length - 12 < len(encoded) <= max_length
    assert "word0 word1" in text and "word299" not in text
    assert text.endswith("<|im_start|>assistant\n")
    assert encoded.answer == encode.answer_tokens(tokenizer, '{"category":"Business"}')


LONG = {
    "an address": "https://example.org/" + "path/" * 500,
    "Chinese": "油价在周一上涨，" * 100,
    "tabs": "Oil\trises\n" * 300,
    "blanks alone": "Oil" + " " * 3000 + "rises",
    "control tokens": "<|im_end|>" * 200,
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_an_article_without_blanks_is_cut_by_tokens(tokenizer, text):
    one = example(text, "Business")
    [whole] = encode.count_tokens(tokenizer, [one.messages])
    [encoded, short] = encode.encode(tokenizer, [one, example("Short.")], 200)
    assert 195 < len(encoded) <= 200 and abs(encoded.lost - (whole - len(encoded))) < 4
    kept = tokenizer.decode(encoded.prompt)
    before, article = f"{AG_NEWS.request}\n\n", f"Title {text}"
    inside = kept.partition(before)[2].removesuffix("<|im_end|>\n<|im_start|>assistant\n")
    assert len(inside) > 40 and article.startswith(inside)
    assert encoded.answer == tokenizer('{"category":"Business"}<|im_end|>')["input_ids"]
    said = f"1 of 2 do not fit into 200 tokens and lose their end: {encoded.lost:,} tokens, {encoded.lost:,} of the "
    assert encode.cuts([encoded, short], 200).startswith(said)
    assert encode.cuts([short], 200) == "all 1 fit into 200 tokens"


def test_ordinary_articles_have_the_tokens_of_transformers_alone(tokenizer, ag_news):
    rows = list(open_source("csv", AG_NEWS, str(ag_news)).rows("test"))[:400]
    examples = [Example("test-0", row.text, row.label, AG_NEWS.messages("lean", row.text, row.label)) for row in rows]
    for one, encoded in zip(examples, encode.encode(tokenizer, examples, 1024), strict=True):
        assert encoded.prompt == tokenizer.apply_chat_template(
            one.prompt, add_generation_prompt=True, return_dict=False
        )
        assert encoded.answer == tokenizer(one.messages[-1]["content"] + "<|im_end|>")["input_ids"]


def test_a_length_that_cannot_hold_the_prompt_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"max_length leaves \d+ tokens"):
        encode.encode(tokenizer, [example("word " * 300, prompt="verbose")], 64)


def test_counted_tokens_are_the_encoded_ones(tokenizer):
    examples = [example("Short."), example("A rather longer description, with a comma.", "Sports", "verbose")]
    counted = encode.count_tokens(tokenizer, [one.messages for one in examples])
    assert counted == [len(encoded) for encoded in encode.encode(tokenizer, examples, 2000)]


def test_loss_on_all_tokens_is_asked_for_by_name(tokenizer):
    [encoded] = encode.encode(tokenizer, [example("Some description.", "World")], 512)
    assert encoded.row(completion_only_loss=False)["labels"] == encoded.row("all")["input_ids"]


def test_prompts_share_what_they_begin_with_but_keep_a_token_of_their_own():
    assert encode.shared_length([[1, 2, 3, 4], [1, 2, 5]]) == 2
    assert encode.shared_length([[1, 2], [1, 2]]) == 1
    assert encode.shared_length([[1], [2]]) == 0


@pytest.mark.parametrize(
    ("added", "chosen"),
    [
        (["<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"], "<|finetune_right_pad_id|>"),
        (["<unused3>"], "<unused3>"),
        ([], None),
    ],
)
def test_a_tokenizer_without_a_pad_token_gets_a_reserved_one_and_never_eos(tmp_path, tokenizer, added, chosen, capsys):
    without = copy.deepcopy(tokenizer)
    without.add_special_tokens({"additional_special_tokens": added})
    without.pad_token = without.eos_token
    without.save_pretrained(tmp_path)
    if chosen is None:
        with pytest.raises(UserError, match="no pad token, and no reserved token to take"):
            load.load_tokenizer(tmp_path)
    else:
        assert load.load_tokenizer(tmp_path).pad_token == chosen
        assert f"pad token: {chosen}" in capsys.readouterr().out
