"""Lightning's ``CSVLogger``: ``metrics.csv`` and ``hparams.yaml``."""

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_gap.dashboards.runs.run import Format, Row, Run, RunError, number, pictures, series, settings

__all__ = ["CSV", "csv_row"]


def _read(path: Path) -> Run:
    with (path / "metrics.csv").open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if "step" not in (reader.fieldnames or ()):
            raise RunError(f"{path / 'metrics.csv'} has no column 'step': it is not a file of Lightning's CSVLogger")
        rows = [csv_row(row) for row in reader]
    return Run(path.name, CSV.kind, path, settings(path / "hparams.yaml"), series(rows), pictures(path / "figures"))


def csv_row(row: Mapping[str, Any]) -> Row:
    """Return the step and the numbers of a line."""
    values = {key: number(value) for key, value in row.items() if key is not None and value}
    step = values.pop("step", None)
    return (math.nan if step is None else step), {key: x for key, x in values.items() if x is not None}


CSV = Format("CSV", r"metrics\.csv", _read)
