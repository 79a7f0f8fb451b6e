"""Some of the rows, the same in each run."""

import torch
from torch import Tensor

__all__ = ["fixed_rows"]


def fixed_rows(size: int, most: int) -> Tensor | None:
    """Return the first of the row numbers in a fixed permutation; ``None`` where there are no more than ``most``.

    Example:
        >>> fixed_rows(3, 3) is None, len(fixed_rows(100, 3))
        (True, 3)
    """
    if size <= most:
        return None
    return torch.randperm(size, generator=torch.Generator().manual_seed(0), device="cpu")[:most]
