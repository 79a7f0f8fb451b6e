"""Both moments of a gradient from two batch sizes, their averages, and what is said of them."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gap.ghost import GhostBatchNorm1d
from lightning_gap.regime import NoiseScaleEstimate, gradient_moments
from lightning_gap.regime.noise_scale import normalization_note, plan_verdict

pytestmark = pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*")


@given(st.floats(0.01, 100), st.floats(0.01, 100), st.integers(1, 100), st.integers(101, 10_000))
def test_two_batch_sizes_give_both_moments(variance, square, small, big):
    found = gradient_moments(square + variance / small, square + variance / big, small, big)
    assert found == pytest.approx((variance, square), rel=1e-6)


def test_averages_are_those_of_a_slow_twin():
    variances, squares = torch.rand(50, dtype=torch.float64), torch.rand(50, dtype=torch.float64)
    estimate = NoiseScaleEstimate(decay=0.8)
    for variance, square in zip(variances.tolist(), squares.tolist(), strict=True):
        estimate.update(variance, square)
    weights = 0.8 ** torch.arange(49, -1, -1, dtype=torch.float64)
    assert estimate.noise_scale == pytest.approx(((weights * variances).sum() / (weights * squares).sum()).item())
    assert estimate.critical_batch_size == pytest.approx((variances.sum() / squares.sum()).item())
    estimate.update(-1e9, 1.0)
    assert math.isnan(estimate.noise_scale)


@pytest.mark.parametrize("kind", [torch.nn.SyncBatchNorm, GhostBatchNorm1d])
def test_layers_that_join_replicas_are_not_trusted(kind):
    layer = kind(3)
    layer.process_group = object()
    assert "may be far off" in normalization_note({"norm": layer}, 16, replicas=2)
    assert "may be far off" not in normalization_note({"norm": torch.nn.BatchNorm1d(3)}, 16, replicas=2)


@given(st.floats(1, 1e5), st.integers(1, 1000), st.floats(1, 100))
def test_the_verdict_on_a_plan_is_between_the_samples_and_the_updates_of_the_reference_run(critical, reference, ratio):
    estimate = NoiseScaleEstimate(decay=0.5)
    estimate.update(critical, 1.0)
    batch = round(reference * ratio)
    numbers = re.findall(r"([\d.e+-]+) times its", plan_verdict(batch, reference, estimate))
    updates, samples = map(float, numbers)
    assert reference / batch * 0.94 <= updates <= 1.06
    assert 0.94 <= samples <= batch / reference * 1.06


@pytest.mark.parametrize("moments", [(math.nan, 1.0), (1.0, math.inf), (-math.inf, math.nan)])
def test_a_measurement_that_overflowed_is_left_out(moments):
    estimate = NoiseScaleEstimate(decay=0.5)
    estimate.update(2.0, 1.0)
    estimate.update(*moments)
    assert (estimate.measurements, estimate.noise_scale, estimate.critical_batch_size) == (1, 2.0, 2.0)
