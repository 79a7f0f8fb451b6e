"""Several maps in one file, of tensors and plain Python alone."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_gap.monge.module import MongeMap

__all__ = ["read_maps", "write_maps"]

_KIND = "lightning_gap_kind"


def write_maps(path: str | Path, kind: str, maps: Sequence[MongeMap], **about: Any) -> None:
    """Write maps as checkpoints of one file, with what it is (``kind``) and plain Python about it."""
    for k, model in enumerate(maps):
        if model.hparams.get("map") is None and model.hparams.get("dim") is None:
            raise MisconfigurationException(
                f"map {k} has a network of your own, {type(model.map).__name__}, which a file of maps does not hold: "
                "save each map by trainer.save_checkpoint, and give the networks again when you load them"
            )
    checkpoints = [
        {
            "pytorch-lightning_version": lightning.__version__,
            "hyper_parameters": dict(model.hparams),
            "state_dict": model.state_dict(),
        }
        for model in maps
    ]
    torch.save({_KIND: kind, "maps": checkpoints, **about}, Path(path).expanduser())


def read_maps(
    path: str | Path, kind: str, device: str | torch.device, given: dict[str, Any]
) -> tuple[list[MongeMap], dict[str, Any]]:
    """Return the maps of a file that :func:`write_maps` wrote, and what else it holds; nothing in it is run."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r} in {str(Path.cwd())!r}")
    try:
        found = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # the archive, its pickle and its tensors each fail in their own way
        raise ValueError(f"cannot read {str(path)!r}: it is damaged, or holds more than tensors and numbers") from error
    if not isinstance(found, dict) or found.get(_KIND) != kind:
        what = f"maps of the kind {found[_KIND]!r}" if isinstance(found, dict) and _KIND in found else "something else"
        raise ValueError(f"{str(path)!r} holds {what}, and none of the kind {kind!r}: load it by what saved it")
    maps = []
    for checkpoint in found.pop("maps"):
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        buffer.seek(0)
        maps.append(MongeMap.load_from_checkpoint(buffer, map_location=device, **given).eval())
    return maps, found
