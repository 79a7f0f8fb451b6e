"""Objects as plain Python, so that a checkpoint which is loaded with ``weights_only=True`` can make them again."""

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_gap.monge.schedules import Anneal

__all__ = ["Forgotten", "build", "describe"]

# A checkpoint names classes; only those of these packages are imported for it.
_PACKAGES = ("torch.optim.", "lightning_gap.")
_OF_WHOM = " or ".join(package[:-1] for package in _PACKAGES)
# And of these what a map is made of: others may read or write files when they are made.
_KINDS = (nn.Module, Optimizer, LRScheduler, Anneal)


def describe(thing: Any) -> dict[str, Any] | None:
    """Return what :func:`build` makes ``thing`` from, as plain Python.

    Args:
        thing: None, an object of this package with ``hparams``, or a class of ``torch.optim`` or a partial of one with
            plain arguments.

    Returns:
        ``{"class_path": ..., "init_args": ..., "partial": ...}``, the last one telling a class that is still to be
        called; ``{"name": ...}`` for what cannot be described; None for None.
    """
    if thing is None:
        return None
    factory = isinstance(thing, partial | type)
    positional = thing.args if isinstance(thing, partial) else ()
    made = thing.func if isinstance(thing, partial) else thing if factory else type(thing)
    if positional and isinstance(positional[-1], type) and getattr(made, "__module__", "").startswith("jsonargparse."):
        # What a command line makes of a class that is still to be called: its own function, and the class.
        made, positional = positional[-1], ()
    path = f"{getattr(made, '__module__', '')}.{getattr(made, '__qualname__', '')}"
    arguments = getattr(thing, "keywords", {}) if factory else getattr(thing, "hparams", None)
    if not path.startswith(_PACKAGES) or positional or not isinstance(arguments, Mapping) or not _plain(arguments):
        return {"name": getattr(thing, "__qualname__", None) or repr(thing)[:200]}
    return {"class_path": path, "init_args": _plain_copy(arguments), "partial": factory}


def build(argument: str, description: Any) -> Any:
    """Return what was described; anything that is no description is returned as it is.

    Args:
        argument: The argument that it was given for, for messages.
        description: What :func:`describe` returned.

    Raises:
        ValueError: The class is not one of this package's or of ``torch.optim``'s, is no network, optimizer or
            schedule, or its arguments are no plain Python or describe further objects.
    """
    if not isinstance(description, Mapping):
        return description
    if "class_path" not in description:
        return Forgotten(argument, str(description.get("name")))
    path, arguments = description["class_path"], description.get("init_args") or {}
    remedy = f"give the object, as in MongeMap.load_from_checkpoint(path, {argument}=...)"
    if not isinstance(path, str) or not path.startswith(_PACKAGES):
        raise ValueError(f"{argument}: {path!r} is not of {_OF_WHOM}: {remedy}")
    if not isinstance(arguments, Mapping) or not _plain(arguments) or _describes(arguments):
        raise ValueError(f"{argument}: the arguments of {path!r} are no plain numbers and names: {remedy}")
    module, _, name = path.rpartition(".")
    try:
        made = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{argument}: there is no class {path!r} here: {error}") from error
    if not isinstance(made, type) or not f"{made.__module__}.".startswith(_PACKAGES):
        # Not what those modules import, either.
        raise ValueError(f"{argument}: {path!r} is no class of {_OF_WHOM}: {remedy}")
    if not issubclass(made, _KINDS) or issubclass(made, LightningModule):
        raise ValueError(f"{argument}: {path!r} is no network, optimizer or schedule: {remedy}")
    if description.get("partial"):
        return partial(made, **arguments) if arguments else made
    return made(**arguments)


class Forgotten:
    """Stands for a function that a checkpoint knows by name only, and says so when it is needed.

    Args:
        argument: The argument that it was given for.
        name: What is known of it.
    """

    def __init__(self, argument: str, name: str) -> None:
        self.argument = argument
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise.

        Args:
            *args: Ignored.
            **kwargs: Ignored.

        Raises:
            MisconfigurationException: Always.
        """
        raise MisconfigurationException(
            f"the checkpoint holds only the name of {self.argument}, {self.name}: give it again, "
            f"as in MongeMap.load_from_checkpoint(path, {self.argument}=...)"
        )

    def __repr__(self) -> str:
        return self.name


def _plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _describes(value: Any) -> bool:
    """Return whether there is a description within."""
    if isinstance(value, Mapping):
        return any(key in ("class_path", "_instantiator") or _describes(item) for key, item in value.items())
    return isinstance(value, list | tuple) and any(map(_describes, value))


def _plain_copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain_copy(item) for key, item in value.items()}
    return [_plain_copy(item) for item in value] if isinstance(value, list | tuple) else value
