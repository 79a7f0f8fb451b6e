"""Schedules as formulas: torch's own rates."""

import math

import pytest
import torch

from lightning_gap.regime.clock import ReferenceClock
from lightning_gap.regime.rates import cosine_rates, milestone_rates
from lightning_gap.regime.rollout import roll_out


def rolled(make, interval, last, per_epoch=5):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    clock = ReferenceClock(make(optimizer), interval, 1, per_epoch, last=last)
    return roll_out(clock).rates, clock.steps_until(last)


@pytest.mark.parametrize("milestones", [[1], [2, 3], [3, 3, 7], [100]])
def test_milestones(milestones):
    rates, steps = rolled(
        lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.1), "epoch", 43
    )
    assert milestone_rates(0.3, milestones, 0.1, steps).rates == rates


@pytest.mark.parametrize("length", [1, 2, 43, 1000])
def test_cosine(length):
    rates, steps = rolled(
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, length), "step", length
    )
    found = cosine_rates(0.3, length, steps).rates
    assert len(found) == len(rates) == length + 1
    assert all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) for a, b in zip(found, rates, strict=True))
