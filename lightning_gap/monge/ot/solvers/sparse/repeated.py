"""Samples that occur several times: solved as one, of their common mass, which a plan is then split among."""

import torch
from torch import Tensor

__all__ = ["Distinct", "split"]


class Distinct:
    """The distinct ones of some samples.

    Args:
        points: ``(n, d)`` samples.
        masses: ``(n,)`` whole numbers, on the CPU.

    Attributes:
        points, masses: Of the distinct ones.
        which: ``(n,)`` which of these each sample is.
    """

    def __init__(self, points: Tensor, masses: Tensor) -> None:
        self.given = masses
        self.points, which = torch.unique(points, dim=0, return_inverse=True)
        self.which = which.cpu()
        if len(self.points) == len(points):
            self.points, self.masses, self.which = points, masses, torch.arange(len(points))
        else:
            self.masses = masses.new_zeros(len(self.points)).index_add_(0, self.which, masses)


def split(side: Distinct, of: Tensor, masses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split entries of a plan among the samples that each of them is of.

    Args:
        side: The samples, and the distinct ones.
        of: ``(k,)`` which of the distinct ones an entry is of.
        masses: ``(k,)`` whole numbers, which sum to the masses of the distinct ones.

    Returns:
        Of each part the entry that it is of, the sample that has it, and its mass.
    """
    order, members = of.argsort(stable=True), side.which.argsort(stable=True)
    # Both cut the whole mass into pieces, sample by distinct sample.
    entry_ends, member_ends = masses[order].cumsum(0), side.given[members].cumsum(0)
    ends = torch.cat([entry_ends, member_ends]).unique()
    ends = ends[ends > 0]
    parts = ends.diff(prepend=ends.new_zeros(1))
    return order[torch.searchsorted(entry_ends, ends)], members[torch.searchsorted(member_ends, ends)], parts
