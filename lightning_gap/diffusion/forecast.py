"""When a run will have travelled a given distance, by the law that its trace follows."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from lightning_gap.diffusion.bootstrap import Vector
from lightning_gap.diffusion.fit import fit_with_replicates, interval, vector

__all__ = ["Forecast", "forecast_updates"]


class Forecast(NamedTuple):
    """When a run will have travelled a given distance.

    Attributes:
        update: t at which the preferred law reaches it; infinite if it never does.
        low: Lower end of the interval.
        high: Upper end of the interval, infinite if it may never be reached.
    """

    update: float
    low: float
    high: float


def forecast_updates(
    updates: Sequence[float] | Tensor,
    distances: Sequence[float] | Tensor,
    target: float,
    *,
    learning_rates: Sequence[float] | None = None,
    minimum_decades: float = 2.0,
    confidence: float = 0.95,
    resamples: int = 999,
) -> Forecast:
    """Return the update at which a walk will have travelled ``target``, if its learning rate stays what it is.

    The estimate is that of the preferred law. The interval mixes the bootstrap's curves of both laws by their Akaike
    weights, so that it is wide where the data cannot tell them apart.

    Args:
        updates: As in :func:`fit_diffusion`.
        distances: As in :func:`fit_diffusion`.
        target: The distance to be reached, positive.
        learning_rates: As in :func:`fit_diffusion`.
        minimum_decades: As in :func:`fit_diffusion`.
        confidence: Of the interval.
        resamples: As in :func:`fit_diffusion`.

    Returns:
        The update, counted from the start of training, and its interval; none of them before the last point.

    Raises:
        ValueError: As in :func:`fit_diffusion`, or ``target`` is not positive and finite.

    Example:
        >>> t = [1, 3, 10, 30, 100, 300, 1000]
        >>> round(forecast_updates(t, [2.0 * math.log(u) for u in t], 2.0 * math.log(5000)).update)
        5000
    """
    if not 0 < target < math.inf:
        raise ValueError(f"target must be a positive finite distance, got {target!r}")
    fit, log_replicates, power_replicates = fit_with_replicates(
        updates, distances, learning_rates, minimum_decades, confidence, resamples
    )
    from_log = round(fit.log_weight * resamples)
    log, power = log_replicates[:from_log], power_replicates[: resamples - from_log]
    times = np.concatenate([_line_time(log[:, 0], log[:, 1], target), _power_time(power[:, 0], power[:, 1], target)])
    low, high = interval(times, confidence)
    one = np.ones(1)
    if fit.preferred == "log":
        update = _line_time(fit.log_intercept * one, fit.log_slope * one, target)
    else:
        update = _power_time(fit.power_coefficient * one, fit.power_exponent * one, target)
    last = float(vector("updates", updates)[-1])
    return Forecast(*(max(last, t) for t in (float(update[0]), low, high)))


def _line_time(a: Vector, b: Vector, target: float) -> Vector:
    """Return t at which a + b·log t reaches a distance; infinite where it never does."""
    with np.errstate(all="ignore"):
        return np.where(b > 0, np.exp((target - a) / b), math.inf)


def _power_time(c: Vector, p: Vector, target: float) -> Vector:
    """Return t at which c·t^p reaches a distance; infinite where it never does."""
    with np.errstate(all="ignore"):
        return np.where((c > 0) & (p > 0), np.exp(np.log(target / c) / p), math.inf)
