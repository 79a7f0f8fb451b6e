"""Runs read back from the files that loggers leave: CSV, TensorBoard, offline W&B, MLflow's local file store."""

import csv
import json
import math
import os
import re
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Run", "RunError", "find_runs", "read_runs", "wandb_records"]

Kind = Literal["CSV", "TensorBoard", "W&B", "MLflow", "diffusion.csv"]

_ROOM = re.compile(r"lightning_gap/(\w+)/")
_SKIPPED = {"node_modules", "__pycache__", ".git", ".venv", ".trash"}
_INSIDE_A_RUN = {"checkpoints", "figures", "tables"}
# Folders whose names say nothing about a run.
_PLAIN = {"lightning_logs", "csv_logs", "tb_logs", "mlruns", "wandb", "version_0"}
_PICTURES = ("*.png", "*.jpg", "*.jpeg")
_WANTED = "a metrics.csv, events.out.tfevents.*, run-*.wandb, an MLflow run, or a diffusion.csv"


class RunError(Exception):
    """A run that cannot be read, said in one line with what to do."""


@dataclass(frozen=True)
class Run:
    """What a run logged.

    Args:
        name: What to call it.
        kind: Which logger's files it was read from.
        path: Its folder.
        config: Hyper-parameters, flat.
        metrics: For each key ``(n, 2)``: at which update, and the value, finite, in the order logged. The update is
            the ``updates`` that this package logs with its metrics, and the logger's step for all others.
        pictures: The latest picture under each key: PNG or JPEG bytes.
    """

    name: str
    kind: Kind
    path: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    pictures: Mapping[str, bytes] = field(default_factory=dict)

    def last(self, key: str) -> float | None:
        """Return the last value of a metric; None if it was not logged.

        Args:
            key: The metric.
        """
        return float(self.metrics[key][-1, 1]) if key in self.metrics else None

    @property
    def updates(self) -> int | None:
        """After how many updates the last metric was logged; None if the run logged nothing."""
        ends = [series[-1, 0] for series in self.metrics.values() if math.isfinite(series[-1, 0])]
        return int(max(ends)) if ends else None


# A row: the logger's step, and what was logged in one call.
_Row = tuple[float, Mapping[str, float]]


def _series(rows: Iterable[_Row]) -> dict[str, NDArray[np.float64]]:
    """Return each metric over updates, from the rows in the order logged."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for step, values in rows:
        for key, value in values.items():
            room = _ROOM.match(key)
            at = values.get(f"{room.group(0)}updates", step) if room else step
            if math.isfinite(value):
                found[key].append((at, value))
    return {key: np.array(points, dtype=np.float64) for key, points in found.items()}


# ---------------------------------------------------------------------- CSV


def _read_csv(path: Path) -> Run:
    with (path / "metrics.csv").open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if "step" not in (reader.fieldnames or ()):
            raise RunError(f"{path / 'metrics.csv'} has no column 'step': it is not a file of Lightning's CSVLogger")
        rows = [_csv_row(row) for row in reader]
    return Run(path.name, "CSV", path, _yaml(path / "hparams.yaml"), _series(rows), _pictures(path / "figures"))


def _csv_row(row: Mapping[str, Any]) -> _Row:
    values = {key: _number(value) for key, value in row.items() if key is not None and value}
    step = values.pop("step", None)
    return (math.nan if step is None else step), {key: x for key, x in values.items() if x is not None}


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _yaml(path: Path) -> dict[str, Any]:
    """Return a flat mapping; what is not plain YAML, as an object of Python, is left out."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        pass

    Loader.add_multi_constructor("", lambda loader, suffix, node: None)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, yaml.YAMLError):
        return {}
    return _flat(content) if isinstance(content, dict) else {}


def _flat(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _pictures(folder: Path) -> dict[str, bytes]:
    """Return the latest picture of each key under ``KEY/STEP.png``."""
    latest = {
        path.parent.relative_to(folder).as_posix(): path
        for path in sorted(path for pattern in _PICTURES for path in folder.rglob(pattern))
    }
    return {key: path.read_bytes() for key, path in latest.items()}


# -------------------------------------------------------------- TensorBoard


def _read_tensorboard(path: Path) -> Run:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise RunError(f"reading {path} needs tensorboard: pip install tensorboard") from error
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "images": 0, "tensors": 1}).Reload()
    tags = events.Tags()
    scalars = {key: events.Scalars(key) for key in tags["scalars"]}
    series: dict[str, NDArray[np.float64]] = {}
    for key, points in scalars.items():
        room = _ROOM.match(key)
        axis = scalars.get(f"{room.group(0)}updates") if room else None
        at = defaultdict(list)
        for point in axis or ():
            at[point.step].append((point.wall_time, point.value))
        # Train and validation may be logged at one step, with the updates of each: the nearer in time is its own.
        values = [
            (min((abs(time - p.wall_time), x) for time, x in at[p.step])[1] if at[p.step] else p.step, p.value)
            for p in points
            if math.isfinite(p.value)
        ]
        if values:
            series[key] = np.array(values, dtype=np.float64)
    pictures = {key: events.Images(key)[-1].encoded_image_string for key in tags["images"]}
    return Run(path.name, "TensorBoard", path, _yaml(path / "hparams.yaml"), series, pictures)


# ---------------------------------------------------------------------- W&B


def wandb_records(path: Path) -> Iterator[Any]:
    """Yield the records of an offline run's file, ``wandb_internal_pb2.Record``; an unfinished one ends early.

    Args:
        path: The ``run-*.wandb`` file: a log of records in blocks of 32 KiB, each part with its checksum.

    Raises:
        RunError: wandb is not installed, or the file is not one of its own, or damaged.
    """
    try:
        from wandb.proto import wandb_internal_pb2
    except ImportError as error:
        raise RunError(f"reading {path} needs wandb: pip install 'lightning_gap[wandb]'") from error
    raw = path.read_bytes()
    if raw[:4] != b":W&B" or len(raw) < 7:
        raise RunError(f"{path} is not an offline run of W&B: it does not begin as one")
    at, parts = 7, b""
    while at + 7 <= len(raw):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        checksum, length, part = struct.unpack("<IHB", raw[at : at + 7])
        if part == 0:
            at += left
            continue
        data = raw[at + 7 : at + 7 + length]
        if len(data) < length:
            return  # still written, or cut off with its process
        if zlib.crc32(data, zlib.crc32(bytes([part]))) != checksum:
            raise RunError(f"{path} is damaged at byte {at}: copy it again, or leave this run out")
        at += 7 + length
        parts = data if part in (1, 2) else parts + data
        if part in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def _read_wandb(path: Path) -> Run:
    (file,) = sorted(path.glob("run-*.wandb"))[-1:]
    name, rows = "", list[_Row]()
    config: dict[str, Any] = {}
    for record in wandb_records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            name = record.run.display_name or record.run.run_id
            config |= _items(record.run.config.update)
        elif kind == "config":
            config |= _items(record.config.update)
        elif kind == "history":
            # Deeper keys are the parts of a table or an image.
            values = _items(item for item in record.history.item if len(item.nested_key) <= 1)
            numbers = {key: float(x) for key, x in values.items() if isinstance(x, int | float)}
            step = numbers.pop("trainer/global_step", numbers.get("_step", math.nan))
            rows.append((step, {key: x for key, x in numbers.items() if not key.startswith("_")}))
    pictures = {}
    images = path / "files" / "media" / "images"
    found = [
        (match, picture)
        for pattern in _PICTURES
        for picture in images.rglob(pattern)
        if (match := re.fullmatch(r"(.*)_(\d+)_[0-9a-f]+", picture.stem))
    ]
    for match, picture in sorted(found, key=lambda each: int(each[0][2])):
        key = (picture.parent.relative_to(images) / match[1]).as_posix()
        pictures[key] = picture.read_bytes()
    config = {key: value for key, value in _flat(config).items() if not key.startswith("_wandb")}
    return Run(name or file.stem, "W&B", path, config, _series(rows), pictures)


def _items(items: Iterable[Any]) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


# ------------------------------------------------------------------- MLflow


def _read_mlflow(path: Path) -> Run:
    rows: dict[tuple[float, int], dict[str, float]] = {}
    metrics = path / "metrics"
    for file in sorted(path for path in metrics.rglob("*") if path.is_file()):
        key = file.relative_to(metrics).as_posix()
        for line in file.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if len(words) < 3 or (value := _number(words[1])) is None:
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
        "MLflow",
        path,
        config,
        _series(ordered),
        _pictures(path / "artifacts" / "figures"),
    )


def _plain(text: str) -> Any:
    """Return what a parameter was before MLflow wrote it as text, if it was a number."""
    number = _number(text)
    return text if number is None else int(number) if number.is_integer() else number


# ------------------------------------------------------------ diffusion.csv


def _read_trace(path: Path) -> Run:
    file = sorted(path.glob("diffusion*.csv"))[-1]
    with file.open(newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines)
        if not {"updates", "distance"} <= set(reader.fieldnames or ()):
            raise RunError(f"{file} is not a trace of UltraSlowDiffusion: it lacks the columns updates and distance")
        rows = [_csv_row(row)[1] for row in reader]
    prefix = "lightning_gap/diffusion/"
    return Run(
        path.name,
        "diffusion.csv",
        path,
        metrics=_series((math.nan, {prefix + key: value for key, value in row.items()}) for row in rows),
    )


_READERS = {
    "CSV": _read_csv,
    "TensorBoard": _read_tensorboard,
    "W&B": _read_wandb,
    "MLflow": _read_mlflow,
    "diffusion.csv": _read_trace,
}


# ------------------------------------------------------------------ finding


def _kind_of(folder: Path, names: Iterable[str]) -> Kind | None:
    names = list(names)
    if "metrics.csv" in names:
        return "CSV"
    if any(name.startswith("events.out.tfevents") for name in names):
        return "TensorBoard"
    if any(name.startswith("run-") and name.endswith(".wandb") for name in names):
        return "W&B"
    if "meta.yaml" in names and "run_id" in _yaml(folder / "meta.yaml"):
        return "MLflow"
    return None


def find_runs(path: Path) -> list[tuple[Kind, Path]]:
    """Return the folders of all runs in a folder, at any depth, and which logger's files each holds.

    A folder with files of several loggers counts once: CSV before TensorBoard before W&B.

    Args:
        path: A run's folder, a folder of runs, or one of a run's files.

    Raises:
        RunError: There is no such path, or no run in it.
    """
    if not path.exists():
        raise RunError(f"{path} does not exist: give the folder of a run, or one with runs in it")
    if path.is_file():
        kind = _kind_of(path.parent, [path.name])
        kind = "diffusion.csv" if kind is None and re.fullmatch(r"diffusion.*\.csv", path.name) else kind
        if kind is None:
            raise RunError(f"{path} is no file of a run: expected {_WANTED}")
        return [(kind, path.parent)]
    found: list[tuple[Kind, Path]] = []
    traces: list[Path] = []
    for name, folders, files in os.walk(path):
        folder = Path(name)
        if (kind := _kind_of(folder, files)) is not None:
            found.append((kind, folder))
        if any(re.fullmatch(r"diffusion.*\.csv", file) for file in files):
            traces.append(folder)
        if kind in ("W&B", "MLflow"):
            folders.clear()
        skipped = _SKIPPED | _INSIDE_A_RUN if kind is not None else _SKIPPED
        folders[:] = sorted(each for each in folders if each not in skipped)
    if not found:
        found = [("diffusion.csv", folder) for folder in traces]
    if not found:
        raise RunError(f"{path} holds no run: expected {_WANTED}, in it or below it")
    return found


def read_runs(paths: Sequence[Path], *, left_out: list[str] | None = None) -> list[Run]:
    """Read all runs in some folders, each once, with names that tell them apart.

    Args:
        paths: Folders of runs, folders with runs in them, or files of runs.
        left_out: Where to add the reason of each run that cannot be read, instead of raising for it while there are
            others.

    Raises:
        RunError: There is no run, or one cannot be read.
    """
    places: dict[Path, tuple[Kind, Path]] = {}
    for path in paths:
        for kind, folder in find_runs(path):
            places.setdefault(folder.resolve(), (kind, folder))
    runs: list[Run] = []
    unread: list[RunError] = []
    for kind, folder in places.values():
        try:
            runs.append(_read(kind, folder))
        except RunError as error:
            if left_out is None:
                raise
            unread.append(error)
    if not runs:
        raise unread[0]
    if left_out is not None:
        left_out += map(str, unread)
    return _named(runs)


def _read(kind: Kind, folder: Path) -> Run:
    try:
        return _READERS[kind](folder)
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise RunError(f"{folder} cannot be read as a run of {kind}: {error}") from error


def _named(runs: Sequence[Run]) -> list[Run]:
    """Give runs without a name of their own what tells their folders apart."""
    named = [run.kind in ("W&B", "MLflow") for run in runs]
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
