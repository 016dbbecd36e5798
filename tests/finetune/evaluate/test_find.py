"""No artefact but the recorded one is judged: not from the disk, and not from memory."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from data_prep import UserError
from finetune import paths, records
from finetune.config.profiles import place
from finetune.data import load_data
from finetune.evaluate.find import check_loaded, find_run
from finetune.evaluate.merge import merge
from finetune.evaluate.run import evaluate
from finetune.files import folder_digest
from finetune.model.hub import base_digest
from finetune.model.load import load_tokenizer
from finetune.notebooks import run_cells

IDS = [3, 4, 5, *range(30, 60)]


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """A folder of outputs with a trained adapter, whose base is in the folder too."""
    home = tmp_path_factory.mktemp("trained")
    base = shutil.copytree(tiny_model, home / "base")
    given = {"model": str(base), "train_rows": 16, "num_train_epochs": 1, "learning_rate": 5e-3, "eval_steps": 0.9}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_HOME", str(home))
        run_cells("fine_tuning_lora", "plots.training_curves", PROFILE="cpu", OVERRIDES=given)
    return home


@pytest.fixture
def home(trained, tmp_path, monkeypatch):
    """A copy of it, of the test's own; the base stays where it was."""
    monkeypatch.setenv("FINETUNE_HOME", str(shutil.copytree(trained, tmp_path / "home")))
    return paths.home()


@pytest.fixture
def model(trained):
    """The name of the training."""
    return {"model": str(trained / "base")}


@pytest.fixture
def adapter(home, model):
    return home / "adapters" / f"{place('cpu', 'ag_news', model['model'])}-lora"


def configured(**changes):
    def change(adapter):
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def weights(change):
    def changed(adapter):
        file = adapter / "adapter_model.safetensors"
        save_file({name: change(name, tensor) for name, tensor in load_file(file).items()}, file)

    return changed


def cut_short(adapter):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


CHANGES = {
    "alpha": configured(lora_alpha=64),
    "modules": configured(target_modules=["q_proj"]),
    "base": configured(base_model_name_or_path="another"),
    "cut short": cut_short,
    "zeros": weights(lambda name, tensor: torch.zeros_like(tensor)),
    "another run's": weights(lambda name, tensor: torch.randn_like(tensor)),
    "names": lambda adapter: save_file({"other": torch.ones(2)}, adapter / "adapter_model.safetensors"),
    "added": lambda adapter: (adapter / "adapter_model.bin").write_bytes(b""),
    "removed": lambda adapter: (adapter / "adapter_model.safetensors").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_artefact_than_the_recorded_one_is_refused_by_name(adapter, change, model):
    CHANGES[change](adapter)
    with pytest.raises(UserError) as refused:
        find_run("lora", "cpu", model)
    record = paths.run_folder(adapter.name.removesuffix("-lora"), "lora") / "record.json"
    assert str(refused.value) == f"{adapter} is not the one that {record} describes: run fine_tuning_lora.ipynb again"


def test_a_card_may_be_edited_and_a_missing_folder_is_named(adapter, model):
    (adapter / "README.md").write_text("my notes")
    (adapter / ".gitattributes").write_text("from the hub")
    assert find_run("lora", "cpu", model).artefact == adapter
    shutil.rmtree(adapter)
    with pytest.raises(UserError, match=r"-lora is gone: run fine_tuning_lora\.ipynb again"):
        find_run("lora", "cpu", model)


def on_base(trained, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(trained / "base"), adapter)


def test_what_is_in_memory_must_be_the_artefact_on_its_base(trained, adapter, tiny_model, model):
    found = find_run("lora", "cpu", model)
    check_loaded(found, on_base(trained, adapter), IDS)
    base = AutoModelForCausalLM.from_pretrained(trained / "base")
    with pytest.raises(UserError, match=r"was not applied: the model lacks 28 of its 28 matrices, such as base_"):
        check_loaded(found, base, IDS)
    with pytest.raises(UserError, match="lacks 28 of its 28 matrices"):
        check_loaded(found, get_peft_model(base, LoraConfig(r=found.trained["r"], target_modules=["q_proj"])), IDS)
    elsewhere = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter)
    with pytest.raises(UserError, match=f"the weights are from {tiny_model}, and not from {trained / 'base'}"):
        check_loaded(found, elsewhere, IDS)
    loaded = on_base(trained, adapter)
    CHANGES["zeros"](adapter)
    with pytest.raises(UserError, match=r"-lora is not the one that"):
        check_loaded(found, loaded, IDS)


def other_weights(base):
    file = base / "model.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def other_configuration(base):
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 0.1}))


@pytest.mark.parametrize("change", [other_weights, other_configuration])
def test_an_adapter_is_judged_on_the_weights_that_it_was_trained_on(trained, adapter, tmp_path, change, model):
    found, base = find_run("lora", "cpu", model), trained / "base"
    # Nobody's output comes from these.
    (base / "README.md").write_text("my notes")
    (base / "generation_config.json").write_text("{}")
    check_loaded(found, on_base(trained, adapter), IDS)
    shutil.copytree(base, tmp_path / "kept")
    try:
        change(base)
        with pytest.raises(UserError) as refused:
            check_loaded(found, on_base(trained, adapter), IDS)
        assert str(refused.value) == (
            f"{base} holds other weights than those that the lora adapter was trained on: put these back, or run "
            "fine_tuning_lora.ipynb again"
        )
        older = found.record.training.model_copy(update={"base_digest": ""})
        check_loaded(
            replace(found, record=found.record.model_copy(update={"training": older})), on_base(trained, adapter), IDS
        )
    finally:
        shutil.copytree(tmp_path / "kept", base, dirs_exist_ok=True)


def test_the_base_of_a_hub_model_is_its_files_in_the_cache_whatever_the_commit(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--someone--a-model"
    (cached / "refs").mkdir(parents=True)
    found = []
    for commit in ("0" * 40, "1" * 40):
        shutil.copytree(tiny_model, cached / "snapshots" / commit)
        (cached / "refs" / "main").write_text(commit)
        config = AutoModelForCausalLM.from_pretrained("someone/a-model").config
        assert config._commit_hash == commit
        found.append(base_digest(config))
    other_weights(cached / "snapshots" / commit)
    gone = AutoConfig.from_pretrained(tiny_model)
    gone.name_or_path = str(tmp_path / "gone")
    assert base_digest(gone) == ""
    assert found[0] == found[1] == base_digest(AutoConfig.from_pretrained(tiny_model)) != base_digest(config)


def test_another_adapter_beside_it_or_another_scale_is_not_judged_under_its_name(trained, adapter, model):
    found = find_run("lora", "cpu", model)
    wanted = "was not applied as it was trained: another one is active, or its scale"
    loaded = on_base(trained, adapter)
    loaded.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    check_loaded(found, loaded, IDS)
    loaded.set_adapter("other")
    with pytest.raises(UserError, match=wanted):
        check_loaded(found, loaded, IDS)
    config = LoraConfig.from_pretrained(adapter)
    config.lora_alpha *= 2
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(trained / "base"), adapter, config=config)
    with pytest.raises(UserError, match=wanted):
        check_loaded(found, loaded, IDS)


def test_keys_that_do_not_match_and_an_adapter_that_changes_nothing_are_refused(trained, adapter, model):
    """Though they are recorded: peft loads both without an error."""
    found = find_run("lora", "cpu", model)

    def recorded(change):
        change(adapter)
        training = found.training.model_copy(update={"artefact_digest": folder_digest(adapter)})
        return replace(found, record=found.record.model_copy(update={"training": training}))

    without_b = recorded(weights(lambda name, tensor: tensor * ("lora_B" not in name)))
    with pytest.raises(UserError, match="changes nothing: the model's output is the base model's"):
        check_loaded(without_b, on_base(trained, adapter), IDS)
    file = adapter / "adapter_model.safetensors"
    renamed = recorded(
        lambda _: save_file({name.replace("layers.1", "layers.7"): t for name, t in load_file(file).items()}, file)
    )
    with pytest.raises(UserError, match=r"lacks 14 of its 28 matrices, such as .*layers\.7"):
        check_loaded(renamed, on_base(trained, adapter), IDS)


def test_evaluating_and_merging_refuse_it_and_write_nothing(trained, adapter, model):
    found = find_run("lora", "cpu", model | {"test_rows": 8, "generation_rows": 0})
    data, tokenizer = load_data(found), load_tokenizer(adapter)
    before = records.read(found.folder)
    with pytest.raises(UserError, match="was not applied"):
        evaluate(found, AutoModelForCausalLM.from_pretrained(trained / "base"), tokenizer, data)
    in_4_bits = replace(found, record=before.model_copy(update={"settings": before.settings | {"load_in_4bit": True}}))
    with pytest.raises(UserError, match="the lora model was trained with load_in_4bit=True"):
        evaluate(in_4_bits, on_base(trained, adapter), tokenizer, data)
    assert records.read(found.folder) == before
    evaluate(found, on_base(trained, adapter), tokenizer, data)
    found = find_run("lora", "cpu", model)
    CHANGES["alpha"](adapter)
    with pytest.raises(UserError, match="is not the one that"):
        merge(found, data)
    assert not (found.folder / records.MERGED).exists()
