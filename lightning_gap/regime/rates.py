"""Learning rates over a run, as numbers: those of a schedule that was rolled out, and of two that are formulas.

Without torch, so that a plan takes no longer than its arithmetic.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from lightning_gap.regime.clock import ReferenceClock
from lightning_gap.regime.plan import RegimePlan

__all__ = ["Rollout", "cosine_rates", "curve", "milestone_rates"]


class Rollout(NamedTuple):
    """The rates of the first group after each step, what was raised instead of a further one, and if all was seen."""

    rates: list[float]
    error: Exception | None
    whole: bool


def milestone_rates(rate: float, milestones: Sequence[int], gamma: float, steps: int) -> Rollout:
    """Return the rates of ``MultiStepLR``: times γ after each milestone.

    Example:
        >>> milestone_rates(1.0, [1, 3], 0.5, 4).rates
        [1.0, 0.5, 0.5, 0.25, 0.25]
    """
    rates = [rate]
    for step in range(1, steps + 1):
        rates.append(rates[-1] * gamma ** milestones.count(step))
    return Rollout(rates, None, whole=True)


def cosine_rates(rate: float, length: int, steps: int) -> Rollout:
    """Return the rates of ``CosineAnnealingLR`` that falls to 0: rate · (1 + cos(π·t/T)) / 2.

    Example:
        >>> [round(rate, 3) for rate in cosine_rates(1.0, 2, 2).rates]
        [1.0, 0.5, 0.0]
    """
    return Rollout([rate * (1 + math.cos(math.pi * step / length)) / 2 for step in range(steps + 1)], None, whole=True)


def curve(
    plan: RegimePlan, rate: float, rollouts: Sequence[tuple[ReferenceClock, Rollout]], factor: float | None = None
) -> tuple[tuple[int, float, int, float], ...]:
    """Return five points of the first group's learning rate: updates and rates of the reference run and of this run.

    ``factor`` is what the rates are multiplied by, where that is not the rule's factor alone.
    """
    points, factor = [], plan.lr_factor if factor is None else factor
    for quarter in range(5 if plan.updates else 0):
        before = quarter * ((plan.updates or 1) - 1) // 4
        reference_update, now = plan.reference_update(before), rate
        for clock, seen in rollouts:
            steps = clock.steps_until(reference_update)
            if len(rollouts) > 1 or steps >= len(seen.rates):
                return ()  # not told by one schedule, or not looked at so far
            now = seen.rates[steps]
        points.append((reference_update + 1, now, before + 1, now * factor))
    return tuple(points)
