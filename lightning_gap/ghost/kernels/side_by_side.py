"""Elementwise operations on blocks of small ghosts, where a call for each would cost more than its arithmetic."""

import math

import torch
from torch import Tensor

from lightning_gap.ghost.kernels.layout import Kernel, Limits, Maybe, Run, Tables, block
from lightning_gap.ghost.kernels.native import coefficients
from lightning_gap.trainer.internals.of_torch import squared_differences_backward_out, squared_differences_out

__all__ = ["SIDE_BY_SIDE"]


_EACH = 0  # at::Reduction::None


class _Blocks:
    """Blocks of small ghosts: their samples, and their statistics, in shapes that broadcast against each other.

    Positions are features beside the channels, so that all arithmetic is along long rows; only tables are joined.
    """

    over = (0, 2)  # of (samples apart, ghosts, rows together, features)

    def __init__(self, run: Run, flat: Tensor, limits: Limits) -> None:
        self.ghosts, self.channels = run.ghosts, flat.shape[1]
        self.values = flat.numel() // (self.ghosts * self.channels)
        self.positions = math.prod(flat.shape[2:])
        apart = (run.stop - run.start) // run.ghosts if run.strided else 1
        together = len(flat) // (apart * run.ghosts)
        self.shape = (apart, run.ghosts, together, self.channels * self.positions)
        self.each = max(1, block(flat, limits) // (self.values * self.channels))

    def samples(self, flat: Tensor) -> tuple[Tensor, ...]:
        return self._split(flat.view(self.shape))

    def statistics(self, table: Tensor) -> tuple[Tensor, ...]:
        return self._split(table.view(1, self.ghosts, 1, self.channels))

    def _split(self, ghosts: Tensor) -> tuple[Tensor, ...]:
        return (ghosts,) if self.each >= self.ghosts else tuple(ghosts.split(self.each, 1))

    def sum(self, samples: Tensor, out: Tensor) -> Tensor:
        """Write the sums over each ghost's values."""
        if self.positions == 1:
            return torch.sum(samples, self.over, True, dtype=out.dtype, out=out)
        features = torch.sum(samples, self.over, True, dtype=out.dtype)
        return torch.sum(features.unflatten(-1, (self.channels, self.positions)), -1, out=out)

    def whole(self, table: Tensor) -> Tensor:
        """Return a table as statistics of all ghosts' features."""
        return self.spread(table.view(1, self.ghosts, 1, self.channels))

    def spread(self, statistics: Tensor) -> Tensor:
        """Return statistics of channels as those of features."""
        return statistics if self.positions == 1 else statistics.repeat_interleave(self.positions, -1)


def _forward(
    run: Run, x: Tensor, y: Tensor, weight: Maybe, bias: Maybe, eps: float, tables: Tables, limits: Limits
) -> None:
    blocks = _Blocks(run, x, limits)
    n, samples, (mean, var, invstd) = blocks.values, blocks.samples(x), tables
    squared = torch.empty_like(samples[0], dtype=mean.dtype)
    for part, means, squares in zip(samples, blocks.statistics(mean), blocks.statistics(var), strict=True):
        blocks.sum(part, means).div_(n)
        scratch = squared[:, : part.shape[1]]
        squared_differences_out(part, blocks.spread(means), _EACH, out=scratch)  # (x − μ)² in one pass
        blocks.sum(scratch, squares)
    torch.add(var.div_(n), eps, out=invstd).rsqrt_()
    var.mul_(n / (n - 1))
    scale = invstd if weight is None else invstd * weight
    shift = torch.addcmul(mean.new_zeros(1) if bias is None else bias, mean, scale, value=-1)
    each = blocks.whole(shift), x.view(blocks.shape), blocks.whole(scale)
    if y.dtype == scale.dtype:
        torch.addcmul(*each, out=y.view(blocks.shape))
    else:
        y.view(blocks.shape).copy_(torch.addcmul(*each))


def _backward(run: Run, x: Tensor, grad_y: Tensor, weight: Maybe, tables: Tables, out: Maybe, limits: Limits) -> Tensor:
    blocks = _Blocks(run, x, limits)
    scale, slope, shift = coefficients(weight, tables.invstd, blocks.values)
    sums = scale.new_empty(2, *scale.shape)
    products, totals = sums
    parts, grads = blocks.samples(x), blocks.samples(grad_y)
    buffer = torch.empty_like(parts[0], dtype=scale.dtype)
    statistics = map(blocks.statistics, (tables.mean, products, totals))
    alike = x.dtype == grad_y.dtype == scale.dtype  # older torch's loss kernel takes no other
    for part, grad, mean, product, total in zip(parts, grads, *statistics, strict=True):
        scratch = buffer[:, : part.shape[1]]
        if alike:
            squared_differences_backward_out(grad, part, blocks.spread(mean), _EACH, grad_input=scratch)
        else:
            torch.sub(part, blocks.spread(mean), out=scratch).mul_(grad)
        blocks.sum(scratch, product)  # of (x − μ)·dy, or twice that, in one pass
        blocks.sum(grad, total)
    products.mul_(tables.invstd / 2 if alike else tables.invstd)
    if out is not None:
        slope *= products
        shift = torch.addcmul(shift.mul_(totals), slope, tables.mean, value=-1)
        factors = [blocks.whole(t).split(blocks.each, 1) for t in (shift, slope, scale)]
        for part, grad, target, c, b, a in zip(parts, grads, blocks.samples(out), *factors, strict=True):
            into = target if target.dtype == scale.dtype else buffer[:, : part.shape[1]]
            torch.addcmul(c, part, b, out=into).addcmul_(grad, a)
            if into is not target:
                target.copy_(into)
    return sums.sum(1)


SIDE_BY_SIDE = Kernel(_forward, _backward)
