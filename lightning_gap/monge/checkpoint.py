"""Objects as plain Python, so that a checkpoint which is loaded with ``weights_only=True`` can make them again."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_gap.monge.ot.costs import Cost, resolve
from lightning_gap.monge.schedules import Anneal
from lightning_gap.trainer.internals.of_lightning import INSTANTIATOR

if TYPE_CHECKING:
    from lightning_gap.monge.module import MongeMap

__all__ = ["Forgotten", "build", "build_cost", "describe", "described_map", "hyper_parameters"]

# A checkpoint names classes; only those of these packages are imported for it.
_PACKAGES = ("torch.optim.", "lightning_gap.")
# The face of this package keeps its names, wherever their modules go.
_FACE = "lightning_gap.monge"
# Arguments that a map keeps as they were given.
_AS_THEY_ARE = (
    "conservative_weight", "conservative_probes", "lr_scheduler_monitor", "global_batch", "condition_names",
    "feature_names", "condition_range",
)  # fmt: skip
_OF_WHOM = " or ".join(package[:-1] for package in _PACKAGES)
# And of these what a map is made of: others may read or write files when they are made.
_KINDS = (nn.Module, Optimizer, LRScheduler, Anneal)


def describe(thing: Any) -> dict[str, Any] | None:
    """Return what :func:`build` makes ``thing`` from, as plain Python; ``None`` for ``None``.

    Of objects of this package with ``hparams``, and of classes of ``torch.optim`` or partials of them, which are still
    to be called (``partial``); of anything else its name alone.
    """
    if thing is None:
        return None
    factory = isinstance(thing, partial | type)
    positional = thing.args if isinstance(thing, partial) else ()
    made = thing.func if isinstance(thing, partial) else thing if factory else type(thing)
    if positional and isinstance(positional[-1], type) and getattr(made, "__module__", "").startswith("jsonargparse."):
        # What a command line makes of a class that is still to be called: its own function, and the class.
        made, positional = positional[-1], ()
    path = _path(made)
    arguments = getattr(thing, "keywords", {}) if factory else getattr(thing, "hparams", None)
    if not path.startswith(_PACKAGES) or positional or not isinstance(arguments, Mapping) or not _plain(arguments):
        return {"name": getattr(thing, "__qualname__", None) or repr(thing)[:200]}
    return {"class_path": path, "init_args": json.loads(json.dumps(arguments)), "partial": factory}


def build(argument: str, description: Any) -> Any:
    """Return what was described, if it is of this package or ``torch.optim``; what is no description as it is."""
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
    try:
        made = _found(path)
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


def _path(made: Any) -> str:
    name, face = getattr(made, "__qualname__", ""), import_module(_FACE)
    public = name in face.__all__ and getattr(face, name) is made
    return f"{_FACE if public else getattr(made, '__module__', '')}.{name}"


def _found(path: str) -> Any:
    module, _, name = path.rpartition(".")
    face = import_module(_FACE)
    if path.startswith(f"{_FACE}.") and name in face.__all__:  # whatever an older version called its module
        return getattr(face, name)
    return getattr(import_module(module), name)


def build_cost(argument: str, cost: Any) -> Cost:
    """Return a cost, or say how to give one that a checkpoint knows by name only."""
    try:
        return resolve(cost)
    except ValueError as error:
        raise ValueError(
            f"{argument}: {error}. A checkpoint holds only the name of a cost of your own: give it again, "
            f"as in MongeMap.load_from_checkpoint(path, {argument}=...)"
        ) from error


def described_map(net: nn.Module | None) -> dict[str, Any] | None:
    """Return what a network is made from; ``None`` for one of the user's own, asked for when its weights are there."""
    described = describe(net)
    return described if described is not None and "class_path" in described else None


def hyper_parameters(model: "MongeMap", dim: int | None, given: nn.Module | None) -> dict[str, Any]:
    """Return a map's arguments as plain Python, from the map and the dimension and the network that were given."""
    objective, reference, described = model.objective, model.gap_reference, described_map(given or model.map)
    epsilons: dict[str, float | None] = {}
    for name, epsilon in model.epsilons.given.items():
        epsilons |= {name: epsilon.absolute, f"relative_{name}": epsilon.share}
    functions: dict[str, Any] = {name: getattr(model, name) for name in ("epsilon_factor", "gap_weight")}
    functions["fitting_loss"] = objective.fitting_loss
    return {
        # Of a network that is not described, nothing is made in its place.
        "dim": dim if given is None or described is not None else None,
        "map": described,
        "hidden": None if model.hidden is None else list(model.hidden),
        "cost": str(objective.cost),
        "fitting_cost": str(objective.fitting_cost),
        **epsilons,
        **{name: describe(value) if callable(value) else value for name, value in functions.items()},
        "gap_reference": None if reference is None else {"shape": list(reference.shape)},
        **{name: getattr(objective, name) for name in ("gap_on", "rho", "reweight")},
        # A decay of this package's own goes with an optimizer that was not given.
        "optimizer": None if model.decays else describe(model.optimizer),
        "lr_scheduler": describe(model.lr_scheduler),
        **asdict(objective.options),
        "representation": None if model.representation is None else model.representation.hparams,
        "condition_encoding": None if model.condition_encoding is None else model.condition_encoding.hparams,
        **{name: getattr(model, name) for name in _AS_THEY_ARE},
    }


class Forgotten:
    """Stands for a function that a checkpoint knows by name only, and says so when it is called."""

    def __init__(self, argument: str, name: str) -> None:
        self.argument, self.name = argument, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise ``MisconfigurationException``."""
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
        return any(key in ("class_path", INSTANTIATOR) or _describes(item) for key, item in value.items())
    return isinstance(value, list | tuple) and any(map(_describes, value))
