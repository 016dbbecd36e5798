"""Our logits are the model's own, whatever is between its layers and them; what would not be is refused or padded."""

import itertools

import families
import pytest
import torch
from chats import CHATML
from transformers import AutoTokenizer, GPT2Config, LlamaConfig

from benchmarks.families import tiny_model as built
from data_prep import UserError
from data_prep.task import AG_NEWS
from finetune.config.recipes import FULL, QLORA
from finetune.model import checks
from finetune.model.head import only_at
from finetune.model.packing import Backbone, Forest
from finetune.model.padded import Padded

ROWS = [[3, 4, 5, *range(length, 2 * length)] for length in (9, 30, 14, 22)]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def row_of(sequences: list[list[int]]) -> tuple[Forest, torch.Tensor, list[int]]:
    """Sequences behind their first three tokens, and the places of all others."""
    forest = Forest()
    root = forest.add(sequences[0][:3])
    for sequence in sequences:
        forest.add(sequence[3:], root)
    return forest, torch.arange(3, len(forest.ids)), [len(sequence) - 3 for sequence in sequences]


@pytest.mark.parametrize("name", families.FAMILIES)
def test_logits_are_those_of_plain_transformers(tokenizer, name):
    model = families.tiny_family(name, tokenizer)
    with torch.no_grad():
        plain = [model(torch.tensor([row])).logits[0, 3:] for row in ROWS]
    backbone, reason = checks.choose_backbone(model, ROWS)
    assert isinstance(backbone, Backbone if name in families.PACKED else Padded), reason
    forest, places, lengths = row_of(ROWS)
    with torch.no_grad():
        found = backbone(forest.row(), places).split(lengths)
    for ours, own in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, own, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["capped", "divided", "multiplied", "experts", "window", "convolution"])
def test_loss_and_gradients_are_the_models_own(tokenizer, name):
    model = families.tiny_family(name, tokenizer)
    plain = families.tiny_family(name, tokenizer)
    for row in ROWS:
        # Of all but what the rows share.
        labels = torch.tensor([[-100] * 3 + row[3:]])
        (plain(torch.tensor([row]), labels=labels, num_items_in_batch=1).loss).backward()
    backbone, _ = checks.choose_backbone(model, ROWS)
    forest, places, _ = row_of(ROWS)
    ends = [2, *(places[0] + torch.tensor([len(row) - 3 for row in ROWS]).cumsum(0) - 1).tolist()]
    predicts, targets = [], []
    for start, end in itertools.pairwise(ends):
        predicts += [2, *range(start + 1, end)]
        targets += forest.ids[start + 1 : end + 1]
    logits = backbone(forest.row(), torch.tensor(predicts))
    torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="sum").backward()
    for ours, own in zip(model.parameters(), plain.parameters(), strict=True):
        if own.grad is not None:
            torch.testing.assert_close(ours.grad, own.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["experts", "experts of mixtral", "llama"])
def test_bf16_rounding_is_no_fault_and_weights_come_back_as_they_were(tokenizer, name):
    model = families.tiny_family(name, tokenizer).bfloat16()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    backbone, reason = checks.choose_backbone(model, ROWS)
    assert isinstance(backbone, Backbone), reason
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    after = model.state_dict()
    assert all(value.dtype == after[key].dtype and torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("layer_training", [True, False])
def test_a_check_leaves_the_mode_that_it_found(tokenizer, layer_training):
    model = families.tiny_family("llama", tokenizer).train(layer_training)
    checks.choose_backbone(model, ROWS)
    assert all(module.training == layer_training for module in model.modules())


def test_the_longest_article_decides_whether_a_window_matters(tokenizer):
    model = families.tiny_family("window", tokenizer)
    assert isinstance(checks.choose_backbone(model, [ROWS[0], ROWS[0][:8]])[0], Backbone)
    backbone, reason = checks.choose_backbone(families.tiny_family("window", tokenizer), ROWS)
    assert isinstance(backbone, Padded) and "window" in reason


@pytest.mark.parametrize(("cap", "kind"), [(1.0, Padded), (5.0, Padded), (None, Backbone)])
def test_attention_that_transformers_sdpa_leaves_a_part_of_out_is_the_models_own(tokenizer, cap, kind):
    family = "gemma2", {"head_dim": 8, "attn_logit_softcapping": cap}
    own, model = built(*family, tokenizer), built(*family, tokenizer)
    own.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = [own(torch.tensor([row])).logits[0, 3:] for row in ROWS]
    backbone, _ = checks.choose_backbone(model, ROWS)
    assert type(backbone) is kind
    forest, places, lengths = row_of(ROWS)
    with torch.no_grad():
        found = backbone(forest.row(), places).split(lengths)
    for ours, logits in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, logits, atol=1e-4, rtol=1e-4)


def test_a_model_without_its_own_logits_is_refused(tokenizer):
    """Neither packed nor padded: a model whose tokens see what follows."""
    model = families.tiny_family("own attention", tokenizer)
    layers = model.get_decoder()
    forward = layers.forward

    def with_mean(*arguments, **named):
        output = forward(*arguments, **named)
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(1, keepdim=True)
        return output

    layers.forward = with_mean
    with pytest.raises(UserError, match="in padded batches its logits differ from its own"):
        checks.choose_backbone(model, ROWS)


def test_positions_that_depend_on_the_longest_article_of_a_batch_are_refused(tokenizer):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = built("llama", {"rope_parameters": rope, "max_position_embeddings": 16}, tokenizer)
    with pytest.raises(UserError, match="in padded batches its logits differ from its own"):
        checks.choose_backbone(model, ROWS[1:])
    model = built("llama", {"rope_parameters": rope, "max_position_embeddings": 64}, tokenizer)
    assert isinstance(checks.choose_backbone(model, ROWS)[0], Backbone)


def test_a_model_that_cannot_run_itself_is_refused_in_a_sentence(tokenizer):
    model = families.tiny_family("state space", tokenizer)
    # As 4-bit weights have: the model reads them past their layers.
    for layer in model.get_decoder().layers:
        layer.mixer.dt_proj.weight = torch.nn.Parameter(layer.mixer.dt_proj.weight.reshape(-1, 1))
    with pytest.raises(UserError, match=r"cannot run its own forward pass \(.*\); choose another model"):
        checks.choose_backbone(model, ROWS)


def test_logits_in_fp32_are_those_of_an_fp32_head_on_the_same_hidden_states(tokenizer):
    model = families.tiny_family("llama", tokenizer).bfloat16()
    hidden = torch.randn(1, 40, 32).bfloat16()
    exact = hidden[0, 5:9].double() @ model.lm_head.weight.double().T
    with torch.no_grad(), only_at(model.lm_head, torch.arange(5, 9), in_fp32=True):
        found = model.lm_head(hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0].double(), exact, atol=1e-5, rtol=1e-5)
    with torch.no_grad(), only_at(model.lm_head, torch.arange(5, 9)):
        assert model.lm_head(hidden).dtype == torch.bfloat16
    assert model.lm_head(hidden).shape == (1, 40, len(tokenizer))


def test_what_fits_is_let_through(tokenizer):
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=8)
    # Rotary positions are computed, however many there are.
    checks.check_model(config, tokenizer, AG_NEWS, ROWS, FULL, new_tokens=16)
    # A token that nothing uses may lie beyond the embedding, as in Gemma 3.
    config.vocab_size = max(map(max, ROWS)) + 1
    checks.check_model(config, tokenizer, AG_NEWS, ROWS)


def test_tokens_beyond_the_embedding_are_refused_by_name(tokenizer, tiny_model):
    config = LlamaConfig(vocab_size=50)
    with pytest.raises(UserError, match=r"is number 59, and the embedding has 50 rows"):
        checks.check_model(config, tokenizer, AG_NEWS, ROWS)
    other = AutoTokenizer.from_pretrained(tiny_model)
    other.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(UserError, match=r"'\[PAD\]' is number 600, and the embedding has 600 rows"):
        checks.check_model(LlamaConfig(vocab_size=600), other, AG_NEWS, ROWS)


def test_a_label_that_the_tokenizer_cannot_write_is_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(['{"', "category", '":"', "World", "Sports", '"}', "[UNK]"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[UNK]")
    tokenizer.chat_template = CHATML
    with pytest.raises(UserError, match="cannot write the label 'Business'"):
        checks.check_model(LlamaConfig(vocab_size=100), tokenizer, AG_NEWS, ROWS)


@pytest.mark.parametrize("new_tokens", [0, 16])
def test_positions_beyond_the_learned_ones_are_refused(tokenizer, new_tokens):
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=8, n_layer=1, n_head=1)
    with pytest.raises(UserError, match=f"has learnt 32 positions, and the longest row needs {33 + new_tokens}"):
        checks.check_model(config, tokenizer, AG_NEWS, ROWS, new_tokens=new_tokens)
    checks.check_model(config, tokenizer, AG_NEWS, [ROWS[0]], new_tokens=16)


def test_quantised_weights_are_for_qlora_alone(tokenizer):
    config = LlamaConfig(vocab_size=len(tokenizer), quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match=r"holds quantised weights \(gptq\)"):
        checks.check_model(config, tokenizer, AG_NEWS, ROWS, FULL)
    checks.check_model(config, tokenizer, AG_NEWS, ROWS, QLORA)
    checks.check_model(config, tokenizer, AG_NEWS, ROWS)
