"""Divergences, gaps and plans on a device are those on the CPU: every cost, both solvers, values and gradients."""

import pytest
import torch
from comparison import near, same_on_cpu, values_and_gradients
from ground_costs import COSTS

from lightning_gap.monge import (
    divergence_and_gap,
    energy_distance,
    marginal_wasserstein,
    minibatch_energy_distance,
    monge_gap,
    optimal_transport,
    sinkhorn_divergence,
    unbalanced_weights,
)

TIGHT = {"tolerance": 1e-5, "max_iterations": 5000}


def samples(cost="sqeuclidean", n=40, m=50, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(n, 3, generator=generator), 0.6 * torch.randn(m, 3, generator=generator) + 1
    if cost in ("geodesic", "cosine"):
        x, y = (t / t.norm(dim=1, keepdim=True) for t in (x, y))
    return x.to(dtype), y.to(dtype)


@pytest.mark.parametrize("solver", ["dense", "blocked"])
@pytest.mark.parametrize("name", COSTS)
def test_costs(device, name, solver):
    x, y = samples(name)
    options = {"cost": COSTS[name], "solver": solver, **TIGHT}
    # Where both sides are the same samples the gradient is a difference of two that all but cancel.
    same_on_cpu(lambda x, y: sinkhorn_divergence(x, y, **options), x, y, device=device, share=2e-3)
    same_on_cpu(lambda x, y: monge_gap(x, y, **options), x, y[:40].flip(0), device=device, share=2e-3)


VARIANTS = {
    "debiased gap": lambda x, y, **o: monge_gap(x, y[: len(x)], convention="debiased", **o),
    "weighted gap": lambda x, y, **o: monge_gap(x, y[: len(x)], weights=ramp(x), **o),
    "kl": lambda x, y, **o: monge_gap(x, y[: len(x)], convention="kl", rho=3.0, **o),
    "weights": lambda x, y, **o: sinkhorn_divergence(x, y, weights=(ramp(x), ramp(y)), **o),
    "unbalanced": lambda x, y, **o: sinkhorn_divergence(x, y, rho=2.0, **o),
    "unequal masses": lambda x, y, **o: sinkhorn_divergence(x, y, weights=(2 * ramp(x), None), rho=2.0, **o),
    "share of the deviation": lambda x, y, **o: sinkhorn_divergence(x, y, relative_to="std", **o),
    "together": lambda x, y, **o: torch.stack(divergence_and_gap(x, 2 * x, y, **o)),
    "batched": lambda x, y, **o: sinkhorn_divergence(x.view(2, -1, 3), y.view(2, -1, 3), **o),
    "batched gap": lambda x, y, **o: monge_gap(x.view(2, -1, 3), 2 * x.view(2, -1, 3), **o),
    "transport cost": lambda x, y, **o: optimal_transport(x, y, **o).value,
    "plan": lambda x, y, **o: optimal_transport(x, y, **o).plan(),
}


def ramp(samples):
    weights = torch.arange(1, len(samples) + 1, device=samples.device, dtype=samples.dtype)
    return weights / weights.sum()


@pytest.mark.parametrize("solver", ["dense", "blocked"])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(device, name, solver):
    same_on_cpu(lambda x, y: VARIANTS[name](x, y, solver=solver, **TIGHT), *samples(), device=device, share=2e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(device, dtype):
    share = 1e-4 if dtype == torch.float64 else 1e-2
    same_on_cpu(lambda x, y: sinkhorn_divergence(x, y, **TIGHT), *samples(dtype=dtype), device=device, share=share)


def test_second_derivatives(device):
    def curvature(x, y):
        (gradient,) = torch.autograd.grad(
            sinkhorn_divergence(x, y, relative_epsilon=0.5, **TIGHT), x, create_graph=True
        )
        return gradient.square().sum()

    same_on_cpu(curvature, *samples(n=15, m=20, dtype=torch.float64), device=device, share=1e-3)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: monge_gap(x, y[: len(x)], solver="exact"),
        lambda x, y: sinkhorn_divergence(x, y, solver="exact"),
        energy_distance,
        marginal_wasserstein,
        lambda x, y: minibatch_energy_distance(x, y[: len(x)]),
        lambda x, y: unbalanced_weights(x, y, rho=2.0)[0],
    ],
    ids=["exact gap", "exact", "energy", "marginal", "minibatch energy", "unbalanced weights"],
)
def test_other_solvers_and_distances(device, function):
    same_on_cpu(function, *samples(), device=device, share=2e-3)


@pytest.mark.parametrize("solver", ["dense", "blocked"])
@pytest.mark.parametrize("name", ["sqeuclidean", "euclidean", "cosine", "mahalanobis"])
def test_tensor_cores_do_not_change_the_solution(device, name, solver):
    def loss(x, y):
        return sinkhorn_divergence(x, y, cost=COSTS[name], solver=solver)

    x, y = samples(name)
    expected = values_and_gradients(loss, x, y, device=device)
    torch.set_float32_matmul_precision("high")
    try:
        found = values_and_gradients(loss, x, y, device=device)
        assert torch.get_float32_matmul_precision() == "high"  # the caller's own choice
    finally:
        torch.set_float32_matmul_precision("highest")
    for mine, theirs in zip(found, expected, strict=True):
        near(mine, theirs, 1e-6)


@pytest.mark.emulated
@pytest.mark.parametrize("solver", ["dense", "blocked", "exact"])
@pytest.mark.parametrize("name", COSTS)
def test_a_device_without_double(device, name, solver, monkeypatch):
    from masked import without_double

    from lightning_gap import precision

    def loss(x, y):
        options = {} if solver == "exact" else {"tolerance": 1e-4}
        return sinkhorn_divergence(x, y, cost=COSTS[name], solver=solver, **options)

    monkeypatch.setattr(precision, "_WITHOUT_DOUBLE", {"cuda"})
    with without_double():
        same_on_cpu(loss, *samples(name, 30, 30), device=device, share=2e-2)
