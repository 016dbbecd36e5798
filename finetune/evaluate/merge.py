"""Merge an adapter into the weights that it was trained on, and evaluate again what came out: merging rounds."""

from __future__ import annotations

import numpy as np
import torch

from data_prep import UserError
from finetune import cards, metrics, paths, records
from finetune.config.plan import Settings
from finetune.data import PreparedData
from finetune.evaluate import score
from finetune.evaluate.run import MAX_LENGTH
from finetune.files import folder_bytes, folder_digest, replacing_folder
from finetune.model import encode, load, packing

BASES = {
    "lora": "the base model's bf16 weights",
    "qlora": "the base model's weights in 4-bit NormalFloat, dequantised to bf16: what the adapter was trained on",
}


def merge(settings: Settings, data: PreparedData) -> records.Merged:
    """Merge the adapter of an evaluated run, save the model and score the test rows with it.

    Raises:
        UserError: The run trains no adapter, was not trained with these settings, or was not evaluated yet.
    """
    if settings.recipe is None or not settings.recipe.adapter:
        raise UserError(f"{settings.run} trains no adapter: there is nothing to merge; choose lora or qlora")
    training, adapter = records.require_artefact(settings, data.reference, f"fine_tuning_{settings.run}.ipynb")
    run_folder = settings.run_folder
    record = records.read(run_folder)
    before = records.read_predictions(record, run_folder)
    tokenizer = load.load_tokenizer(settings)
    model = load.merged(settings, adapter)
    products = model.dtype
    # Saved in the precision that models are used in, and judged as it is saved.
    model.to(torch.bfloat16)
    folder = paths.artefact_folder(settings.profile, f"{settings.run}-merged", is_adapter=False)
    with replacing_folder(folder) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        (beside / "README.md").write_text(
            cards.merged_card(settings, data, settings.model_name, BASES[settings.run]), encoding="utf-8"
        )
    model.to(products)
    prompts = [row.prompt for row in encode.encode(tokenizer, data.test, MAX_LENGTH)]
    scorer = score.LabelScorer(
        packing.Backbone(model), tokenizer, data.task, settings.experiment.per_device_eval_batch_size
    )
    probabilities = scorer.score(prompts, progress="scoring")
    predicted = score.predicted_labels(probabilities, data.task.labels)
    known = np.array([[row.probabilities[label] for label in data.task.labels] for row in before])
    result = records.Merged(
        environment=records.environment(),
        run=settings.run,
        base=BASES[settings.run],
        adapter_digest=training.artefact_digest,
        artefact=str(folder.relative_to(paths.home())),
        artefact_bytes=folder_bytes(folder),
        artefact_digest=folder_digest(folder),
        scoring=metrics.compute([example.label for example in data.test], predicted, data.task.labels),
        adapter_accuracy=record.evaluation.scoring.accuracy,
        agreement=float(np.mean([row.prediction == label for row, label in zip(before, predicted, strict=True)])),
        largest_difference=float(np.abs(probabilities - known).max()),
    )
    with records.replacing(run_folder / records.MERGED) as file:
        file.write(result.model_dump_json(indent=2) + "\n")
    return result
