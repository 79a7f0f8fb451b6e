"""What the package knows of strategies, ranks and reductions. No other module asks these questions itself."""

import math
from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = [
    "data_parallel_rank",
    "data_parallel_size",
    "from_rank_zero",
    "holds_whole_weights",
    "injects_sampler",
    "load_shards",
    "local_shard",
    "mean_over_ranks",
    "replaces_batchnorm_by_syncbatchnorm",
    "save_shards",
    "shard_copies",
    "shard_like",
    "shards_by_dtensor",
    "strategy_name",
    "sum_over_ranks",
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
    save(dict(tensors), checkpoint_id=folder, no_dist=not _is_distributed())


def load_shards(like: Mapping[str, Tensor], folder: str) -> dict[str, Tensor]:
    """Return what :func:`save_shards` wrote, on the devices and in the shards of ``like``. Collective.

    Any number of ranks may load what any other number wrote.
    """
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
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
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
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    return torch.div(sum_over_ranks(value), dist.get_world_size())


def injects_sampler(trainer: Trainer) -> bool:
    """Return whether the trainer shards a training loader among the replicas, by a distributed sampler of its own.

    Args:
        trainer: The trainer that runs, or is about to run.
    """
    connector = trainer._accelerator_connector
    return bool(connector.use_distributed_sampler and connector.is_distributed)


def from_rank_zero(trainer: Trainer, value: _T) -> _T:
    """Return rank zero's value on all ranks. Collective.

    Args:
        trainer: The trainer that runs.
        value: Anything that can be pickled.
    """
    result: _T = trainer.strategy.broadcast(value)
    return result
