"""An adapter goes where it was asked for: onto every layer of a name, in the language model alone."""

import families
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config

from benchmarks.families import COMMON
from data_prep import UserError
from finetune.model.load import add_lora, linear_names

TEXT = {name: value for name, value in COMMON.items() if name != "initializer_range"}
SIGHT = {name: TEXT[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}


@pytest.fixture
def reads_images():
    """A Gemma 3 whose vision tower has layers called q_proj, k_proj and v_proj, too."""
    return AutoModelForCausalLM.from_config(
        Gemma3Config(
            text_config=TEXT | {"vocab_size": 600, "head_dim": 8},
            vision_config=SIGHT | {"image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
        )
    )


@pytest.mark.parametrize(
    ("modules", "kinds"),
    [
        (["q_proj", "v_proj"], "q_proj, v_proj"),
        ("all-linear", "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
    ],
)
def test_a_model_that_reads_images_gets_its_adapter_on_the_language_model(reads_images, capsys, modules, kinds):
    model = add_lora(reads_images, LoraConfig(target_modules=modules))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(".language_model.layers." in name and ".lora_" in name for name in trained)
    assert capsys.readouterr().out == f"adapter: 2 x {kinds}; the model has 2 layers\n"


def test_a_layer_of_the_vision_tower_alone_is_refused(reads_images):
    assert any(name.endswith("out_proj") for name, _ in reads_images.named_modules())
    with pytest.raises(UserError, match="target_modules names out_proj, and this model has no such layer"):
        add_lora(reads_images, LoraConfig(target_modules=["q_proj", "out_proj"]))


def test_an_adapter_that_peft_refuses_is_refused_in_a_sentence(tiny_model):
    model = families.tiny_family("state space", AutoTokenizer.from_pretrained(tiny_model))
    with pytest.raises(
        UserError, match=r"^PEFT puts no such adapter on this model \(.*out_proj.*\); set target_modules"
    ):
        add_lora(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    ("name", "modules", "said"),
    [
        ("hybrid", ["q_proj", "in_proj"], "adapter: 1 x in_proj, q_proj; the model has 2 layers"),
        ("experts", ["q_proj", "gate_proj"], "adapter: 2 x gate_proj, q_proj; the model has 2 layers"),
        ("learned positions", ["c_attn"], "adapter: 2 x c_attn; the model has 2 layers"),
        # transformers finds no decoder in it.
        ("chunks", ["q_proj", "o_proj"], "adapter: 2 x o_proj, q_proj; the model has 2 layers"),
    ],
)
def test_it_says_how_many_layers_got_it(tiny_model, capsys, name, modules, said):
    model = families.tiny_family(name, AutoTokenizer.from_pretrained(tiny_model))
    add_lora(model, LoraConfig(target_modules=modules, fan_in_fan_out=name == "learned positions"))
    assert capsys.readouterr().out.strip() == said


def test_names_of_linear_layers_leave_out_the_head_and_the_adapters(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert linear_names(model) == names
    add_lora(model, LoraConfig(target_modules=["q_proj"]))
    assert linear_names(model) == names
