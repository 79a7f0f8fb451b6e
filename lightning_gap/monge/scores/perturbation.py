"""The five scores by which maps of perturbations are compared, per condition and beside their floors."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_gap.monge.ot.divergence import sinkhorn_divergence
from lightning_gap.monge.scores.feature_means import drug_signature, feature_means_r2
from lightning_gap.monge.scores.map_scores import MapScores
from lightning_gap.monge.scores.mmd import maximum_mean_discrepancy
from lightning_gap.monge.scores.pools import Pool
from lightning_gap.monge.scores.wasserstein import entropic_wasserstein

__all__ = ["PerturbationScores"]

# In units of the distances.
_EPSILON = 0.1


class PerturbationScores(MapScores):
    r"""The five scores of a map of perturbations, of each condition, beside their floors.

    ======================== =======================================================================================
    ``r2``                   squared correlation of the features' means, :func:`feature_means_r2`; 1 is best
    ``drug_signature``       distance of the means, :func:`drug_signature`
    ``mmd``                  :func:`maximum_mean_discrepancy`, mean over γ = 2, 1, 0.5, 0.1, 0.01, 0.005
    ``wasserstein``          :func:`entropic_wasserstein` of the Euclidean cost, ε = 0.1, not debiased
    ``sinkhorn_divergence``  of the Euclidean cost, ε = 0.1
    ``..._floor``            each of them with other samples of the target in place of the images: ``target_again``,
                             or, without these, of one half of the target against the other half
    ======================== =======================================================================================

    They are those of the conditional Monge gap (Driessen et al. 2026, "Conditional Monge Gap enables generalizable
    single-cell perturbation modelling"), with the same constants, in the units of the samples: numbers compare only
    between maps that are scored in the same features, with the same numbers of samples. Most are not 0 between equal
    distributions, hence the floors; those of halves are of half as many samples, and somewhat high. Updates are those
    of :class:`MapScores`. Without names a score is the mean over the conditions; with them each one's comes too, as
    ``<score>/<name>``.

    Args:
        max_samples: Most samples of each set, and condition, in the last three.
        conditions: Names of the conditions in the order of their labels.
        **kwargs: Of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> scores = PerturbationScores()
        >>> scores.update(x, x + 1, x + 1)
        >>> [round(float(scores.compute()[name]), 3) for name in ("r2", "drug_signature", "mmd")]
        [1.0, 0.0, 0.0]
    """

    def __init__(self, *, max_samples: int = 2048, conditions: Sequence[str] | None = None, **kwargs: Any) -> None:
        super().__init__(max_samples=max_samples, conditions=conditions, **kwargs)

    def _epsilons(self, pools: Sequence[Pool]) -> tuple[float | None, float | None]:
        return None, None

    def _scores(self, pool: Pool, fitting_epsilon: float | None, gap_epsilon: float | None) -> dict[str, Tensor]:
        every, some = pool.at_most(sum(map(len, pool.sets.values()))), pool.at_most(self.max_samples)
        of = [(p.sets["mapped"], p.sets["target"], (p.source_weights, p.target_weights)) for p in (every, some)]
        scores = _of_means(*of[0]) | _of_pairs(*of[1])
        if "target_again" in pool.sets:
            of = [(p.sets["target_again"], p.sets["target"], (None, p.target_weights)) for p in (every, some)]
        else:
            of = [_halves(p.sets["target"], p.target_weights) for p in (every, some)]
        floors = _of_means(*of[0]) | _of_pairs(*of[1])
        return scores | {f"{name}_floor": value for name, value in floors.items()}


def _of_means(x: Tensor, y: Tensor, weights: tuple[Tensor | None, Tensor | None]) -> dict[str, Tensor]:
    return {
        "r2": feature_means_r2(x, y, weights=weights),
        "drug_signature": drug_signature(x, y, weights=weights),
    }


def _of_pairs(x: Tensor, y: Tensor, weights: tuple[Tensor | None, Tensor | None]) -> dict[str, Tensor]:
    return {
        "mmd": maximum_mean_discrepancy(x, y, weights=weights),
        "wasserstein": entropic_wasserstein(x, y, epsilon=_EPSILON, weights=weights),
        "sinkhorn_divergence": sinkhorn_divergence(
            x, y, cost="euclidean", epsilon=_EPSILON, weights=weights, tolerance=1e-3
        ),
    }


def _halves(target: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    """Return one half of the samples and the other, every second one, with their weights."""
    if len(target) < 2:
        return target, target, (weights, weights)
    first, second = (None if weights is None else weights[k::2] / weights[k::2].sum() for k in range(2))
    return target[::2], target[1::2], (first, second)
