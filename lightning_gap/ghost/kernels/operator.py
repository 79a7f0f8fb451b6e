"""The eager kernels as one operator for torch.compile, whose own CPU code for the statistics of images takes longer.

Schemas are written out: what annotations they can be inferred from differs among torch's versions.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_gap.ghost.kernels.autograd import forward_over_ghosts, gradients_over_ghosts, where_wanted
from lightning_gap.ghost.kernels.layout import Maybe, Run, Tables, statistics_dtype

__all__ = ["ghost_norm"]


@torch.library.custom_op(
    "lightning_gap::ghost_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? bias, float eps, SymInt[] runs) -> (Tensor, Tensor, Tensor, Tensor)",
)
def ghost_norm(
    x: Tensor, weight: Maybe, bias: Maybe, eps: float, runs: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalize as :func:`forward_over_ghosts` does, a run being four numbers of ``runs``."""
    y, mean, var, invstd = forward_over_ghosts(x, weight, bias, eps, _runs_of(runs))
    return y, mean, var, invstd


@ghost_norm.register_fake
def _(x: Tensor, weight: Maybe, bias: Maybe, eps: float, runs: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, var, invstd = (x.new_empty(sum(runs[2::4]), x.shape[1], dtype=statistics_dtype(x)) for _ in range(3))
    return torch.empty_like(x), mean, var, invstd


@torch.library.custom_op(
    "lightning_gap::ghost_norm_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor grad_y, Tensor? weight, Tensor mean, Tensor invstd, SymInt[] runs, bool wanted)"
    " -> (Tensor, Tensor)",
)
def _ghost_norm_backward(
    x: Tensor, grad_y: Tensor, weight: Maybe, mean: Tensor, invstd: Tensor, runs: list[int], wanted: bool
) -> tuple[Tensor, Tensor]:
    grad_x, total = gradients_over_ghosts(x, grad_y, weight, Tables(mean, mean, invstd), _runs_of(runs), wanted)
    return x.new_empty(0) if grad_x is None else grad_x, total


@_ghost_norm_backward.register_fake
def _(
    x: Tensor, grad_y: Tensor, weight: Maybe, mean: Tensor, invstd: Tensor, runs: list[int], wanted: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x) if wanted else x.new_empty(0), mean.new_empty(2, x.shape[1])


def _runs_of(runs: list[int]) -> list[Run]:
    return [Run(runs[i], runs[i + 1], runs[i + 2], bool(runs[i + 3])) for i in range(0, len(runs), 4)]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _, ctx.runs = inputs
    _, mean, _, invstd = output
    ctx.save_for_backward(x, weight, mean, invstd)


def _backward(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Maybe, ...]:
    x, weight, mean, invstd = ctx.saved_tensors
    wanted = ctx.needs_input_grad[0]
    grad_x, total = _ghost_norm_backward(x, grad_y, weight, mean, invstd, ctx.runs, wanted)
    return grad_x if wanted else None, *where_wanted(ctx, total), None, None


ghost_norm.register_autograd(_backward, setup_context=_remember)
