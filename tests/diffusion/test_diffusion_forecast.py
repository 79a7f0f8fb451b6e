import math

import pytest
import torch
from diffusion_curves import correlated_noise, log_grid

from lightning_gap.diffusion import forecast_updates


def test_forecast_of_noisy_walks_covers_the_truth():
    t, target = log_grid(1_000), 0.5 + math.log(5_000)
    covered = 0
    for seed in range(30):
        d = 0.5 + t.log() + 0.2 * correlated_noise(len(t), torch.Generator().manual_seed(seed))
        forecast = forecast_updates(t, d, target, resamples=399)
        assert forecast.low < forecast.update < forecast.high
        covered += forecast.low <= 5_000 <= forecast.high
    assert covered >= 27


def test_forecast_says_never_and_not_before_now():
    t = log_grid(1_000)
    assert forecast_updates(t, 10 - t.log(), 20.0).update == math.inf
    assert forecast_updates(t, 1 + t.log(), 2.0) == (1_000, 1_000, 1_000)
    assert forecast_updates(t, 0.1 * t**0.5, 10.0).update == pytest.approx(10_000, rel=1e-3)
    with pytest.raises(ValueError, match="target must be a positive finite distance, got nan"):
        forecast_updates(t, 1 + t.log(), math.nan)
