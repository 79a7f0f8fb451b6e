"""Whether costs and epsilons are of a size that a floating-point format resolves."""

import math

import torch

from lightning_gap.monge.ot.problem import Problem
from lightning_gap.precision import widest

__all__ = ["FLOAT_RATIOS", "range_of_costs", "size_and_epsilon"]

# Costs of more or of fewer epsilons than these are not for float32: their exponentials would lose digits that count.
FLOAT_RATIOS = 1e-2, 1e6

# An epsilon so many times the largest cost is as good as any larger one, of which no number would be left.
_LARGEST_EPSILON = 1e6
# Samples of each side that tell the size of costs which are not kept.
_FEW_SAMPLES = 256


def range_of_costs(p: Problem, dtype: torch.dtype | None = None) -> tuple[float, float]:
    """Return the least and the greatest cost between some of the samples."""
    x, y = (points[:: max(1, len(points) // _FEW_SAMPLES)].to(dtype or points.dtype) for points in (p.x, p.y))
    costs = p.cost.geometry.fill(x.new_empty(len(x), len(y)), x, y)
    least, most = torch.stack([costs.amin(), costs.amax()]).tolist()
    return least, most


def size_and_epsilon(p: Problem, least: float, most: float, mean: float | None = None) -> tuple[float, float]:
    """Return the size of the largest cost, and the epsilon to solve with; from the mean cost where it is known.

    Raises:
        FloatingPointError: The size is beyond the floating-point format.
    """
    if not (math.isfinite(least) and math.isfinite(most)):
        raise FloatingPointError(
            f"the {p.cost} costs are not all finite in {p.x.dtype}: divide the samples by their scale, or use float64; "
            "if a network made them, lower its learning rate; for pairs that an infinite cost forbids use "
            "solver='exact'"
        )
    size = exact = max(abs(least), abs(most))
    limits = torch.finfo(p.x.dtype)
    if size == 0:
        # Nothing to move, or too little for the format.
        exact = max(map(abs, range_of_costs(p, widest(p.x.device))))
        apart = float((torch.cat([p.x, p.y]) - p.x[0]).abs().amax())
        if exact == 0 and 0 < apart < 10 * math.sqrt(limits.tiny):
            exact = apart * apart or limits.smallest_normal
    if (0 < exact < 1e3 * limits.tiny) or (size == 0 and exact > 0):
        raise FloatingPointError(
            f"the {p.cost} costs, {exact:.1e} at most, are below what {p.x.dtype} resolves: divide the samples by "
            "their scale, or use float64"
        )
    epsilon, spread = p.resolved_epsilon(size, mean), most - least
    if p.rho is None:
        return size, min(epsilon, _LARGEST_EPSILON * spread) if spread > 0 else epsilon
    # Soft marginals are softened by epsilon, whose size then counts; none of it is left of nothing.
    return size, epsilon if spread > 0 or p.epsilon.absolute is not None else max(epsilon, 1e-6 * p.rho)
