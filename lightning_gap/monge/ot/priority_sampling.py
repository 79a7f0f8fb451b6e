"""A few samples that stand for many: the same few in whatever order they come."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_gap.monge.ot.epsilon import Weighted

__all__ = ["few_of", "priority_sample"]

# Samples of each side that tell the scale of costs; of many conditions each has its part of them.
_ENOUGH, _LEAST = 1024, 128

# Samples count as one where they agree to so many bits of the size of a typical one: more than rounding leaves alone,
# as where they were centred on a mean that was summed in another order.
_BITS = 10
_BLOCK_ROWS = 1 << 16
_LOW = (1 << 53) - 1


@torch.no_grad()
def priority_sample(points: Tensor, weights: Tensor | None, most: int) -> tuple[Tensor, Tensor | None]:
    r"""Return at most so many of the samples, and weights with which sums over them estimate sums over all.

    Sample :math:`i` of weight :math:`w_i` has priority :math:`w_i / u_i`; those of the largest priorities are kept, at
    weights :math:`\max(w_i, \tau)`, with :math:`\tau` the largest priority that is not (Duffield, Lund and Thorup 2007,
    "Priority sampling for estimation of arbitrary subset sums"). The uniform number :math:`u_i` is a hash of the
    sample itself: no random number is drawn, the order does not matter, and another sample in the place of one
    changes at most one of those that are kept. Few enough samples are returned as they are; ``None`` for uniform
    weights.
    """
    if len(points) <= most:
        return points, weights
    mass = (
        torch.ones(len(points), dtype=torch.float64) if weights is None else weights.detach().to("cpu", torch.float64)
    )
    keys, place = torch.unique(_hashes(points.detach().cpu()), return_inverse=True)
    row = torch.empty_like(keys).scatter_(0, place, torch.arange(len(points)))
    mass = torch.zeros(len(keys), dtype=torch.float64).index_add_(0, place, mass)
    if len(keys) > most:
        uniform = ((keys & _LOW).double() + 0.5) / (_LOW + 1)
        largest = (mass / uniform).topk(most + 1)
        kept = largest.indices[:most]
        row, mass = row[kept], mass[kept].clamp_min(float(largest.values[-1]))
    return points[row.to(points.device)], mass.to(points.device, points.dtype)


def few_of(
    pairs: Sequence[tuple[Weighted, Weighted]], take: Callable[[Tensor], Tensor]
) -> list[tuple[Weighted, Weighted]]:
    """Return as many samples of each pair as tell the scale of their costs, brought by ``take`` to where it is told."""
    most = max(_LEAST, int(_ENOUGH / math.sqrt(len(pairs))))
    found: dict[int, Weighted] = {}  # a side without labels is in the pair of every condition

    def of(side: Weighted) -> Weighted:
        if id(side.samples) not in found:
            few, weights = priority_sample(*side, most)
            found[id(side.samples)] = Weighted(take(few), weights)
        return found[id(side.samples)]

    return [(of(x), of(y)) for x, y in pairs]


def _hashes(points: Tensor) -> Tensor:
    """Return a 64-bit integer of each row."""
    sizes: Tensor = vector_norm(points, float("inf"), dim=1)
    sizes = sizes[sizes > 0]
    # A power of two, so that it seldom changes with the samples.
    exponent = int(torch.frexp(sizes.median()).exponent) if len(sizes) else 0
    draws = torch.Generator().manual_seed(0)
    multipliers = torch.randint(-(1 << 62), 1 << 62, (points.shape[1],), generator=draws) * 2 + 1
    blocks = []
    for block in points.split(_BLOCK_ROWS):
        places = torch.ldexp(block.double(), torch.tensor(_BITS - exponent)).round().clamp(-(2.0**62), 2.0**62)
        blocks.append((places.long() * multipliers).sum(1))
    return _mixed(torch.cat(blocks))


def _mixed(h: Tensor) -> Tensor:
    """Return integers each bit of which depends on all bits of the given ones (Steele et al. 2014, SplitMix)."""
    for shift, multiplier in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        h = (h ^ (h >> shift)) * multiplier
    return h ^ (h >> 31)
