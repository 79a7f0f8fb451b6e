"""Exact transport from coarse to fine, over the pairs that are nearly tight, with a proof over all pairs.

A problem of a quarter of the samples, each of which stands for a cell of neighbours, gives potentials. At these the
pairs of least reduced cost of each row are known; along them shortest augmenting paths send mass. A row that would be
raised above what is known of it has its least pairs looked up again, by a pass over its pairs that keeps no matrix.
Once few rows are left, they take the pairs that are known for all there are, and pairs that then are below the
potentials are added, until there are none. The last pass is over all pairs: it proves the plan by a bound.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_gap.monge.ot.costs import Cost
from lightning_gap.monge.ot.solvers.sparse.cells import coarsened
from lightning_gap.monge.ot.solvers.sparse.network import Network, augment_library
from lightning_gap.monge.ot.solvers.sparse.reduced_costs import ReducedCosts
from lightning_gap.monge.ot.solvers.sparse.repeated import Distinct, split

__all__ = ["SparsePlan", "can_solve_sparsely", "is_uniform", "sparse_plan", "whole_masses"]

# Samples of a side up to which all pairs are known; how many fewer the coarser problem has; pairs of a row at first.
_SMALL, _FEWER, _KNOWN = 256, 4, 32
# Rows ask for pairs when they have used this share of what is known; ceilings are left when a round leaves this share.
_USED, _STALLED = 0.5, 0.5
_ROUNDS = 200
# What all weights sum to as whole numbers, unless smaller ones are exact.
_WHOLE = 1 << 52


class SparsePlan(NamedTuple):
    """A plan, and what proves it.

    Attributes:
        rows, columns: Where the plan has mass.
        masses: Shares of the whole.
        u, v: Dual potentials.
        paid: What the plan costs.
        bound: What no plan costs less than.
        proven: Whether no pair is below the potentials by more than rounding.
    """

    rows: Tensor
    columns: Tensor
    masses: Tensor
    u: Tensor
    v: Tensor
    paid: float
    bound: float
    proven: bool


def can_solve_sparsely() -> bool:
    """Return whether a compiler makes the search."""
    return augment_library() is not None


def sparse_plan(cost: Cost, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> SparsePlan | None:
    """Return an optimal plan in ``O(n + m)`` memory; ``None`` where no plan avoids pairs that an infinite cost forbids.

    Args:
        cost: The cost; the pairs where it is infinite are forbidden.
        x: ``(n, d)`` samples, in the widest format.
        y: ``(m, d)`` samples.
        a: ``(n,)`` positive weights.
        b: ``(m,)`` positive weights of the same sum.
    """
    sources, targets = (Distinct(*side) for side in zip((x, y), whole_masses(a, b), strict=True))
    network, done = _solved(ReducedCosts(cost, sources.points, targets.points), sources.masses, targets.masses)
    if network is None:
        return None
    if not done:
        network.prove()
    total = int(sources.masses.sum())
    used = np.flatnonzero(network.flow)
    rows, columns = (torch.from_numpy(part) for part in np.divmod(network.key[used], network.m))
    entry, i, masses = split(sources, rows, torch.from_numpy(network.flow[used]))
    entry, j, masses = split(targets, columns[entry], masses)
    u, v = torch.from_numpy(network.u)[sources.which], torch.from_numpy(network.v)[targets.which]
    return SparsePlan(i[entry], j, masses.double() / total, u, v, network.paid() / total, network.bound / total, done)


def is_uniform(weights: Tensor) -> bool:
    """Return whether weights that sum to 1 are equal but for rounding."""
    n = len(weights)
    return bool(((weights - 1 / n).abs() < 1e-6 / n).all())


def whole_masses(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights as whole numbers of one sum: exact for uniform ones, right to double's rounding for others."""
    n, m = len(a), len(b)
    a, b = (w.detach().double().cpu() for w in (a, b))
    if is_uniform(a) and is_uniform(b):
        common = int(np.gcd(n, m))
        return torch.full((n,), m // common), torch.full((m,), n // common)
    supply, demand = ((w / w.sum() * _WHOLE).round().long() for w in (a, b))
    for masses in (supply, demand):
        masses[masses.argmax()] += _WHOLE - masses.sum()
    return supply, demand


def _solved(costs: ReducedCosts, supply: Tensor, demand: Tensor) -> tuple[Network | None, bool]:
    """Return the network with all mass sent, and whether it is proven optimal; ``None`` if mass cannot be sent."""
    n, m = len(supply), len(demand)
    if max(n, m) <= _SMALL:
        network = Network(costs, supply, demand, torch.zeros(m, dtype=torch.float64), m)
        left, _ = network.augment(within_ceilings=True)
        return (None, False) if left else (network, network.prove())
    network = Network(costs, supply, demand, _first_potentials(costs, supply, demand), _KNOWN)
    waiting, strict = n, True
    for _ in range(_ROUNDS):
        left, asking = network.augment(within_ceilings=strict)
        above = network.u > network.ceiling
        if not left:
            strict = False
            if not network.price(np.flatnonzero(above)) and network.prove():
                return network, True
        elif strict:
            above |= network.ceiling - network.u < _USED * network.room
            above[asking] = True
            strict = left <= _STALLED * waiting
            network.price(np.flatnonzero(above), forget=True)
        else:
            if (network.known[asking] == m).all():
                return None, False
            network.double(asking)
            above[asking] = True
            network.price(np.flatnonzero(above))
        waiting = left
    if network.supply.any():
        raise RuntimeError(
            f"exact transport of {n} to {m} samples has {waiting} rows left after {_ROUNDS} rounds: use "
            "solver='auto' with a small epsilon"
        )
    return network, False


def _first_potentials(costs: ReducedCosts, supply: Tensor, demand: Tensor) -> Tensor:
    """Return potentials of the columns: the coarser problem's, improved by the answers of both sides."""
    n, m = len(supply), len(demand)
    (x, a), (y, b) = (
        coarsened(points, masses, max(1, len(points) // _FEWER))
        for points, masses in ((costs.x, supply), (costs.y, demand))
    )
    coarse = _solved(ReducedCosts(costs.cost, x, y), a, b)[0] if len(x) < n or len(y) < m else None
    if coarse is None:  # forbidden pairs
        return torch.zeros(m, dtype=torch.float64)
    back = costs.transposed()
    to_coarse = ReducedCosts(costs.cost.transposed(), costs.y, x)
    v = _finite(to_coarse.least(torch.from_numpy(coarse.u), 1).values[:, 0])
    u = _finite(costs.least(v, 1).values[:, 0])
    return _finite(back.least(u, 1).values[:, 0])


def _finite(potential: Tensor) -> Tensor:
    return torch.where(potential.isfinite(), potential, 0)
