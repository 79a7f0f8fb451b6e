"""Noise and norms of gradients in dual norms: closed forms, bounds, and the bias of what has some."""

import math

import numpy as np
import pytest
import torch

from lightning_gap.regime.dual_norms import (
    DualNoiseScaleEstimate,
    dual_verdict,
    matrix_of,
    noise_and_norm,
    shrinkage,
)


def draws(norm, mean, noise, *, parts, small_batch, count, seed=0):
    """Measurements of Gaussian gradients: parts' means of ``small_batch`` samples of noise(shape, generator)."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        gradients = mean + noise((parts, *mean.shape), generator) / math.sqrt(small_batch)
        if norm == "l1":
            second = gradients.square().mean(0)
        else:
            second = torch.stack([matrix_of(g) @ matrix_of(g).T for g in gradients]).mean(0)
        found.append(noise_and_norm(norm, second, gradients.mean(0), small_batch=small_batch, parts=parts))
    return torch.stack(found)


def white(shape, generator):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def within(values, expected, errors=4.5):
    """Whether a mean is the expected one by its standard error."""
    return abs(values.mean() - expected) <= errors * values.std() / math.sqrt(len(values))


@pytest.mark.parametrize(("rows", "freedom"), [(1, 1), (1, 3), (2, 2), (2, 6), (3, 3), (8, 8), (8, 24), (20, 60)])
def test_white_noise_shrinks_as_much(rows, freedom):
    matrices = white((2000, rows, freedom), torch.Generator().manual_seed(0))
    roots = torch.linalg.svdvals(matrices).sum(-1) / rows / math.sqrt(freedom)
    assert shrinkage(rows, freedom) == pytest.approx(
        roots.mean().item(), rel=0.015, abs=(4 * roots.std() / 2000**0.5).item()
    )


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_the_noise_of_coordinates_is_unbiased(parts):
    sigma = torch.linspace(0, 3, 7, dtype=torch.float64)  # one without noise
    mean = torch.linspace(-1, 1, 7, dtype=torch.float64)
    found = draws("l1", mean, lambda *a: sigma * white(*a), parts=parts, small_batch=5, count=4000)
    assert within(found[:, 0], sigma.sum())
    assert within(found[:, 2], sigma.sum() * math.sqrt(2 / math.pi / (5 * parts)))


@pytest.mark.parametrize("parts", [2, 4])
def test_the_noise_of_a_vector_is_the_euclidean_one(parts):
    found = draws("nuclear", torch.ones(6, dtype=torch.float64), white, parts=parts, small_batch=3, count=4000)
    assert within(found[:, 0], math.sqrt(6))


@pytest.mark.parametrize("shape", [(6, 6), (4, 12), (12, 4), (4, 3, 2, 2)])
def test_the_noise_of_matrices_is_found(shape):
    rows, columns = matrix_of(torch.zeros(shape)).shape
    mean = torch.zeros(shape, dtype=torch.float64)
    found = draws("nuclear", mean, white, parts=4, small_batch=3, count=300)
    assert found[:, 0].mean().item() == pytest.approx(rows * math.sqrt(columns), rel=0.02)
    # Of noise alone the mean gradient has the norm that is foretold.
    assert found[:, 1].mean().item() == pytest.approx(found[:, 2].mean().item(), rel=0.03)


def estimate_of(measurements):
    estimate = DualNoiseScaleEstimate(decay=0.9)
    for each in measurements.tolist():
        estimate.update(*each)
    return estimate


@pytest.mark.parametrize(("name", "expected"), [("spread", 1.0), ("equal", math.pi / 2), ("sparse", 0.116)])
def test_the_noise_scale_and_its_bounds(name, expected):
    """The scale 1000 at 40 samples an update: exact, too large, and too small with 1 % of coordinates of signal."""
    size = 4000
    generator = torch.Generator().manual_seed(1)
    mean = {
        "spread": white((size,), generator),
        "equal": torch.ones(size, dtype=torch.float64),
        "sparse": (torch.arange(size) < 40).double(),
    }[name]
    mean *= size / mean.abs().sum() / math.sqrt(1000)
    estimate = estimate_of(draws("l1", mean, white, parts=4, small_batch=10, count=60))
    low, high = estimate.critical_batch_bounds
    assert low < 1000 < high
    assert low < estimate.critical_batch_size < high
    assert estimate.critical_batch_size / 1000 == pytest.approx(expected, rel=0.12)


def test_without_signal_it_is_not_known_but_from_below():
    estimate = estimate_of(draws("l1", torch.zeros(500, dtype=torch.float64), white, parts=4, small_batch=10, count=40))
    assert not estimate.critical_batch_size < 1000
    assert estimate.critical_batch_bounds[0] == pytest.approx(40 * math.pi / 2, rel=0.05)
    silent = DualNoiseScaleEstimate(decay=0.9)
    assert math.isnan(silent.noise_scale)
    assert silent.critical_batch_bounds == (0.0, math.inf)
    silent.update(2.0, 1.0, 1.5)
    assert dual_verdict(8, silent).startswith("not known in the l1 norm after 1 measurements, 4 or more; train longer")


def test_with_little_noise_it_is_exact():
    mean = torch.tensor([3.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    for norm, noise in (("l1", 4.0), ("nuclear", 2 * math.sqrt(2))):
        shaped = mean if norm == "l1" else mean.view(2, 2)
        found = draws(norm, shaped, white, parts=64, small_batch=200, count=100)
        size = mean.abs().sum() if norm == "l1" else torch.linalg.matrix_norm(shaped, "nuc")
        assert estimate_of(found).critical_batch_size == pytest.approx(noise**2 / size.item() ** 2, rel=0.02)


def test_averages_forget_and_leave_out_what_overflows():
    estimate = DualNoiseScaleEstimate(decay=0.5, norm="nuclear")
    for numbers in ((math.inf, 1.0, 1.0), (4.0, math.nan, 1.0), (4.0, 2.0, 0.0), (8.0, 2.0, 0.0)):
        estimate.update(*numbers)
    assert estimate.measurements == 2
    assert estimate.critical_batch_size == pytest.approx(9.0)  # (12 / 4)^2
    assert estimate.noise_scale == pytest.approx((5 / 1.5) ** 2)
    assert math.isnan(
        noise_and_norm("nuclear", torch.full((2, 2), math.inf), torch.ones(2, 2), small_batch=1, parts=2)[0]
    )


def test_updates_at_the_noise_scale_are_about_twice_the_fewest():
    """What the module's text says of signs of Gaussian gradients, by drawing them."""
    generator = np.random.default_rng(0)
    gained = np.sign(0.1 + generator.normal(size=200_000) / np.sqrt(100)).mean()  # B = 1 / 0.1^2
    assert gained**-2 == pytest.approx(math.erf(math.sqrt(0.5)) ** -2, rel=0.02)
    assert math.erf(math.sqrt(0.5)) ** -2 == pytest.approx(2.15, abs=0.01)
