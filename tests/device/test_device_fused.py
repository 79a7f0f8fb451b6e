"""The fused solver on a device is that of the CPU, by Triton's passes and by FlashSinkhorn's.

On the emulated device kernels run in Triton's interpreter.
"""

import os
from contextlib import nullcontext

import pytest
import torch
from comparison import same_on_cpu
from counts import counting
from ground_costs import COSTS

from lightning_gap.monge import monge_gap, optimal_transport, sinkhorn_divergence
from lightning_gap.monge.ot.result import ConvergenceWarning
from lightning_gap.monge.ot.solvers.fused import triton_kernels, triton_passes

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
EMULATED = os.environ.get("EMULATED_DEVICE", "0") not in ("", "0")
pytestmark = [
    pytest.mark.triton,
    pytest.mark.compiler,  # of the CPU's passes
    pytest.mark.skipif(EMULATED and not INTERPRETED, reason="needs make test-triton: Triton's interpreter"),
]
TIGHT = {"tolerance": 1e-5, "max_iterations": 5000, "solver": "fused"}


class Unmasking:
    """A kernel that takes the memory behind an emulated device's tensors."""

    def __init__(self, kernel):
        self.kernel, self.arg_names = kernel, getattr(kernel, "arg_names", None)

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            assert all(each.device.type == "cuda" for each in arguments if isinstance(each, torch.Tensor))
            return self.kernel[grid](*(getattr(each, "raw", each) for each in arguments), **options)

        return launch


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """Of which there are few, for the interpreter."""
    if EMULATED:
        monkeypatch.setattr(triton_passes, "_ROWS", 64)
        monkeypatch.setattr(triton_passes, "_NUMBERS", 1 << 14)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        for name in ("soft_minimum", "pull"):
            monkeypatch.setattr(triton_kernels, name, Unmasking(getattr(triton_kernels, name)))


def samples(cost="sqeuclidean", n=30, m=40):
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(n, 3, generator=generator), 0.6 * torch.randn(m, 3, generator=generator) + 1
    if cost in ("geodesic", "cosine"):
        x, y = (t / t.norm(dim=1, keepdim=True) for t in (x, y))
    return x, y


@pytest.mark.parametrize("name", [name for name, cost in COSTS.items() if not callable(cost)])
def test_costs(device, name):
    same_on_cpu(
        lambda x, y: optimal_transport(x, y, cost=COSTS[name], **TIGHT).value, *samples(name), device=device, share=2e-3
    )


VARIANTS = {
    "divergence": lambda x, y, **o: sinkhorn_divergence(x, y, **o),
    "gap": lambda x, y, **o: monge_gap(x, x + 0.5 * y[: len(x)], relative_epsilon=0.3, **o),
    "unbalanced": lambda x, y, **o: sinkhorn_divergence(x, y, rho=2.0, **o),
    "weights": lambda x, y, **o: optimal_transport(x, y, weights=(ramp(x), ramp(y)), **o).value,
}


def ramp(samples):
    weights = torch.arange(0, len(samples), device=samples.device, dtype=samples.dtype)
    return weights / weights.sum()


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(device, name):
    same_on_cpu(lambda x, y: VARIANTS[name](x, y, **TIGHT), *samples(), device=device, share=2e-3)


@pytest.mark.emulated
def test_a_sweep_does_not_wait_for_the_device(device):
    x, y = (points.to(device) for points in samples())
    waits = []
    for sweeps in (60, 160):
        options = TIGHT | {"max_iterations": sweeps, "tolerance": 1e-12}
        with counting() as counts, pytest.warns(ConvergenceWarning):
            optimal_transport(x, y, relative_epsilon=1e-3, **options)
        waits.append(counts.syncs.total())
    assert waits[1] - waits[0] <= 6


@pytest.fixture
def flash(monkeypatch):
    """FlashSinkhorn, whose kernel takes the memory behind the emulated device's tensors."""
    module = pytest.importorskip("flash_sinkhorn.kernels.sinkhorn_flashstyle_sqeuclid")
    if EMULATED:
        name = "_flashsinkhorn_lse_raw_kernel_impl"
        monkeypatch.setattr(module, name, Unmasking(getattr(module, name)))


FLASH = {
    "sqeuclidean": lambda x, y, **o: optimal_transport(x, y, **o).value,
    "cosine": lambda x, y, **o: optimal_transport(x, y, cost="cosine", **o).value,
    "many coordinates": lambda x, y, **o: optimal_transport(x.repeat(1, 14), y.repeat(1, 14), **o).value,
    "unbalanced": lambda x, y, **o: optimal_transport(x, y, rho=2.0, **o).value,
    "weights": lambda x, y, **o: optimal_transport(x, y, weights=(ramp(x), ramp(y)), **o).value,
    "divergence": lambda x, y, **o: sinkhorn_divergence(x, y, **o),
}


@pytest.mark.parametrize("name", FLASH)
def test_flash_sinkhorn_in_our_solver(device, name, flash):
    def value(x, y):
        solver = "flash" if x.device.type == "cuda" else "dense"
        return FLASH[name](x, y, **(TIGHT | {"solver": solver}))

    same_on_cpu(value, *samples(), device=device, share=2e-3)
