"""What the package knows of strategies, ranks and reductions. No other module asks these questions itself."""

import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from lightning_gap.gradients import gradient_values
from lightning_gap.shards import check_metadata

__all__ = [
    "RankGroup",
    "clip_gradients",
    "data_parallel_group",
    "data_parallel_rank",
    "data_parallel_size",
    "data_parallel_subgroup",
    "from_rank_zero",
    "gradients_stay_scaled",
    "holds_whole_weights",
    "injects_sampler",
    "leaves_updates_to_torch",
    "load_shards",
    "local_shard",
    "loss_scale",
    "mean_over_ranks",
    "replaces_batchnorm_by_syncbatchnorm",
    "require_lightning",
    "save_shards",
    "shard_copies",
    "shard_like",
    "shards_by_dtensor",
    "strategy_name",
    "sum_over_ranks",
    "unwrapped",
]


_T = TypeVar("_T")


def data_parallel_size(trainer: Trainer) -> int:
    """Return how many replicas see different samples.

    Tensor-parallel ranks share their samples, so this is the number of replicas of the distributed sampler and not
    ``trainer.world_size``.

    Args:
        trainer: The trainer that runs, or is about to run.

    Returns:
        The number of data-parallel replicas, 1 where there is no distributed sampler.
    """
    kwargs = trainer.distributed_sampler_kwargs
    return int(kwargs["num_replicas"]) if kwargs else 1


def data_parallel_rank(trainer: Trainer) -> int:
    """Return which of the data-parallel replicas this process is, from 0.

    Args:
        trainer: The trainer that runs, or is about to run.
    """
    kwargs = trainer.distributed_sampler_kwargs
    return int(kwargs["rank"]) if kwargs else 0


def require_lightning(trainer: Any, who: str) -> None:
    """Refuse the trainer of the other package, ``pytorch_lightning``, whose strategies are other classes.

    Args:
        trainer: What a callback was given.
        who: The callback, for the message.

    Raises:
        MisconfigurationException: If it is not a trainer of ``lightning.pytorch``.
    """
    if not isinstance(trainer, Trainer):
        raise MisconfigurationException(
            f"{who} is made for lightning.pytorch, and this Trainer is {type(trainer).__module__.partition('.')[0]}'s: "
            "import Trainer and LightningModule from lightning.pytorch."
        )


def strategy_name(trainer: Trainer) -> str:
    """Return the class name of the trainer's strategy, for messages.

    Args:
        trainer: The trainer that runs, or is about to run.
    """
    return type(trainer.strategy).__name__


def holds_whole_weights(trainer: Trainer) -> bool:
    """Return whether every rank holds all weights, equal on all ranks: one device, or DDP.

    Args:
        trainer: The trainer that runs, or is about to run.
    """
    strategy = trainer.strategy
    # DeepSpeed's strategy is a subclass of DDP's, and shards.
    return isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) and not isinstance(strategy, DeepSpeedStrategy)


def shards_by_dtensor(trainer: Trainer) -> bool:
    """Return whether parameters are ``DTensor`` shards, or plain ones equal on all ranks (FSDP2, tensor parallelism).

    Args:
        trainer: The trainer that runs, or is about to run.
    """
    return isinstance(trainer.strategy, ModelParallelStrategy)


def local_shard(tensor: Tensor) -> Tensor:
    """Return the part of ``tensor`` that this rank holds; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_copies(tensor: Tensor) -> int:
    """Return how many ranks hold the same part of ``tensor`` as this rank, itself included.

    A sum over all ranks of anything local, divided by this, counts every element once.
    """
    ranks = dist.get_world_size()
    if not isinstance(tensor, DTensor):
        return ranks
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return ranks // math.prod(size for size, placement in sizes if not placement.is_replicate())


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return ``whole``, known on all ranks, on the device and in the shards of ``like``. Collective."""
    whole = whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements) if isinstance(like, DTensor) else whole


def save_shards(tensors: Mapping[str, Tensor], folder: str) -> None:
    """Write ``DTensor`` shards and plain tensors, each rank its own, into a distributed checkpoint. Collective."""
    # Imported here: it takes 40 ms, which only sharded runs should pay.
    from torch.distributed.checkpoint.state_dict_saver import save

    save(dict(tensors), checkpoint_id=folder, no_dist=not _is_distributed())


def load_shards(like: Mapping[str, Tensor], folder: str) -> dict[str, Tensor]:
    """Return what :func:`save_shards` wrote, on the devices and in the shards of ``like``. Collective.

    Any number of ranks may load what any other number wrote.
    """
    from torch.distributed.checkpoint.state_dict_loader import load

    check_metadata(folder)
    tensors = {name: torch.empty_like(tensor) for name, tensor in like.items()}
    load(tensors, checkpoint_id=folder, no_dist=not _is_distributed())
    return tensors


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def replaces_batchnorm_by_syncbatchnorm(trainer: Trainer) -> bool:
    """Return whether the strategy turns every BatchNorm layer into a ``SyncBatchNorm`` when it sets up a fit.

    Only strategies with several ranks heed ``sync_batchnorm=True``; one device ignores it.

    Args:
        trainer: The trainer that runs, or is about to run.
    """
    return isinstance(getattr(trainer.strategy, "_layer_sync", None), TorchSyncBatchNorm)


def sum_over_ranks(value: Tensor) -> Tensor:
    """Return the sum of ``value`` over all processes, detached; ``value`` itself where there is one process.

    Args:
        value: A tensor of the same shape on every rank, on the device of the process group's backend.
    """
    value = value.detach()
    if not _is_distributed() or dist.get_world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total


def mean_over_ranks(value: Tensor) -> Tensor:
    """Return the mean of ``value`` over all processes, detached; ``value`` itself where there is one process.

    Args:
        value: A tensor of the same shape on every rank.
    """
    value = value.detach()
    if not _is_distributed() or dist.get_world_size() == 1:
        return value
    return torch.div(sum_over_ranks(value), dist.get_world_size())


def injects_sampler(trainer: Trainer) -> bool:
    """Return whether the trainer shards a training loader among the replicas, by a distributed sampler of its own.

    Args:
        trainer: The trainer that runs, or is about to run.
    """
    connector = trainer._accelerator_connector
    return bool(connector.use_distributed_sampler and connector.is_distributed)


class RankGroup:
    """Some ranks that work together on one quantity. Every one of them must make the same calls.

    A copy of what holds a group holds the same group; a pickle of it holds None, for groups do not outlive a process.

    Args:
        group: The process group; None for all ranks.

    Attributes:
        layer: The number of the layer that the group serves, for :meth:`check_layers`.
        layers: The names of all layers.
        channels: The channels of the widest, so that what layers exchange can be of one length.

    Raises:
        RuntimeError: If no process group has been initialized.
    """

    layer: int = 0
    layers: Sequence[str] = ()
    channels: int = 0

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not _is_distributed():
            raise RuntimeError("a group of ranks needs torch.distributed.init_process_group() first")
        self.group = group
        self.size = dist.get_world_size(group)

    def for_layer(self, number: int, layers: Mapping[str, int]) -> "RankGroup":
        """Return the same ranks for one of several layers, whose number travels with what they exchange.

        Args:
            number: Which of the layers.
            layers: The channels of all layers, by name.
        """
        own = object.__new__(type(self))  # a copy would be a pickle, of no group
        vars(own).update(vars(self), layer=number, layers=list(layers), channels=max(layers.values(), default=0))
        return own

    def check_layers(self, numbers: Tensor) -> None:
        """Raise if the ranks are at different layers; without waiting for a GPU, which fails by itself then.

        Args:
            numbers: The number of each rank's layer.

        Raises:
            RuntimeError: If they differ.
        """
        same = (numbers == self.layer).all()
        why = "ranks that share ghosts must reach their layers in the same order"
        if numbers.device.type == "cpu":
            if not same:
                at = [self.layers[int(n)] if int(n) < len(self.layers) else f"layer {int(n)}" for n in numbers]
                each = ", ".join(f"rank {rank} at {name!r}" for rank, name in enumerate(at))
                raise RuntimeError(f"{why}, and here is {each}: use ranks_per_ghost=1, or add these layers to skip")
        elif self.layers and numbers.device.type == "cuda":
            name = self.layers[self.layer]
            torch._assert_async(same, f"{why}: this one is at {name!r}, and another is not")

    def gather(self, value: Tensor) -> Tensor:
        """Return ``value`` of every rank, (ranks, ...), in the order of the ranks; detached.

        Args:
            value: A tensor of the same shape on every rank, on the device of the group's backend.
        """
        value = value.detach().contiguous()
        every = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(every, value, group=self.group)
        return torch.stack(every)

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of ``value`` over the ranks, detached.

        Args:
            value: A tensor of the same shape on every rank, on the device of the group's backend.
        """
        total = value.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=self.group)
        return total

    def differentiable_sum(self, value: Tensor) -> Tensor:
        """Return the sum of ``value`` over the ranks, differentiable in this rank's, as often and as ever one likes.

        The gradient is that of the sum of all ranks' losses. Transforms of ``torch.func`` and forward mode are served.

        Args:
            value: A tensor of the same shape on every rank, on the device of the group's backend.

        Raises:
            NotImplementedError: In a backward pass of many gradients at once by ``is_grads_batched`` or
                ``vectorize=True`` of ``torch.autograd``.
        """
        total: Tensor = _SumOverRanks.apply(value, self)  # type: ignore[no-untyped-call]
        return total

    def gather_rows(self, value: Tensor, dim: int = 0) -> Tensor:
        """Return the rows of all ranks, in the order of the ranks, differentiable in this rank's.

        The gradient is that of the sum of all ranks' losses: where each rank has the same loss, a strategy's mean over
        the ranks gives the gradient of that loss.

        Args:
            value: A tensor of the same shape on every rank, but for the number of its rows.
            dim: Which dimension the rows are counted in.
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
        if torch._C._dispatch_keys(value).has(torch._C._dispatch_key_parse("Batched")):
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


def data_parallel_group(trainer: Trainer) -> RankGroup | None:
    """Return the ranks that see different samples, this one among them; None where there is one.

    Args:
        trainer: The trainer that runs.
    """
    if data_parallel_size(trainer) == 1:
        return None
    if isinstance(trainer.strategy, ModelParallelStrategy):
        return RankGroup(trainer.strategy.device_mesh["data_parallel"].get_group())
    return RankGroup()


def data_parallel_subgroup(trainer: Trainer, size: int, *, strided: bool = False) -> RankGroup:
    """Return this rank's part of the ranks that see different samples, split into parts of ``size``. Collective.

    Every rank creates all groups in the same order, once: a second call finds them. They wait as long as the group of
    all ranks does, and that one serves where it is the part.

    Args:
        trainer: The trainer that runs.
        size: Ranks in a part; it divides their number.
        strided: Whether ranks 0, P, 2P, ... are together, with P parts, and not 0 .. size-1.
    """
    whole = data_parallel_group(trainer)
    assert whole is not None
    if size == whole.size:
        return whole
    here = dist.get_process_group_ranks(dist.group.WORLD if whole.group is None else whole.group)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, here)
    layout: list[tuple[int, ...]] = []
    for ranks in sorted(set(map(tuple, every))):
        parts = len(ranks) // size
        layout += [ranks[i::parts] if strided else ranks[i * size : (i + 1) * size] for i in range(parts)]
    return RankGroup(_subgroup(dist.group.WORLD, tuple(layout)))


@cache
def _subgroup(world: dist.ProcessGroup, layout: tuple[tuple[int, ...], ...]) -> dist.ProcessGroup:
    groups: list[dist.ProcessGroup] = [dist.new_group(list(ranks), timeout=_timeout(world)) for ranks in layout]
    return next(group for group, ranks in zip(groups, layout, strict=True) if dist.get_rank() in ranks)


def _timeout(group: dist.ProcessGroup) -> timedelta | None:
    """Return how long a group waits, None where its backends do not say so."""
    options = (getattr(group._get_backend(device), "options", None) for device in group._device_types)
    return max((known for each in options if (known := getattr(each, "_timeout", None))), default=None)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return what a data-parallel wrapper holds: its forward pass would overwrite the buffers of other ranks.

    Args:
        module: Any module.
    """
    return module.module if isinstance(module, (DistributedDataParallel, DataParallel)) else module


def leaves_updates_to_torch(trainer: Trainer) -> bool:
    """Return whether torch's own optimizers make the updates, of whole weights or of ``DTensor`` shards.

    Args:
        trainer: The trainer that runs, or is about to run.
    """
    return holds_whole_weights(trainer) or shards_by_dtensor(trainer)


def from_rank_zero(trainer: Trainer, value: _T) -> _T:
    """Return rank zero's value on all ranks. Collective.

    Args:
        trainer: The trainer that runs.
        value: Anything that can be pickled.
    """
    result: _T = trainer.strategy.broadcast(value)
    return result


def loss_scale(trainer: Trainer) -> Tensor:
    """Return what the loss is multiplied by before its backward pass: more than 1 with 16-bit mixed precision.

    It is a float32 scalar on the root device, so that nothing waits for that here.

    Args:
        trainer: The trainer that runs.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = scaler._get_scale_async() if scaler is not None and scaler.is_enabled() else None
    if scale is not None:  # as it is from the first loss on
        return cast(Tensor, scale)
    number = 1.0 if scaler is None else float(scaler.get_scale())
    return torch.full((), number, dtype=torch.float32, device=trainer.strategy.root_device)


def gradients_stay_scaled(trainer: Trainer, optimizer: Optimizer) -> bool:
    """Return whether gradients keep the loss scale until the optimizer, a fused one, takes it away inside its step.

    Args:
        trainer: The trainer that runs.
        optimizer: One of its optimizers.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def clip_gradients(trainer: Trainer, optimizer: Optimizer, max_norm: float) -> Tensor:
    """Scale an optimizer's gradients down, in place, to a norm over all of them and all shards. Collective.

    Args:
        trainer: The trainer that runs.
        optimizer: The optimizer, whose parameters have their gradients.
        max_norm: The L2 norm that is not exceeded.

    Returns:
        The norm before, a scalar tensor, the same on all ranks that hold the same model.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if shards_by_dtensor(trainer):
        norm = sum_over_ranks(_local_square(gradients, trainer.strategy.root_device)).sqrt()
    else:
        norm = get_total_norm([gradient_values(gradient) for gradient in gradients])
        if all(gradient.layout is torch.strided for gradient in gradients):
            clip_grads_with_norm_(parameters, max_norm, norm)
            return norm
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils does
    for gradient in gradients:
        local_shard(gradient).mul_(factor.to(gradient.dtype))
    return norm


def _local_square(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return this rank's share of the squared norm, such that the sum over ranks counts every element once."""
    squares = [local_shard(gradient).float().square().sum() / shard_copies(gradient) for gradient in gradients]
    return torch.stack(squares).sum() if squares else torch.zeros((), device=device)
