"""What a run recorded on its way, the law that it follows, and where it stands beside another run."""

import math
from collections.abc import Iterable, Mapping, Sequence

import fsspec

from lightning_gap.diffusion.distance import WeightDisplacement
from lightning_gap.diffusion.fit import DiffusionFit, fit_diffusion
from lightning_gap.diffusion.forecast import Forecast, forecast_updates
from lightning_gap.diffusion.grid import next_log_update
from lightning_gap.diffusion.reference import ReferenceRun, write_trace

__all__ = ["LiveComparison", "Trace", "free_stem"]

_COLUMNS = ("updates", "learning_rate", *WeightDisplacement._fields)
_OVERLAY = ("reference_distance", "reference_update")
_FORECAST = ("remaining_updates", "remaining_updates_low", "remaining_updates_high")


class Trace:
    """Points of a run, in columns of equal length, some for each group, that go on from those of an earlier part.

    Example:
        >>> trace = Trace()
        >>> for t in (1, 3, 10, 30, 100, 300, 1000):
        ...     _ = trace.add(t, 0.1, WeightDisplacement(2.0 * math.log(t), 1.0, 1.0, 1.0), {})
        >>> fit, varied = trace.fit()
        >>> round(fit.log_slope, 6), varied
        (2.0, False)
    """

    def __init__(self, groups: Iterable[str] = (), before: Mapping[str, Sequence[float]] | None = None) -> None:
        names = [*_COLUMNS, *(f"{name}/{group}" for group in groups for name in WeightDisplacement._fields)]
        before = before or {}
        unknown = [math.nan] * len(before.get("updates", ()))
        self.columns: dict[str, list[float]] = {name: list(before.get(name, unknown)) for name in names}

    def __len__(self) -> int:
        return len(self.columns["updates"])

    def add(
        self, update: int, rate: float, moved: WeightDisplacement, groups: Mapping[str, WeightDisplacement]
    ) -> dict[str, float]:
        """Add a point, and return it by column."""
        point = {"updates": float(update), "learning_rate": rate, **moved._asdict()}
        for group, its in groups.items():
            point |= {f"{name}/{group}": value for name, value in its._asdict().items()}
        for column, value in point.items():
            self.columns[column].append(value)
        return point

    def finite(self) -> tuple[list[float], list[float], list[float]]:
        """Return updates, distances and learning rates of the points whose distance is a number."""
        columns = (self.columns[name] for name in ("updates", "distance", "learning_rate"))
        points = [point for point in zip(*columns, strict=True) if math.isfinite(point[1])]
        updates, distances, rates = ([point[i] for point in points] for i in range(3))
        return updates, distances, rates

    def last_number(self) -> str:
        """Return in words when the distance was a number, to go on a sentence; nothing if it never was."""
        updates = self.finite()[0]
        return f", and was a number at update {updates[-1]:.0f}" if updates else ""

    def fit(self) -> tuple[DiffusionFit, bool]:
        """Return the fit, and whether it is one of the whole trace in spite of a learning rate that varied."""
        updates, distances, rates = self.finite()
        try:
            return fit_diffusion(updates, distances, learning_rates=rates), False
        except ValueError:
            return fit_diffusion(updates, distances), True

    def forecast(self, distance: float, resamples: int = 999) -> Forecast | None:
        """Return when a distance will be reached; None where it is, or where it is too early to say."""
        updates, distances, rates = self.finite()
        if not distances or distances[-1] >= distance:
            return None
        try:
            return forecast_updates(updates, distances, distance, learning_rates=rates, resamples=resamples)
        except ValueError:
            return None

    def write(self, path: str, parameters: int) -> None:
        """Write the trace as CSV, here or elsewhere."""
        filesystem, place = fsspec.core.url_to_fs(path)
        filesystem.makedirs(place.rpartition("/")[0], exist_ok=True)
        with filesystem.open(place, "w") as file:
            write_trace(file, self.columns, parameters)


class LiveComparison:
    """Where a run under way stands beside another, with forecasts on the logarithmic grid, of fewer resamples."""

    def __init__(
        self, reference: ReferenceRun, points_per_decade: int, from_update: int = 0, resamples: int = 199
    ) -> None:
        self.reference, self.points_per_decade, self.resamples = reference, points_per_decade, resamples
        self._due, self._forecast = from_update, None  # type: tuple[int, Forecast | None]

    def numbers(self, trace: Trace, update: int, distance: float) -> dict[str, float]:
        """Return what is logged beside a point that the trace ends with; NaN for what is not known."""
        if update >= self._due:
            self._due = next_log_update(update, self.points_per_decade)
            self._forecast = trace.forecast(self.reference.target[1], self.resamples)
        there = self.reference.distance_at(update), self.reference.update_at(distance)
        remaining = [max(t - update, 0.0) for t in self._forecast] if self._forecast else [math.nan] * 3
        return dict(zip((*_OVERLAY, *_FORECAST), (*there, *remaining), strict=True))


def free_stem(folder: str) -> str:
    """Return ``diffusion``, or with ``-v1``, ``-v2``, ... what no other run in this folder has taken."""
    stem, version = "diffusion", 0
    filesystem, place = fsspec.core.url_to_fs(folder)
    while any(filesystem.exists(f"{place}/{stem}{end}") for end in (".csv", "_anchor")):
        version += 1
        stem = f"diffusion-v{version}"
    return stem
