"""From what was given to what is drawn: splits, conditions and representation put together."""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor

from lightning_gap.monge.samples.conditions import condition_names, condition_vectors_of
from lightning_gap.monge.samples.draws import FiniteSamples, Population, SampledSamples, StreamedSamples, map_images
from lightning_gap.monge.samples.given import Side
from lightning_gap.monge.samples.splits import SplitRule, generator, split_rows
from lightning_gap.monge.samples.standardize import AffineRepresentation

__all__ = ["Endless", "HeldOut", "Predicted", "Prepared", "Request", "prepare"]

Array = NDArray[Any]
Endless = SampledSamples | StreamedSamples
Given = tuple[Side | Endless, Side | Endless]
# Populations by condition; under None that of a side without labels, which serves every condition.
ByName = dict[str | None, Population]

_STAGES = ("val", "test")
# First entries of the keys of random draws, besides those of the training batches.
_HELD_OUT, _AGAIN, _FIT, _PREDICT = 10, 11, 12, 13
# Samples that stand for an endless population where the representation is fitted.
_MANY = 8192


@dataclass(frozen=True)
class Request:
    """What is asked for of the samples.

    Attributes:
        rule: What is held out of the given samples.
        batch_size: Samples of each side and condition in a batch.
        default_batch: Whether this number is the default, which nobody asked for: it gives way.
        small_conditions: What becomes of a condition that is smaller: ``"refuse"``, ``"drop"`` or ``"shrink"``.
        condition_vectors: Vectors of the conditions, or ``None``.
        standardize: Whether features are divided by their standard deviation.
        components: Number of principal components, or ``None``.
        eval_batch_size: Samples that are held out of an endless population.
    """

    rule: SplitRule
    batch_size: int
    default_batch: bool = False
    small_conditions: str = "refuse"
    condition_vectors: Any = None
    standardize: bool = False
    components: int | None = None
    eval_batch_size: int = 2048


@dataclass
class HeldOut:
    """The held-out samples of one stage.

    Attributes:
        pairs: Source and target of each condition, in random order.
        again: Training samples of each target, as many as are held out where there are; ``None`` for a condition that
            is not trained on.
        codes: Places of the conditions among the names.
        titles: What messages call each pair.
    """

    pairs: list[tuple[FiniteSamples, FiniteSamples]]
    again: list[Tensor | None]
    codes: list[int]
    titles: list[str]


@dataclass
class Predicted:
    """Raw samples of the source.

    Attributes:
        samples: ``(n, d)`` samples.
        rows: Rows to map, one after another.
        codes: Places of their conditions among the names, or ``None`` without conditions.
    """

    samples: Tensor
    rows: Tensor
    codes: Tensor | None


@dataclass
class Prepared:
    """Everything that batches are drawn from, in encoded space but for what is predicted.

    Attributes:
        dim: Dimension of the batches.
        features: Names of the raw features, where they have names.
        representation: Change of coordinates, or ``None``.
        batch_size: Samples of each side and condition in a batch, which may have shrunk.
        names: Names of the conditions, empty without conditions.
        vectors: ``(K, p)`` vectors of the named conditions, or ``None``.
        train: Source and target of each condition that is trained on.
        codes: Places of these conditions among the names.
        held_out: What is held out for each stage that has something.
        predicted: What is mapped in prediction.
    """

    dim: int
    features: tuple[str, ...] | None
    representation: AffineRepresentation | None
    batch_size: int
    names: tuple[str, ...]
    vectors: Tensor | None
    train: list[tuple[Population, Population]]
    codes: list[int]
    held_out: dict[str, HeldOut]
    predicted: Predicted


class Encoding:
    """Takes samples to the precision and the coordinates of the batches, by a representation of its own."""

    def __init__(self, representation: AffineRepresentation | None, dtype: torch.dtype) -> None:
        # A copy: the model takes the original with it to its device.
        self.representation = deepcopy(representation)
        self.dtype = dtype

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Tensor:
        if self.representation is None:
            return samples.to(self.dtype)
        return self.representation.encode(samples.to(self.representation.mean.device, self.dtype))


def prepare(given: Given, explicit: Mapping[str, tuple[Side, Side]], request: Request) -> Prepared:
    """Split, choose conditions, fit the representation, and return what batches are drawn from.

    Args:
        given: The source and the target.
        explicit: Sides of ``"val"`` and ``"test"`` that were given apart.
        request: What is asked for.

    Raises:
        ValueError: Something does not fit; the message names it and the remedy.
    """
    stages = _stages(given, explicit, request)
    sides = [side for pair in stages.values() for side, _ in pair]
    dim, dtype = _common_space(sides)
    drawn = [stage for stage in stages if stage not in explicit]
    reserved = request.eval_batch_size * (len(drawn) - 1)
    representation = _fitted(stages["train"], request, reserved, dtype)
    make = _Maker(request, Encoding(representation, dtype), drawn, reserved)
    populations = {
        stage: [make.populations(stage, i, side, rows) for i, (side, rows) in enumerate(pair)]
        for stage, pair in stages.items()
    }
    names = condition_names(side.conditions for side in sides if isinstance(side, Side))
    trained, batch_size = _trained(populations["train"], names, request)
    found = {stage: _held_out_pairs(stage, populations[stage], names, trained, request) for stage in stages}
    del found["train"]
    names = tuple(name for name in names if name in trained or any(name in pairs for pairs in found.values()))
    place: dict[str | None, int] = {name: i for i, name in enumerate(names)}
    return Prepared(
        dim=dim if representation is None else representation.encoded_dim,
        features=next((side.features for side in given if isinstance(side, Side) and side.features), None),
        representation=representation,
        batch_size=batch_size,
        names=names,
        vectors=condition_vectors_of(request.condition_vectors, names, dtype)
        if request.condition_vectors is not None
        else None,
        train=list(trained.values()),
        codes=[place[name] for name in trained if name is not None],
        held_out={
            stage: HeldOut(
                pairs=list(pairs.values()),
                again=[make.again(stage, trained[name][1], len(pair[1])) if name in trained else None
                       for name, pair in pairs.items()],
                codes=[place[name] for name in pairs if name is not None],
                titles=[_title(stage, name) for name in pairs],
            )
            for stage, pairs in found.items()
        },
        predicted=_predicted(given[0], place, request, dtype),
    )  # fmt: skip


class _Maker:
    """Makes populations of sides and rows."""

    def __init__(self, request: Request, encoding: Encoding, stages: Sequence[str], reserved: int) -> None:
        self.request = request
        self.encoding = encoding
        self.reserved = reserved
        self.stages = stages
        self._encoded: dict[int, tuple[Tensor, Tensor | None]] = {}

    def populations(self, stage: str, i: int, side: Side | Endless, rows: Array) -> ByName:
        """Return the samples of a side in a stage by condition."""
        if not isinstance(side, Side):
            if stage == "train":
                # Refuse now a stream of which nothing is left.
                side.raw(1, generator(self.request.rule.seed, _FIT), skip=self.reserved)
                return {None: side.trained_on(self.encoding, self.reserved)}
            size = self.request.eval_batch_size
            draws = generator(self.request.rule.seed, _HELD_OUT, _STAGES.index(stage), i)
            raw = side.raw(size, draws, skip=size * (self.stages.index(stage) - 1))
            images = None if side.true_map is None else self.encoding(map_images(side.argument, side.true_map, raw))
            return {None: FiniteSamples(self.encoding(raw), None, images)}
        if side.conditions is None:
            return {None: self._of_rows(side, rows)}
        names = side.conditions[rows]
        return {str(name): self._of_rows(side, rows[names == name]) for name in np.unique(names)}

    def again(self, stage: str, target: Population, size: int) -> Tensor:
        """Return encoded training samples of a target, the same for every process."""
        draws = generator(self.request.rule.seed, _AGAIN, _STAGES.index(stage))
        if not isinstance(target, FiniteSamples):
            assert isinstance(target, Endless)
            return self.encoding(target.raw(size, draws, skip=self.reserved))
        if target.weights is not None:
            # Weights are not carried with them: these are drawn by them.
            rows = torch.multinomial(target.weights.cpu(), size, replacement=True, generator=draws)
        else:
            rows = torch.randperm(len(target), generator=draws, device="cpu")[:size]
        return target.samples[rows.to(target.samples.device)]

    def _of_rows(self, side: Side, rows: Array) -> FiniteSamples:
        if id(side) not in self._encoded:
            images = None if side.images is None else self.encoding(side.images)
            self._encoded[id(side)] = self.encoding(side.samples), images
        samples, images = self._encoded[id(side)]
        index = torch.from_numpy(rows).to(samples.device)
        weights = None if side.weights is None else side.weights.to(samples)[index]
        return FiniteSamples(samples[index], weights, None if images is None else images[index])


def _stages(
    given: Given, explicit: Mapping[str, tuple[Side, Side]], request: Request
) -> dict[str, list[tuple[Side | Endless, Array]]]:
    """Return the sides of each stage that is wanted, with their rows in random order."""
    rule = request.rule
    split = [_split(side, rule, i, request.small_conditions != "drop") for i, side in enumerate(given)]
    wanted = ["train", *(stage for stage in _STAGES if rule.holds_out(stage))]
    stages = {stage: [(side, rows[stage]) for side, rows in zip(given, split, strict=True)] for stage in wanted}
    for stage, pair in explicit.items():
        whole = SplitRule(0.0, 0.0, seed=rule.seed + 1 + _STAGES.index(stage))
        stages[stage] = [(side, _split(side, whole, i, strict=True)["train"]) for i, side in enumerate(pair)]
    return stages


def _split(side: Side | Endless, rule: SplitRule, number: int, strict: bool) -> dict[str, Array]:
    if not isinstance(side, Side):
        return dict.fromkeys(("train", *_STAGES), np.empty(0, np.int64))
    n = len(side.samples)
    strata = np.zeros(n, np.int64) if side.conditions is None else np.unique(side.conditions, return_inverse=True)[1]
    usable = np.ones(n, dtype=bool) if side.weights is None else (side.weights > 0).cpu().numpy()
    return split_rows(side.title, strata, side.groups, usable, rule, number, strict=strict)


def _common_space(sides: Sequence[Side | Endless]) -> tuple[int, torch.dtype]:
    """Check that all sides have one dimension, and return it with their highest precision."""
    dtypes, first = [], ("", 0)
    for side in sides:
        title, samples = (
            (side.title, side.samples) if isinstance(side, Side) else (side.argument, side.raw(2, generator(0, _FIT)))
        )
        first = first if first[0] else (title, samples.shape[1])
        if samples.shape[1] != first[1]:
            raise ValueError(f"{first[0]} has dimension {first[1]} but {title} has {samples.shape[1]}: they must agree")
        dtypes.append(samples.dtype)
    return first[1], torch.float64 if torch.float64 in dtypes else torch.float32


def _fitted(
    train: Sequence[tuple[Side | Endless, Array]], request: Request, reserved: int, dtype: torch.dtype
) -> AffineRepresentation | None:
    """Return the representation of the training rows of both sides, if one is asked for."""
    if not request.standardize and request.components is None:
        return None
    samples = [
        side.samples[torch.from_numpy(rows).to(side.samples.device)]
        if isinstance(side, Side)
        else side.raw(_MANY, generator(request.rule.seed, _FIT, i), skip=reserved)
        for i, (side, rows) in enumerate(train)
    ]
    return AffineRepresentation.fit(
        torch.cat([part.to(samples[0].device, dtype) for part in samples]),
        standardize=request.standardize,
        components=request.components,
    )


def _by_name(populations: Sequence[ByName], name: str | None) -> list[Population | None]:
    return [by.get(name, by.get(None)) for by in populations]


def _size(population: Population | None) -> float:
    return len(population) if isinstance(population, FiniteSamples) else 0 if population is None else math.inf


def _trained(
    populations: Sequence[ByName], names: Sequence[str], request: Request
) -> tuple[dict[str | None, tuple[Population, Population]], int]:
    """Return the pairs of the conditions that are trained on, and the batch size."""
    pairs: dict[str | None, tuple[Population, Population]] = {}
    small: dict[str | None, tuple[float, float]] = {}
    batch_size = request.batch_size
    for name in names or (None,):
        source, target = _by_name(populations, name)
        sizes = _size(source), _size(target)
        labelled = [size for size, by in zip(sizes, populations, strict=True) if None not in by]
        if labelled and not any(labelled):
            # No row of it is trained on. Labels of such a condition would mean nothing to a map; vectors do.
            if request.condition_vectors is None and request.small_conditions != "drop":
                raise ValueError(
                    f"condition {name!r} has no training samples: a map learns nothing of its label; give "
                    "condition_vectors, hold out less, or leave it out by small_conditions='drop'"
                )
            if request.condition_vectors is None:
                small[name] = sizes
            continue
        if min(sizes) < batch_size:
            small[name] = sizes
        if min(sizes) > 0:
            assert source is not None
            assert target is not None
            pairs[name] = source, target
    if small:
        batch_size = _settle(pairs, small, request)
    return pairs, batch_size


def _settle(
    pairs: dict[str | None, tuple[Population, Population]],
    small: Mapping[str | None, tuple[float, float]],
    request: Request,
) -> int:
    """Refuse, drop, or shrink the batch for what is smaller than a batch; return the batch size."""
    empty = [name for name, sizes in small.items() if min(sizes) < 1]
    least = int(min(min(sizes) for sizes in small.values()))
    if None in small:
        source, target = (f"{size:.0f}" if size < math.inf else "endless" for size in small[None])
        if (request.small_conditions == "shrink" or request.default_batch) and least > 0:
            default = "the default " if request.default_batch else ""
            rank_zero_warn(f"{default}batch_size={request.batch_size} shrinks to {least}, the smaller training set")
            return least
        raise ValueError(
            f"batch_size={request.batch_size} is larger than the training split ({source} source and {target} target "
            f"samples): use batch_size <= {least}, or hold out less"
        )
    listed = ", ".join(f"{name!r} ({a:.0f} source, {b:.0f} target)" for name, (a, b) in list(small.items())[:8])
    listed += ", ..." if len(small) > 8 else ""
    if request.small_conditions == "drop":
        for name in small:
            pairs.pop(name, None)
        if not pairs:
            raise ValueError(f"all conditions are smaller than batch_size={request.batch_size}: {listed}")
        rank_zero_warn(
            f"conditions with fewer than batch_size={request.batch_size} training samples are left out: {listed}"
            + ("; prediction leaves their rows out too" if request.condition_vectors is None else "")
        )
        return request.batch_size
    if empty:
        a, b = small[empty[0]]
        raise ValueError(
            f"condition {empty[0]!r} has {a:.0f} source and {b:.0f} target training samples: it must be on both sides; "
            "leave it out, or give small_conditions='drop'"
        )
    if request.small_conditions == "shrink" or request.default_batch:
        default = "the default " if request.default_batch else ""
        rank_zero_warn(
            f"{default}batch_size={request.batch_size} shrinks to {least}, because of {listed}"
            + ("; small_conditions='drop' leaves small ones out" if request.default_batch else "")
        )
        return least
    raise ValueError(
        f"batch_size={request.batch_size} is larger than the training samples of the conditions {listed}: "
        f"use batch_size <= {least}, or small_conditions='drop' or 'shrink'"
    )


def _held_out_pairs(
    stage: str,
    populations: Sequence[ByName],
    names: Sequence[str],
    trained: Mapping[str | None, Any],
    request: Request,
) -> dict[str | None, tuple[FiniteSamples, FiniteSamples]]:
    """Return the held-out pairs of the conditions that have some on both sides."""
    pairs: dict[str | None, tuple[FiniteSamples, FiniteSamples]] = {}
    if stage == "train":
        return pairs
    one_sided = []
    for name in names or (None,):
        source, target = _by_name(populations, name)
        if not isinstance(source, FiniteSamples) or not isinstance(target, FiniteSamples):
            one_sided += [name] if source is not None or target is not None else []
            continue
        if name not in trained and request.condition_vectors is None:
            continue
        if len(source) and len(target):
            pairs[name] = source, target
        else:
            one_sided.append(name)
    if not pairs:
        groups = getattr(request.rule, f"{stage}_groups")
        what = f"the groups {', '.join(map(repr, groups))} hold" if groups else "there is"
        raise ValueError(f"{stage}: {what} nothing of both source and target: hold out other samples")
    if one_sided:
        listed = ", ".join(map(repr, one_sided))
        rank_zero_info(f"{stage}: the conditions {listed} are held out on one side only, and are left out of scores")
    return pairs


def _title(stage: str, name: str | None) -> str:
    return f"the {stage} split" + ("" if name is None else f" of condition {name!r}")


def _predicted(
    source: Side | Endless, place: Mapping[str | None, int], request: Request, dtype: torch.dtype
) -> Predicted:
    """Return the raw source; without labels it goes under every condition in turn."""
    if isinstance(source, Side):
        samples, labels = source.samples.to(dtype), source.conditions
    else:
        samples, labels = source.raw(request.eval_batch_size, generator(request.rule.seed, _PREDICT)).to(dtype), None
    rows = torch.arange(len(samples), device="cpu")
    if not place:
        return Predicted(samples, rows, None)
    if labels is None:
        codes = torch.arange(len(place), device="cpu").repeat_interleave(len(rows))
        return Predicted(samples, rows.repeat(len(place)), codes)
    codes = torch.tensor([place.get(str(name), -1) for name in labels], device="cpu")
    return Predicted(samples, rows[codes >= 0], codes[codes >= 0])
