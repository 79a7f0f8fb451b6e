"""Gradients of a transport value: by the envelope theorem, and by the implicit function theorem the second time."""

from dataclasses import replace
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_gap.monge.ot.costs import Cost, is_learned
from lightning_gap.monge.ot.problem import Problem
from lightning_gap.monge.ot.result import OTResult

__all__ = ["Answer", "Envelope", "Solved", "once", "weight_slope", "with_learned_cost"]

Pair = tuple[Tensor, Tensor]


Value = TypeVar("Value", float, Tensor)


class Answer(NamedTuple, Generic[Value]):
    """Where a solver ended: value, potentials in units of the cost, all in the widest format, and gradients."""

    value: Value
    f: Tensor
    g: Tensor
    gx: Tensor | None
    gy: Tensor | None
    epsilon: float
    iterations: int
    marginal_error: float
    converged: bool


class Solved(NamedTuple):
    """What is known of a solved problem: its value, gradients in the points where needed, and potentials."""

    value: Tensor
    gx: Tensor | None
    gy: Tensor | None
    f: Tensor
    g: Tensor
    problem: Problem
    epsilon: float


class Envelope(torch.autograd.Function):
    """The value, with its gradient by the envelope theorem, and that gradient's by the implicit function theorem."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, solved: Solved) -> Tensor:
        """Keep what both derivatives need."""
        ctx.of = solved.problem.cost, solved.problem.rho, solved.epsilon
        ctx.save_for_backward(x, y, a, b, solved.gx, solved.gy, solved.f, solved.g)
        return solved.value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradient that is known, or derive it as a function of the inputs."""
        (grad,) = grad_outputs
        x, y, a, b, gx, gy, f, g = ctx.saved_tensors
        cost, rho, epsilon = ctx.of
        if torch.is_grad_enabled():
            gx, gy, f, g = _implicit_gradients((x, y), (a, b), (f, g), cost, rho, epsilon)
        grads = gx, gy, weight_slope(f, b, rho, epsilon), weight_slope(g, a, rho, epsilon)
        needed = [
            None if part is None or not need else grad.to(part.dtype) * part
            for part, need in zip(grads, ctx.needs_input_grad, strict=False)
        ]
        return (*needed, None)


def weight_slope(potential: Tensor, others: Tensor, rho: float | None, epsilon: float) -> Tensor:
    """Return the value's gradient in weights, from their potential and from the weights of the other side."""
    if rho is None:
        return potential
    return -(rho + epsilon) * torch.expm1(-potential / rho) + epsilon * (others.sum() - 1)


def _implicit_gradients(
    points: Pair, weights: Pair, potentials: Pair, cost: Cost, rho: float | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the envelope gradients as differentiable functions: one Newton step with a constant Jacobian."""
    # Two names for two roles, also where both are the same samples.
    x, y = (p.view_as(p) for p in points)
    (a, b), (f, g) = weights, potentials
    C = cost.pairwise(x, y)
    P = a[:, None] * b * torch.exp((f[:, None] + g - C) / epsilon)
    rows, columns = P.sum(1) - a, P.sum(0) - b
    if rho is not None:
        rows = P.sum(1) - a * torch.exp(-f / rho)
        columns = P.sum(0) - b * torch.exp(-g / rho)
    with torch.no_grad():
        n, m = P.shape
        J = P.new_zeros(n + m, n + m)
        J[:n, n:], J[n:, :n] = P, P.t()
        diagonal = torch.cat([P.sum(1), P.sum(0)])
        if rho is None:
            # Potentials are only known up to a constant; the rank-one term fixes it.
            z = torch.cat([torch.ones_like(f), -torch.ones_like(g)])
            J += torch.outer(z, z) / (n * m)
        else:
            diagonal = diagonal + epsilon / rho * torch.cat([a * torch.exp(-f / rho), b * torch.exp(-g / rho)])
        J.diagonal().add_(diagonal)
        inverse = torch.linalg.inv(J)
    step = -epsilon * (inverse @ torch.cat([rows, columns]))
    f, g = f + step[:n], g + step[n:]
    P = a[:, None] * b * torch.exp((f[:, None] + g - C) / epsilon)
    # The gradient of Σ P C with P held constant, which is still differentiable in P and in the points.
    moved = [t for t in (x, y) if t.requires_grad]
    found = iter(torch.autograd.grad(C, moved, P, create_graph=True)) if moved else iter(())
    gx = next(found) if x.requires_grad else torch.zeros_like(x)
    gy = next(found) if y.requires_grad else torch.zeros_like(y)
    return gx, gy, f, g


def with_learned_cost(problem: Problem, result: OTResult) -> OTResult:
    r"""Let the value depend on what the cost itself may learn: by the envelope theorem, :math:`\sum P\, c_\theta`."""
    if not is_learned(problem.cost, problem.x):
        return result

    def part(rows: slice, block: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (block * problem.cost.pairwise(x[rows], y)).sum()

    p = problem.detached()
    # The backward pass forms the costs anew, block by block, rather than keeping all of them.
    paid = torch.stack(
        [checkpoint(part, rows, block.clone(), p.x, p.y, use_reentrant=False) for rows, block in result.plan_blocks()]
    ).sum()
    term = once(paid - paid.detach(), "through a cost that learns: detach its parameters")
    return replace(result, value=result.value + term)


def once(term: Tensor, why: str) -> Tensor:
    """Return a term that raises where it is differentiated twice, as only its first derivative is right."""

    def refuse(gradient: Tensor) -> None:
        if torch.is_grad_enabled():
            raise NotImplementedError(f"optimal transport has no second derivatives {why}")

    if term.requires_grad:
        term.register_hook(refuse)
    return term
