"""Compiled passes over all pairs against the same sums in double, and where they are taken."""

import gc
import runpy
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sums_over_pairs import CLOSE, COSTS, check, samples

from lightning_gap import native
from lightning_gap.monge.maps.plan_images import strictly_convex
from lightning_gap.monge.ot import solve
from lightning_gap.monge.ot.costs import CallableCost, CostFormula, PNorm, SqEuclidean, resolve
from lightning_gap.monge.ot.costs.formula import formula_of
from lightning_gap.monge.ot.limits import LIMITS, Size
from lightning_gap.monge.ot.solve import choose_solver, optimal_transport
from lightning_gap.monge.ot.solvers.fused import passes as fused
from lightning_gap.monge.ot.solvers.fused import triton_passes
from lightning_gap.monge.ot.solvers.fused.passes import Passes

compiler = pytest.mark.compiler


@compiler
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("share", [0.3, 0.01])
def test_a_pass_is_the_sums_over_the_matrix(cost, dtype, share):
    check(*samples(130, 1111, 3, dtype, sphere=cost == "geodesic"), resolve(cost), share)


@compiler
@pytest.mark.parametrize("cost", ["euclidean", "pnorm(p=1)", "geodesic"])
def test_a_distance_and_its_square(cost):
    convex = strictly_convex(resolve(cost), 0.3)
    check(*samples(130, 600, 3, torch.float64, sphere=cost == "geodesic"), convex)


@compiler
@given(
    n=st.integers(1, 70),
    m=st.one_of(st.integers(1, 70), st.sampled_from([511, 512, 513, 1024, 1025])),
    d=st.sampled_from([1, 2, 3, 4, 5, 17, 40, 300]),
    dtype=st.sampled_from(list(CLOSE)),
    cost=st.sampled_from(["sqeuclidean", "euclidean", "pnorm(p=1.5)"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_any_shape(n, m, d, dtype, cost, seed):
    check(*samples(n, m, d, dtype, seed=seed), resolve(cost), 0.2)


@compiler
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine", "pnorm(p=1.5)"])
@pytest.mark.parametrize("shift", [1e2, 1e4])
def test_far_from_the_origin_differences_keep_their_digits(cost, shift):
    # The rounded samples are the samples.
    x, y, a, b, G = samples(60, 700, 5, torch.float32, shift=shift)
    check(x, y, a, b, G, resolve(cost), close=2e-4 if cost == "cosine" else None)


@compiler
@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e4, 1e12])
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "elastic(lam=0.5)", "pnorm(p=3)"])
def test_any_unit(cost, scale):
    x, y, a, b, G = samples(40, 90, 3, torch.float64)
    check(x * scale, y * scale, a, b, G, resolve(cost), close=1e-9)


@compiler
def test_small_epsilons_take_exponents_in_double():
    x, y, a, b, G = samples(64, 300, 3, torch.float32)
    assert check(x, y, a, b, G, SqEuclidean(), 0.1).dtype == torch.float32
    assert check(x, y, a, b, G, SqEuclidean(), 1e-4, close=1e-4).dtype == torch.float64


@compiler
def test_points_that_coincide_pull_nowhere():
    for name in ("euclidean", "pnorm(p=1)", "pnorm(p=1.5)", "geodesic", "elastic(lam=1.0)"):
        x = samples(50, 50, 3, torch.float64, sphere=True)[0]
        a = torch.full((50,), 1 / 50, dtype=torch.float64)
        passes = Passes(x, x.clone(), resolve(name), 1e-7, 2.0)
        gradients, masses = passes.pulls(0 * a - a.log(), a, 0 * a, a)
        torch.testing.assert_close(masses, a)
        assert float(gradients.abs().max()) < 1e-12, name


@compiler
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "pnorm(p=1.5)"])
def test_one_far_sample_costs_the_others_no_digits(cost):
    x, y, a, b, G = samples(50, 4000, 4, torch.float32)
    for side in (x, y):
        points = side.clone()
        points[17] = 1e5
        check(
            *((points, y) if side is x else (x, points)), a, b, G, resolve(cost), 1e-3 if cost == "euclidean" else 1e-6
        )


@compiler
def test_samples_of_weight_zero_count_for_nothing():
    x, y, a, b, G = samples(50, 600, 4, torch.float32)
    a, b = a.clone(), b.clone()
    a[::3], b[1::4] = 0, 0
    y[1::4] = 1e6
    cost, kept = SqEuclidean(), b > 0
    passes, few = (Passes(x, points, cost, 0.5, 40.0) for points in (y, y[kept].contiguous()))
    F, _ = passes.soft_minimum(G, b, weights=a)
    expected, _ = few.soft_minimum(G[kept], b[kept], weights=a)
    torch.testing.assert_close(F, expected, rtol=1e-4, atol=1e-4)


@compiler
def test_threads_share_the_rows(monkeypatch):
    monkeypatch.setattr(fused, "_FEW_PAIRS", 1)
    before = torch.get_num_threads()
    x, y, a, b, G = samples(203, 640, 4, torch.float32)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        passes = Passes(x, y, SqEuclidean(), 0.3, 40.0)
        F, columns = passes.soft_minimum(G, b, weights=a)
        found.append((F, columns, *passes.pulls(F, a, G, b)))
    torch.set_num_threads(before)
    one, three = found
    for k in (0, 2, 3):
        assert torch.equal(one[k], three[k])
    torch.testing.assert_close(one[1], three[1], rtol=1e-6, atol=0)


@compiler
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("d", [5, 30])
def test_a_solve_is_that_of_blocks(dtype, d):
    x, y, a, b, _ = samples(700, 650, d, dtype)
    found = []
    for solver in ("fused", "blocked"):
        points = x.clone().requires_grad_(), y.clone().requires_grad_(), a.to(dtype).requires_grad_()
        weights = points[2], b.to(dtype)
        result = optimal_transport(*points[:2], cost="pnorm(p=1.5)", weights=weights, solver=solver)
        found.append((result.value.detach(), *torch.autograd.grad(result.value, points)))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)


@pytest.fixture
def no_matrix(monkeypatch):
    monkeypatch.setattr(LIMITS, "dense", Size(100, 100), raising=False)


@compiler
def test_auto_takes_it_beyond_what_a_matrix_holds(no_matrix):
    x, y = torch.rand(30, 2), torch.rand(20, 2)
    assert choose_solver("auto", PNorm(1.5), x, y) == "fused"
    assert choose_solver("auto", SqEuclidean(), x[:4], y[:4]) == "dense"
    assert choose_solver("auto", CallableCost(lambda p, q: (p - q).abs().sum(-1)), x, y) == "blocked"
    assert optimal_transport(x, y).solver == "fused"


@compiler
def test_a_larger_solve_starts_from_fewer_samples(no_matrix):
    x, y, *_ = samples(1500, 1400, 3, torch.float64)
    result, expected = (optimal_transport(x, y, solver=solver, tolerance=1e-8) for solver in ("auto", "blocked"))
    assert result.solver == "fused"
    torch.testing.assert_close(result.value, expected.value)


def test_without_a_compiler_it_is_blocks(no_matrix, monkeypatch):
    monkeypatch.setattr(native, "compiler", lambda: None)
    x, y = torch.rand(30, 2), torch.rand(20, 2)
    assert choose_solver("auto", SqEuclidean(), x, y) == "blocked"
    with pytest.raises(RuntimeError, match=r"compiles C\+\+: install g\+\+ or clang\+\+, or use solver='blocked'"):
        optimal_transport(x, y, solver="fused")


def test_what_has_no_formula_is_refused():
    x, y = torch.rand(30, 2), torch.rand(20, 2)
    with pytest.raises(ValueError, match=r"needs a formula, which the cost callable.* has not: use 'blocked'"):
        optimal_transport(x, y, cost=lambda p, q: (p - q).abs().sum(-1), solver="fused")


class Weighted(SqEuclidean):
    def h(self, z):
        return (z.square() * torch.arange(1, z.shape[-1] + 1)).sum(-1)


def test_a_class_that_changes_a_cost_does_not_inherit_its_formula():
    x, y = torch.rand(30, 2), torch.rand(20, 2)
    assert formula_of(SqEuclidean()) is not None
    assert formula_of(Weighted()) is None
    with pytest.raises(ValueError, match="needs a formula"):
        optimal_transport(x, y, cost=Weighted(), solver="fused")


def test_a_class_that_is_not_used_any_more_is_let_go_of():
    def defined_and_used():
        own = type("Own", (SqEuclidean,), {})
        assert formula_of(own()) is not None
        return weakref.ref(own)

    own = defined_and_used()
    gc.collect()
    assert own() is None


def test_every_cost_by_name_has_a_formula():
    assert all(formula_of(resolve(cost)) is not None for cost in COSTS)


@compiler
@pytest.mark.parametrize(
    ("cost", "scale", "dtype"),
    [("sqpnorm(p=10)", 1e-4, torch.float32), ("sqpnorm(p=16)", 300.0, torch.float32),
     ("sqpnorm(p=400)", 10.0, torch.float64), ("euclidean", 1e-20, torch.float32), ("euclidean", 5e18, torch.float32)],
)  # fmt: skip
def test_powers_beyond_the_format_are_left_to_blocks(cost, scale, dtype):
    x, y, *_ = (points * scale for points in samples(150, 130, 3, dtype))
    points = x.requires_grad_()
    with pytest.warns(RuntimeWarning, match="solver='blocked' is run instead"):
        found = optimal_transport(points, y, cost=cost, solver="fused")
    expected = optimal_transport(points, y, cost=cost, solver="blocked")
    assert found.solver == expected.solver == "blocked"
    assert torch.equal(found.value, expected.value)
    assert torch.equal(*(torch.autograd.grad(each.value, points)[0] for each in (found, expected)))


@compiler
def test_a_formula_that_lies_is_found_out():
    class Lying(SqEuclidean):
        formula = CostFormula("z * z", "3 * z")

        def h(self, z):
            return z.square().sum(-1)

    with pytest.warns(RuntimeWarning, match="does not give its values"):
        optimal_transport(torch.rand(30, 2), torch.rand(20, 2), cost=Lying(), solver="fused")


@compiler
def test_another_default_device_is_not_that_of_the_samples():
    x, y = torch.rand(30, 2), torch.rand(20, 2)
    expected = optimal_transport(x, y, solver="fused").value
    with torch.device("meta"):
        assert torch.equal(optimal_transport(x, y, solver="fused").value, expected)


@compiler
@pytest.mark.parametrize("cost", ["sqeuclidean", "cosine", "euclidean"])
def test_inference_mode_is_none_of_its_business(cost):
    x, y, *_ = samples(60, 50, 3, torch.float32)
    expected = optimal_transport(x, y, cost=cost, rho=1.0, solver="fused").value
    with torch.inference_mode():
        inner = x.clone(), y.clone()
        assert torch.equal(optimal_transport(*inner, cost=cost, rho=1.0, solver="fused").value, expected)


@compiler
def test_antipodes_keep_their_digits():
    torch.manual_seed(0)
    x, y = (
        torch.nn.functional.normalize(torch.cat([1e-3 * torch.randn(60, 2), torch.full((60, 1), z)], 1))
        for z in (1, -1)
    )
    gradients = []
    for solver in ("fused", "blocked"):
        points = x.double().float().requires_grad_()
        gradients.append(
            torch.autograd.grad(optimal_transport(points, y, cost="geodesic", solver=solver).value, points)[0]
        )
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-4


# ------------------------------------------------------------------------------------------------- without a GPU here


def samples_on(kind):
    return SimpleNamespace(device=torch.device(kind))


def test_a_gpu_takes_it_where_triton_is(monkeypatch):
    x = samples_on("cuda:0")
    monkeypatch.setattr(triton_passes, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"takes Triton on a GPU: pip install triton, or use solver='blocked'"):
        choose_solver("fused", SqEuclidean(), x, x)
    monkeypatch.setattr(solve, "has_triton", lambda: True)
    monkeypatch.setattr(solve, "triton_expressions", lambda formula: {})
    assert choose_solver("fused", SqEuclidean(), x, x) == "fused"


def test_a_triton_that_cannot_be_imported_is_told_of(monkeypatch, tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('libtriton.so: undefined symbol')")
    package = "lightning_gap.monge.ot.solvers.fused"
    file = Path(triton_passes.__file__).with_name("triton_kernels.py")
    with monkeypatch.context() as damaged:
        damaged.syspath_prepend(tmp_path)
        damaged.delitem(sys.modules, "triton", raising=False)
        kernels = SimpleNamespace(**runpy.run_path(str(file)))
    monkeypatch.setitem(sys.modules, f"{package}.triton_kernels", kernels)
    monkeypatch.setattr(f"{package}.triton_kernels", kernels, raising=False)
    monkeypatch.setattr(triton_passes, "find_spec", lambda name: name)
    x = samples_on("cuda:0")
    with pytest.raises(RuntimeError, match=r"cannot be imported here \(libtriton.so: undefined symbol\): install"):
        choose_solver("fused", SqEuclidean(), x, x)
    assert triton_passes.triton_expressions(formula_of(SqEuclidean())) is None


def test_what_triton_does_not_read_is_refused(monkeypatch):
    monkeypatch.setattr(solve, "has_triton", lambda: True)
    monkeypatch.setattr(solve, "triton_expressions", lambda formula: None)
    x = samples_on("cuda:0")
    with pytest.raises(ValueError, match="reads formulas as Python on a GPU, which that of the cost sqeuclidean"):
        choose_solver("fused", SqEuclidean(), x, x)


def test_other_devices_are_refused():
    x = samples_on("mps")
    with pytest.raises(ValueError, match="is for a CPU or CUDA, and the samples are on mps: use 'blocked'"):
        choose_solver("fused", SqEuclidean(), x, x)
