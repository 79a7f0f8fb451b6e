"""Our own entropic solver: kernel, start, sweeps, and what follows from the potentials."""

import numpy as np
import torch
from torch import Tensor

from lightning_gap.monge.ot.options import SolverOptions
from lightning_gap.monge.ot.problem import Problem
from lightning_gap.monge.ot.result import OTResult
from lightning_gap.monge.ot.solvers.blocked import BlockedKernel
from lightning_gap.monge.ot.solvers.dense import DenseKernel
from lightning_gap.monge.ot.solvers.fused.kernel import FlashKernel, FusedKernel
from lightning_gap.monge.ot.solvers.fused.native_dense import solve_natively
from lightning_gap.monge.ot.solvers.gradients import Answer, Envelope, Solved, with_learned_cost
from lightning_gap.monge.ot.solvers.iterate import iterate_to_end
from lightning_gap.monge.ot.solvers.kernel import Kernel
from lightning_gap.monge.ot.solvers.memory import threads
from lightning_gap.monge.ot.solvers.sizes import FLOAT_RATIOS
from lightning_gap.monge.ot.solvers.warm_start import coarse_start
from lightning_gap.precision import widest

__all__ = ["solve_entropic"]

_KERNELS: dict[str, type[DenseKernel] | type[BlockedKernel]] = {
    "dense": DenseKernel,
    "blocked": BlockedKernel,
    "fused": FusedKernel,
    "flash": FlashKernel,
}


def solve_entropic(problems: list[Problem], solver: str, options: SolverOptions) -> list[OTResult]:
    """Solve problems of one shape: small ones by a call each where they are compiled, others together."""
    results: dict[int, OTResult] = {}
    if solver == "dense":
        for i, problem in enumerate(problems):
            need, p = _need(problem), problem.detached()
            with torch.no_grad():
                answer = solve_natively(p, options, need)
            if answer is not None:
                results[i] = _result(problem, p, answer, solver)
    rest = [i for i in range(len(problems)) if i not in results]
    if rest:
        results |= zip(rest, _solve_together([problems[i] for i in rest], solver, options), strict=True)
    return [results[i] for i in range(len(problems))]


def _solve_together(problems: list[Problem], solver: str, options: SolverOptions) -> list[OTResult]:
    """Solve problems of one shape by one kernel."""
    detached = [p.detached() for p in problems]
    n, m, dtype = len(detached[0].x), len(detached[0].y), detached[0].x.dtype
    needs = [_need(problem) for problem in problems]
    graph = torch.is_grad_enabled()
    # What overflows is found by the marginal error, and told with its remedy.
    with torch.no_grad(), np.errstate(all="ignore"), threads(n * m), _KERNELS[solver].of(detached) as kernel:
        if dtype != widest(detached[0].x.device) and not kernel.exponents_fit(*FLOAT_RATIOS):
            with torch.set_grad_enabled(graph):
                wide = [p.to(widest(p.x.device)) for p in problems]
                solved = solve_entropic(wide, solver, options)
                return [result.of(p) for result, p in zip(solved, detached, strict=True)]
        zeros = torch.zeros_like(kernel.a), torch.zeros_like(kernel.b)
        start = zeros if kernel.symmetric else coarse_start(kernel)
        found = iterate_to_end(kernel, start, tolerance=options.tolerance, max_iterations=options.max_iterations)
        answers = []
        for i, p in enumerate(detached):
            epsilon = kernel.epsilons[i]
            gx, gy, mass = _gradients_and_mass(kernel, i, p, needs[i])
            f, g = found.F[i] * epsilon, found.G[i] * epsilon
            value = _dual_value(p, f, g, epsilon, mass)
            told = found.iterations[i], found.marginal_errors[i], found.converged[i]
            answers.append(Answer(value, f, g, gx, gy, epsilon, *told))
        if solver == "fused" and not isinstance(kernel, FusedKernel):
            solver = "blocked"  # the formula did not give the costs, which was told
    return [_result(*each, solver) for each in zip(problems, detached, answers, strict=True)]


def _need(problem: Problem) -> tuple[bool, bool]:
    """Return whether the gradients in both sets of points are needed."""
    graph = torch.is_grad_enabled()
    return graph and problem.x.requires_grad, graph and problem.y.requires_grad


def _result(problem: Problem, p: Problem, answer: Answer[Tensor], solver: str) -> OTResult:
    """Return what was found of a problem, which detached is ``p``, as a result whose value is differentiable."""
    value, dtype = answer.value, problem.x.dtype
    f, g = answer.f.to(dtype), answer.g.to(dtype)
    inputs, graph = (problem.x, problem.y, problem.a, problem.b), torch.is_grad_enabled()
    if graph and any(t.requires_grad for t in inputs):
        solution = Solved(value, answer.gx, answer.gy, f, g, p, answer.epsilon)
        value = Envelope.apply(*inputs, solution)  # type: ignore[no-untyped-call]
    result = OTResult(
        value,
        f,
        g,
        epsilon=answer.epsilon if p.epsilon.absolute is None else p.epsilon.absolute,
        marginal_error=answer.marginal_error,
        iterations=answer.iterations,
        converged=answer.converged,
        solver=solver,
        problem=p,
    )
    return with_learned_cost(problem, result) if graph else result


def _gradients_and_mass(
    kernel: Kernel, i: int, p: Problem, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the envelope gradients that are needed, and the plan's mass, ``None`` where it is that of the weights."""
    # Exact rows make the plan's mass that of the weights: only where they are not is it to be counted.
    inexact = kernel.symmetric or p.rho is not None
    gx = gy = None
    if any(need):
        gx, gy = kernel.gradients(i, (True, False) if kernel.symmetric else need)
        # The rows' gradient is that of a plan whose rows are exact, the columns' of one whose columns are: what is left
        # of a marginal error would be multiplied by the displacement, however small the difference that is wanted.
        factors = kernel.column_factors(i)[:, None].to(p.x.dtype)
        if kernel.symmetric:
            assert gx is not None
            gx = gy = gx * factors
        elif gy is not None:
            gy = gy * factors
    elif inexact:
        kernel.gradients(i, need)
    return gx, gy, kernel.mass(i) if inexact else None


def _dual_value(p: Problem, f: Tensor, g: Tensor, epsilon: float, mass: Tensor | None) -> Tensor:
    a, b = p.a.to(f.dtype), p.b.to(f.dtype)
    if p.rho is None:
        value = (a @ f) / a.sum() + (b @ g) / b.sum()
        if mass is not None:
            value = value - epsilon * (mass - 1)
    else:
        assert mass is not None
        value = -p.rho * (a @ torch.expm1(-f / p.rho) + b @ torch.expm1(-g / p.rho))
        value = value - epsilon * (mass - a.sum() * b.sum())
    return value
