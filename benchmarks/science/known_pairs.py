"""Samples of two measures between which the optimal map is known, for several costs, in any dimension.

Each maker draws a problem by its seed, and from it independent samples of both measures, and test samples with their
true images. Potentials show that the maps are optimal:

- ``rays``, the Euclidean cost: u(x) = min_k |x - a_k| + b_k is 1-Lipschitz, and falls at unit speed along the ray from
  x to the a_k of its minimum. A map that moves points along these rays has |x - T(x)| = u(x) - u(T(x)), while
  |x - y| >= u(x) - u(y) for all pairs (the funnels of Korotin et al. 2022, "Kantorovich Strikes Back! Wasserstein GANs
  for Optimal Transport?"). All optimal plans move along these rays, and one of them keeps the order on each: that is
  the map T, which is the limit of the optimal maps for |x - y|^p, p to 1.
- ``displaced``, a cost h(x - y): T(x) = x + ∇h*(∇φ(x)) with φ convex. Then x minimizes the convex function
  h(x - y) + φ(x) for y = T(x): the potentials are -φ and its c-transform (Gangbo and McCann 1996). φ is a soft maximum
  of affine functions and a quadratic form.

``reverse`` exchanges source and target: the maps of the first kind draw together, those of the second spread.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_gap.monge.costs import Euclidean
from lightning_gap.monge.ot.costs import CostLike, TranslationInvariantCost, resolve

__all__ = ["KnownPair", "displaced", "rays"]

_Sample = Callable[[int], Tensor]


@dataclass(frozen=True)
class KnownPair:
    """Samples of two measures, and the optimal map at others.

    Attributes:
        cost: What the map is optimal for.
        source: ``(n, d)`` samples.
        target: ``(n, d)`` samples, independent of the source's.
        x: ``(test, d)`` samples of the source.
        true: Their images.
    """

    cost: TranslationInvariantCost
    source: Tensor
    target: Tensor
    x: Tensor
    true: Tensor

    @property
    def variance(self) -> float:
        """Total variance of the target."""
        return float(self.target.double().var(0).sum())

    def reversed(self) -> "KnownPair":
        """Return the pair of the inverse map."""
        return KnownPair(self.cost, self.target, self.source, self.true, self.x)


def rays(
    dim: int, n: int = 16_384, seed: int = 0, *, funnels: int = 4, test: int = 4096, reverse: bool = False
) -> KnownPair:
    """Return a pair for the Euclidean cost: each point is drawn along its ray towards the nearest of some centers."""
    generator = torch.Generator().manual_seed(seed)
    sample = _mixture(dim, 3, generator)
    scale = sample(4096).square().mean().sqrt()
    centers = scale * torch.randn(funnels, dim, generator=generator, dtype=torch.float64)
    # The centers' radii differ, and the cells with them.
    offsets = 0.1 * torch.randn(funnels, generator=generator, dtype=torch.float64)
    least = 0.1 + 0.2 * torch.rand(funnels, generator=generator, dtype=torch.float64)
    r = _nearest(sample(4096), centers, offsets)[1]
    middle, width = r.mean(), r.std()

    def image(x: Tensor) -> Tensor:
        k, r = _nearest(x, centers, offsets)
        # Increasing in the radius on each ray, and never beyond it.
        share = least[k] + 0.5 * torch.sigmoid((r - middle) / width)
        return centers[k] + share[:, None] * (x - centers[k])

    return _pair(Euclidean(), sample, image, n, test, reverse)


def displaced(
    dim: int,
    cost: CostLike,
    n: int = 16_384,
    seed: int = 0,
    *,
    pieces: int = 8,
    spread: float = 0.8,
    test: int = 4096,
    reverse: bool = False,
) -> KnownPair:
    """Return a pair for a cost h(x - y), by a convex potential of some pieces and a mean displacement of the spread."""
    h = resolve(cost)
    if not isinstance(h, TranslationInvariantCost):
        raise ValueError(f"cost {cost} is no function h(x - y): give one, as 'pnorm(p=1.5)'")
    generator = torch.Generator().manual_seed(seed)
    sample = _mixture(dim, 3, generator)
    slopes = torch.randn(pieces, dim, generator=generator, dtype=torch.float64)
    root = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / math.sqrt(dim)
    form = 0.1 * root @ root.mT
    reference = sample(4096)
    # Offsets with which every piece is the greatest somewhere.
    places = reference[:pieces]
    offsets = -(slopes * places).sum(1)
    temperature = 0.3 * (reference @ slopes.mT + offsets).amax(1).std()

    def gradient(x: Tensor) -> Tensor:
        return ((x @ slopes.mT + offsets) / temperature).softmax(1) @ slopes + x @ form

    def moved(x: Tensor, factor: float) -> Tensor:
        return h.grad_h_conjugate(factor * gradient(x))

    # The factor of the potential by bisection: displacements of every strictly convex cost grow with it.
    low, high = 1e-6, 1e6
    for _ in range(60):
        factor = math.sqrt(low * high)
        mean = moved(reference, factor).square().mean().sqrt()
        low, high = (factor, high) if mean < spread else (low, factor)
    return _pair(h, sample, lambda x: x + moved(x, factor), n, test, reverse)


def _pair(
    cost: TranslationInvariantCost, sample: _Sample, image: Callable[[Tensor], Tensor], n: int, test: int, reverse: bool
) -> KnownPair:
    source, target, x = sample(n), image(sample(n)), sample(test)
    pair = KnownPair(cost, source.float(), target.float(), x.float(), image(x).float())
    return pair.reversed() if reverse else pair


def _mixture(dim: int, components: int, generator: torch.Generator) -> _Sample:
    """Return a sampler of a mixture of Gaussians of random means and covariances."""
    # In many dimensions the components stay as near to each other as in four.
    means = 1.5 * min(1.0, 2 / math.sqrt(dim)) * torch.randn(components, dim, generator=generator, dtype=torch.float64)
    roots = torch.randn(components, dim, dim, generator=generator, dtype=torch.float64) / math.sqrt(2 * dim)
    roots = roots * 0.5 + 0.5 * torch.eye(dim, dtype=torch.float64)

    def sample(n: int) -> Tensor:
        k = torch.randint(components, (n,), generator=generator)
        noise = torch.randn(n, dim, generator=generator, dtype=torch.float64)
        x = torch.empty_like(noise)
        for component in range(components):
            own = k == component
            x[own] = noise[own] @ roots[component].mT + means[component]
        return x

    return sample


def _nearest(x: Tensor, centers: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return which center's funnel is the lowest, and the distance to that center."""
    distances = vector_norm(x[:, None] - centers, dim=-1)
    k = (distances + offsets).argmin(1)
    return k, distances.gather(1, k[:, None])[:, 0]
