r"""The gradient noise scale in the norm of an optimizer: l1 for signs, the nuclear norm for orthogonal matrices.

One step of size :math:`\eta` along the steepest descent of a norm,
:math:`s = \arg\max_{\|s\| \le 1} \langle g, s \rangle`, with a gradient g over B samples, gains to first order

.. math:: \langle G, s \rangle = \langle g, s \rangle - \langle g - G, s \rangle \ge \|G\|_* - 2 \|g - G\|_*,

in the dual norm :math:`\|\cdot\|_*`. So a batch is large enough once :math:`E \|g - G\|_* \approx N / \sqrt{B}` is
small beside :math:`\|G\|_*`, and the two are equal at

.. math:: B_* = N^2 / \|G\|_*^2, \qquad N_{l1} = \sum_i \sigma_i, \qquad
    N_{nuclear} = \operatorname{tr} (E[n n^T])^{1/2},

of a coordinate's standard deviation :math:`\sigma_i` over samples, and of a matrix n of one sample's noise. Both N
bound the mean norm of the noise (Jensen). In the Euclidean norm, :math:`N^2 = \operatorname{tr} \Sigma`, it is
:math:`B_{simple}`. Where every coordinate has the same ratio of signal to noise, signs drawn from Gaussian gradients
gain :math:`\operatorname{erf}(\sqrt{B / 2 B_*})` times the most, so that updates of the best length for each batch are
:math:`\operatorname{erf}^{-2} = 2.15` times the fewest at :math:`B_*`.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from scipy.special import hyp2f1
from torch import Tensor

__all__ = ["DualNoiseScaleEstimate", "DualNorm", "dual_verdict", "gram_of", "matrix_of", "noise_and_norm", "shrinkage"]

DualNorm = Literal["l1", "nuclear"]


@cache
def shrinkage(rows: int, freedom: int) -> float:
    r"""Return how much too small the root of a sample covariance of white noise is on average.

    .. math:: \kappa = E \operatorname{tr} W^{1/2} / m

    W is the sample covariance of m = ``rows`` components from ``freedom`` independent Gaussian draws, of true
    covariance 1. Of one component it is :math:`c_4 = \sqrt{2/d}\, \Gamma((d+1)/2) / \Gamma(d/2)`; of many the mean root
    of the law of Marchenko and Pastur, :math:`{}_2F_1(\tfrac12, -\tfrac12; 2; m/d)`. In between this takes the latter
    less what it is too large for one component, within 1.5 %.

    Args:
        rows: m, at most ``freedom``.
        freedom: d.

    Example:
        >>> round(shrinkage(1, 1), 4), round((2 / math.pi) ** 0.5, 4)  # the mean of a half-normal
        (0.7979, 0.7979)
        >>> round(shrinkage(1000, 1000), 3), round(8 / (3 * math.pi), 3)  # the mean of a quarter circle
        (0.849, 0.849)
    """
    one = math.sqrt(2 / freedom) * math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    return float(one + _mean_root(rows / freedom) - _mean_root(1 / freedom))


def _mean_root(aspect: float) -> float:
    return float(hyp2f1(0.5, -0.5, 2, min(1.0, aspect)))


def matrix_of(gradient: Tensor) -> Tensor:
    """Return a gradient as a real matrix of no more rows than columns: rows of outputs flattened, a vector one row.

    Example:
        >>> [tuple(matrix_of(torch.zeros(shape)).shape) for shape in ((8, 3, 2, 2), (6, 2), (5,))]
        [(8, 12), (2, 6), (1, 5)]
    """
    matrix = gradient.flatten(1) if gradient.dim() > 1 else gradient.reshape(1, -1)
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def noise_and_norm(norm: DualNorm, second: Tensor, mean: Tensor, *, small_batch: float, parts: int) -> Tensor:
    r"""Return N, the norm of a mean gradient, and the norm that noise alone would give it, of one parameter.

    With R parts of :math:`B_s` samples each, :math:`g_r`, and their mean :math:`\bar g`,

    .. math:: \hat\sigma_i^2 = \frac{B_s R}{R - 1} \Big( \frac1R \sum_r g_{ri}^2 - \bar g_i^2 \Big),

    and the same of :math:`g_r g_r^T`. The sum of roots is divided by :func:`shrinkage`: for Gaussian noise that is
    exact for coordinates and vectors, and within 1.5 % for matrices of white noise. Noise of a matrix that has more
    directions than R − 1 parts show is underestimated.

    Args:
        norm: ``"l1"`` or ``"nuclear"``.
        second: The mean over parts of :math:`g_r^2`, of the gradient's shape; for ``"nuclear"`` that of
            :math:`g_r g_r^T` of :func:`matrix_of`.
        mean: The mean gradient over all parts.
        small_batch: :math:`B_s`.
        parts: R, 2 or more.

    Returns:
        (3,), in single precision: N, :math:`\|\bar g\|_*`, and :math:`E \|\bar g\|_*` of noise alone.

    References:
        Naganuma et al. 2026, "Adaptive batch sizes using non-Euclidean gradient noise scales for stochastic sign and
        spectral descent" (arXiv:2602.03001): the Manhattan and the nuclear noise scale, there with rows throughout.

    Example:
        >>> parts = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
        >>> found = noise_and_norm("l1", parts.square().mean(0), parts.mean(0), small_batch=8, parts=2)
        >>> [round(number, 3) for number in found.tolist()]  # sqrt(8 * 2) / 0.798, |2| + |2|, 0.798 N / sqrt(16)
        [5.013, 4.0, 1.0]
    """
    factor, batch = small_batch * parts / (parts - 1), small_batch * parts
    if norm == "l1":
        spread = torch.addcmul(second, mean, mean, value=-1).clamp_min_(0).sqrt_()
        found, size, rows, columns = spread.sum(), torch.linalg.vector_norm(mean, 1), 1, 1
    else:
        rows, columns = matrix_of(mean).shape
        square = gram_of(mean)
        size, largest = _trace_of_root(square)
        found, _ = _trace_of_root(second - square, largest)
    noise = found.float() * (math.sqrt(factor) / shrinkage(rows, columns * (parts - 1)))
    return torch.stack((noise, size.float(), noise * (shrinkage(rows, columns) / math.sqrt(batch))))


def gram_of(gradient: Tensor) -> Tensor:
    """Return the inner products of the rows of :func:`matrix_of`, not in a precision that torch is allowed to lower."""
    matrix = matrix_of(gradient)
    lowered = torch.get_float32_matmul_precision() != "highest" and matrix.device.type != "mps"  # no doubles there
    matrix = matrix.double() if lowered else matrix
    return matrix @ matrix.T


def _trace_of_root(square: Tensor, before: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the sum of the roots of eigenvalues, and the largest of these.

    Left out are those that rounding may have made, of numbers whose largest eigenvalue was ``before``.
    """
    finite = square.isfinite().all()
    safe = square.nan_to_num(0, 0, 0)  # LAPACK raises of others
    values = torch.linalg.eigvalsh(safe.cpu() if safe.device.type == "mps" else safe).to(square.device)
    rounding = 4 * torch.finfo(values.dtype).eps * (values[-1] + before)
    kept = values.where(values > rounding, 0)
    return torch.where(finite, kept.sqrt().sum(), math.nan), values[-1]


@dataclass
class DualNoiseScaleEstimate:
    r"""Averages of N, of :math:`\|\bar g\|_*`, and of what noise alone adds to it, and the noise scale they make.

    The norm of a noisy mean gradient is too large:
    :math:`E\|\bar g\|_* - E\|\bar g - G\|_* \le \|G\|_* \le E\|\bar g\|_*`, and no estimate from :math:`\bar g` alone
    is without bias. Between these bounds stands

    .. math:: \|G\|_*^2 \approx (E\|\bar g\|_*)^2 - (E\|\bar g - G\|_*)^2,

    which is exact without noise, without signal, and where the signal is spread over coordinates, or singular
    directions, as Gaussian noise is; in the Euclidean norm it is that of
    :func:`~lightning_gap.regime.gradient_moments`. At one ratio of signal to noise for all coordinates it makes the
    noise scale up to :math:`\pi/2` times too large; a few coordinates with all the signal make it too small.

    Args:
        decay: The weight that an average keeps from one measurement to the next, in [0, 1).
        norm: What to call the norm.

    Example:
        >>> estimate = DualNoiseScaleEstimate(decay=0.9, norm="l1")
        >>> estimate.update(40.0, 5.0, 3.0)
        >>> estimate.critical_batch_size, estimate.critical_batch_bounds  # 40^2 / (5^2 - 3^2), (40 / 5)^2, (40 / 2)^2
        (100.0, (64.0, 400.0))
    """

    decay: float
    norm: str = "l1"
    measurements: int = 0
    noise: float = 0.0
    gradient: float = 0.0
    floor: float = 0.0
    total_noise: float = 0.0
    total_gradient: float = 0.0
    total_floor: float = 0.0

    def update(self, noise: float, gradient: float, floor: float) -> None:
        r"""Take in one measurement, sums over parameters of :func:`noise_and_norm`; one that is not finite is left out.

        Args:
            noise: N.
            gradient: :math:`\|\bar g\|_*`.
            floor: That of noise alone.
        """
        if not all(map(math.isfinite, (noise, gradient, floor))):
            return  # an overflow in half precision
        self.measurements += 1
        self.noise += (1 - self.decay) * (noise - self.noise)
        self.gradient += (1 - self.decay) * (gradient - self.gradient)
        self.floor += (1 - self.decay) * (floor - self.floor)
        self.total_noise += noise
        self.total_gradient += gradient
        self.total_floor += floor

    @property
    def noise_scale(self) -> float:
        r"""The present :math:`B_* = N^2 / \|G\|_*^2`, of averages that forget, or NaN."""
        return _scale(self.noise, self.gradient, self.floor)

    @property
    def critical_batch_size(self) -> float:
        """The same over the whole run: the batch whose noise is as large as the mean gradient, in this norm."""
        return _scale(self.total_noise, self.total_gradient, self.total_floor)

    @property
    def critical_batch_bounds(self) -> tuple[float, float]:
        """The bounds of :attr:`critical_batch_size` that hold whatever the signal is like, as far as N is right."""
        if not self.total_gradient > 0:
            return 0.0, math.inf
        above = self.total_gradient - self.total_floor
        low = (self.total_noise / self.total_gradient) ** 2
        return low, (self.total_noise / above) ** 2 if above > 0 else math.inf


def _scale(noise: float, gradient: float, floor: float) -> float:
    return noise**2 / (gradient**2 - floor**2) if gradient > floor else float("nan")


def dual_verdict(batch_size: int, estimate: DualNoiseScaleEstimate) -> str:
    r"""Say how a batch stands to the noise scale in a dual norm; what updates it costs does not follow from that.

    Example:
        >>> estimate = DualNoiseScaleEstimate(decay=0.9, norm="l1")
        >>> estimate.update(40.0, 5.0, 3.0)
        >>> dual_verdict(25, estimate).partition(": ")[0]
        "critical batch about 100 (64 to 400) in the l1 norm; this run's 25 is not past it"
    """
    critical, (low, high) = estimate.critical_batch_size, estimate.critical_batch_bounds
    upper = f"to {high:.0f}" if math.isfinite(high) else "or more"
    if not critical > 0:
        return (
            f"not known in the {estimate.norm} norm after {estimate.measurements} measurements, {low:.0f} {upper}; "
            "train longer, or measure at more updates (every_n_updates=1)."
        )
    side = "past it" if batch_size > critical else "not past it"
    return (
        f"critical batch about {critical:.0f} ({low:.0f} {upper}) in the {estimate.norm} norm; this run's {batch_size} "
        f"is {side}: its gradients' noise is {math.sqrt(critical / batch_size):.2g} times the mean gradient in it."
    )
