"""What torch writes beside the shards of a distributed checkpoint: a pickle, which torch would run as it is."""

import pickle
from pathlib import PurePath
from typing import Any

import torch

__all__ = ["check_metadata"]

_METADATA = ".metadata"
_CHECKPOINT = "torch.distributed.checkpoint."
_PLAIN = {("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}


def check_metadata(folder: str) -> None:
    """Refuse the metadata of a distributed checkpoint that name anything but what torch writes there.

    Args:
        folder: The checkpoint, on this machine or elsewhere.

    Raises:
        ValueError: They name something else, which is not run.
    """
    # Imported here: only sharded runs should pay for it.
    from lightning.fabric.utilities.cloud_io import get_filesystem

    path = f"{str(folder).rstrip('/')}/{_METADATA}"
    filesystem = get_filesystem(folder)
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
        data = module == f"{_CHECKPOINT}metadata" or (module, name) == (f"{_CHECKPOINT}filesystem", "_StorageInfo")
        if isinstance(found, type) and (
            (module == "pathlib" and issubclass(found, PurePath)) or (data and found.__module__ == module)
        ):
            return found
        raise pickle.UnpicklingError(f"names {module}.{name}")
