"""When runs reach a target and keep to it, and which share of them is within a factor of the best."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_gap.checks import check_choice, check_integer, check_number

__all__ = ["HOLD", "Target", "first_held", "performance_profile", "reached"]

# A metric is held if this many points in a row are at the target or better.
HOLD = 3


@dataclass(frozen=True)
class Target:
    """A value that a metric has to reach.

    Args:
        metric: The key it is logged under.
        sign: ``">="`` where more is better, ``"<="`` where less is.
        value: The value.

    Raises:
        ValueError: If the sign is neither, or the value not finite.

    Example:
        >>> Target.parse("val_acc >= 0.9")
        Target(metric='val_acc', sign='>=', value=0.9)
        >>> str(Target("val_loss", "<=", 0.3))
        'val_loss<=0.3'
    """

    metric: str
    sign: Literal[">=", "<="]
    value: float

    def __post_init__(self) -> None:
        check_choice("sign", self.sign, (">=", "<="))
        check_number("value", self.value)

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Return the target that a text means, as ``val_acc>=0.9`` or ``val_loss<=0.3``.

        Args:
            text: Metric, sign and value.

        Raises:
            ValueError: If the text is none.
        """
        match = re.fullmatch(r"\s*(\S+?)\s*(>=|<=)\s*(\S+)\s*", text)
        try:
            value = float(match[3]) if match else math.nan
        except ValueError:
            value = math.nan
        if match is None or not math.isfinite(value):
            raise ValueError(f"target {text!r} is none: write METRIC>=VALUE or METRIC<=VALUE, as val_acc>=0.9")
        return cls(match[1], ">=" if match[2] == ">=" else "<=", value)

    def __str__(self) -> str:
        return f"{self.metric}{self.sign}{self.value:g}"

    def met(self, values: ArrayLike) -> NDArray[np.bool_]:
        """Return where values are at the target or better; NaN is not.

        Args:
            values: Of the metric.
        """
        numbers = np.asarray(values, dtype=np.float64)
        return np.asarray(numbers >= self.value if self.sign == ">=" else numbers <= self.value)


def first_held(at: ArrayLike, values: ArrayLike, target: Target, *, hold: int = HOLD, smooth: int = 1) -> float | None:
    """Return when a metric first is at a target, or better, and stays so.

    It is held from the first of ``hold`` points in a row that are at the target or better. Between that point and the
    one before, which is not, the curve is taken as straight, so that the answer does not jump with the distance of the
    points. A curve that ends before ``hold`` points are seen has only touched the target.

    Args:
        at: ``(n,)``: updates, samples or seconds at each point, not falling.
        values: ``(n,)``: the metric there.
        target: The target.
        hold: Points in a row, at least 1. With 1 the target is touched and not held.
        smooth: Each value is first replaced by the mean of the last so many, itself among them: for the loss of single
            batches.

    Returns:
        In the units of ``at``; None if it is never held.

    Raises:
        ValueError: If the two differ in length, or hold or smooth is less than 1.

    Example:
        >>> accuracy = [0.5, 0.92, 0.8, 0.94, 0.95, 0.96]  # touched at 20, held from between 30 and 40 on
        >>> first_held([10, 20, 30, 40, 50, 60], accuracy, Target("val_acc", ">=", 0.9))
        37.142857142857146
        >>> first_held([10, 20, 30], [0.5, 0.8, 0.95], Target("val_acc", ">=", 0.9)) is None
        True
    """
    check_integer("hold", hold, what="points in a row at the target or better")
    check_integer("smooth", smooth, what="points of which each value is the mean")
    places, curve = np.asarray(at, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if places.shape != curve.shape or places.ndim != 1:
        raise ValueError(f"at and values must be of one length, got {places.shape} and {curve.shape}")
    if smooth > 1:
        curve = np.array([curve[max(0, i + 1 - smooth) : i + 1].mean() for i in range(len(curve))])
    met = target.met(curve)
    if len(met) < hold:
        return None
    runs = np.lib.stride_tricks.sliding_window_view(met, hold).all(1)
    if not runs.any():
        return None
    first = int(runs.argmax())
    if first == 0 or not math.isfinite(curve[first - 1]):
        return float(places[first])
    share = (target.value - curve[first - 1]) / (curve[first] - curve[first - 1])
    return float(places[first - 1] + share * (places[first] - places[first - 1]))


def reached(values: ArrayLike, target: Target) -> bool:
    """Return whether a metric was at a target, or better, at any point.

    Args:
        values: Of the metric.
        target: The target.
    """
    return bool(target.met(values).any())


def performance_profile(
    costs: Sequence[Sequence[float | None]], best: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    r"""Return which share of runs reached their targets at most a factor dearer than the best run.

    .. math:: \rho(\tau) = \frac{1}{n} \sum_i 1\Big[\frac{t_i}{\min_j t_j} \le \tau\Big]

    Args:
        costs: For each target (a workload), the cost of each run until it held it: updates, samples or seconds; None
            if it never did, which counts among the n.
        best: The least cost of each target, over these runs and those of others that they are compared with.

    Returns:
        ``(k,)``, the factors :math:`\tau \ge 1` at which the share grows, in order, and ``(k,)``, the share from there
        on.

    Raises:
        ValueError: If there is no run, or not one best for each target.

    References:
        Dahl et al. 2023, "Benchmarking neural network training algorithms" (AlgoPerf), section 4. Dolan and Moré 2002,
        "Benchmarking optimization software with performance profiles".

    Example:
        >>> factors, shares = performance_profile([[100, 150, None, 400]], best=[100])
        >>> factors.tolist(), shares.tolist()
        ([1.0, 1.5, 4.0], [0.25, 0.5, 0.75])
    """
    if len(costs) != len(best):
        raise ValueError(f"best has {len(best)} entries for the {len(costs)} targets of costs: give one each")
    count = sum(map(len, costs))
    if count == 0:
        raise ValueError("costs is empty: give the cost of at least one run")
    ratios = [cost / least for row, least in zip(costs, best, strict=True) for cost in row if cost is not None]
    factors, counts = np.unique(np.asarray(ratios, dtype=np.float64), return_counts=True)
    return factors, counts.cumsum() / count
