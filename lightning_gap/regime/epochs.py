"""The arithmetic of epochs and updates."""

import math
from fractions import Fraction

__all__ = ["share_of", "updates_in_epoch"]


def share_of(train_longer: float) -> Fraction:
    """Return the share that was written: 1/10 for 0.1, which no binary number is.

    Example:
        >>> share_of(0.1), share_of(1.0)
        (Fraction(1, 10), Fraction(1, 1))
    """
    return Fraction(repr(float(train_longer)))


def updates_in_epoch(samples: int, batch_size: int, *, drop_last: bool = False) -> int:
    """Return how many batches one pass over the samples gives: ⌈N/B⌉, or ⌊N/B⌋ where the last is dropped.

    Example:
        >>> updates_in_epoch(50_000, 128), updates_in_epoch(50_000, 4096), updates_in_epoch(50_000, 128, drop_last=True)
        (391, 13, 390)
    """
    return samples // batch_size if drop_last else math.ceil(samples / batch_size)
