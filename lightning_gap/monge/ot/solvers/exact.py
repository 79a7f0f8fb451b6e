"""Exact optimal transport between samples: an assignment where it is one, a linear program else."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_gap.monge.ot.costs import Cost
from lightning_gap.monge.ot.problem import Problem
from lightning_gap.monge.ot.result import OTResult
from lightning_gap.monge.ot.solvers.gradients import once
from lightning_gap.precision import widest

__all__ = ["exact_plan", "solve_exact"]


Duals = tuple[Tensor, Tensor]


def solve_exact(problem: Problem) -> OTResult:
    """Solve a problem without regularization; its value is differentiable in samples and weights."""
    p = problem.detached()
    x, y = (points.to(widest(points.device)) for points in (p.x, p.y))
    # What has no weight is left out, as it may be infinitely far.
    rows, columns = (w.nonzero()[:, 0] for w in (p.a, p.b))
    C = _filled(p.cost, x[rows], y[columns])
    weighted = torch.is_grad_enabled() and (problem.a.requires_grad or problem.b.requires_grad)
    i, j, mass, duals = exact_plan(C, p.a[rows], p.b[columns], with_duals=weighted)
    i, j, mass = rows[i], columns[j], mass.to(p.x.dtype)
    # The plan is locally constant, so this is differentiable as it stands; in the weights, by the dual potentials.
    value = (mass * problem.cost.paired(problem.x[i], problem.y[j])).sum(dtype=widest(p.x.device))
    if duals is not None:
        u, v = (potential.to(C) for potential in duals)
        for w, own, cost, points, others, other in (
            (problem.a, u, p.cost, x, y[columns], v),
            (problem.b, v, p.cost.transposed(), y, x[rows], u),
        ):
            # Of what was left out, the best answers to the others.
            left = w.detach() == 0
            slope = torch.empty_like(w, dtype=own.dtype)
            slope[~left] = own
            slope[left] = (_filled(cost, points[left], others) - other).amin(1)
            term = (slope.to(w.dtype) * (w - w.detach())).sum(dtype=value.dtype)
            value = value + once(term, "in weights with solver='exact': use 'dense'")
    return OTResult(value, None, None, epsilon=0.0, solver="exact", problem=p, entries=(i, j, mass))


def _filled(cost: Cost, x: Tensor, y: Tensor) -> Tensor:
    return cost.geometry.fill(x.new_empty(len(x), len(y)), x, y)


def exact_plan(
    C: Tensor, a: Tensor, b: Tensor, *, with_duals: bool = False
) -> tuple[Tensor, Tensor, Tensor, Duals | None]:
    """Return an optimal plan as rows, columns and masses of its entries, and the dual potentials if they are wanted.

    Equal numbers of equally weighted samples are an assignment problem, solved by SciPy's
    ``linear_sum_assignment`` (Crouse 2016); it is quick where the identity is nearly optimal, as for a trained map.
    Other problems, and the potentials, which are the gradient in the weights, need POT's network simplex. A pair of
    infinite cost is forbidden.
    """
    from scipy.optimize import linear_sum_assignment

    costs = C.detach().to("cpu", torch.float64).numpy()
    n, m = costs.shape
    if np.isnan(costs).any() or np.isneginf(costs).any():
        raise ValueError(
            "the cost is NaN or minus infinity for some pairs: only plus infinity, which forbids one, is known"
        )
    duals = None
    if not with_duals and n == m and _is_uniform(a) and _is_uniform(b):
        try:
            rows, columns = linear_sum_assignment(costs)
        except ValueError as error:
            raise _infeasible() from error
        masses = np.full(n, 1 / n)
    else:
        rows, columns, masses, duals = _linear_program(costs, a, b)
    found = (torch.from_numpy(part).to(C.device) for part in (rows, columns))
    return (*found, torch.from_numpy(masses).to(C), duals)  # type: ignore[return-value]


def _is_uniform(weights: Tensor) -> bool:
    n = len(weights)
    return bool(((weights - 1 / n).abs() < 1e-6 / n).all())


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
            "pip install 'lightning_gap[exact]', or use equal numbers without weights"
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
