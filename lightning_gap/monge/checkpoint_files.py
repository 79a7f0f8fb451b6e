"""Checkpoints as files of strangers: read as tensors and plain Python, and nothing named in them is run."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self, cast

import torch
from lightning.pytorch import LightningModule

from lightning_gap.trainer.internals.of_lightning import INSTANTIATOR, restricted_classmethod

__all__ = ["SafelyLoaded", "read_checkpoint"]

_HYPER_PARAMETERS = "hyper_parameters"
# What LightningCLI writes there. It would import whatever class is named beside it, so it is passed over, not called.
_LIGHTNINGS_OWN = ("lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module")


class SafelyLoaded(LightningModule):
    """A module whose checkpoints may come from anywhere."""

    @restricted_classmethod
    def load_from_checkpoint(
        cls,  # noqa: N805
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Return the map of a checkpoint. Nothing that the file names is imported or called but this package's maps.

        Args:
            checkpoint_path: A path or a URL, or an open file.
            map_location: Where to put the weights; by default where they were.
            hparams_file: A YAML or CSV file of hyperparameters, instead of the checkpoint's.
            strict: Whether the weights must be those of the network, no more and no less.
            weights_only: Whether the file may hold no more than tensors and plain Python, as by default; ``False`` is
                for a file that you trust as you trust a program.
            **kwargs: Arguments that go before those of the checkpoint, such as a network of your own.

        Raises:
            ValueError: The checkpoint asks for anything else.
        """
        if weights_only is not False:
            weights_only = True
            kwargs = _arguments_of(checkpoint_path, kwargs)
        return super().load_from_checkpoint(
            checkpoint_path, map_location, hparams_file, strict=strict, weights_only=weights_only, **kwargs
        )


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return what a checkpoint of a :class:`MongeMap` holds, on the CPU, or raise ``ValueError`` where it is none."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"the checkpoint {str(path)!r} is a folder: name the .ckpt file in it")
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {str(path)!r} in {str(Path.cwd())!r}")
    checkpoint = _read(path)
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or "fitting_epsilon" not in state:
        raise ValueError(f"{str(path)!r} is no checkpoint of a MongeMap: give one that `lightning-gap fit` wrote")
    _check_hyper_parameters(checkpoint.get(_HYPER_PARAMETERS))
    return cast(dict[str, Any], checkpoint)


def _arguments_of(file: str | Path | IO[bytes], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments to make a map with, hyperparameters checked; of a local file no tensor is read."""
    checkpoint = None
    if not isinstance(file, str | Path):
        start = file.tell()
        checkpoint = _read(file)
        file.seek(start)
    elif Path(file).is_file():
        checkpoint = _read(Path(file))
    found = checkpoint.get(_HYPER_PARAMETERS) if isinstance(checkpoint, dict) else None
    _check_hyper_parameters(found)
    if isinstance(found, Mapping) and {"rho", "reach"} & set(found) == {"reach"} and "reach" not in given:
        given = {"rho": found["reach"], **given, "reach": None}  # as it was called before
    # Lightning's own function would import the classes that are named beside it.
    return {**given, INSTANTIATOR: None}


def _check_hyper_parameters(found: Any) -> None:
    """Refuse hyperparameters that ask for more than this package's own classes."""
    if not isinstance(found, Mapping):
        return
    instantiator = found.get(INSTANTIATOR)
    if instantiator is not None and instantiator not in _LIGHTNINGS_OWN:
        raise ValueError(
            f"the checkpoint wants {instantiator!r} to make the model, which is not run: make it yourself, as in "
            "model = MongeMap(...), and load the weights, torch.load(path, weights_only=True)['state_dict']"
        )
    reference = found.get("gap_reference")
    if reference is not None and not (isinstance(reference, Mapping) and set(reference) == {"shape"}):
        raise ValueError(
            f"the checkpoint names {str(reference)[:80]!r} as gap_reference, which is not read: give it yourself, as "
            "in MongeMap.load_from_checkpoint(path, gap_reference=...)"
        )


def _read(file: Path | IO[bytes]) -> Any:
    if isinstance(file, Path):
        # Its tensors stay in the file until they are wanted. Older formats cannot be read so.
        with suppress(Exception):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the archive, its pickle and its tensors each fail in their own way
        name = repr(str(file)) if isinstance(file, Path) else "given"
        if "weights_only" in str(error).lower() and "unsupported" in str(error).lower():
            raise ValueError(
                f"the checkpoint {name} holds more than tensors and plain Python, which is not run: give one that "
                "`lightning-gap fit` wrote; if you trust it, MongeMap.load_from_checkpoint(path, weights_only=False)"
            ) from error
        raise ValueError(f"cannot read the checkpoint {name}: it is damaged or no checkpoint; copy it again") from error
