"""Groups of ranks, and what they exchange: torch.distributed alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lightning_gap.trainer.internals.of_torch import assert_async, is_batched

__all__ = ["RankGroup", "is_distributed", "mean_over_ranks", "sum_over_ranks", "unwrapped"]


def is_distributed() -> bool:
    """Return whether there is a process group, which a second process may be in."""
    return dist.is_available() and dist.is_initialized()


def sum_over_ranks(value: Tensor) -> Tensor:
    """Return the sum of ``value`` over all processes, detached; ``value`` itself where there is one process."""
    value = value.detach()
    if not is_distributed() or dist.get_world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total


def mean_over_ranks(value: Tensor) -> Tensor:
    """Return the mean of ``value`` over all processes, detached; ``value`` itself where there is one process."""
    ranks = dist.get_world_size() if is_distributed() else 1
    return value.detach() if ranks == 1 else torch.div(sum_over_ranks(value), ranks)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return what a data-parallel wrapper holds: its forward pass would overwrite the buffers of other ranks."""
    return module.module if isinstance(module, (DistributedDataParallel, DataParallel)) else module


class RankGroup:
    """Some ranks (all by default) that work together on one quantity. Every one of them must make the same calls.

    A copy of what holds a group holds the same group; a pickle of it holds None, for groups do not outlive a process.

    Attributes:
        layer: The number of the layer that the group serves, for :meth:`check_layers`.
        layers: The names of all layers.
        channels: The channels of the widest, so that what layers exchange can be of one length.
    """

    layer: int = 0
    layers: Sequence[str] = ()
    channels: int = 0

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not is_distributed():
            raise RuntimeError("a group of ranks needs torch.distributed.init_process_group() first")
        self.group = group
        self.size = dist.get_world_size(group)

    def for_layer(self, number: int, layers: Mapping[str, int]) -> "RankGroup":
        """Return the same ranks for one of several layers, named with their channels; its number travels along."""
        own = object.__new__(type(self))  # a copy would be a pickle, of no group
        vars(own).update(vars(self), layer=number, layers=list(layers), channels=max(layers.values(), default=0))
        return own

    def check_layers(self, numbers: Tensor) -> None:
        """Raise if the ranks are at different layers; without waiting for a GPU, which fails by itself then."""
        same = (numbers == self.layer).all()
        why = "ranks that share ghosts must reach their layers in the same order"
        if numbers.device.type == "cpu":
            if not same:
                at = [self.layers[int(n)] if int(n) < len(self.layers) else f"layer {int(n)}" for n in numbers]
                each = ", ".join(f"rank {rank} at {name!r}" for rank, name in enumerate(at))
                raise RuntimeError(f"{why}, and here is {each}: use ranks_per_ghost=1, or add these layers to skip")
        elif self.layers and numbers.device.type == "cuda":
            name = self.layers[self.layer]
            assert_async(same, f"{why}: this one is at {name!r}, and another is not")

    def gather(self, value: Tensor) -> Tensor:
        """Return ``value`` of every rank, (ranks, ...), in the order of the ranks; detached."""
        value = value.detach().contiguous()
        every = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(every, value, group=self.group)
        return torch.stack(every)

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of ``value`` over the ranks, detached."""
        total = value.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=self.group)
        return total

    def differentiable_sum(self, value: Tensor) -> Tensor:
        """Return the sum of ``value`` over the ranks, differentiable in this rank's, as often and as ever one likes.

        The gradient is that of the sum of all ranks' losses. Transforms of ``torch.func`` and forward mode are served,
        but no backward pass of many gradients at once (``is_grads_batched``, ``vectorize=True``) of ``torch.autograd``.
        """
        total: Tensor = _SumOverRanks.apply(value, self)  # type: ignore[no-untyped-call]
        return total

    def gather_rows(self, value: Tensor, dim: int = 0) -> Tensor:
        """Return the rows of all ranks, in the order of the ranks, differentiable in this rank's.

        The gradient is that of the sum of all ranks' losses: where each rank has the same loss, a strategy's mean over
        the ranks gives the gradient of that loss.
        """
        counts = self.gather(torch.full((1,), value.shape[dim], device=value.device)).flatten().tolist()
        gathered: Tensor = _GatherRows.apply(value, self.group, counts, dim)  # type: ignore[no-untyped-call]
        return gathered

    def __deepcopy__(self, memo: Any) -> "RankGroup":
        return self

    def __reduce__(self) -> Any:
        return _no_group, ()


def _no_group() -> None:
    return None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(value: Tensor, ranks: RankGroup) -> Tensor:
        if is_batched(value):
            raise NotImplementedError(
                "is_grads_batched and vectorize=True of torch.autograd cannot batch what several ranks add up: use "
                "torch.func (jacrev, hessian, vmap), or one gradient at a time"
            )
        return ranks.sum(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.ranks = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.differentiable_sum(grads[0]), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        total: Tensor = ctx.ranks.differentiable_sum(tangents[0])
        return total

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], value: Tensor, ranks: RankGroup) -> tuple[Tensor, int]:
        return ranks.differentiable_sum(value), in_dims[0]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any, counts: list[int], dim: int) -> Tensor:
        here = dist.get_rank(group)
        ctx.group, ctx.dim, ctx.start, ctx.count = group, dim, sum(counts[:here]), counts[here]
        rows = value.movedim(dim, 0).contiguous()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        every = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(every, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(every, counts, strict=True)]).movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=ctx.group)
        return total.narrow(ctx.dim, ctx.start, ctx.count), None, None, None
