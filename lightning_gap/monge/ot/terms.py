"""Divergences and gaps as sums of transport problems, which are solved together where their shapes agree."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_gap.monge.ot.compiling import eager
from lightning_gap.monge.ot.costs import CallableCost, is_learned
from lightning_gap.monge.ot.epsilon import Epsilon
from lightning_gap.monge.ot.options import SolverOptions
from lightning_gap.monge.ot.problem import Problem
from lightning_gap.monge.ot.result import OTResult
from lightning_gap.monge.ot.solve import choose_solver, report_unconverged, solve_all
from lightning_gap.monge.ot.solvers.fused.native_terms import terms_natively
from lightning_gap.monge.ot.subsets import counted
from lightning_gap.precision import widest

__all__ = ["Convention", "Terms", "each", "solve_terms", "stacked"]

Convention = Literal["shannon", "kl", "debiased"]

# A difference smaller than this share of its terms is known to less than a thousandth in float32.
_CANCELLED = 1e-4


class Terms(NamedTuple):
    """Divergences and gaps that were solved together.

    Attributes:
        marginal_error: The largest L1 marginal error of all their problems; NaN where a solver does not tell, or there
            is none.
        converged: Whether all of them reached the tolerance.
    """

    divergences: list[Tensor]
    gaps: list[Tensor]
    marginal_error: float
    converged: bool


@eager
def solve_terms(
    fitting: list[Problem],
    regularizing: list[Problem],
    options: SolverOptions,
    *,
    convention: Convention = "shannon",
    silent: bool = False,
) -> Terms:
    """Return the divergences of some problems, and the gaps of others in a convention.

    If ``silent``, it is left to the caller to look whether they converged, and small differences are taken as they are.
    """
    problems = fitting + regularizing
    terms, totals = _natively(fitting, regularizing, options, convention, silent) or _of_results(
        fitting, regularizing, options, convention, silent
    )
    if not (silent or options.solver == "exact") and _cancelled(terms.divergences + terms.gaps, problems, totals):
        # What is left of float32's digits is too little: once more in double.
        wide_fitting, wide_gaps = ([p.to(torch.float64) for p in part] for part in (fitting, regularizing))
        terms = solve_terms(wide_fitting, wide_gaps, options, convention=convention)
    return terms._replace(
        divergences=[value.to(p.x.dtype) for p, value in zip(fitting, terms.divergences, strict=True)],
        gaps=[value.to(p.x.dtype) for p, value in zip(regularizing, terms.gaps, strict=True)],
    )


# Terms in the widest format, and what each problem costs.
_Solved = tuple[Terms, Sequence[float | Tensor]]


def _natively(
    fitting: list[Problem], regularizing: list[Problem], options: SolverOptions, convention: Convention, silent: bool
) -> _Solved | None:
    """Return the terms of problems that are all for compiled calls, which take less time by one function."""
    problems, count = fitting + regularizing, len(fitting)
    if not problems or not all(_is_plain(p, options) for p in problems):
        return None
    # Without their samples: whoever keeps a value after its backward pass would keep these as well.
    nothing = torch.empty(0, device="cpu")
    bare = [replace(p, x=nothing, y=nothing) for p in problems]

    def again(points: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        moved = [replace(p, x=x, y=y) for p, (x, y) in zip(bare, points, strict=True)]
        terms, _ = _of_results(moved[:count], moved[count:], options, convention, silent=True)
        return terms.divergences + terms.gaps

    found = terms_natively(problems, options, fitting=count, debiased=convention == "debiased", again=again)
    if found is None:
        return None
    for each in () if silent else found.solutions:
        if not each.converged:
            report_unconverged("dense", each.marginal_error, each.epsilon, options, problems[0].x.dtype)
    gaps = found.values[count:]
    if convention == "shannon":
        gaps = [
            gap + _entropies(p, first) for p, gap, first in zip(regularizing, gaps, found.epsilons[count:], strict=True)
        ]
    error = max(each.marginal_error for each in found.solutions)
    converged = all(each.converged for each in found.solutions)
    return Terms(found.values[:count], gaps, error, converged), found.totals


def _is_plain(p: Problem, options: SolverOptions) -> bool:
    """Return whether a problem is small, and differentiable in its samples alone."""
    if options.solver not in ("auto", "dense") or p.rho is not None or p.x.device.type != "cpu":
        return False
    if not p.uniform and (p.a.requires_grad or p.b.requires_grad or p.counted() is not p):
        return False
    return choose_solver(options.solver, p.cost, p.x, p.y) == "dense" and not is_learned(p.cost, p.x)


def _of_results(
    fitting: list[Problem], regularizing: list[Problem], options: SolverOptions, convention: Convention, silent: bool
) -> _Solved:
    """Return the terms of any problems, as sums of results that are differentiable one by one."""
    problems = fitting + regularizing
    solved, exact = solve_all(problems, options, silent=silent), options.solver == "exact"
    debiased = 0 if exact else len(fitting) + (len(regularizing) if convention == "debiased" else 0)
    to_themselves = _to_themselves(problems[:debiased], solved[:debiased], options, silent)
    self_terms = [(first.value + second.value) / 2 for first, second in to_themselves]
    divergences = [result.value for result in solved[: len(fitting)]]
    if not exact:
        divergences = [_divergence(*one) for one in zip(fitting, solved, self_terms, strict=False)]
    gaps = []
    for k, p in enumerate(regularizing, start=len(fitting)):
        gap = _paid(p) - solved[k].value
        if convention == "debiased" and not exact:
            gap = gap + self_terms[k] - _standing(p)
        elif convention == "shannon" and not exact:
            gap = gap + _entropies(p, solved[k].epsilon)
        gaps.append(gap)
    everything = solved + [result for pair in to_themselves for result in pair]
    error = max((result.marginal_error for result in everything), default=math.nan)
    terms = Terms(divergences, gaps, error, all(result.converged for result in everything))
    return terms, [result.value.detach() for result in solved]


def _entropies(p: Problem, epsilon: float) -> Tensor | float:
    """Return what Shannon's entropy makes of a gap: KL(P | a⊗a) = 2H(a) - H(P)."""
    return 2 * epsilon * (math.log(len(p.a)) if p.uniform else torch.special.entr(p.a).sum())


def _cancelled(values: list[Tensor], problems: list[Problem], totals: Sequence[float | Tensor]) -> bool:
    """Return whether a value is so small a difference of its terms that float32 costs do not tell it."""
    if not problems or problems[0].x.dtype != torch.float32 or problems[0].x.device.type != "cpu":
        return False
    pairs = zip(values, totals, strict=True)
    return any(abs(float(value.detach())) < _CANCELLED * abs(float(total)) for value, total in pairs)


def _paid(p: Problem) -> Tensor:
    a, x, y = (p.a, p.x, p.y) if p.uniform else counted(p.a, p.x, p.y)
    return (a * p.cost.paired(x, y)).sum(dtype=widest(x.device))


def _standing(p: Problem) -> Tensor | float:
    """Return what samples and images cost to themselves: nothing, but for a function of the user's."""
    if not isinstance(p.cost, CallableCost):
        return 0.0
    return (p.a * (p.cost.paired(p.x, p.x) + p.cost.paired(p.y, p.y))).sum(dtype=widest(p.x.device)) / 2


def _divergence(p: Problem, result: OTResult, self_terms: Tensor) -> Tensor:
    divergence = result.value - self_terms
    if p.rho is not None:
        divergence = divergence + result.epsilon / 2 * (p.a.sum() - p.b.sum()).square()
    return divergence


def _to_themselves(
    problems: list[Problem], solved: list[OTResult], options: SolverOptions, silent: bool
) -> list[tuple[OTResult, OTResult]]:
    """Return the transport of both measures to themselves, for each problem, at the epsilon it was solved at."""
    both = [
        Problem(points, points, w, w, p.cost, Epsilon(result.epsilon), p.rho, uniform=p.uniform)
        for p, result in zip(problems, solved, strict=True)
        for points, w in ((p.x, p.a), (p.y, p.b))
    ]
    results = solve_all(both, options, silent=silent)
    return list(zip(results[::2], results[1::2], strict=True))


def each(name: str, x: Tensor, y: Tensor, *weights: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Return the arguments of each of ``(B, n, d)`` problems, or of the one of ``(n, d)`` samples."""
    if not (isinstance(x, Tensor) and isinstance(y, Tensor) and x.dim() == y.dim() == 3):
        return iter([(x, y, *weights)])
    if len(x) != len(y):
        raise ValueError(f"x holds {len(x)} problems but {name} {len(y)}: their first dimensions must agree")
    for w in weights:
        if w is not None and (w.dim() != 2 or len(w) != len(x)):
            raise ValueError(f"weights must have shape ({len(x)}, n) for {len(x)} problems, got {tuple(w.shape)}")
    rows = ([None] * len(x) if w is None else list(w) for w in weights)
    return zip(x, y, *rows, strict=True)


def stacked(values: list[Tensor], x: Tensor) -> Tensor:
    """Return the value of one problem, or the values of as many as there are."""
    if x.dim() < 3:
        return values[0]
    return torch.stack(values) if values else x.new_zeros(0)
