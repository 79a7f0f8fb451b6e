"""The grid of updates at which a run is measured, and the stretches of a trace at one learning rate."""

import math
from collections.abc import Sequence
from itertools import pairwise

__all__ = ["constant_lr_segments", "longest_segment", "next_log_update", "next_update"]


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
    """Return the run of equal learning rate that spans the most decades of ``updates``."""
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


def next_update(t: int, points_per_decade: int, every: int | None = None) -> int:
    """Return the smallest multiple of ``every`` after ``t``, or of the logarithmic grid where that is None."""
    return next_log_update(t, points_per_decade) if every is None else (t // every + 1) * every
