"""Some of the rows: the same few in each run, or those that weigh something."""

from functools import reduce
from operator import and_

import torch
from torch import Tensor

from lightning_gap.monge.ot.compiling import eager

__all__ = ["counted", "drawn_by_weight", "fixed_rows", "weighing"]

_MOST_CATEGORIES = 2**24  # of torch.multinomial


def fixed_rows(size: int, most: int) -> Tensor | None:
    """Return the first of the row numbers in a fixed permutation; ``None`` where there are no more than ``most``."""
    if size <= most:
        return None
    return torch.randperm(size, generator=torch.Generator().manual_seed(0), device="cpu")[:most]


def drawn_by_weight(weights: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return so many row numbers, drawn with replacement by weight, on the CPU; of any number of rows."""
    weights = weights.cpu()
    if len(weights) <= _MOST_CATEGORIES:
        return torch.multinomial(weights, size, replacement=True, generator=generator)
    shares = weights.double().cumsum(0)
    drawn = torch.rand(size, generator=generator, dtype=torch.float64) * shares[-1]
    return torch.searchsorted(shares, drawn, right=True).clamp_(max=len(weights) - 1)


@eager
def weighing(*weights: Tensor) -> list[Tensor] | None:
    """Return which samples of each set weigh something; ``None`` where all do, for which a device is asked once."""
    rows = [w.detach() > 0 for w in weights]
    return None if bool(reduce(and_, (some.all() for some in rows))) else rows


def counted(weights: Tensor, *points: Tensor) -> tuple[Tensor, ...]:
    """Return weights and points without those that weigh nothing, unless the weights are differentiated."""
    if weights.requires_grad or (rows := weighing(weights)) is None:
        return weights, *points
    return weights[rows[0]], *(p[rows[0]] for p in points)
