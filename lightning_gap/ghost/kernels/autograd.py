"""The eager kernels under autograd: which run of a batch goes to which kernel, forward and backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_gap.ghost.kernels import layout
from lightning_gap.ghost.kernels.as_channels import AS_CHANNELS, gradients_as_channels
from lightning_gap.ghost.kernels.formula import formula, gradients_of_formula, looks_into_operations
from lightning_gap.ghost.kernels.layout import LIMITS, Kernel, Limits, Maybe, Run, Tables
from lightning_gap.ghost.kernels.native import positions_as_channels
from lightning_gap.ghost.kernels.one_by_one import ONE_BY_ONE
from lightning_gap.ghost.kernels.one_visit import ONE_VISIT, has_memory, takes_one_visit
from lightning_gap.ghost.kernels.side_by_side import SIDE_BY_SIDE

__all__ = ["forward_over_ghosts", "gradients_over_ghosts", "over_ghosts", "where_wanted"]


def gradients_over_ghosts(
    x: Tensor, grad_y: Tensor, weight: Maybe, kept: Tensor, runs: list[Run], wanted: bool, limits: Limits = LIMITS
) -> tuple[Maybe, Tensor]:
    """Return the gradient of x, if wanted, and those of weight and bias, (2, C); kept are means and 1/σ."""
    mean, invstd = kept.unbind()
    tables = Tables(mean, mean, invstd)  # variances have no part in it
    inside = layout.channels_inside(x)
    flat = layout.flat_view(x, inside)
    flat_grad = layout.flat_view(layout.dense_like(grad_y, inside), inside)
    parts = _parts(flat, runs, limits)
    if len(parts) == 1 and parts[0][-1] is AS_CHANNELS and not positions_as_channels(flat):
        grad_x, total = gradients_as_channels(runs[0], flat, flat_grad, weight, tables, wanted)
        return grad_x.view_as(x) if wanted else None, total  # the gradient is the whole: no copy
    own = torch.empty_like(x) if wanted else None
    out = None if own is None else layout.flat_view(own, inside)
    if len(parts) == 1:
        return own, parts[0][-1].backward(runs[0], flat, flat_grad, weight, tables, out, limits).to(mean.dtype)
    total = mean.new_zeros(2, x.shape[1])
    for run, rows, which, kernel in parts:
        target = None if out is None else out[rows]
        part = Tables(*(t[which] for t in tables))
        total += kernel.backward(run, flat[rows], flat_grad[rows], weight, part, target, limits)
    return own, total


def _parts(flat: Tensor, runs: list[Run], limits: Limits) -> list[tuple[Run, slice, slice, Kernel]]:
    """Return each run, its rows of the flat view, its ghosts in tables of statistics, and the kernel for it."""
    parts, first, length = [], 0, flat.shape[0]
    per_sample = length // runs[-1].stop
    one_visit = takes_one_visit(flat, limits) and has_memory(flat)
    if one_visit and len(runs) == 1:
        return [(runs[0], slice(0, length), slice(0, runs[0].ghosts), ONE_VISIT)]
    for run in runs:
        rows = slice(run.start * per_sample, run.stop * per_sample)
        ghost = flat[rows].numel() // run.ghosts
        large = ghost >= limits.large_ghost and not run.strided
        if one_visit:
            kernel = ONE_VISIT
        elif run.strided and per_sample == 1:
            kernel = AS_CHANNELS
        elif run.ghosts == 1 or large:
            kernel = ONE_BY_ONE
        else:
            kernel = SIDE_BY_SIDE
        parts.append((run, rows, slice(first, first + run.ghosts), kernel))
        first += run.ghosts
    return parts


def where_wanted(ctx: Any, gradients: Tensor) -> list[Maybe]:
    """Return the gradients of weight and bias that autograd asks for."""
    wanted = ctx.needs_input_grad[1:3]
    return [gradient if yes else None for yes, gradient in zip(wanted, gradients, strict=True)]


def forward_over_ghosts(
    x: Tensor, weight: Maybe, bias: Maybe, eps: float, runs: list[Run], limits: Limits = LIMITS
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output; means and 1/σ of all ghosts, (2, ghosts, C), for the backward pass; unbiased variances."""
    y, inside = torch.empty_like(x), layout.channels_inside(x)
    flat, flat_y = layout.flat_view(x, inside), layout.flat_view(y, inside)
    parts = _parts(flat, runs, limits)
    shape, dtype = (sum([run.ghosts for run in runs]), x.shape[1]), layout.statistics_dtype(x)
    # Torch's kernels blend what a table holds into it, which must not be NaN.
    make = x.new_empty if parts[0][-1] is ONE_VISIT else x.new_zeros
    kept, var = make((2, *shape), dtype=dtype), make(shape, dtype=dtype)
    mean, invstd = kept.unbind()
    tables = Tables(mean, var, invstd)
    if len(parts) == 1:
        parts[0][-1].forward(runs[0], flat, flat_y, weight, bias, eps, tables, limits)
        return y, kept, var
    for run, rows, which, kernel in parts:
        part = Tables(*(t[which] for t in tables))
        kernel.forward(run, flat[rows], flat_y[rows], weight, bias, eps, part, limits)
    return y, kept, var


class _GhostNorm(torch.autograd.Function):
    """The eager kernels; a second derivative goes through the formula."""

    # With a setup_context of its own, torch would read the signature at each call, for longer than all else takes.
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Maybe, bias: Maybe, eps: float, runs: list[Run], limits: Limits
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, kept, var = forward_over_ghosts(x, weight, bias, eps, runs, limits)
        ctx.eps, ctx.runs, ctx.limits = eps, runs, limits
        ctx.mark_non_differentiable(kept, var)
        ctx.set_materialize_grads(False)  # of tables, which have none
        ctx.save_for_backward(x, weight, bias, kept)
        return y, kept, var

    @staticmethod
    def backward(ctx: Any, grad_y: Maybe, *_: Maybe) -> tuple[Maybe, ...]:
        if grad_y is None:
            return (None,) * 6
        x, weight, bias, kept = ctx.saved_tensors
        if torch.is_grad_enabled() or looks_into_operations(grad_y):
            gradients = gradients_of_formula(
                lambda: formula(x, weight, bias, ctx.eps, ctx.runs)[0], ctx, (x, weight, bias), grad_y
            )
            return *gradients, None, None, None
        grad_x, total = gradients_over_ghosts(x, grad_y, weight, kept, ctx.runs, ctx.needs_input_grad[0], ctx.limits)
        return grad_x, *where_wanted(ctx, total), None, None, None


over_ghosts: Callable[..., tuple[Tensor, Tensor, Tensor]] = _GhostNorm.apply
