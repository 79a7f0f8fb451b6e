r"""Soft minima and gradients over all pairs of samples, by compiled C++ on a CPU.

A pass forms each cost in registers and lets go of it: neither the matrix nor a block of it is in memory.
"""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from lightning_gap.monge.ot.costs import Cost
from lightning_gap.monge.ot.costs.formula import formula_of
from lightning_gap.monge.ot.costs.products import accurate
from lightning_gap.native import native_argument, native_library

__all__ = ["Passes", "fused_library"]

_SOURCE = Path(__file__).with_name("soft_minimum.cpp")
# An exponent is to be right to this, which a sum over a row averages; beyond, exponents are formed in double.
_EXPONENT_ERROR = 1e-4
# Sizes of sums of terms that are far from float32's limits.
_FLOAT_RANGE = 1e-25, 1e25
# Up to so many dimensions differences cost no more than products.
_FEW_DIMENSIONS = 3
# Columns of a tile, whose coordinates should stay in the first cache; rows of a group; numbers of its strip of kernel.
_TILE_BYTES, _WIDTHS, _GROUP, _STRIP = 1 << 14, (64, 512), 64, 1 << 20
# What the last tile is filled up with: nothing, in any format.
_NOTHING = -1e30
# Samples that tell where most are, and the size of costs.
_FEW_SAMPLES = 256
# Samples of each side whose costs are compared with the cost's own, and how close they have to be.
_FEW_CHECKED, _CHECKED = 8, 1e-3
# Pairs below which a second thread costs more than it does.
_FEW_PAIRS = 1 << 17


def fused_library(cost: Cost) -> ctypes.CDLL | None:
    """Return the passes of a cost; ``None`` where it has no formula, or nothing compiles it."""
    formula = formula_of(cost)
    return None if formula is None else native_library(_SOURCE, formula.expressions())


class Passes:
    r"""Passes over the pairs of ``(n, d)`` rows and ``(m, d)`` columns at one epsilon.

    Args:
        x: ``(n, d)`` samples, on a CPU.
        y: ``(m, d)`` samples.
        cost: A cost with a formula.
        epsilon: The regularization.
        size: The largest cost, as far as is known.
    """

    def __init__(self, x: Tensor, y: Tensor, cost: Cost, epsilon: float, size: float) -> None:
        library, formula = fused_library(cost), formula_of(cost)
        assert library is not None
        assert formula is not None
        self.x, self.y, self.cost, self.epsilon, self.size = x, y, cost, epsilon, size
        self._library, self.formula, self.scale = library, formula, formula.scale / epsilon
        rows, columns = self._images(x), self._images(y)
        # A float32 has digits for what is near the origin; a mean would go where one point is far.
        middle = _few(columns).median(0).values
        rows, columns = rows - middle, columns - middle
        own, squares = rows.square().sum(1), columns.square().sum(1)
        i, j = int(own.argmax()), int(squares.argmax())
        with torch.no_grad():
            farthest = cost.pairwise(x[i : i + 1], _few(y)), cost.pairwise(_few(x), y[j : j + 1])
        size = max(size, *(float(costs.max()) for costs in farthest))
        rounding = torch.finfo(torch.float32).eps
        fine = _FLOAT_RANGE[0] < size / formula.scale < _FLOAT_RANGE[1] and rounding * size <= _EXPONENT_ERROR * epsilon
        exponential = "float" if x.dtype == torch.float32 else "double"
        exponent = "float" if exponential == "float" and fine and not formula.double else "double"
        self._name = f"{exponent}_{exponential}"
        self.dtype = torch.float32 if exponent == "float" else torch.float64
        # The product of far points cancels, as their difference does not.
        spread = rounding * self.scale * float(torch.maximum(own[i], squares[j]))
        self.by_products = (
            formula.is_square and exponent == "float" and rows.shape[1] > _FEW_DIMENSIONS and spread <= _EXPONENT_ERROR
        )
        if self.by_products:
            self._name, self._own, self._squares = "products", -self.scale * own, self.scale * squares
            rows = 2 * self.scale * rows
        self._rows = rows.to(self.dtype).contiguous()
        self._tiles = _tiled(columns.to(self.dtype))

    def are_right(self) -> bool:
        """Return whether costs and gradients of some pairs are those of the cost itself.

        They are not where terms leave the range of their format on the way, as a high power of a coordinate may, and
        where a formula is wrong.
        """
        x, y = (_few(points, _FEW_CHECKED).contiguous().detach() for points in (self.x, self.y))
        one = torch.ones(1, dtype=torch.float64, device="cpu")
        F, pulled = [], []
        for column in y.split(1):
            passes = Passes(x, column, self.cost, self.epsilon, self.size)
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

    def transposed(self) -> "Passes":
        """Return the passes with rows and columns exchanged."""
        return Passes(self.y, self.x, self.cost.transposed(), self.epsilon, self.size)

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
        n, m = len(self.x), len(self.y)
        offsets, own = self._offsets(G, b)
        tiles, _, width = self._tiles.shape
        group = _GROUP if weights is None else max(4, min(_GROUP, _STRIP // (tiles * width) // 4 * 4))
        F = torch.empty(n, dtype=torch.float64, device="cpu")

        def work(rows: slice) -> Tensor | None:
            columns = None if weights is None else torch.zeros(tiles * width, dtype=torch.float64, device="cpu")
            a = None if weights is None else weights[rows]
            self._call("pass", rows, offsets, group, own[rows], share, F[rows], a, columns)
            return columns

        parts = self._in_parts(work)
        if weights is None:
            return F, None
        sums: Tensor = sum(part for part in parts if part is not None)[:m]  # type: ignore[index]
        # Weights are in the exponents.
        return F, torch.where(b > 0, sums / b, sums)

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
        n, d = self._rows.shape
        offsets, own = self._offsets(G, b)
        gradients = torch.empty(n, d, dtype=torch.float64, device="cpu")
        masses = torch.empty(n, dtype=torch.float64, device="cpu")
        potentials = F + own

        def work(rows: slice) -> None:
            found = gradients[rows], masses[rows]
            self._call("pull", rows, offsets, _GROUP, potentials[rows], *found)

        self._in_parts(work)
        # The passes' cost is in units of epsilon.
        gradients *= self.epsilon * a[:, None]
        if self.formula.image is not None:
            with torch.inference_mode(False), torch.enable_grad():
                points = accurate(self.x.detach()).clone().requires_grad_()
                (gradients,) = torch.autograd.grad(self.formula.image(points), points, gradients.clone())
        return gradients.to(self.x.dtype), masses * a

    def _images(self, points: Tensor) -> Tensor:
        points = accurate(points.detach())
        return points if self.formula.image is None else accurate(self.formula.image(points))

    def _offsets(self, G: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return what columns add to exponents, filled up, and what rows do."""
        offsets = G + b.log()
        own = offsets.amax().expand(len(self.x)).clone()
        offsets = offsets - own[0]
        if self.by_products:
            own += self._own
            offsets -= self._squares
        tiles, _, width = self._tiles.shape
        filled = torch.full((tiles * width,), _NOTHING, dtype=self.dtype, device="cpu")
        filled[: len(offsets)] = offsets.clamp_min(_NOTHING)
        return filled, own

    def _call(self, function: str, rows: slice, offsets: Tensor, group: int, *rest: Tensor | float | None) -> None:
        (tiles, d, width), x = self._tiles.shape, self._rows[rows]
        before = x, len(x), d, self._tiles, tiles, width, offsets, self.scale, float(self.formula.number), group
        getattr(self._library, f"{function}_{self._name}")(*map(native_argument, (*before, *rest)))

    def _in_parts(self, work: Callable[[slice], Tensor | None]) -> list[Tensor | None]:
        """Work on the rows, by as many threads as torch takes; the library lets others run meanwhile."""
        n = len(self.x)
        workers = 1 if n * len(self.y) < _FEW_PAIRS else min(torch.get_num_threads(), n)
        parts = [slice(k * n // workers, (k + 1) * n // workers) for k in range(workers)]
        if workers == 1:
            return [work(parts[0])]
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(work, parts))


def _few(points: Tensor, count: int = _FEW_SAMPLES) -> Tensor:
    return points[:: max(1, len(points) // count)]


def _tiled(columns: Tensor) -> Tensor:
    """Return ``(tiles, d, width)`` columns: those of a tile are neighbours."""
    m, d = columns.shape
    widest = _TILE_BYTES // (max(1, d) * columns.element_size())
    width = max(_WIDTHS[0], min(_WIDTHS[1], widest, -(-m // 16) * 16)) // 16 * 16
    tiles = -(-m // width)
    filled = columns.new_zeros(tiles * width, d)
    filled[:m] = columns
    return filled.view(tiles, width, d).mT.contiguous()
