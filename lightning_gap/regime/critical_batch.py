"""The critical batch: what a batch costs in updates and in samples, fitted to runs at several batches."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.stats import t as student

__all__ = [
    "CriticalBatchFit",
    "fit_critical_batch",
    "samples_to_target",
    "trade_off_at",
    "updates_to_target",
]

Floats = NDArray[np.float64]

# A relative error from which on a run pulls at the fit no harder than in proportion.
_USUAL_ERROR = 0.1
# How far beyond the batches that ran a critical batch is looked for; one farther off is 0 or without bound.
_BEYOND = 100.0


def updates_to_target(batch: float, s_min: float, e_min: float) -> float:
    r"""Return how many updates of a batch reach a target.

    .. math:: S(B) = S_{min} + E_{min} / B = S_{min} (1 + B_{crit} / B), \qquad
        \Big(\frac{S}{S_{min}} - 1\Big) \Big(\frac{E}{E_{min}} - 1\Big) = 1, \quad E = B S

    Args:
        batch: B, samples per update.
        s_min: :math:`S_{min}`, the updates of a batch without bound.
        e_min: :math:`E_{min}`, the samples of a batch that vanishes.

    Raises:
        ValueError: If the batch is not positive, or the others are negative, or both 0.

    References:
        McCandlish, Kaplan, Amodei 2018, "An empirical model of large-batch training", equation 2.11.

    Example:
        >>> updates_to_target(64, 100, 6400), samples_to_target(64, 100, 6400)  # at the critical batch, twice the least
        (200.0, 12800.0)
    """
    if not 0 < batch < math.inf:
        raise ValueError(f"batch={batch} must be a finite number of samples greater than 0.")
    for name, value in (("s_min", s_min), ("e_min", e_min)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value} must be a finite number of at least 0.")
    if s_min == e_min == 0:
        raise ValueError("s_min and e_min are both 0: a target that takes no update is none; give one of them.")
    return s_min + e_min / batch


def samples_to_target(batch: float, s_min: float, e_min: float) -> float:
    r"""Return how many samples reach a target in updates of a batch: :math:`E(B) = E_{min} + B S_{min}`.

    Args:
        batch: As in :func:`updates_to_target`.
        s_min: As there.
        e_min: As there.

    Raises:
        ValueError: As there.

    Example:
        >>> samples_to_target(128, 100, 6400)
        19200.0
    """
    return batch * updates_to_target(batch, s_min, e_min)


def trade_off_at(critical_batch: float, batch: float, updates: float) -> tuple[float, float]:
    r"""Return :math:`S_{min}` and :math:`E_{min}` from one run and a critical batch, such as its noise scale.

    .. math:: S_{min} = \frac{S}{1 + B_{crit} / B}, \qquad E_{min} = B_{crit} S_{min}

    Args:
        critical_batch: :math:`B_{crit}`, for example ``NoiseScaleEstimate.critical_batch_size``.
        batch: B of the run, samples per update.
        updates: S, after which it reached the target.

    Raises:
        ValueError: If an argument is not a finite number greater than 0.

    Example:
        >>> trade_off_at(64, 128, 150)
        (100.0, 6400.0)
    """
    for name, value in (("critical_batch", critical_batch), ("batch", batch), ("updates", updates)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be a finite number greater than 0.")
    s_min = updates / (1 + critical_batch / batch)
    return s_min, critical_batch * s_min


@dataclass(frozen=True)
class CriticalBatchFit:
    r"""The trade-off of updates and samples, fitted to runs.

    Args:
        s_min: :math:`S_{min}`, updates. 0 where updates fall as the batch grows or faster, so that no run is near the
            critical batch.
        e_min: :math:`E_{min}`, samples. 0 where updates do not fall at all, so that every run is far past it.
        intervals: Of ``"s_min"``, ``"e_min"`` and ``"critical_batch"``: low and high. Empty under three batches. From 0
            to infinity where the fit without one of the batches has no critical batch.
        left_out: For each batch, the fit to the others' prediction of its updates over what they were (their geometric
            mean), less 1. Empty under three batches.

    Example:
        >>> fit = fit_critical_batch([32, 64, 256], [300, 200, 125])
        >>> round(fit.critical_batch, 3), round(fit.updates(128), 3)
        (64.0, 150.0)
        >>> max(map(abs, fit.left_out.values())) < 1e-3
        True
    """

    s_min: float
    e_min: float
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    left_out: Mapping[float, float] = field(default_factory=dict)

    @property
    def critical_batch(self) -> float:
        r""":math:`B_{crit} = E_{min} / S_{min}`, where both cost twice their least; may be infinite."""
        return self.e_min / self.s_min if self.s_min else math.inf

    def updates(self, batch: float) -> float:
        """Return the updates to the target at a batch.

        Args:
            batch: Samples per update.
        """
        return updates_to_target(batch, self.s_min, self.e_min)

    def samples(self, batch: float) -> float:
        """Return the samples to the target at a batch.

        Args:
            batch: Samples per update.
        """
        return samples_to_target(batch, self.s_min, self.e_min)


def fit_critical_batch(
    batches: Sequence[float], updates: Sequence[float], *, confidence: float = 0.95
) -> CriticalBatchFit:
    r"""Fit :math:`S_{min}` and :math:`E_{min}` to the updates that runs at several batches took to one target.

    .. math:: \min \sum_i \rho\big(\log S_i - \log(S_{min} + E_{min} / B_i)\big), \qquad
        \rho(r) = 2 c^2 \big(\sqrt{1 + (r / c)^2} - 1\big), \quad c = 0.1

    In logarithms a run of many updates counts as much as one of few, and :math:`\rho` bounds the pull of one that went
    astray. The intervals are those of a jackknife over batches, in logarithms, with Student's quantile: leaving out a
    whole batch shows not only the noise of runs but also where the trade-off itself does not hold.

    Args:
        batches: Samples per update, one for each run; two different ones at least. Several runs (seeds) may share one.
        updates: After how many updates each run reached the target, in the same order.
        confidence: Of the intervals, between 0 and 1.

    Returns:
        The fit, with the error at each batch when it was left out.

    Raises:
        ValueError: If the two differ in length, hold what is not a finite number greater than 0, or there are fewer
            than two batches.

    References:
        McCandlish, Kaplan, Amodei 2018, "An empirical model of large-batch training", section 2.3 and appendix A.4.

    Example:
        >>> fit = fit_critical_batch([8, 32, 128, 512, 8, 32, 128, 512], [910, 290, 155, 110, 890, 310, 145, 115])
        >>> 50 < fit.critical_batch < 100, max(map(abs, fit.left_out.values())) < 0.15
        (True, True)
    """
    if len(batches) != len(updates):
        raise ValueError(f"batches and updates have {len(batches)} and {len(updates)} entries: give one of each a run.")
    sizes, made = np.asarray(batches, dtype=np.float64), np.asarray(updates, dtype=np.float64)
    for name, values in (("batches", sizes), ("updates", made)):
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise ValueError(f"{name} holds what is not a finite number greater than 0: leave those runs out.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be between 0 and 1, for example 0.95.")
    different = np.unique(sizes)
    if len(different) < 2:
        raise ValueError(
            f"batches has {len(different)} batch size: give runs at two or more, or one run's noise scale to "
            "trade_off_at."
        )
    s_min, e_min = _fitted(sizes, made)
    if len(different) < 3:
        return CriticalBatchFit(s_min, e_min)
    without = {float(size): _fitted(sizes[sizes != size], made[sizes != size]) for size in different}
    left_out = {
        size: updates_to_target(size, *fitted) / math.exp(np.log(made[sizes == size]).mean()) - 1
        for size, fitted in without.items()
    }
    return CriticalBatchFit(s_min, e_min, _intervals((s_min, e_min), list(without.values()), confidence), left_out)


def _fitted(batches: Floats, updates: Floats) -> tuple[float, float]:
    """Return the S_min and E_min that fit best."""
    middle = math.exp(np.log(batches).mean())
    logs = np.log(updates)

    def shape(critical: float) -> Floats:
        """Return log(S / S(middle)): a form that is flat in neither limit of the critical batch."""
        return np.asarray(np.log1p(critical / batches) - math.log1p(critical / middle))

    def residuals(point: Floats) -> Floats:
        return np.asarray(point[0] + shape(math.exp(point[1])) - logs)

    low, high = math.log(batches.min() / _BEYOND), math.log(batches.max() * _BEYOND)
    # The best of a grid first: one valley is not promised.
    starts = [(float(np.median(logs - shape(math.exp(x)))), x) for x in np.linspace(low, high, 41)]
    start = min(starts, key=lambda point: float(np.abs(residuals(np.array(point))).sum()))
    inside = (start[0], min(max(start[1], low + 1e-6), high - 1e-6))
    bounds = ([-np.inf, low], [np.inf, high])
    best = least_squares(
        residuals, inside, bounds=bounds, loss="soft_l1", f_scale=_USUAL_ERROR, xtol=1e-12, ftol=1e-12, gtol=1e-12
    )
    level, at = math.exp(best.x[0]), float(best.x[1])
    near = 0.02 * (high - low)
    if at > high - near:
        return 0.0, level * middle
    if at < low + near:
        return level, 0.0
    critical = math.exp(at)
    s_min = level / (1 + critical / middle)
    return s_min, s_min * critical


def _intervals(
    whole: tuple[float, float], without: Sequence[tuple[float, float]], confidence: float
) -> dict[str, tuple[float, float]]:
    """Return the jackknife's intervals, from the fit to all and those without a batch each."""
    names = ("s_min", "e_min", "critical_batch")
    if not all(s and e for s, e in (whole, *without)):
        return dict.fromkeys(names, (0.0, math.inf))
    values = np.log([(s, e, e / s) for s, e in without])
    count = len(values)
    error = np.sqrt((count - 1) / count * ((values - values.mean(0)) ** 2).sum(0))
    reach = student.ppf((1 + confidence) / 2, count - 1) * error
    centre = np.log([*whole, whole[1] / whole[0]])
    return {
        name: (float(math.exp(at - by)), float(math.exp(at + by)) if at + by < 700 else math.inf)
        for name, at, by in zip(names, centre, reach, strict=True)
    }
