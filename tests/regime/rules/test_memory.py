"""Averages over updates of a larger batch, against averages over the updates of the reference run."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gap.regime import batchnorm_momentum, ema_momentum


@given(momentum=st.floats(0, 1), ratio=st.integers(1, 64))
def test_one_update_forgets_as_many_small_ones(momentum, ratio):
    average = 1.0
    for _ in range(ratio):
        average = momentum * average  # of zeros, from 1: what is left is the weight of the past
    assert ema_momentum(momentum, ratio) == pytest.approx(average)
    assert ema_momentum(torch.tensor(momentum, dtype=torch.float64), ratio).item() == pytest.approx(average)


@given(momentum=st.floats(0, 1), ratio=st.integers(1, 16))
def test_running_statistics_are_of_as_many_samples(momentum, ratio):
    norm = torch.nn.BatchNorm1d(1, momentum=momentum).double()
    x = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    for _ in range(ratio):
        norm(x)
    other = torch.nn.BatchNorm1d(1, momentum=batchnorm_momentum(momentum, ratio)).double()
    other(x)
    assert other.running_mean.item() == pytest.approx(norm.running_mean.item(), abs=1e-12)


@pytest.mark.parametrize("function", [ema_momentum, batchnorm_momentum])
def test_what_is_no_momentum_or_ratio_is_refused(function):
    with pytest.raises(ValueError, match=r"momentum=1.5 must be from 0 to 1"):
        function(1.5, 2)
    with pytest.raises(ValueError, match="ratio=0 must be positive"):
        function(0.5, 0)
