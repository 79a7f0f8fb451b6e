"""What runs took to a target: updates, samples and seconds, read from what they logged."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_gap.dashboards.runs import Run
from lightning_gap.dashboards.targets import HOLD, Target, first_held, reached

__all__ = [
    "ToTarget",
    "batch_of",
    "changes_batch",
    "learning_rate_of",
    "points",
    "runs_to_target",
    "setting_of",
    "to_its_end",
    "to_target",
]

_REGIME = "lightning_gap/regime/"


@dataclass(frozen=True)
class ToTarget:
    """What a run took to a target.

    Args:
        run: The run.
        target: The target; None: where the run ended.
        batch: Samples per update; None if the run does not tell.
        updates: After how many it held the target; None if it never did.
        samples: How many it had seen by then.
        seconds: How long it took, where the files tell.
        outcome: ``"held"``, ``"touched"`` (at the target, but not long enough), ``"missed"`` or ``"not logged"``.
    """

    run: Run
    target: Target | None
    batch: float | None
    updates: float | None = None
    samples: float | None = None
    seconds: float | None = None
    outcome: str = "not logged"


def batch_of(run: Run) -> float | None:
    """Return a run's samples per update, over all devices with accumulation as far as it tells; None if they change.

    That is what ``LargeBatchRegime`` or ``GradientNoiseScale`` logged, and else the hyper-parameter ``batch_size``, or
    one whose name ends so.

    Args:
        run: The run.
    """
    if changes_batch(run):
        return None
    planned = _number(run.config.get(f"{_REGIME}batch_size")) or run.last(f"{_REGIME}batch_size")
    if planned is not None:
        return planned
    samples, updates = run.last(f"{_REGIME}samples_seen"), run.last(f"{_REGIME}updates")
    if samples and updates and run.metrics[f"{_REGIME}samples_seen"][-1, 0] == updates:
        return samples / updates
    critical, over = run.last(f"{_REGIME}critical_batch_size"), run.last(f"{_REGIME}batch_over_critical")
    if critical and over:
        return float(round(critical * over))
    return setting_of(run, "batch_size")


def changes_batch(run: Run) -> bool:
    """Return whether a run logged more than one batch size, as under a ``BatchSizeSchedule``.

    Args:
        run: The run.
    """
    series = run.metrics.get(f"{_REGIME}batch_size")
    return series is not None and len(np.unique(series[:, 1])) > 1


def learning_rate_of(run: Run) -> float | None:
    """Return a run's highest learning rate: of what was logged, or the hyper-parameter ``lr`` or ``learning_rate``.

    Args:
        run: The run.
    """
    monitors = sorted(key for key in run.metrics if key.startswith("lr-") and not key.endswith("momentum"))
    for key in (f"{_REGIME}learning_rate", *monitors):
        if key in run.metrics:
            return float(run.metrics[key][:, 1].max())
    return next((rate for name in ("lr", "learning_rate") if (rate := setting_of(run, name)) is not None), None)


def setting_of(run: Run, name: str) -> float | None:
    """Return the positive hyper-parameter of a name, or the only one of that name in a part of the configuration.

    Args:
        run: The run.
        name: Its last word, as ``weight_decay``.
    """
    if (own := _number(run.config.get(name))) is not None:
        return own
    ends = (f"/{name}", f".{name}")
    found = {_number(value) for key, value in run.config.items() if key.endswith(ends) and not key.startswith(_REGIME)}
    return found.pop() if len(found) == 1 else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 < value < np.inf else None


def points(run: Run, metric: str) -> NDArray[np.float64]:
    """Return ``(n, 2)`` updates made, and the value of a metric after them.

    Loggers count from 0, so a metric at the step t is that after t + 1 updates; this package's own come with theirs.

    Args:
        run: The run.
        metric: A key of its metrics.
    """
    series = run.metrics[metric]
    return series if metric.startswith("lightning_gap/") else series + np.array([1.0, 0.0])


def to_target(run: Run, target: Target, *, hold: int = HOLD, smooth: int = 1, batch: float | None = None) -> ToTarget:
    """Return what a run took to a target.

    Args:
        run: The run.
        target: The target.
        hold: Points in a row at it, as in :func:`~lightning_gap.dashboards.targets.first_held`.
        smooth: As there.
        batch: Samples per update; by default as :func:`batch_of` finds it.
    """
    batch = batch_of(run) if batch is None else batch
    if target.metric not in run.metrics:
        return ToTarget(run, target, batch)
    curve = points(run, target.metric)
    curve = curve[np.isfinite(curve[:, 0])]
    updates = first_held(curve[:, 0], curve[:, 1], target, hold=hold, smooth=smooth)
    if updates is None:
        touched = reached(curve[:, 1], target)
        return ToTarget(run, target, batch, outcome="touched" if touched else "missed")
    return _after(run, target, batch, updates)


def to_its_end(run: Run, *, batch: float | None = None) -> ToTarget:
    """Return what a run took to where it ended.

    Args:
        run: The run; one that logged nothing held nothing.
        batch: As in :func:`to_target`.
    """
    batch = batch_of(run) if batch is None else batch
    ends = [points(run, key)[-1, 0] for key in run.metrics]
    updates = max((float(end) for end in ends if np.isfinite(end)), default=0.0)
    return _after(run, None, batch, updates) if updates else ToTarget(run, None, batch)


def _after(run: Run, target: Target | None, batch: float | None, updates: float) -> ToTarget:
    return ToTarget(run, target, batch, updates, _samples(run, updates, batch), _seconds(run, updates), "held")


def _samples(run: Run, updates: float, batch: float | None) -> float | None:
    key = f"{_REGIME}samples_seen"
    if key in run.metrics:
        series = np.concatenate([[[0.0, 0.0]], run.metrics[key]])
        if updates <= series[-1, 0]:
            return float(np.interp(updates, series[:, 0], series[:, 1]))
    return None if batch is None else batch * updates


def _seconds(run: Run, updates: float) -> float | None:
    """Return the seconds of so many updates, at the mean pace of the run up to there."""
    times = run.seconds
    before = times[times[:, 0] + 1 <= max(updates, float(times[0, 0]) + 2)] if len(times) else times
    if len(before) < 2 or before[-1, 0] <= before[0, 0]:
        return None
    return float(before[-1, 1] / (before[-1, 0] - before[0, 0]) * updates)


def runs_to_target(
    runs: Sequence[Run], targets: Sequence[Target], *, hold: int = HOLD, smooth: int = 1
) -> list[list[ToTarget]]:
    """Return what runs took to targets: for each target a list of all runs.

    Args:
        runs: The runs.
        targets: The targets.
        hold: As in :func:`to_target`.
        smooth: As there.
    """
    return [[to_target(run, target, hold=hold, smooth=smooth) for run in runs] for target in targets]
