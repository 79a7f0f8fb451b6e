"""How the matrix of a cost is filled, exponentiated and contracted: by blocks, without a graph."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_gap.monge.ot.limits import LIMITS
from lightning_gap.precision import widest

if TYPE_CHECKING:
    from lightning_gap.monge.ot.costs.base import Cost

__all__ = ["Fill", "Geometry", "Gradients", "PlanFactors"]

# Writes to an ``(n, m)`` matrix, from ``(n, d)`` points; returns the matrix.
Fill = Callable[[Tensor, Tensor], Tensor]
# With respect to both sets of points; ``None`` where not wanted.
Gradients = tuple[Tensor | None, Tensor | None]


class PlanFactors(NamedTuple):
    """Rows of a plan ``w[:, None] * K * v``; ``K`` and ``C`` may be overwritten.

    Attributes:
        rows: Which rows.
        w: ``(rows,)`` factors.
        K: ``(rows, m)`` matrix.
        v: ``(m,)`` factors.
        C: ``(rows, m)`` costs, where they are at hand.
    """

    rows: slice
    w: Tensor
    K: Tensor
    v: Tensor
    C: Tensor | None


class Geometry:
    """The matrix of a cost, in a form that is right for every one; costs with faster forms have their own."""

    # Whether ``exponents`` is a matrix product by NumPy, which several threads may take at once.
    by_matrix_product: ClassVar[bool] = False

    def __init__(self, cost: "Cost") -> None:
        self.cost = cost

    def filler(self, y: Tensor) -> Fill:
        """Return a function that writes costs to ``(m, d)`` points, having prepared what it can, without a graph."""

        def fill(out: Tensor, x: Tensor) -> Tensor:
            # Differences are formed of all coordinates: a row of a GPU's block takes d numbers a pair.
            numbers = len(y) if y.device.type == "cpu" else y.numel()
            rows = max(1, LIMITS.cached.on(y.device) // max(1, numbers))
            for start in range(0, len(x), rows):
                with torch.no_grad():
                    out[start : start + rows] = self.cost.pairwise(x[start : start + rows], y)
            return out

        return fill

    def fill(self, out: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Write the matrix of all costs, without a graph and with little memory beside."""
        return self.filler(y.detach())(out, x.detach())

    def mean(self, x: Tensor, y: Tensor) -> float:
        """Return the mean of all costs ``c(x_i, y_j)``, detached."""
        return self.moment(x.detach(), y.detach())

    def moment(
        self,
        x: Tensor,
        y: Tensor,
        a: Tensor | None = None,
        b: Tensor | None = None,
        *,
        center: float = 0.0,
        power: int = 1,
    ) -> float:
        """Return the mean of ``(c(x_i, y_j) - center)^power``, weighted in the widest format, in bounded memory."""
        fill, total, start = self.filler(y), 0.0, 0
        for block in x.split(max(1, LIMITS.differences.on(y.device) // len(y))):
            costs = fill(block.new_empty(len(block), len(y)), block).to(widest(y.device)).sub_(center).pow_(power)
            if a is None and b is None:
                total += float(costs.sum())
                continue
            rows = costs.mean(1) if b is None else costs @ b
            total += float(rows.sum() / len(x) if a is None else rows @ a[start : start + len(block)])
            start += len(block)
        return total / (len(x) * len(y)) if a is None and b is None else total

    def exponents(self, y: Tensor, G: Tensor, epsilon: float) -> Fill:
        r"""Return a function that writes :math:`G_j - c(x_i, y_j)/\varepsilon`, without a graph."""
        fill = self.filler(y)
        return lambda out, x: torch.sub(G.to(out.dtype), fill(out, x), alpha=1 / epsilon, out=out)

    def plan_gradients(
        self, x: Tensor, y: Tensor, plan: Iterable[PlanFactors], need: tuple[bool, bool] = (True, True)
    ) -> Gradients:
        r"""Return the gradients of :math:`\sum_{ij} P_{ij}\, c(x_i, y_j)` in the points, ``None`` where not needed."""
        gx, gy = torch.zeros_like(x), torch.zeros_like(y)
        height = max(1, LIMITS.cached.on(y.device) // max(1, y.numel()))
        for part in plan:
            own, offset = x[part.rows], part.rows.start
            for start in range(0, len(own), height):
                rows = slice(start, min(len(own), start + height))
                with torch.enable_grad():
                    points = own[rows].detach().requires_grad_(), y.detach().requires_grad_()
                    costs = self.cost.pairwise(*points)
                P = part.w[rows, None] * part.K[rows] * part.v
                gx[offset + start : offset + rows.stop], dy = torch.autograd.grad(costs, points, P)
                gy += dy
        return gx if need[0] else None, gy if need[1] else None
