"""Which law a distance follows: ultra-slow diffusion a + b·log t, or ordinary (sub-, super-) diffusion c·t^p.

Hoffer, Hubara, Soudry 2017 (arXiv:1705.08741), section 3 and appendix B: a random walk on a random potential whose
loss differences grow as E(L(w₁) − L(w₂))² ~ ‖w₁ − w₂‖^α moves as ‖w_t − w_0‖ ~ (log t)^{2/α}. Chen, Qu, Gong
(arXiv:2009.10588) find power laws instead, so the logarithm is a hypothesis that is tested here against the power.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_gap.checks import check_integer
from lightning_gap.diffusion.bootstrap import Model, Vector, autocorrelation, bootstrap, effective_points
from lightning_gap.diffusion.grid import longest_segment
from lightning_gap.precision import widest

__all__ = ["DiffusionFit", "fit_diffusion", "fit_with_replicates", "interval", "vector"]

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
        TypeError: ``resamples`` is not an int.

    Example:
        >>> t = [1, 3, 10, 30, 100, 300, 1000]
        >>> fit = fit_diffusion(t, [0.5 + 2.0 * math.log(u) for u in t])
        >>> fit.preferred, round(fit.log_slope, 6), round(fit.log_r2, 6)
        ('log', 2.0, 1.0)
        >>> fit = fit_diffusion(t, [0.1 * u**0.5 for u in t])
        >>> fit.preferred, round(fit.power_exponent, 6), round(fit.power_r2, 6)
        ('power', 0.5, 1.0)
    """
    return fit_with_replicates(updates, distances, learning_rates, minimum_decades, confidence, resamples)[0]


def fit_with_replicates(
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
    t, d = vector("updates", updates), vector("distances", distances)
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
    line, power = least_squares_line(x, d), least_squares_power(x, d)
    log_ssr, power_ssr = (_squares(d - law(p[None], x)[0][0]) for law, p in ((line_law, line), (power_law, power)))
    total, n = _squares(d - d.mean()), len(t)
    law, parameters = (line_law, line) if log_ssr <= power_ssr else (power_law, power)
    points = _effective_points(law, parameters, x, d)
    floor = total * np.finfo(np.float64).eps ** 2
    half_difference = 0.5 * points * math.log(max(log_ssr, floor) / max(power_ssr, floor))  # of Akaike's criteria
    log_replicates = bootstrap(line_law, line, x, d, resamples=resamples, confidence=confidence)
    power_replicates = bootstrap(power_law, power, x, d, resamples=resamples, confidence=confidence)
    alpha, alpha_interval = _alpha(t, d, resamples, confidence)

    def uncentred(both: Vector, *, exponential: bool) -> Vector:
        first, second = both[..., 0], both[..., 1]
        with np.errstate(over="ignore"):  # a replicate's power may be so far off that its coefficient is infinite
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
        log_weight=0.5 * (1 - math.tanh(half_difference / 2)),
        alpha=alpha,
        log_slope_interval=interval(log_replicates[:, 1], confidence),
        power_exponent_interval=interval(power_replicates[:, 1], confidence),
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


def vector(name: str, values: Sequence[float] | Tensor) -> Vector:
    """Return finite numbers as a vector in double precision, or raise ``ValueError`` in the argument's name."""
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


def _squares(residuals: Vector) -> float:
    return float(residuals @ residuals)


def _effective_points(law: Model, parameters: Vector, x: Vector, d: Vector) -> float:
    values, *gradient = (row[0] for row in law(parameters[None], x))
    residuals = d - values
    if not np.abs(residuals).max() > 1e-12 * np.abs(d).max():
        return float(len(x))
    return effective_points(len(x), autocorrelation(residuals, np.stack(gradient, 1)))


def _alpha(t: Vector, d: Vector, resamples: int, confidence: float) -> tuple[float, Interval]:
    late = (t >= _ALPHA_FROM_UPDATE) & (d > 0)
    if late.sum() < 3:
        return math.nan, (math.nan, math.nan)
    x, y = np.log(np.log(t[late])), np.log(d[late])
    line = least_squares_line(x, y)
    if line[1] <= 0:
        return math.nan, (math.nan, math.nan)
    slopes = bootstrap(line_law, line, x, y, resamples=resamples, confidence=confidence, growing=False)[:, 1]
    low, high = interval(slopes, confidence)
    return 2 / float(line[1]), (2 / high, 2 / low if low > 0 else math.inf)


def interval(replicates: Vector, confidence: float) -> Interval:
    """Return the quantiles between which the share ``confidence`` of the replicates lies."""
    edges = (1 - confidence) / 2, (1 + confidence) / 2
    replicates = replicates[~np.isnan(replicates)]
    if not len(replicates):
        return math.nan, math.nan
    # "nearest" does not interpolate between a finite and an infinite replicate.
    low, high = np.quantile(replicates, edges, method="nearest")
    return float(low), float(high)


# Both laws as functions of x = log t, which is a line for ultra-slow diffusion and an exponential for a power.
def line_law(parameters: Vector, x: Vector) -> tuple[Vector, Vector, Vector]:
    """Return a + b·x, and its derivatives by both."""
    values = parameters[:, :1] + parameters[:, 1:] * x
    return values, np.ones_like(values), np.broadcast_to(x, values.shape)


def power_law(parameters: Vector, x: Vector) -> tuple[Vector, Vector, Vector]:
    """Return C·exp(p·x), and its derivatives by both."""
    shape = np.exp(parameters[:, 1:] * x)
    values = parameters[:, :1] * shape
    return values, shape, values * x


def least_squares_line(x: Vector, y: Vector) -> Vector:
    """Return intercept and slope of the least-squares line."""
    centred = x - x.mean()
    slope = centred @ y / (centred @ centred)
    return np.array([y.mean() - slope * x.mean(), slope])


def least_squares_power(x: Vector, d: Vector) -> Vector:
    """Return C and p of the least-squares C·exp(p·x), by variable projection on C."""
    low, high = -8.0, 8.0
    for _ in range(5):  # each round narrows the bracket 128 times
        p = np.linspace(low, high, 257)
        shape = np.exp(p[:, None] * x)
        c = (shape @ d) / (shape * shape).sum(1)
        best = int(((d - c[:, None] * shape) ** 2).sum(1).argmin())
        low, high = p[max(best - 1, 0)], p[min(best + 1, 256)]
    return np.array([c[best], p[best]])
