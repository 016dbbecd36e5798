"""What a training takes, known before anything is loaded: expected values are those of real tensors."""

import re
from dataclasses import replace

import bitsandbytes
import pytest
import torch
from families import FAMILIES, PACKED, tiny_family
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from data_prep import UserError
from finetune import machine
from finetune.__main__ import main
from finetune.compare import plots
from finetune.config.recipes import FULL, LORA, QLORA
from finetune.config.shapes import SHAPES
from finetune.model import packing
from finetune.train import held, memory, outlook, simulate
from finetune.train.held import Held, Work
from finetune.train.memory import Estimate, Rows
from finetune.train.simulate import Batch
from finetune.train.trainer import RowCollator

ONE = {"gradient_accumulation_steps": 1}
ALL = replace(LORA, target_modules="all-linear", lora_alpha=32, **ONE)
FULL_ONE = replace(FULL, **ONE)
ROWS = Rows(own=[24] * 4, shared=8, answer=4, scored=5, read=9)
BATCH = Batch(articles=4, own=24, shared=8, predicted=4)


def llama(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=600, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip


def work(recipe=FULL_ONE, checkpointing="off", dtype="float32", products="float32", kernels="none", cuda=False) -> Work:
    return Work(recipe, checkpointing, dtype, products, kernels, cuda)


# PEFT puts no adapter on a state space's layers, and turns Mixtral's experts into targets of its own.
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"state space", "experts of mixtral"}))
def test_the_meta_device_counts_what_a_loaded_model_and_peft_have(tiny_model, family):
    model = tiny_family(family, AutoTokenizer.from_pretrained(tiny_model))
    found = Held(held.build(model.config, ALL, "float32"), work(ALL))
    assert found.weights == sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    adapted = get_peft_model(model, LoraConfig(r=ALL.r, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = sum(parameter.nbytes for parameter in adapted.parameters() if parameter.requires_grad)
    assert found.adapter == found.gradients == trained


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_moments_are_those_of_torch(optim):
    model = LlamaForCausalLM(llama(2))
    optimizer = torch.optim.AdamW(model.parameters(), fused=optim.endswith("fused"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    found = Held(held.build(model.config, replace(FULL, optim=optim), "float32"), work(replace(FULL, optim=optim)))
    assert found.optimizer == sum(state.nbytes for state in states)


@pytest.mark.parametrize("shape", [(64, 128), (64,), (300, 50)])
def test_moments_of_8_bits_are_those_of_bitsandbytes(shape):
    weight = torch.nn.Parameter(torch.ones(shape))
    optimizer = bitsandbytes.optim.AdamW8bit([weight])
    optimizer.init_state(optimizer.param_groups[0], weight, 0, 0)
    state = optimizer.state[weight]
    names = [name for name in ("state1", "state2", "absmax1", "absmax2") if name in state]
    assert sum(held.moment_bytes(weight, "adamw_8bit", False)) == sum(state[name].nbytes for name in names)
    # transformers' trainer has it keep an embedding's in fp32.
    assert sum(held.moment_bytes(weight, "adamw_8bit", True)) == 8 * weight.numel()


def test_weights_of_4_bits_are_those_of_bitsandbytes():
    model = AutoModelForCausalLM.from_config(llama(2), dtype=torch.bfloat16)
    packed = constants = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and name != "lm_head":
            data, state = bitsandbytes.functional.quantize_4bit(
                module.weight.data, compress_statistics=True, quant_type="nf4"
            )
            parts = (state.absmax, state.state2.absmax, state.code, state.state2.code, state.offset)
            packed += data.nbytes - module.weight.nbytes
            constants += sum(part.nbytes for part in parts)
    recipe = replace(QLORA, target_modules="all-linear")
    found = Held(held.build(model.config, recipe, "bfloat16"), work(recipe, dtype="bfloat16"))
    plain = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert found.weights == plain + packed
    assert found.constants == constants


def saved_bytes(model: torch.nn.Module) -> int:
    """Bytes that a real forward pass of BATCH leaves for the backward pass, besides parameters and the row."""
    tokens = BATCH.shared + BATCH.own
    ids = [list(range(1, 1 + BATCH.shared)) + [10 + article] * BATCH.own for article in range(BATCH.articles)]
    labels = [-100] * (tokens - BATCH.predicted) + [5] * BATCH.predicted
    batch = RowCollator(BATCH.shared)([{"input_ids": row, "labels": labels} for row in ids])
    row, given = batch["row"], {parameter.data_ptr() for parameter in model.parameters()}
    of_row = [row.input_ids, row.position_ids, row.places, batch["predicts"], batch["targets"]]
    of_row += [part for group in row.groups for part in vars(group).values()]
    given |= {tensor.data_ptr() for tensor in of_row}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    backbone = packing.Backbone(model)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = backbone(row, batch["predicts"])
    assert logits.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("recipe", [FULL_ONE, ALL], ids=["full", "lora"])
def test_a_further_layer_keeps_what_autograd_saves(recipe):
    """A layer's share: four layers against three, so that embeddings, logits and what is temporary drop out."""
    real = []
    for layers in (3, 4):
        torch.manual_seed(0)
        model = LlamaForCausalLM(llama(layers))
        if recipe.adapter:
            model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
        real.append(saved_bytes(model.train()))
    found = [simulate.run(llama(layers), work(recipe), BATCH, BATCH).start for layers in (3, 4)]
    # Tensors are rounded up to 512 bytes, and indices of the row are kept by each layer.
    assert found[1] - found[0] == pytest.approx(real[1] - real[0], rel=0.05)


@pytest.mark.parametrize("checkpointing", ["off", "plain"])
@pytest.mark.parametrize("recipe", [FULL_ONE, ALL], ids=["full", "lora"])
def test_three_layers_say_what_eight_take(recipe, checkpointing):
    done = work(recipe, checkpointing, "float32", "bfloat16", cuda=True)
    whole, found = simulate._trace(llama(8), done, BATCH, BATCH), simulate.run(llama(8), done, BATCH, BATCH)
    for name, size in whole.items():
        assert getattr(found, name) == pytest.approx(size, rel=0.01, abs=8192), name


def test_the_backward_pass_ends_with_all_gradients_and_starts_without():
    found = simulate.run(llama(4), work(), BATCH, BATCH)
    weights = sum(parameter.nbytes for parameter in LlamaForCausalLM(llama(4)).parameters())
    assert found.start_gradients < 0.5 * weights
    # At the fullest moment the first layer's and the embedding's are not all there.
    embedding, layer = 600 * 64 * 4, sum(p.nbytes for p in LlamaForCausalLM(llama(1)).model.layers.parameters())
    assert weights - embedding - layer <= found.end_gradients <= weights
    thrifty = simulate.run(llama(4), work(replace(FULL_ONE, update_in_backward=True)), BATCH, BATCH)
    assert thrifty.end_gradients == 0 and thrifty.end < found.end - 0.9 * found.end_gradients


@pytest.mark.parametrize("family", sorted(PACKED))
def test_every_family_on_packed_rows_is_simulated(tiny_model, family):
    configuration = tiny_family(family, AutoTokenizer.from_pretrained(tiny_model)).config
    assert simulate.run(configuration, work(), BATCH, BATCH).start > 0


def test_a_model_whose_code_cannot_be_simulated_is_said_and_recomputes(tiny_model):
    configuration = tiny_family("state space", AutoTokenizer.from_pretrained(tiny_model)).config
    found = memory.fit(configuration, work(), ROWS, 4, "default")
    assert found.estimate is None and found.work.checkpointing == "plain"
    assert found.memory.startswith("not estimated: ")


@pytest.fixture
def bare(monkeypatch):
    """A process that takes nothing, beside which tiny models count."""
    monkeypatch.setattr(memory, "CONTEXT", 0)
    monkeypatch.setattr(memory, "WORKSPACES", 0)


@pytest.mark.parametrize(
    ("asked", "enough", "mode"), [("auto", 1, "off"), ("auto", 0, "plain"), ("unsloth", 1, "plain")]
)
def test_activations_are_kept_where_they_fit(monkeypatch, bare, asked, enough, mode):
    recipe = replace(ALL, per_device_train_batch_size=4, gradient_checkpointing=asked)
    done = work(recipe, dtype="bfloat16", products="bfloat16", cuda=True)
    needs = round(memory.estimate(llama(4), done, ROWS, 1).total * (1 + memory.SHORT)) + 1
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: needs if enough else needs - 1000)
    found = memory.fit(llama(4), done, ROWS, 1, "default")
    assert found.work.checkpointing == mode, found.checkpointing
    assert f"; {(needs if enough else needs - 1000) / 1e9:.1f} GB are there" in found.memory


def test_what_cannot_fit_is_refused_with_the_cheapest_changes_that_do(monkeypatch, bare):
    rows = replace(ROWS, own=[400] * 8)
    recipe = replace(ALL, per_device_train_batch_size=4, gradient_checkpointing="off")
    done = work(recipe, dtype="bfloat16", products="bfloat16", cuda=True)
    needs, less = memory.estimate(llama(4), done, rows, 1), replace(recipe, per_device_train_batch_size=2)
    half = memory.estimate(llama(4), replace(done, recipe=replace(less, gradient_accumulation_steps=2)), rows, 1)
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: round(half.total * (1 + memory.SHORT)) + 1)
    with pytest.raises(UserError) as refused:
        memory.fit(llama(4), done, rows, 1, "you")
    said = str(refused.value)
    assert said.startswith(f"this training needs {needs.total / 1e9:.1f} GB, and ") and "\n" not in said
    for change in ("per_device_train_batch_size=2 gradient_accumulation_steps=2", "gradient_checkpointing=plain"):
        assert f"{change} (0.0 GB)" in said
    assert "--force" in said
    assert memory.fit(llama(4), done, rows, 1, "you", force=True).parts == needs.parts


def test_where_nothing_helps_the_sentence_says_so(monkeypatch):
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: -(10**12))
    recipe = replace(ALL, load_in_4bit=True, per_device_train_batch_size=1, gradient_checkpointing="plain")
    with pytest.raises(UserError, match="no change that we know of makes it fit"):
        memory.fit(llama(2), work(recipe, cuda=True, dtype="bfloat16", products="bfloat16"), ROWS, 4, "you")


def test_the_longest_batch_of_an_epoch_is_no_sum_of_the_longest_rows():
    rows = replace(ROWS, own=[*[20] * 998, 500, 500])
    batch = rows.training(replace(FULL, per_device_train_batch_size=8))
    assert batch.shared + 8 * batch.own < 8 + 500 + 7 * 20 + 8 * 20
    padded = rows.training(replace(FULL, per_device_train_batch_size=8, packing=False))
    assert padded == Batch(8, 508, 0, 508)


@pytest.mark.parametrize(
    ("saves", "needed"),
    # Two checkpoints are kept and a third is written; or the one of an interruption, and the artefact.
    [(True, 30e9), (False, 15e9)],
)
def test_a_disk_that_is_too_small_is_refused(monkeypatch, tmp_path, saves, needed):
    estimate = Estimate("training", {"weights": 1}, 0, checkpoint=10**10, artefact=5 * 10**9)
    usage = memory.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: usage._replace(free=needed))
    said = memory.disk(estimate, saves, tmp_path / "not" / "yet")
    assert said == (
        f"10.0 GB a checkpoint, 5.0 GB the model, {needed / 1e9:.1f} GB at the worst moment; "
        f"{needed / 1e9:.1f} GB are free"
    )
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: usage._replace(free=needed - 1e9))
    with pytest.raises(UserError, match="too small for this training") as refused:
        memory.disk(estimate, saves, tmp_path)
    assert ("save_steps=0 (15.0 GB)" in str(refused.value)) == saves
    assert memory.disk(estimate, saves, tmp_path, force=True)


# By their model cards, in billions.
@pytest.mark.parametrize(("name", "count"), zip(SHAPES, [0.135, 0.494, 1.54, 3.09, 7.62, 14.8], strict=True))
def test_listed_models_have_the_parameters_of_their_cards(name, count):
    settings = type("Experiment", (), {"model_name": f"somebody/{name}"})
    model = held.build(outlook.shape(settings), FULL, "bfloat16")
    assert model.num_parameters() / 1e9 == pytest.approx(count, rel=0.01)


def test_plan_memory_fits_into_80_columns(monkeypatch, capsys):
    """A model of a layer stands for the list."""
    small = {"model_type": "llama", **{name: value for name, value in llama(1).to_dict().items() if name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads",
    )}}  # fmt: skip
    monkeypatch.setattr(outlook, "SHAPES", {"Qwen2.5-0.5B-Instruct": small})
    monkeypatch.setattr(outlook, "COLUMNS", {"full": {}, "lora": {}})
    assert main(["plan", "--memory", "24GB"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"Qwen2.5-0.5B-Instruct +64 +64", said) and "fit into 24 GB on a GPU" in said
    assert max(map(len, said.splitlines())) <= 80
    # Nothing is simulated where weights, gradients and moments alone are too large.
    assert main(["plan", "--memory", "0.01MB"]) == 0
    assert capsys.readouterr().out.count("no: ") == 2
    assert main(["plan"]) == 2 and "--memory 24GB" in capsys.readouterr().err


def test_the_picture_holds_every_part_and_what_is_there():
    figure = plots.memory({"weights": 2 * 10**9, "activations": 10**9}, 4 * 10**9)
    assert [bar.get_width() for bar in figure.axes[0].patches] == [2, 1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["there: 4.0 GB", "weights", "activations"]
    plots.plt.close("all")


@pytest.mark.parametrize(
    ("line", "files", "room"),
    [
        (
            "0::/a/b",
            {"a/memory.max": "1000", "a/memory.current": "700", "a/memory.stat": "inactive_file 90\nactive_file 10"},
            [400],
        ),
        ("0::/a", {"memory.max": "max"}, []),
        (
            "5:cpu,memory:/a",
            {
                "memory/a/memory.limit_in_bytes": "1000",
                "memory/a/memory.usage_in_bytes": "300",
                "memory/a/memory.stat": "total_inactive_file 0\ntotal_active_file 0",
            },
            [700],
        ),
        ("3:cpu:/a", {}, []),
    ],
)
def test_control_groups_of_both_versions_leave_what_is_under_their_limit(tmp_path, line, files, room):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(f"{line}\n")
    for name, text in files.items():
        path = tmp_path / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert [limit - used for limit, used in machine.control_groups(tmp_path)] == room
