"""Divergences and gaps of dense problems, by compiled C++, as one function of all samples.

A training step on some hundred samples has four problems, of a tenth of a millisecond each: results that are
differentiable one by one, and their sums, would take as long again.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gap.monge.ot.options import SolverOptions
from lightning_gap.monge.ot.problem import Problem
from lightning_gap.monge.ot.solvers.fused.native_dense import Found, NativeProblem
from lightning_gap.monge.ot.solvers.fused.pairs import pulled_back

__all__ = ["NativeTerms", "terms_natively"]

Again = Callable[[Sequence[tuple[Tensor, Tensor]]], list[Tensor]]


class NativeTerms(NamedTuple):
    """Values, differentiable in the samples, and how they were found.

    Attributes:
        values: A divergence or a gap for each problem, in double.
        totals: What each problem costs.
        epsilons: The regularization of each.
        solutions: What was found of each, and of its sides to themselves.
    """

    values: list[Tensor]
    totals: list[float]
    epsilons: list[float]
    solutions: list[Found]


class _Term(NamedTuple):
    """One divergence or gap, and its gradients in both sets of samples, as far as they are needed."""

    value: float
    found: list[Found]
    gradients: tuple[Tensor | None, Tensor | None]


def terms_natively(
    problems: Sequence[Problem], options: SolverOptions, *, fitting: int, debiased: bool, again: Again
) -> NativeTerms | None:
    r"""Return divergences of the first problems, and gaps of the others without :math:`2 \varepsilon H(a)`.

    Args:
        problems: Dense problems whose weights are not differentiated and not 0.
        options: Tolerance and most sweeps.
        fitting: How many of the problems are divergences.
        debiased: Whether what both sides pay to themselves is subtracted from the gaps.
        again: The values as functions of the samples that can be differentiated twice.

    Returns:
        The terms; ``None`` where a problem is not for the calls, or has to go the long way.
    """
    graph = torch.is_grad_enabled()
    points = [points for p in problems for points in (p.x, p.y)]
    needed = [graph and t.requires_grad for t in points]
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        # All of them before the first is solved: it would be solved once more on the long way.
        calls = [_calls(p.detached(), self_terms=debiased or k < fitting) for k, p in enumerate(problems)]
        taken = [each for each in calls if each is not None]
        if len(taken) < len(problems):
            return None
        terms = []
        for k, each in enumerate(taken):
            term = _term(each, options, (needed[2 * k], needed[2 * k + 1]), gap=k >= fitting)
            if term is None:
                return None
            terms.append(term)
    values = (
        _Known.apply(terms, again, *points)  # type: ignore[no-untyped-call]
        if any(needed)
        else [_scalar(term.value) for term in terms]
    )
    first = [term.found[0] for term in terms]
    everything = [found for term in terms for found in term.found]
    # One that is given is meant as it is, however much smaller one that does as well.
    epsilons = [p.epsilon.absolute or found.epsilon for p, found in zip(problems, first, strict=True)]
    return NativeTerms(list(values), [f.value for f in first], epsilons, everything)


def _calls(p: Problem, *, self_terms: bool) -> list[NativeProblem] | None:
    """Return a problem, and its sides to themselves, as the calls take them; ``None`` where one is not for them."""
    # Each at the epsilon of the whole, which is known when that is solved.
    sides = [
        Problem(points, points, weights, weights, p.cost, p.epsilon, uniform=p.uniform)
        for points, weights in (((p.x, p.a), (p.y, p.b)) if self_terms else ())
    ]
    calls = [NativeProblem.of(each) for each in (p, *sides)]
    taken = [each for each in calls if each is not None]
    return taken if len(taken) == len(calls) else None


def _term(calls: list[NativeProblem], options: SolverOptions, need: tuple[bool, bool], *, gap: bool) -> _Term | None:
    """Return a divergence, or what the rows pay less the least they could: with self terms added in both."""
    whole, *sides = calls
    solution = whole.solved(options, need)
    if solution is None:
        return None
    value, found, parts = solution.value, [solution], [solution.gx, solution.gy]
    for k, side in enumerate(sides):
        own = side.solved(options, (need[k], False), epsilon=solution.epsilon)
        if own is None:
            return None
        found.append(own)
        # Half of it, in which the points are twice.
        value -= own.value / 2
        part = parts[k]
        if part is not None and own.gx is not None:
            parts[k] = part - own.gx
    if gap:
        paid, gradient = whole.paid(any(need))
        if not math.isfinite(paid):
            return None
        value = paid - value
        # The rows' pull on the columns is opposite.
        parts = [
            None if part is None or gradient is None else sign * gradient - part
            for sign, part in zip((1, -1), parts, strict=True)
        ]
    gx, gy = (
        None if part is None else pulled_back(whole.formula, points, part)
        for part, points in zip(parts, (whole.problem.x, whole.problem.y), strict=True)
    )
    return _Term(value, found, (gx, gy))


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device="cpu")


class _Known(torch.autograd.Function):
    """Values whose gradients are known, and are derived once more where these are differentiated."""

    @staticmethod
    def forward(ctx: Any, terms: list[_Term], again: Again, *points: Tensor) -> tuple[Tensor, ...]:
        """Keep the gradients, and the samples."""
        ctx.again = again
        ctx.save_for_backward(*points, *(gradient for term in terms for gradient in term.gradients))
        # A value that is not asked for, or of samples without gradients, has none.
        ctx.set_materialize_grads(False)
        values = tuple(_scalar(term.value) for term in terms)
        known = zip(values, ctx.needs_input_grad[2::2], ctx.needs_input_grad[3::2], strict=True)
        ctx.mark_non_differentiable(*(value for value, *need in known if not any(need)))
        return values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        """Scale the gradients that are known, or derive them as functions of the samples."""
        saved, count = ctx.saved_tensors, 2 * len(grad_outputs)
        points, gradients = saved[:count], saved[count:]
        parts: Sequence[Tensor] = ()
        wanted = [k for k in range(count) if ctx.needs_input_grad[2 + k] and grad_outputs[k // 2] is not None]
        if not torch.is_grad_enabled():
            parts = [grad_outputs[k // 2].to(gradients[k].dtype) * gradients[k] for k in wanted]
        elif wanted:
            # Two names for two roles, also where both are the same samples.
            roles = [t.view_as(t) for t in points]
            values = ctx.again(list(zip(roles[::2], roles[1::2], strict=True)))
            asked = sorted({k // 2 for k in wanted})
            outputs, grads = [values[i] for i in asked], [grad_outputs[i] for i in asked]
            parts = torch.autograd.grad(outputs, [roles[k] for k in wanted], grads, create_graph=True)
        of = dict(zip(wanted, parts, strict=True))
        return (None, None, *(of.get(k) for k in range(count)))
