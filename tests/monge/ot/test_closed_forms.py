"""Transport problems whose answer is known without a solver."""

import math

import pytest
import torch

from lightning_gap import costs, monge_gap, sinkhorn_divergence
from lightning_gap.monge.ot.solve import optimal_transport

# Compiles C++ on first use.
FUSED = pytest.param("fused", marks=pytest.mark.compiler)

N, D = 80, 3
TIGHT = {"tolerance": 1e-9, "max_iterations": 20_000}


def draw(n=N, d=D, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def bent(x):
    """A map that is no gradient of a convex function."""
    return x.flip(1) + 0.5 * x.sin()


def test_in_one_dimension_exact_transport_sorts():
    x, y = draw(d=1), draw(d=1, seed=1) * 2 + 1
    ascending = x.sort(dim=0).values, y.sort(dim=0).values
    for cost in ("sqeuclidean", "euclidean", "pnorm(p=1.5)", "pnorm(p=3)", "elastic(lam=0.5)"):
        expected = costs.resolve(cost).paired(*ascending).mean()
        value = optimal_transport(x, y, cost=cost, solver="exact").value
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_translation_is_optimal_and_costs_its_square():
    x, shift = draw(), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    value = optimal_transport(x, x + shift, solver="exact").value
    torch.testing.assert_close(value, shift.square().sum(), rtol=1e-12, atol=0)


def test_translation_adds_to_the_entropic_value():
    # |x - y - t|² = |x - y|² - 2<x - y, t> + |t|², whose middle term only depends on the means.
    x, y = draw(), bent(draw(seed=1))
    shift = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    value, shifted = (optimal_transport(x, z, epsilon=0.3, **TIGHT).value for z in (y, y + shift))
    expected = value - 2 * (x.mean(0) - y.mean(0)) @ shift + shift.square().sum()
    torch.testing.assert_close(shifted, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    ("cost", "degree"), [("sqeuclidean", 2), ("euclidean", 1), ("pnorm(p=1.5)", 1.5), ("sqpnorm(p=3)", 2)]
)
def test_values_scale_with_the_cost(cost, degree):
    x, y = draw(), bent(draw(seed=1))
    value = optimal_transport(x, y, cost=cost, epsilon=0.2, **TIGHT).value
    scaled = optimal_transport(3 * x, 3 * y, cost=cost, epsilon=0.2 * 3**degree, **TIGHT).value
    torch.testing.assert_close(scaled, value * 3**degree, rtol=1e-8, atol=0)


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "pnorm(p=1.5)", "elastic", "cosine"])
def test_gap_of_the_identity(cost):
    x = draw()
    debiased = monge_gap(x, x.clone(), cost=cost, convention="debiased", **TIGHT)
    torch.testing.assert_close(debiased, torch.zeros_like(debiased), rtol=0, atol=1e-9)
    exact = monge_gap(x, x.clone(), cost=cost, solver="exact")
    torch.testing.assert_close(exact, torch.zeros_like(exact), rtol=0, atol=1e-12)


def test_gradients_of_convex_functions_have_no_gap():
    x = draw()
    A = draw(D, D, seed=2)
    positive = A @ A.T
    for mapped in (x @ positive, x.exp(), x * x.square().sum(1, keepdim=True), torch.softmax(x, dim=1)):
        gap = monge_gap(x, mapped, solver="exact")
        assert abs(float(gap)) <= 1e-12 * float((x - mapped).square().sum(1).mean())
    rotation = torch.tensor([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]], dtype=torch.float64)
    assert monge_gap(x, x @ rotation, solver="exact") > 0.1


@pytest.mark.parametrize("weighted", [False, True])
def test_conventions_differ_by_entropies(weighted):
    x = draw()
    weights = torch.softmax(draw(d=1, seed=4)[:, 0], dim=0) if weighted else None
    shannon, kl = (
        monge_gap(x, bent(x), epsilon=0.1, weights=weights, convention=c, **TIGHT) for c in ("shannon", "kl")
    )
    entropy = torch.special.entr(weights).sum() if weighted else math.log(N)
    torch.testing.assert_close(shannon - kl, torch.as_tensor(2 * 0.1 * entropy, dtype=torch.float64))


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "elastic", "cosine"])
@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.01])
def test_entropy_bounds_the_gap(cost, epsilon):
    x = draw()
    gap = monge_gap(x, bent(x), cost=cost, epsilon=epsilon, **TIGHT)
    exact = monge_gap(x, bent(x), cost=cost, solver="exact")
    slack = 1e-7
    assert exact + epsilon * math.log(N) - slack <= gap <= exact + 2 * epsilon * math.log(N) + slack


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean"])
@pytest.mark.parametrize("epsilon", [1.0, 0.05])
def test_divergence_is_a_symmetric_distance(cost, epsilon):
    x, y = draw(), bent(draw(n=50, seed=1))
    options = {"cost": cost, "epsilon": epsilon, **TIGHT}
    there, back = sinkhorn_divergence(x, y, **options), sinkhorn_divergence(y, x, **options)
    torch.testing.assert_close(there, back, rtol=1e-7, atol=0)
    assert there > 0
    assert abs(float(sinkhorn_divergence(x, x.clone(), **options))) <= 1e-8
    near = sinkhorn_divergence(x, x + 1e-2, **options)
    assert 0 < near < 1e-1


def test_gap_is_convex_in_the_map():
    x = draw()
    first, second = bent(x), 2 * x.roll(1, dims=1) - 1
    values = [
        float(monge_gap(x, (1 - t) * first + t * second, epsilon=0.1, **TIGHT))
        for t in torch.linspace(0, 1, 9).tolist()
    ]
    middles = [(left + right) / 2 - middle for left, middle, right in zip(values, values[1:], values[2:], strict=False)]
    assert min(middles) >= -1e-8
    assert max(middles) > 1e-4


@pytest.mark.parametrize("solver", ["dense", "blocked", FUSED])
@pytest.mark.parametrize("epsilon", [2.0, 0.5, 0.1, 0.02])
def test_two_points_have_a_logistic_plan(epsilon, solver):
    # Two points a side: the plan is [[p, q], [q, p]] / 2 with p / q = exp(Δ / ε), 2Δ = c01 + c10 - c00 - c11.
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    y = torch.tensor([[0.2], [1.5]], dtype=torch.float64)
    C = (x - y.T).square()
    delta = (C[0, 1] + C[1, 0] - C[0, 0] - C[1, 1]) / 2
    p = torch.sigmoid(delta / epsilon)
    plan = torch.stack([torch.stack([p, 1 - p]), torch.stack([1 - p, p])]) / 2
    expected = (plan * C).sum() + epsilon * (torch.xlogy(plan, plan).sum() + 2 * math.log(2))
    result = optimal_transport(x, y, epsilon=epsilon, solver=solver, tolerance=1e-8)
    torch.testing.assert_close(result.plan(), plan, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(result.value, expected, rtol=1e-8, atol=0)
    torch.testing.assert_close(result.transport_cost(), (plan * C).sum(), rtol=1e-6, atol=0)


def test_one_point_sends_all_its_mass():
    x, y = torch.zeros(1, 2, dtype=torch.float64), draw(d=2)
    result = optimal_transport(x, y, epsilon=0.1, tolerance=1e-10)
    torch.testing.assert_close(result.value, y.square().sum(1).mean())
    torch.testing.assert_close(result.plan(), torch.full((1, N), 1 / N, dtype=torch.float64))


def gaussian_entropic_cost(a, b, epsilon):
    """OT_ε of centred Gaussians for the cost |x - y|² (Janati et al. 2020, theorem 1, with 2σ² = ε)."""

    def root(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return vectors * values.clamp_min(0).sqrt() @ vectors.T

    d, variance = len(a), epsilon / 2
    half = root(a)
    D = root(4 * half @ b @ half + variance**2 * torch.eye(d, dtype=a.dtype))
    bures = torch.trace(a) + torch.trace(b) - torch.trace(D) + d * variance * (1 - math.log(2 * variance))
    return bures + variance * torch.logdet(D + variance * torch.eye(d, dtype=a.dtype))


def test_gaussians():
    # Sampling error: over ten draws, the standard deviation is below 2 % of the value at n = 2000.
    a = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=torch.float64)
    b = torch.tensor([[2.0, -0.4], [-0.4, 1.0]], dtype=torch.float64)
    x, y = draw(4000, 2) @ torch.linalg.cholesky(a).T, draw(4000, 2, seed=1) @ torch.linalg.cholesky(b).T
    for epsilon in (0.5, 2.0):
        value = optimal_transport(x.float(), y.float(), epsilon=epsilon).value
        assert float(value) == pytest.approx(float(gaussian_entropic_cost(a, b, epsilon)), rel=0.06)
