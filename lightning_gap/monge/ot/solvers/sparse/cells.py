"""Samples in cells of neighbours, each with a sample that stands for it."""

import numpy as np
import torch
from torch import Tensor

__all__ = ["coarsened"]


def coarsened(points: Tensor, masses: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return samples that stand for cells of all of them, and the cells' masses.

    Cells are halved at the median of their longest side. The sample nearest to the cell's mean stands for it, as a mean
    need not be where the cost is defined.

    Args:
        points: ``(n, d)`` samples.
        masses: ``(n,)`` whole numbers, on the CPU.
        count: How many cells, up to the next power of two.
    """
    x = points.detach().cpu().double().numpy()
    cell = np.zeros(len(x), dtype=np.int64)
    while cell.max() + 1 < min(count, len(x)):
        order = np.argsort(cell, kind="stable")
        first = np.searchsorted(cell[order], np.arange(cell.max() + 1))
        ordered = x[order]
        side = (np.maximum.reduceat(ordered, first) - np.minimum.reduceat(ordered, first)).argmax(1)
        order = np.lexsort((np.take_along_axis(x, side[cell][:, None], 1)[:, 0], cell))
        sizes = np.diff(np.append(first, len(x)))
        rank = np.arange(len(x)) - np.repeat(first, sizes)
        halves = np.empty_like(cell)
        halves[order] = 2 * cell[order] + (rank >= (np.repeat(sizes, sizes) + 1) // 2)
        cell = np.unique(halves, return_inverse=True)[1].reshape(-1)
    number = cell.max() + 1
    sizes = np.bincount(cell, minlength=number)
    means = np.zeros((number, x.shape[1]))
    np.add.at(means, cell, x)
    means /= sizes[:, None]
    order = np.lexsort((np.square(x - means[cell]).sum(1), cell))
    chosen = torch.from_numpy(order[np.searchsorted(cell[order], np.arange(number))])
    sums = torch.zeros(int(number), dtype=torch.int64).index_add_(0, torch.from_numpy(cell), masses)
    return points[chosen.to(points.device)].contiguous(), sums
