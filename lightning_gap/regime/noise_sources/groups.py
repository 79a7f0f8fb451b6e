"""Which examples of a micro-batch have a gradient together: one by one, or those that are normalized together."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Block", "Groups"]

# Elements that are worked on at once: what stays in a cache, and is not new memory each time.
_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Block:
    """Some groups of equal size, by the places of their examples, (groups, size)."""

    places: Tensor
    start: int | None  # where the places are start, start + 1, ...

    @property
    def count(self) -> int:
        """How many groups."""
        return self.places.shape[0]

    @property
    def size(self) -> int:
        """Examples in each group."""
        return self.places.shape[1]

    def take(self, values: Tensor, first: int, last: int) -> Tensor:
        """Return the rows of the groups first .. last - 1 of (examples, ...), a group's after each other."""
        if self.start is not None:
            return values[self.start + first * self.size : self.start + last * self.size]
        return values.index_select(0, self.places[first:last].flatten().to(values.device))


@dataclass(frozen=True)
class Groups:
    r"""A partition of the examples of a micro-batch into those whose gradients are defined by themselves.

    Example:
        >>> groups = Groups.of(10, [slice(0, 4), slice(4, 8), slice(8, 10)])
        >>> groups.count, groups.small_batch  # 1 / mean(1/4, 1/4, 1/2)
        (3, 3.0)
        >>> Groups.of(10).small_batch
        1.0
    """

    examples: int
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, examples: int, slices: Sequence[slice] | None = None) -> "Groups":
        """Return the groups that slices of the examples make; by default each example is one.

        Args:
            examples: In the micro-batch.
            slices: One for each group; together they hold each example once.

        Raises:
            ValueError: If they do not.
        """
        if slices is None:
            return cls(examples, (Block(torch.arange(examples)[:, None], 0),))
        members = [range(examples)[each] for each in slices]
        if sorted(place for group in members for place in group) != list(range(examples)):
            raise ValueError(f"groups={list(slices)} must hold each of the {examples} examples once")
        by_size: dict[int, list[range]] = {}
        for group in members:
            by_size.setdefault(len(group), []).append(group)
        return cls(examples, tuple(_block(torch.tensor([list(g) for g in same])) for same in by_size.values()))

    def drawn(self, examples: int, seed: int) -> "Groups":
        """Return some groups that have about so many examples, drawn at random, at least one; no generator is touched.

        Example:
            >>> Groups.of(64).drawn(8, seed=0).count, Groups.of(8).drawn(8, seed=0).count
            (8, 8)
        """
        wanted = max(1, round(examples * self.count / self.examples))
        if wanted >= self.count:
            return self
        chosen = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed))[:wanted].sort().values
        blocks, first = [], 0
        for block in self.blocks:
            own = chosen[(chosen >= first) & (chosen < first + block.count)] - first
            first += block.count
            if len(own):
                blocks.append(_block(block.places[own]))
        return Groups(self.examples, tuple(blocks))

    @property
    def count(self) -> int:
        """How many groups there are."""
        return sum(block.count for block in self.blocks)

    @property
    def small_batch(self) -> float:
        r"""The batch size whose gradient varies as a group's does on average: 1 / mean(1 / size)."""
        return self.count / sum(block.count / block.size for block in self.blocks)

    def chunks(self, elements: Callable[[int], int]) -> Iterator[tuple[Block, int, int]]:
        """Yield stretches of groups that are worked on at once, of so many elements for a group of a size."""
        for block in self.blocks:
            together = max(1, _AT_ONCE // max(1, elements(block.size)))
            for first in range(0, block.count, together):
                yield block, first, min(block.count, first + together)


def _block(places: Tensor) -> Block:
    start = int(places[0, 0])
    ordered = torch.equal(places.flatten(), torch.arange(start, start + places.numel()))
    return Block(places, start if ordered else None)
