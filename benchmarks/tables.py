"""What the README would say of a file of measurements, before it is published: ladder, claims, prediction for a GB10.

    python -m benchmarks.tables results/throughput.json

The README itself is made by `python -m finetune results`, from the files in results/reference/throughput.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data_prep import DataError, UserError
from finetune import speed, throughput


def main(arguments: list[str] | None = None) -> int:
    """Print the blocks; 2 if the file cannot be read or predicted from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    path = parser.parse_args(arguments).file
    try:
        print(drafts(path))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def drafts(path: Path) -> str:
    """Every block of a file, each under its kind; first of all what keeps it from being published, if anything does."""
    found = throughput.read(path)
    blocks = [f"## {kind}\n\n{render(found, path.stem)}" for kind, render in speed.RENDERERS.items()]
    try:
        throughput.read_published(path)
    except DataError as error:
        return "\n".join([f"Not fit to be published: {error}\n", *blocks])
    return "\n".join(blocks)


if __name__ == "__main__":
    sys.exit(main())
