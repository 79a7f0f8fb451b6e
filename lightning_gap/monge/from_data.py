"""What a map takes from its data: names, the representation, the default network, its start and its epsilons."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_gap.checks import check_choice
from lightning_gap.monge.border import on_device
from lightning_gap.monge.checkpoint import described_map
from lightning_gap.monge.defaults import (
    decide_weight,
    default_map,
    say_if_gaussian,
    take_recipe,
    take_terms_of_checkpoint,
)
from lightning_gap.monge.maps.base import TransportMap
from lightning_gap.monge.maps.brenier import BrenierMap
from lightning_gap.monge.maps.starts import StartPair
from lightning_gap.monge.objective import GapOn
from lightning_gap.monge.ot.checks import check_weights
from lightning_gap.monge.ot.costs import Cost
from lightning_gap.monge.ot.epsilon import Weighted
from lightning_gap.monge.samples.batches import UnpairedBatch
from lightning_gap.monge.samples.condition_encoding import ConditionEncoding
from lightning_gap.monge.samples.features import feature_places, listed, match_features
from lightning_gap.monge.samples.files.read import open_table
from lightning_gap.monge.samples.standardize import AffineRepresentation
from lightning_gap.monge.signs import unused_conditions
from lightning_gap.monge.suitability import refuse_learned_cost
from lightning_gap.monge.training_loss import gathered
from lightning_gap.trainer.internals.of_lightning import trainer_if_any
from lightning_gap.trainer.strategy import (
    data_parallel_group,
    data_parallel_size,
    from_rank_zero,
    holds_whole_weights,
)  # fmt: skip

if TYPE_CHECKING:
    from lightning_gap.monge.module import MongeMap

__all__ = [
    "adopt",
    "begin",
    "begin_with_batch",
    "chosen_map",
    "encoding_from",
    "feature_texts",
    "note_conditions",
    "read_reference",
    "take_from_checkpoint",
]

Pairs = Sequence[tuple[Weighted, Weighted]]


def _data_of(model: "MongeMap") -> Any:
    return getattr(model.trainer, "datamodule", None)


def adopt(model: "MongeMap") -> None:
    """Take from the data what was not given, and refuse what contradicts it."""
    data, fitting = _data_of(model), model.trainer.state.fn == TrainerFn.FITTING
    # A map that was trained by place has no names; other data than it was trained on cannot tell them.
    names = getattr(data, "feature_names", None)
    if model.feature_names is None and names is not None and (fitting or not model.epsilons.started):
        _set_names(model, "feature_names", names)
    match_features(data, model.feature_names)
    _order_reference(model)
    _adopt_representation(model, data)
    _adopt_encoding(model, data)
    conditions = getattr(data, "condition_names", ())
    if conditions and model.condition_names is None:
        _set_names(model, "condition_names", conditions)
    _check_condition_names(model, data)
    dim = getattr(data, "dim", None)
    if dim is not None and (model.map is None or _unfit_choice(model, data)):
        model.map = _default_map(model, data, dim)
        model.hparams.update({"dim": dim, "map": described_map(model.map)})
        take_recipe(model)


def take_from_checkpoint(model: "MongeMap", checkpoint: dict[str, Any]) -> None:
    """Take what a checkpoint's weights mean; older ones, trained without a start, are told that they have it."""
    state = checkpoint.get("state_dict", {})  # a strategy that shards models has loaded it already
    if model.map is None and any(name.startswith("map.") for name in state):
        raise MisconfigurationException(
            "the checkpoint holds the weights of a network of your own, and not the network: "
            "give it again, as in MongeMap.load_from_checkpoint(path, map=...)"
        )
    state.setdefault("started", torch.tensor(True))
    found = checkpoint.get("hyper_parameters") or {}
    take_terms_of_checkpoint(model, found, state)
    if trainer_if_any(model) is None:
        return
    data = _data_of(model)
    if found.get("feature_names"):
        _set_names(model, "feature_names", found["feature_names"])
        match_features(data, model.feature_names)
    if found.get("condition_encoding"):
        theirs, prefix = ConditionEncoding(**found["condition_encoding"]), "condition_encoding."
        theirs.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        _set_encoding(model, theirs)
        _adopt_encoding(model, data)
    if found.get("condition_names"):
        _set_names(model, "condition_names", found["condition_names"])
        _check_condition_names(model, data)


def note_conditions(model: "MongeMap") -> None:
    """Say where the conditions of a fit are not heeded, and widen the range of trained ones to that of the fit."""
    data = _data_of(model)
    if getattr(data, "condition_names", ()):
        model.remarks.say("conditions", lambda: unused_conditions(model.map))
    vectors: Tensor | None = getattr(data, "trained_vectors", None)
    if vectors is None:
        return
    if model.condition_encoding is not None:
        model.condition_encoding.note(getattr(data, "trained_combinations", ()))
        model.hparams["condition_encoding"] = model.condition_encoding.hparams
    ends = [vectors.amin(0).tolist(), vectors.amax(0).tolist()]
    if model.condition_range is not None and len(model.condition_range[0]) == len(ends[0]):
        wider = zip((min, max), model.condition_range, ends, strict=True)
        ends = [list(map(choose, before, now)) for choose, before, now in wider]
    model.condition_range = model.hparams["condition_range"] = ends


def begin(model: "MongeMap") -> bool:
    """Start the map and decide the epsilons, once, by all training samples; return whether the data tell them."""
    data = _data_of(model)
    if not hasattr(data, "training_samples") or (model.epsilons.complete and getattr(data, "endless", False)):
        return False  # endless ones would have to be drawn, and for nothing
    conditions: Tensor | None = None
    # An endless side is asked for as many as the map's start takes.
    most = getattr(model.map, "samples_wanted", None) if getattr(data, "endless", False) else None
    if hasattr(data, "training_pairs"):
        parts = data.training_pairs(most) if most else data.training_pairs()
        pairs = [(Weighted(x.samples, x.weights), Weighted(y.samples, y.weights)) for x, y in parts]
        conditions = getattr(data, "trained_conditions", None)
    else:
        source, target = data.training_samples()
        pairs = _by_condition((source, None), (target, None))
    if pairs:
        all_samples = partial(data.training_samples, most) if most else data.training_samples
        _begin(model, pairs, all_samples, conditions, again=True)
    return bool(pairs)


def begin_with_batch(model: "MongeMap", b: UnpairedBatch) -> bool:
    """Do :func:`begin` with the first batch of all devices, so that all begin alike; return that it is done."""
    group = data_parallel_group(model.trainer)
    source, target = gathered(b.source, group), gathered(b.target, group)
    weights = (gathered(w, group, -1) for w in (b.source_weights, b.target_weights))
    if b.condition is not None:
        model.remarks.say("conditions", lambda: unused_conditions(model.map))
    pairs = _by_condition(*zip((source, target), weights, strict=True))
    for sides in pairs:
        for name, side in zip(("source_weights", "target_weights"), sides, strict=True):
            check_weights(name, side.weights, side.samples, balanced=False)
    _begin(model, pairs, lambda: (source, target), b.condition, again=False)
    return True


@torch.no_grad()
def _begin(
    model: "MongeMap",
    pairs: Pairs,
    all_samples: Callable[[], tuple[Tensor, Tensor]],
    conditions: Tensor | None,
    *,
    again: bool,
) -> None:
    for name, cost in (("cost", model.cost), ("fitting_cost", model.fitting_cost)):
        refuse_learned_cost(name, cost, on_device(model, pairs[0][0].samples[:1]))
    if not model.epsilons.started:
        if callable(start := getattr(model.map, "start", None)):
            samples = (on_device(model, part.flatten(0, -2)) for part in all_samples())
            if isinstance(model.map, TransportMap):
                with _of_a_batch(model.map) if not again else nullcontext():
                    start(*samples, cost=model.cost, pairs=_start_pairs(model, pairs, conditions))
            else:
                start(*samples)
            alike_everywhere(model)
        say_if_gaussian(model)
        decide_weight(model, pairs)
        model.epsilons.start()
    model.epsilons.decide(pairs, again=again)


@contextmanager
def _of_a_batch(net: TransportMap) -> Iterator[None]:
    """Let a convex map start at the Gaussian map of a batch, which is too few for a plan, and free to leave it."""
    kept = getattr(net, "starts_at", None)
    if isinstance(net, BrenierMap) and kept == "plan":
        net.starts_at = "gaussian"
    try:
        yield
    finally:
        if isinstance(net, BrenierMap) and kept is not None:
            net.starts_at = kept


def alike_everywhere(model: "MongeMap") -> None:
    """Give all processes the start that the first has found: a last bit may decide what held-out samples tell."""
    if model.map is None or data_parallel_size(model.trainer) == 1 or not holds_whole_weights(model.trainer):
        return
    state = {name: value.cpu() for name, value in model.map.state_dict().items()}
    model.map.load_state_dict(from_rank_zero(model.trainer, state))


def _start_pairs(model: "MongeMap", pairs: Pairs, conditions: Tensor | None) -> list[StartPair]:
    """Return the samples of each condition where the network is, with weights that sum to 1."""
    moved: dict[int, Tensor] = {}  # a side without labels is in the pair of every condition

    def here(samples: Tensor) -> Tensor:
        if id(samples) not in moved:
            moved[id(samples)] = on_device(model, samples)
        return moved[id(samples)]

    def shares(weights: Tensor | None) -> Tensor | None:
        return None if weights is None else weights.to(model.device) / weights.sum()

    found = []
    for (x, y), c in zip(pairs, [None] * len(pairs) if conditions is None else conditions, strict=True):
        condition = None if c is None else (on_device(model, c) if c.is_floating_point() else c.to(model.device))
        sides = here(x.samples), here(y.samples), condition, shares(x.weights), shares(y.weights)
        found.append(StartPair(*sides))
    return found


def _by_condition(
    source: tuple[Tensor, Tensor | None], target: tuple[Tensor, Tensor | None]
) -> list[tuple[Weighted, Weighted]]:
    if source[0].dim() == 2:
        return [(Weighted(*source), Weighted(*target))]
    sides = [
        [Weighted(x, w) for x, w in zip(samples, [None] * len(samples) if weights is None else weights, strict=True)]
        for samples, weights in (source, target)
    ]
    return list(zip(*sides, strict=True))


def read_reference(samples: Any, gap_on: GapOn | None) -> tuple[Tensor | None, tuple[str, ...] | None, GapOn]:
    """Return the gap's reference samples, the names of their features or ``None``, and where it is measured."""
    features, reference = None, None
    if isinstance(samples, Mapping):  # of a checkpoint, whose state holds the samples
        reference = torch.zeros(samples["shape"])
    elif samples is not None:
        table = open_table("gap_reference", samples)
        reference, features = table.samples(None), table.features
    chosen = gap_on or ("source" if reference is None else "reference")
    check_choice("gap_on", chosen, get_args(GapOn))
    if chosen != "source" and reference is None:
        raise ValueError(f"gap_on={gap_on!r} needs gap_reference, samples of the reference measure: give them")
    return reference, features, chosen


def chosen_map(dim: int | None, given: nn.Module | None, cost: Cost, hidden: Sequence[int] | None) -> nn.Module | None:
    """Return the network that was given, or the default one where the dimension is known."""
    if given is None:
        return None if dim is None else default_map(dim, cost, hidden)
    made_with = getattr(given, "dim", None)
    if dim is not None and isinstance(made_with, int) and made_with != dim:
        raise ValueError(f"dim={dim}, but the map was made with dim={made_with}: leave dim out, the map tells it")
    return given


def feature_texts(names: Sequence[str] | None, dim: int | None) -> list[str] | None:
    """Return names of features as text."""
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


def encoding_from(given: ConditionEncoding | Mapping[str, Any] | None) -> ConditionEncoding | None:
    """Return the encoding of conditions that was given or described."""
    return ConditionEncoding(**given) if isinstance(given, Mapping) else given


def _set_encoding(model: "MongeMap", like: ConditionEncoding) -> None:
    model.condition_encoding = deepcopy(like).to(model.device)
    model.hparams["condition_encoding"] = like.hparams


def _adopt_encoding(model: "MongeMap", data: Any) -> None:
    theirs: ConditionEncoding | None = getattr(data, "condition_encoding", None)
    if theirs is None:
        return
    if model.condition_encoding is None:
        if model.epsilons.started:
            raise MisconfigurationException(
                "this map was trained on labels or vectors, and the data module encodes the columns "
                f"{listed(theirs.names)}: give it the conditions of then, or train a new map"
            )
        _set_encoding(model, theirs)
    elif not model.condition_encoding.agrees_with(theirs):
        try:
            data.match_conditions(deepcopy(model.condition_encoding).cpu())
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error


def _check_condition_names(model: "MongeMap", data: Any) -> None:
    """Refuse labels that mean other conditions than in training; vectors mean the same everywhere."""
    names = [str(name) for name in getattr(data, "condition_names", ())]
    mine = model.condition_names or []
    if getattr(data, "condition_vectors", None) is None and names != mine[: len(names)]:
        raise MisconfigurationException(
            f"the labels of the data mean the conditions {', '.join(names)}, and those of this map {', '.join(mine)}: "
            "give the data module the same conditions, or condition_vectors"
        )


def _default_map(model: "MongeMap", data: Any, dim: int) -> nn.Module:
    names, vectors = getattr(data, "condition_names", ()), getattr(data, "condition_vectors", None)
    if vectors is not None:
        return default_map(dim, model.cost, model.hidden, vectors=vectors.shape[1])
    return default_map(dim, model.cost, model.hidden, labels=len(names))


def _unfit_choice(model: "MongeMap", data: Any) -> bool:
    """Return whether the map was chosen before the data showed conditions."""
    conditional = bool(getattr(data, "condition_names", ()))
    heeds = getattr(model.map, "conditional", False)
    return model.map_is_chosen and not model.epsilons.started and conditional and not heeds
