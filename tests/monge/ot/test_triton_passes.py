"""Triton's passes over all pairs against the same sums in double: in Triton's interpreter, or on a GPU."""

import os
import subprocess
import sys

import pytest
import torch
from sums_over_pairs import CLOSE, COSTS, check, samples

from lightning_gap.monge.maps.plan_images import strictly_convex
from lightning_gap.monge.ot.costs import CostFormula, SqEuclidean, resolve
from lightning_gap.monge.ot.solve import optimal_transport
from lightning_gap.monge.ot.solvers.fused import kernel, triton_passes
from lightning_gap.monge.ot.solvers.fused.triton_passes import TritonPasses, triton_expressions

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not (GPU or INTERPRETED), reason="needs a GPU, or make test-triton: Triton's interpreter"),
    *([pytest.mark.gpu] if GPU else []),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles of few samples."""
    monkeypatch.setattr(triton_passes, "_ROWS", 32)
    monkeypatch.setattr(triton_passes, "_NUMBERS", 1 << 12)


def on_device(*tensors):
    return tuple(each.to(DEVICE) for each in tensors)


def check_sums(given, cost, share=0.05, close=None):
    return check(*on_device(*given), resolve(cost), share, close, passes=TritonPasses)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("cost", COSTS)
def test_a_pass_is_the_sums_over_the_matrix(cost, dtype):
    check_sums(samples(40, 150, 3, dtype, sphere=cost == "geodesic"), cost)


@pytest.mark.parametrize("cost", ["euclidean", "geodesic"])
def test_a_distance_and_its_square(cost):
    check_sums(samples(30, 50, 3, torch.float64, sphere=cost == "geodesic"), strictly_convex(resolve(cost), 0.3))


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize(
    ("n", "m", "d"), [(1, 1, 1), (32, 128, 1), (33, 127, 2), (5, 129, 4), (64, 1, 5), (20, 30, 17), (3, 6, 40)]
)
def test_any_shape(n, m, d, dtype):
    for cost in ("sqeuclidean", "pnorm(p=1.5)"):
        check_sums(samples(n, m, d, dtype, seed=n + m + d), cost, 0.2)


@pytest.mark.parametrize("programs", [0, 3, 1000])
def test_columns_are_split_over_programs(programs, monkeypatch):
    monkeypatch.setattr(triton_passes, "_PROGRAMS", programs)
    check_sums(samples(20, 300, 2, torch.float32), "euclidean")


def test_products_and_differences_are_both_taken():
    near = samples(40, 60, 5, torch.float32)
    assert check_sums(near, "sqeuclidean", 0.3).by_products
    assert not check_sums(near, "euclidean", 0.3).by_products
    assert not check_sums(near, "sqeuclidean", 1e-4, close=1e-4).by_products
    for cost in ("sqeuclidean", "cosine"):
        far = samples(30, 40, 5, torch.float32, shift=1e4)
        check_sums(far, cost, close=2e-4 if cost == "cosine" else None)


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean"])
def test_one_far_sample_costs_the_others_no_digits(cost):
    x, y, a, b, G = samples(20, 200, 4, torch.float32)
    y[17] = 1e5
    check_sums((x, y, a, b, G), cost, 1e-3 if cost == "euclidean" else 1e-6)


def test_points_that_coincide_pull_nowhere():
    for name in ("euclidean", "pnorm(p=1)", "pnorm(p=1.5)", "geodesic", "elastic(lam=1.0)"):
        (x,) = on_device(samples(30, 30, 3, torch.float64, sphere=True)[0])
        a = x.new_full((30,), 1 / 30)
        gradients, masses = TritonPasses(x, x.clone(), resolve(name), 1e-7, 2.0).pulls(0 * a - a.log(), a, 0 * a, a)
        torch.testing.assert_close(masses, a)
        assert float(gradients.abs().max()) < 1e-12, name


def test_samples_of_weight_zero_count_for_nothing():
    x, y, _, b, G = on_device(*samples(30, 200, 4, torch.float32))
    b[1::4] = 0
    b[64:128] = 0  # a whole tile
    y[1::4] = 1e6
    kept = b > 0
    F, few = (
        TritonPasses(x, y[some].contiguous(), SqEuclidean(), 0.5, 40.0).soft_minimum(G[some], b[some])[0]
        for some in (slice(None), kept)
    )
    torch.testing.assert_close(F, few, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- solves


@pytest.fixture
def by_triton(monkeypatch):
    """A solve of the CPU's samples takes Triton's passes, where these are interpreted; large tiles, which are few."""
    monkeypatch.setattr(triton_passes, "_ROWS", 128)
    monkeypatch.setattr(triton_passes, "_NUMBERS", 1 << 15)
    monkeypatch.setattr(kernel, "passes_on", lambda device: TritonPasses)


def solved(solver, x, y, weights, **options):
    points = x.clone().requires_grad_(), y.clone().requires_grad_(), weights[0].clone().requires_grad_()
    result = optimal_transport(*points[:2], weights=(points[2], weights[1]), solver=solver, **options)
    return result, torch.autograd.grad(result.value, points)


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("cost", "dtype", "rho"),
    [("sqeuclidean", torch.float32, None), ("pnorm(p=1.5)", torch.float64, None), ("euclidean", torch.float32, 1.0)],
)
def test_a_solve_is_that_of_blocks(cost, dtype, rho, by_triton):
    x, y, a, b, _ = on_device(*samples(120, 100, 5, dtype))
    weights = a.to(dtype), b.to(dtype)
    options = {"cost": cost, "rho": rho, "relative_epsilon": 0.1}
    result, gradients = solved("fused", x, y, weights, **options)
    expected, expected_gradients = solved("blocked", x, y, weights, **options)
    assert result.converged
    torch.testing.assert_close(result.value, expected.value, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert float((found - wanted).norm() / wanted.norm()) < 1e-3


@pytest.mark.compiler
def test_a_self_term_is_that_of_blocks(by_triton):
    (x,) = on_device(samples(100, 1, 4, torch.float32)[0])
    found, expected = (optimal_transport(x, x, solver=solver).value for solver in ("fused", "blocked"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.compiler
def test_rounding_of_two_passes_does_not_let_potentials_drift(by_triton):
    x, y, *_ = on_device(*samples(120, 100, 5, torch.float32))
    assert optimal_transport(x, y, solver="fused", tolerance=1e-8, max_iterations=100).converged


@pytest.mark.compiler
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_powers_beyond_the_format_are_left_to_blocks(by_triton):
    x, y, *_ = on_device(*(points * 300 for points in samples(20, 20, 3, torch.float32)))
    with pytest.warns(RuntimeWarning, match="solver='blocked' is run instead"):
        found = optimal_transport(x, y, cost="sqpnorm(p=16)", solver="fused")
    assert torch.equal(found.value, optimal_transport(x, y, cost="sqpnorm(p=16)", solver="blocked").value)


# ----------------------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("term", ["z > 0 ? z : -z", "std::abs(z)", "hypot(z, q)", "s * s"])
def test_a_formula_that_is_no_python_is_none_of_triton(term):
    assert triton_expressions(CostFormula(term, "1")) is None


def test_what_does_not_compile_says_what_to_do(monkeypatch):
    x, y, _, b, G = on_device(*samples(10, 10, 2, torch.float32))
    passes = TritonPasses(x, y, SqEuclidean(), 1.0, 10.0)
    monkeypatch.setattr(passes, "_expressions", {})
    with pytest.raises(RuntimeError, match=r"Triton does not run on .* here \(.*\): use solver='blocked'"):
        passes.soft_minimum(G, b)


# Our own launches, with a driver that knows of a GPU, and a compilation in the place of each start.
BUILD = """
import re
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from lightning_gap.monge.ot.costs import resolve
from lightning_gap.monge.ot.solvers.fused import triton_kernels
from lightning_gap.monge.ot.solvers.fused.triton_passes import TritonPasses

class NoGPU:
    def get_current_target(self):
        return GPUTarget("cuda", 80, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

class Building:
    def __init__(self, kernel):
        self.kernel, self.arg_names = kernel, kernel.arg_names

    def __getitem__(self, grid):
        def build(*arguments, **options):
            made = self.kernel.warmup(*arguments, grid=grid, **options)
            offsets = re.findall(r"tt.addptr .*, tensor<[0-9x]*x(i[0-9]+)>", made.asm["ttir"])
            assert offsets and set(offsets) == {"i64"}, offsets
            assert made.asm["cubin"]
        return build

driver.set_active(NoGPU())
for name in ("soft_minimum", "pull"):
    setattr(triton_kernels, name, Building(getattr(triton_kernels, name)))
for cost, dtype, d, epsilon in [
    ("sqeuclidean", torch.float32, 7, 1.0),
    ("euclidean", torch.float32, 1, 1.0),
    ("pnorm(p=1.5)", torch.float64, 16, 1.0),
    ("sqpnorm(p=3)", torch.float32, 20, 1e-4),
]:
    x, a = torch.rand(50, d, dtype=dtype), torch.full((50,), 0.02, dtype=torch.float64)
    passes = TritonPasses(x, x + 1, resolve(cost), epsilon, 20.0)
    passes.soft_minimum(0 * a, a)
    passes.pulls(0 * a, a, 0 * a, a)
print("built")
"""


def test_they_compile_for_a_gpu_that_is_not_here_and_place_by_64_bits(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", BUILD], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "built", done.stderr
