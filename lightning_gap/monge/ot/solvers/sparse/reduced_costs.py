"""The least of each row's costs less the columns' potentials, by passes over all pairs that keep no matrix."""

import ctypes
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gap.monge.ot.costs import Cost
from lightning_gap.monge.ot.costs.formula import formula_of
from lightning_gap.monge.ot.limits import LIMITS
from lightning_gap.monge.ot.solvers.fused.pairs import images_of
from lightning_gap.monge.ot.solvers.fused.passes import in_parts, tiled
from lightning_gap.native import native_argument, native_library

__all__ = ["Least", "ReducedCosts", "check_costs"]

_SOURCE = Path(__file__).with_name("least.cpp")
# Rows that meet a tile of columns together.
_GROUP = 64
# Samples of each side whose costs by the formula are compared with the cost's own, and how close they have to be.
_FEW_CHECKED, _CHECKED = 8, 1e-9


class Least(NamedTuple):
    """What is least in some rows.

    Attributes:
        columns: ``(n, k)`` columns, by ascending values.
        values: ``(n, k)`` costs less the columns' potentials; infinite where there are fewer.
        counts: ``(n,)`` how many there are.
    """

    columns: Tensor
    values: Tensor
    counts: Tensor


class ReducedCosts:
    """Passes over the pairs of ``(n, d)`` rows and ``(m, d)`` columns in double, compiled where the cost has a formula.

    Args:
        cost: The cost.
        x: ``(n, d)`` rows, in double.
        y: ``(m, d)`` columns, in double.
        compiled: Whether to take the formula, where the cost has one.
    """

    def __init__(self, cost: Cost, x: Tensor, y: Tensor, *, compiled: bool = True) -> None:
        self.cost, self.x, self.y = cost, x, y
        self._library = self._compiled() if compiled else None

    def transposed(self) -> "ReducedCosts":
        """Return the passes with rows and columns exchanged."""
        return ReducedCosts(self.cost.transposed(), self.y, self.x)

    def least(self, v: Tensor, k: int, *, rows: Tensor | None = None, bounds: Tensor | None = None) -> Least:
        """Return the up to ``k`` least values of each row that are finite, and below the row's bound if there is one.

        Args:
            v: ``(m,)`` potentials of the columns, in double on the CPU.
            k: How many.
            rows: Which rows; all by default.
            bounds: A number for each of these rows.

        Raises:
            ValueError: A cost is NaN or minus infinity.
        """
        count = len(self.x) if rows is None else len(rows)
        if bounds is None:
            bounds = torch.full((count,), torch.inf, dtype=torch.float64)
        if self._library is None:
            return self._by_blocks(v, k, rows, bounds)
        x = self._rows if rows is None else self._rows[rows]
        tiles, _, width = self._tiles.shape
        offsets = torch.full((tiles * width,), torch.inf, dtype=torch.float64)
        offsets[: len(v)] = -v
        found = Least(
            torch.zeros(count, k, dtype=torch.int32),
            torch.full((count, k), torch.inf, dtype=torch.float64),
            torch.empty(count, dtype=torch.int64),
        )

        def work(part: slice) -> None:
            before = x[part], part.stop - part.start, x.shape[1], self._tiles, tiles, width, offsets
            after = float(self._formula.scale), float(self._formula.number), _GROUP, bounds[part], k
            outputs = found.columns[part], found.values[part], found.counts[part]
            self._library.least(*map(native_argument, (*before, *after, *outputs)))  # type: ignore[union-attr]

        in_parts(count, len(self.y), work)
        return found._replace(columns=found.columns.long())

    def paired(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the costs of some pairs, on the CPU."""
        device, size = self.x.device, LIMITS.differences.on(self.x.device)
        size = max(1, size // max(1, self.x.shape[1]))
        with torch.no_grad():
            parts = [
                self.cost.paired(self.x[i.to(device)], self.y[j.to(device)]).cpu().double()
                for i, j in zip(rows.split(size), columns.split(size), strict=True)
            ]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)

    def _compiled(self) -> ctypes.CDLL | None:
        formula = formula_of(self.cost)
        if formula is None or self.x.device.type != "cpu":
            return None
        library = native_library(_SOURCE, formula.expressions())
        if library is None:
            return None
        rows, columns = images_of(formula, self.x), images_of(formula, self.y)
        # Differences keep their digits by themselves; only roots of far points would not.
        self._formula, self._rows, self._tiles = formula, rows.contiguous(), tiled(columns)
        self._library = library
        return library if self._is_right() else None

    def _is_right(self) -> bool:
        """Return whether the costs of some pairs are those of the cost itself."""
        i, j = (torch.arange(0, len(p), max(1, len(p) // _FEW_CHECKED))[:_FEW_CHECKED] for p in (self.x, self.y))
        few = ReducedCosts.__new__(ReducedCosts)
        few.__dict__ = self.__dict__ | {"x": self.x[i], "y": self.y[j], "_rows": self._rows[i]}
        assert self._formula is not None
        few._tiles = tiled(images_of(self._formula, self.y[j]))
        given = self.cost.pairwise(self.x[i], self.y[j]).double()
        found = few.least(torch.zeros(len(j), dtype=torch.float64), len(j))
        costs = torch.full_like(given, torch.inf).scatter_(1, found.columns, found.values)
        finite = given.isfinite()
        return bool(((costs - given).abs()[finite] <= _CHECKED * given[finite].abs().clamp_min(1e-300)).all())

    def _by_blocks(self, v: Tensor, k: int, rows: Tensor | None, bounds: Tensor) -> Least:
        n, m = len(bounds), len(self.y)
        found = Least(
            torch.zeros(n, k, dtype=torch.int64),
            torch.full((n, k), torch.inf, dtype=torch.float64),
            torch.zeros(n, dtype=torch.int64),
        )
        fill, offsets = self.cost.geometry.filler(self.y), v.to(self.y)
        height = max(1, LIMITS.block.on(self.y.device) // m)
        for start in range(0, n, height):
            part = slice(start, min(n, start + height))
            x = self.x[part] if rows is None else self.x[rows[part].to(self.x.device)]
            block = fill(x.new_empty(len(x), m), x)
            check_costs(block)
            values, columns = block.sub_(offsets).topk(min(k, m), dim=1, largest=False)
            values = values.cpu().double()
            values[~(values < bounds[part, None])] = torch.inf
            found.values[part, : values.shape[1]] = values
            found.columns[part, : values.shape[1]] = columns.cpu()
            found.counts[part] = values.isfinite().sum(1)
        return found


def check_costs(costs: Tensor) -> None:
    """Raise where a cost is NaN or minus infinity."""
    if bool((costs.isnan() | costs.isneginf()).any()):
        raise ValueError(
            "the cost is NaN or minus infinity for some pairs: only plus infinity, which forbids one, is known"
        )
