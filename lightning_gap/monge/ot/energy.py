"""The energy distance between two sets of samples, in bounded memory."""

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_gap.monge.ot.checks import check_pair, check_transforms, check_weights, solver_precision
from lightning_gap.monge.ot.costs import Euclidean
from lightning_gap.monge.ot.solvers.blocks import row_blocks
from lightning_gap.monge.ot.subsets import counted
from lightning_gap.precision import widest

__all__ = ["energy_distance"]


def energy_distance(x: Tensor, y: Tensor, *, weights: tuple[Tensor | None, Tensor | None] = (None, None)) -> Tensor:
    r"""Return the energy distance between two sets of samples, 0 where they agree and positive elsewhere.

    .. math::
        2\, E\|X - Y\| - E\|X - X'\| - E\|Y - Y'\|

    The expectations are over all pairs of samples, a sample with itself included: this V-statistic is the squared
    distance between the two empirical measures (Székely and Rizzo 2013, "Energy statistics", section 2), so it is never
    negative; it exceeds that of the distributions by some :math:`1/n`. It needs no parameter, and no iteration.

    Distances are formed in blocks of rows, also in the backward pass, so that memory does not grow with ``n * m``.

    Args:
        x: ``(n, d)`` samples.
        y: ``(m, d)`` samples.
        weights: ``(n,)`` and ``(m,)`` weights, each summing to 1; uniform by default.

    Returns:
        A scalar, differentiable in samples and weights, of the samples' dtype (float32 for half precision).

    Raises:
        TypeError: An argument is no floating-point tensor, or the dtypes differ.
        ValueError: Shapes or devices do not fit, a sample is not finite, or weights do not sum to 1.

    Example:
        >>> import torch
        >>> energy_distance(torch.zeros(3, 1), torch.full((5, 1), 2.0))
        tensor(4.)
    """
    check_transforms(x, y)
    check_pair("x", x, "y", y)
    dtype = solver_precision(x[:1]).dtype
    a, b = (None if w is None else check_weights(f"weights[{k}]", w, (x, y)[k]) for k, w in enumerate(weights))
    # Three sums that nearly cancel: in double.
    (x, a), (y, b) = (_wide(points, w) for points, w in ((x, a), (y, b)))
    between = 2 * _mean_distance(x, y, a, b)
    return (between - _mean_distance(x, x, a, a) - _mean_distance(y, y, b, b)).to(dtype)


def _wide(points: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    points = points.to(widest(points.device))
    if weights is None:
        return points, None
    weights, points = counted(weights.to(points.dtype), points)
    return points, weights


def _mean_distance(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    total = x.new_zeros(())
    for rows in row_blocks(x, len(y)):
        # The backward pass forms the block anew, rather than keeping all of them.
        part = checkpoint(_sum_of_distances, x[rows], y, None if a is None else a[rows], b, use_reentrant=False)
        total = total + part
    return total / ((len(x) if a is None else 1) * (len(y) if b is None else 1))


def _sum_of_distances(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    distances = Euclidean().pairwise(x, y)
    if a is None and b is None:
        return distances.sum()
    to_y = distances.sum(1) if b is None else distances @ b
    return to_y.sum() if a is None else a @ to_y
