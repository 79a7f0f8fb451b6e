"""One ghost over several ranks: one collective in the forward pass and one in the backward pass."""

from typing import Any

import torch
from torch import Tensor

from lightning_gap.ghost.kernels import layout, native
from lightning_gap.ghost.kernels.autograd import where_wanted
from lightning_gap.ghost.kernels.formula import (
    formula_over_ranks,
    gradients_of_formula,
    looks_into_operations,
    refuse_one_value,
)
from lightning_gap.ghost.kernels.layout import LIMITS, Limits, Maybe, Normalized
from lightning_gap.ranks.group import RankGroup

__all__ = ["normalize_over_ranks"]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def normalize_over_ranks(
    x: Tensor, weight: Maybe, bias: Maybe, eps: float, ranks: RankGroup, limits: Limits = LIMITS
) -> Normalized:
    """Normalize all samples of all ``ranks`` as one ghost; collective, in the backward pass too.

    A rank may have none. Returns its output, and the ghost's mean and unbiased variance, (1, C), detached.
    """
    if looks_into_operations():
        return formula_over_ranks(x, weight, bias, eps, ranks)
    weight, bias = layout.in_statistics_dtype(x, weight, bias)
    y, mean, var, *_ = _RankGhostNorm.apply(layout.dense(x), weight, bias, eps, ranks, limits)  # type: ignore[no-untyped-call]
    return y, mean, var


class _RankGhostNorm(torch.autograd.Function):
    """Moments are gathered forward, two sums added backward; a second derivative goes through the formula."""

    @staticmethod
    def forward(
        x: Tensor, weight: Maybe, bias: Maybe, eps: float, ranks: RankGroup, limits: Limits
    ) -> tuple[Tensor, ...]:
        y, inside, channels = torch.empty_like(x), layout.channels_inside(x), x.shape[1]
        flat = layout.flat_view(x, inside)
        values = flat.numel() // channels
        mean, var = flat.new_zeros(2, channels, dtype=layout.statistics_dtype(x))
        if values:
            mean, var = (t.to(mean.dtype) for t in native.moments(flat))
        # Which layer and how many values, then the moments, of one length: ranks that have met different layers are
        # told, and do not read each other's numbers.
        spare = mean.new_zeros(2 * max(0, ranks.channels - channels))
        own = torch.cat((mean.new_full((1,), ranks.layer), mean.new_full((1,), values), mean, var * values, spare))
        every = ranks.gather(own)
        ranks.check_layers(every[:, 0])
        counts, means, squares = every[:, 1:].split((1, channels, channels, len(spare)), 1)[:3]
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        squares = (squares + counts * (means - mean) ** 2).sum(0)  # Welford's, for parts of any size
        refuse_one_value(count, ranks)
        var, unbiased = squares / count, squares / (count - 1)
        if values:
            flat_y = layout.flat_view(y, inside)
            native.transform(flat, flat_y, weight, bias, mean, var, eps)
        return y, mean[None], unbiased[None], (var + eps).rsqrt(), count

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, ctx.eps, ctx.ranks, ctx.limits = inputs
        _, mean, _, invstd, count = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, weight, bias, mean, invstd, count)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Maybe, ...]:
        x, weight, bias, mean, invstd, count = ctx.saved_tensors
        if torch.is_grad_enabled() or looks_into_operations(grad_y):
            gradients = gradients_of_formula(
                lambda: formula_over_ranks(x, weight, bias, ctx.eps, ctx.ranks)[0], ctx, (x, weight, bias), grad_y
            )
            return *gradients, None, None, None
        inside, mean = layout.channels_inside(x), mean[0]
        flat = layout.flat_view(x, inside)
        flat_grad = layout.flat_view(layout.dense_like(grad_y, inside), inside)
        own = mean.new_zeros(2, len(mean))
        if flat.numel():
            own = torch.stack(native.gradient_sums(flat, flat_grad, mean, invstd))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
            products, total = ctx.ranks.sum(own)
            if flat.numel():
                scale, slope, shift = native.coefficients(weight, invstd, count)
                slope = products * slope
                shift = torch.addcmul(total * shift, slope, mean, value=-1)
                native.input_gradient(
                    flat, flat_grad, layout.flat_view(grad_x, inside), scale, slope, shift, ctx.limits
                )
        # Of weight and bias this rank's share: the strategy adds them up.
        return grad_x, *where_wanted(ctx, own), None, None, None
