r"""Optimal transport between samples, one entry with several solvers behind it.

.. math::
    OT_\varepsilon(\alpha, \beta) = \min_{P \in \Pi(a, b)} \langle P, C \rangle
        + \varepsilon\, KL(P \,|\, a \otimes b)

Gradients are those of the envelope theorem, :math:`\partial_{x_i} OT_\varepsilon = \sum_j P_{ij} \nabla_1 c(x_i, y_j)`,
never back-propagated through iterations; second derivatives come from the implicit function theorem.

============== =============================================================== ==========================
solver         how                                                             memory
============== =============================================================== ==========================
``dense``      our own, in the kernel domain, to a marginal error              two ``n x m`` matrices
``blocked``    our own, by blocks of rows, to a marginal error                 ``O(n + m)`` and a block
``exact``      assignment or linear program, no regularization                 ``n x m`` in double
``tensorized`` GeomLoss, dense matrices, a fixed schedule of epsilons          several ``n x m`` matrices
``online``     GeomLoss on KeOps, compiled formulas, the same schedule         ``O(n + m)``
``multiscale`` GeomLoss on KeOps, coarse to fine, for squared distances, d < 4 ``O(n + m)``
============== =============================================================== ==========================
"""

import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_gap.checks import check_integer
from lightning_gap.monge.ot.checks import check_epsilon, check_pair, check_transforms, check_weights, solver_precision
from lightning_gap.monge.ot.compiling import eager
from lightning_gap.monge.ot.costs import CallableCost, Cost, SqEuclidean, resolve
from lightning_gap.monge.ot.epsilon import Scale, share_of, share_of_cost
from lightning_gap.monge.ot.solvers.exact import exact_plan
from lightning_gap.monge.ot.solvers.fixed_point import coarse_start, dense_pairs, iterate_to_end
from lightning_gap.monge.ot.solvers.kernels import (
    BlockedKernel,
    DenseKernel,
    Kernel,
    buffers,
    damping,
    exponentiate,
    row_blocks,
    soft_minimum,
    threads,
)
from lightning_gap.precision import full_precision, widest

__all__ = [
    "ConvergenceWarning",
    "CostLike",
    "OTResult",
    "Problem",
    "RelativeTo",
    "Solver",
    "check_solver",
    "check_tolerance",
    "optimal_transport",
    "share_of_mean_cost",
    "solve_all",
]

RelativeTo = Scale
Solver = Literal["auto", "dense", "blocked", "exact", "tensorized", "online", "multiscale"]
CostLike = str | Cost | Callable[[Tensor, Tensor], Tensor]

# Numbers of the matrices that are solved together; more of them would fall out of a CPU's cache.
_TOGETHER, _GPU_TOGETHER = 1 << 21, 1 << 27
# Matrices of fewer bytes are not worth asking the system for its free memory.
_SMALL_BYTES = 1 << 28
# Costs of more or of fewer epsilons than these are not for float32: their exponentials would lose digits that count.
_FLOAT_RATIOS = 1e-2, 1e6
# An epsilon so many times the largest cost is as good as any larger one, of which no number would be left.
_LARGEST_EPSILON = 1e6
# Samples of each side that tell the size of costs which are not kept.
_FEW_SAMPLES = 256
# The ratio of successive epsilons in GeomLoss's annealing: .5, its default, leaves gradients 20 to 70 % off.
_SCALING = 0.9


class ConvergenceWarning(UserWarning):
    """A solver stopped before it reached its tolerance."""


@dataclass(frozen=True)
class OTResult:
    r"""A solved transport problem.

    Attributes:
        value: :math:`OT_\varepsilon`, a scalar that is differentiable in samples and weights.
        f: ``(n,)`` potential of the source, detached; ``None`` for an exact assignment.
        g: ``(m,)`` potential of the target, detached; ``None`` for an exact assignment.
        epsilon: The absolute regularization, 0 for exact transport.
        marginal_error: L1 distance of the plan's marginals from the weights; NaN with ``"online"`` and
            ``"multiscale"``, where finding out would cost as much as the solve.
        iterations: Sweeps over the full problem; 0 for solvers that do not count.
        converged: Whether the tolerance was reached, or the marginal error is not known.
        solver: The solver that was chosen.
    """

    value: Tensor
    f: Tensor | None
    g: Tensor | None
    epsilon: float
    marginal_error: float
    iterations: int
    converged: bool
    solver: str
    _problem: "Problem" = field(repr=False)
    _entries: tuple[Tensor, Tensor, Tensor] | None = field(default=None, repr=False)

    def plan(self) -> Tensor:
        """Return the plan as an ``(n, m)`` matrix, detached."""
        p = self._problem
        plan = p.x.new_zeros(len(p.x), len(p.y))
        for rows, block in self._plan_blocks():
            plan[rows] = block
        return plan

    def apply(self, values: Tensor) -> Tensor:
        """Return ``plan() @ values`` without ever holding the plan.

        Args:
            values: ``(m, k)`` values on the target samples.

        Returns:
            ``(n, k)`` sums on the source samples, detached.
        """
        with full_precision(values.device):
            return torch.cat([block @ values.detach() for _, block in self._plan_blocks()])

    def barycentric_projection(self) -> Tensor:
        """Return where each source sample is sent on average: ``(n, d)``, detached.

        A sample of weight 0 is sent where it would be with a small one. Where an exact plan has no mass, that is the
        sample itself.
        """
        p = self._problem
        y = torch.cat([torch.ones_like(p.y[:, :1]), p.y], dim=1).detach()
        with full_precision(y.device):
            images = torch.cat([block @ y for _, block in self._plan_blocks(conditional=True)])
        return torch.where(images[:, :1] > 0, images[:, 1:] / images[:, :1], p.x)

    def transport_cost(self) -> Tensor:
        r"""Return :math:`\langle P, C \rangle`, the cost without the entropy, detached."""
        p = self._problem
        with torch.no_grad():
            # A forbidden pair has no mass, and infinitely much of it costs nothing.
            parts = [
                torch.where(block > 0, block * p.cost.pairwise(p.x[rows], p.y), 0).sum()
                for rows, block in self._plan_blocks()
            ]
        return torch.stack(parts).sum()

    @torch.no_grad()
    def _plan_blocks(self, *, conditional: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows of the plan; if conditional, each up to a factor, which also a row of weight 0 has."""
        p = self._problem
        for rows in row_blocks(p.x, len(p.y)):
            block = p.x.new_zeros(rows.stop - rows.start, len(p.y))
            if self._entries is not None:
                i, j, mass = self._entries
                here = (i >= rows.start) & (i < rows.stop)
                block[i[here] - rows.start, j[here]] = mass[here]
            else:
                assert self.f is not None
                assert self.g is not None
                p.cost.fill(block, p.x[rows], p.y)
                block.sub_(self.f[rows, None]).sub_(self.g).mul_(-1 / self.epsilon)
                if conditional:
                    block.sub_(torch.where(p.b > 0, block, -torch.inf).amax(1, keepdim=True))
                exponentiate(block)
                block.mul_(p.b) if conditional else block.mul_(p.a[rows, None]).mul_(p.b)
                # What is far off and has no weight may be infinite here.
                block.masked_fill_(p.b == 0, 0)
                if not conditional:
                    block.masked_fill_(p.a[rows, None] == 0, 0)
            yield rows, block


@dataclass(frozen=True)
class Problem:
    """A transport problem whose arguments have been checked.

    Attributes:
        x: ``(n, d)`` samples.
        y: ``(m, d)`` samples; ``x`` itself, with ``b`` being ``a``, for a measure against itself.
        a: ``(n,)`` weights.
        b: ``(m,)`` weights.
        cost: The ground cost.
        rho: Strength of soft marginals, in units of the cost; ``None`` for hard ones.
        epsilon: Regularization in units of the cost, or ``None``.
        relative_epsilon: Where it is ``None``, its share of the mean cost.
        relative_to: ``"mean"``, or another scale of the costs: see :func:`~lightning_gap.monge.ot.epsilon.cost_scale`.
        uniform: Whether no weights were given, so that none is 0.
    """

    x: Tensor
    y: Tensor
    a: Tensor
    b: Tensor
    cost: Cost
    rho: float | None
    epsilon: float | None
    relative_epsilon: float = 1.0
    relative_to: Scale = "mean"
    uniform: bool = False

    def share(self, largest: float) -> float:
        """Return the epsilon that is given or that a relative one means, in blocks of bounded memory.

        Args:
            largest: The largest cost, or nearly.
        """
        if self.epsilon is not None:
            return self.epsilon
        if largest == 0:
            # All is where it should be, whatever epsilon is; the share of no cost is nearly none.
            return 4 * torch.finfo(self.x.dtype).tiny
        weights = self.a, self.b
        return share_of_cost(self.relative_epsilon, self.cost, self.x, self.y, weights, self.relative_to)

    @property
    def to_itself(self) -> bool:
        """Whether both potentials agree."""
        return self.x is self.y and self.a is self.b and self.cost.symmetric

    def detached(self) -> "Problem":
        """Return the same problem without a graph."""
        x, a = self.x.detach(), self.a.detach()
        same = self.x is self.y and self.a is self.b
        y, b = (x, a) if same else (self.y.detach(), self.b.detach())
        return replace(self, x=x, y=y, a=a, b=b)

    def to(self, dtype: torch.dtype) -> "Problem":
        """Return the same problem in another precision, differentiably."""
        x, a = self.x.to(dtype), self.a.to(dtype)
        same = self.x is self.y and self.a is self.b
        y, b = (x, a) if same else (self.y.to(dtype), self.b.to(dtype))
        return replace(self, x=x, y=y, a=a, b=b)


def optimal_transport(
    x: Tensor,
    y: Tensor,
    *,
    cost: CostLike = "sqeuclidean",
    epsilon: float | None = None,
    relative_epsilon: float = 0.05,
    relative_to: RelativeTo = "mean",
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
    reach: float | None = None,
    solver: str = "auto",
    tolerance: float = 1e-5,
    max_iterations: int = 2000,
    strict: bool = False,
) -> OTResult:
    r"""Solve optimal transport between two sets of samples.

    .. math::
        OT_\varepsilon = \min_{P} \langle P, C \rangle + \varepsilon KL(P | a \otimes b)
            + \rho KL(P 1 | a) + \rho KL(P^\top 1 | b)

    where the last two terms are hard constraints unless ``reach``, :math:`\rho`, is given.

    Args:
        x: ``(n, d)`` samples.
        y: ``(m, d)`` samples; ``x`` itself for the self term of a divergence, which is solved faster.
        cost: Ground cost: a name, an instance from :mod:`lightning_gap.costs`, or a function.
        epsilon: Regularization in units of the cost; overrides ``relative_epsilon``.
        relative_epsilon: Regularization as a share of the mean cost between ``x`` and ``y`` (weighted, detached).
        relative_to: ``"mean"``; ``"std"`` for a share of the costs' standard deviation; ``"typical"`` for one of their
            mean without outliers.
        weights: ``(n,)`` and ``(m,)`` weights; uniform by default. They sum to 1 unless ``reach`` is given.
        reach: Strength of soft marginals, in units of the cost; ``None`` for hard ones.
        solver: ``"auto"`` or one of the table above. It takes ``"dense"`` while the matrices fit (4096 x 4096 on a
            CPU, 16384 x 16384 on a GPU), beyond that ``"blocked"``.
        tolerance: L1 marginal error at which ``"dense"`` and ``"blocked"`` stop; the gradient is then right to some
            twice as much of the gradient of what is paid.
        max_iterations: Most sweeps of these two.
        strict: Raise, rather than warn, where the tolerance was not reached.

    Returns:
        The result; its ``value`` is differentiable in ``x``, ``y`` and the weights, twice with ``"dense"`` and
        ``"blocked"``.

    Raises:
        TypeError: An argument is no floating-point tensor.
        ValueError: Shapes do not fit, values are not finite, an option is unknown, or the solver cannot take the
            problem.
        RuntimeError: ``strict``, and the tolerance was not reached; or KeOps was named and cannot compile.

    Example:
        >>> import torch
        >>> x = torch.linspace(0, 1, 100, dtype=torch.float64)[:, None]
        >>> result = optimal_transport(x, 2 * x, epsilon=1e-3, tolerance=1e-6)
        >>> result.converged, round(float(result.transport_cost()), 2)  # ∫ x² dx
        (True, 0.34)
        >>> optimal_transport(x, 2 * x, solver="exact").value.round(decimals=4)
        tensor(0.3350, dtype=torch.float64)
    """
    check_transforms(x, y)
    check_pair("x", x, "y", y)
    rho = check_epsilon("reach", reach)
    x, y = (solver_precision(x),) * 2 if y is x else (solver_precision(x), solver_precision(y))
    a = check_weights("weights[0]", weights[0], x, balanced=rho is None)
    same = y is x and weights[0] is weights[1]
    b = a if same else check_weights("weights[1]", weights[1], y, balanced=rho is None)
    cost = resolve(cost)
    cost.check_domain("x", x)
    if y is not x:
        cost.check_domain("y", y)
    regularization = check_regularization(epsilon, relative_epsilon, relative_to, rho, solver)
    problem = Problem(x, y, a, b, cost, rho, *regularization, uniform=all(w is None for w in weights))
    options: dict[str, Any] = {"tolerance": tolerance, "max_iterations": max_iterations, "strict": strict}
    (result,) = solve_all([problem], solver=solver, **options)
    return replace(result, value=result.value.to(x.dtype))


@eager
def solve_all(
    problems: Sequence[Problem],
    *,
    solver: str,
    tolerance: float,
    max_iterations: int,
    strict: bool = False,
    silent: bool = False,
) -> list[OTResult]:
    """Solve problems whose arguments have been checked; those of one shape together, which costs little more than one.

    Args:
        problems: The problems.
        solver: See :func:`optimal_transport`.
        tolerance: See :func:`optimal_transport`.
        max_iterations: See :func:`optimal_transport`.
        strict: See :func:`optimal_transport`.
        silent: Leave it to the caller to look whether the results converged.

    Returns:
        The results, with values in the widest format: what is subtracted from them may be nearly as large.
    """
    check_tolerance(tolerance)
    check_integer("max_iterations", max_iterations)
    for p in problems:
        check_transforms(p.x, p.y, p.a, p.b)
    given, problems = problems, [_counted(p) if solver != "exact" else p for p in problems]
    groups: dict[Any, list[int]] = {}
    for number, p in enumerate(problems):
        chosen = _choose(solver, p.cost, p.x, p.y)
        shape: Any = number
        if chosen == "dense":
            shape = (len(p.x), len(p.y), p.x.dtype, p.x.device, p.to_itself, p.rho is None)
        groups.setdefault((chosen, shape), []).append(number)
    results: dict[int, OTResult] = {}
    for (chosen, _), numbers in groups.items():
        first = problems[numbers[0]]
        most = _TOGETHER if first.x.device.type == "cpu" else _GPU_TOGETHER
        together = max(1, most // (len(first.x) * len(first.y)))
        for start in range(0, len(numbers), together):
            part = numbers[start : start + together]
            found = _solve_alike([problems[k] for k in part], chosen, tolerance, max_iterations)
            results |= zip(part, found, strict=True)
    for number in range(0 if silent else len(problems)):
        if not results[number].converged:
            _report(results[number], tolerance, max_iterations, strict)
    return [
        results[number] if p is whole else _for_all(whole, p, results[number])
        for number, (whole, p) in enumerate(zip(given, problems, strict=True))
    ]


def _counted(p: Problem) -> Problem:
    """Return the problem without its samples of weight 0, which no plan knows, however far off they are."""
    if p.uniform:
        return p
    rows, columns = p.a.detach() > 0, p.b.detach() > 0
    if bool(rows.all() & columns.all()):
        return p
    x, a = p.x[rows], p.a[rows]
    y, b = (x, a) if p.x is p.y and p.a is p.b else (p.y[columns], p.b[columns])
    return replace(p, x=x, y=y, a=a, b=b)


def _for_all(whole: Problem, p: Problem, result: OTResult) -> OTResult:
    """Return what was solved without the samples of weight 0 as the result of all.

    Their potentials are the best answers to the others, which is the gradient of the value in their weights.
    """
    assert result.f is not None
    assert result.g is not None
    q, kept, epsilon, value = whole.detached(), p.detached(), result.epsilon, result.value
    share, potentials = damping(epsilon, p.rho), []
    for cost, points, w, others, weights, own, other in (
        (p.cost, q.x, q.a, kept.y, kept.b, result.f, result.g),
        (p.cost.transposed(), q.y, q.b, kept.x, kept.a, result.g, result.f),
    ):
        potential, nothing = points.new_empty(len(points)), w == 0
        potential[~nothing] = own
        if bool(nothing.any()):
            answer = soft_minimum(points[nothing], others, weights, other / epsilon, cost, epsilon)
            potential[nothing] = (share * epsilon * answer).to(own.dtype)
        potentials.append(potential)
    for w, potential, others in zip((whole.a, whole.b), potentials, (kept.b, kept.a), strict=True):
        if torch.is_grad_enabled() and w.requires_grad:
            slope = potential
            if p.rho is not None:
                slope = -(p.rho + epsilon) * torch.expm1(-potential / p.rho) + epsilon * (others.sum() - 1)
            term = torch.where(w.detach() == 0, (w - w.detach()) * slope, 0).sum(dtype=value.dtype)
            value = value + _once(term, "in weights of which some are 0: leave those samples out")
    return replace(result, value=value, f=potentials[0], g=potentials[1], _problem=q)


def _solve_alike(problems: list[Problem], solver: str, tolerance: float, max_iterations: int) -> list[OTResult]:
    """Solve problems of one shape."""
    if solver == "exact":
        return [_solve_exact(p) for p in problems]
    device = problems[0].x.device
    with torch.autocast(device.type, enabled=False), full_precision(device):
        if solver in ("dense", "blocked"):
            return _solve_ours(problems, solver, tolerance, max_iterations)
        return [_solve_geomloss(p, solver, tolerance) for p in problems]


def _report(result: OTResult, tolerance: float, max_iterations: int, strict: bool) -> None:
    """Warn or raise for a result that did not converge."""
    message = (
        f"solver={result.solver!r} stopped with a marginal error of {result.marginal_error:.2g}, above the tolerance "
        f"of {tolerance:.2g}: "
        + (
            "its schedule is fixed, use 'dense'"
            if result.solver == "tensorized"
            else f"raise max_iterations ({max_iterations} now) or epsilon ({result.epsilon:.3g} now)"
            + ("" if result.value.dtype == torch.float64 or tolerance >= 1e-6 else ", or use float64")
        )
    )
    if strict:
        raise RuntimeError(message)
    warnings.warn(message, ConvergenceWarning, stacklevel=4)


def check_regularization(
    epsilon: float | None, relative_epsilon: float, relative_to: str, rho: float | None, solver: str
) -> tuple[float | None, float, Scale]:
    """Return epsilon, which may be ``None``, what share it is, and of what.

    Args:
        epsilon: See :func:`optimal_transport`.
        relative_epsilon: See :func:`optimal_transport`.
        relative_to: See :func:`optimal_transport`.
        rho: Strength of soft marginals, or ``None``.
        solver: The solver that is asked for.

    Raises:
        ValueError: One is not positive, or the solver does not regularize.
    """
    if check_solver(solver, regularized=epsilon is not None or rho is not None) == "exact":
        return None, 1.0, "mean"
    if relative_to not in get_args(RelativeTo):
        raise ValueError(f"relative_to must be one of {', '.join(get_args(RelativeTo))}, got {relative_to!r}")
    absolute = check_epsilon("epsilon", epsilon)
    if absolute is not None:
        return absolute, 1.0, "mean"
    share = check_epsilon("relative_epsilon", relative_epsilon)
    if share is None:
        raise ValueError("relative_epsilon must be a positive finite number where epsilon is None, got None")
    return None, share, cast(Scale, relative_to)


def check_tolerance(tolerance: float) -> float:
    """Return an L1 marginal error that a solver can stop at, or raise ``ValueError``.

    Args:
        tolerance: The caller's argument.
    """
    number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
    if not number or not 0 < tolerance < 2:
        raise ValueError(f"tolerance must be in (0, 2), an L1 marginal error, got {tolerance!r}")
    return float(tolerance)


def check_solver(solver: str, *, regularized: bool = False) -> str:
    """Return the name of a solver, or raise ``ValueError``.

    Args:
        solver: One of :data:`Solver`.
        regularized: Whether an epsilon or a reach is asked for, which the exact solver has not.
    """
    if solver not in get_args(Solver):
        raise ValueError(f"solver must be one of {', '.join(get_args(Solver))}, got {solver!r}")
    if solver == "exact" and regularized:
        raise ValueError("solver='exact' takes neither epsilon nor reach: it does not regularize")
    return solver


def _choose(solver: str, cost: Cost, x: Tensor, y: Tensor) -> str:
    if solver == "auto":
        return "dense" if len(x) * len(y) <= dense_pairs(x) and _fits(x, y) else "blocked"
    if solver in ("online", "multiscale") and cost.keops_formula is None:
        raise ValueError(f"solver={solver!r} needs a KeOps formula, which the cost {cost} has not: use 'blocked'")
    if solver == "multiscale" and not (isinstance(cost, SqEuclidean) and x.shape[1] <= 3):
        raise ValueError(
            f"solver='multiscale' is for squared distances in up to 3 dimensions, got the cost {cost} in {x.shape[1]}: "
            "use 'online' or 'blocked'"
        )
    if solver == "dense" and not _fits(x, y):
        raise ValueError(
            f"solver='dense' needs {_needed(x, y) / 1e9:.1f} GB for {len(x)} x {len(y)} samples, more than there is: "
            "use 'blocked', or 'online' on a GPU"
        )
    return solver


def _needed(x: Tensor, y: Tensor) -> int:
    return 2 * len(x) * len(y) * x.element_size()


def _fits(x: Tensor, y: Tensor) -> bool:
    return _needed(x, y) <= _SMALL_BYTES or _needed(x, y) <= _free_memory(x)


def _free_memory(like: Tensor) -> float:
    if like.device.type == "cuda":
        # What torch holds and nobody uses is as good as free.
        held = torch.cuda.memory_reserved(like.device) - torch.cuda.memory_allocated(like.device)
        return float(torch.cuda.mem_get_info(like.device)[0] + held)
    try:
        with open("/proc/meminfo") as lines:
            kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable"))
        return 1024 * float(kilobytes)
    except (OSError, StopIteration):
        return math.inf


def share_of_mean_cost(share: float, x: Tensor, y: Tensor, cost: Cost) -> float:
    """Return an epsilon that is a share of the mean of all costs ``c(x_i, y_j)``, in blocks of bounded memory.

    Args:
        share: A positive number.
        x: ``(n, d)`` samples.
        y: ``(m, d)`` samples.
        cost: The ground cost.

    Raises:
        ValueError: All costs are 0, so that no share of them is an epsilon.
    """
    return share_of_cost(share, cost, x, y)


# --- our own solvers ----------------------------------------------------------------------------------------------


def _solve_ours(problems: list[Problem], solver: str, tolerance: float, max_iterations: int) -> list[OTResult]:
    detached = [p.detached() for p in problems]
    n, m, dtype = len(detached[0].x), len(detached[0].y), detached[0].x.dtype
    graph = torch.is_grad_enabled()
    # What overflows is found by the marginal error, and told with its remedy.
    with torch.no_grad(), np.errstate(all="ignore"), threads(n * m), _kernel(detached, solver) as kernel:
        if dtype != widest(detached[0].x.device) and not kernel.exponents_fit(*_FLOAT_RATIOS):
            with torch.set_grad_enabled(graph):
                wide = [p.to(widest(p.x.device)) for p in problems]
                solved = _solve_ours(wide, solver, tolerance, max_iterations)
                return [_narrowed(*pair) for pair in zip(solved, detached, strict=True)]
        if kernel.symmetric:
            start = torch.zeros_like(kernel.a), torch.zeros_like(kernel.b)
        else:
            start = coarse_start(kernel, [p.x for p in detached], [p.y for p in detached], [p.cost for p in detached])
        found = iterate_to_end(kernel, start, tolerance=tolerance, max_iterations=max_iterations)
        results = []
        for i, (problem, p) in enumerate(zip(problems, detached, strict=True)):
            epsilon = kernel.epsilons[i]
            need = graph and problem.x.requires_grad, graph and problem.y.requires_grad
            gx, gy, mass = _gradients_and_mass(kernel, i, p, need)
            f, g = found.F[i] * epsilon, found.G[i] * epsilon
            value = _dual_value(p, f, g, epsilon, mass)
            f, g = f.to(dtype), g.to(dtype)
            inputs = problem.x, problem.y, problem.a, problem.b
            if graph and any(t.requires_grad for t in inputs):
                with torch.enable_grad():
                    value = _Envelope.apply(*inputs, value, gx, gy, f, g, problem, epsilon)  # type: ignore[no-untyped-call]
            outcome = found.marginal_errors[i], found.iterations[i], found.converged[i]
            given = epsilon if p.epsilon is None else p.epsilon
            results.append(OTResult(value, f, g, given, *outcome, solver, p))
    return [_with_learned_cost(p, result) for p, result in zip(problems, results, strict=True)] if graph else results


def _narrowed(result: OTResult, p: Problem) -> OTResult:
    """Return what was solved in double as that of the given problem."""
    assert result.f is not None
    assert result.g is not None
    dtype = p.x.dtype
    return replace(result, f=result.f.to(dtype), g=result.g.to(dtype), _problem=p)


def _with_learned_cost(problem: Problem, result: OTResult) -> OTResult:
    r"""Let the value depend on what the cost itself may learn: by the envelope theorem, :math:`\sum P\, c_\theta`."""
    if not is_learned(problem.cost, problem.x):
        return result

    def part(rows: slice, block: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (block * problem.cost.pairwise(x[rows], y)).sum()

    p = problem.detached()
    # The backward pass forms the costs anew, block by block, rather than keeping all of them.
    paid = torch.stack(
        [checkpoint(part, rows, block.clone(), p.x, p.y, use_reentrant=False) for rows, block in result._plan_blocks()]
    ).sum()
    term = _once(paid - paid.detach(), "through a cost that learns: detach its parameters")
    return replace(result, value=result.value + term)


def _once(term: Tensor, why: str) -> Tensor:
    """Return a term that raises where it is differentiated twice, as only its first derivative is right."""

    def refuse(gradient: Tensor) -> None:
        if torch.is_grad_enabled():
            raise NotImplementedError(f"optimal transport has no second derivatives {why}")

    if term.requires_grad:
        term.register_hook(refuse)
    return term


def is_learned(cost: Cost, like: Tensor) -> bool:
    """Return whether a cost depends on tensors that learn, such as parameters of a network.

    Args:
        cost: The ground cost.
        like: ``(n, d)`` samples.
    """
    if not torch.is_grad_enabled() or (type(cost).__module__ == Cost.__module__ and not isinstance(cost, CallableCost)):
        return False
    point = like[:1].detach()
    return cost.elementwise(point, point.clone()).requires_grad


def _gradients_and_mass(
    kernel: Kernel, i: int, p: Problem, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the envelope gradients that are needed, and the plan's mass, ``None`` where it is that of the weights."""
    # Exact rows make the plan's mass that of the weights: only where they are not is it to be counted.
    inexact = kernel.symmetric or p.rho is not None
    plan = kernel.plan_factors(i)
    gx = gy = None
    if any(need):
        gx, gy = p.cost.plan_gradients(p.x, p.y, plan, (True, False) if kernel.symmetric else need)
        # The rows' gradient is that of a plan whose rows are exact, the columns' of one whose columns are: what is left
        # of a marginal error would be multiplied by the displacement, however small the difference that is wanted.
        factors = kernel.column_factors(i)[:, None].to(p.x.dtype)
        if kernel.symmetric:
            assert gx is not None
            gx = gy = gx * factors
        elif gy is not None:
            gy = gy * factors
    elif inexact:
        for _ in plan:
            pass
    return gx, gy, kernel.mass(i) if inexact else None


@contextmanager
def _kernel(problems: list[Problem], solver: str) -> Iterator[Kernel]:
    """Lend the kernel of problems of one shape."""
    first, count = problems[0], len(problems)
    n, m = len(first.x), len(first.y)
    if solver == "blocked":
        least, most = _range_of_costs(first)
        largest = _checked_size(first, least, most)
        epsilon = _bounded(first, first.share(largest), most - least)
        yield BlockedKernel(
            first.x, first.y, first.cost, first.a, first.b, epsilon, first.rho, largest, symmetric=first.to_itself
        )
        return
    with buffers(2, count * n, m, first.x) as matrices:
        C, K = (matrix.view(count, n, m) for matrix in matrices)
        told = []
        for i, p in enumerate(problems):
            p.cost.fill(C[i], p.x, p.y)
            told.append(torch.stack([C[i].amin(), C[i].amax(), torch.dot(p.a @ C[i], p.b)]))
        # One question to the device for all of them.
        sizes = torch.stack(told).tolist()
        epsilons = []
        for p, (least, most, mean) in zip(problems, sizes, strict=True):
            largest = _checked_size(p, least, most)
            if p.epsilon is None and p.relative_to == "mean" and largest != 0:
                epsilon = share_of(p.relative_epsilon, mean, p.cost)
            else:
                epsilon = p.share(largest)
            epsilons.append(_bounded(p, epsilon, most - least))
        a = first.a[None] if count == 1 else torch.stack([p.a for p in problems])
        b = a if first.to_itself else first.b[None] if count == 1 else torch.stack([p.b for p in problems])
        rhos = [p.rho for p in problems]
        largest_costs = [max(abs(least), abs(most)) for least, most, _ in sizes]
        yield DenseKernel(C, K, a, b, epsilons, rhos, largest_costs, symmetric=first.to_itself)


def _range_of_costs(p: Problem, dtype: torch.dtype | None = None) -> tuple[float, float]:
    """Return the least and the greatest cost between some of the samples."""
    x, y = (points[:: max(1, len(points) // _FEW_SAMPLES)].to(dtype or points.dtype) for points in (p.x, p.y))
    costs = _costs(p.cost, x, y)
    least, most = torch.stack([costs.amin(), costs.amax()]).tolist()
    return least, most


def _checked_size(p: Problem, least: float, most: float) -> float:
    """Return the size of the largest cost; raise ``FloatingPointError`` where it is beyond the format."""
    if not (math.isfinite(least) and math.isfinite(most)):
        raise FloatingPointError(
            f"the {p.cost} costs are not all finite in {p.x.dtype}: divide the samples by their scale, or use float64; "
            "if a network made them, lower its learning rate; for pairs that an infinite cost forbids use "
            "solver='exact'"
        )
    size = exact = max(abs(least), abs(most))
    limits = torch.finfo(p.x.dtype)
    if size == 0:
        # Nothing to move, or too little for the format.
        exact = max(map(abs, _range_of_costs(p, widest(p.x.device))))
        apart = float((torch.cat([p.x, p.y]) - p.x[0]).abs().amax())
        if exact == 0 and 0 < apart < 10 * math.sqrt(limits.tiny):
            exact = apart * apart
            exact = exact or limits.smallest_normal
    if (0 < exact < 1e3 * limits.tiny) or (size == 0 and exact > 0):
        raise FloatingPointError(
            f"the {p.cost} costs, {exact:.1e} at most, are below what {p.x.dtype} resolves: divide the samples by "
            "their scale, or use float64"
        )
    return size


def _bounded(p: Problem, epsilon: float, spread: float) -> float:
    """Return the epsilon to solve with."""
    if p.rho is not None:
        # Soft marginals are softened by epsilon, whose size then counts; none of it is left of nothing.
        return epsilon if spread > 0 or p.epsilon is not None else max(epsilon, 1e-6 * p.rho)
    return min(epsilon, _LARGEST_EPSILON * spread) if spread > 0 else epsilon


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


class _Envelope(torch.autograd.Function):
    """The value, with its gradient by the envelope theorem, and that gradient's by the implicit function theorem."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, value: Tensor, *rest: Any) -> Tensor:
        gx, gy, f, g, ctx.problem, ctx.epsilon = rest
        ctx.save_for_backward(x, y, a, b, gx, gy, f, g)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, y, a, b, gx, gy, f, g = ctx.saved_tensors
        grads: tuple[Tensor | None, ...] = (gx, gy, f, g)
        if torch.is_grad_enabled():
            grads = _implicit_gradients(x, y, a, b, f, g, ctx.problem.cost, ctx.problem.rho, ctx.epsilon)
        if ctx.problem.rho is not None and grads[2] is not None and grads[3] is not None:
            rho, epsilon = ctx.problem.rho, ctx.epsilon
            grads = (
                *grads[:2],
                -(rho + epsilon) * torch.expm1(-grads[2] / rho) + epsilon * (b.sum() - 1),
                -(rho + epsilon) * torch.expm1(-grads[3] / rho) + epsilon * (a.sum() - 1),
            )
        needed = [
            None if part is None or not need else grad.to(part.dtype) * part
            for part, need in zip(grads, ctx.needs_input_grad, strict=False)
        ]
        return (*needed, *[None] * (len(ctx.needs_input_grad) - 4))


def _implicit_gradients(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, cost: Cost, rho: float | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the envelope gradients as differentiable functions: one Newton step with a constant Jacobian."""
    # Two names for two roles, also where both are the same samples.
    x, y = x.view_as(x), y.view_as(y)
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
    points = [t for t in (x, y) if t.requires_grad]
    found = iter(torch.autograd.grad(C, points, P, create_graph=True)) if points else iter(())
    gx = next(found) if x.requires_grad else torch.zeros_like(x)
    gy = next(found) if y.requires_grad else torch.zeros_like(y)
    return gx, gy, f, g


# --- exact transport ----------------------------------------------------------------------------------------------


def _costs(cost: Cost, x: Tensor, y: Tensor) -> Tensor:
    return cost.fill(x.new_empty(len(x), len(y)), x, y)


def _solve_exact(problem: Problem) -> OTResult:
    p = problem.detached()
    x, y = (points.to(widest(points.device)) for points in (p.x, p.y))
    # What has no weight is left out, as it may be infinitely far.
    rows, columns = (w.nonzero()[:, 0] for w in (p.a, p.b))
    C = _costs(p.cost, x[rows], y[columns])
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
            slope[left] = (_costs(cost, points[left], others) - other).amin(1)
            term = (slope.to(w.dtype) * (w - w.detach())).sum(dtype=value.dtype)
            value = value + _once(term, "in weights with solver='exact': use 'dense'")
    return OTResult(value, None, None, 0.0, 0.0, 0, True, "exact", p, (i, j, mass))


# --- GeomLoss -----------------------------------------------------------------------------------------------------


def _solve_geomloss(problem: Problem, solver: str, tolerance: float) -> OTResult:
    p = problem.detached()
    if is_learned(problem.cost, problem.x):
        raise ValueError(
            f"solver={solver!r} does not differentiate through the parameters of the cost {p.cost}: use 'dense' or "
            "'blocked', or cost.requires_grad_(False)"
        )
    epsilon = p.share(max(map(abs, _range_of_costs(p))))
    f, g = (t.reshape(-1) for t in _samples_loss(problem, solver, epsilon, potentials=True))
    if p.rho is None:
        value = problem.a @ f + problem.b @ g
    else:
        value = _samples_loss(problem, solver, epsilon, potentials=False)
    f, g = f.detach(), g.detach()
    error = math.nan
    if solver == "tensorized":
        # GeomLoss does not say how far it came: one more soft minimum tells.
        F = f / epsilon
        answer = damping(epsilon, p.rho) * soft_minimum(p.x, p.y, p.b, g / epsilon, p.cost, epsilon)
        error = float(p.a.to(answer.dtype) @ torch.expm1(F - answer).abs())
    return OTResult(value, f, g, epsilon, error, 0, not error > tolerance, solver, p)


def _samples_loss(p: Problem, solver: str, epsilon: float, *, potentials: bool) -> Any:
    if solver != "tensorized":
        _require_compiler(solver)
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
        cost=None if halved else p.cost.pairwise if solver == "tensorized" else p.cost.keops_formula,
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
def _require_compiler(solver: str) -> None:
    from shutil import which

    if not torch.cuda.is_available() and which("g++") is None and which("clang++") is None:
        raise RuntimeError(f"solver={solver!r} compiles KeOps formulas: install g++, or use solver='blocked'")
