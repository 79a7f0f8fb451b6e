"""CSV files: Lightning's ``CSVLogger``, and what ``UltraSlowDiffusion`` writes where a run has no logger."""

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_gap.dashboards.runs.run import Format, Row, Run, RunError, number, pictures, series, settings

__all__ = ["CSV", "TRACE"]


def _read(path: Path) -> Run:
    with (path / "metrics.csv").open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if "step" not in (reader.fieldnames or ()):
            raise RunError(f"{path / 'metrics.csv'} has no column 'step': it is not a file of Lightning's CSVLogger")
        rows = [_row(row) for row in reader]
    return Run(path.name, CSV.kind, path, settings(path / "hparams.yaml"), series(rows), pictures(path / "figures"))


def _row(row: Mapping[str, Any]) -> Row:
    """Return the step and the numbers of a line."""
    values = {key: number(value) for key, value in row.items() if key is not None and value}
    step = values.pop("step", None)
    return (math.nan if step is None else step), {key: x for key, x in values.items() if x is not None}


def _read_trace(path: Path) -> Run:
    file = sorted(path.glob("diffusion*.csv"))[-1]
    with file.open(newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines)
        if not {"updates", "distance"} <= set(reader.fieldnames or ()):
            raise RunError(f"{file} is not a trace of UltraSlowDiffusion: it lacks the columns updates and distance")
        rows = [_row(row)[1] for row in reader]
    prefix = "lightning_gap/diffusion/"
    return Run(
        path.name,
        TRACE.kind,
        path,
        metrics=series((math.nan, {prefix + key: value for key, value in row.items()}) for row in rows),
    )


CSV = Format("CSV", r"metrics\.csv", _read)
TRACE = Format("diffusion.csv", r"diffusion.*\.csv", _read_trace)
