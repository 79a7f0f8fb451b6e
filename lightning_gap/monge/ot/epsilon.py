r"""The regularization :math:`\varepsilon`: a number, or a share of a scale of the costs between weighted samples."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from lightning_gap.checks import check_choice, check_number
from lightning_gap.monge.ot.costs import Cost
from lightning_gap.monge.ot.options import SolverOptions
from lightning_gap.monge.ot.subsets import counted
from lightning_gap.precision import widest

__all__ = ["FITTING_SHARE", "GAP_SHARE", "Epsilon", "Scale", "Weighted", "cost_scale", "mean_scale"]

Scale = Literal["mean", "std", "typical"]

# The shares that divergences and gaps take by default.
FITTING_SHARE, GAP_SHARE = 0.05, 0.01

# Costs beyond so many times their upper quartile are those of outliers: of Gaussian samples one in 10⁵ in one
# dimension, and fewer in more.
_OUTLYING = 16.0
# Samples of each side whose costs tell the quartile, and with it what is typical.
_ENOUGH = 1024


class Weighted(NamedTuple):
    """Samples ``(n, d)``, and their ``(n,)`` weights, or ``None`` for uniform ones."""

    samples: Tensor
    weights: Tensor | None = None


@torch.no_grad()
def cost_scale(
    cost: Cost, x: Tensor, y: Tensor, weights: tuple[Tensor | None, Tensor | None] = (None, None), of: Scale = "mean"
) -> float:
    """Return a scale of the costs :math:`c(x_i, y_j)`, each counted by :math:`a_i b_j`, in blocks of bounded memory.

    ``"mean"`` and ``"std"`` are moments of all costs. ``"typical"`` is the mean of those up to 16 times the upper
    quartile, of up to 1,024 samples a side, evenly taken: the mean itself where there are no outliers, and not moved by
    up to an eighth of the samples of each side, however far off they are; and the mean where most samples coincide, so
    that what is typical is 0. Weights are of any positive sum; samples of weight 0 do not count.
    """
    (x, a), (y, b) = (_with_weight(points.detach(), w) for points, w in zip((x, y), weights, strict=True))
    if of == "typical" and (typical := _typical(cost, *_evenly(x, a), *_evenly(y, b))):
        return typical
    geometry = cost.geometry
    mean = geometry.mean(x, y) if a is None and b is None else geometry.moment(x, y, a, b)
    return math.sqrt(geometry.moment(x, y, a, b, center=mean, power=2)) if of == "std" else mean


@dataclass(frozen=True)
class Epsilon:
    """A regularization: a number in units of the cost, or else a share of a scale of the costs (:func:`cost_scale`).

    Example:
        >>> from lightning_gap.monge.ot.costs import SqEuclidean
        >>> x = torch.tensor([[0.0], [2.0]])
        >>> Epsilon(share=0.05).resolve(SqEuclidean(), (Weighted(x), Weighted(x)))
        0.1
    """

    absolute: float | None = None
    share: float = FITTING_SHARE
    of: Scale = "mean"

    @classmethod
    def given(
        cls, options: SolverOptions, absolute: Any, share: Any, of: str = "mean", *, rho: float | None = None
    ) -> "Epsilon":
        """Return what ``epsilon``, ``relative_epsilon`` and ``relative_to`` of a public function mean, checked."""
        if options.solver == "exact":
            if absolute is not None or rho is not None:
                raise ValueError("solver='exact' takes neither epsilon nor rho: it does not regularize")
            return cls(0.0)
        check_choice("relative_to", of, get_args(Scale))
        if absolute is not None:
            return cls(check_number("epsilon", absolute, above=0))
        if share is None:
            raise ValueError("relative_epsilon must be a positive finite number where epsilon is None, got None")
        return cls(None, check_number("relative_epsilon", share, above=0), cast(Scale, of))

    def resolve(self, cost: Cost, *pairs: tuple[Weighted, Weighted], scale: float | None = None) -> float:
        """Return epsilon in units of the cost, by the mean of the pairs' scales, or the scale where it is known."""
        if self.absolute is not None:
            return self.absolute
        if scale is None:
            scale = mean_scale(cost, pairs, self.of)
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(
                f"the {self.of} {cost} cost is {scale}, so no share of it can be epsilon: give an absolute epsilon"
            )
        return self.share * scale


def mean_scale(cost: Cost, pairs: Iterable[tuple[Weighted, Weighted]], of: Scale = "mean") -> float:
    """Return the mean of the scales of the costs between several pairs of sets, such as those of conditions."""
    return fmean(cost_scale(cost, x.samples, y.samples, (x.weights, y.weights), of) for x, y in pairs)


def _with_weight(points: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the samples of positive weight, and weights that sum to 1; ``None`` for uniform ones."""
    if weights is None:
        return points, None
    weights, points = counted(weights.detach().to(points.device, widest(points.device)), points)
    if bool((weights == weights.max()).all()):
        return points, None
    return points, weights / weights.sum()


def _evenly(points: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if len(points) <= _ENOUGH:
        return points, weights
    rows = torch.arange(_ENOUGH, device=points.device) * len(points) // _ENOUGH
    return points[rows], None if weights is None else weights[rows]


def _typical(cost: Cost, x: Tensor, a: Tensor | None, y: Tensor, b: Tensor | None) -> float:
    costs = cost.geometry.fill(x.new_empty(len(x), len(y)), x, y).to(widest(x.device)).flatten()
    rows, columns = (costs.new_ones(len(p)) if w is None else w for p, w in ((x, a), (y, b)))
    mass = torch.outer(rows, columns).flatten()
    ordered, order = costs.sort()
    below = mass[order].cumsum(0)
    quartile = ordered[min(int((below < 0.75 * below[-1]).sum()), len(ordered) - 1)]
    kept = costs <= _OUTLYING * quartile
    return float((costs * mass)[kept].sum() / mass[kept].sum())
