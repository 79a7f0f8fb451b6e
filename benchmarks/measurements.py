"""What the benchmarks share: the spread of what was timed, and rows that other programs can read, published figures.

A row is a dictionary of what a table's row shows: texts, numbers, and spreads. A row may have a ``"table"``, the title
of the table that it belongs to.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["PUBLISHED", "add_json", "ratios", "six_digits", "spread", "write_rows"]

Row = Mapping[str, Any]

# L2-UVP in %, from the poster of the Wasserstein-2 benchmark (github.com/iamalexkorotin/Wasserstein2Benchmark); their
# solvers draw fresh samples without end, in batches of 1024, for 20 to 250 thousand iterations on a GPU.
PUBLISHED = {
    "MM:R": {2: 0.1, 4: 0.3, 8: 0.7, 16: 1.9, 32: 2.8},
    "W2": {2: 0.1, 4: 0.7, 8: 2.6, 16: 3.3, 32: 6.0},
    "MM-B": {2: 0.1, 4: 0.7, 8: 3.1, 16: 6.4, 32: 12.0},
    "LS": {2: 5.0, 4: 11.6, 8: 21.5, 16: 31.7, 32: 42.1},
    "QC": {2: 1.5, 4: 14.5, 8: 28.6, 16: 47.2, 32: 64.0},
}


def spread(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Return median, quartiles, extremes and count of what was measured, to four digits."""
    found = scale * np.asarray(values, dtype=float)
    low, median, high = np.quantile(found, [0.25, 0.5, 0.75])
    named = {"median": median, "low": low, "high": high, "least": found.min(), "most": found.max()}
    return {name: float(f"{value:.4g}") for name, value in named.items()} | {"count": len(found)}


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Return the spread of the ratios of pairs, each measured in the same turn."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def six_digits(row: Row) -> dict[str, Any]:
    """Return a row whose numbers are cut to what is worth keeping."""
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()}


def add_json(parser: argparse.ArgumentParser) -> None:
    """Let a benchmark write its rows, beside what it prints."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")


def write_rows(file: Path | None, rows: Sequence[Row]) -> None:
    """Write the rows where a file was asked for."""
    if file:
        file.write_text(json.dumps(list(rows)) + "\n", encoding="utf-8")
