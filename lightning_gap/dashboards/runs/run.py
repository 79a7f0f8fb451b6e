"""A run as a logger left it, and what the readers of all formats share."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "PICTURES",
    "ROOM",
    "Format",
    "Row",
    "Run",
    "RunError",
    "clock",
    "flat",
    "number",
    "pictures",
    "series",
    "settings",
]

# The room of a key of this package, whose ``updates`` are logged with it.
ROOM = re.compile(r"lightning_gap/(\w+)/")
PICTURES = ("*.png", "*.jpg", "*.jpeg")


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
        seconds: ``(n, 2)``: the logger's step of what was logged, and how many seconds after the first. Empty where the
            files hold no time, as those of ``CSVLogger``.
    """

    name: str
    kind: str
    path: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    seconds: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 2)))

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


@dataclass(frozen=True)
class Format:
    """The files of one logger."""

    kind: str  # what a table calls it
    pattern: str  # of the name of a file by which a folder is known as such a run
    read: Callable[[Path], Run]  # from such a folder to the run
    whole: bool = False  # a run has a name of its own, and all that lies below its folder
    known: Callable[[Path], bool] = lambda folder: True  # what else must be true of the folder
    read_all: Callable[[Path], list[Run]] | None = None  # where a folder holds several

    def holds(self, folder: Path, names: Sequence[str]) -> bool:
        """Return whether a folder, of whose files the names are given, is a run of this kind."""
        return any(re.fullmatch(self.pattern, name) for name in names) and self.known(folder)


# The logger's step, and what was logged in one call.
Row = tuple[float, Mapping[str, float]]


def series(rows: Iterable[Row]) -> dict[str, NDArray[np.float64]]:
    """Return each metric over updates, from the rows in the order logged."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for step, values in rows:
        for key, value in values.items():
            room = ROOM.match(key)
            at = values.get(f"{room.group(0)}updates", step) if room else step
            if math.isfinite(value):
                found[key].append((at, value))
    return {key: np.array(points, dtype=np.float64) for key, points in found.items()}


def clock(points: Iterable[tuple[float, float]]) -> NDArray[np.float64]:
    """Return ``(n, 2)`` steps and the seconds since the first, from steps and points in time, in order of time."""
    times = np.array(sorted((time, step) for step, time in points if math.isfinite(step)), dtype=np.float64)
    return np.stack([times[:, 1], times[:, 0] - times[0, 0]], 1) if len(times) else np.zeros((0, 2))


def number(text: Any) -> float | None:
    """Return a number that was written as text, ``None`` where it is none."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def settings(path: Path) -> dict[str, Any]:
    """Return a flat mapping; what is not plain YAML, as an object of Python, is left out."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        pass

    Loader.add_multi_constructor("", lambda loader, suffix, node: None)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, yaml.YAMLError):
        return {}
    return flat(content) if isinstance(content, dict) else {}


def flat(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return a mapping without mappings in it: keys are joined by slashes."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}/")
        else:
            found[f"{prefix}{key}"] = value
    return found


def pictures(folder: Path) -> dict[str, bytes]:
    """Return the latest picture of each key under ``KEY/STEP.png``."""
    latest = {
        path.parent.relative_to(folder).as_posix(): path
        for path in sorted(path for pattern in PICTURES for path in folder.rglob(pattern))
    }
    return {key: path.read_bytes() for key, path in latest.items()}
