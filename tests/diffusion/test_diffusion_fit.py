import math

import numpy as np
import pytest
import torch
from diffusion_curves import correlated_noise, log_grid
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gap.diffusion import fit_diffusion
from lightning_gap.diffusion.bootstrap import autocorrelation


@settings(deadline=None, max_examples=50)
@given(st.floats(0.0, 5.0), st.floats(0.1, 5.0))
def test_log_law_is_recovered(intercept, slope):
    t = log_grid(10_000)
    fit = fit_diffusion(t, intercept + slope * t.log())
    assert fit.log_intercept == pytest.approx(intercept, abs=1e-9)
    assert fit.log_slope == pytest.approx(slope, rel=1e-9)
    assert fit.log_r2 == pytest.approx(1)
    assert fit.power_r2 < fit.log_r2
    assert fit.preferred == "log"


@settings(deadline=None, max_examples=50)
@given(st.floats(0.01, 100.0), st.floats(0.05, 1.5))
def test_power_law_is_recovered(coefficient, exponent):
    t = log_grid(10_000)
    fit = fit_diffusion(t, coefficient * t**exponent)
    assert fit.power_coefficient == pytest.approx(coefficient, rel=1e-5)
    assert fit.power_exponent == pytest.approx(exponent, abs=1e-6)
    assert fit.power_r2 == pytest.approx(1)
    assert fit.preferred == "power"


def test_fit_equals_reference_on_noisy_data():
    """numpy.polyfit for the log law; a dense scan of p, c by its normal equation, for the power law."""
    generator = torch.Generator().manual_seed(3)
    t = log_grid(3_000, 10)
    d = (1 + 0.7 * t.log() + 0.2 * torch.randn(len(t), generator=generator)).abs()
    fit = fit_diffusion(t, d)
    slope, intercept = np.polyfit(np.log(t.numpy()), d.numpy(), 1)
    assert (fit.log_slope, fit.log_intercept) == pytest.approx((slope, intercept), rel=1e-9)

    scanned = []
    for p in np.linspace(0, 1, 20_001):
        shape = t.numpy() ** p
        c = shape @ d.numpy() / (shape @ shape)
        scanned.append((((d.numpy() - c * shape) ** 2).sum(), p, c))
    ssr, p, c = min(scanned)
    assert (fit.power_exponent, fit.power_coefficient) == pytest.approx((p, c), abs=1e-4)
    total = ((d - d.mean()) ** 2).sum().item()
    log_ssr = ((d.numpy() - intercept - slope * np.log(t.numpy())) ** 2).sum()
    assert (fit.log_r2, fit.power_r2) == pytest.approx((1 - log_ssr / total, 1 - ssr / total), rel=1e-6)
    n = fit.effective_points
    aic = np.array([n * np.log(log_ssr / n) + 4, n * np.log(ssr / n) + 4])
    weights = np.exp(-(aic - aic.min()) / 2)
    assert fit.log_weight == pytest.approx(weights[0] / weights.sum(), abs=1e-6)


@pytest.mark.parametrize("law", ["log", "power"])
@pytest.mark.parametrize("relative", [False, True], ids=["additive", "relative"])
@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.8])
def test_right_law_and_covering_interval_under_correlated_noise(law, relative, correlation):
    right = covered = 0
    seeds = 30
    t = log_grid(10_000)
    clean, truth = (0.5 + t.log(), 1.0) if law == "log" else (0.3 * t**0.35, 0.35)
    for seed in range(seeds):
        noise = 0.05 * correlated_noise(len(t), torch.Generator().manual_seed(seed), correlation)
        d = clean * (1 + noise) if relative else clean + noise * clean.max() / 2
        fit = fit_diffusion(t, d.clamp(min=0), resamples=399)
        low, high = fit.log_slope_interval if law == "log" else fit.power_exponent_interval
        right += fit.preferred == law
        covered += low <= truth <= high
    assert right >= 0.95 * seeds
    assert covered >= 0.9 * seeds


def test_autocorrelation_is_that_of_the_errors_not_of_the_residuals():
    """Residuals of a line through 60 points of correlation 0.8 have one of 0.7; the fit took the rest."""
    x = torch.linspace(-1, 1, 60, dtype=torch.float64).numpy()
    design = np.stack([np.ones(60), x], 1)
    seen, corrected = [], []
    for seed in range(100):
        errors = correlated_noise(60, torch.Generator().manual_seed(seed), 0.8).numpy()
        residuals = errors - design @ np.linalg.lstsq(design, errors, rcond=None)[0]
        seen.append(residuals[1:] @ residuals[:-1] / (residuals @ residuals))
        corrected.append(autocorrelation(residuals, design))
    assert np.mean(seen) < 0.73
    assert np.mean(corrected) == pytest.approx(0.8, abs=0.03)


def test_fits_draw_no_random_numbers_and_repeat():
    t = log_grid(1_000)
    d = 1 + t.log() + 0.1 * torch.sin(t)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert fit_diffusion(t, d) == fit_diffusion(t, d)
    assert torch.get_rng_state().equal(before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002


def test_wider_confidence_has_wider_intervals():
    t = log_grid(1_000)
    d = 1 + t.log() + 0.2 * correlated_noise(len(t), torch.Generator().manual_seed(0))
    narrow, wide = (fit_diffusion(t, d, confidence=c) for c in (0.5, 0.99))
    for name in ("log_slope_interval", "power_exponent_interval", "alpha_interval"):
        (a, b), (c, d_) = getattr(wide, name), getattr(narrow, name)
        assert a < c < d_ < b


def test_constant_stretch_that_spans_most_is_fitted():
    t = log_grid(10_000)
    rates = [0.1 if u <= 1_000 else 0.01 for u in t]
    d = torch.where(t <= 1_000, 1 + t.log(), 8.0)
    fit = fit_diffusion(t, d, learning_rates=rates)
    assert (fit.first_update, fit.last_update) == (1, 1_000)
    assert fit.log_slope == pytest.approx(1)
    with pytest.raises(ValueError, match=r"updates 1 to 50 span 1\.70 decades"):
        fit_diffusion(t, d, learning_rates=[0.1 if u <= 50 else 1 / u for u in t])
    with pytest.raises(ValueError, match="learning_rates must have the length of updates"):
        fit_diffusion(t, d, learning_rates=rates[1:])


def test_brownian_weights_have_exponent_one_half():
    t = log_grid(10_000)
    spread = torch.diff(t, prepend=torch.zeros(1)).sqrt()  # exact: a Brownian path seen at the grid only
    exponents = []
    for seed in range(30):
        steps = torch.randn(len(t), 2_000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        fit = fit_diffusion(t, (spread[:, None] * steps).cumsum(0).norm(dim=1))
        assert fit.preferred == "power"
        exponents.append(fit.power_exponent)
    assert exponents == pytest.approx([0.5] * 30, abs=0.03)


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_alpha_of_a_pure_log_walk(alpha):
    t = log_grid(10_000)
    assert fit_diffusion(t[1:], t[1:].log() ** (2 / alpha)).alpha == pytest.approx(alpha, rel=1e-9)


def test_alpha_is_nan_where_the_walk_returns():
    t = log_grid(1_000)
    assert math.isnan(fit_diffusion(t, 10 - t.log()).alpha)


def test_scale_of_distance_and_input_type_do_not_matter():
    t = log_grid(1_000)
    d = 1 + t.log() + 0.1 * torch.sin(t)
    fit, scaled = fit_diffusion(t, d), fit_diffusion(t.numpy(), (1e6 * d).tolist())
    assert scaled.log_r2 == pytest.approx(fit.log_r2)
    assert scaled.power_exponent == pytest.approx(fit.power_exponent)
    assert scaled.log_weight == pytest.approx(fit.log_weight)
    assert scaled.log_slope == pytest.approx(1e6 * fit.log_slope)


@pytest.mark.parametrize(
    ("updates", "distances", "message"),
    [
        ([1, 10, 100, 1000], [1, 2, 3, 4], "at least 5 points"),
        ([10, 20, 40, 60, 99], [1, 2, 3, 4, 5], "span 1.00 decades"),
        ([1, 10, 10, 100, 1000], [1, 2, 3, 4, 5], "increase strictly, got 10 then 10"),
        ([1, 100, 10, 500, 1000], [1, 2, 3, 4, 5], "increase strictly, got 100 then 10"),
        ([0, 1, 10, 100, 1000], [0, 1, 2, 3, 4], "positive, got 0"),
        ([1, 5, 10, 100, 1000], [1, 2, math.nan, 4, 5], "distances must be finite, got 1 NaN"),
        ([1, 5, 10, 100, math.inf], [1, 2, 3, 4, 5], "updates must be finite"),
        ([1, 5, 10, 100, 1000], [1, 2, 3, 4], "same length, got 5 and 4"),
        ([1, 5, 10, 100, 1000], [1, 2, -3, 4, 5], "not be negative, got -3"),
        ([1, 5, 10, 100, 1000], [2, 2, 2, 2, 2], "distances are all 2"),
        ([[1, 5, 10, 100, 1000]], [1, 2, 3, 4, 5], "one vector"),
    ],
)
def test_bad_data_are_refused_in_words(updates, distances, message):
    with pytest.raises(ValueError, match=message):
        fit_diffusion(updates, distances)


@pytest.mark.parametrize(
    ("name", "value"), [("confidence", 1.0), ("confidence", 0.0), ("resamples", 0), ("resamples", 2.5)]
)
def test_bad_options_are_refused(name, value):
    with pytest.raises((TypeError, ValueError), match=f"{name} must .*, got {value}"):
        fit_diffusion(log_grid(1_000), log_grid(1_000), **{name: value})


def test_minimum_decades_can_be_lowered():
    assert fit_diffusion([10, 20, 40, 60, 99], [1, 2, 3, 4, 5], minimum_decades=0.9).points == 5
