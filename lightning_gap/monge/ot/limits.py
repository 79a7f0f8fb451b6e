"""Sizes that depend on the machine: what stays in a CPU's cache, and what fills a GPU."""

from typing import NamedTuple

import torch

__all__ = ["LIMITS", "STRIDE", "Limits", "Size"]

# Every which point of a side a coarser problem has.
STRIDE = 4


class Size(NamedTuple):
    """A number for a CPU, and one for other devices."""

    cpu: int
    other: int

    def on(self, device: torch.device) -> int:
        """Return the number for a device."""
        return self.cpu if device.type == "cpu" else self.other


class Limits:
    """Sizes in numbers of a matrix, but for the last three; :data:`LIMITS` are those in use."""

    # Differences x_i - y_j that are formed at once; a GPU wants few and large blocks.
    differences = Size(1 << 22, 1 << 27)
    # Likewise, where they should stay in a CPU's cache.
    cached = Size(1 << 18, 1 << 27)
    # A block of rows of a kernel.
    block = Size(1 << 20, 1 << 26)
    # What is sorted at once: features come by the thousand, and double takes twice their memory.
    sorted = 1 << 22
    # Matrices that are solved together; more of them would fall out of a CPU's cache.
    together = Size(1 << 21, 1 << 27)
    # A kernel matrix that is kept in memory.
    dense = Size(1 << 24, 1 << 28)
    # A matrix of an exact plan, beyond which pairs that are nearly tight are quicker: of an assignment, and of others.
    exact, exact_program = 1 << 19, 1 << 24
    # Points up to which problems anneal epsilon; larger ones start from every fourth of their points. On a GPU a sweep
    # of few points takes as long as one of some thousand.
    coarsest = Size(256, 4096)
    # Bytes of matrices that are not worth asking the system for its free memory.
    small_bytes = 1 << 28
    # Types of devices whose vectors are NumPy's.
    numpy = frozenset({"cpu"})


LIMITS = Limits()
