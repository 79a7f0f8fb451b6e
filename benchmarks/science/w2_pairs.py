"""Fresh samples of the Wasserstein-2 benchmark's pairs Mix3toMix10, from the networks that define them.

Korotin et al. 2021, "Do Neural Optimal Transport Solvers Work? A Continuous Wasserstein-2 Benchmark": the source is a
mixture of three Gaussians, the true map the gradient of the sum of two input-convex networks with CELU activations,
shifted and scaled. The networks' states are ``benchmarks/Mix3toMix10/{D}_v1.pt`` and ``{D}_v2.pt`` of
github.com/iamalexkorotin/Wasserstein2Benchmark.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Mix3ToMix10"]

_COMPONENTS, _SPREAD, _CURVATURE, _BLOCK = 3, 0.4, 0.01, 16_384


class Mix3ToMix10:
    """A source, the true map, and samples of both ends.

    Args:
        folder: Where the networks' states are.
        dim: Dimension, one of the benchmark's.
        pair: ``(n, d)`` source samples and their true images, by which shift and scale of the map are found; by
            default the images have mean 0 and variance 1 a feature, as the benchmark has them up to chance.
    """

    def __init__(self, folder: Path, dim: int, pair: tuple[Tensor, Tensor] | None = None) -> None:
        rng = np.random.RandomState(0)  # the benchmark's own seed
        centers = np.stack([rng.choice(_COMPONENTS, _COMPONENTS, replace=False) for _ in range(dim)], axis=1) - 1.0
        roots = rng.normal(size=(_COMPONENTS, dim, dim)).astype(np.float32)
        roots /= np.sqrt((roots**2).sum(axis=2, keepdims=True))
        unit = np.sqrt((centers**2).sum(1).mean() + dim * _SPREAD**2) / np.sqrt(dim)
        self.dim = dim
        self.centers = torch.tensor(centers / unit, dtype=torch.float32)
        self.roots = torch.tensor(_SPREAD * roots / unit, dtype=torch.float32)
        self.states = [torch.load(folder / f"{dim}_v{k}.pt", map_location="cpu", weights_only=True) for k in (1, 2)]
        if pair is None:
            raw = self._gradient(self.source(2**17, seed=12_345))
            self.scale = 1 / float((raw - raw.mean(0)).square().mean().sqrt())
            self.shift = raw.mean(0)
        else:
            raw, true = self._gradient(pair[0]).double(), pair[1].double()
            off, wanted = raw - raw.mean(0), true - true.mean(0)
            self.scale = float((off * wanted).sum() / (off * off).sum())
            self.shift = (raw.mean(0) - true.mean(0) / self.scale).float()

    def source(self, n: int, *, seed: int) -> Tensor:
        """Return ``(n, d)`` samples of the source."""
        generator = torch.Generator().manual_seed(seed)
        blocks = []
        for size in [_BLOCK] * (n // _BLOCK) + [n % _BLOCK] * (n % _BLOCK > 0):
            labels = torch.randint(_COMPONENTS, (size,), generator=generator)
            noise = torch.randn(size, self.dim, generator=generator)
            blocks.append(torch.einsum("nij,nj->ni", self.roots[labels], noise) + self.centers[labels])
        return torch.cat(blocks)

    def target(self, n: int, *, seed: int) -> Tensor:
        """Return ``(n, d)`` samples of the target."""
        return self.true_map(self.source(n, seed=seed))

    def true_map(self, x: Tensor) -> Tensor:
        """Return the images of samples under the optimal map."""
        return (self._gradient(x) - self.shift) * self.scale

    def _gradient(self, x: Tensor) -> Tensor:
        parts = []
        for block in x.split(_BLOCK):
            points = block.detach().requires_grad_()
            with torch.enable_grad():
                value = sum((_potential(state, points).sum() for state in self.states), torch.zeros(()))
                parts.append(torch.autograd.grad(value, points)[0])
        return torch.cat(parts)


def _potential(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return the convex network's values."""

    def skip(k: int) -> Tensor:
        turned = torch.einsum("nd,dro->nro", x, state[f"quadratic_layers.{k}.quadratic_decomposed"])
        return turned.square().sum(1) + F.linear(
            x, state[f"quadratic_layers.{k}.weight"], state[f"quadratic_layers.{k}.bias"]
        )

    layers = sum(name.startswith("convex_layers.") for name in state)
    z = skip(0)
    for k in range(layers):
        z = torch.celu(F.linear(z, state[f"convex_layers.{k}.weight"]) + skip(k + 1))
    return F.linear(z, state["final_layer.weight"])[:, 0] + _CURVATURE / 2 * x.square().sum(1)
