"""What the package knows of strategies, ranks and reductions. No other module asks these questions itself."""

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch import Tensor

__all__ = [
    "data_parallel_rank",
    "data_parallel_size",
    "holds_whole_weights",
    "injects_sampler",
    "mean_over_ranks",
    "replaces_batchnorm_by_syncbatchnorm",
    "strategy_name",
]


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


def replaces_batchnorm_by_syncbatchnorm(trainer: Trainer) -> bool:
    """Return whether the strategy turns every BatchNorm layer into a ``SyncBatchNorm`` when it sets up a fit.

    Only strategies with several ranks heed ``sync_batchnorm=True``; one device ignores it.

    Args:
        trainer: The trainer that runs, or is about to run.
    """
    return isinstance(getattr(trainer.strategy, "_layer_sync", None), TorchSyncBatchNorm)


def mean_over_ranks(value: Tensor) -> Tensor:
    """Return the mean of ``value`` over all processes, detached; ``value`` itself where there is one process.

    Args:
        value: A tensor of the same shape on every rank.
    """
    value = value.detach()
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return torch.div(total, dist.get_world_size())


def injects_sampler(trainer: Trainer) -> bool:
    """Return whether the trainer shards a training loader among the replicas, by a distributed sampler of its own.

    Args:
        trainer: The trainer that runs, or is about to run.
    """
    connector = trainer._accelerator_connector
    return bool(connector.use_distributed_sampler and connector.is_distributed)
