"""Hyperparameters of a changing batch: what schedulers see, what optimizers see, and what others change."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from regime_runs import SCHEDULES
from torch.optim import lr_scheduler as schedulers

from lightning_gap.regime.held_scaling import HeldScaling


def sqrt(optimizer, group, ratio):
    return {"lr": group["lr"] * ratio**0.5, "initial_lr": 7.0}  # the latter is a scheduler's, and stays


def sgd(**options):
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    return torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.25}], lr=0.5, **options)


@pytest.mark.parametrize("name", SCHEDULES)
@given(ratios=st.lists(st.sampled_from([1.0, 2.0, 7.5, 64.0]), min_size=5, max_size=5))
def test_a_scheduler_sees_the_reference_run_whatever_the_batch(name, ratios):
    plain, ours = sgd(momentum=0.9), sgd(momentum=0.9)
    make = partial(SCHEDULES[name], unit=1)
    there, here = make(plain), make(ours)
    held = HeldScaling([ours], sqrt)
    for ratio in ratios:
        held.put(ratio)
        for group, other in zip(ours.param_groups, plain.param_groups, strict=True):
            assert group["lr"] == pytest.approx(other["lr"] * ratio**0.5, rel=1e-14)
            assert group["initial_lr"] == other["initial_lr"]
        plain.step()
        ours.step()
        there.step()
        with held.reference_run():
            here.step()
    held.give_back()
    assert [group["lr"] for group in ours.param_groups] == [group["lr"] for group in plain.param_groups]


def test_a_plateaus_factor_is_taken_over():
    optimizer = sgd()
    plateau = schedulers.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    held = HeldScaling([optimizer], sqrt)
    held.put(4.0)
    plateau.step(1.0)
    plateau.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    held.put(16.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)
    held.give_back()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_a_tensor_stays_the_same_tensor():
    rate = torch.tensor(0.5)
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=rate, betas=(0.9, 0.99))
    kept = optimizer.param_groups[0]["lr"]
    held = HeldScaling([optimizer], sqrt)
    held.put(4.0)
    assert optimizer.param_groups[0]["lr"] is kept
    assert float(kept) == 1.0
    with held.reference_run():
        assert float(kept) == 0.5
        kept.mul_(0.5)
    assert float(kept) == 0.5
    held.put(1.0)
    assert float(kept) == 0.25


def test_a_state_holds_the_reference_run():
    optimizer = sgd()
    held = HeldScaling([optimizer], sqrt)
    held.put(4.0)
    state, groups = held.state_dict(), optimizer.state_dict()
    other = sgd()
    other.load_state_dict(groups)
    again = HeldScaling([other], sqrt)
    again.load_state_dict(state, 4.0)
    assert other.param_groups[0]["lr"] == 1.0
    again.put(16.0)
    assert other.param_groups[1]["lr"] == 1.0
    again.give_back()
    assert [group["lr"] for group in other.param_groups] == [0.5, 0.25]


def test_a_group_that_is_added_is_scaled_from_then_on():
    optimizer = sgd()
    held = HeldScaling([optimizer], sqrt)
    held.put(4.0)
    optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 0.1})
    held.put(16.0)
    assert optimizer.param_groups[2]["lr"] == pytest.approx(0.4)
    held.give_back()
    assert optimizer.param_groups[2]["lr"] == pytest.approx(0.1)
