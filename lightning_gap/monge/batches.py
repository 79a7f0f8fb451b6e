"""What a training, validation or test step of a map is given."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["UnpairedBatch", "shuffled"]


class UnpairedBatch(NamedTuple):
    """Samples of a source and of a target, which have nothing to do with each other row by row.

    Under data parallelism a batch is this process's part of the global batch: joined by rank, samples and weights are
    those of one process at the same global batch size.

    Attributes:
        source: ``(n, d)`` samples, or ``(K, n, d)`` for K conditions.
        target: ``(m, d)`` samples, or ``(K, m, d)``.
        source_weights: ``(n,)`` or ``(K, n)`` weights, which sum to 1 in each condition of the global batch; ``None``
            where all samples count the same.
        target_weights: ``(m,)`` or ``(K, m)`` weights, likewise.
        condition: ``(K,)`` labels (int64), or ``(K, p)`` vectors; ``None`` without conditions.
        true_images: Images of ``source`` under a known map, of its shape, or ``None``.
        target_again: Further samples of the target, from those that are trained on: their distance to ``target`` is
            the floor of every score. Only in validation and test batches.

    Example:
        >>> import torch
        >>> batch = UnpairedBatch(torch.zeros(4, 2), torch.ones(3, 2))
        >>> batch.target.shape, batch.condition
        (torch.Size([3, 2]), None)
    """

    source: Tensor
    target: Tensor
    source_weights: Tensor | None = None
    target_weights: Tensor | None = None
    condition: Tensor | None = None
    true_images: Tensor | None = None
    target_again: Tensor | None = None


def shuffled(n: int, rows: int, generator: torch.Generator) -> Tensor:
    """Return ``rows`` row numbers out of ``n``: permutations, one after another.

    Args:
        n: Rows there are.
        rows: Rows that are wanted.
        generator: Makes the permutations.
    """
    permutations = [torch.randperm(n, generator=generator) for _ in range(-(-rows // n))]
    return torch.cat(permutations)[:rows]
