"""Signs that a map's results mislead, in words: ``None`` where there are none."""

from collections.abc import Callable, Mapping, Sequence

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torchmetrics.utilities import dim_zero_cat

from lightning_gap.monge.objective import ObjectiveTerms
from lightning_gap.monge.ot.options import SolverOptions
from lightning_gap.monge.scores.map_scores import MapScores

__all__ = ["Remarks", "drawn_together", "not_converged", "out_of_range", "unused_conditions"]

# Shares of their floors: a divergence below, with an energy distance above, is that of images drawn together.
_FAR_BELOW, _WELL_ABOVE = 0.9, 1.5
_MANY = 100  # held-out samples with fewer of which a floor is as likely a chance


class Remarks:
    """Warnings that are given once: all but that of the solver's convergence once a fit."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def of_a_new_fit(self) -> None:
        """Forget what was said in an earlier fit."""
        self._said &= {"convergence"}

    def once(self, about: str, do: Callable[[], None]) -> None:
        """Do something that is done once a fit."""
        if about not in self._said:
            self._said.add(about)
            do()

    def say(self, about: str, sign: Callable[[], str | None], category: type[Warning] = UserWarning) -> None:
        """Warn of a sign where there is one, unless it has been said."""
        if about not in self._said and (message := sign()) is not None:
            self._said.add(about)
            rank_zero_warn(message, category=category)


def unused_conditions(net: nn.Module | None) -> str | None:
    """Say where conditions are not heeded."""
    if getattr(net, "conditional", False):
        return None
    return (
        f"the data have conditions, and {type(net).__name__} takes none: it is trained as one map for all of them. "
        "Give a conditional map, such as ConditionalMap(dim, num_conditions=...), or data without conditions"
    )


def not_converged(updates: int, terms: ObjectiveTerms, options: SolverOptions) -> str:
    """Say that transport problems of a step were not solved to the tolerance."""
    return (
        f"at update {updates} the solver stopped with a marginal error of {terms.marginal_error:.2g}, above "
        f"tolerance={options.tolerance:.2g}, so the gradient is less exact than that: raise max_iterations "
        f"({options.max_iterations} now) or the epsilons; lightning_gap/monge/train_marginal_error tells of the later "
        "steps"
    )


def drawn_together(scores: MapScores, values: Mapping[str, Tensor]) -> str | None:
    """Say where images score better than samples of the target by the Sinkhorn divergence alone."""
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
    """Say where conditions are further outside of the trained ones than half their range."""
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
