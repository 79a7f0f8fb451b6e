"""Work on blocks of rows, which stay in a CPU's cache and fill a GPU."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from lightning_gap.monge.ot.costs import Cost
from lightning_gap.monge.ot.limits import LIMITS
from lightning_gap.precision import widest

__all__ = ["block_rows", "exponentiate", "row_blocks", "soft_minimum"]

# Smaller exponents add nothing to a sum, but make subnormal numbers, on which a CPU is slow.
_LOWEST_EXPONENT = -70.0
# NumPy's exponential takes half the time of torch's on one thread, but knows only that one.
_FEW_THREADS, _FEW_NUMBERS = 2, 1 << 16


def block_rows(like: Tensor, m: int) -> int:
    """Return how many rows a block of ``m`` columns has."""
    return max(1, LIMITS.block.on(like.device) // m)


def row_blocks(x: Tensor, m: int) -> Iterator[slice]:
    """Yield slices of the rows of ``x``, in blocks of ``m`` columns."""
    n, rows = len(x), block_rows(x, m)
    for start in range(0, n, rows):
        yield slice(start, min(n, start + rows))


def exponentiate(exponents: Tensor, *, at_most: float = 3e38) -> Tensor:
    """Replace exponents by their exponentials."""
    on_cpu = exponents.device.type == "cpu"
    if on_cpu and (torch.get_num_threads() <= _FEW_THREADS or exponents.numel() <= _FEW_NUMBERS):
        array = exponents.numpy()
        # Two bounds are clipped four times as fast as one.
        np.clip(array, _LOWEST_EXPONENT, at_most, out=array)
        with np.errstate(over="ignore"):
            np.exp(array, out=array)
        return exponents
    return exponents.clamp_min_(_LOWEST_EXPONENT).exp_()


def soft_minimum(x: Tensor, y: Tensor, b: Tensor, G: Tensor, cost: Cost, epsilon: float) -> Tensor:
    r"""Return :math:`-\log \sum_j b_j e^{G_j - c(x_i, y_j)/\varepsilon}` for each row, in blocks."""
    F, b = x.new_empty(len(x), dtype=widest(x.device)), b.to(x.dtype)
    fill, buffer = cost.geometry.exponents(y, G, epsilon), x.new_empty(min(len(x), block_rows(x, len(y))), len(y))
    for rows in row_blocks(x, len(y)):
        block = fill(buffer[: rows.stop - rows.start], x[rows])
        top = block.amax(dim=1)
        sums = exponentiate(block.sub_(top[:, None]), at_most=0) @ b
        F[rows] = -top - sums.log()
    return F
