"""Which law a distance follows: ultra-slow diffusion a + b·log t, or ordinary (sub-, super-) diffusion c·t^p.

Hoffer, Hubara, Soudry 2017 (arXiv:1705.08741), section 3 and appendix B: a random walk on a random potential whose
loss differences grow as E(L(w₁) − L(w₂))² ~ ‖w₁ − w₂‖^α moves as ‖w_t − w_0‖ ~ (log t)^{2/α}. Chen, Qu, Gong
(arXiv:2009.10588) find power laws instead, so the logarithm is a hypothesis that is tested here against the power.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

__all__ = ["DiffusionFit", "constant_lr_segments", "fit_diffusion", "next_log_update"]

_MINIMUM_POINTS = 5
# log log t changes fastest where the walk is not yet a walk; these first updates would decide alpha by themselves.
_ALPHA_FROM_UPDATE = 10


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
        log_weight: Akaike weight of the log law, 0 to 1; that of the power law is the rest.
        alpha: α̂ = 2/s with s the slope of log d against log log t over t ≥ 10; NaN where it is not defined.
        first_update: The first t that was fitted.
        last_update: The last t that was fitted.
        points: How many points were fitted.
    """

    log_intercept: float
    log_slope: float
    log_r2: float
    power_coefficient: float
    power_exponent: float
    power_r2: float
    log_weight: float
    alpha: float
    first_update: float
    last_update: float
    points: int

    @property
    def preferred(self) -> Literal["log", "power"]:
        """The law with the larger Akaike weight."""
        return "log" if self.log_weight >= 0.5 else "power"


def fit_diffusion(
    updates: Sequence[float] | Tensor, distances: Sequence[float] | Tensor, *, minimum_decades: float = 2.0
) -> DiffusionFit:
    r"""Fit d(t) = a + b·log t and d(t) = c·t^p by least squares in units of distance.

    Both laws have two parameters and the same residuals' units, so their R² can be compared, and
    ΔAIC = n·log(SSR_log / SSR_power). The power law is solved exactly: c is linear given p, and the remaining function
    of p alone is minimised over −8 ≤ p ≤ 8. Points of equal density in log t, as :class:`UltraSlowDiffusion` takes
    them, weigh every decade alike.

    The Akaike weight takes the residuals as independent. Those of one walk are not, so it says which law is nearer
    rather than how sure that is. α̂ = 2/s is ill-conditioned: log log t hardly moves (0.8 from t = 10² to 10⁵), and a
    non-zero intercept a bends it.

    Args:
        updates: t, numbers of updates: (n,), positive, strictly increasing.
        distances: ‖w_t − w_0‖ after these updates: (n,), not negative.
        minimum_decades: Refuse data with log10(last t / first t) below this; both laws look alike on a short range.

    Returns:
        Coefficients, R² of both laws, Akaike weight and α̂.

    Raises:
        ValueError: Not two equal-length vectors of at least 5 points, NaN or infinite values, updates that are not
            positive and strictly increasing, negative distances, distances that are all equal, or a range of
            ``updates`` under ``minimum_decades``.

    Example:
        >>> t = [1, 3, 10, 30, 100, 300, 1000]
        >>> fit = fit_diffusion(t, [0.5 + 2.0 * math.log(u) for u in t])
        >>> fit.preferred, round(fit.log_slope, 6), round(fit.log_r2, 6)
        ('log', 2.0, 1.0)
        >>> fit = fit_diffusion(t, [0.1 * u**0.5 for u in t])
        >>> fit.preferred, round(fit.power_exponent, 6), round(fit.power_r2, 6)
        ('power', 0.5, 1.0)
    """
    t, d = _vector("updates", updates), _vector("distances", distances)
    _check(t, d, minimum_decades)
    log_t, total = t.log(), _squares(d - d.mean())
    slope, intercept = _line(log_t, d)
    log_ssr = _squares(d - intercept - slope * log_t)
    coefficient, exponent, power_ssr = _power(log_t, d)
    return DiffusionFit(
        log_intercept=intercept,
        log_slope=slope,
        log_r2=1 - log_ssr / total,
        power_coefficient=coefficient,
        power_exponent=exponent,
        power_r2=1 - power_ssr / total,
        log_weight=_akaike_weight(log_ssr, power_ssr, len(t), floor=total * torch.finfo(t.dtype).eps ** 2),
        alpha=_alpha(t, d),
        first_update=float(t[0]),
        last_update=float(t[-1]),
        points=len(t),
    )


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


def _vector(name: str, values: Sequence[float] | Tensor) -> Tensor:
    vector = torch.as_tensor(values).detach().to("cpu", torch.float64)
    if vector.ndim != 1:
        raise ValueError(
            f"{name} must be one vector (n,), got shape {tuple(vector.shape)}: flatten it, or fit each row"
        )
    if not vector.isfinite().all():
        raise ValueError(f"{name} must be finite, got {int((~vector.isfinite()).sum())} NaN or infinite values")
    return vector


def _check(t: Tensor, d: Tensor, minimum_decades: float) -> None:
    if len(t) != len(d):
        raise ValueError(f"updates and distances must have the same length, got {len(t)} and {len(d)}")
    if len(t) < _MINIMUM_POINTS:
        raise ValueError(f"updates: at least {_MINIMUM_POINTS} points are needed, got {len(t)}: train longer")
    if t[0] <= 0:
        raise ValueError(f"updates must be positive, got {float(t[0]):g}: leave out t = 0, where the distance is zero")
    if not (t.diff() > 0).all():
        i = int((t.diff() <= 0).nonzero()[0, 0])
        raise ValueError(f"updates must increase strictly, got {float(t[i]):g} then {float(t[i + 1]):g}: sort them")
    if (d < 0).any():
        raise ValueError(f"distances must not be negative, got {float(d.min()):g}")
    decades = math.log10(float(t[-1] / t[0]))
    if decades < minimum_decades - 1e-12:
        raise ValueError(
            f"updates {float(t[0]):g} to {float(t[-1]):g} span {decades:.2f} decades, at least {minimum_decades:g} are "
            "needed to tell a logarithm from a power: train longer, or lower minimum_decades"
        )
    if (d == d[0]).all():
        raise ValueError(f"distances are all {float(d[0]):g}: there is no law to fit; check the learning rate")


def _squares(residuals: Tensor) -> float:
    return float(residuals.square().sum())


def _line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return slope and intercept of the least-squares line."""
    centred = x - x.mean()
    slope = float(centred @ y / centred.square().sum())
    return slope, float(y.mean()) - slope * float(x.mean())


def _power(log_t: Tensor, d: Tensor) -> tuple[float, float, float]:
    """Return c, p and the residual sum of squares of c·t^p, by variable projection on c."""
    centre = log_t.mean()
    x = log_t - centre

    def project(p: Tensor) -> tuple[Tensor, Tensor]:
        shape = torch.exp(p[:, None] * x)
        c = (shape @ d) / shape.square().sum(1)
        return c, (d - c[:, None] * shape).square().sum(1)

    low, high = -8.0, 8.0
    for _ in range(5):  # each round narrows the bracket 128 times
        p = torch.linspace(low, high, 257, dtype=torch.float64)
        c, ssr = project(p)
        best = int(ssr.argmin())
        low, high = float(p[max(best - 1, 0)]), float(p[min(best + 1, 256)])
    exponent = float(p[best])
    return float(c[best]) * math.exp(-exponent * float(centre)), exponent, float(ssr[best])


def _akaike_weight(log_ssr: float, power_ssr: float, n: int, floor: float) -> float:
    half_difference = 0.5 * n * math.log(max(log_ssr, floor) / max(power_ssr, floor))
    return 0.5 * (1 - math.tanh(half_difference / 2))


def _alpha(t: Tensor, d: Tensor) -> float:
    late = (t >= _ALPHA_FROM_UPDATE) & (d > 0)
    if int(late.sum()) < 3:
        return math.nan
    slope, _ = _line(t[late].log().log(), d[late].log())
    return 2 / slope if slope > 0 else math.nan
