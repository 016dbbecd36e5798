"""What will run: precedence, origins, refusals, and what a digest depends on."""

import os
from dataclasses import FrozenInstanceError, asdict, fields

import pytest
import torch

from data_prep import UserError
from finetune.config import recipes
from finetune.config.methods import METHODS
from finetune.config.plan import Experiment, UnavailableHere, applicable, parse_assignments, plan
from finetune.config.profiles import PROFILES
from finetune.config.recipes import FULL, LORA, QLORA, Recipe

EXPERIMENT_NAMES = {field.name for field in fields(Experiment)}
RECIPE_NAMES = {field.name for field in fields(Recipe)}

# They change what is measured, not the model: an artefact serves whatever they are.
EVALUATION_ONLY = {
    "test_rows",
    "generation_rows",
    "few_shot_examples",
    "logistic_rows",
    "encoder_rows",
    "per_device_eval_batch_size",
    "evaluation_kernels",
}

# A second value for every parameter that can be changed.
OTHER_VALUES = {
    "model": "another/model",
    "logistic_rows": 100,
    "encoder_rows": 100,
    "load_best_model_at_end": True,
    "early_stopping_patience": 3,
    "source": "hub",
    "data_path": "/data",
    "prompt": "verbose",
    "normalise": False,
    "train_rows": 100,
    "validation_rows": 100,
    "test_rows": 100,
    "generation_rows": 100,
    "per_device_eval_batch_size": 3,
    "few_shot_examples": 3,
    "compute_dtype": "float32",
    "evaluation_kernels": "plain",
    "seed": 7,
    "data_seed": 8,
    "variant": "seed-43",
    "engine": "transformers",
    "learning_rate": 3e-3,
    "num_train_epochs": 9.0,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 3,
    "max_length": 333,
    "packing": False,
    "completion_only_loss": False,
    "article_loss": 0.5,
    "label_smoothing_factor": 0.1,
    "dtype": "float32",
    "optim": "adamw_8bit",
    "optim_args": "bf16_stochastic_round=True",
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.5,
    "weight_decay": 0.5,
    "max_grad_norm": 0.5,
    "update_in_backward": True,
    "gradient_checkpointing": "plain",
    "cuda_graphs": True,
    "use_liger_kernel": False,
    "offload_embedding": "on",
    "cudnn_benchmark": False,
    "r": 3,
    "eval_on_start": True,
    "lora_alpha": 3,
    "lora_dropout": 0.5,
    "target_modules": ["q_proj"],
    "eval_steps": 0.3,
    "save_steps": 0.3,
}


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch):
    """No FINETUNE_ variables, no CUDA."""
    for name in [name for name in os.environ if name.startswith("FINETUNE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def with_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


class TestPrecedence:
    def test_later_layers_win_and_are_named(self, monkeypatch):
        def learning_rate(profile, overrides=None):
            settled = plan("lora", profile, overrides)
            return settled.recipe.learning_rate, settled.origins["learning_rate"]

        assert learning_rate("spark") == (LORA.learning_rate, "recipe")
        assert learning_rate("cpu") == (PROFILES["cpu"].by_method["lora"]["learning_rate"], "profile cpu")
        monkeypatch.setenv("FINETUNE_LEARNING_RATE", "1e-4")
        assert learning_rate("cpu") == (1e-4, "environment")
        assert learning_rate("cpu", {"learning_rate": 3e-4}) == (3e-4, "override")

    def test_an_experiment_s_own_value_is_a_default(self):
        assert plan("base", "cpu").origins["seed"] == "default"
        assert plan("base", "cpu").origins["generation_rows"] == "profile cpu"

    def test_a_method_s_values_win_over_the_profile_s_shared_ones(self):
        assert plan("full", "spark").recipe.optim == "adamw_8bit"
        assert plan("lora", "spark").recipe.optim == "adamw_torch_fused"

    def test_the_profile_comes_from_the_environment_where_none_is_named(self, monkeypatch):
        monkeypatch.setenv("FINETUNE_PROFILE", "spark")
        assert plan("base").profile == "spark"
        assert "FINETUNE_PROFILE" in plan("base").profile_reason
        assert plan("base", "cpu").profile == "cpu"

    def test_without_cuda_the_cpu_profile_is_chosen_and_says_why(self):
        settled = plan("base")
        assert (settled.profile, settled.profile_reason) == ("cpu", "chosen: no CUDA on this machine")

    def test_the_base_has_no_recipe_and_no_training_parameters(self):
        settled = plan("base", "cpu")
        assert settled.recipe is None
        assert settled.values.keys() == settled.origins.keys() == EXPERIMENT_NAMES


class TestConversion:
    @pytest.mark.parametrize(
        ("name", "text", "value"),
        [
            ("learning_rate", "1e-4", 1e-4),
            ("per_device_train_batch_size", "16", 16),
            ("num_train_epochs", "2", 2.0),
            ("packing", "true", True),
            ("packing", "False", False),
            ("normalise", "0", False),
            ("train_rows", "None", None),
            ("train_rows", "48", 48),
            ("prompt", "verbose", "verbose"),
            ("data_path", "/data/ag news", "/data/ag news"),
        ],
    )
    @pytest.mark.parametrize("origin", ["environment", "override"])
    def test_text_becomes_a_value(self, monkeypatch, name, text, value, origin):
        if origin == "environment":
            monkeypatch.setenv(f"FINETUNE_{name.upper()}", text)
        settled = plan("lora", "cpu", {name: text} if origin == "override" else {})
        assert settled.values[name] == value
        assert type(settled.values[name]) is type(value)
        assert settled.origins[name] == origin

    def test_assignments_of_the_command_line(self):
        assert parse_assignments(["a=1", " b = x=y "]) == {"a": "1", "b": "x=y"}
        with pytest.raises(UserError, match="--set learning_rate: write it as name=value"):
            parse_assignments(["learning_rate"])


class TestRefusals:
    def test_an_unknown_run(self):
        with pytest.raises(
            UserError, match="unknown run 'prefix'; the runs are: base, full, full_unsloth, lora, qlora"
        ):
            plan("prefix")

    def test_an_unknown_profile(self, monkeypatch):
        with pytest.raises(UserError, match=f"unknown profile 'tpu'; the profiles are: auto, {', '.join(PROFILES)}"):
            plan("base", "tpu")
        monkeypatch.setenv("FINETUNE_PROFILE", "laptop")
        with pytest.raises(UserError, match="unknown profile 'laptop'; the profiles are"):
            plan("base")

    def test_an_unknown_parameter(self):
        with pytest.raises(UserError, match=r"unknown parameter 'lr' \(override\); the parameters are: ") as refusal:
            plan("lora", "cpu", {"lr": 1})
        listed = str(refusal.value).partition("are: ")[2].split(", ")
        assert set(listed) == EXPERIMENT_NAMES | RECIPE_NAMES

    def test_an_unknown_variable(self, monkeypatch):
        monkeypatch.setenv("FINETUNE_LEARNINGRATE", "1e-4")
        with pytest.raises(UserError, match=r"unknown parameter 'learningrate' \(environment\); .*learning_rate"):
            plan("base", "cpu")

    def test_variables_of_the_process_are_no_parameters(self, monkeypatch, tmp_path):
        monkeypatch.setenv("FINETUNE_HOME", str(tmp_path))
        monkeypatch.setenv("FINETUNE_COMMAND", "make demo")
        assert plan("base", "cpu").digest

    @pytest.mark.parametrize(
        ("name", "value", "said"),
        [
            ("learning_rate", "fast", "number"),
            ("learning_rate", 0, "greater than 0"),
            ("learning_rate", "nan", "(greater than 0|finite)"),
            ("learning_rate", "inf", "finite"),
            ("num_train_epochs", -1, "greater than 0"),
            ("num_train_epochs", "inf", "finite"),
            ("per_device_train_batch_size", 0, "greater than or equal to 1"),
            ("per_device_train_batch_size", 2.5, "integer"),
            ("max_length", 8, "greater than or equal to 64"),
            ("warmup_steps", 1.0, "less than 1"),
            ("packing", "perhaps", "boolean"),
            ("source", "kaggle", "'sample', 'files', 'hub' or 'csv'"),
            ("target_modules", 3, "list"),
            ("compute_dtype", "float16", "'bfloat16' or 'float32'"),
            ("validation_rows", 3, "greater than or equal to 4"),
            ("train_rows", 0, "greater than or equal to 1"),
            ("generation_rows", -1, "greater than or equal to 0"),
            ("seed", "lucky", "integer"),
            ("seed", -1, "greater than or equal to 0"),
            ("seed", 2**32, "less than 4294967296"),
            ("data_seed", 2**32, "less than 4294967296"),
            ("variant", "../elsewhere", "match pattern"),
            ("model", "", "at least 1 character"),
            ("per_device_train_batch_size", None, "integer"),
        ],
    )
    def test_an_impossible_value_is_named_with_what_is_possible(self, name, value, said):
        with pytest.raises(UserError, match=f"^{name}=.* is not possible: .*{said}"):
            plan("lora", "cpu", {name: value})

    @pytest.mark.parametrize(
        ("run", "overrides", "said"),
        [
            (
                "lora",
                {"load_in_4bit": True},
                "load_in_4bit=True is another method than lora; choose another run instead",
            ),
            ("lora", {"adapter": False}, "adapter=False is another method than lora"),
            ("qlora", {"load_in_4bit": "false"}, "load_in_4bit=False is another method than qlora"),
            ("full", {"adapter": True}, "adapter=True is another method than full"),
            ("lora", {"use_dora": True}, "use_dora=True is another method than lora"),
            ("lora", {"task_type": "SEQ_CLS"}, "task_type=SEQ_CLS is another method than lora"),
            ("head", {"packing": True}, "packing=True is for models that write: leave it out for a classification"),
            ("head", {"article_loss": 0.5}, "article_loss=0.5 is for models that write"),
            ("head", {"engine": "unsloth"}, "a classification head needs engine=transformers"),
            ("qlora", {"dtype": "float32"}, "contradicts dtype=float32"),
            ("lora", {"update_in_backward": True}, "is for full fine-tuning"),
            ("full", {"update_in_backward": True, "gradient_accumulation_steps": 2}, "no gradient is kept to add to"),
            ("full", {"update_in_backward": True, "packing": False}, "needs cuda_graphs=False and packing=True"),
        ],
    )
    def test_a_recipe_of_another_method(self, run, overrides, said):
        with pytest.raises(UserError, match=said):
            plan(run, "cpu", overrides)

    def test_overrides_that_mean_nothing_to_a_run_are_left_out(self):
        overrides = {"learning_rate": 1e-4, "seed": 1}
        assert applicable(overrides, "base") == {"seed": 1}
        assert applicable(overrides, "lora") == overrides
        with pytest.raises(UserError, match="unknown parameter 'lr'"):
            applicable({"lr": 1}, "base")


class TestEngine:
    def test_unsloth_without_cuda_is_refused_in_one_sentence(self):
        with pytest.raises(UnavailableHere) as refusal:
            plan("full_unsloth", "cpu")
        assert str(refusal.value).startswith("Unsloth needs an NVIDIA GPU with CUDA and this machine has none")
        assert "\n" not in str(refusal.value) and ". " not in str(refusal.value)

    @pytest.mark.parametrize("profile", PROFILES)
    @pytest.mark.parametrize("run", [run for run in METHODS if run != "full_unsloth"])
    def test_every_run_of_every_profile_builds_without_cuda(self, run, profile):
        assert plan(run, profile).engine == "transformers"

    @pytest.mark.parametrize("profile", PROFILES)
    @pytest.mark.parametrize("run", METHODS)
    def test_every_run_of_every_profile_builds_with_cuda(self, with_cuda, run, profile):
        assert plan(run, profile).engine == ("transformers" if run in ("base", "full", "dora", "head") else "unsloth")


def test_what_a_profile_says_of_the_sample_is_not_for_other_rows():
    sample, own = plan("lora", "cpu"), plan("lora", "cpu", {"source": "csv", "data_path": "rows"})
    assert (sample.experiment.train_rows, own.experiment.train_rows) == (160, None)


class TestDigest:
    def test_every_parameter_has_another_value_here(self):
        assert OTHER_VALUES.keys() | {"task", *recipes.DEFINING} == EXPERIMENT_NAMES | RECIPE_NAMES

    @pytest.mark.parametrize(("name", "value"), OTHER_VALUES.items())
    def test_it_changes_with_every_parameter(self, name, value):
        run = "full" if name == "update_in_backward" else "lora"
        # It is for the best weights alone.
        given = {"load_best_model_at_end": True} if name == "early_stopping_patience" else {}
        before = plan(run, "cpu", given)
        assert before.values[name] != value, "this test needs a value that is not the present one"
        after = plan(run, "cpu", given | {name: value})
        assert after.digest != before.digest
        assert (after.training_digest == before.training_digest) == (name in EVALUATION_ONLY)

    def test_runs_and_engines_have_digests_of_their_own(self, monkeypatch):
        digests = {run: plan(run, "cpu").digest for run in ("base", "full", "lora", "qlora")}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        digests |= {f"{run} with CUDA": plan(run, "cpu").digest for run in ("full_unsloth", "lora", "qlora")}
        assert len(set(digests.values())) == len(digests)

    def test_it_does_not_depend_on_where_a_value_came_from(self, monkeypatch):
        before = plan("lora", "cpu")
        as_text = {name: str(value) for name, value in before.values.items()}
        assert plan("lora", "cpu", as_text).digest == before.digest
        monkeypatch.setenv("FINETUNE_PER_DEVICE_TRAIN_BATCH_SIZE", as_text["per_device_train_batch_size"])
        assert plan("lora", "cpu").digest == before.digest


def difference(first: Recipe, second: Recipe) -> dict[str, tuple]:
    """The fields in which two recipes differ, with both values."""
    one, other = asdict(first), asdict(second)
    return {name: (one[name], other[name]) for name in one if one[name] != other[name]}


class TestRecipes:
    def test_lora_and_qlora_differ_in_load_in_4bit_alone(self):
        assert difference(LORA, QLORA) == {"load_in_4bit": (False, True)}

    @pytest.mark.parametrize("profile", PROFILES)
    def test_and_they_do_in_every_profile(self, profile):
        lora, qlora = plan("lora", profile), plan("qlora", profile)
        assert difference(lora.recipe, qlora.recipe).keys() == {"load_in_4bit"}
        assert lora.experiment == qlora.experiment

    def test_the_defaults_are_those_of_the_experiment_that_this_began_with(self):
        lora = plan("lora", "spark").recipe
        assert (lora.r, lora.lora_alpha, LORA.per_device_train_batch_size, LORA.gradient_accumulation_steps) == (
            16,
            32,
            8,
            4,
        )
        assert (LORA.learning_rate, FULL.learning_rate) == (2e-4, 2e-5)
        assert LORA.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
        assert plan("lora", "cpu", {"r": 8}).recipe.lora_alpha == 16
        assert plan("lora", "cpu", {"target_modules": "q_proj, v_proj"}).recipe.target_modules == ["q_proj", "v_proj"]

    def test_a_recipe_is_frozen_and_takes_no_other_field(self):
        with pytest.raises(FrozenInstanceError):
            LORA.learning_rate = 1.0
        with pytest.raises((TypeError, ValueError)):
            Recipe(adapter=True, rank=8)


class TestDocumentation:
    @pytest.mark.parametrize("part", [Experiment, Recipe])
    def test_every_field_has_its_sentence(self, part):
        for name, field in part.__pydantic_fields__.items():
            assert field.description and field.description.endswith("."), name

    def test_the_table_shows_every_parameter_with_value_origin_and_meaning(self):
        table = plan("lora", "cpu", {"learning_rate": 1e-4}).table()
        assert set(table.index) == EXPERIMENT_NAMES | RECIPE_NAMES
        assert list(table.loc["learning_rate"]) == ["0.0001", "override", "Peak learning rate."]
        assert (table["meaning"].str.len() > 0).all()
        assert not table["meaning"].str.contains("\n").any()

    def test_the_notebook_shows_profile_and_engine_with_their_reasons(self):
        html = plan("lora", "cpu")._repr_html_()
        assert "asked for by name" in html
        assert "no CUDA on this machine" in html


@pytest.mark.parametrize("name", ["WORLD_SIZE", "FINETUNE_PROCESSES"])
def test_several_processes_train_with_transformers(monkeypatch, name):
    monkeypatch.setenv(name, "2")
    assert plan("lora", "cpu").engine_reason.startswith("2 processes")
    with pytest.raises(UnavailableHere, match="one process"):
        plan("lora", "cpu", {"engine": "unsloth"})
