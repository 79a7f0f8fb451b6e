"""Tensors in shards: the parts that ranks hold, and checkpoints of them."""

import math
import pickle
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import torch
import torch.distributed as dist
from fsspec.core import url_to_fs
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_gap.ranks.group import is_distributed
from lightning_gap.trainer.internals.of_torch import METADATA_LAYOUT, METADATA_STORAGE

__all__ = ["check_metadata", "load_shards", "local_shard", "save_shards", "shard_copies", "shard_like"]

# What torch writes beside the shards of a distributed checkpoint: a pickle, which torch would run as it is.
_METADATA = ".metadata"
_CHECKPOINT = "torch.distributed.checkpoint."
_PLAIN = {("torch.serialization", METADATA_LAYOUT), ("collections", "OrderedDict")}


def local_shard(tensor: Tensor) -> Tensor:
    """Return the part of ``tensor`` that this rank holds; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_copies(tensor: Tensor) -> int:
    """Return how many ranks hold this rank's part of ``tensor``: sums over all ranks, divided by it, count it once."""
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

    save(dict(tensors), checkpoint_id=folder, no_dist=not is_distributed())


def load_shards(like: Mapping[str, Tensor], folder: str) -> dict[str, Tensor]:
    """Return what any number of ranks wrote, on the devices and in the shards of ``like``. Collective."""
    from torch.distributed.checkpoint.state_dict_loader import load

    check_metadata(folder)
    tensors = {name: torch.empty_like(tensor) for name, tensor in like.items()}
    load(tensors, checkpoint_id=folder, no_dist=not is_distributed())
    return tensors


def check_metadata(folder: str) -> None:
    """Refuse the metadata of a distributed checkpoint that name anything but what torch writes there."""
    path = f"{str(folder).rstrip('/')}/{_METADATA}"
    filesystem, _ = url_to_fs(str(folder))
    if not filesystem.exists(path):
        return  # said by torch, which looks for it
    with filesystem.open(path, "rb") as file:
        try:
            _Metadata(file).load()
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} {error}, which is not run: copy the folder anew from the run that wrote it"
            ) from error


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return what torch's own metadata are made of."""
        if (module, name) in _PLAIN:
            return super().find_class(module, name)
        if module == "torch" and "." not in name:
            found = getattr(torch, name, None)
            if found in (torch.Size, torch.device) or isinstance(found, torch.dtype | torch.layout):
                return found
        found = super().find_class(module, name) if module == "pathlib" or module.startswith(_CHECKPOINT) else None
        # Their classes, which hold data, and nothing that such a module imports.
        data = module == f"{_CHECKPOINT}metadata" or (module, name) == (f"{_CHECKPOINT}filesystem", METADATA_STORAGE)
        if isinstance(found, type) and (
            (module == "pathlib" and issubclass(found, PurePath)) or (data and found.__module__ == module)
        ):
            return found
        raise pickle.UnpicklingError(f"names {module}.{name}")
