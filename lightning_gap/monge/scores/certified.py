"""Certificates of one condition's samples, as scores."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gap.monge.ot.costs import Cost
from lightning_gap.monge.scores.certificate import error_certificate, has_unique_maps
from lightning_gap.monge.scores.parts import FEWEST
from lightning_gap.monge.scores.pools import Pool
from lightning_gap.monge.scores.suboptimality import suboptimality
from lightning_gap.precision import widest

__all__ = ["certified", "too_few"]


def too_few(pools: Sequence[Pool]) -> str | None:
    """Say where samples are too few, or weighted too unequally, for certificates; ``None`` where all suffice."""
    worth = [
        float(len(samples) if w is None else w.sum() ** 2 / w.square().sum())
        for p in pools
        for samples, w in ((p.sets["source"], p.source_weights), (p.sets["target"], p.target_weights))
    ]
    if min(worth) >= 2 * FEWEST:
        return None
    return (
        f"no bound of the map's error and no suboptimality: a held-out set has the worth of {min(worth):.3g} samples, "
        f"and it takes {2 * FEWEST} at least: give a larger test_fraction, or leave certificates out"
    )


def certified(pool: Pool, cost: Cost, *, with_bound: bool) -> dict[str, Tensor]:
    """Return the suboptimality and its bound, and the bound of L2-UVP where there is one."""
    x, mapped, y = (pool.sets[name] for name in ("source", "mapped", "target"))
    found = suboptimality(x, mapped, cost=cost, weights=pool.source_weights)
    numbers = {"suboptimality": found.value, "suboptimality_upper": found.upper}
    if with_bound and has_unique_maps(cost, x) and bool((y != y[0]).any()):
        weights = pool.source_weights, pool.target_weights
        numbers["l2_uvp_bound"] = error_certificate(x, mapped, y, cost=cost, weights=weights).upper
    return {name: torch.tensor(value, dtype=widest(x.device), device=x.device) for name, value in numbers.items()}
