"""Kernels of ghost batch normalization: one partition of a batch, several ways to normalize over it.

A partition is a list of *runs*: stretches of the batch that hold equal ghosts. In eager mode a run goes to one of four
kernels, which all write into one output and give the same numbers: in one visit, by C++ of this package, where a CPU's
batch is worth it and something compiles it; else by torch's kernels, one by one, side by side, or as channels.

``torch.compile`` takes these kernels as one operator for images on a CPU, and for many features. Other inputs get the
defining formula, which compilers fuse; so do ``torch.export``, other devices, transforms of ``torch.func`` and
forward-mode differentiation. Ghosts that span ranks are kernels of their own, with one collective forward and one
backward. Running statistics are averaged beside them.
"""

from lightning_gap.ghost.kernels.averages import average_in_place, weights_of_ghosts
from lightning_gap.ghost.kernels.dispatch import normalize
from lightning_gap.ghost.kernels.formula import looks_into_operations
from lightning_gap.ghost.kernels.layout import Limits, Maybe, Run
from lightning_gap.ghost.kernels.over_ranks import normalize_over_ranks

__all__ = [
    "Limits",
    "Maybe",
    "Run",
    "average_in_place",
    "looks_into_operations",
    "normalize",
    "normalize_over_ranks",
    "weights_of_ghosts",
]
