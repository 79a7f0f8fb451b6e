"""The engine against values of OTT-JAX (float64, marginal error 1e-6), POT's exact solver, and GeomLoss."""

import math
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_gap import costs, monge_gap
from lightning_gap.monge.ot.solve import optimal_transport

DATA = Path(os.environ.get("LIGHTNING_GAP_DATA", Path(__file__).parents[4] / "shared" / "data"))
GOLDEN = DATA / "monge_gap_reference.npz"
golden = pytest.mark.skipif(not GOLDEN.exists(), reason=f"no golden values at {GOLDEN}; set LIGHTNING_GAP_DATA")


def euclidean_power(x, y):
    return costs.Euclidean().elementwise(x, y) ** 1.5


def half_squared_geodesic(x, y):
    return costs.Geodesic().elementwise(x, y).square() / 2


COSTS = {
    "sqeuclidean": "sqeuclidean",
    "euclidean": "euclidean",
    "pnormp1.5": "pnorm(p=1.5)",
    "pnormp3": "pnorm(p=3.0)",
    "sqpnorm1.5": "sqpnorm(p=1.5)",
    "elastic_l1": "elastic(lam=1.0)",
    "cosine": "cosine",
    "geodesic": "geodesic",
    "euclideanp1.5": euclidean_power,
    "halfsqgeodesic": half_squared_geodesic,
}
PROBLEMS = [
    *((f"euc/n{n}/d{d}", n) for n in (128, 256) for d in (2, 8, 32)),
    *((f"euc2/n{n}/d{d}", n) for n in (128, 256, 512) for d in (2, 8, 32)),
    *((f"euc2/n1024/d{d}", 1024) for d in (2, 32)),
    *((f"sph/n{n}/d{d}", n) for n in (128, 256) for d in (3, 32)),
]
problems = pytest.mark.parametrize(
    "problem", [pytest.param(p, id=p, marks=[pytest.mark.slow] if n > 256 else []) for p, n in PROBLEMS]
)


@cache
def archive():
    return np.load(GOLDEN)


def load(key):
    return torch.from_numpy(np.asarray(archive()[key]))


def samples(problem):
    return load(f"{problem}/X").double(), load(f"{problem}/Y").double()


def entries(problem):
    """The converged (cost, epsilon) entries of a problem, for costs that we have; OTT's arc-cosine kernels are none."""
    found = []
    for key in archive().files:
        name, _, last = key.rpartition("/")
        if last == "converged" and name.startswith(f"{problem}/") and bool(load(key)):
            cost = name.split("/")[3]
            if cost in COSTS:
                found.append((cost, name))
    return found


def steepest(cost, x, y):
    """The largest gradient of the cost in its second argument, over all pairs."""
    y = y.detach()[:, None].expand(-1, len(x), -1).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(costs.resolve(cost).elementwise(x[None].expand_as(y), y).sum(), y)
    return float(gradient.norm(dim=-1).max())


def tangent(gradient, points):
    points = points.detach() / points.detach().norm(dim=1, keepdim=True)
    return gradient - (gradient * points).sum(1, keepdim=True) * points


@golden
@problems
def test_gap_and_gradient_are_those_of_ott(problem):
    x, y = samples(problem)
    y.requires_grad_()
    found = entries(problem)
    assert len(found) >= 6
    for cost, name in found:
        epsilon, marginal_error = float(load(f"{name}/eps")), float(load(f"{name}/err"))
        gap = monge_gap(x, y, cost=COSTS[cost], epsilon=epsilon, tolerance=1e-9, max_iterations=20_000)
        assert float(gap.detach()) == pytest.approx(float(load(f"{name}/gap")), rel=1e-6), name

        (gradient,) = torch.autograd.grad(gap, y)
        expected = load(f"{name}/grad").double()
        if "geodesic" in cost:
            # Off the sphere the distance has several extensions; on it they agree.
            gradient, expected = tangent(gradient, y), tangent(expected, y)
        # OTT's marginals are off by up to 1e-6. That mass, and what it displaces, moves at the steepest cost at most;
        # the displaced mass is measured to be below 4 times the error. The stored gradients are float32.
        difference = (gradient - expected).norm(dim=1).sum()
        bound = 5 * marginal_error * steepest(COSTS[cost], x, y) + 2e-7 * expected.norm(dim=1).sum()
        assert float(difference) <= float(bound), name


@golden
@problems
def test_exact_gap_and_assignment_are_those_of_pot(problem):
    x, y = samples(problem)
    for cost in COSTS:
        name = f"{problem}/{cost}"
        if f"{name}/exact_gap" not in archive().files:
            continue
        paid = float(load(f"{name}/mean_cost_diag"))
        # OTT adds 1e-8 to the cosine's denominator; arc cosines feel that float32 points are off the sphere.
        close = 1e-6 if "geodesic" in cost or cost == "cosine" else 1e-9
        assert float(costs.resolve(COSTS[cost]).paired(x, y).mean()) == pytest.approx(paid, rel=close), name
        gap = monge_gap(x, y, cost=COSTS[cost], solver="exact")
        assert float(gap) == pytest.approx(float(load(f"{name}/exact_gap")), rel=close, abs=close * paid), name
        result = optimal_transport(x, y, cost=COSTS[cost], solver="exact")
        best = y[load(f"{name}/exact_perm").long()]
        cost_of_best = costs.resolve(COSTS[cost]).paired(x, best).mean()
        assert float(result.value) == pytest.approx(float(cost_of_best), rel=close), name
        # The ridge can turn pairs whose costs all but agree.
        assert cost == "cosine" or result.barycentric_projection().allclose(best, atol=1e-12), name


def mapped_samples(n, d, dtype, *, sphere=False):
    """Sources and their images under a map that is not optimal, the same points in every dtype."""
    rng = np.random.default_rng(n + d)
    x = rng.standard_normal((n, d))
    y = 0.7 * x @ rng.standard_normal((d, d)) / math.sqrt(d) + 0.5 * np.sin(2 * x) + 0.1 * rng.standard_normal((n, d))
    if sphere:
        x, y = (p / np.linalg.norm(p, axis=1, keepdims=True) for p in (x, y))
    return (torch.from_numpy(p).float().to(dtype) for p in (x, y))


def gap_and_gradient(cost, n, d, dtype, **options):
    x, y = mapped_samples(n, d, dtype, sphere="geodesic" in str(cost))
    y.requires_grad_()
    gap = monge_gap(x, y, cost=cost, max_iterations=20_000, **options)
    (gradient,) = torch.autograd.grad(gap, y)
    return gap.detach().double(), gradient.double()


ALL_COSTS = [costs.resolve(c) for c in COSTS.values() if isinstance(c, str)]
all_costs = pytest.mark.parametrize("cost", ALL_COSTS, ids=str)


@pytest.mark.parametrize(
    ("n", "d"),
    [
        (256, 2),
        (256, 128),
        (1024, 8),
        *(pytest.param(n, d, marks=pytest.mark.slow) for n, d in [(1024, 2), (1024, 128), (4096, 2), (4096, 32)]),
    ],
)
@all_costs
def test_float32_is_as_good_as_float64(cost, n, d):
    options = {"relative_epsilon": 0.01, "tolerance": 1e-5}
    gap, gradient = gap_and_gradient(cost, n, d, torch.float32, **options)
    expected_gap, expected = gap_and_gradient(cost, n, d, torch.float64, **options | {"tolerance": 1e-7})
    assert float((gap - expected_gap).abs() / expected_gap.abs()) <= 1e-4
    assert float((gradient - expected).norm() / expected.norm()) <= 1e-4


@pytest.mark.filterwarnings("ignore::lightning_gap.monge.ot.result.ConvergenceWarning")
@pytest.mark.parametrize("solver", ["dense", pytest.param("blocked", marks=pytest.mark.slow)])
@pytest.mark.parametrize("d", [2, 32])
@pytest.mark.parametrize("share", [1e-3, 1e-4])
@all_costs
def test_float32_bears_tiny_epsilons(cost, share, d, solver):
    x, y = mapped_samples(128, d, torch.float32, sphere=cost.name == "geodesic")
    y.requires_grad_()
    result = optimal_transport(x, y, cost=cost, relative_epsilon=share, max_iterations=1000, solver=solver)
    (gradient,) = torch.autograd.grad(result.value, y)
    assert gradient.isfinite().all()
    value, mean_cost = float(result.value.detach()), float(cost.pairwise(x, y.detach()).mean())
    exact = float(optimal_transport(x, y.detach(), cost=cost, solver="exact").value)
    # Slower is allowed, wrong is not: the dual value is never above the optimum, and reaches it where it converged.
    assert value <= exact + result.epsilon * math.log(128) + 1e-5 * mean_cost
    # Potentials of 1e4 epsilons have three digits behind the point in float32, and so has the plan.
    columns = result.plan().sum(0)
    assert float((columns - 1 / 128).abs().sum()) == pytest.approx(result.marginal_error, rel=0.1, abs=5e-3)
    if result.converged:
        assert value >= exact - 2e-3 * mean_cost


@pytest.mark.filterwarnings("ignore::lightning_gap.monge.ot.result.ConvergenceWarning")
def test_extrapolation_does_not_leave_the_range_of_the_costs():
    # Where it did, potentials of 1e9 epsilons hid the marginal error behind their rounding.
    x, y = mapped_samples(128, 32, torch.float32)
    result = optimal_transport(x, y, relative_epsilon=1e-4, max_iterations=200, solver="blocked")
    largest = float((x[:, None] - y).square().sum(-1).max())
    assert float(result.f.abs().max()) <= 2 * largest
    assert result.plan().isfinite().all()


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean"])
@pytest.mark.parametrize("relative_epsilon", [0.1, 0.03])
def test_values_are_those_of_converged_geomloss(cost, relative_epsilon):
    from geomloss import SamplesLoss

    x, y = mapped_samples(200, 2, torch.float64)
    result = optimal_transport(x, y, cost=cost, relative_epsilon=relative_epsilon, tolerance=1e-8)
    # GeomLoss's squared cost has a half, and its epsilon is blur ** p.
    p, factor, blur = (2, 2, math.sqrt(result.epsilon / 2)) if cost == "sqeuclidean" else (1, 1, result.epsilon)
    loss = SamplesLoss("sinkhorn", p=p, blur=blur, scaling=0.997, debias=False, backend="tensorized")
    assert float(result.value) == pytest.approx(float(factor * loss(x, y)), rel=1e-4)
