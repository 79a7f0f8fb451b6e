"""Exact transport over nearly tight pairs: against matrices, closed forms, and the proof that comes with a plan."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from lightning_gap import monge_gap
from lightning_gap.monge.ot.costs import CallableCost, resolve
from lightning_gap.monge.ot.limits import LIMITS, Size
from lightning_gap.monge.ot.result import ConvergenceWarning
from lightning_gap.monge.ot.solve import optimal_transport
from lightning_gap.monge.ot.solvers import exact
from lightning_gap.monge.ot.solvers.sparse import solve as sparse
from lightning_gap.monge.ot.solvers.sparse.cells import coarsened
from lightning_gap.monge.ot.solvers.sparse.reduced_costs import ReducedCosts
from lightning_gap.monge.ot.solvers.sparse.repeated import Distinct, split

pytestmark = pytest.mark.compiler

COSTS = ["sqeuclidean", "euclidean", "pnorm(p=1.5)", "pnorm(p=1)", "cosine"]


@pytest.fixture
def forced(monkeypatch):
    """Take the sparse way at every size, with levels and few known pairs also at small ones."""
    monkeypatch.setattr(LIMITS, "exact", 0)
    monkeypatch.setattr(LIMITS, "exact_program", 0)
    monkeypatch.setattr(exact, "_APART", 2.0)
    monkeypatch.setattr(sparse, "_SMALL", 8)
    monkeypatch.setattr(sparse, "_KNOWN", 2)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def least_cost(C, a, b):
    """The value of the linear program, by another solver."""
    n, m = C.shape
    rows = np.kron(np.eye(n), np.ones(m))
    columns = np.kron(np.ones(n), np.eye(m))
    allowed = np.isfinite(C).ravel()
    if not allowed.any():
        return None
    A = np.vstack([rows, columns])[:, allowed]
    scale = max(np.abs(C[np.isfinite(C)]).max(initial=0), 1e-300)  # its tolerances are absolute
    found = linprog(C.ravel()[allowed] / scale, A_eq=A, b_eq=np.concatenate([a, b]), method="highs").fun
    return None if found is None else scale * found


def samples(kind, n, d, seed):
    if kind == "grid":  # many equal costs
        return torch.randint(0, 3, (n, d), generator=torch.Generator().manual_seed(seed)).double() + 1
    if kind == "repeated":
        return normal(seed, max(1, n // 4), d)[torch.arange(n) % max(1, n // 4)]
    if kind == "far":
        return normal(seed, n, d) + 1e4
    return normal(seed, n, d)


def check_proof(plan, cost, x, y, a, b):
    """Marginals, feasible duals, and complementary slackness."""
    C = cost.pairwise(x, y)
    rows = torch.zeros_like(a).index_add_(0, plan.rows, plan.masses)
    columns = torch.zeros_like(b).index_add_(0, plan.columns, plan.masses)
    torch.testing.assert_close(rows, a, rtol=0, atol=1e-12)
    torch.testing.assert_close(columns, b, rtol=0, atol=1e-12)
    scale = C.abs() + plan.u.abs()[:, None] + plan.v.abs()
    reduced = C - plan.u[:, None] - plan.v
    assert bool((reduced >= -1e-11 * scale).all())
    used = reduced[plan.rows, plan.columns]
    assert bool((used.abs() <= 1e-11 * scale[plan.rows, plan.columns] + 1e-13).all())
    assert plan.proven
    assert plan.bound <= plan.paid
    assert plan.paid - plan.bound <= 1e-11 * float((a * plan.u.abs()).sum() + (b * plan.v.abs()).sum()) + 1e-13


@given(
    n=st.integers(1, 60),
    m=st.integers(1, 60),
    d=st.integers(1, 4),
    kind=st.sampled_from(["normal", "grid", "repeated", "far"]),
    cost=st.sampled_from(COSTS),
    weighted=st.booleans(),
    square=st.booleans(),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None)
def test_any_problem_costs_what_its_linear_program_does(n, m, d, kind, cost, weighted, square, seed):
    m = n if square else m
    x, y = samples(kind, n, d, seed), samples(kind, m, d, seed + 1)
    a, b = (torch.rand(k, generator=torch.Generator().manual_seed(seed)).double() + 0.01 for k in (n, m))
    if not weighted:
        a, b = torch.ones_like(a), torch.ones_like(b)
    a, b = a / a.sum(), b / b.sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "_SMALL", 8)
        patch.setattr(sparse, "_KNOWN", 2)
        plan = sparse.sparse_plan(resolve(cost), x, y, a, b)
    check_proof(plan, resolve(cost), x, y, a, b)
    right = least_cost(resolve(cost).pairwise(x, y).numpy(), a.numpy(), b.numpy())
    assert plan.paid == pytest.approx(right, rel=1e-7, abs=1e-7 * float(resolve(cost).pairwise(x, y).max()) + 1e-12)


@given(n=st.integers(2, 12), m=st.integers(2, 12), share=st.sampled_from([0.2, 0.6]), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_forbidden_pairs_are_avoided_or_told(n, m, share, seed):
    generator = torch.Generator().manual_seed(seed)
    C = torch.rand(n, m, generator=generator).double()
    C[torch.rand(n, m, generator=generator) < share] = math.inf
    cost = CallableCost(lambda p, q: C[p[..., 0].long(), q[..., 0].long()])
    x, y = torch.arange(n).double()[:, None], torch.arange(m).double()[:, None]
    a, b = (torch.full((k,), 1 / k, dtype=torch.float64) for k in (n, m))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "_SMALL", 4)
        patch.setattr(sparse, "_KNOWN", 2)
        plan = sparse.sparse_plan(cost, x, y, a, b)
    right = least_cost(C.numpy(), a.numpy(), b.numpy())
    assert (plan is None) == (right is None)
    if plan is not None:
        assert plan.paid == pytest.approx(right, rel=1e-9)


def test_values_and_gradients_are_those_of_the_matrix(forced, monkeypatch):
    pytest.importorskip("ot")
    x, y = normal(0, 40, 2).requires_grad_(), normal(1, 30, 2).requires_grad_()
    a, b = (torch.softmax(normal(seed, n), 0) for seed, n in ((2, 40), (3, 30)))
    a[3] = 0
    a, b = (a / a.sum()).requires_grad_(), b.requires_grad_()

    def found():
        result = optimal_transport(x, y, weights=(a, b), solver="exact")
        return result.value.detach(), torch.autograd.grad(result.value, (x, y, a, b)), result.duality_gap

    value, gradients, gap = found()
    monkeypatch.setattr(LIMITS, "exact_program", 1 << 40)
    by_matrix, right, unknown = found()
    torch.testing.assert_close(value, by_matrix)
    for k in (0, 1):
        torch.testing.assert_close(gradients[k], right[k])
    for k in (2, 3):  # up to a constant
        torch.testing.assert_close(gradients[k] - gradients[k].mean(), right[k] - right[k].mean(), rtol=1e-6, atol=1e-8)
    assert 0 <= gap < 1e-10
    assert unknown is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_formats(dtype, forced):
    x, y = (normal(seed, 50, 3).to(dtype) for seed in (0, 1))
    result = optimal_transport(x, y, solver="exact")
    right = optimal_transport(x.double(), y.double(), solver="exact").value
    assert float(result.value) == pytest.approx(float(right), rel=1e-6)
    torch.testing.assert_close(result.plan().sum(0), torch.full((50,), 1 / 50, dtype=result.value.dtype))


def test_float32_far_from_the_origin(forced):
    x, y = normal(0, 200, 2).float() + 1e4, normal(1, 200, 2).float() + 1e4
    found = float(optimal_transport(x, y, solver="exact").value)
    assert found == pytest.approx(least_assignment(x.double(), y.double()), rel=1e-5)


def least_assignment(x, y, cost="sqeuclidean"):
    from scipy.optimize import linear_sum_assignment

    C = resolve(cost).pairwise(x, y).numpy()
    return float(C[linear_sum_assignment(C)].mean())


@pytest.mark.parametrize("cost", COSTS)
def test_assignments_of_several_levels(cost):
    x, y = normal(0, 700, 3), normal(1, 700, 3) + 0.3
    a = torch.full((700,), 1 / 700, dtype=torch.float64)
    plan = sparse.sparse_plan(resolve(cost), x, y, a, a)
    check_proof(plan, resolve(cost), x, y, a, a)
    assert plan.paid == pytest.approx(least_assignment(x, y, cost), rel=1e-12)


def test_a_cost_without_a_formula(forced):
    x, y = normal(0, 60, 2), normal(1, 60, 2)
    found = optimal_transport(x, y, cost=lambda p, q: (p - q).abs().amax(-1), solver="exact").value
    C = (x[:, None] - y).abs().amax(-1).numpy()
    assert float(found) == pytest.approx(least_cost(C, np.full(60, 1 / 60), np.full(60, 1 / 60)))


def test_linear_programs_need_no_pot(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0], [2.0]])
    result = optimal_transport(x, y, solver="exact", weights=(torch.tensor([0.25, 0.75]), None))
    torch.testing.assert_close(result.value, torch.tensor(1 / 3 + 1 / 12))


def test_a_matrix_beyond_memory_needs_a_compiler(monkeypatch):
    monkeypatch.setattr(LIMITS, "dense", Size(0, 0))
    monkeypatch.setattr(exact, "free_memory", lambda like: 1e3)
    monkeypatch.setattr(exact, "can_solve_sparsely", lambda: False)
    with pytest.raises(ValueError, match=r"needs 0.0 GB for 100 x 100 samples without a compiler.* install g\+\+"):
        optimal_transport(normal(0, 100, 2), normal(1, 100, 2), solver="exact")


def test_nan_is_refused(forced):
    with pytest.raises(ValueError, match="NaN or minus infinity"):
        optimal_transport(normal(0, 20, 1), normal(1, 20, 1), cost=lambda p, q: (p - q).sum(-1).sqrt(), solver="exact")


def test_no_plan_is_told(forced):
    with pytest.raises(ValueError, match="no plan avoids"):
        optimal_transport(
            normal(0, 20, 1), normal(1, 20, 1), cost=lambda p, q: (p - q).sum(-1) * 0 + math.inf, solver="exact"
        )


def test_in_one_dimension_it_sorts():
    x, y = normal(0, 20_000, 1), normal(1, 20_000, 1) * 2 + 1
    found = optimal_transport(x, y, solver="exact")
    right = (x.sort(0).values - y.sort(0).values).square().mean()
    assert float(found.value) == pytest.approx(float(right), rel=1e-9)
    assert found.converged
    assert found.duality_gap <= 1e-9


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean"])
def test_shifts_cost_their_length(cost):
    x = normal(0, 3000, 2)
    shift = torch.tensor([2.0, 1.0], dtype=torch.float64)
    found = float(optimal_transport(x, x + shift, cost=cost, solver="exact").value)
    assert found == pytest.approx(5 if cost == "sqeuclidean" else math.sqrt(5), rel=1e-9)


def test_a_gradient_of_a_convex_function_has_no_gap():
    x = normal(0, 3000, 2)
    assert abs(float(monge_gap(x, x.sinh() + 0.1 * x, solver="exact"))) < 1e-9


def test_what_is_not_proven_is_told(forced, monkeypatch):
    monkeypatch.setattr(sparse.Network, "prove", lambda network: setattr(network, "bound", -1.0) or False)
    with pytest.warns(ConvergenceWarning, match="may cost up to .* more than the best one"):
        result = optimal_transport(normal(0, 20, 1), normal(1, 20, 1), solver="exact")
    assert not result.converged
    with pytest.raises(RuntimeError, match="may cost up to"):
        optimal_transport(normal(0, 20, 1), normal(1, 20, 1), solver="exact", strict=True)


def test_rounds_that_end_early_are_told(forced, monkeypatch):
    monkeypatch.setattr(sparse, "_ROUNDS", 1)
    with pytest.raises(RuntimeError, match="rows left after 1 rounds"):
        optimal_transport(normal(0, 300, 2), normal(1, 300, 2), solver="exact")


@pytest.mark.parametrize("cost", [*COSTS, "geodesic", "elastic(lam=0.5)"])
@given(n=st.integers(1, 40), m=st.integers(1, 1100), k=st.integers(1, 20), seed=st.integers(0, 100))
@settings(max_examples=15, deadline=None)
def test_least_pairs_are_those_of_the_matrix(cost, n, m, k, seed):
    x, y, v = normal(seed, n, 3), normal(seed + 1, m, 3), normal(seed + 2, m)
    if cost == "geodesic":
        x, y = (points / points.norm(dim=1, keepdim=True) for points in (x, y))
    reduced = resolve(cost).pairwise(x, y) - v
    bounds = reduced.median(1).values + 1e-6  # of no pair, whose last bits formulas need not share
    for compiled in (True, False):
        passes = ReducedCosts(resolve(cost), x, y, compiled=compiled)
        for given_bounds in (None, bounds):
            found = passes.least(v, k, bounds=given_bounds)
            right = reduced if given_bounds is None else reduced.masked_fill(reduced >= bounds[:, None], math.inf)
            right = right.topk(min(k, m), largest=False).values
            kept = found.values[:, : right.shape[1]]
            torch.testing.assert_close(kept, right, rtol=1e-10, atol=1e-10)
            assert torch.equal(found.counts, right.isfinite().sum(1))


@given(n=st.integers(1, 200), count=st.integers(1, 50), repeated=st.booleans(), seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_cells_keep_the_mass(n, count, repeated, seed):
    x = normal(seed, n, 2)
    x = x[:1].expand(n, 2) if repeated else x
    masses = torch.arange(1, n + 1)
    points, sums = coarsened(x, masses, count)
    assert int(sums.sum()) == int(masses.sum())
    assert min(n, count) <= len(points) <= min(n, 2 * count)
    assert bool((points[:, None] == x).all(-1).any(1).all())


@given(n=st.integers(1, 500), m=st.integers(1, 500), uniform=st.booleans(), seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_masses_are_whole_and_the_weights(n, m, uniform, seed):
    weights = [torch.rand(k, generator=torch.Generator().manual_seed(seed)).double() + 1e-3 for k in (n, m)]
    if uniform:
        weights = [torch.ones_like(w) for w in weights]
    a, b = (w / w.sum() for w in weights)
    supply, demand = sparse.whole_masses(a, b)
    assert int(supply.sum()) == int(demand.sum())
    for w, masses in ((a, supply), (b, demand)):
        torch.testing.assert_close(masses.double() / int(masses.sum()), w, rtol=0, atol=1e-13)


@given(n=st.integers(1, 60), distinct=st.integers(1, 8), entries=st.integers(1, 30), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_entries_are_split_among_samples_that_agree(n, distinct, entries, seed):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randint(0, distinct, (n, 1), generator=generator).double()
    masses = torch.randint(0, 5, (n,), generator=generator)
    masses[0] += 1
    side = Distinct(points, masses)
    # Any cuts of the distinct ones' masses are entries.
    ends = side.masses.cumsum(0)
    cuts = torch.cat([torch.randint(1, int(ends[-1]) + 1, (entries,), generator=generator), ends]).unique()
    cuts = cuts[cuts > 0]
    parts = cuts.diff(prepend=cuts.new_zeros(1))
    of = torch.searchsorted(ends, cuts)
    order = torch.randperm(len(of), generator=generator)
    entry, sample, found = split(side, of[order], parts[order])
    assert torch.equal(torch.zeros_like(masses).index_add_(0, sample, found), masses)
    assert torch.equal(torch.zeros_like(parts).index_add_(0, entry, found), parts[order])
    assert torch.equal(side.which[sample], of[order][entry])
    assert bool((found > 0).all())


@pytest.mark.parametrize("shape", [(2000, 10, 2), (1500, 2, 8)])
def test_many_ties_are_no_obstacle(shape):
    n, values, d = shape
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(0, values, (n, d), generator=generator).double() for _ in range(2))
    assert float(optimal_transport(x, y, solver="exact").value) == pytest.approx(least_assignment(x, y), rel=1e-9)
