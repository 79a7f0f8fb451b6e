"""What batches are drawn from, and what there is of it to see."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_gap.monge.samples.batches import Predicted
from lightning_gap.monge.samples.draws import FiniteSamples, Part, Population, Turn
from lightning_gap.monge.samples.splits import generator
from lightning_gap.monge.samples.standardize import AffineRepresentation

__all__ = ["HeldOut", "Prepared", "Split"]

P = TypeVar("P", bound=Population)

_ENDLESS_STEPS = 100
_START = 20  # first entry of the key of random draws


class Split(NamedTuple):
    """Samples of a stage: ``(n, d)`` of the source, ``(m, d)`` of the target."""

    source: Tensor
    target: Tensor


@dataclass
class HeldOut:
    """The held-out samples of one stage."""

    pairs: list[tuple[FiniteSamples, FiniteSamples]]  # of each condition, in random order
    again: list[Tensor | None]  # training samples of each target, as many; None if not trained on
    conditions: Tensor | None  # (K,) labels or (K, p) vectors of the pairs
    titles: list[str]  # how messages call each pair


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
    conditions: Tensor | None  # labels or vectors of these
    held_out: dict[str, HeldOut]  # by stage
    predicted: Predicted

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
