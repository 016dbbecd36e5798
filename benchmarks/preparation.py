"""How long data preparation takes, and whether its memory grows with the rows.

    .venv/bin/python -m benchmarks.preparation FOLDER    # FOLDER holds AG News' train.csv and test.csv

The training file is repeated, every copy's rows told apart by a number, until it has 30,000 and then 120,000 rows; each
is prepared in a process of its own. Without FOLDER the built-in sample is repeated.
"""

from __future__ import annotations

import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data_prep import prepare
from data_prep.sources import Files
from data_prep.task import AG_NEWS

SIZES = (30_000, 120_000)


def main() -> None:
    if len(sys.argv) == 4 and sys.argv[1] == "--one":
        print(json.dumps(_measure(Path(sys.argv[2]), Path(sys.argv[3]))))
        return
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else AG_NEWS.sample
    for rows in SIZES:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "source"
            _enlarge(source, folder, rows)
            command = [sys.executable, "-m", "benchmarks.preparation", "--one", str(folder), str(Path(scratch) / "out")]
            result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{rows:7,} rows: {result['seconds']:5.1f} s, peak memory {result['peak_bytes'] / 1e6:.0f} MB")


def _measure(source: Path, target: Path) -> dict[str, float]:
    start = time.perf_counter()
    prepare(Files(source, AG_NEWS), target, prompt="lean")
    # Linux counts in KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak}


def _enlarge(source: Path, folder: Path, rows: int) -> None:
    """A CSV folder of `rows` training rows, made by repeating those of `source`."""
    folder.mkdir()
    (folder / "test.csv").write_bytes((source / "test.csv").read_bytes())
    with (source / "train.csv").open(encoding="utf-8", newline="") as file:
        known = list(csv.reader(file))
    with (folder / "train.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        for number in range(rows):
            label, title, description = known[number % len(known)]
            copy = number // len(known)
            writer.writerow([label, title, f"{description} No. {copy} of {number}." if copy else description])


if __name__ == "__main__":
    main()
