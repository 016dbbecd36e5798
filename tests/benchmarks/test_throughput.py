"""What the benchmark of speed measures is what the README's tables know."""

from benchmarks import throughput
from finetune import prediction, speed

MEASURED = {rung.key for part in throughput.PARTS.values() for rung in part}


def test_each_training_has_its_place_in_a_table():
    placed = [*speed.LADDER, *speed.PEERS, *(key for keys in speed.METHODS.values() for key in keys)]
    assert set(placed) == MEASURED


def test_each_scoring_and_start_has_its_place_too():
    scored = {
        f"scoring_{prompt}_{batch}" + "_plain" * (kernels == "plain") for prompt, batch, kernels in throughput.SCORED
    }
    assert scored == set(speed.SCORING)
    assert set(throughput.STARTS) == set(speed.STARTS)


def test_predictions_read_what_is_measured():
    read = {key for method in prediction.METHODS for key in (*method.kept, *method.recomputing, *method.checks)}
    assert read <= MEASURED
