"""Sentences about figures: right for every kind of records, each number by hand."""

import factories
import pytest
from factories import generation, predictions, right_on, write_run
from test_baselines import write_baseline
from test_variants import SETTINGS, write_variant

from data_prep import LABELS, PROMPTS
from finetune import paths
from finetune.compare import captions
from finetune.compare.comparison import load
from finetune.records import Environment, LogPoint


@pytest.fixture
def results(home):
    return paths.results_folder("cpu")


def compare(results, runs=("base", "lora"), **changes):
    for number, run in enumerate(runs):
        write_run(results, run, right_on(20 + 4 * number, 40), confidence=0.5 + number / 100, **changes)
    return load("cpu")


class TestData:
    def test_the_share_of_ag_news(self, results):
        """15,390 and 1,000 of 120,000: 0.13658."""
        rows = {"train_rows": 15_390, "validation_rows": 1_000}
        said = captions.share_of_ag_news(compare(results, data=rows))
        assert "together are 16,390: 13.7 % of the 120,000 that AG News has for training" in said
        # 40 of 7,600.
        assert "test rows are 0.5 % of its 7,600" in said

    def test_all_of_it_is_called_all(self, results):
        rows = {"train_rows": 118_000, "validation_rows": 2_000}
        said = captions.share_of_ag_news(compare(results, data=rows))
        assert "together are 120,000: all of the 120,000" in said

    def test_the_sample_is_no_share_of_it(self, results):
        assert captions.share_of_ag_news(compare(results, data={"source": "sample"})) == ""

    def test_a_subset_of_the_training_rows_counts_what_was_trained_on(self, results):
        write_run(results, "base", right_on(20, 40), data={"train_rows": 9_000})
        write_run(results, "lora", right_on(24, 40), data={"train_rows": 1_100})
        # 1,100 and 100 of 120,000.
        assert "together are 1,200: 1.0 %" in captions.share_of_ag_news(load("cpu"))

    def test_classes_are_those_of_the_recorded_rows(self, results):
        write_run(results, "base", right_on(20, 42))
        write_run(results, "lora", right_on(24, 42), validation=predictions([True] * 9))
        said = captions.classes(load("cpu"))
        assert "11 World / 11 Sports / 10 Business / 10 Sci/Tech test rows" in said
        assert "3 World / 2 Sports / 2 Business / 2 Sci/Tech validation rows" in said

    def test_validation_rows_that_were_not_scored_have_no_classes(self, results):
        assert "validation" not in captions.classes(compare(results))

    @pytest.mark.parametrize("name", ["lean", "verbose"])
    def test_the_prompt_is_the_record_s_with_placeholders(self, name):
        reference = factories.data_reference(40, prompt=PROMPTS[name].id)
        system, user, answer = captions.prompt(reference)
        assert system == {"role": "system", "content": PROMPTS[name].system}
        assert user["content"] == "Classify the following news article:\n\nTITLE DESCRIPTION"
        assert answer["content"] == '{"category":"World"}'

    def test_a_prompt_of_an_older_version_is_not_guessed(self):
        assert captions.prompt(factories.data_reference(40, prompt="lean-0")) == []


class TestOrigin:
    EMBEDDED = SETTINGS | {"model": "embedded"}

    def test_the_embedded_model_was_rounded_before_and_qlora_rounds_again(self, results):
        said = captions.origin(compare(results, ("base", "lora", "qlora"), settings=self.EMBEDDED))
        assert "a-model was unpacked to bf16 from a 4-bit file (GGUF, Q4_1)" in said
        assert "QLoRA rounds them once more" in said

    @pytest.mark.parametrize("runs", [("base",), ("base", "full", "lora"), ("base", "qlora")])
    def test_lora_and_qlora_are_named_where_both_are(self, results, runs):
        said = captions.origin(compare(results, runs, settings=self.EMBEDDED))
        assert "4-bit file" in said and "QLoRA" not in said

    def test_of_another_model_nothing_is_said(self, results):
        settings = SETTINGS | {"model": "unsloth/Qwen2.5-7B-Instruct"}
        assert captions.origin(compare(results, ("base", "lora", "qlora"), settings=settings)) == ""

    def test_records_that_do_not_say_which_model_are_not_taken_for_it(self, results):
        assert captions.origin(compare(results)) == ""


class TestForcedScoring:
    def test_what_the_base_writes_when_it_is_free(self, results):
        # Of 30 answers every tenth is invalid.
        rows = predictions(right_on(20, 40), 0.4)
        write_run(results, "base", [], rows=rows, results_of_generation=generation(rows, 30))
        assert "base model gave a valid answer to 27 of 30 test rows" in captions.forced(load("cpu"))

    def test_without_generation_nothing_is_said_of_it(self, results):
        assert "Free to write" not in captions.forced(compare(results))

    def test_the_label_that_is_preferred_is_counted(self, results):
        """Of ten rows of each class World's are right, two of Sports', and all others are said to be World."""
        rows = [
            row.model_copy(update={"prediction": "Sports" if number in (10, 11) else "World"})
            for number, row in enumerate(
                sorted(predictions(right_on(40, 40)), key=lambda row: -LABELS.index(row.label))
            )
        ]
        write_run(results, "base", [], rows=rows)
        assert "Its most frequent label by scoring is World, for 95% of all." in captions.forced(load("cpu"))

    def test_examples_are_one_draw_where_there_are_any(self, results):
        assert "one draw" not in captions.forced(compare(results))
        write_baseline(results, "few_shot", right_on(15, 40))
        assert "one draw" in captions.forced(load("cpu"))


def history(validations: int) -> list[LogPoint]:
    return [
        LogPoint(step=step, epoch=step / 10, validation_accuracy=0.9, training_seconds=float(step))
        for step in range(validations)
    ]


class TestTimeToAccuracy:
    def test_validations_rows_and_error_are_the_records(self, results):
        """Of 400 rows: sqrt(0.94 x 0.06 / 400) = 1.19 and sqrt(0.9 x 0.1 / 400) = 1.5 points."""
        rows = {"validation_rows": 400}
        said = captions.validations(compare(results, cost={"history": history(5)}, data=rows))
        assert "each training: 5." in said
        assert "400 rows: the standard error of an accuracy is 1.2 points at 94 % and 1.5 points at 90 %" in said

    def test_trainings_may_have_different_numbers_of_validations(self, results):
        write_run(results, "base", right_on(20, 40))
        write_run(results, "full", right_on(24, 40), cost={"history": history(3)})
        write_run(results, "lora", right_on(28, 40), cost={"history": history(5)})
        assert "each training: 3 to 5." in captions.validations(load("cpu"))

    @pytest.mark.parametrize(
        ("gpu", "svm", "said"), [(None, True, False), ("A GPU", True, True), ("A GPU", False, False)]
    )
    def test_seconds_of_processor_and_gpu_are_told_apart_where_there_are_both(self, results, gpu, svm, said):
        where = factories.environment().model_copy(update={"hardware": {"cpu": "A processor", "cores": 2, "gpu": gpu}})
        if svm:
            write_baseline(results, "svm", right_on(28, 40))
        compared = compare(results, cost={"environment": where})
        assert ("SVM's seconds are a processor's" in captions.validations(compared)) == said


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("python -m finetune run --jobs 6", "Up to 6 notebooks of one command"),
        ("python -m finetune run --jobs=3", "Up to 3 notebooks"),
        ("python -m finetune run", None),
    ],
)
def test_notebooks_beside_each_other_are_owned_up_to(results, command, said):
    where = factories.environment().model_copy(update={"command": command})
    text = captions.trained_beside(compare(results, cost={"environment": where}))
    assert text.startswith(said) if said else text == ""


def test_updates_along_the_learning_curve_are_the_records(results):
    write_run(results, "base", right_on(20, 40))
    for run, few in (("full", 12), ("lora", 14)):
        write_run(results, run, right_on(30 + few, 60)[:40], settings=SETTINGS, cost={"steps": 1_723})
        write_variant(results, run, "rows-250", right_on(few, 40), data={"train_rows": 250}, cost={"steps": few})
        write_variant(results, run, "rows-500", right_on(25, 40), data={"train_rows": 500}, cost={"steps": 99})
    said = captions.updates(load("cpu"))
    assert "fewer updates too: 12 to 14 with 250 rows, 1,723 with 1,000" in said


class TestSecondLook:
    def test_it_counts_the_suspected_rows_whose_label_the_svm_gives(self, results):
        """LoRA, always as sure, is wrong on rows 24 to 39, all suspected; the SVM is right on rows 0 to 29."""
        write_baseline(results, "svm", right_on(30, 40))
        assert captions.second_look(compare(results)).endswith("gives the label in 6 of 16.")

    def test_without_the_svm_there_is_none(self, results):
        assert captions.second_look(compare(results)) == ""


class TestSoftware:
    @staticmethod
    def environment(packages, **hardware) -> Environment:
        hardware = {"cpu": "A processor", "cores": 2, "gpu": None} | hardware
        return factories.environment().model_copy(update={"packages": packages, "hardware": hardware})

    def test_versions_that_differ_stand_beside_each_other(self):
        found = [self.environment({"torch": version}, python="3.12.3") for version in ("2.11.0", "2.12.1", "2.11.0")]
        assert captions.software(found).startswith("torch 2.11.0 or 2.12.1, Python 3.12.3.")

    def test_what_is_not_installed_is_no_gap_and_what_no_record_holds_is(self):
        said = captions.software([self.environment({"torch": "2.11.0", "unsloth": None}, python="3.12.3")])
        assert "unsloth " not in said and "unsloth," not in said
        assert "Not recorded: transformers," in said and "scipy, statsmodels, cleanlab" in said
        assert "driver" not in said and "CUDA" not in said

    def test_a_gpu_has_a_driver(self):
        old, new = {"gpu": "A GPU", "cuda": "13.0"}, {"gpu": "A GPU", "cuda": "13.0", "driver": "580.1"}
        assert captions.software([self.environment({}, **old)]).endswith("GPU driver.")
        said = captions.software([self.environment({}, **old), self.environment({}, **new)])
        assert "CUDA 13.0, GPU driver 580.1." in said and said.endswith("Not in all: GPU driver.")

    def test_what_only_some_records_hold_is_said(self):
        found = [self.environment({"scipy": "1.17.1"}, python="3.12.3"), self.environment({}, python="3.12.3")]
        gpu = self.environment({}, gpu="A GPU", cuda="13.0", driver="580.1", python="3.12.3")
        said = captions.software([*found, gpu])
        # Where there is no GPU, no driver is missing.
        assert "scipy 1.17.1, " in said and said.endswith(", numpy. Not in all: scipy.")
