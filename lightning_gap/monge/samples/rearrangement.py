"""Prepared samples with their features, or the vectors of their conditions, as the map has them."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_gap.monge.samples.condition_encoding import ConditionEncoding
from lightning_gap.monge.samples.draws import FiniteSamples, Population
from lightning_gap.monge.samples.features import listed
from lightning_gap.monge.samples.prepare import Prepared
from lightning_gap.monge.samples.standardize import AffineRepresentation

__all__ = ["with_encoding", "with_features"]


def with_encoding(prepared: Prepared, encoding: ConditionEncoding) -> Prepared:
    """Return the same samples with the vectors of their conditions by another encoding of the same columns."""
    combinations, vectors = prepared.combinations, prepared.vectors
    if combinations is None or vectors is None or encoding.names != combinations.columns:
        mine = "no columns" if combinations is None else listed(combinations.columns)
        raise ValueError(f"the conditions of the data have {mine}, and those of the map {listed(encoding.names)}")
    vectors = encoding.encode([combinations.of[name] for name in prepared.names]).to(vectors)
    return replace(
        prepared,
        encoding=encoding,
        vectors=vectors,
        held_out={stage: replace(held_out, vectors=vectors) for stage, held_out in prepared.held_out.items()},
        predicted=replace(prepared.predicted, vectors=vectors),
    )


def with_features(prepared: Prepared, places: NDArray[Any]) -> Prepared:
    """Return the same samples with other columns of the raw features; the given ones stay as they are."""
    representation = prepared.representation
    components = representation is not None and representation.components is not None
    if components and len(places) < len(prepared.features or ()):
        raise ValueError(
            "the principal components of the data are of further features than the map's: name the map's features by "
            "SamplesDataModule(columns=...)"
        )
    raw = _Chosen(places)
    # Coordinates along components do not depend on the features' order.
    choose = None if components else raw
    made: dict[int, Population] = {}

    def population(given: Any) -> Any:
        if choose is None:
            return given
        if id(given) not in made:
            made[id(given)] = (
                given.with_features(choose)
                if isinstance(given, FiniteSamples)
                else given.trained_on(_Chosen(places, given.encode), getattr(given, "reserved", 0))
            )
        return made[id(given)]

    return replace(
        prepared,
        dim=prepared.dim if components else len(places),
        features=None if prepared.features is None else tuple(prepared.features[i] for i in places),
        representation=None if representation is None else _of_chosen(representation, raw),
        train=[(population(source), population(target)) for source, target in prepared.train],
        held_out={
            stage: replace(
                held_out,
                pairs=[(population(source), population(target)) for source, target in held_out.pairs],
                again=[further if further is None or choose is None else choose(further) for further in held_out.again],
            )
            for stage, held_out in prepared.held_out.items()
        },
        predicted=replace(prepared.predicted, samples=raw(prepared.predicted.samples)),
    )


def _of_chosen(representation: AffineRepresentation, choose: "_Chosen") -> AffineRepresentation:
    """Return the representation of the chosen features."""
    components = representation.components
    made = AffineRepresentation(len(choose.places), None if components is None else len(components))
    made.load_state_dict({name: choose(buffer) for name, buffer in representation.state_dict().items()}, assign=True)
    return made


class _Chosen:
    """Takes columns of samples, as they are or of what a function makes of them."""

    def __init__(self, places: NDArray[Any], first: Any = None) -> None:
        self.places = torch.from_numpy(np.array(places))
        self.first = first

    def __call__(self, samples: Tensor) -> Tensor:
        made: Tensor = samples if self.first is None else self.first(samples)
        return made[..., self.places.to(made.device)]
