"""The pairs that are known, what flows along them, and the potentials: what the compiled search works on."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_gap.monge.ot.solvers.sparse.reduced_costs import Least, ReducedCosts
from lightning_gap.native import native_library

__all__ = ["Network", "augment_library"]

_SOURCE = Path(__file__).with_name("augment.cpp")
# Reduced costs below this share of their terms are rounding.
ROUNDING = 1e-13


def augment_library() -> ctypes.CDLL | None:
    """Return the compiled search; ``None`` where nothing compiles it."""
    return native_library(_SOURCE, {})


class Network:
    """A transport problem over some of its pairs.

    Args:
        costs: Passes over all pairs.
        supply: ``(n,)`` masses of the rows, whole numbers.
        demand: ``(m,)`` masses of the columns, of the same sum.
        v: ``(m,)`` first potentials of the columns.
        known: How many pairs of each row are known at first.

    Attributes:
        u, v: Potentials.
        bound: What no flow costs less than, as far as is known.
        ceiling: ``(n,)`` what all costs of unknown pairs less ``v`` reach, for each row, while ``v`` only falls.
    """

    def __init__(self, costs: ReducedCosts, supply: Tensor, demand: Tensor, v: Tensor, known: int) -> None:
        n, m = len(supply), len(demand)
        self.costs, self.n, self.m = costs, n, m
        self.a, self.b = supply.numpy(), demand.numpy()
        self.supply, self.demand = self.a.copy(), self.b.copy()
        self.v: NDArray[np.float64] = v.numpy().copy()
        self.u = np.full(n, np.inf)
        self.ceiling, self.room = np.full(n, np.inf), np.full(n, np.inf)
        self.known = np.full(n, min(known, m))
        self.key, self.bound = np.empty(0, dtype=np.int64), -np.inf
        self.flow, self.cost = self.key.copy(), np.empty(0)
        self.price(np.arange(n))
        self.usual_room = float(np.median(self.room))

    def price(self, rows: NDArray[np.int64], *, forget: bool = False) -> int:
        """Look up the least pairs of some rows; returns how many rows have one below their potential, which is lowered.

        Args:
            rows: Which.
            forget: Forget their other pairs, but for those with flow.
        """
        first, lowered = len(self.key) == 0, 0
        if len(rows) == 0:
            return 0
        added = []
        for known in np.unique(self.known[rows]):
            some = rows[self.known[rows] == known]
            found = self.costs.least(torch.from_numpy(self.v), int(known), rows=torch.from_numpy(some))
            added.append(self._keys(some, found))
            full = (found.counts == int(known)).numpy() & (known < self.m)
            self.ceiling[some] = np.where(full, found.values[:, -1].numpy(), np.inf)
            least = found.values[:, 0].numpy()
            low = (
                least < self.u[some] - ROUNDING * np.abs(self.u[some]) if not first else np.ones(len(some), dtype=bool)
            )
            self.u[some[low]] = np.where(np.isfinite(least[low]), least[low], 0)
            lowered += int(low.sum())
        if forget:
            priced = np.zeros(self.n, dtype=bool)
            priced[rows] = True
            self._keep((self.flow > 0) | ~priced[self.key // self.m])
        self.add(np.concatenate(added))
        room = self.ceiling[rows] - self.u[rows]
        if not first and forget:
            self.double(rows[room < self.usual_room / 4])
        self.room[rows] = room
        return lowered

    def _keys(self, rows: NDArray[np.int64], found: Least) -> NDArray[np.int64]:
        kept = np.arange(found.columns.shape[1]) < found.counts.numpy()[:, None]
        keys: NDArray[np.int64] = (rows[:, None] * self.m + found.columns.numpy())[kept]
        return keys

    def double(self, rows: NDArray[np.int64]) -> None:
        """Have twice as many pairs of some rows looked up next time."""
        self.known[rows] = np.minimum(2 * self.known[rows], self.m)

    def _keep(self, kept: NDArray[np.bool_]) -> None:
        self.key, self.flow, self.cost = self.key[kept], self.flow[kept], self.cost[kept]

    def add(self, keys: NDArray[np.int64]) -> None:
        """Make more pairs known."""
        new = np.setdiff1d(keys, self.key)
        pairs = (torch.from_numpy(part) for part in np.divmod(new, self.m))
        cost = self.costs.paired(*pairs).numpy()
        place = np.searchsorted(self.key, new)
        self.key = np.insert(self.key, place, new)
        self.flow = np.insert(self.flow, place, 0)
        self.cost = np.insert(self.cost, place, cost)

    def augment(self, *, within_ceilings: bool) -> tuple[int, NDArray[np.int64]]:
        """Send mass; returns how many rows have some left, and which rows ask for more pairs."""
        library = augment_library()
        assert library is not None
        rows, columns = np.divmod(self.key, self.m)
        first = np.searchsorted(rows, np.arange(self.n + 1)).astype(np.int64)
        asks = np.zeros(self.n, dtype=np.int8)
        ceiling = self.ceiling if within_ceilings else np.full(self.n, np.inf)
        # Kept by name while the library reads and writes them.
        arrays: list[NDArray[Any]] = [
            first,
            columns.astype(np.int32),
            self.cost,
            ceiling,
            self.supply,
            self.demand,
            self.flow,
        ]
        arrays += [self.u, self.v, asks]
        given = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
        left = library.augment(ctypes.c_long(self.n), ctypes.c_long(self.m), *given)
        return int(left), np.flatnonzero(asks)

    def paid(self) -> float:
        """Return what the flow costs."""
        used = self.flow > 0
        return float((self.flow[used] * self.cost[used]).sum())

    def prove(self) -> bool:
        """Return whether a pass over all pairs finds none below the potentials; make known those that it finds.

        The bound is then what no flow can cost less than, whatever was found.
        """
        u, v = (potential - ROUNDING * np.abs(potential) for potential in (self.u, self.v))
        least = self.costs.least(torch.from_numpy(v), 1, bounds=torch.from_numpy(u))
        below = least.counts.numpy() > 0
        low = np.where(below, least.values[:, 0].numpy(), u)
        self.bound = float((self.a * low).sum() + (self.b * v).sum())
        self.price(np.flatnonzero(below))
        return not below.any()
