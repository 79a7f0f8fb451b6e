"""The optimal transport map between Gaussians, in closed form."""

from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from lightning_gap.monge.ot.checks import check_pair, check_weights

__all__ = ["gaussian_map"]

# From so many samples a dimension on, a sample covariance needs no shrinkage.
_ENOUGH = 20


def _is_share(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and 0 <= float(value) <= 1


@torch.no_grad()
def gaussian_map(
    source: Tensor,
    target: Tensor,
    *,
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
    shrinkage: float | Literal["auto"] = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""Return the affine map that is optimal, for the squared cost, between Gaussians of the samples' moments.

    .. math::
        T(x) = A x + b, \qquad
        A = \Sigma_\nu^{1/2} (\Sigma_\nu^{1/2} \Sigma_\mu \Sigma_\nu^{1/2})^{-1/2} \Sigma_\nu^{1/2}, \qquad
        b = m_\nu - A m_\mu

    A is symmetric and positive semi-definite (Dowson and Landau 1982; Peyré and Cuturi 2019, "Computational Optimal
    Transport", remark 2.31). Inverses are pseudo-inverses, and directions in which the source does not vary are
    translated (unless shrinkage gives them a variance), so that constant features, fewer samples than dimensions and a
    single sample are all allowed. Where the target varies in directions that the source lacks, no map reaches it, and
    this one gives the conditional mean.

    Args:
        source: ``(n, d)`` samples of :math:`\mu`.
        target: ``(m, d)`` samples of :math:`\nu`.
        weights: ``(n,)`` and ``(m,)`` weights that sum to 1; uniform by default.
        shrinkage: Share in [0, 1] by which each covariance is drawn towards the multiple of the identity with its
            trace; ``"auto"`` takes the oracle-approximating share (Chen et al. 2010, equation 23) below 20 samples a
            dimension, and none from there on: all variances are known well then, and any share would swamp the small
            ones. For weights, the number of samples is :math:`1 / \sum_i a_i^2`.

    Returns:
        The ``(d, d)`` matrix A and the ``(d,)`` vector b, in float64, on the device of ``source``.

    Raises:
        TypeError: An argument is no floating-point tensor.
        ValueError: Shapes do not fit, values are not finite, or ``shrinkage`` is out of range.

    Example:
        >>> import torch
        >>> x = torch.randn(500, 2)
        >>> A, b = gaussian_map(x, 3 * x + 1)
        >>> torch.allclose(x.double() @ A + b, 3 * x.double() + 1, atol=1e-4)
        True
    """
    check_pair("source", source, "target", target)
    if shrinkage != "auto" and not _is_share(shrinkage):
        raise ValueError(f"shrinkage must be a number from 0 to 1 or 'auto', got {shrinkage!r}")
    m_source, S = _moments("source", source, weights[0], shrinkage)
    m_target, T = _moments("target", target, weights[1], shrinkage)
    S_root, still = _root(S)
    T_root, _ = _root(T)
    # (T½ S T½)^½ = U diag(σ) Uᵀ from the singular values of T½ S½: no product is squared, so no digits are lost.
    U, sigma, _ = torch.linalg.svd(T_root @ S_root)
    rank = int((sigma > 10 * len(S) * torch.finfo(sigma.dtype).eps * sigma.amax()).sum())
    half = (T_root @ U[:, :rank]) * sigma[:rank].rsqrt()
    A = half @ half.mT + still
    A = (A + A.mT) / 2
    return A, m_target - A @ m_source


def _moments(name: str, x: Tensor, weights: Tensor | None, shrinkage: float | Literal["auto"]) -> tuple[Tensor, Tensor]:
    """Return the mean and the shrunk covariance, in float64."""
    x = x.double()
    w = check_weights(f"the weights of {name}", weights, x)
    mean = w @ x
    x = x - mean
    covariance = (w[:, None] * x).mT @ x
    d = len(covariance)
    level = covariance.trace() / d
    if shrinkage == "auto":
        n = float(1 / w.square().sum())
        share = _oracle_share(covariance, n) if n < _ENOUGH * d else 0.0
    else:
        share = float(shrinkage)
    covariance = (1 - share) * covariance
    covariance.diagonal().add_(share * level)
    return mean, covariance


def _oracle_share(covariance: Tensor, n: float) -> float:
    """Return the share of Chen et al. 2010, "Shrinkage Algorithms for MMSE Covariance Estimation", equation 23."""
    d = len(covariance)
    squares, trace = float(covariance.square().sum()), float(covariance.trace())
    excess = (n + 1 - 2 / d) * (squares - trace**2 / d)
    return min(1.0, ((1 - 2 / d) * squares + trace**2) / excess) if excess > 0 else 1.0


def _root(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square root, and the projection onto the directions without variance."""
    values, vectors = torch.linalg.eigh(covariance)
    still = values <= 10 * len(values) * torch.finfo(values.dtype).eps * values.amax().clamp_min(0)
    root = (vectors * torch.where(still, 0, values.clamp_min(0)).sqrt()) @ vectors.mT
    return root, vectors[:, still] @ vectors[:, still].mT
