"""The runs in a folder, found by their files, read, and named so that they can be told apart."""

import csv
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lightning_gap.dashboards.runs.csv import CSV, TRACE
from lightning_gap.dashboards.runs.mlflow import MLFLOW
from lightning_gap.dashboards.runs.run import Format, Run, RunError
from lightning_gap.dashboards.runs.tensorboard import TENSORBOARD
from lightning_gap.dashboards.runs.trackio import TRACKIO
from lightning_gap.dashboards.runs.wandb import WANDB

__all__ = ["FORMATS", "find_runs", "read_runs"]

# A folder with the files of several is a run of the first.
FORMATS = (CSV, TENSORBOARD, WANDB, MLFLOW, TRACKIO)
_BY_KIND = {each.kind: each for each in (*FORMATS, TRACE)}
_SKIPPED = {"node_modules", "__pycache__", ".git", ".venv", ".trash"}
_INSIDE_A_RUN = {"checkpoints", "figures", "tables"}
# Folders whose names say nothing about a run.
_PLAIN = {"lightning_logs", "csv_logs", "tb_logs", "mlruns", "wandb", "version_0"}
_WANTED = "a metrics.csv, events.out.tfevents.*, run-*.wandb, an MLflow run, a Trackio project, or a diffusion.csv"


def find_runs(path: Path) -> list[tuple[str, Path]]:
    """Return the folders of all runs in a folder, at any depth, and whose files each holds.

    A folder with files of several loggers counts once: CSV before TensorBoard before W&B.

    Args:
        path: A run's folder, a folder of runs, or one of a run's files.

    Raises:
        RunError: There is no such path, or no run in it.
    """
    if not path.exists():
        raise RunError(f"{path} does not exist: give the folder of a run, or one with runs in it")
    if path.is_file():
        kind = _format_of(path.parent, [path.name], (*FORMATS, TRACE))
        if kind is None:
            raise RunError(f"{path} is no file of a run: expected {_WANTED}")
        return [(kind.kind, path.parent)]
    found: list[tuple[str, Path]] = []
    traces: list[Path] = []
    for name, folders, files in os.walk(path):
        folder = Path(name)
        kind = _format_of(folder, files, FORMATS)
        if kind is not None:
            found.append((kind.kind, folder))
        if TRACE.holds(folder, files):
            traces.append(folder)
        if kind is not None and kind.whole:
            folders.clear()
        skipped = _SKIPPED | _INSIDE_A_RUN if kind is not None else _SKIPPED
        folders[:] = sorted(each for each in folders if each not in skipped)
    if not found:
        found = [(TRACE.kind, folder) for folder in traces]
    if not found:
        raise RunError(f"{path} holds no run: expected {_WANTED}, in it or below it")
    return found


def _format_of(folder: Path, names: Sequence[str], formats: Sequence[Format]) -> Format | None:
    return next((each for each in formats if each.holds(folder, names)), None)


def read_runs(paths: Sequence[Path], *, left_out: list[str] | None = None) -> list[Run]:
    """Read all runs in some folders, each once, with names that tell them apart.

    Args:
        paths: Folders of runs, folders with runs in them, or files of runs.
        left_out: Where to add the reason of each run that cannot be read, instead of raising for it while there are
            others.

    Raises:
        RunError: There is no run, or one cannot be read.
    """
    places: dict[Path, tuple[str, Path]] = {}
    for path in paths:
        for kind, folder in find_runs(path):
            places.setdefault(folder.resolve(), (kind, folder))
    runs: list[Run] = []
    unread: list[RunError] = []
    for kind, folder in places.values():
        try:
            runs += _read(_BY_KIND[kind], folder)
        except RunError as error:
            if left_out is None:
                raise
            unread.append(error)
    if not runs:
        raise unread[0]
    if left_out is not None:
        left_out += map(str, unread)
    return _named(runs)


def _read(kind: Format, folder: Path) -> list[Run]:
    try:
        return [kind.read(folder)] if kind.read_all is None else kind.read_all(folder)
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise RunError(f"{folder} cannot be read as a run of {kind.kind}: {error}") from error


def _named(runs: Sequence[Run]) -> list[Run]:
    """Give runs without a name of their own what tells their folders apart."""
    named = [_BY_KIND[run.kind].whole for run in runs]
    folders = [run.path.resolve() for run, own in zip(runs, named, strict=True) if not own]
    shared = len(Path(os.path.commonpath(folders)).parts) if len(folders) > 1 else 0
    labels = []
    for run, own in zip(runs, named, strict=True):
        parts = run.path.resolve().parts
        rest = [part for part in parts[shared:] if part not in _PLAIN] if shared else []
        said = [part for part in parts if part not in _PLAIN and part != "checkpoints"]
        labels.append(run.name if own else "/".join(rest) or (said[-1] if said else run.name))
    seen: dict[str, int] = defaultdict(int)
    result = []
    for run, label in zip(runs, labels, strict=True):
        label = f"{label} ({run.kind})" if labels.count(label) > 1 else label
        seen[label] += 1
        result.append(replace(run, name=label if seen[label] == 1 else f"{label} {seen[label]}"))
    return result
