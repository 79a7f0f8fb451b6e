"""Which way a batch is normalized: by the eager kernels, by one operator of a compiled graph, or by the formula."""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_gap.ghost.kernels import layout
from lightning_gap.ghost.kernels.autograd import forward_over_ghosts, gradients_over_ghosts, over_ghosts, where_wanted
from lightning_gap.ghost.kernels.formula import formula, looks_into_operations
from lightning_gap.ghost.kernels.layout import LIMITS, Limits, Maybe, Normalized, Run
from lightning_gap.ghost.kernels.one_visit import takes_one_visit

__all__ = ["normalize"]


def normalize(
    x: Tensor, weight: Maybe, bias: Maybe, eps: float, runs: list[Run], limits: Limits = LIMITS
) -> Normalized:
    """Normalize each ghost of ``x``, (N, C) or (N, C, ...), by its own statistics; graphs take the default limits.

    Returns the output, and each ghost's mean and unbiased variance, (ghosts, C), detached.
    """
    for parameter in (weight, bias):
        if parameter is not None and (parameter.shape != x.shape[1:2] or parameter.device != x.device):
            # Compiled passes read what they are told is there.
            raise ValueError(
                f"weight and bias must have one number for each of the {x.shape[1]} channels of x on {x.device}, got "
                f"shape {tuple(parameter.shape)} on {parameter.device}"
            )
    device, compiling = x.device.type, torch.compiler.is_compiling()
    opaque = compiling and device == "cpu" and torch.compiler.is_dynamo_compiling()
    if opaque and x.dim() == 2:
        # The compiler fuses the formula with what is around: only of many numbers the compiled passes take less time.
        opaque = not torch.compiler.is_exporting() and x.numel() >= limits.compiled and takes_one_visit(x, limits)
    if (compiling and not opaque) or device not in ("cpu", "cuda") or looks_into_operations():
        return formula(x, weight, bias, eps, runs)
    if runs[0].strided and _lies_between(runs[0], x, limits):
        # No native call takes these ghosts where they lie, and they fill the cache: two copies are cheaper.
        first, samples = runs[0], x.movedim(1, -1)
        samples = _with_rest(first.split(samples).transpose(0, 1), samples[first.stop :])
        runs = [first._replace(strided=False), *runs[1:]]
        y, mean, var = normalize(samples.movedim(-1, 1), weight, bias, eps, runs, limits)
        samples = y.movedim(1, -1)
        dealt = first._replace(strided=False).split(samples).transpose(0, 1)
        return _with_rest(dealt, samples[first.stop :]).movedim(-1, 1), mean, var
    weight, bias = layout.in_statistics_dtype(x, weight, bias)
    if opaque:
        numbers = [number for run in runs for number in (run.start, run.stop, run.ghosts, int(run.strided))]
        y, kept, var = _ghost_norm(layout.dense(x), weight, bias, eps, numbers)
        return y, kept.detach()[0], var.detach()
    y, kept, var = over_ghosts(layout.dense(x), weight, bias, eps, runs, limits)
    return y, kept[0], var


def _lies_between(run: Run, x: Tensor, limits: Limits) -> bool:
    """Return whether torch's kernels find the large strided ghosts of images in channels that lie side by side."""
    positions = math.prod(x.shape[2:])
    large = (run.stop - run.start) // run.ghosts * positions * x.shape[1] >= limits.large_ghost
    return large and positions > 1 and layout.channels_inside(x) and not takes_one_visit(x, limits)


def _with_rest(ghosts: Tensor, rest: Tensor) -> Tensor:
    samples = ghosts.flatten(0, 1)
    return torch.cat((samples, rest)) if len(rest) else samples


# The eager kernels as one operator for torch.compile, whose own CPU code for the statistics of images takes longer.
# Schemas are written out: what annotations they can be inferred from differs among torch's versions.
@torch.library.custom_op(
    "lightning_gap::ghost_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? bias, float eps, SymInt[] runs) -> (Tensor, Tensor, Tensor)",
)
def _ghost_norm(x: Tensor, weight: Maybe, bias: Maybe, eps: float, runs: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize as :func:`forward_over_ghosts` does, a run being four numbers of ``runs``."""
    return forward_over_ghosts(x, weight, bias, eps, _runs_of(runs))


@_ghost_norm.register_fake
def _(x: Tensor, weight: Maybe, bias: Maybe, eps: float, runs: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    kept = x.new_empty(2, sum(runs[2::4]), x.shape[1], dtype=layout.statistics_dtype(x))
    return torch.empty_like(x), kept, torch.empty_like(kept[0])


@torch.library.custom_op(
    "lightning_gap::ghost_norm_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor grad_y, Tensor? weight, Tensor kept, SymInt[] runs, bool wanted) -> (Tensor, Tensor)",
)
def _ghost_norm_backward(
    x: Tensor, grad_y: Tensor, weight: Maybe, kept: Tensor, runs: list[int], wanted: bool
) -> tuple[Tensor, Tensor]:
    grad_x, total = gradients_over_ghosts(x, grad_y, weight, kept, _runs_of(runs), wanted)
    return x.new_empty(0) if grad_x is None else grad_x, total


@_ghost_norm_backward.register_fake
def _(x: Tensor, grad_y: Tensor, weight: Maybe, kept: Tensor, runs: list[int], wanted: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x) if wanted else x.new_empty(0), kept.new_empty(2, x.shape[1])


def _runs_of(runs: list[int]) -> list[Run]:
    return [Run(runs[i], runs[i + 1], runs[i + 2], bool(runs[i + 3])) for i in range(0, len(runs), 4)]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, _, ctx.runs = inputs
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Maybe, ...]:
    x, weight, kept = ctx.saved_tensors
    wanted = ctx.needs_input_grad[0]
    grad_x, total = _ghost_norm_backward(x, grad_y, weight, kept, ctx.runs, wanted)
    return grad_x if wanted else None, *where_wanted(ctx, total), None, None


_ghost_norm.register_autograd(_backward, setup_context=_remember)
