"""From what was given to what batches are drawn from: splits, conditions and representation put together."""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_gap.monge.samples.batches import HeldOut, Predicted
from lightning_gap.monge.samples.combinations import Combinations
from lightning_gap.monge.samples.condition_columns import encoding_of
from lightning_gap.monge.samples.condition_encoding import ConditionEncoding
from lightning_gap.monge.samples.conditions import ByName, condition_vectors_of, held_out_pairs, trained_pairs
from lightning_gap.monge.samples.draws import Endless, FiniteSamples, Part, Population, Turn, generator
from lightning_gap.monge.samples.given import Side
from lightning_gap.monge.samples.held_conditions import combinations_of, names_of, rows_of_held
from lightning_gap.monge.samples.splits import Given, Request, SplitRule, split_rows
from lightning_gap.monge.samples.standardize import AffineRepresentation

__all__ = ["Prepared", "Split", "prepare"]

Array = NDArray[Any]
P = TypeVar("P", bound=Population)

_STAGES = ("val", "test")
# First entries of the keys of random draws, besides those of the training batches.
_HELD_OUT, _AGAIN, _FIT, _PREDICT, _START = 10, 11, 12, 13, 20
# Samples that stand for an endless population where the representation is fitted.
_MANY = 8192
_ENDLESS_STEPS = 100


class Split(NamedTuple):
    """Samples of a stage: ``(n, d)`` of the source, ``(m, d)`` of the target."""

    source: Tensor
    target: Tensor


@dataclass
class Prepared:
    """Everything that batches are drawn from, in encoded space but for what is predicted.

    Methods that ask for a ``size`` take so many samples of an endless side, the same ones for the same seed.
    """

    dim: int  # of the batches
    features: tuple[str, ...] | None  # names of the raw ones
    representation: AffineRepresentation | None
    batch_size: int  # of each side and condition; it may have shrunk
    names: tuple[str, ...]  # of the conditions
    vectors: Tensor | None  # (K, p) of the named conditions
    train: list[tuple[Population, Population]]  # of each condition that is trained on
    places: Tensor  # of these among the names
    held_out: dict[str, HeldOut]  # by stage
    predicted: Predicted
    encoding: ConditionEncoding | None = None  # of conditions of named columns
    combinations: Combinations | None = None  # which these are

    @property
    def conditions(self) -> Tensor | None:
        """Labels or vectors of the conditions that are trained on."""
        return None if not self.names else self.places if self.vectors is None else self.vectors[self.places]

    @property
    def trained_combinations(self) -> list[tuple[str, ...]]:
        """Texts of the columns of the conditions that are trained on."""
        of = {} if self.combinations is None else self.combinations.of
        return [of[self.names[i]] for i in self.places.tolist()] if of else []

    @property
    def sizes(self) -> list[int]:
        """Sizes of the finite sets that are trained on."""
        return [len(x) for pair in self.train for x in pair if isinstance(x, FiniteSamples)]

    @property
    def endless(self) -> bool:
        """Whether a side is drawn anew for each batch."""
        return len(self.sizes) < 2 * len(self.train)

    def steps(self, size: int, per_batch: int | None) -> int:
        """Return the batches of one pass through the largest set, or some number where all are endless."""
        largest, conditions = max(self.sizes, default=0), len(self.train)
        return max(1, largest // size * conditions // (per_batch or conditions)) if largest else _ENDLESS_STEPS

    def _training_part(self, population: Population, side: int, seed: int, size: int) -> Part:
        """Return a finite set, or some samples of an endless one, the same ones each time."""
        if isinstance(population, FiniteSamples):
            return Part(population.samples, population.weights)
        return population.draw(Turn((seed, _START, side), 0, 0, 1, size, slice(None)))

    def training_pairs(self, seed: int, size: int) -> list[tuple[Part, Part]]:
        """Return the samples and weights of each condition in turn."""
        part = self._training_part
        return [(part(source, 0, seed, size), part(target, 1, seed, size)) for source, target in self.train]

    def training_samples(self, seed: int, size: int, most: int | None = None) -> tuple[Tensor, Tensor]:
        """Return all samples of each side, or ``most`` of each, of all conditions in random order."""
        sides = []
        for i in range(2):
            parts = [self._training_part(x, i, seed, size).samples for x in _distinct(self.train, i)]
            samples = torch.cat(parts)
            order = torch.randperm(len(samples), generator=generator(seed, _START, i), device="cpu")[:most]
            sides.append(samples[order.to(samples.device)])
        return sides[0], sides[1]

    def splits(self, seed: int, size: int) -> dict[str, Split]:
        """Return the samples of all stages, of all conditions."""
        parts = {"train": Split(*self.training_samples(seed, size))}
        for stage, held_out in self.held_out.items():
            sides = (torch.cat([x.samples for x in _distinct(held_out.pairs, i)]) for i in range(2))
            parts[stage] = Split(*sides)
        return parts


def _distinct(pairs: Sequence[tuple[P, P]], side: int) -> list[P]:
    """Return one side of pairs: one without labels is in the pair of every condition."""
    return list({id(pair[side]): pair[side] for pair in pairs}.values())


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
    """Split, choose conditions, fit the representation, and return what batches are drawn from."""
    combinations = combinations_of([*given, *(side for pair in explicit.values() for side in pair)])
    request = replace(request, encoded=combinations is not None)
    stages = _stages(given, explicit, request, combinations)
    sides = [side for pair in stages.values() for side, _ in pair]
    dim, dtype = _common_space(sides)
    # What an endless population yields first is held out, stage by stage.
    drawn = [stage for stage in stages if stage not in explicit]
    skipped = {stage: request.eval_batch_size * (k - 1) for k, stage in enumerate(drawn)}
    skipped["train"] = request.eval_batch_size * (len(drawn) - 1)
    representation = _fitted(stages["train"], request, skipped["train"], dtype)
    encoding = Encoding(representation, dtype)

    @cache
    def encoded(side: Side) -> tuple[Tensor, Tensor | None]:
        return encoding(side.samples), None if side.images is None else encoding(side.images)

    def populations(stage: str, number: int, side: Side | Endless, rows: Array) -> ByName:
        if not isinstance(side, Side):
            key = () if stage == "train" else (_STAGES.index(stage), number)
            return {None: _of_endless(side, key, skipped[stage], request, encoding)}
        if side.conditions is None:
            return {None: _of_rows(side, rows, *encoded(side))}
        labels = side.conditions[rows]
        by = {str(name): _of_rows(side, rows[labels == name], *encoded(side)) for name in np.unique(labels)}
        if combinations is not None and side.label_columns is not None:
            by = combinations.served(by, side.label_columns.names)
        return cast(ByName, by)

    found = {
        stage: [populations(stage, i, side, rows) for i, (side, rows) in enumerate(pair)]
        for stage, pair in stages.items()
    }
    names = names_of(sides, combinations)
    trained, batch_size = trained_pairs(found.pop("train"), names, request)
    if (request.conditions_per_batch or 0) > len(trained):
        raise ValueError(
            f"conditions_per_batch={request.conditions_per_batch} is more than the {len(trained)} conditions that are "
            f"trained on: use conditions_per_batch <= {len(trained)}"
        )
    held_out = {stage: held_out_pairs(stage, by_side, names, trained, request) for stage, by_side in found.items()}
    others = {stage: _halved(pairs, request.rule.conditions(stage)) for stage, pairs in held_out.items()}
    names = tuple(name for name in names if name in trained or any(name in pairs for pairs in held_out.values()))
    vectors, of_columns = None, None
    if request.condition_vectors is not None:
        vectors = condition_vectors_of(request.condition_vectors, names, dtype)
    elif combinations is not None:
        known = [name for name in names if name in trained], [name for name in names if name not in trained]
        of_columns = encoding_of(combinations, *known, request)
        vectors = of_columns.encode([combinations.of[name] for name in names]).to(dtype)
    place: dict[str | None, int] = {name: i for i, name in enumerate(names)}

    def places(chosen: Iterable[str | None]) -> Tensor:
        return torch.tensor([place[name] for name in chosen if name is not None], dtype=torch.long, device="cpu")

    def again(stage: str, name: str | None) -> Tensor | None:
        """Return encoded samples of a target that are not scored, the same for every process: trained ones."""
        draws = generator(request.rule.seed, _AGAIN, _STAGES.index(stage))
        target: Population | None = trained[name][1] if name in trained else others[stage].get(name)
        if target is None:
            return None
        size = len(held_out[stage][name][1])
        if isinstance(target, FiniteSamples):
            return target.chosen(size, draws)
        assert isinstance(target, Endless)
        return encoding(target.raw(size, draws, skip=skipped["train"]))

    return Prepared(
        dim=dim if representation is None else representation.encoded_dim,
        features=next((side.features for side in given if isinstance(side, Side) and side.features), None),
        representation=representation,
        batch_size=batch_size,
        names=names,
        vectors=vectors,
        train=list(trained.values()),
        places=places(trained),
        held_out={
            stage: HeldOut(
                pairs=list(pairs.values()),
                again=[again(stage, name) for name in pairs],
                places=places(pairs),
                vectors=vectors,
                titles=[f"the {stage} split" + ("" if name is None else f" of condition {name!r}") for name in pairs],
            )
            for stage, pairs in held_out.items()
        },
        predicted=replace(_predicted(given[0], place, combinations, request, dtype), vectors=vectors),
        encoding=of_columns,
        combinations=combinations,
    )  # fmt: skip


def _halved(
    pairs: dict[str | None, tuple[FiniteSamples, FiniteSamples]], names: Sequence[str]
) -> dict[str | None, FiniteSamples]:
    """Leave half of the targets of some conditions in their pairs, and return the other half, for the floor."""
    others: dict[str | None, FiniteSamples] = {}
    for name in names:
        if name in pairs and len(pairs[name][1]) > 1:
            source, target = pairs[name]
            target, others[name] = target.halves()
            pairs[name] = source, target
    return others


def _of_rows(side: Side, rows: Array, samples: Tensor, images: Tensor | None) -> FiniteSamples:
    """Return some rows of a side, which is encoded."""
    index = torch.from_numpy(rows).to(samples.device)
    weights = None if side.weights is None else side.weights.to(samples)[index]
    return FiniteSamples(samples[index], weights, None if images is None else images[index])


def _of_endless(side: Endless, key: tuple[int, ...], skip: int, request: Request, encoding: Encoding) -> Population:
    """Return what is trained on, or the samples that are held out for the stage and side of a key."""
    if not key:
        # Refuse now a stream of which nothing is left.
        side.raw(1, generator(request.rule.seed, _FIT), skip=skip)
        return side.trained_on(encoding, skip)
    raw = side.raw(request.eval_batch_size, generator(request.rule.seed, _HELD_OUT, *key), skip=skip)
    samples, _, images = side.trained_on(encoding, skip).part(raw)
    return FiniteSamples(samples, None, images)


def _stages(
    given: Given, explicit: Mapping[str, tuple[Side, Side]], request: Request, combinations: Combinations | None
) -> dict[str, list[tuple[Side | Endless, Array]]]:
    """Return the sides of each stage that is wanted, with their rows in random order."""
    rule = request.rule
    strict = request.small_conditions != "drop"
    split = [_split(side, rule, i, strict, combinations) for i, side in enumerate(given)]
    wanted = ["train", *(stage for stage in _STAGES if rule.holds_out(stage))]
    stages = {stage: [(side, rows[stage]) for side, rows in zip(given, split, strict=True)] for stage in wanted}
    for stage, pair in explicit.items():
        whole = SplitRule(0.0, 0.0, seed=rule.seed + 1 + _STAGES.index(stage))
        stages[stage] = [(side, _split(side, whole, i, strict=True)["train"]) for i, side in enumerate(pair)]
    return stages


def _split(
    side: Side | Endless, rule: SplitRule, number: int, strict: bool, combinations: Combinations | None = None
) -> dict[str, Array]:
    if not isinstance(side, Side):
        return dict.fromkeys(("train", *_STAGES), np.empty(0, np.int64))
    n = len(side.samples)
    strata = np.zeros(n, np.int64) if side.conditions is None else np.unique(side.conditions, return_inverse=True)[1]
    usable = np.ones(n, dtype=bool) if side.weights is None else (side.weights > 0).cpu().numpy()
    held, shared = rows_of_held(side, rule, combinations)
    return split_rows(side.title, strata, side.groups, usable, rule, number, strict=strict, held=held, shared=shared)


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


def _predicted(
    source: Side | Endless,
    place: Mapping[str | None, int],
    combinations: Combinations | None,
    request: Request,
    dtype: torch.dtype,
) -> Predicted:
    """Return the raw source, and which rows to map under which condition: without labels, under each in turn."""
    if isinstance(source, Side):
        samples, labels = source.samples.to(dtype), source.conditions
    else:
        samples, labels = source.raw(request.eval_batch_size, generator(request.rule.seed, _PREDICT)).to(dtype), None
    rows = torch.arange(len(samples), device="cpu")
    if not place:
        return Predicted(samples, rows)
    if labels is None:
        codes = torch.arange(len(place), device="cpu").repeat_interleave(len(rows))
        return Predicted(samples, rows.repeat(len(place)), codes)
    columns = source.label_columns if isinstance(source, Side) else None
    if combinations is not None and columns is not None and columns.names != combinations.columns:
        # Under each in turn of those that it serves.
        own = {name: combinations.own_name(name, columns.names) for name in place if name is not None}
        served = [torch.from_numpy(np.flatnonzero(labels == mine)) for mine in own.values()]
        codes = torch.arange(len(own), device="cpu").repeat_interleave(
            torch.tensor([len(part) for part in served], device="cpu")
        )
        return Predicted(samples, torch.cat(served), codes)
    codes = torch.tensor([place.get(str(name), -1) for name in labels], device="cpu")
    return Predicted(samples, rows[codes >= 0], codes[codes >= 0])
