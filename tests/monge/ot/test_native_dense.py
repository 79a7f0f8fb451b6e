"""Dense problems in two compiled calls, against plain iterations in double and the solver that they stand in for."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sums_over_pairs import COSTS, samples

from lightning_gap.monge import MongeMap
from lightning_gap.monge.ot import optimal_transport, sinkhorn_divergence
from lightning_gap.monge.ot.costs import CallableCost, SqEuclidean, resolve
from lightning_gap.monge.ot.solvers import sinkhorn
from lightning_gap.monge.ot.solvers.fused import native_dense

compiler = pytest.mark.compiler


@pytest.fixture
def taken(monkeypatch):
    """Whether each problem was solved by the compiled calls."""
    found, solve = [], native_dense.solve_natively

    def told(*arguments):
        answer = solve(*arguments)
        found.append(answer is not None)
        return answer

    monkeypatch.setattr(sinkhorn, "solve_natively", told)
    return found


def plain(x, y, a, b, cost, epsilon, sweeps=4000):
    """Sinkhorn's iterations in the log domain and in double, and the envelope gradient of their last plan."""
    x, y = x.double().requires_grad_(), y.double().requires_grad_()
    C = cost.pairwise(x, y)
    K, F, G = C.detach() / epsilon, torch.zeros(len(x)).double(), torch.zeros(len(y)).double()
    for _ in range(sweeps):
        F = -torch.logsumexp(b.log() + G - K, 1)
        G, last = -torch.logsumexp(a.log()[:, None] + F[:, None] - K, 0), G
        if float((G - last).abs().max()) < 1e-13:
            break
    P = a[:, None] * b * torch.exp(F[:, None] + G - K)
    gradients = torch.autograd.grad((P * C).sum(), (x, y))
    return epsilon * (a @ F + b @ G), gradients


def check(x, y, a, b, cost, share, close, **options):
    """Compare value and gradients with plain iterations."""
    epsilon = share * cost.mean(x.double(), y.double())
    x, y = (points.clone().requires_grad_() for points in (x, y))
    weights = a.to(x.dtype), b.to(x.dtype)
    result = optimal_transport(x, y, cost=cost, epsilon=epsilon, weights=weights, solver="dense", **options)
    assert result.converged
    gradients = torch.autograd.grad(result.value, (x, y))
    value, expected = plain(x.detach(), y.detach(), *(w.double() / w.double().sum() for w in weights), cost, epsilon)
    assert float(result.value.detach()) == pytest.approx(float(value), rel=close)
    for found, right in zip(gradients, expected, strict=True):
        assert float((found.double() - right).norm() / right.norm()) < 10 * close
    return result


# A compilation each.
SOME = {"sqeuclidean", "euclidean", "cosine", "geodesic", "pnorm(p=1.5)"}
EACH = [pytest.param(cost, marks=() if cost in SOME else pytest.mark.slow) for cost in COSTS]


@compiler
@pytest.mark.parametrize("cost", EACH)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 3e-5), (torch.float64, 1e-9)], ids=str)
@pytest.mark.parametrize("share", [0.3, 0.02])
def test_value_and_gradients_are_those_of_plain_iterations(taken, cost, dtype, close, share):
    x, y, a, b, _ = samples(90, 75, 3, dtype, sphere=cost == "geodesic")
    check(x, y, a, b, resolve(cost), share, close, tolerance=1e-6 if dtype == torch.float32 else 1e-10)
    assert taken == [True]


@compiler
@given(
    n=st.integers(64, 90),
    m=st.one_of(st.integers(64, 90), st.sampled_from([128, 129, 511])),
    d=st.sampled_from([1, 2, 5, 16, 17, 60]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    cost=st.sampled_from(["sqeuclidean", "euclidean"]),
    shift=st.sampled_from([0.0, 100.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_any_shape(n, m, d, dtype, cost, shift, seed):
    x, y, a, b, _ = samples(n, m, d, dtype, seed=seed, shift=shift)
    check(x, y, a, b, resolve(cost), 0.1, 3e-5, tolerance=1e-6)


@compiler
@pytest.mark.parametrize("unit", [1e-12, 1e-5, 1e5, 1e12])
@pytest.mark.parametrize("cost", ["euclidean", "sqeuclidean"])
def test_any_unit(unit, cost):
    x, y, *_ = samples(80, 70, 3, torch.float32)
    power = 2 if cost == "sqeuclidean" else 1
    values = [float(optimal_transport(x * u, y * u, cost=cost, relative_epsilon=0.1).value) for u in (1.0, unit)]
    assert values[1] == pytest.approx(values[0] * unit**power, rel=1e-4)


@compiler
@pytest.mark.parametrize("n", [300, 700])
@pytest.mark.parametrize("share", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_larger_problems_start_and_end_as_the_other_solver_does(monkeypatch, taken, n, share, dtype):
    x, y, *_ = samples(n, n + 50, 2, dtype)
    options = {"relative_epsilon": share, "tolerance": 1e-4, "solver": "dense"}
    found = optimal_transport(x, y, **options)
    assert taken == [True]
    monkeypatch.setattr(sinkhorn, "solve_natively", lambda *_: None)
    expected = optimal_transport(x, y, **options)
    assert found.epsilon == pytest.approx(expected.epsilon, rel=1e-6)
    assert float(found.value) == pytest.approx(float(expected.value), rel=1e-5)
    assert found.converged
    # Extrapolations part after some sweeps, and are as good.
    assert found.iterations <= 4 * expected.iterations + 10


@compiler
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine"])
def test_a_measure_against_itself(taken, cost):
    x, _, a, _, _ = samples(100, 100, 3, torch.float64)
    assert float(sinkhorn_divergence(x, x.clone(), cost=cost, tolerance=1e-8)) == pytest.approx(0, abs=1e-7)
    weights = (a, a)
    leaf = x.clone().requires_grad_()
    value = optimal_transport(leaf, leaf, cost=cost, epsilon=0.1, weights=weights, tolerance=1e-10).value
    (gradient,) = torch.autograd.grad(value, leaf)
    left, right = (x.clone().requires_grad_() for _ in range(2))
    C, F = resolve(cost).pairwise(left, right), torch.zeros(100).double()
    for _ in range(300):
        F = (F - torch.logsumexp(a.log() + F - C.detach() / 0.1, 1)) / 2  # plain iterations are slow here
    P = a[:, None] * a * torch.exp(F[:, None] + F - C.detach() / 0.1)
    first, second = torch.autograd.grad((P * C).sum(), (left, right))
    assert float(value.detach()) == pytest.approx(float(0.2 * a @ F), rel=1e-9)
    assert float((gradient - first - second).norm() / gradient.norm()) < 1e-8
    assert all(taken)


@compiler
def test_points_that_coincide_pull_nowhere():
    x = torch.zeros(80, 2, requires_grad=True)
    y = torch.cat([torch.zeros(40, 2), torch.ones(40, 2)])
    (gradient,) = torch.autograd.grad(optimal_transport(x, y, cost="euclidean", epsilon=0.5).value, x)
    assert torch.isfinite(gradient).all()
    assert float(gradient.sum(0).norm()) == pytest.approx(0.5, rel=1e-3)  # half of the mass goes one way


@compiler
def test_clusters_far_apart_whose_masses_differ_a_little(taken):
    # Sweeps would hardly move.
    torch.manual_seed(0)
    x = torch.cat([torch.randn(52, 2), torch.randn(48, 2) + 1000]).double()
    y = torch.cat([torch.randn(50, 2), torch.randn(50, 2) + 1000]).double()
    result = optimal_transport(x, y, epsilon=1.0)
    assert taken == [True]
    assert result.converged
    assert float(result.value.detach()) == pytest.approx(float(optimal_transport(x, y, solver="exact").value), rel=1e-3)


@compiler
def test_too_few_sweeps_are_told(taken):
    x, y, *_ = samples(80, 80, 2, torch.float64)
    with pytest.warns(Warning, match="solver='dense' stopped with a marginal error"):
        result = optimal_transport(x, y, relative_epsilon=0.01, max_iterations=3)
    assert taken == [True]
    assert result.iterations == 3
    assert not result.converged


class _Halved(SqEuclidean):
    """A user's cost, whose formula is its parent's."""

    def h(self, z):
        return super().h(z) / 2


@pytest.mark.parametrize(
    ("cost", "n", "options"),
    [
        ("sqeuclidean", 30, {}),  # not worth a compilation
        ("sqeuclidean", 100, {"rho": 1.0}),
        (_Halved(), 100, {}),
        (CallableCost(lambda x, y: (x - y).abs().sum(-1)), 100, {}),
    ],
)
def test_what_is_not_for_it_is_solved_as_before(taken, cost, n, options):
    x, y, *_ = samples(n, n, 2, torch.float64)
    assert optimal_transport(x, y, cost=cost, epsilon=0.5, **options).converged
    assert taken == [False]


def test_without_a_compiler(monkeypatch, taken):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    x, y, *_ = samples(100, 100, 2, torch.float64)
    assert optimal_transport(x, y, epsilon=0.5).converged
    assert taken == [False]


@compiler
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_samples_of_a_lost_network_are_told_as_before(bad):
    source, target = torch.randn(80, 2), torch.randn(80, 2)
    model = MongeMap(fitting_loss="sinkhorn", fitting_epsilon=0.1, gap_weight=0.0)
    mapped = source.clone()
    mapped[3, 1] = bad
    with pytest.raises(FloatingPointError, match="lower its learning rate"):
        model.objective.terms(source, mapped, target, fitting_epsilon=0.1, gap_epsilon=None, with_gap=False)


@compiler
@pytest.mark.parametrize(
    ("cost", "unit", "native"),
    [
        ("pnorm(p=1.5)", 1.0, True),
        ("pnorm(p=1.5)", 1e-40, True),
        ("sqpnorm(p=12)", 1.0, True),
        ("sqpnorm(p=12)", 1e-20, False),
        ("sqpnorm(p=400)", 1.0, False),
        ("euclidean", 1e-120, False),
        ("euclidean", 1e-60, True),
    ],
)
def test_powers_beyond_the_format_go_the_long_way(taken, cost, unit, native):
    x, y, *_ = samples(80, 70, 3, torch.float64)
    found = optimal_transport(x * unit, y * unit, cost=cost, relative_epsilon=0.1)
    assert taken == [native]
    # In double and in units of its own a cost is no smaller than it should be.
    cost = resolve(cost)
    one = optimal_transport(x, y, cost=CallableCost(cost.paired), relative_epsilon=0.1)
    scale = float(cost.mean(x * unit, y * unit)) / float(cost.mean(x, y))
    assert float(found.value) == pytest.approx(scale * float(one.value), rel=1e-6)


@compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_potentials_answer_one_another_where_samples_have_heavy_tails(dtype, seed):
    # Outliers make entries of the kernel infinite on the way: a finite one instead would be another problem's.
    generator = torch.Generator().manual_seed(seed)
    x, y = (
        torch.randn(n, 2, generator=generator, dtype=dtype) / torch.randn(n, 1, generator=generator, dtype=dtype)
        for n in (300, 280)
    )
    result = optimal_transport(x, y, relative_epsilon=0.02, solver="dense")
    C = SqEuclidean().pairwise(x.double(), y.double()) / result.epsilon
    f, g = (potential.double() / result.epsilon for potential in (result.f, result.g))
    answer = -torch.logsumexp(g - C - math.log(280), 1)
    assert result.converged
    # Costs of many epsilons are rounded to a part of one in float32.
    assert float((f - answer).abs().max()) < (0.5 if dtype == torch.float32 else 1e-6)


@compiler
@pytest.mark.parametrize("gap", [1e-20, 3e-22])
def test_a_slope_is_that_of_a_distance_also_between_points_that_nearly_coincide(gap):
    x, y = torch.full((100, 1), gap, requires_grad=True), torch.zeros(90, 1)
    y[0] = 1
    value = optimal_transport(x, y, cost="euclidean", relative_epsilon=0.5, solver="dense").value
    (gradient,) = torch.autograd.grad(value, x)
    assert float(100 * gradient.abs().max()) <= 1


@compiler
@pytest.mark.parametrize("most", [258, 259, 300, 301, 400])
@pytest.mark.parametrize("share", [1e-3, 1e-4])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_more_sweeps_than_were_allowed(most, share):
    x, y, *_ = samples(300, 280, 2, torch.float32)
    result = optimal_transport(x, y, relative_epsilon=share, max_iterations=most)
    assert result.iterations <= most
    assert result.converged or result.iterations >= most - 1


@compiler
def test_any_number_of_sweeps_may_be_allowed():
    x, y, *_ = samples(100, 90, 2, torch.float64)
    assert optimal_transport(x, y, relative_epsilon=0.1, max_iterations=2**64 + 1).converged


@compiler
@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("cost", ["sqeuclidean", "pnorm(p=1.5)"])
def test_threads_change_nothing_but_the_last_bits(taken, cost, threads):
    x, y, *_ = samples(1100, 1000, 3, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
            result = optimal_transport(*leaves, cost=cost, relative_epsilon=0.02)
            found.append((result.iterations, result.value.detach(), *torch.autograd.grad(result.value, leaves)))
    finally:
        torch.set_num_threads(before)
    assert taken == [True, True]
    assert found[0][0] == found[1][0]
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)


@compiler
def test_many_coordinates_go_by_products(taken):
    x, y, *_ = samples(70, 70, 400, torch.float32)
    assert optimal_transport(x, y, relative_epsilon=0.1).converged
    assert taken == [False]


@compiler
def test_every_call_gives_the_same_bits():
    x, y, *_ = samples(200, 170, 3, torch.float32)
    values = {float(sinkhorn_divergence(x, y)) for _ in range(5)}
    assert len(values) == 1


@compiler
@pytest.mark.parametrize("share", [1e-3, 1e-4])
@pytest.mark.parametrize("case", ["plain", "sphere", "clusters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_small_epsilons_converge_and_near_the_exact_cost(taken, dtype, case, share):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(256, 3, generator=generator), 0.8 * torch.randn(256, 3, generator=generator) + 0.5
    cost = "sqeuclidean"
    if case == "sphere":
        x, y, cost = *(points / points.norm(dim=1, keepdim=True) for points in (x, y)), "geodesic"
    elif case == "clusters":
        # Another number of samples in each: some of them go far.
        middles = 10 * torch.eye(3)
        x = middles[torch.arange(256) % 3] + 0.3 * x
        y = middles[torch.arange(256) ** 2 % 5 % 3] + 0.3 * y
    x, y = x.to(dtype), y.to(dtype)
    result = optimal_transport(x, y, cost=cost, relative_epsilon=share, max_iterations=5000)
    assert taken == [True]
    assert result.converged
    exact = float(optimal_transport(x, y, cost=cost, solver="exact").value)
    # Between the cost of the plan, and that plus all of the entropy there may be.
    assert exact * (1 - 1e-5) <= float(result.transport_cost()) <= exact + result.epsilon * math.log(256)
