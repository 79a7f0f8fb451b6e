"""The one entry to all solvers: gradients, results, warnings, refusals."""

import sys
import threading
import types

import numpy as np
import pytest
import torch

from lightning_gap import costs, monge_gap, sinkhorn_divergence
from lightning_gap.monge.ot.limits import LIMITS
from lightning_gap.monge.ot.result import ConvergenceWarning
from lightning_gap.monge.ot.solve import optimal_transport
from lightning_gap.monge.ot.solvers import exact, geomloss, memory

# Compiles C++ on first use.
FUSED = pytest.param("fused", marks=pytest.mark.compiler)

TIGHT = {"tolerance": 1e-11, "max_iterations": 20_000}
ours = pytest.mark.parametrize("solver", ["dense", "blocked", FUSED])


def draw(n, d=2, seed=0, dtype=torch.float64):
    return torch.randn(n, d, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@ours
@pytest.mark.parametrize("rho", [None, 1.0])
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean"])
def test_gradients_are_those_of_finite_differences(cost, rho, solver):
    x, y = draw(4).requires_grad_(), draw(3, seed=1).requires_grad_()
    logits = draw(7, 1, seed=2)[:, 0].requires_grad_()

    def value(x, y, logits):
        # Weights move in the simplex only.
        weights = torch.softmax(logits[:4], 0), torch.softmax(logits[4:], 0)
        options = {"cost": cost, "epsilon": 0.5, "rho": rho, "solver": solver}
        return optimal_transport(x, y, weights=weights, **options, **TIGHT).value

    assert torch.autograd.gradcheck(value, (x, y, logits), atol=1e-6)


@pytest.mark.parametrize("rho", [None, 1.0])
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean"])
def test_second_gradients_are_those_of_finite_differences(cost, rho):
    x, y = draw(5).requires_grad_(), draw(4, seed=1).requires_grad_()

    def value(x, y):
        return optimal_transport(x, y, cost=cost, epsilon=0.5, rho=rho, solver="dense", **TIGHT).value

    assert torch.autograd.gradgradcheck(value, (x, y), atol=1e-5)


def test_exact_gradients_are_those_of_finite_differences():
    x, y = draw(6).requires_grad_(), draw(6, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: optimal_transport(x, y, solver="exact").value, (x, y))


@ours
@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_buffers_of_inference_serve_training(quiet, solver):
    with quiet():
        before = monge_gap(draw(300), draw(300, seed=1), solver=solver)
    y = draw(300, seed=1).requires_grad_()
    gap = monge_gap(draw(300), y, solver=solver)
    gap.backward()
    torch.testing.assert_close(gap.detach(), before.clone())
    assert y.grad.isfinite().all()


@ours
def test_autocast_changes_nothing(solver):
    x, y = draw(50, dtype=torch.float32), draw(50, seed=1, dtype=torch.float32)
    expected = sinkhorn_divergence(x, y, solver=solver)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sinkhorn_divergence(x, y, solver=solver), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_solved_in_float32(dtype):
    x, y = draw(50).to(dtype), draw(50, seed=1).to(dtype).requires_grad_()
    for function in (monge_gap, sinkhorn_divergence):
        value = function(x, y)
        (gradient,) = torch.autograd.grad(value, y)
        torch.testing.assert_close(value, function(x.float(), y.float()))
        assert gradient.dtype == dtype
        assert gradient.isfinite().all()


def test_batches_are_loops():
    x, y = torch.stack([draw(20), 2 * draw(20)]), torch.stack([draw(20, seed=1), draw(20, seed=2)])
    weights = torch.softmax(torch.stack([draw(20, 1)[:, 0], draw(20, 1, seed=3)[:, 0]]), dim=1)
    for both, one in (
        (monge_gap(x, y, weights=weights), lambda i: monge_gap(x[i], y[i], weights=weights[i])),
        (
            sinkhorn_divergence(x, y, weights=(None, weights)),
            lambda i: sinkhorn_divergence(x[i], y[i], weights=(None, weights[i])),
        ),
    ):
        torch.testing.assert_close(both, torch.stack([one(0), one(1)]))


def test_threads_do_not_share_buffers():
    problems = [(draw(200, seed=s), draw(200, seed=s + 50)) for s in range(4)]
    expected = [float(monge_gap(*p)) for p in problems]
    found = {}

    def work(i):
        found[i] = [float(monge_gap(*problems[i])) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: [pytest.approx(expected[i], rel=1e-12)] * 5 for i in range(4)}


@pytest.mark.parametrize("solver", ["dense", "blocked", FUSED, "exact"])
def test_the_plan_and_what_is_made_of_it(solver):
    x, y = draw(30), draw(30, seed=1)
    options = {} if solver == "exact" else TIGHT
    result = optimal_transport(x, y, cost="euclidean", solver=solver, **options)
    plan, values = result.plan(), draw(30, 4, seed=2)
    torch.testing.assert_close(plan.sum(1), torch.full_like(x[:, 0], 1 / 30))
    torch.testing.assert_close(plan.sum(0), torch.full_like(x[:, 0], 1 / 30))
    torch.testing.assert_close(result.apply(values), plan @ values)
    torch.testing.assert_close(result.barycentric_projection(), 30 * plan @ y)
    cost = (plan * torch.cdist(x, y)).sum()
    torch.testing.assert_close(result.transport_cost(), cost)
    entropy = 0 if solver == "exact" else result.epsilon * (plan * (plan * 900).log()).sum()
    torch.testing.assert_close(result.value, cost + entropy, rtol=1e-6, atol=0)
    assert result.solver == solver


def test_convergence_is_warned_of_at_every_problem():
    problem = {"x": draw(50), "y": draw(50, seed=1), "relative_epsilon": 1e-3, "max_iterations": 3}
    with pytest.warns(
        ConvergenceWarning, match="stopped .* marginal error of .* above the tolerance .* max_iterations"
    ):
        result = optimal_transport(**problem)
    assert not result.converged
    assert result.iterations == 3
    assert result.marginal_error > 1e-3
    # Another problem is another warning: one that was harmless says nothing of the next.
    with pytest.warns(ConvergenceWarning, match="marginal error"):
        optimal_transport(**problem | {"y": draw(50, seed=2)})
    with pytest.raises(RuntimeError, match="marginal error"):
        optimal_transport(**problem, strict=True)
    with pytest.raises(RuntimeError, match=r"stopped .* above the tolerance"):
        optimal_transport(**problem, strict=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "fast"}, "solver must be one of auto, dense, .*, got 'fast'"),
        ({"solver": "online", "cost": lambda x, y: (x - y).abs().sum(-1)}, "needs a KeOps formula"),
        ({"solver": "multiscale", "cost": "euclidean"}, "'multiscale' is for squared distances"),
        ({"solver": "exact", "epsilon": 0.1}, "'exact' takes neither epsilon nor rho"),
        ({"tolerance": 0.0}, r"tolerance must be in \(0, 2\)"),
        ({"max_iterations": 0}, "max_iterations must be at least 1"),
        ({"relative_epsilon": None}, "relative_epsilon must be a positive finite number"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        optimal_transport(draw(10), draw(10, seed=1), **options)


def test_dense_matrices_beyond_memory_are_refused(monkeypatch):
    monkeypatch.setattr(LIMITS, "small_bytes", 0)
    monkeypatch.setattr(memory, "free_memory", lambda like: 1e3)
    with pytest.raises(ValueError, match=r"needs 0.0 GB for 100 x 100 samples, more than there is: use 'blocked'"):
        optimal_transport(draw(100), draw(100, seed=1), solver="dense")


def test_keops_without_a_compiler(monkeypatch):
    geomloss.require_compiler.cache_clear()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        RuntimeError, match="'online' compiles KeOps formulas: install g\\+\\+, or use solver='blocked'"
    ):
        optimal_transport(draw(10), draw(10, seed=1), solver="online")


def test_linear_programs_need_pot_or_a_compiler(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    monkeypatch.setattr(exact, "can_solve_sparsely", lambda: False)
    weights = torch.softmax(draw(10, 1)[:, 0], 0)
    for options in ({"y": draw(7, seed=1)}, {"y": draw(10, seed=1), "weights": (weights, None)}):
        with pytest.raises(ImportError, match="is a linear program: pip install"):
            optimal_transport(draw(10), solver="exact", **options)


def test_linear_programs_are_given_to_pot(monkeypatch):
    given = {}

    def emd(a, b, C, numItermax, log):
        given.update(a=a, b=b, C=C)
        return np.outer(a, b), {"u": 0 * a, "v": 0 * b, "warning": None}

    monkeypatch.setitem(sys.modules, "ot", types.SimpleNamespace(emd=emd))
    x, y = draw(10), draw(7, seed=1)
    result = optimal_transport(x, y, solver="exact")
    np.testing.assert_allclose(given["a"], np.full(10, 0.1))
    np.testing.assert_allclose(given["b"], np.full(7, 1 / 7))
    np.testing.assert_allclose(given["C"], costs.SqEuclidean().pairwise(x, y).numpy())
    torch.testing.assert_close(result.value, costs.SqEuclidean().pairwise(x, y).mean())


def test_linear_programs_split_mass():
    pytest.importorskip("ot")
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0], [2.0]])
    result = optimal_transport(x, y, solver="exact", weights=(torch.tensor([0.25, 0.75]), None))
    torch.testing.assert_close(result.value, torch.tensor(1 / 3 + 1 / 12))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_samples_give_a_float32_result(dtype):
    x = torch.rand(30, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    result = optimal_transport(x, x + 1)
    assert result.value.dtype == torch.float32
    assert result.converged
    assert optimal_transport(x, x).value.dtype == torch.float32


@pytest.mark.parametrize("solver", ["dense", "blocked", FUSED, "exact"])
def test_without_gradients_there_is_no_graph(solver):
    x, y = draw(20).requires_grad_(), draw(20, seed=1)
    with torch.no_grad():
        assert not optimal_transport(x, y, solver=solver).value.requires_grad
    assert optimal_transport(x, y, solver=solver).value.requires_grad


def test_threads_are_left_as_they_were():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        optimal_transport(draw(20), draw(20, seed=1))
        assert torch.get_num_threads() == 2
        with pytest.raises(ValueError, match="must reduce the last dimension"):
            optimal_transport(draw(20), draw(20, seed=1), cost=lambda x, y: x - y)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
