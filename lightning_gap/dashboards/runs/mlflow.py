"""MLflow's local file store: a folder a run, a file a metric."""

from pathlib import Path
from typing import Any

from lightning_gap.dashboards.runs.run import Format, Run, RunError, clock, number, pictures, series, settings

__all__ = ["MLFLOW"]


def _read(path: Path) -> Run:
    rows: dict[tuple[float, int], dict[str, float]] = {}
    metrics = path / "metrics"
    for file in sorted(path for path in metrics.rglob("*") if path.is_file()):
        key = file.relative_to(metrics).as_posix()
        for line in file.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if len(words) < 3 or (value := number(words[1])) is None:
                raise RunError(f"{file} is not a metric of MLflow: a line of it is {line[:40]!r}")
            # What was logged in one call has one time.
            rows.setdefault((float(words[2]), int(words[0])), {})[key] = value
    params = path / "params"
    config = {
        file.relative_to(params).as_posix(): _plain(file.read_text(encoding="utf-8"))
        for file in sorted(params.rglob("*"))
        if file.is_file()
    }
    name = path / "tags" / "mlflow.runName"
    ordered = [(step, values) for (step, _), values in sorted(rows.items(), key=lambda each: each[0][::-1])]
    return Run(
        name.read_text(encoding="utf-8").strip() if name.is_file() else path.name[:8],
        MLFLOW.kind,
        path,
        config,
        series(ordered),
        pictures(path / "artifacts" / "figures"),
        clock((step, time / 1000) for step, time in rows),
    )


def _plain(text: str) -> Any:
    """Return what a parameter was before MLflow wrote it as text, if it was a number."""
    value = number(text)
    return text if value is None else int(value) if value.is_integer() else value


MLFLOW = Format("MLflow", r"meta\.yaml", _read, True, lambda folder: "run_id" in settings(folder / "meta.yaml"))
