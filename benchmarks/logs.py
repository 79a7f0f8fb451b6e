"""Logs of experiments: one file of JSON lines each, in ``benchmarks/results``."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "append", "put", "read"]

RESULTS = Path(__file__).parent / "results"
Row = Mapping[str, Any]


def read(log: Path) -> list[dict[str, Any]]:
    """Return the rows of a log, none where there is no such file."""
    return [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []


def append(log: Path, row: Row) -> None:
    """Append a row, by one write: several processes may share a log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab", buffering=0) as file:
        file.write(_line(row).encode())


def put(log: Path, row: Row, same: Callable[[Row], bool]) -> None:
    """Write a row in the place of the first one that is of the same run, or behind all others."""
    rows: list[Row] = [*read(log)]
    place = next((place for place, known in enumerate(rows) if same(known)), len(rows))
    rows[place : place + 1] = [row]
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(map(_line, rows)), "utf-8")


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"
