"""Which law a distance follows: ultra-slow diffusion a + b·log t, or ordinary (sub-, super-) diffusion c·t^p.

Hoffer, Hubara, Soudry 2017 (arXiv:1705.08741), section 3 and appendix B: a random walk on a random potential whose
loss differences grow as E(L(w₁) − L(w₂))² ~ ‖w₁ − w₂‖^α moves as ‖w_t − w_0‖ ~ (log t)^{2/α}. Chen, Qu, Gong
(arXiv:2009.10588) find power laws instead, so the logarithm is a hypothesis that is tested here against the power.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_gap.checks import check_integer
from lightning_gap.diffusion.bootstrap import Model, Vector, autocorrelation, bootstrap, effective_points
from lightning_gap.precision import widest

__all__ = [
    "DiffusionFit",
    "Forecast",
    "constant_lr_segments",
    "fit_diffusion",
    "forecast_updates",
    "longest_segment",
    "next_log_update",
]

_MINIMUM_POINTS = 5
# log log t changes fastest where the walk is not yet a walk; these first updates would decide alpha by themselves.
_ALPHA_FROM_UPDATE = 10

Interval = tuple[float, float]


@dataclass(frozen=True)
class DiffusionFit:
    """Both laws fitted to one curve of distances, and which of them the data prefer.

    Attributes:
        log_intercept: a of a + b·log t, in units of distance.
        log_slope: b, distance gained each time the number of updates grows e-fold.
        log_r2: Coefficient of determination of the log law, 1 − SSR/SST in units of distance.
        power_coefficient: c of c·t^p, the distance at t = 1.
        power_exponent: p; 1/2 is ordinary diffusion.
        power_r2: Coefficient of determination of the power law, in the same units and so comparable.
        log_weight: Akaike weight of the log law at the effective number of points, 0 to 1; that of the power law is
            the rest.
        alpha: α̂ = 2/s with s the slope of log d against log log t over t ≥ 10; NaN where it is not defined.
        log_slope_interval: Confidence interval of b, if the log law holds.
        power_exponent_interval: Confidence interval of p, if the power law holds.
        alpha_interval: Confidence interval of α; its end is infinite where the slope s may be zero.
        confidence: Of the three intervals.
        first_update: The first t that was fitted.
        last_update: The last t that was fitted.
        points: How many points were fitted.
        effective_points: How many independent points those are worth, n(1 − ρ)/(1 + ρ) with ρ the autocorrelation of
            the preferred law's residuals.
    """

    log_intercept: float
    log_slope: float
    log_r2: float
    power_coefficient: float
    power_exponent: float
    power_r2: float
    log_weight: float
    alpha: float
    log_slope_interval: Interval
    power_exponent_interval: Interval
    alpha_interval: Interval
    confidence: float
    first_update: float
    last_update: float
    points: int
    effective_points: float

    @property
    def preferred(self) -> Literal["log", "power"]:
        """The law with the larger Akaike weight."""
        return "log" if self.log_weight >= 0.5 else "power"

    def numbers(self) -> dict[str, float]:
        """Return what is logged: slope, exponent, both R², Akaike weight, α, and the ends of their intervals.

        The ends of an interval are under ``NAME_low`` and ``NAME_high``.
        """
        names = ("log_slope", "log_r2", "power_exponent", "power_r2", "log_weight", "alpha")
        numbers: dict[str, float] = {name: getattr(self, name) for name in names}
        for name in ("log_slope", "power_exponent", "alpha"):
            numbers[f"{name}_low"], numbers[f"{name}_high"] = getattr(self, f"{name}_interval")
        return numbers

    def log_law(self, updates: Sequence[float] | Tensor) -> Tensor:
        """Return a + b·log t at these updates."""
        return self.log_intercept + self.log_slope * _wide(updates).log()

    def power_law(self, updates: Sequence[float] | Tensor) -> Tensor:
        """Return c·t^p at these updates."""
        return self.power_coefficient * _wide(updates) ** self.power_exponent


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


def fit_diffusion(
    updates: Sequence[float] | Tensor,
    distances: Sequence[float] | Tensor,
    *,
    learning_rates: Sequence[float] | None = None,
    minimum_decades: float = 2.0,
    confidence: float = 0.95,
    resamples: int = 999,
) -> DiffusionFit:
    r"""Fit d(t) = a + b·log t and d(t) = c·t^p by least squares in units of distance.

    Both laws have two parameters and the same residuals' units, so their R² can be compared, and
    ΔAIC = n_eff·log(SSR_log / SSR_power). The power law is solved exactly: c is linear given p, and the remaining
    function of p alone is minimised over −8 ≤ p ≤ 8. Points of equal density in log t, as
    :class:`UltraSlowDiffusion` takes them, weigh every decade alike.

    Residuals of one walk are correlated and grow with the distance. Intervals come from a prewhitened block bootstrap,
    which allows for both, and n_eff counts how many independent points the n are worth. An interval holds if its law
    does. α̂ = 2/s is ill-conditioned: log log t hardly moves (0.8 from t = 10² to 10⁵), and a non-zero intercept a
    bends it.

    Args:
        updates: t, numbers of updates: (n,), positive, strictly increasing.
        distances: ‖w_t − w_0‖ after these updates: (n,), not negative.
        learning_rates: The learning rate at each point: (n,). If given, only the constant stretch that spans the most
            decades is fitted, for the laws are those of a constant rate.
        minimum_decades: Refuse data with log10(last t / first t) below this; both laws look alike on a short range.
        confidence: Of the intervals, between 0 and 1.
        resamples: Curves the bootstrap draws; the same ones in every call.

    Returns:
        Coefficients, intervals, R² of both laws, Akaike weight and α̂.

    Raises:
        ValueError: Not equal-length vectors of at least 5 points, NaN or infinite values, updates that are not
            positive and strictly increasing, negative distances, distances that are all equal, a range of
            ``updates`` under ``minimum_decades``, or ``confidence`` or ``resamples`` out of range.

    Example:
        >>> t = [1, 3, 10, 30, 100, 300, 1000]
        >>> fit = fit_diffusion(t, [0.5 + 2.0 * math.log(u) for u in t])
        >>> fit.preferred, round(fit.log_slope, 6), round(fit.log_r2, 6)
        ('log', 2.0, 1.0)
        >>> fit = fit_diffusion(t, [0.1 * u**0.5 for u in t])
        >>> fit.preferred, round(fit.power_exponent, 6), round(fit.power_r2, 6)
        ('power', 0.5, 1.0)
    """
    return _fit(updates, distances, learning_rates, minimum_decades, confidence, resamples)[0]


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
    fit, log_replicates, power_replicates = _fit(
        updates, distances, learning_rates, minimum_decades, confidence, resamples
    )
    from_log = round(fit.log_weight * resamples)
    log, power = log_replicates[:from_log], power_replicates[: resamples - from_log]
    times = np.concatenate([_log_time(log[:, 0], log[:, 1], target), _power_time(power[:, 0], power[:, 1], target)])
    low, high = _interval(times, confidence)
    one = np.ones(1)
    if fit.preferred == "log":
        update = _log_time(fit.log_intercept * one, fit.log_slope * one, target)
    else:
        update = _power_time(fit.power_coefficient * one, fit.power_exponent * one, target)
    last = float(_vector("updates", updates)[-1])
    return Forecast(*(max(last, t) for t in (float(update[0]), low, high)))


def constant_lr_segments(learning_rates: Sequence[float]) -> list[slice]:
    """Return the maximal runs of equal learning rate, in order; together they cover the trace.

    Args:
        learning_rates: The learning rate at each recorded point. Values are equal if they differ by less than 1e-9
            relative to the first of the run. NaN equals nothing.

    Example:
        >>> constant_lr_segments([0.1, 0.1, 0.1, 0.01, 0.01])
        [slice(0, 3, None), slice(3, 5, None)]
    """
    starts = [0] if learning_rates else []
    for i, rate in enumerate(learning_rates):
        if i > 0 and not math.isclose(rate, learning_rates[starts[-1]], rel_tol=1e-9):
            starts.append(i)
    return [slice(a, b) for a, b in pairwise([*starts, len(learning_rates)])]


def longest_segment(updates: Sequence[float], learning_rates: Sequence[float]) -> slice:
    """Return the run of equal learning rate that spans the most decades of ``updates``.

    Args:
        updates: t, positive and increasing: (n,), n ≥ 1.
        learning_rates: The learning rate at each: (n,).

    Example:
        >>> longest_segment([1, 10, 100, 1000, 2000], [0.1, 0.1, 0.1, 0.01, 0.01])
        slice(0, 3, None)
    """
    return max(constant_lr_segments(learning_rates), key=lambda s: updates[s.stop - 1] / updates[s.start])


def next_log_update(t: int, points_per_decade: int) -> int:
    """Return the smallest point after ``t`` of the grid of integers round(10^(k / points_per_decade)), k = 0, 1, ...

    The grid is absolute: it does not depend on where a run was stopped and resumed.

    Args:
        t: Updates done, 0 or more.
        points_per_decade: Points in every factor of ten; fewer where integers are too sparse.

    Example:
        >>> grid = [0]
        >>> while grid[-1] < 40:
        ...     grid.append(next_log_update(grid[-1], 5))
        >>> grid[1:]
        [1, 2, 3, 4, 6, 10, 16, 25, 40]
    """
    k = 0 if t < 1 else max(0, math.floor(points_per_decade * math.log10(t)) - 1)
    while (point := round(10 ** (k / points_per_decade))) <= t:
        k += 1
    return point


def _fit(
    updates: Sequence[float] | Tensor,
    distances: Sequence[float] | Tensor,
    learning_rates: Sequence[float] | None,
    minimum_decades: float,
    confidence: float,
    resamples: int,
) -> tuple[DiffusionFit, Vector, Vector]:
    """Return the fit, and the bootstrap's (a, b) and (c, p): (R, 2) each."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence!r}")
    check_integer("resamples", resamples)
    t, d = _vector("updates", updates), _vector("distances", distances)
    _check(t, d)
    if learning_rates is not None:
        if len(learning_rates) != len(t):
            raise ValueError(f"learning_rates must have the length of updates, {len(t)}, got {len(learning_rates)}")
        longest = longest_segment(list(t), learning_rates)
        t, d = t[longest], d[longest]
    _check_span(t, d, minimum_decades)

    # Laws are fitted in x = log t − mean, where their two parameters are nearly independent.
    log_t = np.log(t)
    centre = float(log_t.mean())
    x = log_t - centre
    line, power = _line(x, d), _power(x, d)
    log_ssr, power_ssr = (_squares(d - law(p[None], x)[0][0]) for law, p in ((_line_law, line), (_power_law, power)))
    total, n = _squares(d - d.mean()), len(t)
    law, parameters = (_line_law, line) if log_ssr <= power_ssr else (_power_law, power)
    points = _effective_points(law, parameters, x, d)
    log_replicates = bootstrap(_line_law, line, x, d, resamples=resamples, confidence=confidence)
    power_replicates = bootstrap(_power_law, power, x, d, resamples=resamples, confidence=confidence)
    alpha, alpha_interval = _alpha(t, d, resamples, confidence)

    def uncentred(both: Vector, *, exponential: bool) -> Vector:
        first, second = both[..., 0], both[..., 1]
        first = first * np.exp(-second * centre) if exponential else first - second * centre
        return np.stack([first, second], -1)

    (intercept, slope), (coefficient, exponent) = uncentred(line, exponential=False), uncentred(power, exponential=True)
    fit = DiffusionFit(
        log_intercept=float(intercept),
        log_slope=float(slope),
        log_r2=1 - log_ssr / total,
        power_coefficient=float(coefficient),
        power_exponent=float(exponent),
        power_r2=1 - power_ssr / total,
        log_weight=_akaike_weight(log_ssr, power_ssr, points, floor=total * np.finfo(np.float64).eps ** 2),
        alpha=alpha,
        log_slope_interval=_interval(log_replicates[:, 1], confidence),
        power_exponent_interval=_interval(power_replicates[:, 1], confidence),
        alpha_interval=alpha_interval,
        confidence=confidence,
        first_update=float(t[0]),
        last_update=float(t[-1]),
        points=n,
        effective_points=points,
    )
    return fit, uncentred(log_replicates, exponential=False), uncentred(power_replicates, exponential=True)


def _wide(values: Sequence[float] | Tensor) -> Tensor:
    """Return numbers in the widest floating-point format of their device, which is the CPU for plain ones."""
    if isinstance(values, Tensor):
        return values.to(widest(values.device))
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")


def _vector(name: str, values: Sequence[float] | Tensor) -> Vector:
    vector: Vector = _wide(values.cpu() if isinstance(values, Tensor) else values).detach().numpy()
    if vector.ndim != 1:
        raise ValueError(f"{name} must be one vector (n,), got shape {vector.shape}: flatten it, or fit each row")
    if not np.isfinite(vector).all():
        raise ValueError(f"{name} must be finite, got {int((~np.isfinite(vector)).sum())} NaN or infinite values")
    return vector


def _check(t: Vector, d: Vector) -> None:
    if len(t) != len(d):
        raise ValueError(f"updates and distances must have the same length, got {len(t)} and {len(d)}")
    if len(t) < _MINIMUM_POINTS:
        raise ValueError(f"updates: at least {_MINIMUM_POINTS} points are needed, got {len(t)}: train longer")
    if t[0] <= 0:
        raise ValueError(f"updates must be positive, got {t[0]:g}: leave out t = 0, where the distance is zero")
    if not (np.diff(t) > 0).all():
        i = int(np.flatnonzero(np.diff(t) <= 0)[0])
        raise ValueError(f"updates must increase strictly, got {t[i]:g} then {t[i + 1]:g}: sort them")
    if (d < 0).any():
        raise ValueError(f"distances must not be negative, got {d.min():g}")


def _check_span(t: Vector, d: Vector, minimum_decades: float) -> None:
    decades = math.log10(t[-1] / t[0])
    if decades < minimum_decades - 1e-12:
        raise ValueError(
            f"updates {t[0]:g} to {t[-1]:g} span {decades:.2f} decades, at least {minimum_decades:g} are "
            "needed to tell a logarithm from a power: train longer, or call fit_diffusion with lower minimum_decades"
        )
    if len(t) < _MINIMUM_POINTS:
        raise ValueError(f"updates: at least {_MINIMUM_POINTS} points at one learning rate are needed, got {len(t)}")
    if (d == d[0]).all():
        raise ValueError(f"distances are all {d[0]:g}: there is no law to fit; check the learning rate")


def _line_law(parameters: Vector, x: Vector) -> tuple[Vector, Vector, Vector]:
    values = parameters[:, :1] + parameters[:, 1:] * x
    return values, np.ones_like(values), np.broadcast_to(x, values.shape)


def _power_law(parameters: Vector, x: Vector) -> tuple[Vector, Vector, Vector]:
    shape = np.exp(parameters[:, 1:] * x)
    values = parameters[:, :1] * shape
    return values, shape, values * x


def _squares(residuals: Vector) -> float:
    return float(residuals @ residuals)


def _line(x: Vector, y: Vector) -> Vector:
    """Return intercept and slope of the least-squares line."""
    centred = x - x.mean()
    slope = centred @ y / (centred @ centred)
    return np.array([y.mean() - slope * x.mean(), slope])


def _power(x: Vector, d: Vector) -> Vector:
    """Return C and p of the least-squares C·exp(p·x), by variable projection on C."""
    low, high = -8.0, 8.0
    for _ in range(5):  # each round narrows the bracket 128 times
        p = np.linspace(low, high, 257)
        shape = np.exp(p[:, None] * x)
        c = (shape @ d) / (shape * shape).sum(1)
        best = int(((d - c[:, None] * shape) ** 2).sum(1).argmin())
        low, high = p[max(best - 1, 0)], p[min(best + 1, 256)]
    return np.array([c[best], p[best]])


def _effective_points(law: Model, parameters: Vector, x: Vector, d: Vector) -> float:
    values, *gradient = (row[0] for row in law(parameters[None], x))
    residuals = d - values
    if not np.abs(residuals).max() > 1e-12 * np.abs(d).max():
        return float(len(x))
    return effective_points(len(x), autocorrelation(residuals, np.stack(gradient, 1)))


def _akaike_weight(log_ssr: float, power_ssr: float, n: float, floor: float) -> float:
    half_difference = 0.5 * n * math.log(max(log_ssr, floor) / max(power_ssr, floor))
    return 0.5 * (1 - math.tanh(half_difference / 2))


def _alpha(t: Vector, d: Vector, resamples: int, confidence: float) -> tuple[float, Interval]:
    late = (t >= _ALPHA_FROM_UPDATE) & (d > 0)
    if late.sum() < 3:
        return math.nan, (math.nan, math.nan)
    x, y = np.log(np.log(t[late])), np.log(d[late])
    line = _line(x, y)
    if line[1] <= 0:
        return math.nan, (math.nan, math.nan)
    slopes = bootstrap(_line_law, line, x, y, resamples=resamples, confidence=confidence, growing=False)[:, 1]
    low, high = _interval(slopes, confidence)
    return 2 / float(line[1]), (2 / high, 2 / low if low > 0 else math.inf)


def _interval(replicates: Vector, confidence: float) -> Interval:
    edges = (1 - confidence) / 2, (1 + confidence) / 2
    replicates = replicates[~np.isnan(replicates)]
    if not len(replicates):
        return math.nan, math.nan
    # "nearest" does not interpolate between a finite and an infinite replicate.
    low, high = np.quantile(replicates, edges, method="nearest")
    return float(low), float(high)


def _log_time(a: Vector, b: Vector, target: float) -> Vector:
    with np.errstate(all="ignore"):
        return np.where(b > 0, np.exp((target - a) / b), math.inf)


def _power_time(c: Vector, p: Vector, target: float) -> Vector:
    with np.errstate(all="ignore"):
        return np.where((c > 0) & (p > 0), np.exp(np.log(target / c) / p), math.inf)
