"""Where FlashSinkhorn is taken, and what refuses it; its numbers are tested in tests/device."""

import sys
from types import SimpleNamespace

import pytest
import torch

from lightning_gap.monge.ot.costs import Cosine, Euclidean, Mahalanobis, PNorm, SqEuclidean
from lightning_gap.monge.ot.solve import choose_solver, optimal_transport
from lightning_gap.monge.ot.solvers.fused import flash_passes
from lightning_gap.monge.ot.solvers.fused.kernel import FlashKernel


class OnCuda(SimpleNamespace):
    """What stands in for samples of a GPU."""

    def __len__(self):
        return self.shape[0]


def on_cuda(dtype=torch.float32, rows=20, features=3):
    return OnCuda(device=torch.device("cuda:0"), dtype=dtype, shape=(rows, features))


@pytest.fixture
def installed(monkeypatch):
    for name in ("flash_sinkhorn", *(f"flash_sinkhorn.{part}" for part in ("kernels",))):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "flash_sinkhorn.kernels.sinkhorn_flashstyle_sqeuclid", SimpleNamespace())


@pytest.mark.parametrize("cost", [SqEuclidean(), Cosine(), PNorm(2.0), Mahalanobis([[1.0, 2.0]])], ids=str)
def test_it_takes_squared_distances_in_float32_on_cuda(cost, installed):
    assert choose_solver("flash", cost, on_cuda(), on_cuda()) == "flash"


def test_other_samples_are_refused_with_the_remedy(installed):
    x = torch.rand(5, 2)
    with pytest.raises(ValueError, match="is for CUDA, and the samples are on cpu: use 'fused' or 'blocked'"):
        optimal_transport(x, x + 1, solver="flash")
    with pytest.raises(ValueError, match="is for squared distances, got the cost euclidean: use 'fused' or 'blocked'"):
        choose_solver("flash", Euclidean(), on_cuda(), on_cuda())
    double = on_cuda(torch.float64)
    with pytest.raises(ValueError, match=r"in float32, and the samples are torch.float64: use x.float\(\), or 'fused'"):
        choose_solver("flash", SqEuclidean(), double, double)


@pytest.mark.parametrize("features", [2, 32, 64])
def test_samples_whose_filled_coordinates_it_cannot_number_are_refused(features, installed):
    least = (1 << 31) // max(32, features)
    few, many = (on_cuda(rows=rows, features=features) for rows in (least - 1, least))
    assert choose_solver("flash", SqEuclidean(), few, few) == "flash"
    with pytest.raises(ValueError, match=r"takes fewer than 2147483648 coordinates of a side, .*: use 'fused'"):
        choose_solver("flash", SqEuclidean(), few, many)


def test_without_the_library_its_extra_is_named(monkeypatch):
    for name in [*(each for each in sys.modules if each.startswith("flash_sinkhorn.")), "flash_sinkhorn"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError) as raised:
        choose_solver("flash", SqEuclidean(), on_cuda(), on_cuda())
    assert str(raised.value) == "solver='flash' needs flash_sinkhorn: pip install 'lightning_gap[flash]'"


@pytest.mark.parametrize(("epsilon", "dtype"), [(1e-6, torch.float32), (0.1, torch.float64)])
def test_what_float32_does_not_resolve_is_refused(epsilon, dtype):
    problem = SimpleNamespace(x=torch.zeros(3, 2, dtype=dtype))
    with pytest.raises(ValueError, match=r"does not resolve costs of .* epsilons: use another epsilon"):
        FlashKernel([problem], [epsilon], [1.0])


def test_the_kernel_is_called_in_full_float32_and_untuned(monkeypatch):
    """Its soft minimum, by a stand-in that takes the same arguments, is that of the formula."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 5, generator=generator) + 7 for n in (30, 40))
    calls = []

    def kernel(x, y, bias, eps, *, cost_scale, allow_tf32, autotune):
        calls.append((x.shape[1], eps, allow_tf32, autotune))
        assert x.dtype == y.dtype == bias.dtype == torch.float32
        return -eps * torch.logsumexp(2 * cost_scale * x @ y.T / eps + bias, 1)

    monkeypatch.setattr(flash_passes, "require_flash", lambda: SimpleNamespace(flashsinkhorn_lse=kernel))
    monkeypatch.setattr(flash_passes.TritonPasses, "_keep", lambda self, rows, columns: setattr(self, "_d", 5))
    b = torch.rand(40, generator=generator, dtype=torch.float64)
    b, G = b / b.sum(), torch.randn(40, generator=generator, dtype=torch.float64)
    found, _ = flash_passes.FlashPasses(x, y, SqEuclidean(), 0.5, 60.0).soft_minimum(G, b, share=0.9)
    costs = torch.cdist(x.double(), y.double()).square()
    torch.testing.assert_close(found, -0.9 * torch.logsumexp(b.log() + G - costs / 0.5, 1), rtol=1e-5, atol=1e-4)
    assert calls == [(32, 1.0, False, False)]
