"""A map as a folder of plain files: its weights, what it is made from, and a card. Nothing in it can be run."""

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import lightning_gap
from lightning_gap.extras import library
from lightning_gap.monge import maps
from lightning_gap.monge.checkpoint import describe, hyper_parameters
from lightning_gap.monge.dynamics import is_on_sphere
from lightning_gap.monge.epsilons import FITTING, GAP, STARTED
from lightning_gap.monge.maps import EntropicMap, TransportMap
from lightning_gap.monge.model_card import model_card
from lightning_gap.monge.ot.checks import check_epsilon
from lightning_gap.monge.ot.costs import resolve
from lightning_gap.monge.training_record import plain_scores
from lightning_gap.trainer.internals.of_lightning import trainer_if_any
from lightning_gap.trainer.strategy import holds_whole_weights, strategy_name

if TYPE_CHECKING:
    from lightning_gap.monge.module import MongeMap

__all__ = ["FORMAT", "read_folder", "write_folder"]

FORMAT = 1

_CONFIG, _WEIGHTS, _CARD = "config.json", "model.safetensors", "README.md"
# Of the module's state, what maps samples: neither training samples nor numbers that the configuration holds.
_PARTS = ("map.", "representation.", "condition_encoding.")
# Of the module's arguments, what a map is used and scored by; the rest is of its training.
_ARGUMENTS = (
    "cost", "fitting_cost", "fitting_loss", "fitting_epsilon", "relative_fitting_epsilon", "gap_epsilon",
    "relative_gap_epsilon", "gap_weight", "rho", "reweight", "solver", "tolerance", "max_iterations", "representation",
    "condition_encoding", "condition_names", "condition_range", "feature_names",
)  # fmt: skip
_COSTS = ("cost", "fitting_cost")
# What arguments of a wrong type or size end in, somewhere.
_FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError)

_Model = TypeVar("_Model", bound="MongeMap")


@rank_zero_only
def write_folder(model: "MongeMap", folder: str | Path, scores: Mapping[str, Any] | None) -> None:
    """Write a map's weights, configuration and card; of several processes the first does."""
    safetensors = library("safetensors.torch", "save_pretrained", "hub")
    if model.map is None:
        raise ValueError("MongeMap has no network yet: fit it, or give dim= or map=")
    state = _whole_state(model)
    config = _configuration(model, model.record.scores if scores is None else plain_scores(scores))
    text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path = Path(folder).expanduser()
    if path.exists() and not path.is_dir():
        raise ValueError(f"{str(path)!r} is a file: give a folder")
    path.mkdir(parents=True, exist_ok=True)
    # Each file gets its name when it is complete.
    safetensors.save_file(state, path / f"{_WEIGHTS}.part", metadata={"format": "pt"})
    (path / f"{_CONFIG}.part").write_text(text, encoding="utf-8")
    for name in (_WEIGHTS, _CONFIG):
        os.replace(path / f"{name}.part", path / name)
    if (path / _CARD).exists():
        rank_zero_info(f"{str(path / _CARD)!r} is left as it is: remove it for a card of this map")
    else:
        (path / _CARD).write_text(model_card(config), encoding="utf-8")


def read_folder(cls: type[_Model], folder: str | Path, given: Mapping[str, Any]) -> _Model:
    """Return the map of a folder on the CPU; ``given`` arguments go before those of its configuration."""
    safetensors = library("safetensors.torch", "from_pretrained", "hub")
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(
            f"there is no folder {str(folder)!r} in {str(Path.cwd())!r}: give one that save_pretrained wrote, or of a "
            f"map on the hub what huggingface_hub.snapshot_download({str(folder)!r}) returns"
        )
    for name in (_CONFIG, _WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{str(path)!r} has no {name}: give a folder that save_pretrained wrote")
    config = _read_configuration(path / _CONFIG)
    try:
        state: dict[str, Tensor] = safetensors.load_file(path / _WEIGHTS, device="cpu")
    except Exception as error:  # a header, its sizes and its names each fail in their own way
        raise ValueError(f"cannot read {str(path / _WEIGHTS)!r}: it is damaged; copy it again ({error})") from error
    model = _made(cls, config, given)
    _fill(model, state, config)
    model.record.load({**config, "scores": {"test": config.get("scores") or {}}})
    return model.eval()


def _whole_state(model: "MongeMap") -> dict[str, Tensor]:
    """Return the tensors by which samples are mapped, each with memory of its own, on the CPU."""
    trainer = trainer_if_any(model)
    found = {name: value for name, value in model.state_dict().items() if name.startswith(_PARTS)}
    sharded = any(isinstance(value, DTensor) for value in found.values())
    if sharded or (trainer is not None and not holds_whole_weights(trainer)):
        strategy = "its strategy" if trainer is None else strategy_name(trainer)
        raise MisconfigurationException(
            f"{strategy} shards the weights, and save_pretrained writes whole ones: trainer.save_checkpoint(path), and "
            "in one process MongeMap.load_from_checkpoint(path).save_pretrained(folder)"
        )
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} of your network is a {type(value).__name__}, and a folder holds tensors alone")
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in found.items()}


def _configuration(model: "MongeMap", scores: Mapping[str, float]) -> dict[str, Any]:
    """Return all that makes the map again but its weights, as plain Python."""
    net, encodes = model.map, model.representation
    assert net is not None
    made = type(net)
    described = describe(net) or {}
    if "class_path" not in described:
        described = {"name": f"{made.__module__}.{made.__qualname__}"}
    arguments = hyper_parameters(model, None, net)
    encoded_dim = getattr(net, "dim", None) if encodes is None else encodes.encoded_dim
    encoded_dim = encoded_dim if isinstance(encoded_dim, int) else None
    condition_dim = getattr(net, "condition_dim", None)
    return {
        "library_name": "lightning_gap",
        "library_version": lightning_gap.__version__,
        "format": FORMAT,
        "map": {name: described[name] for name in ("class_path", "init_args", "name") if name in described},
        "dtype": _precision(net),
        "dim": encoded_dim if encodes is None else len(encodes.mean),
        "encoded_dim": encoded_dim,
        "on_sphere": is_on_sphere(model),
        "conditional": bool(getattr(net, "conditional", False)),
        "condition_dim": condition_dim if isinstance(condition_dim, int) else None,
        "arguments": {name: arguments[name] for name in _ARGUMENTS},
        "own_costs": [name for name in _COSTS if not _is_known(arguments[name])],
        "epsilons": {FITTING: model.epsilons.fitting, GAP: model.epsilons.gap, STARTED: model.epsilons.started},
        "samples": model.record.samples,
        "updates": model.record.updates,
        "scores": dict(scores),
    }


def _precision(net: nn.Module) -> str:
    kinds = {str(x.dtype).removeprefix("torch.") for x in net.state_dict().values() if x.is_floating_point()}
    return " and ".join(sorted(kinds)) or "no numbers"


def _is_known(cost: Any) -> bool:
    try:
        return isinstance(cost, str) and resolve(cost) is not None
    except (ValueError, TypeError):
        return False


def _read_configuration(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {str(path)!r}: it is damaged, or no JSON ({error})") from error
    if not isinstance(config, dict) or "format" not in config or config.get("library_name") != "lightning_gap":
        raise ValueError(f"{str(path)!r} describes no map of lightning_gap: give a folder that save_pretrained wrote")
    if type(config["format"]) is not int or config["format"] != FORMAT:
        raise ValueError(
            f"{str(path)!r} is of format {config['format']!r}, and lightning_gap {lightning_gap.__version__} reads "
            f"{FORMAT}: install the version that wrote it, {config.get('library_version')!r}, or a newer one"
        )
    for name in ("map", "arguments", "epsilons"):
        if not isinstance(config.get(name), dict):
            raise ValueError(f"{str(path)!r} has no {name!r}: it is damaged; copy it again")
    if set(config["arguments"]) != set(_ARGUMENTS):
        odd = sorted(set(config["arguments"]) ^ set(_ARGUMENTS))
        raise ValueError(f"{str(path)!r} has other arguments than those of format {FORMAT}, {odd}: copy it again")
    return config


@cache
def _maps_by_path() -> frozenset[str]:
    found = {name: getattr(maps, name) for name in maps.__all__}
    classes = {name for name, value in found.items() if isinstance(value, type) and issubclass(value, TransportMap)}
    return frozenset(f"lightning_gap.monge.{name}" for name in classes - {TransportMap.__name__})


def _made(cls: type[_Model], config: Mapping[str, Any], given: Mapping[str, Any]) -> _Model:
    """Return a module with the map that a configuration names, which must be this package's, or given."""
    described, arguments = config["map"], dict(config["arguments"])
    path = described.get("class_path")
    path = path if path is None else str(path)
    if given.get("map") is None and path not in _maps_by_path():
        name = path or described.get("name")
        why = "which is no map of this package, so that nothing of it is imported"
        if str(name).startswith("lightning_gap."):
            why = "made with an activation or a cost of your own" if path is None else "which is no map"
        raise ValueError(
            f"the folder holds the weights of a {name}, {why}: give the network, "
            f"as in MongeMap.from_pretrained(folder, map={str(name).rpartition('.')[2]}(...))"
        )
    for name in _COSTS:
        if given.get(name) is None and not _is_known(arguments[name]):
            raise ValueError(
                f"the folder holds only the name of a {name} of your own, {arguments[name]!r}: give it again, "
                f"as in MongeMap.from_pretrained(folder, {name}=...)"
            )
    try:
        with torch.random.fork_rng(devices=[]):  # initial weights, which are about to be replaced
            return cls(**{**arguments, "map": described, **given})
    except (*_FAILURES, MisconfigurationException) as error:
        raise ValueError(f"config.json makes no map: {error}") from error


def _fill(model: "MongeMap", state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Give a module the weights of a folder, in the precision that they have there."""
    assert model.map is not None
    every = model.state_dict()
    mine = {name: value for name, value in every.items() if name.startswith(_PARTS)}
    for what, names in (("lacks", set(mine) - set(state)), ("holds, and the map has not,", set(state) - set(mine))):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")
            raise ValueError(f"{_WEIGHTS} {what} {shown}: it is of another map than config.json; copy the folder again")
    # Networks of one's own may make room for a state, as a plan does, whose size nothing else tells.
    fixed = isinstance(model.map, TransportMap) and not isinstance(model.map, EntropicMap)
    for name, value in state.items():
        own = mine[name]
        same_kind = own.is_floating_point() == value.is_floating_point() and own.is_complex() == value.is_complex()
        if not same_kind or ((fixed or not name.startswith("map.")) and own.shape != value.shape):
            raise ValueError(
                f"{_WEIGHTS} has {name} as {value.dtype} of shape {tuple(value.shape)}, and the map as {own.dtype} of "
                f"{tuple(own.shape)}: give the folder's own files, or a map of the same arguments"
            )
    kinds = {value.dtype for name, value in state.items() if name.startswith("map.") and value.is_floating_point()}
    if len(kinds) == 1:
        model.to(kinds.pop())  # what is no part of the state as well
    for name, own in model.state_dict(keep_vars=True).items():
        if name in state and own.dtype != state[name].dtype:
            own.data = own.data.to(state[name].dtype)
    try:
        numbers = {name: check_epsilon(name, config["epsilons"].get(name)) for name in (FITTING, GAP)}
        started = float(config["epsilons"].get(STARTED) is True)
        model.load_state_dict({**model.state_dict(), **state})
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"the files of the folder do not fit the map: {error}") from error
    with torch.no_grad():
        for name, number in {**numbers, STARTED: started}.items():
            getattr(model, name).fill_(float("nan") if number is None else number)
    model.epsilons.read()
