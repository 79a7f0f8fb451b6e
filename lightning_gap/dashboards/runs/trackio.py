"""Trackio: a database of SQLite for each project, with all of its runs."""

import json
import sqlite3
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning_gap.dashboards.runs.run import Format, Row, Run, RunError, clock, flat, series

__all__ = ["TRACKIO"]

_METRICS = "SELECT step, timestamp, metrics FROM metrics WHERE run_name = ? ORDER BY id"


def _read_all(path: Path) -> list[Run]:
    return [run for file in sorted(path.glob("*.db")) if _is_trackio(file) for run in _runs_of(path, file)]


def _runs_of(folder: Path, file: Path) -> list[Run]:
    try:
        with closing(_opened(file)) as database:
            names = [name for (name,) in database.execute("SELECT run_name FROM metrics GROUP BY 1 ORDER BY min(id)")]
            return [_run(folder, file, database, name) for name in names]
    except (sqlite3.Error, ValueError, TypeError) as error:
        raise RunError(f"{file} cannot be read as a project of Trackio: {error}") from error


def _run(folder: Path, file: Path, database: sqlite3.Connection, name: str) -> Run:
    rows, times, pictures = list[Row](), list[tuple[float, float]](), dict[str, bytes]()
    for step, time, logged in database.execute(_METRICS, (name,)):
        values = json.loads(logged)
        times.append((step, datetime.fromisoformat(time).timestamp()))
        rows.append((step, {key: float(x) for key, x in values.items() if isinstance(x, int | float)}))
        for key, value in values.items():
            if isinstance(value, dict) and value.get("_type") == "trackio.image":
                picture = folder / "media" / str(value["file_path"])
                if picture.is_file():
                    pictures[key] = picture.read_bytes()
    config: dict[str, Any] = {}
    for (written,) in database.execute("SELECT config FROM configs WHERE run_name = ?", (name,)):
        config |= flat({key: value for key, value in json.loads(written).items() if not key.startswith("_")})
    return Run(name, TRACKIO.kind, folder / file.stem / name, config, series(rows), pictures, clock(times))


def _is_trackio(file: Path) -> bool:
    try:
        with closing(_opened(file)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
    except sqlite3.Error:
        return False
    return {"metrics", "configs", "project_metadata"} <= tables


def _opened(file: Path) -> sqlite3.Connection:
    """Open a database that a run may be writing to, to read it."""
    return sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)


def _read(path: Path) -> Run:
    return _read_all(path)[0]


TRACKIO = Format(
    "Trackio", r".*\.db", _read, True, lambda folder: any(map(_is_trackio, folder.glob("*.db"))), _read_all
)
