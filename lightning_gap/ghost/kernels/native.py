"""What torch's own batch-norm kernels give: moments, the transform by them, and the sums of its gradient."""

import torch
from torch import Tensor

from lightning_gap.ghost.kernels.layout import Limits, Maybe, block, statistics_dtype
from lightning_gap.trainer.internals.of_torch import native_batch_norm_backward, native_batch_norm_out

__all__ = ["coefficients", "gradient_sums", "input_gradient", "moments", "positions_as_channels", "transform"]


def positions_as_channels(x: Tensor) -> bool:
    """Return whether statistics are faster position by position: torch's CPU kernel for (N, C, L) is no vector code."""
    return x.dim() == 3 and x.device.type == "cpu"


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel, in float64 where positions have been joined."""
    features = x.flatten(1) if positions_as_channels(x) else x
    # Float32 buffers beside half-precision samples make float32 statistics.
    unused = features.new_zeros(2, features.shape[1], dtype=statistics_dtype(x))
    means, variances = torch.batch_norm_update_stats(features, unused[0], unused[1], 0.0)
    if features is x:
        return means, variances
    means, variances = (t.view(x.shape[1], -1) for t in (means, variances))
    mean = means.mean(1, True, dtype=torch.float64)
    return mean[:, 0], (means - mean).square_().add_(variances).mean(1)


def transform(x: Tensor, y: Tensor, weight: Maybe, bias: Maybe, mean: Tensor, var: Tensor, eps: float) -> None:
    """Write γ (x − μ) / √(σ² + ε) + β, as in evaluation."""
    # Two buffers: the CUDA kernel writes the mean and 1/σ there and normalizes with what it finds; a CPU's leaves them.
    save_mean, save_invstd = mean.new_empty(2, len(mean)).unbind()
    native_batch_norm_out(
        x, weight, bias, mean, var, False, 0.0, eps, out=y, save_mean=save_mean, save_invstd=save_invstd
    )


def gradient_sums(x: Tensor, grad_y: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ dy·(x − μ)/σ and Σ dy of each channel."""
    # The weight has no part in the sums; with half-precision inputs its dtype is that of the statistics.
    _, products, total = native_batch_norm_backward(
        grad_y, x, mean, None, None, mean, invstd, True, 0.0, [False, True, True]
    )
    return products, total


def coefficients(weight: Maybe, invstd: Tensor, n: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a, b, c of the gradient of x, a·dy + b·Σdy·x̂·(x − μ) + c·Σdy: a = γ/σ, b = −a/(σn) and c = −a/n."""
    scale = invstd if weight is None else invstd * weight
    shift = scale / -n
    return scale, shift * invstd, shift


def input_gradient(
    x: Tensor, grad_y: Tensor, out: Tensor, scale: Tensor, slope: Tensor, shift: Tensor, limits: Limits
) -> None:
    """Write scale·dy + slope·x + shift, with one number of each for a channel."""
    rows = max(1, 2 * block(x, limits) // x[0].numel())
    native = positions_as_channels(x) and x.dtype == scale.dtype
    zero, one = torch.zeros_like(shift), torch.ones_like(shift)
    wide = [t.view(-1, *(1,) * (x.dim() - 2)) for t in (scale, slope, shift)]
    for part, grad, target in zip(x.split(rows), grad_y.split(rows), out.split(rows), strict=True):
        if native:
            transform(part, target, slope, shift, zero, one, 0.0)
            target.addcmul_(grad, wide[0])
        elif target.dtype == scale.dtype:
            torch.addcmul(wide[2], part, wide[1], out=target).addcmul_(grad, wide[0])
        else:
            target.copy_(torch.addcmul(wide[2], part, wide[1]).addcmul_(grad, wide[0]))
