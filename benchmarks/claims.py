"""What the first experiment on a DGX Spark claimed of each optimisation, beside what we measured."""

from __future__ import annotations

from benchmarks.records import SpeedRecord

NOT_MEASURED = "not measured"
# What was found, and whether the claim holds.
Finding = tuple[str, str]


def findings(record: SpeedRecord) -> dict[str, Finding]:
    """Each claim with what a record's figures say of it."""
    return {
        "the container instead of pip in a venv: 4.5 to 38.2 TFLOP/s": ("needs a GB10", NOT_MEASURED),
        "cuDNN's benchmark mode: 5 to 10 % faster": _faster(record, "trl_seed", "trl_cudnn", 5, 10),
        "sequence packing: 30 to 40 % faster": _faster(record, "trl_seed", "trl_packed", 30, 40),
        "flash attention: 10 to 15 % faster": _faster(record, "unsloth_seed", "flash", 10, 15),
        "Unsloth's checkpointing: 30 % less memory": _less_memory(record, "batch", "lora_unsloth_checkpointing"),
        "Unsloth's checkpointing: twice the batch": _fits(record, "batch", "lora_unsloth_checkpointing_128"),
    }


def _faster(record: SpeedRecord, first: str, second: str, low: float, high: float) -> Finding:
    """Whether the second row is `low` to `high` percent faster than the first."""
    if missing := record.lacking(first, second):
        return missing, NOT_MEASURED
    before, after = (row.articles_per_second for row in record.measured(first, second))
    # Judged as it is shown.
    gain = round(100 * (after / before - 1), 1)
    verdict = "no: less" if gain < low else "yes" if gain <= high else "yes, and more"
    return f"{before:.1f} to {after:.1f} articles/s: {gain:+z.1f} %", verdict


def _less_memory(record: SpeedRecord, *keys: str) -> Finding:
    """Whether the second row needs 30 % less memory than the first."""
    if missing := record.lacking(*keys):
        return missing, NOT_MEASURED
    before, after = record.measured(*keys)
    saved = round(100 * (1 - after.peak_gib / before.peak_gib), 1)
    speed = after.articles_per_second / before.articles_per_second
    shown = f"{before.peak_gib:.1f} to {after.peak_gib:.1f} GiB: {saved:.1f} % less, at {speed:.2f} of the speed"
    return shown, "yes" if saved >= 30 else "no: less"


def _fits(record: SpeedRecord, *keys: str) -> Finding:
    """Whether the second row, with twice the articles at once, fits into the memory of the first."""
    if missing := record.lacking(*keys):
        return missing, NOT_MEASURED
    before, after = record.measured(*keys)
    shown = f"{after.recipe.per_device_train_batch_size} articles at once take {after.peak_gib:.1f} GiB with it; "
    shown += f"{before.recipe.per_device_train_batch_size} take {before.peak_gib:.1f} without"
    return shown, "yes" if after.peak_gib <= before.peak_gib else "no"
