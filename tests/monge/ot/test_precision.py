"""Float32 against float64, for every cost and both quantities: coincident and near points, far clouds, far clusters."""

from functools import cache

import pytest
import torch
from checkered import checkered
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gap import costs, monge_gap, sinkhorn_divergence
from lightning_gap.monge import energy_distance, optimal_transport

# Compiles C++ on first use.
FUSED = pytest.param("fused", marks=pytest.mark.compiler)

COSTS = [
    "sqeuclidean",
    "euclidean",
    "pnorm(p=1.0)",
    "pnorm(p=1.5)",
    "sqpnorm(p=1.5)",
    "sqpnorm(p=3)",
    "elastic",
    "cosine",
    "geodesic",
    lambda x, y: (1 + (x - y).square().sum(-1)).sqrt() - 1,
]
NAMES = [cost if isinstance(cost, str) else "callable" for cost in COSTS]
PLACES = ["plain", "coincident", "near", "far from the origin", "clusters"]
QUANTITIES = {
    "gap": lambda x, y, a, b, cost: monge_gap(x, y[: len(x)], cost=cost, relative_epsilon=0.05),
    "debiased": lambda x, y, a, b, cost: monge_gap(
        x, y[: len(x)], cost=cost, relative_epsilon=0.05, convention="debiased"
    ),
    "divergence": lambda x, y, a, b, cost: sinkhorn_divergence(x, y, cost=cost),
    "weighted": lambda x, y, a, b, cost: sinkhorn_divergence(x, y, cost=cost, weights=(a, b)),
    "unbalanced": lambda x, y, a, b, cost: sinkhorn_divergence(
        x, y, cost=cost, rho=float(costs.resolve(cost).mean(x, y))
    ),
    "blocked": lambda x, y, a, b, cost: sinkhorn_divergence(x, y, cost=cost, solver="blocked"),
}


def draw(place, cost, n=60, d=3, seed=0):
    """Float32 samples and weights: what they are is the problem, in both precisions."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(n, d, generator=generator), torch.randn(n + 7, d, generator=generator)
    y = torch.cat([x, x[:7]]) * 0.8 + 0.3 * noise + 0.5
    if place == "coincident":
        y[: n // 2] = x[: n // 2]
        x[-1] = x[0]
    elif place == "near":
        y[: n // 2] = x[: n // 2] * (1 + 1e-6)
        x[-1] = x[0] + 1e-6
    elif place == "far from the origin":
        x, y = x + 1000, y + 1000
    elif place == "clusters":
        x[::2] += 1000
        y[::2] += 1000
    if cost == "geodesic":
        x, y = (points / points.double().norm(dim=1, keepdim=True).float() for points in (x, y))
    a, b = torch.rand(n, generator=generator) + 0.1, torch.rand(n + 7, generator=generator) + 0.1
    a[2] = 0
    return x, y, a / a.sum(), b / b.sum()


def value_and_gradient(quantity, cost, samples, dtype):
    x, y, a, b = (t.to(dtype, copy=True) for t in samples)
    x, y = x.requires_grad_(), y.requires_grad_()
    value = QUANTITIES[quantity](x, y, a / a.sum(), b / b.sum(), cost)
    gradients = torch.autograd.grad(value, (x, y))
    return value.detach().double(), torch.cat([g.double() for g in gradients])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("cost", COSTS, ids=NAMES)
def test_float32_gradients_are_those_of_float64(cost, quantity, place):
    samples = draw(place, cost)
    (value, gradient), (expected, right) = (
        value_and_gradient(quantity, cost, samples, dtype) for dtype in (torch.float32, torch.float64)
    )
    assert float((gradient - right).norm() / right.norm()) < 1e-3
    # A value is a difference of terms as large as the costs, of which float32 holds seven digits.
    size = costs.resolve(cost).pairwise(*(t.double() for t in samples[:2])).max()
    assert float(value) == pytest.approx(float(expected), rel=1e-3, abs=1e-7 * float(size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("cost", COSTS, ids=NAMES)
def test_every_form_of_a_cost_is_its_definition(cost, place, dtype):
    x, y, _, _ = draw(place, cost)
    cost = costs.resolve(cost)
    right = cost.elementwise(x.double()[:, None], y.double())
    x, y = x.to(dtype), y.to(dtype)
    # What float64 knows of differences: ten digits of each, however small.
    close = {"rtol": 2e-6, "atol": 1e-30} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-300}
    forms = {"pairwise": cost.pairwise(x, y)}
    if not isinstance(cost, costs.SqEuclidean | costs.Cosine):  # whose matrices are exact to a part of the largest cost
        forms["fill"] = cost.geometry.fill(x.new_empty(len(x), len(y)), x, y)
    if place == "near" and isinstance(cost, costs.CallableCost | costs.Cosine):
        return  # which form them from numbers of the order 1
    if isinstance(cost, costs.CallableCost | costs.PNorm | costs.SqPNorm | costs.Elastic) or dtype == torch.float32:
        close |= {"rtol": 1e-3 if place == "near" else 2e-5}
    for form, found in forms.items():
        torch.testing.assert_close(found.double(), right, **close, msg=lambda message, form=form: f"{form}: {message}")


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_point_is_no_distance_from_itself(dtype, offset):
    x = (torch.randn(200, 7, generator=torch.Generator().manual_seed(0)) + offset).to(dtype)
    x[::2] += 1000
    for cost in (costs.Euclidean(), costs.SqEuclidean(), costs.Cosine()):
        assert float(cost.pairwise(x, x).diagonal().abs().max()) == 0
        assert float(cost.pairwise(x[None], x[None]).diagonal(dim1=1, dim2=2).abs().max()) == 0
    assert float(costs.Euclidean().geometry.fill(torch.empty(200, 200, dtype=dtype), x, x).diagonal().max()) == 0
    assert float(energy_distance(x, x.clone()).abs()) <= 1e-12


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([c for c in COSTS if isinstance(c, str)]),
    st.sampled_from(sorted(QUANTITIES)),
    st.sampled_from(PLACES),
    st.integers(12, 120),
    st.sampled_from([1, 2, 10, 50]),
    st.integers(0, 10**6),
)
def test_float32_gradients_are_those_of_float64_at_any_size(cost, quantity, place, n, d, seed):
    # In one dimension there is no angle but 0 and a half turn.
    if (d == 1 and cost in ("cosine", "geodesic")) or (cost == "geodesic" and place == "clusters"):
        return
    samples = draw(place, cost, n, d, seed)
    (_, gradient), (_, right) = (
        value_and_gradient(quantity, cost, samples, dtype) for dtype in (torch.float32, torch.float64)
    )
    # Where nearly nothing is left of a difference, the solver's tolerance is all there is.
    assert float((gradient - right).norm()) < max(1e-3 * float(right.norm()), 5e-5)


def gradient(value_of, points):
    points = points.clone().requires_grad_()
    return torch.autograd.grad(value_of(points), points)[0].double()


@cache
def converged(noise, d, cost):
    """Samples, and the gradients of their gap and of what they pay, in which no solver and no precision has a say."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, d, generator=generator, dtype=torch.float64)
    y = 1.3 * x + 3 + noise * torch.randn(256, d, generator=generator, dtype=torch.float64)
    right = gradient(lambda mapped: monge_gap(x, mapped, cost=cost, tolerance=1e-9, max_iterations=20_000), y)
    return x, y, right, gradient(lambda mapped: costs.resolve(cost).paired(x, mapped).mean(), y)


@pytest.mark.parametrize("solver", ["dense", "blocked", FUSED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@checkered(noise=[0.0, 1e-3, 0.1, 1.0], d=[2, 10, 50], cost=["sqeuclidean", "euclidean", "pnorm(p=1.5)", "elastic"])
def test_the_gaps_gradient_is_known_to_a_small_part_of_what_is_paid(noise, d, cost, dtype, solver):
    x, y, right, paid = converged(noise, d, cost)
    found = gradient(lambda mapped: monge_gap(x.to(dtype), mapped, cost=cost, solver=solver), y.to(dtype))
    assert float((found - right).norm() / paid.norm()) < 5e-5


@pytest.mark.parametrize("solver", ["dense", "blocked", FUSED])
@pytest.mark.parametrize("rho", [1.0, 100.0, 1000.0, 1e5])
def test_unequal_masses_with_any_rho(rho, solver):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, generator=generator).double()
    y = torch.randn(80, 2, generator=generator).double() + 3
    b = torch.full((80,), 5 / 80).double()
    options = {"epsilon": 0.1, "weights": (None, b), "rho": rho, "solver": solver}
    result = optimal_transport(x, y, **options)
    right = optimal_transport(x, y, **options, tolerance=1e-8, max_iterations=100_000)
    assert result.converged
    assert float(result.value) == pytest.approx(float(right.value), rel=1e-6)
    # The duality gap of the plan that its potentials give: primal and dual values agree.
    plan, a = result.plan(), torch.full((60,), 1 / 60).double()

    def divergence(p, q):
        return float((torch.xlogy(p, p) - torch.xlogy(p, q) - p + q).sum())

    primal = float(result.transport_cost()) + 0.1 * divergence(plan, torch.outer(a, b))
    primal += rho * (divergence(plan.sum(1), a) + divergence(plan.sum(0), b))
    assert primal == pytest.approx(float(result.value), rel=1e-4)


@pytest.mark.parametrize("epsilon", [1e2, 1e4, 1e8, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_large_epsilon_gives_the_limit(dtype, epsilon):
    x, y, _, _ = (t.to(dtype) for t in draw("plain", "sqeuclidean"))
    means = costs.SqEuclidean().mean
    limit = means(x, y) - means(x, x) / 2 - means(y, y) / 2
    assert float(sinkhorn_divergence(x, y, epsilon=epsilon)) == pytest.approx(limit, rel=0.2 if epsilon < 1e3 else 1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-18, 1e-6, 1e6, 1e15, 1e18, 1e22, 1e30])
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "pnorm(p=1.5)", "cosine"])
@pytest.mark.parametrize("function", [sinkhorn_divergence, monge_gap])
def test_any_scale_is_right_or_refused(function, cost, scale):
    x, y, _, _ = draw("plain", cost)
    y, refusal = y[: len(x)], ""
    try:
        found = float(function(x * scale, y * scale, cost=cost))
    except FloatingPointError as error:
        refusal = str(error)
    if refusal:
        assert "divide the samples by their scale" in refusal
        assert not 1e-10 < scale < 1e10
        return
    degree = {"sqeuclidean": 2, "euclidean": 1, "pnorm(p=1.5)": 1.5, "cosine": 0}[cost]
    right = float(function((x * scale).double(), (y * scale).double(), cost=cost))
    assert found == pytest.approx(right, rel=1e-2)
    if scale > 1e-12 and cost != "cosine":
        assert right == pytest.approx(float(function(x.double(), y.double(), cost=cost)) * scale**degree, rel=1e-3)


@pytest.mark.parametrize("solver", ["dense", "blocked", FUSED])
@pytest.mark.parametrize("rho", [1.0, 10.0, 30.0, 100.0, 1e4])
@pytest.mark.parametrize("masses", [(1.5, 1.0), (1.0, 1.5), (3.0, 1.0), (0.2, 1.0)])
def test_masses_that_differ_whichever_is_larger(masses, rho, solver):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(10, 2, generator=generator).double(), torch.rand(15, 2, generator=generator).double()
    a, b = (torch.full((len(p),), mass / len(p)).double() for p, mass in zip((x, y), masses, strict=True))
    options = {"epsilon": 0.02, "rho": rho, "solver": solver}
    result = optimal_transport(x, y, weights=(a, b), **options)
    back = optimal_transport(y, x, weights=(b, a), **options)
    assert result.converged
    assert float(result.value) == pytest.approx(float(back.value), rel=1e-6)
    plan = result.plan()
    ratio = plan / torch.outer(a, b)
    primal = (plan * (x[:, None] - y).square().sum(-1)).sum()
    primal = primal + 0.02 * ((plan * ratio.log()).sum() - plan.sum() + a.sum() * b.sum())
    for found, wanted in ((plan.sum(1), a), (plan.sum(0), b)):
        primal = primal + rho * ((found * (found / wanted).log()).sum() - found.sum() + wanted.sum())
    assert float(result.value) == pytest.approx(float(primal), rel=1e-5)


@pytest.mark.parametrize("solver", ["dense", "blocked"])
@pytest.mark.parametrize("shift", [-30.0, -2.0, -0.5, 5.0])
def test_a_constant_in_the_cost_is_one_in_the_value(shift, solver):
    x, y, _, _ = (t.double() for t in draw("plain", "sqeuclidean", n=20))

    def cost(p, q):
        return (p - q).square().sum(-1) + shift

    value = optimal_transport(x, y, cost=cost, epsilon=0.1, solver=solver).value
    right = optimal_transport(x, y, epsilon=0.1).value
    assert float(value) - shift == pytest.approx(float(right), abs=1e-6)


@pytest.mark.parametrize("far", [1e2, 1e8, 1e20])
@pytest.mark.parametrize("solver", ["dense", "blocked", FUSED, "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_samples_of_weight_zero_do_not_count(dtype, solver, far):
    x, y, _, _ = (t.to(dtype) for t in draw("plain", "sqeuclidean", n=30))
    y = y[: len(x)]
    w = torch.full((30,), 1 / 28, dtype=dtype)
    w[[4, 9]], kept = 0, w > 0
    kept[[4, 9]] = False
    far_x, far_y = x.clone(), y.clone()
    far_x[4], far_y[9] = far, -far
    options = {} if solver == "exact" else {"epsilon": 0.3}
    for found, right in (
        (
            monge_gap(far_x, far_y, weights=w, solver=solver, **options),
            monge_gap(x[kept], y[kept], solver=solver, **options),
        ),
        (
            sinkhorn_divergence(far_x, far_y, weights=(w, w), solver=solver, **options),
            sinkhorn_divergence(x[kept], y[kept], solver=solver, **options),
        ),
        (energy_distance(far_x, far_y, weights=(w, w)), energy_distance(x[kept], y[kept])),
    ):
        assert float(found) == pytest.approx(float(right), rel=1e-4)


@pytest.mark.parametrize("rho", [None, 0.5])
@pytest.mark.parametrize("solver", ["dense", "blocked", FUSED, "exact"])
def test_gradients_in_weights_of_which_some_are_zero(solver, rho):
    if solver == "exact":
        pytest.importorskip("ot")
        if rho is not None:
            return
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(6, 2, generator=generator).double(), torch.randn(8, 2, generator=generator).double()
    a, b = torch.rand(6, generator=generator).double() + 0.1, torch.rand(8, generator=generator).double()
    a[1], b = 0, b / b.sum()
    a = a / a.sum()
    options = {"solver": solver} if solver == "exact" else {"solver": solver, "epsilon": 0.2, "tolerance": 1e-9}

    def value(weights):
        return optimal_transport(x, y, weights=(weights, b), rho=rho, **options).value

    given = a.clone().requires_grad_()
    (found,) = torch.autograd.grad(value(given), given)
    for direction in ((1, 3), (4, 2)):
        step = torch.zeros_like(a)
        step[direction[0]], step[direction[1]] = 1e-5, -1e-5
        slope = float(value(a + step) - value(a)) / 1e-5
        assert float(found[direction[0]] - found[direction[1]]) == pytest.approx(slope, rel=1e-3, abs=1e-3)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.autograd.grad(value(given), given, create_graph=True)


@pytest.mark.parametrize("solver", ["dense", "blocked"])
@pytest.mark.parametrize("quantity", ["gap", "debiased", "divergence", "unbalanced"])
@pytest.mark.parametrize("form", ["closure", "module"])
def test_gradients_in_what_a_cost_learns(form, quantity, solver):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(12, 2, generator=generator).double(), torch.rand(12, 2, generator=generator).double() + 0.3
    matrix = torch.tensor([[1.3, 0.2], [0.0, 0.7]]).double()

    class Learned(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, p, q):
            return ((p - q) @ self.weight.T).square().sum(-1)

    def value(weight):
        cost = Learned(weight) if form == "module" else lambda p, q: ((p - q) @ weight.T).square().sum(-1)
        options = {"cost": cost, "epsilon": 0.2, "tolerance": 1e-10, "solver": solver}
        if quantity in ("gap", "debiased"):
            return monge_gap(x, y, convention="kl" if quantity == "gap" else quantity, **options)
        return sinkhorn_divergence(x, y, rho=0.5 if quantity == "unbalanced" else None, **options)

    weight = torch.nn.Parameter(matrix.clone())
    (found,) = torch.autograd.grad(value(weight), weight)
    for i, j in ((0, 0), (0, 1), (1, 1)):
        step = torch.zeros_like(matrix)
        step[i, j] = 1e-5
        slope = float(value(matrix + step) - value(matrix - step)) / 2e-5
        assert float(found[i, j]) == pytest.approx(slope, rel=1e-4, abs=1e-6)
    with pytest.raises(NotImplementedError, match="no second derivatives through a cost that learns"):
        torch.autograd.grad(value(weight), weight, create_graph=True)
