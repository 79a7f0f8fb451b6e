"""One-dimensional optimal transport, feature by feature."""

import torch
from torch import Tensor

from lightning_gap.monge.ot.checks import check_pair, check_weights, solver_precision
from lightning_gap.monge.ot.limits import LIMITS
from lightning_gap.precision import widest

__all__ = ["marginal_wasserstein"]


def marginal_wasserstein(
    x: Tensor, y: Tensor, *, weights: tuple[Tensor | None, Tensor | None] = (None, None)
) -> Tensor:
    r"""Return the Wasserstein-1 distance of each feature's marginal distributions, exactly.

    .. math::
        W_1(\alpha_k, \beta_k) = \int |F_k(t) - G_k(t)|\, dt

    with the cumulative distribution functions :math:`F_k, G_k` of feature :math:`k` (Vallender 1974, "Calculation of
    the Wasserstein distance between probability distributions on the line"), by one sort a feature, in the units of
    the feature. It says nothing of how the features go together.

    Args:
        x: ``(n, d)`` samples.
        y: ``(m, d)`` samples.
        weights: ``(n,)`` and ``(m,)`` weights, each summing to 1; uniform by default.

    Returns:
        ``(d,)`` distances, differentiable in ``x`` and ``y``, of the samples' dtype (float32 for half precision).

    Raises:
        TypeError: An argument is no floating-point tensor, or the dtypes differ.
        ValueError: Shapes or devices do not fit, a sample is not finite, or weights do not sum to 1.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> marginal_wasserstein(x, x + torch.tensor([2.0, -3.0]))
        tensor([2., 3.])
    """
    check_pair("x", x, "y", y)
    x, y = solver_precision(x), solver_precision(y)
    a, b = check_weights("weights[0]", weights[0], x), check_weights("weights[1]", weights[1], y)
    # Cumulative sums of both signs cancel: in double, where the device has it.
    exact = widest(x.device)
    mass = torch.cat([a.detach().to(exact), -b.detach().to(exact)])
    features = max(1, LIMITS.sorted // len(mass))
    parts = []
    for first, second in zip(x.split(features, dim=1), y.split(features, dim=1), strict=True):
        points, order = torch.cat([first, second]).sort(dim=0)
        above = mass[order].cumsum(0)[:-1].abs()
        parts.append((above * points.diff(dim=0).to(exact)).sum(0).to(x.dtype))
    return torch.cat(parts)
