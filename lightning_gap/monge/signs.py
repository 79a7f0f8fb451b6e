"""Signs that a map's results mislead, in words: ``None`` where there are none."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_gap.monge.scores.map_scores import MapScores

__all__ = ["drawn_together", "out_of_range"]

# Shares of their floors: a divergence below, with an energy distance above, is that of images drawn together.
_FAR_BELOW, _WELL_ABOVE = 0.9, 1.5
_MANY = 100  # held-out samples with fewer of which a floor is as likely a chance


def drawn_together(scores: MapScores, values: Mapping[str, Tensor]) -> str | None:
    """Say where images score better than samples of the target by the Sinkhorn divergence alone.

    Args:
        scores: The metric that holds the samples.
        values: What it returned.
    """
    if "sinkhorn_divergence_floor" not in values:
        return None
    mapped, target = dim_zero_cat(scores.mapped), dim_zero_cat(scores.target)
    names = "sinkhorn_divergence", "energy_distance"
    floors = [float(values[f"{name}_floor"]) for name in names]
    if min(len(mapped), len(target)) < _MANY or min(floors) <= 0:
        return None
    divergence, energy = (float(values[name]) / floor for name, floor in zip(names, floors, strict=True))
    spread = float(mapped.var(0).sum() / target.var(0).sum())
    if not (divergence < _FAR_BELOW and energy > _WELL_ABOVE and spread < 1):
        return None
    return (
        f"val_sinkhorn_divergence is {divergence:.2f} of its floor, below what a perfect map scores, with "
        f"val_energy_distance {energy:.1f} times its own: the images are drawn together, to {spread:.0%} of the "
        "target's variance, which a batch's divergence rewards in many dimensions. Monitor "
        "lightning_gap/monge/val_energy_distance for early stopping and checkpoints, and try "
        "MongeMap(fitting_loss='energy') or a larger relative_fitting_epsilon"
    )


def out_of_range(vectors: Tensor, trained: Sequence[Sequence[float]]) -> str | None:
    """Say where conditions are further outside of the trained ones than half their range.

    Args:
        vectors: ``(n, p)`` vectors of the conditions.
        trained: Least and greatest trained value of each entry.
    """
    if vectors.dim() != 2 or vectors.shape[1] != len(trained[0]):
        return None
    given = vectors.detach().cpu().double()
    least, greatest = torch.tensor(trained, dtype=torch.float64)
    margin = (greatest - least) / 2 + 1e-6 * torch.maximum(least.abs(), greatest.abs())
    out = (given < least - margin) | (given > greatest + margin)
    if not bool(out.any()):
        return None
    row, entry = (int(i) for i in out.nonzero()[0])
    return (
        f"condition[{row}] has {float(given[row, entry]):.6g} in entry {entry}, and the map was trained from "
        f"{float(least[entry]):.6g} to {float(greatest[entry]):.6g}: so far outside its images mean little "
        f"({int(out.any(1).sum())} of {len(given)} conditions are)"
    )
