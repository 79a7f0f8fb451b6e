"""Samples that weigh nothing: no plan knows them, and they may be infinitely far."""

from functools import reduce
from operator import and_

from torch import Tensor

from lightning_gap.monge.ot.compiling import eager

__all__ = ["counted", "weighing"]


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
