"""Which way a batch is normalized: by the eager kernels, by one operator of a compiled graph, or by the formula."""

import math

import torch
from torch import Tensor

from lightning_gap.ghost.kernels import layout
from lightning_gap.ghost.kernels.autograd import over_ghosts
from lightning_gap.ghost.kernels.formula import formula
from lightning_gap.ghost.kernels.layout import LIMITS, Limits, Maybe, Normalized, Run
from lightning_gap.ghost.kernels.operator import ghost_norm
from lightning_gap.ghost.transforms import looks_into_operations

__all__ = ["normalize"]


def normalize(
    x: Tensor, weight: Maybe, bias: Maybe, eps: float, runs: list[Run], limits: Limits = LIMITS
) -> Normalized:
    """Normalize each ghost of ``x`` by its own statistics.

    Args:
        x: (N, C) or (N, C, ...).
        weight: (C,) or None.
        bias: (C,) or None.
        eps: Added to the variance.
        runs: The partition, which covers the batch in order.
        limits: Where one way of computing becomes faster than another; graphs of compilers take no others.

    Returns:
        The output, and each ghost's mean and unbiased variance, (ghosts, C), detached.
    """
    opaque = x.device.type == "cpu" and x.dim() > 2 and torch.compiler.is_dynamo_compiling()
    traced = torch.compiler.is_compiling() and not opaque
    if x.device.type not in ("cpu", "cuda") or traced or looks_into_operations():
        return formula(x, weight, bias, eps, runs)
    first, positions = runs[0], math.prod(x.shape[2:])
    large = (first.stop - first.start) // first.ghosts * positions * x.shape[1] >= limits.large_ghost
    if first.strided and large and positions > 1 and layout.channels_inside(x):
        # No native call takes these ghosts where they lie, and they fill the cache: two copies are cheaper.
        inside = x.movedim(1, -1)
        inside = _with_rest(first.split(inside).transpose(0, 1), inside[first.stop :])
        runs = [first._replace(strided=False), *runs[1:]]
        y, mean, var = normalize(inside.movedim(-1, 1), weight, bias, eps, runs, limits)
        inside = y.movedim(1, -1)
        dealt = first._replace(strided=False).split(inside).transpose(0, 1)
        return _with_rest(dealt, inside[first.stop :]).movedim(-1, 1), mean, var
    weight, bias = layout.in_statistics_dtype(x, weight, bias)
    if opaque:
        numbers = [number for run in runs for number in (run.start, run.stop, run.ghosts, int(run.strided))]
        y, mean, var, _ = ghost_norm(layout.dense(x), weight, bias, eps, numbers)
        return y, mean.detach(), var.detach()
    y, mean, var, _ = over_ghosts(layout.dense(x), weight, bias, eps, runs, limits)
    return y, mean, var


def _with_rest(ghosts: Tensor, rest: Tensor) -> Tensor:
    samples = ghosts.flatten(0, 1)
    return torch.cat((samples, rest)) if len(rest) else samples
