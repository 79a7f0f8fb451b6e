"""Several ranks in one process, one after another."""

from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from lightning_gap.ranks.group import RankGroup

Result = TypeVar("Result")


class RecordedRanks(RankGroup):
    """A group whose ranks take turns; each is given what the others have said in the last round.

    What a rank says in its k-th call depends on the calls before. So after as many rounds as there are calls, all that
    is said is right, and a last round has the results.
    """

    def __init__(self, size: int) -> None:
        self.group, self.size = None, size
        self.said: dict[int, dict[int, Tensor]] = defaultdict(dict)
        self.rank = self.calls = 0

    def each(self, of_rank: Callable[[int], Result], calls: int) -> list[Result]:
        """Return the results of all ranks of a function that makes so many collective calls."""
        for _ in range(calls + 1):
            results = []
            for rank in range(self.size):
                self.rank, self.calls = rank, 0
                results.append(of_rank(rank))
                assert self.calls == calls
        return results

    def gather(self, value: Tensor) -> Tensor:
        """Return the values of all ranks."""
        said = self.said[self.calls]
        said[self.rank] = value.detach().clone()
        self.calls += 1
        return torch.stack([said.get(rank, said[self.rank]) for rank in range(self.size)])

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over all ranks."""
        return self.gather(value).sum(0)
