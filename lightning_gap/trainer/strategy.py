"""What is asked of a trainer's strategy: replicas, ranks, shards, precision. No other module asks it itself."""

from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from lightning_gap.ranks.gradients import gradient_values
from lightning_gap.ranks.group import RankGroup, sum_over_ranks
from lightning_gap.ranks.shards import local_shard, shard_copies
from lightning_gap.trainer.internals.of_lightning import replaces_batchnorm
from lightning_gap.trainer.internals.of_torch import group_timeout, loss_scale_without_waiting, unscales_in_step

__all__ = [
    "clip_gradients",
    "data_parallel_group",
    "data_parallel_rank",
    "data_parallel_size",
    "data_parallel_subgroup",
    "from_rank_zero",
    "gradients_stay_scaled",
    "holds_whole_weights",
    "leaves_updates_to_torch",
    "loss_scale",
    "replaces_batchnorm_by_syncbatchnorm",
    "require_lightning",
    "shards_by_dtensor",
    "strategy_name",
]


_T = TypeVar("_T")


def data_parallel_size(trainer: Trainer) -> int:
    """Return how many replicas see different samples: tensor-parallel ranks share theirs, and do not count."""
    kwargs = trainer.distributed_sampler_kwargs
    return int(kwargs["num_replicas"]) if kwargs else 1


def data_parallel_rank(trainer: Trainer) -> int:
    """Return which of the data-parallel replicas this process is, from 0."""
    kwargs = trainer.distributed_sampler_kwargs
    return int(kwargs["rank"]) if kwargs else 0


def require_lightning(trainer: Any, who: str) -> None:
    """Refuse the trainer of the other package, ``pytorch_lightning``, whose strategies are other classes."""
    if not isinstance(trainer, Trainer):
        raise MisconfigurationException(
            f"{who} is made for lightning.pytorch, and this Trainer is {type(trainer).__module__.partition('.')[0]}'s: "
            "import Trainer and LightningModule from lightning.pytorch."
        )


def strategy_name(trainer: Trainer) -> str:
    """Return the class name of the trainer's strategy, for messages."""
    return type(trainer.strategy).__name__


def holds_whole_weights(trainer: Trainer) -> bool:
    """Return whether every rank holds all weights, equal on all ranks: one device, or DDP."""
    strategy = trainer.strategy
    # DeepSpeed's strategy is a subclass of DDP's, and shards.
    return isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) and not isinstance(strategy, DeepSpeedStrategy)


def shards_by_dtensor(trainer: Trainer) -> bool:
    """Return whether parameters are ``DTensor`` shards, or plain ones equal on all ranks (FSDP2, TP)."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def replaces_batchnorm_by_syncbatchnorm(trainer: Trainer) -> bool:
    """Return whether a fit turns BatchNorm into ``SyncBatchNorm``; one device ignores ``sync_batchnorm=True``."""
    return replaces_batchnorm(trainer.strategy)


def data_parallel_group(trainer: Trainer) -> RankGroup | None:
    """Return the ranks that see different samples, this one among them; None where there is one."""
    if data_parallel_size(trainer) == 1:
        return None
    if isinstance(trainer.strategy, ModelParallelStrategy):
        return RankGroup(trainer.strategy.device_mesh["data_parallel"].get_group())
    return RankGroup()


def data_parallel_subgroup(trainer: Trainer, size: int, *, strided: bool = False) -> RankGroup:
    """Return this rank's part of the ranks that see different samples, split into parts of ``size``. Collective.

    Every rank creates all groups in the same order, once: a second call finds them. They wait as long as the group of
    all ranks does. With ``strided``, ranks 0, P, 2P, ... are together, with P parts, and not 0 .. size-1.
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
    groups: list[dist.ProcessGroup] = [dist.new_group(list(ranks), timeout=group_timeout(world)) for ranks in layout]
    return next(group for group, ranks in zip(groups, layout, strict=True) if dist.get_rank() in ranks)


def leaves_updates_to_torch(trainer: Trainer) -> bool:
    """Return whether torch's own optimizers make the updates, of whole weights or of ``DTensor`` shards."""
    return holds_whole_weights(trainer) or shards_by_dtensor(trainer)


def from_rank_zero(trainer: Trainer, value: _T) -> _T:
    """Return rank zero's value on all ranks. Collective."""
    result: _T = trainer.strategy.broadcast(value)
    return result


def loss_scale(trainer: Trainer) -> Tensor:
    """Return what the loss is multiplied by before its backward pass, on the root device, without waiting for it."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = loss_scale_without_waiting(scaler) if scaler is not None and scaler.is_enabled() else None
    if scale is not None:  # as it is from the first loss on
        return scale
    number = 1.0 if scaler is None else float(scaler.get_scale())
    return torch.full((), number, dtype=torch.float32, device=trainer.strategy.root_device)


def gradients_stay_scaled(trainer: Trainer, optimizer: Optimizer) -> bool:
    """Return whether gradients keep the loss scale until the optimizer, a fused one, takes it away inside its step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and unscales_in_step(optimizer)


def clip_gradients(trainer: Trainer, optimizer: Optimizer, max_norm: float) -> Tensor:
    """Scale an optimizer's gradients down, in place, to a norm over all of them and all shards. Collective.

    Returns the norm before, the same on all ranks that hold the same model.
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
