"""Independent parts of held-out samples, and exact plans between them."""

import math

import torch
from torch import Tensor

from lightning_gap.monge.ot.checks import check_weights
from lightning_gap.monge.ot.subsets import fixed_rows
from lightning_gap.precision import widest

__all__ = ["FEWEST", "independent_parts", "standard_error"]

FEWEST = 32  # samples of a set with fewer of which its parts say nothing


def independent_parts(
    names: tuple[str, str],
    sets: tuple[Tensor, Tensor],
    weights: tuple[Tensor | None, Tensor | None],
    most: int,
    count: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the rows of parts of each of two sets, all of one length, by a fixed permutation.

    Weighted parts are replaced by equally weighted ones: rows are repeated by their weights, as many in sum as the
    weights are worth.
    """
    parts, worth = [], []
    for name, samples, w in zip(names, sets, weights, strict=True):
        n = len(samples)
        if n < FEWEST:
            raise ValueError(
                f"{name} has {n} samples, too few for independent parts: give at least {FEWEST}, at best thousands"
            )
        order = fixed_rows(n, n - 1)
        assert order is not None
        order = torch.cat([order, order.new_tensor([n * (n - 1) // 2 - int(order.sum())])])
        ones = [one.to(samples.device) for one in order[: n // count * count].split(n // count)]
        shares = [None if w is None else check_weights(name, w, samples, balanced=False)[one] for one in ones]
        for one, share in zip(ones, shares, strict=True):
            parts.append((one, share))
            worth.append(len(one) if share is None else float(share.sum() ** 2 / share.square().sum()))
    if not min(worth) >= FEWEST // count // 2:
        raise ValueError(
            f"the weights leave a part with the worth of {min(worth):.3g} samples, too few to compare: give more "
            "samples, or weights that are less unequal"
        )
    size = min(int(min(worth)), max(1, most // count))
    rows = [one[:size] if share is None else one[_repeated(share, size)] for one, share in parts]
    return rows[:count], rows[count:]


def _repeated(weights: Tensor, size: int) -> Tensor:
    """Return rows in which each is repeated by its weight: systematic resampling, without random numbers."""
    steps = (torch.arange(size, dtype=torch.float64, device=weights.device) + 0.5) / size
    shares = weights.to(widest(weights.device)).cumsum(0)
    return torch.searchsorted(shares, steps.to(shares) * shares[-1]).clamp_max_(len(weights) - 1)


def standard_error(values: Tensor) -> float:
    """Return the standard error of the mean of independent values."""
    return float(values.std(correction=1)) / math.sqrt(len(values))
