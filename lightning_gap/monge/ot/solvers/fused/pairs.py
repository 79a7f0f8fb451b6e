"""What passes over all pairs of samples have in common, whatever takes them: formats, offsets and checks."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from lightning_gap.monge.ot.costs import Cost
from lightning_gap.monge.ot.costs.formula import CostFormula, formula_of
from lightning_gap.monge.ot.costs.products import accurate

__all__ = ["FLOAT_RANGE", "NOTHING", "PairPasses", "images_of", "pulled_back"]

# What the last tile is filled up with: nothing, in any format.
NOTHING = -1e30
# An exponent is to be right to this, which a sum over a row averages; beyond, exponents are formed in double.
_EXPONENT_ERROR = 1e-4
# Sizes of sums of terms that are far from float32's limits.
FLOAT_RANGE = 1e-25, 1e25
# Up to so many dimensions differences cost no more than products.
_FEW_DIMENSIONS = 3
# Samples that tell where most are, and the size of costs.
_FEW_SAMPLES = 256
# Samples of each side whose costs are compared with the cost's own, and how close they have to be.
_FEW_CHECKED, _CHECKED = 8, 1e-3


class PairPasses(ABC):
    r"""Passes over the pairs of ``(n, d)`` rows and ``(m, d)`` columns at one epsilon.

    A pass forms each cost in registers and lets go of it: neither the matrix nor a block of it is in memory.

    Args:
        x: ``(n, d)`` samples.
        y: ``(m, d)`` samples.
        cost: A cost with a formula.
        epsilon: The regularization.
        size: The largest cost, as far as is known.
        middle: ``(k,)`` point from which images are measured; the middle of some of the columns by default.
    """

    # Whether a pass over rows sums over the columns as well.
    sums_columns: ClassVar[bool]

    def __init__(
        self, x: Tensor, y: Tensor, cost: Cost, epsilon: float, size: float, middle: Tensor | None = None
    ) -> None:
        formula = formula_of(cost)
        assert formula is not None
        self.x, self.y, self.cost, self.epsilon, self.size = x, y, cost, epsilon, size
        self.formula, self.scale = formula, formula.scale / epsilon
        rows, columns = self._images(x), self._images(y)
        # A float32 has digits for what is near the origin; a mean would go where one point is far.
        self.middle = _few(columns).median(0).values if middle is None else middle
        rows, columns = rows - self.middle, columns - self.middle
        own, squares = rows.square().sum(1), columns.square().sum(1)
        i, j = int(own.argmax()), int(squares.argmax())
        with torch.no_grad():
            farthest = cost.pairwise(x[i : i + 1], _few(y)), cost.pairwise(_few(x), y[j : j + 1])
        size = max(size, *(float(costs.max()) for costs in farthest))
        rounding = torch.finfo(torch.float32).eps
        fine = FLOAT_RANGE[0] < size / formula.scale < FLOAT_RANGE[1] and rounding * size <= _EXPONENT_ERROR * epsilon
        # Of the exponents, and of the exponentials.
        self.dtype = torch.float32 if x.dtype == torch.float32 and fine and not formula.double else torch.float64
        self.exponential = torch.float32 if x.dtype == torch.float32 else torch.float64
        # The product of far points cancels, as their difference does not.
        spread = rounding * self.scale * float(torch.maximum(own[i], squares[j]))
        self.by_products = (
            formula.is_square
            and self.dtype == torch.float32
            and rows.shape[1] > _FEW_DIMENSIONS
            and spread <= _EXPONENT_ERROR
        )
        if self.by_products:
            self._own, self._squares = -self.scale * own, self.scale * squares
            rows = 2 * self.scale * rows
        self._keep(rows.to(self.dtype), columns.to(self.dtype))

    @abstractmethod
    def _keep(self, rows: Tensor, columns: Tensor) -> None:
        """Keep ``(n, k)`` rows and ``(m, k)`` columns as passes take them."""

    @abstractmethod
    def soft_minimum(
        self, G: Tensor, b: Tensor, *, share: float = 1.0, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        r"""Return :math:`F_i = -s \log \sum_j b_j e^{G_j - c(x_i, y_j)/\varepsilon}`, and the columns' sums.

        Args:
            G: ``(m,)`` potentials in units of epsilon, in double.
            b: ``(m,)`` weights, in double.
            share: :math:`s`.
            weights: ``(n,)`` weights of the rows, in double, if sums over the columns are wanted.

        Returns:
            ``(n,)`` soft minima, and ``(m,)`` sums :math:`\sum_i a_i e^{F_i + G_j - c_{ij}/\varepsilon}`, or ``None``.
        """

    @abstractmethod
    def _pulls(self, potentials: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(n, k)`` gradients of the exponents in the rows' images, and ``(n,)`` masses, in double."""

    def are_right(self) -> bool:
        """Return whether costs and gradients of some pairs are those of the cost itself.

        They are not where terms leave the range of their format on the way, as a high power of a coordinate may, and
        where a formula is wrong.
        """
        x, y = (_few(points, _FEW_CHECKED).contiguous().detach() for points in (self.x, self.y))
        one = torch.ones(1, dtype=torch.float64, device=x.device)
        F, pulled = [], []
        for column in y.split(1):
            passes = self.of(x, column)
            F.append(passes.soft_minimum(0 * one, one)[0])
            pulled.append(passes.pulls(F[-1], torch.ones_like(F[-1]), 0 * one, one)[0])
        with torch.inference_mode(False), torch.enable_grad():
            points = accurate(x).clone().requires_grad_()
            costs = self.cost.pairwise(points, accurate(y).clone())
            parts = [torch.autograd.grad(part.sum(), points, retain_graph=True)[0] for part in costs.unbind(1)]
        costs, slopes, found = costs.detach(), torch.stack(parts, 1), self.epsilon * torch.stack(F, 1)
        apart = costs > _CHECKED * costs.amax()  # slopes at points that coincide are nobody's
        wrong = torch.stack(pulled, 1) - slopes
        off = (wrong.norm(dim=2) * apart).norm() / (slopes.norm(dim=2) * apart).norm()
        close = ((found - costs).abs() <= _CHECKED * (costs.abs() + self.epsilon)).all()
        return bool(close) and not bool(off > 10 * _CHECKED) and bool(wrong.isfinite().all())

    def of(self, x: Tensor, y: Tensor, cost: Cost | None = None) -> "PairPasses":
        """Return the passes of other samples, at the same epsilon."""
        return type(self)(x, y, cost or self.cost, self.epsilon, self.size)

    def transposed(self) -> "PairPasses":
        """Return the passes with rows and columns exchanged."""
        return self.of(self.y, self.x, self.cost.transposed())

    def pulls(self, F: Tensor, a: Tensor, G: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return :math:`\sum_j P_{ij} \nabla_1 c(x_i, y_j)` and the plan's row sums.

        Args:
            F: ``(n,)`` potentials in units of epsilon, in double.
            a: ``(n,)`` weights, in double.
            G: ``(m,)`` potentials.
            b: ``(m,)`` weights.

        Returns:
            ``(n, d)`` gradients in the samples' format, and ``(n,)`` masses.
        """
        offsets, own = self._offsets(G, b)
        gradients, masses = self._pulls(F + own, offsets)
        # The passes' cost is in units of epsilon.
        gradients *= self.epsilon * a[:, None]
        return pulled_back(self.formula, self.x, gradients), masses * a

    def _images(self, points: Tensor) -> Tensor:
        return images_of(self.formula, points)

    def _offsets(self, G: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return what columns add to exponents, and what rows do."""
        offsets = G + b.log()
        own = offsets.amax().expand(len(self.x)).clone()
        offsets = offsets - own[0]
        if self.by_products:
            own += self._own
            offsets -= self._squares
        return offsets, own

    def _filled(self, offsets: Tensor, count: int) -> Tensor:
        """Return offsets in the exponents' format, filled up by those of nothing."""
        filled = torch.full((count,), NOTHING, dtype=self.dtype, device=offsets.device)
        filled[: len(offsets)] = offsets.clamp_min(NOTHING)
        return filled


def images_of(formula: CostFormula, points: Tensor) -> Tensor:
    """Return points as a cost compares them, in the widest format."""
    points = accurate(points.detach())
    return points if formula.image is None else accurate(formula.image(points))


def pulled_back(formula: CostFormula, points: Tensor, gradients: Tensor) -> Tensor:
    """Return the gradients in points, in their format, from those in their images."""
    if formula.image is not None:
        with torch.inference_mode(False), torch.enable_grad():
            leaves = accurate(points.detach()).clone().requires_grad_()
            (gradients,) = torch.autograd.grad(formula.image(leaves), leaves, gradients.clone())
    return gradients.to(points.dtype)


def _few(points: Tensor, count: int = _FEW_SAMPLES) -> Tensor:
    return points[:: max(1, len(points) // count)]
