"""The defining formula, which compilers fuse, transforms look into, and second derivatives go through."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_gap.ghost.kernels.layout import Maybe, Normalized, Run, statistics_dtype
from lightning_gap.ranks.group import RankGroup
from lightning_gap.trainer.internals.of_torch import is_batched, transforms_run

__all__ = ["formula", "formula_over_ranks", "gradients_of_formula", "looks_into_operations", "refuse_one_value"]


def looks_into_operations(gradient: Tensor | None = None) -> bool:
    """Return whether a transform of ``torch.func``, forward-mode or batched differentiation follows each operation."""
    return transforms_run() or (gradient is not None and is_batched(gradient))


def formula(x: Tensor, weight: Maybe, bias: Maybe, eps: float, runs: list[Run]) -> Normalized:
    """Normalize each ghost of ``x`` by its own statistics, in operations that anything differentiates."""
    results = [_formula_of_run(run.split(x), run.strided, weight, bias, eps) for run in runs]
    y, mean, var = results[0] if len(results) == 1 else map(torch.cat, zip(*results, strict=True))
    return y, mean.detach(), var.detach()


def _formula_of_run(ghosts: Tensor, strided: bool, weight: Maybe, bias: Maybe, eps: float) -> Normalized:
    samples = int(not strided)
    over = [samples, *range(3, ghosts.dim())]
    wide = ghosts.to(statistics_dtype(ghosts))
    var, mean = torch.var_mean(wide, over, correction=0, keepdim=True)
    y = (wide - mean) * torch.rsqrt(var + eps)
    per_channel = (-1, *(1,) * (ghosts.dim() - 3))
    if weight is not None:
        y = y * weight.view(per_channel)
    if bias is not None:
        y = y + bias.view(per_channel)
    values = ghosts.shape[samples] * math.prod(ghosts.shape[3:])
    mean, var = (t.reshape(ghosts.shape[1 - samples], ghosts.shape[2]) for t in (mean, var * (values / (values - 1))))
    return y.flatten(0, 1).to(ghosts.dtype), mean, var


def formula_over_ranks(x: Tensor, weight: Maybe, bias: Maybe, eps: float, ranks: RankGroup) -> Normalized:
    """Normalize all samples of all ranks as one ghost, in operations that anything differentiates; collective."""
    over, per_channel = [0, *range(2, x.dim())], (-1, *(1,) * (x.dim() - 2))
    wide = x.to(statistics_dtype(x))
    values = math.prod(x.shape[i] for i in over)
    own = [torch.full((), n, dtype=wide.dtype, device=wide.device) for n in (values, ranks.layer)]  # no vmap's
    every = ranks.gather(torch.stack(own))
    ranks.check_layers(every[:, 1])
    count = every[:, 0].sum()
    refuse_one_value(count, ranks)
    mean = ranks.differentiable_sum(wide.sum(over)) / count
    centred = wide - mean.view(per_channel)
    var = ranks.differentiable_sum(centred.square().sum(over)) / count
    y = centred * torch.rsqrt(var + eps).view(per_channel)
    if weight is not None:
        y = y * weight.view(per_channel)
    if bias is not None:
        y = y + bias.view(per_channel)
    return y.to(x.dtype), mean.detach()[None], (var.detach() * (count / (count - 1)))[None]


def refuse_one_value(count: Tensor, ranks: RankGroup) -> None:
    """Raise ``ValueError`` where a channel of a ghost over ranks has one value, and no variance."""
    if count.device.type == "cpu" and count <= 1:  # a GPU is not waited for
        raise ValueError(f"Expected more than 1 value per channel in a ghost over {ranks.size} ranks when training")


def gradients_of_formula(
    formula: Callable[[], Tensor], ctx: Any, inputs: tuple[Maybe, ...], grad_y: Tensor
) -> list[Maybe]:
    """Return the gradients of the inputs that need one, differentiable again where autograd asks for that."""
    wanted = ctx.needs_input_grad[: len(inputs)]
    leaves = [t for t, yes in zip(inputs, wanted, strict=True) if t is not None and yes]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        y = formula()
    gradients = iter(torch.autograd.grad(y, leaves, grad_y, create_graph=again))
    return [next(gradients) if yes else None for yes in wanted]
