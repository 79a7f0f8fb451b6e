"""Sizes that depend on the machine: what stays in a CPU's cache, and what fills a GPU."""

from typing import NamedTuple

import torch

__all__ = ["LIMITS", "Limits", "Size"]


class Size(NamedTuple):
    """A number for a CPU, and one for other devices."""

    cpu: int
    other: int

    def on(self, device: torch.device) -> int:
        """Return the number for a device."""
        return self.cpu if device.type == "cpu" else self.other


class Limits:
    """Sizes in numbers of a matrix, but for the last three; :data:`LIMITS` are those in use.

    Attributes:
        differences: Differences ``x_i - y_j`` that are formed at once; a GPU wants few and large blocks.
        cached: Likewise, where they should stay in a CPU's cache.
        block: Numbers of a block of rows of a kernel.
        sorted: Numbers that are sorted at once: features come by the thousand, and double takes twice their memory.
        together: Numbers of the matrices that are solved together; more of them would fall out of a CPU's cache.
        dense: Numbers of a kernel matrix that is kept in memory.
        coarsest: Points up to which problems anneal epsilon; larger ones start from every fourth of their points. On a
            GPU a sweep of few points takes as long as one of some thousand.
        small_bytes: Bytes of matrices that are not worth asking the system for its free memory.
        numpy: Types of devices whose vectors are NumPy's.
    """

    differences = Size(1 << 22, 1 << 27)
    cached = Size(1 << 18, 1 << 27)
    block = Size(1 << 20, 1 << 26)
    sorted = 1 << 22
    together = Size(1 << 21, 1 << 27)
    dense = Size(1 << 24, 1 << 28)
    coarsest = Size(256, 4096)
    small_bytes = 1 << 28
    numpy = frozenset({"cpu"})


LIMITS = Limits()
