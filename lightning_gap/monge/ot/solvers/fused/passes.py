r"""Soft minima and gradients over all pairs of samples, by compiled C++ on a CPU."""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from lightning_gap.monge.ot.costs import Cost
from lightning_gap.monge.ot.costs.formula import formula_of
from lightning_gap.monge.ot.solvers.fused.pairs import PairPasses
from lightning_gap.native import native_argument, native_library

__all__ = ["Passes", "fused_library", "in_parts", "tiled"]

Result = TypeVar("Result")

_SOURCE = Path(__file__).with_name("soft_minimum.cpp")
# Columns of a tile, whose coordinates should stay in the first cache; rows of a group; numbers of its strip of kernel.
_TILE_BYTES, _WIDTHS, _GROUP, _STRIP = 1 << 14, (64, 512), 64, 1 << 20
# Pairs below which a second thread costs more than it does.
_FEW_PAIRS = 1 << 17


def fused_library(cost: Cost) -> ctypes.CDLL | None:
    """Return the passes of a cost; ``None`` where it has no formula, or nothing compiles it."""
    formula = formula_of(cost)
    return None if formula is None else native_library(_SOURCE, formula.expressions())


class Passes(PairPasses):
    """Passes over pairs on a CPU, by all threads that torch has; samples are on it."""

    sums_columns: ClassVar[bool] = True

    def _keep(self, rows: Tensor, columns: Tensor) -> None:
        library = fused_library(self.cost)
        assert library is not None
        exponent, exponential = ("float" if t == torch.float32 else "double" for t in (self.dtype, self.exponential))
        self._library, self._name = library, "products" if self.by_products else f"{exponent}_{exponential}"
        self._rows, self._tiles = rows.contiguous(), tiled(columns)

    def soft_minimum(
        self, G: Tensor, b: Tensor, *, share: float = 1.0, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return soft minima, and the columns' sums by the same pass: a row's minimum depends on that row alone."""
        n, m = len(self.x), len(self.y)
        tiles, _, width = self._tiles.shape
        offsets, own = self._offsets(G, b)
        offsets = self._filled(offsets, tiles * width)
        group = _GROUP if weights is None else max(4, min(_GROUP, _STRIP // (tiles * width) // 4 * 4))
        F = torch.empty(n, dtype=torch.float64, device="cpu")

        def work(rows: slice) -> Tensor | None:
            columns = None if weights is None else torch.zeros(tiles * width, dtype=torch.float64, device="cpu")
            a = None if weights is None else weights[rows]
            self._call("pass", rows, offsets, group, own[rows], share, F[rows], a, columns)
            return columns

        parts = in_parts(n, m, work)
        if weights is None:
            return F, None
        sums: Tensor = sum(part for part in parts if part is not None)[:m]  # type: ignore[index]
        # Weights are in the exponents.
        return F, torch.where(b > 0, sums / b, sums)

    def _pulls(self, potentials: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        n, d = self._rows.shape
        tiles, _, width = self._tiles.shape
        offsets = self._filled(offsets, tiles * width)
        gradients = torch.empty(n, d, dtype=torch.float64, device="cpu")
        masses = torch.empty(n, dtype=torch.float64, device="cpu")

        def work(rows: slice) -> None:
            self._call("pull", rows, offsets, _GROUP, potentials[rows], gradients[rows], masses[rows])

        in_parts(n, len(self.y), work)
        return gradients, masses

    def _call(self, function: str, rows: slice, offsets: Tensor, group: int, *rest: Tensor | float | None) -> None:
        (tiles, d, width), x = self._tiles.shape, self._rows[rows]
        before = x, len(x), d, self._tiles, tiles, width, offsets, self.scale, float(self.formula.number), group
        getattr(self._library, f"{function}_{self._name}")(*map(native_argument, (*before, *rest)))


def in_parts(rows: int, columns: int, work: Callable[[slice], Result]) -> list[Result]:
    """Work on the pairs of some rows, by as many threads as torch takes; the library lets others run meanwhile."""
    workers = 1 if rows * columns < _FEW_PAIRS else min(torch.get_num_threads(), rows)
    parts = [slice(k * rows // workers, (k + 1) * rows // workers) for k in range(workers)]
    if workers == 1:
        return [work(parts[0])]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, parts))


def tiled(columns: Tensor) -> Tensor:
    """Return ``(tiles, d, width)`` columns: those of a tile are neighbours."""
    m, d = columns.shape
    widest = _TILE_BYTES // (max(1, d) * columns.element_size())
    width = max(_WIDTHS[0], min(_WIDTHS[1], widest, -(-m // 16) * 16)) // 16 * 16
    tiles = -(-m // width)
    filled = columns.new_zeros(tiles * width, d)
    filled[:m] = columns
    return filled.view(tiles, width, d).mT.contiguous()
