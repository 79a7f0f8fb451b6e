"""Divergences and gaps by compiled calls, against sums of results that are differentiable one by one."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sums_over_pairs import COSTS, samples

from lightning_gap.monge.ot import divergence_and_gap, monge_gap, sinkhorn_divergence, terms
from lightning_gap.monge.ot.costs import SqEuclidean
from lightning_gap.monge.ot.epsilon import Epsilon
from lightning_gap.monge.ot.options import SolverOptions
from lightning_gap.monge.ot.problem import checked_problem
from lightning_gap.monge.ot.result import ConvergenceWarning
from lightning_gap.monge.ot.solvers.fused.native_dense import NativeProblem
from lightning_gap.monge.ot.terms import solve_terms

compiler = pytest.mark.compiler
# A compilation each.
SOME = {"sqeuclidean", "euclidean", "cosine", "geodesic"}
EACH = [pytest.param(cost, marks=() if cost in SOME else pytest.mark.slow) for cost in COSTS]


@pytest.fixture
def taken(monkeypatch):
    """Whether the terms were found by the compiled calls, at each call."""
    found, natively = [], terms._natively

    def told(*arguments):
        solved = natively(*arguments)
        found.append(solved is not None)
        return solved

    monkeypatch.setattr(terms, "_natively", told)
    return found


def both(function):
    """What a function returns by the compiled calls, and without them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(terms, "_natively", lambda *_: None)
        expected = function()
    return function(), expected


def check(function, points, close, seconds=None):
    """Compare scalars of points, their gradients, and derivatives of those."""

    def derivatives():
        leaves = [p.clone().requires_grad_() for p in points]
        values = function(*leaves)
        total = sum((k + 1.5) * value for k, value in enumerate(values))
        first = torch.autograd.grad(total, leaves, create_graph=seconds is not None, allow_unused=True)
        known = [g for g in first if g is not None]
        if seconds is None:
            return values, known, ()
        return values, known, torch.autograd.grad(sum(g.square().sum() for g in known), leaves, allow_unused=True)

    (values, first, second), expected = both(derivatives)
    for found, right in zip(values, expected[0], strict=True):
        assert found.dtype == right.dtype
        assert float(found.detach()) == pytest.approx(float(right.detach()), rel=close, abs=close)
    for found, right, rounding in [
        *((*pair, close) for pair in zip(first, expected[1], strict=True)),
        *((*pair, seconds) for pair in zip(second, expected[2], strict=True) if pair[1] is not None),
    ]:
        assert found.dtype == right.dtype
        assert float((found - right).detach().norm()) <= rounding * (1 + float(right.detach().norm()))


@compiler
@pytest.mark.parametrize("cost", EACH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("convention", ["shannon", "kl", "debiased"])
def test_gaps_of_every_cost_and_convention(taken, cost, dtype, convention):
    x, mapped, a, *_ = samples(80, 80, 3, dtype, sphere=cost == "geodesic")
    close, options = 2e-5 if dtype == torch.float32 else 1e-10, {"cost": cost, "convention": convention}
    check(lambda x, y: [monge_gap(x, y, **options), monge_gap(x, y, weights=a, **options)], (x, mapped), close)
    assert taken == [True, True]


@compiler
@pytest.mark.parametrize("cost", EACH)
@pytest.mark.parametrize("weighted", [False, True])
def test_divergences_of_every_cost(taken, cost, weighted):
    x, y, a, b, _ = samples(90, 75, 3, torch.float64, sphere=cost == "geodesic")
    options = {"cost": cost, "weights": (a, b) if weighted else (None, None)}
    check(lambda x, y: [sinkhorn_divergence(x, y, **options)], (x, y), 1e-10)
    assert taken == [True]


@compiler
@given(
    n=st.integers(64, 90),
    m=st.integers(64, 300),
    d=st.sampled_from([1, 2, 17]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    share=st.sampled_from([0.01, 0.2]),
    weight=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_a_step_of_training(n, m, d, dtype, share, weight, seed):
    x, y, *_ = samples(n, m, d, dtype, seed=seed)
    with torch.no_grad():
        mean = float(torch.cdist(x.double(), y.double()).square().mean())

    def step(x, mapped, y):
        divergence, gap = divergence_and_gap(
            x, mapped, y, fitting_epsilon=0.1 * mean, cost="euclidean", gap_epsilon=share * mean**0.5
        )
        return divergence, weight * gap

    check(step, (x, 1.3 * x + 0.5, y), 1e-4 if dtype == torch.float32 else 1e-9)


@compiler
@pytest.mark.parametrize("cost", ["sqeuclidean", "cosine"])
def test_second_derivatives_are_those_of_results(cost):
    x, y, *_ = samples(70, 66, 2, torch.float64)
    options = {"cost": cost, "tolerance": 1e-10, "max_iterations": 20_000}
    check(lambda x, y: [sinkhorn_divergence(x, y, **options)], (x, y), 1e-8, seconds=1e-6)
    check(lambda x, y: [monge_gap(x, y, **options)], (x, x + y[0]), 1e-8, seconds=1e-6)


@compiler
def test_samples_in_two_roles_have_both_gradients(taken):
    x, *_ = samples(70, 70, 2, torch.float64)
    check(lambda x: [sinkhorn_divergence(x, x), monge_gap(x, x, convention="debiased")], (x,), 1e-12)
    check(lambda x: divergence_and_gap(x, 2 * x, 2 * x + 1), (x,), 1e-10)
    x = x.requires_grad_()
    divergence = sinkhorn_divergence(x, x)
    assert abs(float(divergence.detach())) < 1e-7
    assert float(torch.autograd.grad(divergence, x)[0].norm()) < 1e-4
    assert all(taken)


@compiler
def test_many_problems_at_once(taken):
    x = torch.stack([samples(70, 65, 2, torch.float64, seed=seed)[0] for seed in range(3)])
    y = torch.stack([samples(70, 65, 2, torch.float64, seed=seed)[1] for seed in range(3)])
    check(lambda x, y: list(sinkhorn_divergence(x, y)), (x, y), 1e-10)
    assert taken == [True]
    x = x.requires_grad_()
    apart = torch.autograd.grad(sinkhorn_divergence(x, y)[1], x)[0]
    assert apart[1].any()
    assert not apart[[0, 2]].any()


class _Own(SqEuclidean):
    def h(self, z):
        return 2 * super().h(z)


@compiler
@pytest.mark.parametrize(
    "options",
    [
        {"rho": 1.0},
        {"weights": (torch.rand(70).double().requires_grad_(), None)},
        {"weights": (torch.cat([torch.zeros(1), torch.ones(69) / 69]).double(), None)},
        {"cost": lambda x, y: (x - y).square().sum(-1)},
        {"cost": _Own()},
        {"solver": "blocked"},
    ],
    ids=["soft", "weights that learn", "weights of 0", "function", "class", "solver"],
)
def test_other_problems_go_the_long_way(taken, options):
    x, y, *_ = samples(70, 65, 2, torch.float64)
    weights = options.get("weights", (None, None))
    given = options | {"weights": (None if weights[0] is None else weights[0] / weights[0].sum(), None)}
    check(lambda x, y: [sinkhorn_divergence(x, y, **given)], (x, y), 1e-12)
    assert taken == [False]


@compiler
def test_a_side_that_is_too_small_goes_the_long_way(taken):
    x, y, *_ = samples(300, 20, 2, torch.float64)
    check(lambda x, y: [sinkhorn_divergence(x, y)], (x, y), 1e-12)
    assert taken == [False]


@compiler
def test_nothing_is_solved_before_all_are_known_to_be_for_the_calls(taken, monkeypatch):
    solved, calls = NativeProblem.solved, []
    monkeypatch.setattr(NativeProblem, "solved", lambda *given, **more: calls.append(1) or solved(*given, **more))
    x, y, *_ = samples(70, 65, 2, torch.float64)
    divergence_and_gap(x, 2 * x, y, cost=lambda x, y: (x - y).abs().sum(-1))
    assert taken == [False]
    assert len(calls) == 3  # those of the divergence


@compiler
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_value_has_the_gradients_of_its_own_samples(taken, create_graph):
    x, y, *_ = samples(70, 65, 2, torch.float64)

    def gap_alone():
        source = x.clone().requires_grad_()
        divergence, gap = divergence_and_gap(source, 2 * x, y)
        assert not divergence.requires_grad
        return torch.autograd.grad(gap, source, create_graph=create_graph)[0].detach()

    def divergence_alone():
        source, mapped = x.clone().requires_grad_(), (2 * x).requires_grad_()
        divergence, _ = divergence_and_gap(source, mapped, y)
        of_source, found = torch.autograd.grad(
            divergence, (source, mapped), create_graph=create_graph, allow_unused=True
        )
        assert of_source is None
        return found.detach()

    for function in (gap_alone, divergence_alone):
        found, expected = both(function)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert taken == [True, True]


@compiler
def test_a_value_keeps_no_samples_after_its_backward_pass(taken):
    x, y, *_ = samples(70, 65, 2, torch.float64)
    matrix = torch.eye(2, dtype=torch.float64, requires_grad=True)
    mapped = x @ matrix
    kept, loss = weakref.ref(mapped), sum(divergence_and_gap(x, mapped, y))
    loss.backward()
    del mapped
    assert kept() is None
    assert taken == [True]


@compiler
@pytest.mark.parametrize("convention", ["shannon", "kl", "debiased"])
def test_an_epsilon_far_above_the_costs_is_meant_as_it_is(taken, convention):
    x, mapped, *_ = samples(80, 80, 2, torch.float64)
    options = {"epsilon": 1e9, "convention": convention}
    check(lambda x, y: [monge_gap(x, y, **options)], (x, mapped), 1e-10)
    assert taken == [True]


@compiler
def test_another_device_may_be_the_default(taken):
    x, mapped, *_ = samples(80, 80, 2, torch.float64)

    def value():
        with torch.device("meta"):
            return monge_gap(x, mapped, convention="debiased")

    found, expected = both(value)
    assert found.device.type == expected.device.type == "cpu"
    assert taken == [True]


@compiler
def test_what_float32_cannot_tell_is_told_in_double(taken):
    x, *_ = samples(200, 200, 2, torch.float32)
    near = x + 1e-4 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    value = sinkhorn_divergence(x, near, epsilon=0.1, tolerance=1e-7)
    assert taken == [True, True]
    exact = sinkhorn_divergence(x.double(), near.double(), epsilon=0.1, tolerance=1e-7)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(exact), rel=1e-3)


@compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_did_not_converge_is_told(taken, dtype):
    x, y, *_ = samples(80, 80, 2, dtype)
    with pytest.warns(ConvergenceWarning, match="solver='dense' stopped with a marginal error") as told:
        monge_gap(x, 3 * y, relative_epsilon=1e-4, max_iterations=2, tolerance=1e-7)
    assert ("or use float64" in str(told[0].message)) == (dtype == torch.float32)
    p = checked_problem(x, 3 * y, [None], cost="sqeuclidean", epsilon=Epsilon(share=1e-4), paired=True)
    solved = solve_terms([], [p], SolverOptions("auto", 1e-7, 2), silent=True)
    assert not solved.converged
    assert solved.marginal_error > 1e-7
    assert taken == [True, True]


@compiler
def test_infinite_costs_are_refused_as_before(taken):
    x, y, *_ = samples(80, 80, 2, torch.float32)
    with pytest.raises(FloatingPointError, match="not all finite"):
        sinkhorn_divergence(1e20 * x, 1e20 * y)
    assert taken == [False]
