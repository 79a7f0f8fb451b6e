"""The trace that ``UltraSlowDiffusion`` writes where a run has no logger: ``diffusion.csv``."""

import csv
import math
from pathlib import Path

from lightning_gap.dashboards.runs.csv import csv_row
from lightning_gap.dashboards.runs.run import Format, Run, RunError, series

__all__ = ["TRACE"]


def _read(path: Path) -> Run:
    file = sorted(path.glob("diffusion*.csv"))[-1]
    with file.open(newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines)
        if not {"updates", "distance"} <= set(reader.fieldnames or ()):
            raise RunError(f"{file} is not a trace of UltraSlowDiffusion: it lacks the columns updates and distance")
        rows = [csv_row(row)[1] for row in reader]
    prefix = "lightning_gap/diffusion/"
    return Run(
        path.name,
        TRACE.kind,
        path,
        metrics=series((math.nan, {prefix + key: value for key, value in row.items()}) for row in rows),
    )


TRACE = Format("diffusion.csv", r"diffusion.*\.csv", _read)
