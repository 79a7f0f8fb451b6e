"""What the benchmarks share: the spread of what was timed, and rows that other programs can read.

A row is a dictionary of what a table's row shows: texts, numbers, and spreads. A row may have a ``"table"``, the title
of the table that it belongs to.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["add_json", "ratios", "spread", "write_rows"]

Row = Mapping[str, Any]


def spread(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Return median, quartiles, extremes and count of what was measured, to four digits."""
    found = scale * np.asarray(values, dtype=float)
    low, median, high = np.quantile(found, [0.25, 0.5, 0.75])
    named = {"median": median, "low": low, "high": high, "least": found.min(), "most": found.max()}
    return {name: float(f"{value:.4g}") for name, value in named.items()} | {"count": len(found)}


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Return the spread of the ratios of pairs, each measured in the same turn."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def add_json(parser: argparse.ArgumentParser) -> None:
    """Let a benchmark write its rows, beside what it prints."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")


def write_rows(file: Path | None, rows: Sequence[Row]) -> None:
    """Write the rows where a file was asked for."""
    if file:
        file.write_text(json.dumps(list(rows)) + "\n", encoding="utf-8")
