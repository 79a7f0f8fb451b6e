"""Metrics and scores on a device are those on the CPU, also where the device has no double precision."""

import os
from contextlib import nullcontext

import pytest
import torch
from device_fits import clouds

from lightning_gap import precision
from lightning_gap.diffusion import WeightDistance, estimate_alpha, weight_displacement
from lightning_gap.monge import (
    DisplacementCosine,
    EnergyDistance,
    MapScores,
    MarginalWasserstein,
    MongeGap,
    SinkhornDivergence,
    UnexplainedVariance,
    conservativity,
    gaussian_map,
)

X, Y = clouds(40)
MAPPED, TRUTH, WEIGHTS = 2 * X, 2 * X + 0.1 * Y, torch.full((40,), 1 / 40)
EPSILON = {"epsilon": 0.5, "tolerance": 1e-4}
METRICS = {
    "gap": (lambda: MongeGap("euclidean", **EPSILON), (X, MAPPED), {"weights": WEIGHTS}),
    "divergence": (lambda: SinkhornDivergence(**EPSILON), (X, Y), {"weights": (WEIGHTS, None)}),
    "energy": (EnergyDistance, (X, Y), {"weights": (None, WEIGHTS)}),
    "marginal": (MarginalWasserstein, (X, Y), {}),
    "unexplained": (UnexplainedVariance, (MAPPED, TRUTH), {"weights": WEIGHTS}),
    "cosine": (DisplacementCosine, (X, MAPPED, TRUTH), {}),
    "scores": (lambda: MapScores(gap_epsilon=0.5, fitting_epsilon=0.5), (X, MAPPED, Y), {"true_images": TRUTH}),
}


def to(device, value):
    if isinstance(value, tuple):
        return tuple(to(device, part) for part in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def compute(name, device):
    make, arguments, weights = METRICS[name]
    metric = make().to(device)
    for _ in range(2):
        metric.update(*to(device, arguments), **{key: to(device, value) for key, value in weights.items()})
    found = metric.compute()
    return found if isinstance(found, dict) else {"value": found}


@pytest.mark.parametrize("name", METRICS)
def test_metrics(device, name):
    expected, found = compute(name, "cpu"), compute(name, device)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert value.device.type == "cuda"
        torch.testing.assert_close(value.cpu(), expected[key], rtol=2e-3, atol=1e-5)


@pytest.mark.emulated
@pytest.mark.parametrize("name", METRICS)
def test_metrics_without_double(device, name, monkeypatch):
    from masked import without_double

    expected = compute(name, "cpu")
    monkeypatch.setattr(precision, "_WITHOUT_DOUBLE", {"cuda"})
    with without_double():
        found = {key: value.cpu() for key, value in compute(name, device).items()}
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-2, atol=1e-4)


def moved_layer(device):
    torch.manual_seed(0)
    layer = torch.nn.Linear(300, 20).to(device)
    metric = WeightDistance(layer, relative=True).to(device)
    with torch.no_grad():
        layer.weight.add_(0.01)
    metric.update(layer)
    return layer, metric


@pytest.mark.parametrize(
    "double",
    [
        True,
        pytest.param(False, marks=pytest.mark.emulated),
    ],
)
def test_distances_of_weights(device, double, monkeypatch):
    expected = float(moved_layer("cpu")[1].compute())
    context = nullcontext()
    if not double:
        from masked import without_double

        monkeypatch.setattr(precision, "_WITHOUT_DOUBLE", {"cuda"})
        context = without_double()
    with context:
        layer, metric = moved_layer(device)
        distance = metric.compute()
        assert distance.device.type == "cuda"
        assert float(distance) == pytest.approx(expected, rel=1e-5)
        start = {name: value.detach().cpu() for name, value in layer.named_parameters()}  # an anchor on the CPU
        assert weight_displacement(dict(layer.named_parameters()), start).distance == 0


def test_landscape(device):
    def alpha(where):
        torch.manual_seed(0)
        layer, x = torch.nn.Linear(4, 1).to(where), torch.linspace(0, 1, 32).view(8, 4).to(where)
        return estimate_alpha(layer, lambda net: net(x).square().mean(), radius=1.0, samples=60, bins=4).alpha

    assert alpha(device) == pytest.approx(alpha("cpu"), rel=1e-3)


def test_gaussian_maps(device):
    for found, expected in zip(gaussian_map(*to(device, (X, Y))), gaussian_map(X, Y), strict=True):
        assert found.device.type == "cuda"
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif("EMULATED_DEVICE" in os.environ, reason="forward-mode derivatives are not emulated")
def test_conservativity(device):
    field = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    expected = conservativity(field, X)
    found = conservativity(field.to(device), X.to(device))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)
