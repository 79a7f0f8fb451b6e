"""GeomLoss on KeOps: compiled formulas in bounded memory, annealed by a fixed schedule of epsilons."""

import io
import math
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from lightning_gap.monge.ot.costs import is_learned
from lightning_gap.monge.ot.problem import Problem
from lightning_gap.monge.ot.result import OTResult
from lightning_gap.monge.ot.solvers.sizes import range_of_costs

__all__ = ["require_compiler", "solve_geomloss"]

# The ratio of successive epsilons in GeomLoss's annealing: .5, its default, leaves gradients 20 to 70 % off.
_SCALING = 0.9


def solve_geomloss(problem: Problem, solver: str) -> OTResult:
    """Solve a problem without a tolerance: what is left of its marginal error is not known."""
    p = problem.detached()
    if is_learned(problem.cost, problem.x):
        raise ValueError(
            f"solver={solver!r} does not differentiate through the parameters of the cost {p.cost}: use 'dense' or "
            "'blocked', or cost.requires_grad_(False)"
        )
    epsilon = p.resolved_epsilon(max(map(abs, range_of_costs(p))))
    f, g = (t.reshape(-1) for t in _samples_loss(problem, solver, epsilon, potentials=True))
    if p.rho is None:
        value = problem.a @ f + problem.b @ g
    else:
        value = _samples_loss(problem, solver, epsilon, potentials=False)
    return OTResult(value, f.detach(), g.detach(), epsilon=epsilon, marginal_error=math.nan, solver=solver, problem=p)


def _samples_loss(p: Problem, solver: str, epsilon: float, *, potentials: bool) -> Any:
    require_compiler(solver)
    (cost, x), (_, y) = p.cost.embedded(p.x), p.cost.embedded(p.y)
    p = replace(p, x=x, y=y, cost=cost)
    # With p = 1 GeomLoss's epsilon is its blur whatever the cost; multiscale wants its own p = 2, and halves the cost.
    halved = solver == "multiscale"
    with torch.no_grad():
        both = torch.cat([p.x, p.y]).detach()
        spread = 2 * float(p.cost.pairwise(both[:: max(1, len(both) // 256)], both[:: max(1, len(both) // 255)]).max())
    diameter = max(spread, epsilon)
    loss = _samples_loss_class()(
        "sinkhorn",
        p=2 if halved else 1,
        blur=math.sqrt(epsilon / 2) if halved else epsilon,
        reach=p.rho if p.rho is None or not halved else math.sqrt(p.rho / 2),
        diameter=math.sqrt(diameter) if halved else diameter,
        scaling=_SCALING,
        cost=None if halved else p.cost.keops_formula,
        debias=False,
        potentials=potentials,
        backend=solver,
    )
    # GeomLoss leaves gradients switched on, also under the caller's no_grad.
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        found = loss(p.a, p.x, p.b, p.y)
    factor = 2 if halved else 1
    return tuple(factor * t for t in found) if potentials else (factor * found).reshape(())


@cache
def _samples_loss_class() -> Any:
    # KeOps prints a notice on import where there is no CUDA: nothing the caller did, or can change.
    with redirect_stdout(io.StringIO()):
        from geomloss import SamplesLoss
    return SamplesLoss


@cache
def require_compiler(solver: str) -> None:
    """Raise unless KeOps has a compiler."""
    from shutil import which

    if not torch.cuda.is_available() and which("g++") is None and which("clang++") is None:
        raise RuntimeError(f"solver={solver!r} compiles KeOps formulas: install g++, or use solver='blocked'")
