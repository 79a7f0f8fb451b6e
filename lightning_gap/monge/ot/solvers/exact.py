"""Exact optimal transport between samples: small problems by their matrix, others by the pairs that matter."""

import sys
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_gap.monge.ot.costs import Cost
from lightning_gap.monge.ot.limits import LIMITS
from lightning_gap.monge.ot.problem import Problem
from lightning_gap.monge.ot.result import OTResult
from lightning_gap.monge.ot.solvers.gradients import once
from lightning_gap.monge.ot.solvers.memory import free_memory
from lightning_gap.monge.ot.solvers.sparse.reduced_costs import ReducedCosts, check_costs
from lightning_gap.monge.ot.solvers.sparse.solve import can_solve_sparsely, is_uniform, sparse_plan
from lightning_gap.precision import widest

__all__ = ["matched", "solve_exact"]

Duals = tuple[Tensor, Tensor]
# Assignments are quick by their matrix where so many rows have a best column of their own, as for a trained map.
_APART = 0.9
# Copies of a matrix that its solvers take.
_COPIES = 2


class _Plan(NamedTuple):
    """Rows, columns and masses of an optimal plan's entries; the dual potentials and what they prove, where known."""

    rows: Tensor
    columns: Tensor
    masses: Tensor
    duals: Duals | None = None
    gap: float | None = None
    proven: bool = True


def solve_exact(problem: Problem) -> OTResult:
    """Solve a problem without regularization; its value is differentiable in samples and weights."""
    p = problem.detached()
    x, y = (points.to(widest(points.device)) for points in (p.x, p.y))
    # What has no weight is left out, as it may be infinitely far.
    rows, columns = (w.nonzero()[:, 0] for w in (p.a, p.b))
    weighted = torch.is_grad_enabled() and (problem.a.requires_grad or problem.b.requires_grad)
    found = _plan(p.cost, x[rows], y[columns], p.a[rows], p.b[columns], with_duals=weighted)
    i, j, mass = rows[found.rows], columns[found.columns], found.masses.to(p.x)
    # The plan is locally constant, so this is differentiable as it stands; in the weights, by the dual potentials.
    value = (mass * problem.cost.paired(problem.x[i], problem.y[j])).sum(dtype=widest(p.x.device))
    if weighted:
        assert found.duals is not None
        u, v = (potential.to(x) for potential in found.duals)
        for w, own, cost, points, others, other in (
            (problem.a, u, p.cost, x, y[columns], v),
            (problem.b, v, p.cost.transposed(), y, x[rows], u),
        ):
            # Of what was left out, the best answers to the others.
            left = w.detach() == 0
            slope = torch.empty_like(w, dtype=own.dtype)
            slope[~left] = own
            if bool(left.any()):
                answers = ReducedCosts(cost, points[left], others, compiled=False).least(other.double().cpu(), 1)
                slope[left] = answers.values[:, 0].to(own)
            term = (slope.to(w.dtype) * (w - w.detach())).sum(dtype=value.dtype)
            value = value + once(term, "in weights with solver='exact': use 'dense'")
    return OTResult(
        value,
        None,
        None,
        epsilon=0.0,
        converged=found.proven,
        solver="exact",
        problem=p,
        entries=(i, j, mass),
        duality_gap=found.gap,
    )


def matched(cost: Cost, x: Tensor, y: Tensor) -> Tensor:
    """Return which of as many samples each is assigned to, at the least cost."""
    uniform = x.new_full((len(x),), 1 / len(x))
    found = _plan(cost, x, y, uniform, uniform)
    return found.columns[torch.argsort(found.rows)]


def _plan(cost: Cost, x: Tensor, y: Tensor, a: Tensor, b: Tensor, *, with_duals: bool = False) -> _Plan:
    """Return an optimal plan of samples that all have weight: by the matrix, or without one where that is faster."""
    size = len(x) * len(y)
    square = len(x) == len(y) and is_uniform(a) and is_uniform(b)
    assignment = square and not with_duals
    # Of other masses, POT's network simplex is the quicker one as long as its matrix is not large.
    limit = LIMITS.exact if square else LIMITS.exact_program if _has_pot() else 0
    sparse = size > limit and can_solve_sparsely()
    C = None
    if not sparse or (assignment and size <= LIMITS.dense.cpu):
        if size > LIMITS.dense.cpu and _COPIES * 8 * size > free_memory(x.cpu()):
            raise ValueError(
                f"solver='exact' needs {_COPIES * 8 * size / 1e9:.1f} GB for {len(x)} x {len(y)} samples without a "
                "compiler, more than there is: install g++ or clang++, with which it takes little"
            )
        C = _filled(cost, x, y)
        check_costs(C)
    if sparse and (C is None or _own_columns(C) < _APART * len(C)):
        del C
        found = sparse_plan(cost, x, y, a, b)
        if found is None:
            raise _infeasible()
        i, j = (part.to(x.device) for part in (found.rows, found.columns))
        return _Plan(i, j, found.masses.to(x), (found.u, found.v), found.paid - found.bound, found.proven)
    assert C is not None
    costs = C.to("cpu", torch.float64).numpy()
    if assignment:
        from scipy.optimize import linear_sum_assignment

        try:
            rows, columns = linear_sum_assignment(costs)
        except ValueError as error:
            raise _infeasible() from error
        masses, duals = np.full(len(x), 1 / len(x)), None
    else:
        rows, columns, masses, duals = _linear_program(costs, a, b)
    i, j = (torch.from_numpy(part).to(x.device) for part in (rows, columns))
    return _Plan(i, j, torch.from_numpy(masses).to(x), duals)


def _own_columns(C: Tensor) -> int:
    """Return how many columns are the best of a row, once each column's least cost is taken off."""
    return len((C - C.amin(0)).argmin(1).unique())


def _has_pot() -> bool:
    return sys.modules["ot"] is not None if "ot" in sys.modules else find_spec("ot") is not None


def _filled(cost: Cost, x: Tensor, y: Tensor) -> Tensor:
    return cost.geometry.fill(x.new_empty(len(x), len(y)), x, y)


def _infeasible() -> ValueError:
    return ValueError(
        "no plan avoids the pairs that an infinite cost forbids: allow more pairs, by a large and finite cost"
    )


def _linear_program(
    costs: np.ndarray[Any, Any], a: Tensor, b: Tensor
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any], Duals]:
    n, m = costs.shape
    try:
        import ot
    except ImportError as error:
        raise ImportError(
            f"exact transport of {n} to {m} samples with these weights is a linear program: "
            "pip install 'lightning_gap[exact]' or install g++ or clang++, or use equal numbers without weights"
        ) from error
    weights = [t.detach().to("cpu", torch.float64).numpy() for t in (a, b)]
    forbidden = np.isposinf(costs)
    if forbidden.any():
        # More than any plan of allowed pairs costs: a path of n + m of them, in either direction.
        allowed = np.abs(costs[~forbidden]).max(initial=1.0)
        costs = np.where(forbidden, 2 * (n + m) * allowed, costs)
    plan, log = ot.emd(*(w / w.sum() for w in weights), costs, numItermax=10_000_000, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"POT did not find the optimal plan of {n} to {m} samples: {log['warning']}")
    if plan[forbidden].sum() > 1e-9:
        raise _infeasible()
    rows, columns = np.nonzero(np.where(forbidden, 0, plan))
    return rows, columns, plan[rows, columns], (torch.from_numpy(log["u"]), torch.from_numpy(log["v"]))
