"""The maximum mean discrepancy between two sets of samples."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gap.checks import check_number
from lightning_gap.monge.ot.checks import check_pair, check_weights, solver_precision
from lightning_gap.monge.ot.costs import SqEuclidean
from lightning_gap.monge.ot.solvers.blocks import row_blocks
from lightning_gap.monge.scores.pooling import TwoSampleMetric
from lightning_gap.precision import widest

__all__ = ["MaximumMeanDiscrepancy", "maximum_mean_discrepancy"]

# Those by which maps of perturbations are compared (Bunne et al. 2023, "Learning single-cell perturbation responses
# using neural optimal transport").
_GAMMAS = (2.0, 1.0, 0.5, 0.1, 0.01, 0.005)


def maximum_mean_discrepancy(
    x: Tensor,
    y: Tensor,
    *,
    gammas: Sequence[float] = _GAMMAS,
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    r"""Return the squared maximum mean discrepancy of Gaussian kernels, averaged over their widths.

    .. math::
        \frac{1}{|\Gamma|} \sum_{\gamma \in \Gamma} E\,k_\gamma(X, X') + E\,k_\gamma(Y, Y') - 2\, E\,k_\gamma(X, Y),
        \qquad k_\gamma(x, y) = e^{-\gamma \|x - y\|^2}

    over all pairs, a sample with itself included: the V-statistic (Gretton et al. 2012, "A Kernel Two-Sample Test"),
    which exceeds that of the distributions by some :math:`1/n`. The kernels are narrow: at distances of 10 or more
    nearly all that it says is about that excess, so set it beside its floor.

    Args:
        x: ``(n, d)`` samples.
        y: ``(m, d)`` samples.
        gammas: The :math:`\gamma`, in units of an inverse squared distance.
        weights: ``(n,)`` and ``(m,)`` weights, each summing to 1; uniform by default.

    Returns:
        A scalar, not negative, of the samples' dtype (float32 for half precision). It carries no gradient.

    Raises:
        TypeError: An argument is no floating-point tensor, or the dtypes differ.
        ValueError: Shapes or devices do not fit, a sample is not finite, weights do not sum to 1, or there is no gamma
            or one that is not positive.

    Example:
        >>> import torch
        >>> x = torch.zeros(1, 1)
        >>> maximum_mean_discrepancy(x, x + 1, gammas=[1.0])  # 2 - 2 exp(-1)
        tensor(1.2642)
    """
    check_pair("x", x, "y", y)
    gammas = _checked(gammas)
    dtype = solver_precision(x[:1]).dtype
    wide = [samples.detach().to(widest(samples.device)) for samples in (x, y)]
    a, b = (
        samples.new_full((len(samples),), 1 / len(samples))
        if w is None
        else check_weights(f"weights[{k}]", w.detach(), (x, y)[k]).to(samples)
        for k, (samples, w) in enumerate(zip(wide, weights, strict=True))
    )
    within = _mean_kernel(wide[0], wide[0], a, a, gammas) + _mean_kernel(wide[1], wide[1], b, b, gammas)
    return (within - 2 * _mean_kernel(wide[0], wide[1], a, b, gammas)).to(dtype)


def _checked(gammas: Sequence[float]) -> list[float]:
    if not len(gammas):
        raise ValueError("gammas is empty: give at least one")
    return [check_number("gammas", gamma, above=0) for gamma in gammas]


@torch.no_grad()
def _mean_kernel(x: Tensor, y: Tensor, a: Tensor, b: Tensor, gammas: Sequence[float]) -> Tensor:
    total = x.new_zeros(())
    for rows in row_blocks(x, len(y)):
        squares = SqEuclidean().pairwise(x[rows], y)
        for gamma in gammas:
            total += a[rows] @ (-gamma * squares).exp() @ b
    return total / len(gammas)


class MaximumMeanDiscrepancy(TwoSampleMetric):
    """The squared maximum mean discrepancy of Gaussian kernels; see :func:`maximum_mean_discrepancy`.

    All samples are kept, and gathered from all processes.

    Args:
        gammas: As in :func:`maximum_mean_discrepancy`.
        **kwargs: Of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: There is no gamma, or one that is not positive.

    Example:
        >>> import torch
        >>> metric = MaximumMeanDiscrepancy(gammas=[1.0])
        >>> metric.update(torch.zeros(1, 1), torch.ones(1, 1))
        >>> metric.compute()
        tensor(1.2642)
    """

    def __init__(self, gammas: Sequence[float] = _GAMMAS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gammas = _checked(gammas)

    def compute(self) -> Tensor:
        """Return the discrepancy between all samples, a scalar."""
        first, second = self.kept_weights()
        return maximum_mean_discrepancy(*self.kept(), gammas=self.gammas, weights=(first, second))
