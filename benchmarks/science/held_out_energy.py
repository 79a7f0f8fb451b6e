"""The energy distance of held-out images from held-out samples without bias, and how sure the difference of two is."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Difference", "difference", "unbiased_energy_distance"]


class Difference(NamedTuple):
    """What one map's energy distance exceeds another's by, and the standard error of that."""

    value: float
    error: float


def unbiased_energy_distance(x: Tensor, y: Tensor) -> float:
    """Return the U-statistic: its expectation is 0 for equal distributions, so it may be negative."""
    return 2 * float(_mean_to(x, y).mean()) - float(_mean_within(x).mean()) - float(_mean_within(y).mean())


def difference(ours: Tensor, theirs: Tensor, target: Tensor) -> Difference:
    """Return the difference of the energy distances of two maps' images of the same source samples.

    The standard error is that of the statistic's projection onto single samples, the images of a source sample under
    both maps taken together: it knows what the maps have in common.
    """
    n, m = len(ours), len(target)
    of_source = 2 * (_mean_to(ours, target) - _mean_to(theirs, target)) - 2 * (
        _mean_within(ours) - _mean_within(theirs)
    )
    of_target = 2 * (_mean_to(target, ours) - _mean_to(target, theirs))
    value = float(of_target.mean() - (_mean_within(ours) - _mean_within(theirs)).mean())
    variance = sum(float(part.var()) / count for part, count in ((of_source, n), (of_target, m)) if count > 1)
    return Difference(value, math.sqrt(variance))


def _mean_to(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean distance of each sample to those of another set."""
    return torch.cat([torch.cdist(rows, y).mean(1) for rows in x.split(512)])


def _mean_within(x: Tensor) -> Tensor:
    """Return the mean distance of each sample to the others of its set."""
    if len(x) < 2:
        return x.new_zeros(len(x))
    # Differences rather than a Gram matrix: the distance of a sample to itself is 0.
    rows = [torch.cdist(part, x, compute_mode="donot_use_mm_for_euclid_dist").sum(1) for part in x.split(512)]
    return torch.cat(rows) / (len(x) - 1)
