"""Which of several processes this one is, where no trainer has been made: by torchrun, SLURM or this command itself."""

import os
from dataclasses import dataclass

import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

__all__ = ["Place", "environments_of_siblings", "launched"]

# SLURM's numbers from here on are those of batch scripts, interactive shells and what it adopts.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class Place:
    """A process among those that were started together.

    Attributes:
        rank: Which of all it is, from 0.
        ranks: How many there are.
        local_rank: Which of those on its node it is.
        siblings: How many more this one has to start on its node; 0 where a launcher has.
    """

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    siblings: int = 0


def launched(devices: int | None = None, num_nodes: int | None = None) -> Place:
    """Return the place that torchrun, SLURM or a sibling gave this process, or what follows from the two numbers.

    Args:
        devices: Processes on a node; by default as many as the launcher has started, and without one 1.
        num_nodes: Nodes; by default as the launcher has it, and without one 1. Without a launcher every node's
            ``NODE_RANK`` is to be set.

    Raises:
        ValueError: The numbers are not the launcher's, or the launcher's are none that Lightning takes.

    Example:
        >>> launched(devices=2)
        Place(rank=0, ranks=2, local_rank=0, siblings=1)
    """
    for environment, name in ((TorchElasticEnvironment, "torchrun"), (SLURMEnvironment, "SLURM")):
        if (environment is not SLURMEnvironment or _in_a_step()) and environment.detect():
            try:
                made = environment()
            except RuntimeError as error:  # numbers that Lightning does not take
                raise ValueError(f"{name}: {error}") from None
            ranks = made.world_size()
            nodes = num_nodes or max(1, ranks // (devices or ranks))
            if (devices or max(1, ranks // nodes)) * nodes != ranks:
                asked = " and ".join(
                    f"--{key} {value}" for key, value in (("devices", devices), ("num-nodes", num_nodes)) if value
                )
                raise ValueError(f"{asked}, but {name} has started {ranks} processes: leave it out, or start as many")
            return Place(made.global_rank(), ranks, made.local_rank())
    alone, devices, num_nodes = LightningEnvironment(), devices or 1, num_nodes or 1
    node, local = alone.node_rank(), alone.local_rank()
    if node >= num_nodes or local >= devices:
        given, most = ("NODE_RANK", num_nodes) if node >= num_nodes else ("LOCAL_RANK", devices)
        value = node if node >= num_nodes else local
        remedy = "--num-nodes" if node >= num_nodes else "--devices"
        raise ValueError(f"{given} is {value}, but {remedy} is {most}: give the whole number, or unset it")
    started = alone.creates_processes_externally
    return Place(node * devices + local, num_nodes * devices, local, 0 if started else devices - 1)


def _in_a_step() -> bool:
    """Return whether srun has started this process: a batch script has its job's numbers, and is one process."""
    step = os.environ.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP


def environments_of_siblings(place: Place) -> dict[int, dict[str, str]]:
    """Return the environments of those that this process has to start, by local rank: each gets its share of cores.

    Unless ``OMP_NUM_THREADS`` is set, this process keeps its own share, too.
    """
    if place.siblings and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // (place.siblings + 1)))
    shared = {"OMP_NUM_THREADS": str(torch.get_num_threads()), **os.environ}
    return {rank: {**shared, "LOCAL_RANK": str(rank)} for rank in range(1, place.siblings + 1)}
