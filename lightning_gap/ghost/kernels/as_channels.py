"""Strided ghosts of a dense batch are the channels of a view, which is one ghost to native kernels."""

import torch
from torch import Tensor

from lightning_gap.ghost.kernels.layout import Kernel, Limits, Maybe, Run, Tables
from lightning_gap.ghost.kernels.native import positions_as_channels
from lightning_gap.ghost.kernels.one_by_one import ONE_BY_ONE
from lightning_gap.trainer.internals.of_torch import native_batch_norm_backward

__all__ = ["AS_CHANNELS", "gradients_as_channels"]


def _forward(
    run: Run, x: Tensor, y: Tensor, weight: Maybe, bias: Maybe, eps: float, tables: Tables, limits: Limits
) -> None:
    weight, bias = (t if t is None else t.repeat(run.ghosts) for t in (weight, bias))
    one, shape = run._replace(ghosts=1), _shape_as_channels(run, x)
    ONE_BY_ONE.forward(one, x.view(shape), y.view(shape), weight, bias, eps, _flat_tables(tables), limits)


def _backward(run: Run, x: Tensor, grad_y: Tensor, weight: Maybe, tables: Tables, out: Maybe, limits: Limits) -> Tensor:
    if not positions_as_channels(x):
        grad_x, sums = gradients_as_channels(run, x, grad_y, weight, tables, out is not None)
        if out is not None:
            out.copy_(grad_x.view_as(out))
        return sums
    weight = weight if weight is None else weight.repeat(run.ghosts)
    one, shape = run._replace(ghosts=1), _shape_as_channels(run, x)
    out = out if out is None else out.view(shape)
    sums = ONE_BY_ONE.backward(one, x.view(shape), grad_y.view(shape), weight, _flat_tables(tables), out, limits)
    return sums.view(2, run.ghosts, -1).sum(1)


def gradients_as_channels(
    run: Run, x: Tensor, grad_y: Tensor, weight: Maybe, tables: Tables, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, which is meaningless if not wanted, and those of weight and bias, (2, C)."""
    shape = _shape_as_channels(run, x)
    scale = tables.mean.new_ones(x.shape[1]) if weight is None else weight
    grad_x, *sums = native_batch_norm_backward(
        grad_y.view(shape), x.view(shape), scale.repeat(run.ghosts), None, None,
        tables.mean.view(-1), tables.invstd.view(-1), True, 0.0, [wanted, True, True],
    )  # fmt: skip
    return grad_x, torch.stack(sums).view(2, run.ghosts, -1).sum(1)


def _flat_tables(tables: Tables) -> Tables:
    return Tables(*(t.view(1, -1) for t in tables))


def _shape_as_channels(run: Run, x: Tensor) -> tuple[int, ...]:
    # Sample k·ghosts + s is row k, channels s·C .. s·C + C-1 of this view.
    return len(x) // run.ghosts, run.ghosts * x.shape[1], *x.shape[2:]


AS_CHANNELS = Kernel(_forward, _backward)
