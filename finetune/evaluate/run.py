"""Evaluate one run on the test rows, and write what came out into its record."""

from __future__ import annotations

import contextlib

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from data_prep import Example, Task, UserError
from data_prep.files import replacing
from finetune import machine, metrics, paths, predictions, records
from finetune.config.methods import METHODS
from finetune.config.plan import Experiment, left_aligned
from finetune.config.recipes import MAX_LENGTH
from finetune.data import PreparedData
from finetune.evaluate import score
from finetune.evaluate.find import Found, check_loaded, values_of
from finetune.files import locked, short_digest
from finetune.model import checks, encode, load, packing, padded
from finetune.model.hub import base_digest
from finetune.model.precision import Precision
from finetune.model.template import Template
from finetune.predictions import Prediction
from finetune.wording import percent_interval

# The whole confusion matrix of the test rows, which pictures and tables show of few classes alone.
CONFUSION = "confusion.csv"


def evaluate(found: Found, model, tokenizer, data: PreparedData) -> records.RunRecord:
    """Evaluate a model on the test rows, and record the result. Several processes share out the rows; the first one
    records, and the others end.

    Args:
        found: What the model is.
        model: The model, loaded; with its adapter, if it has one.
        tokenizer: Its tokenizer.
        data: The prepared data; its test rows are judged, and its validation rows scored for what is fitted on them.

    Raises:
        UserError: The model was trained on other data, cannot read it, is not the one found, or gives other logits
            than its own.
    """
    # Processes that share one evaluation have one lock: the first one's.
    alone = locked(found.folder, f"Waiting for {found.folder}: another process evaluates it")
    with alone if machine.rank() == 0 else contextlib.nullcontext():
        return _evaluate(found, model, tokenizer, data)


def _evaluate(found: Found, model, tokenizer, data: PreparedData) -> records.RunRecord:
    if found.record and found.record.data.fingerprint != data.reference.fingerprint:
        raise UserError(
            f"the {found.run} model was trained on other data (fingerprint {found.record.data.fingerprint}, now "
            f"{data.reference.fingerprint}): run {METHODS[found.run].notebook}.ipynb again"
        )
    precision = load.choose_precision(found.experiment, found.trained.get("dtype"))
    print(f"precision: {precision}")
    load.evaluating(model)
    check_prompt(found, tokenizer, data)
    if found.artefact and load.load_tokenizer(found.artefact).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has another vocabulary than the {found.run} model was trained "
            f"with: load that of {found.artefact}, or run {METHODS[found.run].notebook}.ipynb again"
        )
    encoded = encode.encode(tokenizer, [*data.test, *data.validation], MAX_LENGTH)
    print(f"articles: {encode.cuts(encoded, MAX_LENGTH)}")
    sequences = [row.prompt + row.answer for row in encoded]
    checks.check_model(model.config, tokenizer, data.task, sequences, new_tokens=score.MIN_ANSWER_TOKENS)
    check_loaded(found, model, sequences[0])
    if found.record and (load.compute_dtype_of_4bit(model) is not None) != found.load_in_4bit:
        raise UserError(
            f"the {found.run} model was trained with load_in_4bit={found.load_in_4bit}, and on other weights it is "
            "another model: load it so"
        )
    batch_size = found.experiment.per_device_eval_batch_size
    scorer, reason = score.choose_scorer(model, tokenizer, data.task, sequences, batch_size)
    print(f"rows: {reason}")
    machine.reset_peak_memory()
    prompts = [row.prompt for row in encoded]
    result = _evaluate_model(scorer, model, prompts, precision, tokenizer, found, data)
    values = values_of(found)
    record = records.RunRecord(
        run=found.run,
        profile=found.place,
        engine=found.record.engine if found.record else "transformers",
        model=found.record.model if found.record else found.experiment.model_name,
        seed=values["seed"],
        settings=values,
        settings_digest=short_digest(values),
        data=found.record.data if found.record else data.reference,
        training=found.training,
        evaluation=result,
    )
    records.write(record, found.folder)
    return record


def check_prompt(found: Found, tokenizer, data: PreparedData) -> None:
    """Say how the tokenizer's template writes the prompt.

    Raises:
        UserError: The template loses a part of it, or the model was trained with another one.
    """
    template = Template(tokenizer)
    print(f"prompt: {template.note}")
    now, then = template.shown(data.form), found.training.rendered_prompt if found.training else ""
    if then and then != now:
        place = len(encode.common_prefix([now, then]))
        raise UserError(
            f"the {found.run} model was trained with another prompt: it read {then[place : place + 40]!r} where the "
            f"template of {tokenizer.name_or_path} now writes {now[place : place + 40]!r}; run "
            f"{METHODS[found.run].notebook}.ipynb again"
        )


def summary(record: records.RunRecord) -> pd.DataFrame:
    """Accuracy with its interval and all METRICS by scoring, as it is and corrected for the model's own prior; the same
    rows by generation where it ran."""
    result = record.evaluation
    rows = {
        "scoring, all test rows": result.scoring,
        "scoring, rows without a duplicate": result.without_duplicates,
        "scoring, corrected for the model's prior": prior_corrected(record),
        "generation, valid JSON or wrong": result.generation and result.generation.metrics,
    }
    return pd.DataFrame(
        {
            name: {
                "rows": value.rows,
                "accuracy": f"{value.accuracy:.1%}",
                "95 % interval": f"{value.accuracy_low:.1%} to {value.accuracy_high:.1%}",
                **metrics.figures(value),
            }
            for name, value in rows.items()
            if value
        }
    ).T


def prior_corrected(record: records.RunRecord) -> metrics.Metrics | None:
    """Figures on the test rows if each label's probability is divided by its mean over the validation rows.

    A model that likes a label too much, as untuned ones do, then loses that liking (Zhao et al. 2021,
    arXiv:2102.09690). Test rows have no part in it. None where no validation rows were scored.
    """
    folder = paths.run_folder(record.profile, record.run, record.variant)
    validation, test = records.read_validation(record, folder), _read_predictions(record)
    if not validation:
        return None
    labels = list(record.evaluation.scoring.classes)
    prior = _probabilities(validation, labels).mean(axis=0)
    # Of a label that is never probable nothing is known.
    corrected = _probabilities(test, labels) / np.maximum(prior, np.finfo(float).tiny)
    return metrics.compute([row.label for row in test], score.predicted_labels(corrected, labels), labels)


def _probabilities(rows: list[Prediction], labels: list[str]) -> np.ndarray:
    return np.array([[row.probabilities[label] for label in labels] for row in rows])


def class_table(record: records.RunRecord) -> pd.DataFrame:
    """Precision, recall and F1 of each class by scoring, in percent, F1 with its 95 % interval; of many classes the
    worst."""
    scoring = record.evaluation.scoring
    rows = {
        label: {
            "precision": round(100 * value.precision, 1),
            "recall": round(100 * value.recall, 1),
            "F1": round(100 * value.f1, 1),
            "95 % interval": percent_interval(value.f1_low, value.f1_high),
            "rows": value.rows,
        }
        if value.rows
        else {"precision": "-", "recall": "-", "F1": "-", "95 % interval": "-", "rows": 0}
        for label in metrics.shown_classes([scoring])
        for value in [scoring.classes[label]]
    }
    return pd.DataFrame(rows).T


def confident_errors(record: records.RunRecord, data: PreparedData, rows: int = 8) -> Styler:
    """The wrong answers that the model was surest of, with their text, as a table for a notebook."""
    articles = {example.id: example.text for example in data.test}
    wrong = [row for row in _read_predictions(record) if row.prediction != row.label]
    wrong.sort(key=lambda row: row.probabilities[row.prediction], reverse=True)
    table = pd.DataFrame(
        {
            "probability": [f"{row.probabilities[row.prediction]:.2f}" for row in wrong[:rows]],
            "predicted": [row.prediction for row in wrong[:rows]],
            "label": [row.label for row in wrong[:rows]],
            "article": [articles[row.id] for row in wrong[:rows]],
        }
    )
    return left_aligned(table).hide(axis="index")


def _read_predictions(record: records.RunRecord) -> list[Prediction]:
    return records.read_predictions(record, paths.run_folder(record.profile, record.run, record.variant))


def _evaluate_model(
    scorer: score.LabelScorer,
    model,
    prompts: list[list[int]],
    precision: Precision,
    tokenizer,
    found: Found,
    data: PreparedData,
) -> records.Evaluation:
    """Score the test and the validation rows, whose prompts follow one another, and generate for the first ones."""
    experiment, examples, folder, task = found.experiment, data.test, found.folder, data.task
    prompts, validation_prompts = prompts[: len(examples)], prompts[len(examples) :]
    scores, seconds = score.timed(score.divided, scorer.score, prompts, progress="scoring")
    probabilities = np.array(scores)
    labels = [example.label for example in examples]
    predicted = score.predicted_labels(probabilities, task.labels)
    generation, answers = _generate(scorer.backbone, tokenizer, experiment, task, prompts, labels, predicted)
    validation = np.array(score.divided(scorer.score, validation_prompts, progress="scoring validation rows"))
    if machine.rank():
        raise SystemExit
    digest = predictions.write(
        folder,
        _predictions(task, examples, probabilities, answers),
        _predictions(task, data.validation, validation, []),
    )
    scoring = metrics.compute(labels, predicted, task.labels)
    with replacing(folder / CONFUSION) as file:
        pd.DataFrame(scoring.confusion, task.labels, task.labels).to_csv(file, index_label="true \\ predicted")
    repeated = [example.is_repeated for example in examples]
    return records.Evaluation(
        environment=records.environment(),
        artefact_digest=found.training.artefact_digest if found.training else base_digest(model.config),
        seconds=seconds,
        articles_per_second=len(examples) / seconds,
        peak_memory_bytes=machine.peak_memory()[0],
        batch_size=scorer.batch_size,
        dtype=precision.name,
        precision=str(precision),
        scoring=scoring,
        log_loss=metrics.log_loss(labels, probabilities, task.labels),
        without_duplicates=metrics.compute_without(repeated, labels, predicted, task.labels),
        generation=generation,
        predictions_digest=digest,
    )


def _generate(
    backbone: packing.Backbone | padded.Padded | None,
    tokenizer,
    experiment: Experiment,
    task: Task,
    prompts: list[list[int]],
    labels: list[str],
    scored: list[str],
) -> tuple[records.Generation | None, list[str]]:
    """Answers of the first `generation_rows` test rows, and what they are worth; None of a model that cannot write."""
    if backbone is None:
        print("Generation skipped: a classification head writes no text")
        return None, []
    rows = min(experiment.generation_rows, len(prompts))
    if rows == 0:
        print("Generation skipped: generation_rows=0")
        return None, []
    answers, seconds = score.timed(
        score.divided,
        lambda own: score.generate(
            backbone.model,
            tokenizer,
            task,
            own,
            experiment.per_device_eval_batch_size,
            progress="generating",
            may_pad=isinstance(backbone, packing.Backbone),
        ),
        prompts[:rows],
    )
    parsed = [task.parse_answer(answer) for answer in answers]
    generation = records.Generation(
        seconds=seconds,
        valid_share=sum(label is not None for label in parsed) / rows,
        agreement_with_scoring=sum(a == b for a, b in zip(parsed, scored, strict=False)) / rows,
        metrics=metrics.compute(labels[:rows], parsed, task.labels),
    )
    return generation, answers


def _predictions(
    task: Task, examples: list[Example], probabilities: np.ndarray, answers: list[str]
) -> list[Prediction]:
    predicted = score.predicted_labels(probabilities, task.labels)
    generated = answers + [None] * (len(examples) - len(answers))
    return [
        Prediction(
            id=example.id,
            label=example.label,
            prediction=predicted[row],
            probabilities=dict(zip(task.labels, probabilities[row], strict=True)),
            generated=generated[row],
            has_duplicate=example.has_duplicate,
            in_validation=example.in_validation,
        )
        for row, example in enumerate(examples)
    ]
