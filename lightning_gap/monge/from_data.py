"""What a map takes from its data: names, the representation, and the default network."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_gap.monge.checkpoint import described_map
from lightning_gap.monge.maps.conditional import ConditionalMap
from lightning_gap.monge.maps.residual import ResidualMLP
from lightning_gap.monge.samples.features import feature_places, match_features
from lightning_gap.monge.samples.standardize import AffineRepresentation
from lightning_gap.monge.signs import unused_conditions

if TYPE_CHECKING:
    from lightning_gap.monge.module import MongeMap

__all__ = ["adopt", "chosen_map", "data_of", "feature_texts", "note_conditions", "take_from_checkpoint"]


def data_of(model: "MongeMap") -> Any:
    """Return the data module of the run, or ``None``.

    Args:
        model: The map.
    """
    return getattr(model.trainer, "datamodule", None)


def adopt(model: "MongeMap") -> None:
    """Take from the data what was not given, and refuse what contradicts it.

    Args:
        model: The map.

    Raises:
        MisconfigurationException: Features, conditions or the representation are not those of the map's training.
    """
    data, fitting = data_of(model), model.trainer.state.fn == TrainerFn.FITTING
    # A map that was trained by place has no names; other data than it was trained on cannot tell them.
    names = getattr(data, "feature_names", None)
    if model.feature_names is None and names is not None and (fitting or not model.epsilons.started):
        _set_names(model, "feature_names", names)
    match_features(data, model.feature_names)
    _order_reference(model)
    _adopt_representation(model, data)
    conditions = getattr(data, "condition_names", ())
    if conditions and model.condition_names is None:
        _set_names(model, "condition_names", conditions)
    _check_condition_names(model, data)
    dim = getattr(data, "dim", None)
    if model.map is None and dim is not None:
        model.map = _default_map(data, dim, model.hidden)
        model.hparams.update({"dim": dim, "map": described_map(model.map)})


def take_from_checkpoint(model: "MongeMap", checkpoint: dict[str, Any]) -> None:
    """Take what a checkpoint's weights mean; older ones, which were trained without a start, are told that they have.

    Args:
        model: The map.
        checkpoint: What is about to be loaded.

    Raises:
        MisconfigurationException: The network is one of the user's own, which a checkpoint does not hold; or the data
            are not those of the checkpoint.
    """
    state = checkpoint.get("state_dict", {})  # a strategy that shards models has loaded it already
    if model.map is None and any(name.startswith("map.") for name in state):
        raise MisconfigurationException(
            "the checkpoint holds the weights of a network of your own, and not the network: "
            "give it again, as in MongeMap.load_from_checkpoint(path, map=...)"
        )
    state.setdefault("started", torch.tensor(True))
    if getattr(model, "_trainer", None) is None:
        return
    data, found = data_of(model), checkpoint.get("hyper_parameters") or {}
    if found.get("feature_names"):
        _set_names(model, "feature_names", found["feature_names"])
        match_features(data, model.feature_names)
    if found.get("condition_names"):
        _set_names(model, "condition_names", found["condition_names"])
        _check_condition_names(model, data)


def note_conditions(model: "MongeMap") -> None:
    """Say where the conditions of a fit are not heeded, and widen the range of trained ones to that of the fit.

    Args:
        model: The map.
    """
    data = data_of(model)
    if getattr(data, "condition_names", ()):
        model.remarks.say("conditions", lambda: unused_conditions(model.map))
    vectors: Tensor | None = getattr(data, "trained_vectors", None)
    if vectors is None:
        return
    ends = [vectors.amin(0).tolist(), vectors.amax(0).tolist()]
    if model.condition_range is not None and len(model.condition_range[0]) == len(ends[0]):
        wider = zip((min, max), model.condition_range, ends, strict=True)
        ends = [list(map(choose, before, now)) for choose, before, now in wider]
    model.condition_range = model.hparams["condition_range"] = ends


def chosen_map(dim: int | None, given: nn.Module | None, hidden: Sequence[int]) -> nn.Module | None:
    """Return the network that was given, or the default one where the dimension is known.

    Args:
        dim: Dimension of the samples, or ``None``.
        given: The network, or ``None``.
        hidden: Widths of the default one.

    Raises:
        ValueError: The network is made for another dimension.
    """
    if given is None:
        return None if dim is None else ResidualMLP(dim, hidden)
    made_with = getattr(given, "dim", None)
    if dim is not None and isinstance(made_with, int) and made_with != dim:
        raise ValueError(f"dim={dim}, but the map was made with dim={made_with}: leave dim out, the map tells it")
    return given


def feature_texts(names: Sequence[str] | None, dim: int | None) -> list[str] | None:
    """Return names of features as text.

    Args:
        names: What was given as ``feature_names``.
        dim: How many there must be, where it is known.

    Raises:
        TypeError: It is one text.
        ValueError: There are more or fewer.
    """
    if names is None:
        return None
    if isinstance(names, str):
        raise TypeError(f"feature_names must be a list of names, got {names!r}: write [{names!r}]")
    found = [str(name) for name in names]
    if dim is not None and len(found) != dim:
        raise ValueError(f"feature_names has {len(found)} names for dim={dim}: give one for each feature")
    return found


def _set_names(model: "MongeMap", kind: str, names: Sequence[Any]) -> None:
    texts = [str(name) for name in names]
    setattr(model, kind, texts)
    model.hparams[kind] = texts


def _order_reference(model: "MongeMap") -> None:
    """Put the features of the gap's reference samples in the map's order."""
    places = feature_places("gap_reference", model.reference_features, model.feature_names, "the map")
    if places is not None and model.gap_reference is not None:
        model.gap_reference = model.gap_reference[:, torch.from_numpy(places).to(model.gap_reference.device)]
        model.reference_features = tuple(model.feature_names or ())
        model.hparams["gap_reference"] = {"shape": list(model.gap_reference.shape)}


def _adopt_representation(model: "MongeMap", data: Any) -> None:
    theirs = getattr(data, "representation", None)
    if model.representation is None:
        if theirs is None:
            return
        if model.epsilons.started:
            raise MisconfigurationException(
                "this map was trained on raw samples, and the data module encodes them: give "
                "SamplesDataModule(standardize=False, components=None), or train a new map"
            )
        model.representation = AffineRepresentation(**theirs.hparams).to(model.device)
        model.representation.load_state_dict(theirs.state_dict())
        model.hparams["representation"] = theirs.hparams
    elif data is not None and not model.representation.agrees_with(theirs):
        raise MisconfigurationException(
            "the data module encodes samples otherwise than in this map's training: give it the samples, the split and "
            "the options of then"
        )


def _check_condition_names(model: "MongeMap", data: Any) -> None:
    """Refuse labels that mean other conditions than in training; vectors mean the same everywhere."""
    names = [str(name) for name in getattr(data, "condition_names", ())]
    mine = model.condition_names or []
    if getattr(data, "condition_vectors", None) is None and names != mine[: len(names)]:
        raise MisconfigurationException(
            f"the labels of the data mean the conditions {', '.join(names)}, and those of this map {', '.join(mine)}: "
            "give the data module the same conditions, or condition_vectors"
        )


def _default_map(data: Any, dim: int, hidden: Sequence[int]) -> nn.Module:
    names, vectors = getattr(data, "condition_names", ()), getattr(data, "condition_vectors", None)
    if vectors is not None:
        return ConditionalMap(dim, condition_dim=vectors.shape[1], hidden=hidden)
    return ConditionalMap(dim, conditions=len(names), hidden=hidden) if names else ResidualMLP(dim, hidden)
