"""A run kept for comparison: how far it had travelled when, and what that says about the run at hand."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

import fsspec
import numpy as np

from lightning_gap.diffusion.forecast import Forecast
from lightning_gap.diffusion.grid import longest_segment

__all__ = ["ReferenceRun", "advice", "read_reference", "write_trace"]

_NEEDED = ("updates", "learning_rate", "distance")


@dataclass(frozen=True)
class ReferenceRun:
    """How far another run had travelled, and when.

    Attributes:
        path: Where it was read from.
        updates: t, increasing.
        distances: ‖w_t − w_0‖ at these updates.
        learning_rates: The learning rate at these updates.
        parameters: How many parameters were measured; 0 where the file does not say.
    """

    path: str
    updates: tuple[float, ...]
    distances: tuple[float, ...]
    learning_rates: tuple[float, ...]
    parameters: int

    @property
    def target(self) -> tuple[float, float]:
        """Update and distance at the end of the constant learning rate that spans the most decades.

        A forecast extrapolates a law of constant learning rate, so it aims at the end of one, usually of the
        paper's initial high-rate phase; the last point of a run that never changed its rate.
        """
        last = longest_segment(self.updates, self.learning_rates).stop - 1
        return self.updates[last], self.distances[last]

    def mismatch(self, parameters: int) -> str | None:
        """Return what is to be said where a run measures another number of parameters, or None."""
        if self.parameters in (0, parameters):
            return None
        return (
            f"measures {parameters} parameters here, and measured {self.parameters} in its reference: the distances "
            "are not those of the same weights."
        )

    def distance_at(self, update: float) -> float:
        """Return the distance after ``update`` updates, linear in log t between points; NaN outside of them."""
        if not self.updates[0] <= update <= self.updates[-1]:
            return math.nan
        return float(np.interp(math.log(update), np.log(self.updates), self.distances))

    def update_at(self, distance: float) -> float:
        """Return the first update at which this run was ``distance`` away from its start; NaN if it never was."""
        reached = np.maximum.accumulate(self.distances)
        if not reached[0] <= distance <= reached[-1]:
            return math.nan
        i = int(np.searchsorted(reached, distance))
        if i == 0:
            return self.updates[0]
        share = (distance - reached[i - 1]) / (reached[i] - reached[i - 1])
        low, high = np.log(self.updates[i - 1 : i + 1])
        return math.exp(low + share * (high - low))


def read_reference(path: str) -> ReferenceRun:
    """Read the ``diffusion.csv`` of a run.

    Args:
        path: The file, or a folder that holds exactly one, at any depth; local, or a URL that fsspec opens.

    Raises:
        FileNotFoundError: There is no such file or folder, or no ``diffusion.csv`` in the folder.
        ValueError: The folder holds several, or the file lacks columns or points.
    """
    filesystem, place = fsspec.core.url_to_fs(path)
    if filesystem.isdir(place):
        found = sorted(filesystem.glob(f"{place}/**/diffusion*.csv"))
        if len(found) > 1:
            raise ValueError(f"reference={path!r} holds several runs, name one of them: {', '.join(found)}")
        if not found:
            raise FileNotFoundError(
                f"reference={path!r} holds no diffusion.csv: name the folder of a run that made one"
            )
        place = found[0]
    elif not filesystem.exists(place):
        raise FileNotFoundError(f"reference={path!r} does not exist: name a diffusion.csv, or the folder of a run")
    with filesystem.open(place, "r") as file:
        rows = list(csv.DictReader(file))
    missing = [name for name in _NEEDED if rows and name not in rows[0]]
    if missing or not rows:
        raise ValueError(
            f"reference={place!r} is not a diffusion.csv with points: it lacks {', '.join(missing) or 'rows'}"
        )
    updates, rates, distances = (tuple(float(row[name]) for row in rows) for name in _NEEDED)
    if not (updates[0] > 0 and all(np.diff(updates) > 0)):
        raise ValueError(f"reference={place!r} has updates that do not increase: name the diffusion.csv of one run")
    if lost := [update for update, distance in zip(updates, distances, strict=True) if not math.isfinite(distance)]:
        raise ValueError(
            f"reference={place!r} has distances that are not finite, from update {lost[0]:g} on: that run went astray, "
            "name another"
        )
    return ReferenceRun(str(place), updates, distances, rates, int(float(rows[0].get("parameters") or 0)))


def write_trace(file: TextIO, trace: Mapping[str, Sequence[float]], parameters: int) -> None:
    """Write a trace as CSV, a row for each point, with the number of parameters measured as the last column."""
    rows = csv.writer(file)
    rows.writerow([*trace, "parameters"])
    rows.writerows([*values, parameters] for values in zip(*trace.values(), strict=True))


def advice(reference: ReferenceRun, update: float, distance: float, forecast: Forecast | None) -> str:
    """Say in a sentence or two where a run stands beside its reference, and how much longer it should train."""
    goal_update, goal = reference.target
    stood = reference.update_at(distance)
    if math.isfinite(stood):
        where = f"where the reference stood at update {stood:.0f}"
    elif distance > max(reference.distances):
        where = "farther than the reference ever went"
    else:
        where = "less far than the reference's first point"
    said = f"After {update:.0f} updates the weights have travelled {distance:.4g}, {where}."
    if distance >= goal:
        return f"{said} The reference's {goal:.4g} at update {goal_update:.0f} is reached."
    if forecast is None:
        return f"{said} Under two decades of updates at one learning rate: no forecast yet."
    if math.isinf(forecast.update):
        return f"{said} At this learning rate its {goal:.4g} at update {goal_update:.0f} will not be reached."
    low, high = (_count(t - update) for t in (forecast.low, forecast.high))
    return (
        f"{said} To travel its {goal:.4g} of update {goal_update:.0f}, keep this learning rate for "
        f"{_count(forecast.update - update)} more updates ({low} to {high})."
    )


def _count(updates: float) -> str:
    return "∞" if math.isinf(updates) else f"{updates:.0f}" if updates < 1e6 else f"{updates:.1e}"
