r"""What a relative :math:`\varepsilon` is a share of: a scale of the costs between two weighted sets of samples."""

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_gap.monge.ot.costs import Cost
from lightning_gap.precision import widest

__all__ = ["Scale", "cost_scale", "share_of", "share_of_cost"]

Scale = Literal["mean", "std", "typical"]

# Numbers of a block of costs.
_BLOCK_NUMBERS = 1 << 22
# Costs beyond so many times their upper quartile are those of outliers: of Gaussian samples one in 10⁵ in one
# dimension, and fewer in more.
_OUTLYING = 16.0
# Samples of each side whose costs tell the quartile, and with it what is typical.
_ENOUGH = 1024


@torch.no_grad()
def cost_scale(
    cost: Cost, x: Tensor, y: Tensor, weights: tuple[Tensor | None, Tensor | None] = (None, None), of: Scale = "mean"
) -> float:
    r"""Return a scale of the costs :math:`c(x_i, y_j)`, each counted by :math:`a_i b_j`, in blocks of bounded memory.

    ``"mean"`` and ``"std"`` are moments of all costs. ``"typical"`` is the mean of those up to 16 times the upper
    quartile, of up to 1,024 samples a side, evenly taken: the mean itself where there are no outliers, and not moved by
    up to an eighth of the samples of each side, however far off they are. Samples of weight 0 do not count.

    Args:
        cost: The ground cost.
        x: ``(n, d)`` samples.
        y: ``(m, d)`` samples.
        weights: ``(n,)`` and ``(m,)`` weights of any positive sum; uniform by default.
        of: ``"mean"``, ``"std"`` or ``"typical"``.

    Example:
        >>> import torch
        >>> from lightning_gap.monge.ot.costs import SqEuclidean
        >>> x = torch.tensor([[0.0], [2.0], [4.0], [1000.0]])
        >>> weights = torch.tensor([1.0, 1.0, 1.0, 0.0])
        >>> round(cost_scale(SqEuclidean(), x, x, (weights, weights)), 3)
        5.333
    """
    (x, a), (y, b) = (_with_weight(points.detach(), w) for points, w in zip((x, y), weights, strict=True))
    if of == "typical":
        return _typical(cost, *_evenly(x, a), *_evenly(y, b))
    if a is None and b is None:
        return cost.std(x, y) if of == "std" else cost.mean(x, y)
    mean = _weighted(cost, x, y, a, b, 0.0, 1)
    return math.sqrt(_weighted(cost, x, y, a, b, mean, 2)) if of == "std" else mean


def share_of_cost(
    share: float,
    cost: Cost,
    x: Tensor,
    y: Tensor,
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
    of: Scale = "mean",
) -> float:
    """Return an epsilon that is a share of the costs' scale.

    Args:
        share: A positive number.
        cost: See :func:`cost_scale`.
        x: See :func:`cost_scale`.
        y: See :func:`cost_scale`.
        weights: See :func:`cost_scale`.
        of: See :func:`cost_scale`.

    Raises:
        ValueError: The scale is 0 or not finite, so that no share of it is an epsilon.
    """
    return share_of(share, cost_scale(cost, x, y, weights, of), cost, of)


def share_of(share: float, scale: float, cost: Cost, of: Scale = "mean") -> float:
    """Return an epsilon that is a share of a scale of the costs, or raise ``ValueError``.

    Args:
        share: A positive number.
        scale: Of :func:`cost_scale`.
        cost: The cost, for the message.
        of: Which scale it is, for the message.
    """
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"the {of} {cost} cost is {scale}, so no share of it can be epsilon: give an absolute epsilon")
    return share * scale


def _with_weight(points: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the samples of positive weight, and weights that sum to 1; ``None`` for uniform ones."""
    if weights is None:
        return points, None
    weights = weights.detach().to(points.device, widest(points.device))
    counted = weights > 0
    if bool((weights[counted] == weights.max()).all()):
        return points[counted], None
    return points[counted], weights[counted] / weights.sum()


def _evenly(points: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if len(points) <= _ENOUGH:
        return points, weights
    rows = torch.arange(_ENOUGH, device=points.device) * len(points) // _ENOUGH
    return points[rows], None if weights is None else weights[rows]


def _weighted(cost: Cost, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, center: float, power: int) -> float:
    fill, total, start = cost.filler(y), 0.0, 0
    for block in x.split(max(1, _BLOCK_NUMBERS // len(y))):
        costs = fill(block.new_empty(len(block), len(y)), block).to(widest(x.device)).sub_(center).pow_(power)
        rows = costs.mean(1) if b is None else costs @ b
        total += float(rows.sum() / len(x) if a is None else rows @ a[start : start + len(block)])
        start += len(block)
    return total


def _typical(cost: Cost, x: Tensor, a: Tensor | None, y: Tensor, b: Tensor | None) -> float:
    costs = cost.fill(x.new_empty(len(x), len(y)), x, y).to(widest(x.device)).flatten()
    mass = torch.ones_like(costs) if a is None and b is None else _outer(x, a, y, b)
    ordered, order = costs.sort()
    below = mass[order].cumsum(0)
    quartile = ordered[min(int((below < 0.75 * below[-1]).sum()), len(ordered) - 1)]
    kept = costs <= _OUTLYING * quartile
    return float((costs * mass)[kept].sum() / mass[kept].sum())


def _outer(x: Tensor, a: Tensor | None, y: Tensor, b: Tensor | None) -> Tensor:
    rows, columns = (
        torch.full((len(points),), 1 / len(points), dtype=widest(points.device), device=points.device)
        if w is None
        else w
        for points, w in ((x, a), (y, b))
    )
    return torch.outer(rows, columns).flatten()
