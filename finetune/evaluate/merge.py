"""Merge an adapter into the weights that it was trained on, and evaluate again what came out: merging rounds."""

from __future__ import annotations

import numpy as np
import torch
from peft import PeftModel

from data_prep import UserError
from finetune import cards, metrics, paths, records
from finetune.config.recipes import MAX_LENGTH
from finetune.data import PreparedData
from finetune.evaluate import score
from finetune.evaluate.find import Found, check_loaded
from finetune.evaluate.run import check_prompt
from finetune.files import folder_bytes, folder_digest, locked, replacing_folder
from finetune.model import encode, load

BF16 = "the base model's bf16 weights"
DEQUANTISED = "the base model's weights in 4-bit NormalFloat, dequantised to bf16: what the adapter was trained on"


def merge(found: Found, data: PreparedData) -> records.Merged:
    """Merge the adapter of an evaluated run, save the model and score the test rows with it.

    The adapter of a 4-bit base is merged into its dequantised weights: 4-bit ones would round the result again.

    Raises:
        UserError: The run trains no adapter, was not evaluated yet, or its adapter is not the one found.
    """
    with locked(found.folder, f"Waiting for {found.folder}: another process works with it"):
        return _merge(found, data)


def _merge(found: Found, data: PreparedData) -> records.Merged:
    if not found.trained.get("adapter"):
        raise UserError(f"{found.run} trains no adapter: there is nothing to merge; choose lora or qlora")
    record, base = found.record, DEQUANTISED if found.load_in_4bit else BF16
    before = records.read_predictions(record, found.folder)
    tokenizer = load.load_tokenizer(found.artefact)
    check_prompt(found, tokenizer, data)
    encoded = encode.encode(tokenizer, data.test, MAX_LENGTH)
    print(f"articles: {encode.cuts(encoded, MAX_LENGTH)}")
    dtype = load.choose_precision(found.experiment, found.trained["dtype"]).name
    model, _ = load.load_model(
        found.experiment.model,
        dtype=dtype,
        compute_dtype=dtype,
        load_in_4bit=found.load_in_4bit,
        labels=found.trained.get("labels"),
    )
    model = PeftModel.from_pretrained(model.dequantize() if found.load_in_4bit else model, found.artefact)
    check_loaded(found, model, encoded[0].prompt)
    model = model.merge_and_unload().eval()
    products = model.dtype
    # Saved in the precision that models are used in, and judged as it is saved.
    model.to(torch.bfloat16)
    folder = paths.artefact_folder(found.place, f"{found.run}-merged", is_adapter=False)
    with replacing_folder(folder) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        (beside / "README.md").write_text(cards.model_card(record, data, merged_into=base), encoding="utf-8")
    model.to(products)
    sequences, batch = [row.prompt + row.answer for row in encoded], found.experiment.per_device_eval_batch_size
    scorer, reason = score.choose_scorer(model, tokenizer, data.task, sequences, batch)
    print(f"rows: {reason}")
    probabilities = scorer.score([row.prompt for row in encoded], progress="scoring")
    predicted = score.predicted_labels(probabilities, data.task.labels)
    known = np.array([[row.probabilities[label] for label in data.task.labels] for row in before])
    result = records.Merged(
        environment=records.environment(),
        run=found.run,
        base=base,
        adapter_digest=record.training.artefact_digest,
        artefact=str(folder.relative_to(paths.home())),
        artefact_bytes=folder_bytes(folder),
        artefact_digest=folder_digest(folder),
        scoring=metrics.compute([example.label for example in data.test], predicted, data.task.labels),
        adapter_accuracy=record.evaluation.scoring.accuracy,
        agreement=float(np.mean([row.prediction == label for row, label in zip(before, predicted, strict=True)])),
        largest_difference=float(np.abs(probabilities - known).max()),
    )
    records.write_part(result, found.folder / records.MERGED)
    return result
