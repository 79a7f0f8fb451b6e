"""Native batch-norm kernels on each ghost, for ghosts that fill the cache."""

import torch
from torch import Tensor

from lightning_gap.ghost.kernels import native
from lightning_gap.ghost.kernels.layout import Kernel, Limits, Maybe, Run, Tables
from lightning_gap.trainer.internals.of_torch import native_batch_norm_out

__all__ = ["ONE_BY_ONE"]


def _forward(
    run: Run, x: Tensor, y: Tensor, weight: Maybe, bias: Maybe, eps: float, tables: Tables, limits: Limits
) -> None:
    rows = len(x) // run.ghosts
    parts = zip(x.split(rows), y.split(rows), *tables, strict=True)
    if not native.positions_as_channels(x):
        for part, out, mean, var, invstd in parts:
            # With momentum 1 the kernel's running statistics are the batch's own mean and unbiased variance. They are
            # blended with what the buffers hold at weight 0, which must not be NaN: the tables come as zeros.
            native_batch_norm_out(
                part, weight, bias, torch.zeros_like(mean), var, True, 1.0, eps,
                out=out, save_mean=mean, save_invstd=invstd,
            )  # fmt: skip
        return
    n = x.numel() // (run.ghosts * x.shape[1])
    one = torch.ones_like(tables.mean[0])
    for part, out, mean, var, invstd in parts:
        center, spread = native.moments(part)
        mean.copy_(center)
        var.copy_(spread)
        invstd.copy_(spread.add_(eps).rsqrt_())
        scale = invstd if weight is None else invstd * weight
        native.transform(part, out, scale, bias, mean, one, 0.0)
    tables.var.mul_(n / (n - 1))


def _backward(run: Run, x: Tensor, grad_y: Tensor, weight: Maybe, tables: Tables, out: Maybe, limits: Limits) -> Tensor:
    rows = len(x) // run.ghosts
    scale, slopes, shifts = native.coefficients(weight, tables.invstd, x.numel() // (run.ghosts * x.shape[1]))
    sums = scale.new_empty(2, *scale.shape)
    for i, (part, grad) in enumerate(zip(x.split(rows), grad_y.split(rows), strict=True)):
        mean = tables.mean[i]
        products, total = native.gradient_sums(part, grad, mean, tables.invstd[i])
        sums[0, i], sums[1, i] = products, total
        if out is not None:
            slope = products * slopes[i]
            shift = torch.addcmul(total * shifts[i], slope, mean, value=-1)
            native.input_gradient(part, grad, out[i * rows : (i + 1) * rows], scale[i], slope, shift, limits)
    return sums.sum(1)


ONE_BY_ONE = Kernel(_forward, _backward)
