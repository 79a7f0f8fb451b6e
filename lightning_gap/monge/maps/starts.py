"""Where a map starts: at the identity, at the map between means or Gaussians, or at the images of a transport plan."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_gap.checks import check_integer
from lightning_gap.monge.maps.conditioning import check_condition
from lightning_gap.monge.maps.plan_images import HalfPlan, half_plan, plan_images, strictly_convex
from lightning_gap.monge.ot.checks import check_epsilon, check_pair
from lightning_gap.monge.ot.costs import Cost, Mahalanobis, SqEuclidean
from lightning_gap.monge.ot.gaussian import gaussian_map
from lightning_gap.monge.ot.solve import optimal_transport
from lightning_gap.monge.ot.subsets import fixed_rows
from lightning_gap.precision import widest

__all__ = [
    "BrenierStart",
    "PlanStart",
    "PlanTargets",
    "Start",
    "StartPair",
    "affine_start",
    "check_start",
    "fit_steps",
    "mean_and_spread",
    "pooled",
    "sides_of",
    "solved_plans",
]  # fmt: skip

Start = Literal["identity", "mean", "gaussian", "plan"]
BrenierStart = Literal["identity", "gaussian", "plan"]

_PLAN_TOLERANCE = 1e-2
# Of the square that is added to a distance, as a share of its value at the mean distance.
TIE_BREAK = 0.5
_FEW = 1024  # samples of each side that tell what part of the costs decides


class StartPair(NamedTuple):
    """Training samples of one condition: ``(n, d)``, ``(m, d)``, a label or ``(p,)`` vector, and weights."""

    source: Tensor
    target: Tensor
    condition: Tensor | None = None
    source_weights: Tensor | None = None
    target_weights: Tensor | None = None


class PlanTargets(NamedTuple):
    """What a map is fitted to: points, their images, and the condition of each."""

    points: Tensor
    images: Tensor
    condition: Tensor | None

    def joined(self, points: Tensor, images: Tensor, condition: Tensor) -> "PlanTargets":
        """Return these and further ones, all of one condition."""
        assert self.condition is not None
        each = condition.expand(len(points), *condition.shape).to(self.condition)
        parts = zip(self, (points.to(self.points), images.to(self.images), each), strict=True)
        return PlanTargets(*(torch.cat(pair) for pair in parts))  # type: ignore[arg-type]


def affine_start(start: str, pair: StartPair) -> tuple[Tensor | None, Tensor]:
    """Return A and b of the map ``A x + b`` to start at; A is ``None`` for the translation between the means."""
    if start == "mean":
        means = (mean_and_spread(*side)[0] for side in sides_of(pair))
        return None, -next(means) + next(means)
    (x, a), (y, b) = sides_of(pair)
    return gaussian_map(x, y, weights=(a, b), shrinkage="auto")


def sides_of(pair: StartPair) -> list[tuple[Tensor, Tensor | None]]:
    """Return the samples of either side, with weights that sum to 1."""
    sides = ((pair.source, pair.source_weights), (pair.target, pair.target_weights))
    return [(x, None if w is None else w.to(x) / w.sum().to(x)) for x, w in sides]


def mean_and_spread(points: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the mean, and the standard deviation of a feature over all features, 1 for a point mass; in float64."""
    x = points.double()
    w = x.new_full((len(x),), 1 / len(x)) if weights is None else weights.double() / weights.double().sum()
    mean = w @ x
    spread = (w @ (x - mean).square()).mean().sqrt()
    return mean, torch.where(spread > 0, spread, 1)


def pooled(pairs: Sequence[StartPair]) -> StartPair:
    """Return the samples of all conditions together, each condition as heavy as another where there are weights."""
    if len(pairs) == 1:
        return pairs[0]
    sides = []
    for points, weights in (("source", "source_weights"), ("target", "target_weights")):
        given = [getattr(pair, weights) for pair in pairs]
        every = None
        if any(w is not None for w in given):
            uniform = (
                (getattr(p, points).new_ones(len(getattr(p, points))), w) for p, w in zip(pairs, given, strict=True)
            )
            every = torch.cat(
                [(one if w is None else w.to(one)) / (one if w is None else w).sum() for one, w in uniform]
            )
        sides.append((torch.cat([getattr(pair, points) for pair in pairs]), every))
    (x, a), (y, b) = sides
    return StartPair(x, y, None, a, b)


@dataclass(frozen=True)
class PlanStart:
    """How a plan is solved, and a map fitted to it.

    Attributes:
        relative_epsilon: Regularization of the plan, as a share of the mean cost.
        samples: Most samples of each set in a plan.
        steps: Most steps of the fit.
        draws: Number of plans, on fresh draws, where there are more samples than one takes.
    """

    relative_epsilon: float = 0.002
    samples: int = 16_384
    steps: int = 3000
    draws: int = 1

    def __post_init__(self) -> None:
        check_epsilon("plan_relative_epsilon", self.relative_epsilon)
        for name in ("samples", "steps", "draws"):
            check_integer(f"plan_{name}", getattr(self, name))

    @property
    def hparams(self) -> dict[str, Any]:
        """The arguments of a map that make it again."""
        return {f"plan_{name}": getattr(self, name) for name in ("relative_epsilon", "samples", "steps", "draws")}

    def targets(self, pairs: Sequence[StartPair], cost: Cost) -> PlanTargets:
        """Return source samples of all conditions and draws, and their images by the plans."""
        points, images, conditions = [], [], []
        for pair in pairs:
            share, most = self.relative_epsilon, self.samples
            for x, plan in solved_plans(pair, cost, relative_epsilon=share, most=most, draws=self.draws):
                points.append(x)
                images.append(plan_images(plan, x, cost))
                if pair.condition is not None:
                    conditions.append(pair.condition.expand(len(x), *pair.condition.shape))
        return PlanTargets(torch.cat(points), torch.cat(images), torch.cat(conditions) if conditions else None)


@torch.no_grad()
def solved_plans(
    pair: StartPair,
    cost: Cost,
    *,
    relative_epsilon: float,
    most: int,
    draws: int = 1,
    epsilon: float | None = None,
    tie_break: float = TIE_BREAK,
) -> Iterator[tuple[Tensor, HalfPlan]]:
    """Yield source samples and the plan from them, for each draw of samples; for one where a plan takes all."""
    source, target = pair.source.detach(), pair.target.detach()
    check_pair("source", source, "target", target)
    squared = isinstance(cost, SqEuclidean | Mahalanobis)
    for draw in range(draws if max(len(source), len(target)) > most else 1):
        x, a = _drawn(source, pair.source_weights, most, draw)
        y, b = _drawn(target, pair.target_weights, most, draw)
        # The mean cost counts the way between the means, of which a plan for a squared cost knows nothing.
        shift = _mean(x, a) - _mean(y, b) if squared else None
        moved = y if shift is None else y + shift
        used = cost
        if tie_break:
            used = strictly_convex(cost, 1.0)
            if used is not cost:
                mean = cost.mean(x, moved)
                used = strictly_convex(cost, tie_break / mean if mean > 0 else 1.0)
        within = epsilon if epsilon is not None else sharp_epsilon(used, x, moved, relative_epsilon)
        options: dict[str, Any] = {"epsilon": within, "relative_epsilon": relative_epsilon, "weights": (a, b)}
        result = optimal_transport(x, moved, cost=used, tolerance=_PLAN_TOLERANCE, **options)
        yield x, half_plan(result, shift)


@torch.no_grad()
def sharp_epsilon(cost: Cost, x: Tensor, y: Tensor, share: float) -> float | None:
    r"""Return an :math:`\varepsilon` for a plan where a share of the mean cost would blur it away, or None.

    What decides a plan is :math:`c(x, y) - \bar c(x, \cdot) - \bar c(\cdot, y) + \bar c`: the rest of a cost is the
    same for all plans. Where samples of one side are close together beside those of the other, or both beside the way
    between them, it is a small part of the mean cost, and :math:`\varepsilon` is to be a share of it.

    Args:
        cost: The cost.
        x: ``(n, d)`` samples.
        y: ``(m, d)`` samples.
        share: The share of the mean cost that is usual.

    Returns:
        ``None`` where the standard deviation of that part is at least the mean cost over :math:`4 \sqrt d`: of Gaussian
        samples with one spread it is 2 to 4 times as much.
    """
    rows = [fixed_rows(len(side), _FEW) for side in (x, y)]  # samples may come sorted
    few = [side if some is None else side[some.to(side.device)] for side, some in zip((x, y), rows, strict=True)]
    C = cost.pairwise(*(side.to(widest(side.device)) for side in few))
    deciding = C - C.mean(1, keepdim=True) - C.mean(0) + C.mean()
    usual, most = float(C.mean()), 4 * x.shape[1] ** 0.5 * float(deciding.square().mean().sqrt())
    # What is beyond the digits of the costs themselves decides nothing.
    return share * most if 1e-12 * usual < most < usual else None


def _mean(points: Tensor, weights: Tensor | None) -> Tensor:
    return points.mean(0) if weights is None else weights.to(points) @ points


def _drawn(points: Tensor, weights: Tensor | None, most: int, draw: int) -> tuple[Tensor, Tensor | None]:
    """Return the next ``most`` samples of a fixed permutation, which goes round, and weights that sum to 1."""
    if len(points) > most:
        order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0), device="cpu")
        rows = order[(draw * most + torch.arange(most)) % len(points)].to(points.device)
        points, weights = points[rows], None if weights is None else weights[rows]
    if weights is None:
        return points, None
    total = weights.sum()
    return points, weights / total if bool(total > 0) else None


def fit_steps(most: int, rows: int, least: int = 100) -> int:
    """Return how many steps a fit to so many rows takes."""
    return min(most, max(least, math.ceil(rows / 4)))


def check_start(
    net: Any, source: Tensor, target: Tensor, pairs: Sequence[StartPair] | None, *, each: bool = True
) -> list[StartPair]:
    """Return the pairs that a map is started with, checked: ``each`` of its conditions, or all samples."""
    check_pair("source", source, "target", target)
    if source.shape[1] != net.dim:
        raise ValueError(f"source has dimension {source.shape[1]}, but the map was made with dim={net.dim}")
    if not (net.conditional and each):
        given = list(pairs or ())
        # Samples of several conditions go together through a map that knows none.
        if not given:
            return [StartPair(source, target)]
        for pair in given:
            check_pair("source", pair[0], "target", pair[1])
        return [pooled([StartPair(*pair) for pair in given])._replace(condition=None)]
    found = [StartPair(*pair) for pair in pairs or ()]
    for pair in found or [StartPair(source, target)]:
        if pair.condition is None:
            raise ValueError(
                "this map is conditional: give start() the samples of each condition, as in "
                "pairs=[StartPair(source, target, torch.tensor(label)), ...]"
            )
        check_pair("source", pair.source, "target", pair.target)
        check_condition(pair.source[:1], pair.condition[None], net.num_conditions, net.condition_dim)
    return found
