"""Every solver against a slow obvious one: Sinkhorn's updates in the log domain, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gap import costs, monge_gap, sinkhorn_divergence
from lightning_gap.monge import divergence_and_gap
from lightning_gap.monge.ot.epsilon import Epsilon
from lightning_gap.monge.ot.limits import LIMITS, Size
from lightning_gap.monge.ot.options import SolverOptions
from lightning_gap.monge.ot.problem import Problem
from lightning_gap.monge.ot.result import ConvergenceWarning
from lightning_gap.monge.ot.solve import optimal_transport, solve_all
from lightning_gap.monge.ot.solvers import sinkhorn as sinkhorn_solver

# Compiles C++ on first use.
FUSED = pytest.param("fused", marks=pytest.mark.compiler)

MAHALANOBIS = "mahalanobis(factor=((1.0, 0.5, 0.0), (0.0, 0.3, -0.7)))"
COSTS = [
    "sqeuclidean",
    "euclidean",
    "pnorm(p=1.5)",
    "sqpnorm(p=3)",
    "elastic(lam=0.5)",
    "cosine",
    "geodesic",
    MAHALANOBIS,
]


def sinkhorn(C, a, b, epsilon, rho=None, sweeps=20_000):
    """Value and plan by alternating soft minima, until they stand still."""
    damping = 1 if rho is None else rho / (rho + epsilon)
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    for _ in range(sweeps):
        last = f
        f = -damping * epsilon * torch.logsumexp(b.log() + (g - C) / epsilon, dim=1)
        g = -damping * epsilon * torch.logsumexp(a.log()[:, None] + (f[:, None] - C) / epsilon, dim=0)
        if float((f - last).abs().max()) < 1e-10 * epsilon:
            break
    plan = a[:, None] * b * torch.exp((f[:, None] + g - C) / epsilon)

    def divergence(p, q):
        return (torch.xlogy(p, p) - torch.xlogy(p, q) - p + q).sum()

    value = (plan * C).sum() + epsilon * divergence(plan, a[:, None] * b)
    if rho is not None:
        value = value + rho * (divergence(plan.sum(1), a) + divergence(plan.sum(0), b))
    return value, plan


def problem(n, m, *, cost="sqeuclidean", weighted=False, dtype=torch.float64, d=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    y = 0.8 * torch.randn(m, d, dtype=torch.float64, generator=generator) + 0.5
    a, b = torch.rand(n, generator=generator).double(), torch.rand(m, generator=generator).double()
    if cost == "geodesic":
        x, y = (p / p.norm(dim=1, keepdim=True) for p in (x, y))
    if not weighted:
        a, b = torch.ones_like(a), torch.ones_like(b)
    else:
        a[1], b[:2] = 0, 0
    # The rounded problem is the problem.
    return tuple(t.to(dtype) for t in (x, y, a / a.sum(), b / b.sum()))


def check(cost, dtype, solver, *, n=40, m=33, weighted=True, rho=None, share=0.1, close=None):
    x, y, a, b = problem(n, m, cost=cost, weighted=weighted, dtype=dtype)
    C = costs.resolve(cost).pairwise(x.double(), y.double())
    epsilon = share * float(C.mean())
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    options = {"tolerance": tolerance, "max_iterations": 20_000} if solver in ("dense", "blocked", "fused") else {}
    result = optimal_transport(x, y, cost=cost, epsilon=epsilon, weights=(a, b), rho=rho, solver=solver, **options)
    # Masses that differ by a rounding would let the potentials drift for ever.
    a, b = (w.double() / w.double().sum() for w in (a, b))
    value, plan = sinkhorn(C, a, b, epsilon, rho)
    close = close or (1e-7 if dtype == torch.float64 else 1e-4)
    assert float(result.value) == pytest.approx(float(value), rel=close)
    assert float((result.plan().double() - plan).abs().sum()) <= 100 * close * float(plan.sum())
    assert result.value.dtype == dtype
    return result


@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("solver", ["dense", "blocked", FUSED])
@pytest.mark.parametrize("cost", COSTS)
def test_our_solvers_are_sinkhorn(cost, solver, dtype, weighted):
    assert check(cost, dtype, solver, weighted=weighted).converged


@pytest.mark.parametrize("solver", ["dense", "blocked", FUSED])
@pytest.mark.parametrize("rho", [0.1, 3.0])
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine"])
def test_soft_marginals(cost, rho, solver):
    check(cost, torch.float64, solver, rho=rho)


@pytest.mark.parametrize("solver", ["dense", "blocked", FUSED])
@pytest.mark.parametrize(("n", "m"), [(270, 260), (300, 261), (100, 400)])
def test_coarse_starts(n, m, solver):
    assert check("sqeuclidean", torch.float64, solver, n=n, m=m).converged


@pytest.mark.parametrize("solver", ["dense", "blocked", FUSED])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 7), (7, 1), (2, 3)])
def test_few_points(n, m, solver):
    check("sqeuclidean", torch.float64, solver, n=n, m=m, weighted=False, share=0.1)


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "sqpnorm(p=3)", "cosine"])
def test_functions_are_costs_too(cost):
    named = costs.resolve(cost)
    x, y, a, b = problem(40, 33, weighted=True)
    options = {"weights": (a, b), "tolerance": 1e-9, "max_iterations": 20_000}
    expected = optimal_transport(x, y, cost=named, **options).value
    torch.testing.assert_close(optimal_transport(x, y, cost=named.elementwise, **options).value, expected)


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.parametrize(
    ("solver", "cost"), [("online", "sqeuclidean"), ("online", "euclidean"), ("multiscale", "sqeuclidean")]
)
def test_keops_comes_near(solver, cost):
    check(cost, torch.float64, solver, share=0.1, weighted=False, close=2e-2)


@pytest.mark.parametrize("rho", [None, 1.0])
def test_more_than_one_block(rho, monkeypatch):
    whole = check("euclidean", torch.float64, "blocked", rho=rho)
    monkeypatch.setattr(LIMITS, "block", Size(7 * 33, 0))
    blocks = check("euclidean", torch.float64, "blocked", rho=rho)
    torch.testing.assert_close(blocks.value, whole.value, rtol=1e-12, atol=0)
    torch.testing.assert_close(blocks.plan(), whole.plan())


def far_off(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    x, y = (
        torch.randn(n, 2, generator=generator, dtype=torch.float64).div(
            torch.randn(n, 1, generator=generator, dtype=torch.float64)
        )
        for n in (300, 280)
    )
    return x.to(dtype), y.to(dtype)


@pytest.mark.parametrize("solver", ["dense", "blocked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", [2, 4, 5])
def test_outliers_that_leave_a_little_mass_over(monkeypatch, solver, dtype, seed):
    """Two points far off answer each other, and weigh a three-hundredth and another: sweeps would take for ever."""
    monkeypatch.setattr(sinkhorn_solver, "solve_natively", lambda *_: None)
    x, y = far_off(seed, dtype)
    result = optimal_transport(x, y, relative_epsilon=0.02, solver=solver)
    assert result.converged
    C = costs.SqEuclidean().pairwise(x.double(), y.double()) / result.epsilon
    f, g = (potential.double() / result.epsilon for potential in (result.f, result.g))
    answer = -torch.logsumexp(g - C - math.log(280), 1)
    # Costs of many epsilons are rounded to a part of one in float32.
    assert float((f - answer).abs().max()) < (0.5 if dtype == torch.float32 else 1e-6)


@pytest.mark.filterwarnings("ignore:solver='dense' stopped")
@pytest.mark.parametrize("seed", [2, 4])
@pytest.mark.parametrize("share", [0.02, 0.005])
@pytest.mark.parametrize("most", [600, 2000])
def test_tensors_leap_from_where_an_extrapolation_led_astray(monkeypatch, seed, share, most):
    """What a GPU runs: it asks some rounds later, when nothing may be left of a column in float32."""
    monkeypatch.setattr(LIMITS, "numpy", frozenset())
    monkeypatch.setattr(sinkhorn_solver, "solve_natively", lambda *_: None)
    x, y = far_off(seed, torch.float32)
    result = optimal_transport(x, y, relative_epsilon=share, max_iterations=most)
    assert math.isfinite(result.marginal_error)
    assert result.converged == (result.marginal_error <= 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("solver", ["dense", "blocked", FUSED])
@pytest.mark.parametrize("share", [1e-2, 1e-3])
def test_clusters_far_apart(share, solver, dtype):
    # Columns that no row rhoes within the format's range at first.
    x, y, _, _ = problem(40, 40, dtype=dtype)
    x[20:] += 50
    y[10:] += 50
    x[30:] -= 200
    result = optimal_transport(x, y, relative_epsilon=share, solver=solver, max_iterations=20_000)
    assert result.converged
    exact = float(optimal_transport(x, y, solver="exact").value)
    slack = 2e-3 * float((x[:, None] - y).square().sum(-1).max())
    assert exact - slack <= float(result.value) <= exact + result.epsilon * math.log(40) + slack


@pytest.mark.parametrize("solver", ["dense", "blocked", FUSED])
@pytest.mark.parametrize("rho", [None, 0.5])
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine"])
def test_a_measure_against_itself_is_the_general_problem(cost, rho, solver):
    x, _, a, _ = problem(60, 60, weighted=True)
    options = {"cost": cost, "relative_epsilon": 0.02, "rho": rho, "solver": solver}
    options |= {"tolerance": 1e-9, "max_iterations": 20_000}
    own = x.clone().requires_grad_()
    itself = optimal_transport(own, own, weights=(a, a), **options)
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    general = optimal_transport(first, second, weights=(a, a.clone()), **options)
    torch.testing.assert_close(itself.value, general.value, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(itself.plan(), general.plan(), rtol=1e-4, atol=1e-8)
    (gradient,) = torch.autograd.grad(itself.value, own)
    both = torch.autograd.grad(general.value, (first, second))
    torch.testing.assert_close(gradient, both[0] + both[1], rtol=1e-5, atol=1e-8)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 60),
    m=st.integers(1, 60),
    d=st.integers(1, 6),
    scale=st.floats(-3, 3).map(lambda s: 10**s),
    share=st.sampled_from([1.0, 0.1, 0.02]),
    cost=st.sampled_from(["sqeuclidean", "euclidean", "elastic", "pnorm(p=1.5)"]),
    solver=st.sampled_from(["dense", "blocked"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_the_plan_has_the_marginals_that_it_claims(n, m, d, scale, share, cost, solver, dtype, seed):
    x, y, a, b = problem(n, m, d=d, dtype=dtype, seed=seed, weighted=min(n, m) > 3)
    x, y = scale * x, scale * y
    options = {"cost": cost, "relative_epsilon": share, "solver": solver, "max_iterations": 20_000, "strict": True}
    result = optimal_transport(x, y, weights=(a, b), **options)
    assert result.value.isfinite()
    plan = result.plan().double()
    error = (plan.sum(0) - b.double()).abs().sum() + (plan.sum(1) - a.double()).abs().sum()
    assert float(error) <= 1e-3 * 1.1 + 1e-4
    assert float(error) == pytest.approx(result.marginal_error, rel=0.1, abs=1e-4)

    order, other = torch.randperm(n), torch.randperm(m)
    shuffled = optimal_transport(x[order], y[other], weights=(a[order], b[other]), **options)
    # Both are within their marginal errors of the one optimum.
    spread = float(costs.resolve(cost).pairwise(x, y).max())
    assert float(shuffled.value) == pytest.approx(float(result.value), rel=1e-3, abs=2e-3 * spread)


def assert_alike(together, alone):
    for name in ("value", "f", "g"):
        torch.testing.assert_close(getattr(together, name), getattr(alone, name), rtol=1e-6, atol=1e-8)
    assert (together.iterations, together.converged) == (alone.iterations, alone.converged)
    assert together.marginal_error == pytest.approx(alone.marginal_error, rel=1e-3)


def problems(shares, *, rho=None, n=60, m=50):
    """Problems of one shape that are as hard as their epsilons, with a cost and weights of their own."""
    found = []
    for seed, share in enumerate(shares):
        x, y, a, b = problem(n, m, weighted=seed % 2 == 1, seed=seed)
        cost = costs.resolve(("sqeuclidean", "euclidean", "elastic(lam=0.5)")[seed % 3])
        found.append(Problem(x.requires_grad_(), y.requires_grad_(), a, b, cost, Epsilon(share=share), rho))
    return found


@pytest.mark.parametrize("rho", [None, 1.0])
def test_problems_that_are_solved_together_are_those_solved_alone(rho):
    # All start from zeros here, so that nothing but the sweeps could differ.
    options = SolverOptions("dense", 1e-7, 5000)
    given = problems([0.5, 0.1, 0.3, 0.05], rho=rho)
    together = solve_all(given, options)
    assert len({result.iterations for result in together}) > 1
    for p, result in zip(given, together, strict=True):
        (alone,) = solve_all([p], options)
        assert_alike(result, alone)
        inputs = p.x, p.y
        for ours, theirs in zip(
            torch.autograd.grad(result.value, inputs), torch.autograd.grad(alone.value, inputs), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("n", [60, 300], ids=["annealed", "coarse"])
def test_a_hard_problem_beside_an_easy_one(n):
    options = SolverOptions("dense", 1e-8, 5000)
    given = problems([0.5, 0.003, 0.5], n=n, m=n)
    for p, result in zip(given, solve_all(given, options), strict=True):
        assert result.converged
        (alone,) = solve_all([p], options)
        torch.testing.assert_close(result.value, alone.value, rtol=1e-7, atol=0)


def test_one_problem_starts_anew_while_its_neighbour_goes_on():
    # Clusters that no zero potential rhoes in float32, beside a problem that is solved at once.
    x, y, a, b = problem(40, 40, dtype=torch.float32)
    far_x, far_y = x.clone(), y.clone()
    far_x[20:] += 50
    far_y[10:] += 50
    cost = costs.resolve("sqeuclidean")
    near = Problem(x, y, a, b, cost, Epsilon(1.0))
    far = Problem(far_x, far_y, a, b, cost, Epsilon(1.0))
    options = SolverOptions("dense", 1e-4, 5000)
    easy, hard = solve_all([near, far], options)
    assert easy.converged
    assert hard.converged
    assert_alike(easy, solve_all([near], options)[0])


def test_not_every_problem_of_a_batch_need_converge():
    given = problems([0.5, 1e-3], n=30, m=30)
    with pytest.warns(ConvergenceWarning, match="stopped with a marginal error"):
        easy, hard = solve_all(given, SolverOptions("dense", 1e-10, 60))
    assert (easy.converged, hard.converged) == (True, False)
    assert hard.marginal_error > 1e-10


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_workers_share_the_blocks(threads, symmetric, monkeypatch):
    x, y, a, b = problem(40, 40 if symmetric else 33, weighted=True)
    y, b = (x, a) if symmetric else (y, b)
    p = Problem(x, y, a, b, costs.resolve("sqeuclidean"), Epsilon(0.5))
    (expected,) = solve_all([p], SolverOptions("dense", 1e-9, 5000))
    monkeypatch.setattr(LIMITS, "block", Size(7 * 33, 0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        (found,) = solve_all([p], SolverOptions("blocked", 1e-9, 5000))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found.value, expected.value, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.plan(), expected.plan(), rtol=1e-5, atol=1e-9)


def test_both_terms_together_are_each_alone():
    x, y, _, _ = problem(80, 80)
    mapped = (x * 0.7 + 0.3).requires_grad_()
    options = {"tolerance": 1e-9, "max_iterations": 5000}
    divergence, gap = divergence_and_gap(
        x, mapped, y, fitting_epsilon=0.3, cost="euclidean", gap_epsilon=0.05, rho=2.0, **options
    )
    alone = (
        sinkhorn_divergence(mapped, y, epsilon=0.3, rho=2.0, **options),
        monge_gap(x, mapped, cost="euclidean", epsilon=0.05, **options),
    )
    for ours, theirs in zip((divergence, gap), alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
        found, expected = (torch.autograd.grad(value, mapped)[0] for value in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("solver", ["dense", "blocked", FUSED])
@pytest.mark.parametrize("rho", [None, 1.0])
@pytest.mark.parametrize("n", [60, 300])
def test_tensors_and_arrays_take_the_same_arithmetic(n, rho, solver, monkeypatch):
    """What a GPU runs: vectors that are tensors."""
    given = problems([0.3, 0.02], n=n, m=n, rho=rho)
    x, _, a, _ = problem(n, n)
    given.append(Problem(x.requires_grad_(), x, a, a, costs.resolve("sqeuclidean"), Epsilon(0.3), rho))
    options = SolverOptions(solver, 1e-7, 5000)
    expected = solve_all(given, options)
    monkeypatch.setattr(LIMITS, "numpy", frozenset())
    for p, arrays, tensors in zip(given, expected, solve_all(given, options), strict=True):
        torch.testing.assert_close(tensors.value, arrays.value, rtol=1e-9, atol=0)
        found, awaited = (torch.autograd.grad(result.value, p.x)[0] for result in (tensors, arrays))
        torch.testing.assert_close(found, awaited, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("solver", ["dense", "blocked", FUSED])
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean"])
def test_epsilon_relative_to_the_standard_deviation(cost, solver):
    x, y, _, _ = problem(40, 33)
    spread = float(costs.resolve(cost).pairwise(x, y).std(correction=0))
    result = optimal_transport(x, y, cost=cost, relative_epsilon=0.1, relative_to="std", solver=solver)
    assert result.epsilon == pytest.approx(0.1 * spread, rel=1e-9)
    with pytest.raises(ValueError, match="relative_to must be one of mean, std, typical, got 'median'"):
        optimal_transport(x, y, cost=cost, relative_to="median", solver=solver)


def test_the_name_of_a_solver_that_is_no_more_runs_another():
    x, y, _, _ = problem(40, 33)
    with pytest.warns(DeprecationWarning, match="solver='dense', which takes the same memory"):
        result = optimal_transport(x, y, solver="tensorized")
    assert result.solver == "dense"
    assert torch.equal(result.value, optimal_transport(x, y, solver="dense").value)
