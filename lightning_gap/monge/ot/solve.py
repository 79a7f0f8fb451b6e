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
``fused``      our own, compiled, all of a pass at once, to a marginal error   ``O(n + m)``
``flash``      ``fused`` with FlashSinkhorn's kernel, for squares on CUDA      ``O(n + m)``
``blocked``    our own, by blocks of rows, to a marginal error                 ``O(n + m)`` and a block
``exact``      augmenting paths over nearly tight pairs, no regularization     ``O(n + m)``; small: ``n x m``
``online``     GeomLoss on KeOps, compiled formulas, a fixed schedule          ``O(n + m)``
``multiscale`` GeomLoss on KeOps, coarse to fine, for squared distances, d < 4 ``O(n + m)``
============== =============================================================== ==========================
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_gap.checks import renamed
from lightning_gap.monge.ot.checks import check_epsilon
from lightning_gap.monge.ot.compiling import eager
from lightning_gap.monge.ot.costs import Cost, CostLike, SqEuclidean
from lightning_gap.monge.ot.costs.formula import formula_of
from lightning_gap.monge.ot.epsilon import FITTING_SHARE, Epsilon, Scale
from lightning_gap.monge.ot.limits import LIMITS
from lightning_gap.monge.ot.options import Solver, SolverOptions
from lightning_gap.monge.ot.problem import Problem, checked_problem
from lightning_gap.monge.ot.result import ConvergenceWarning, OTResult
from lightning_gap.monge.ot.solvers.blocks import soft_minimum
from lightning_gap.monge.ot.solvers.exact import solve_exact
from lightning_gap.monge.ot.solvers.fused.flash_passes import FLASH_COORDINATES, FLASH_PLACES, require_flash
from lightning_gap.monge.ot.solvers.fused.passes import fused_library
from lightning_gap.monge.ot.solvers.fused.triton_passes import has_triton, triton_expressions, triton_failure
from lightning_gap.monge.ot.solvers.geomloss import solve_geomloss
from lightning_gap.monge.ot.solvers.gradients import once, weight_slope
from lightning_gap.monge.ot.solvers.kernel import damping
from lightning_gap.monge.ot.solvers.memory import fits, needed
from lightning_gap.monge.ot.solvers.sinkhorn import solve_entropic
from lightning_gap.precision import full_precision

__all__ = ["choose_solver", "optimal_transport", "report_unconverged", "solve_all"]


def optimal_transport(
    x: Tensor,
    y: Tensor,
    *,
    cost: CostLike = "sqeuclidean",
    epsilon: float | None = None,
    relative_epsilon: float = FITTING_SHARE,
    relative_to: Scale = "mean",
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
    rho: float | None = None,
    solver: Solver = "auto",
    tolerance: float = 1e-5,
    max_iterations: int = 2000,
    strict: bool = False,
    reach: float | None = None,
) -> OTResult:
    r"""Solve optimal transport between two sets of samples.

    .. math::
        OT_\varepsilon = \min_{P} \langle P, C \rangle + \varepsilon KL(P | a \otimes b)
            + \rho KL(P 1 | a) + \rho KL(P^\top 1 | b)

    where the last two terms are hard constraints unless :math:`\rho` is given.

    Args:
        x: ``(n, d)`` samples.
        y: ``(m, d)`` samples; ``x`` itself for the self term of a divergence, which is solved faster.
        cost: Ground cost: a name, an instance from :mod:`lightning_gap.costs`, or a function.
        epsilon: Regularization in units of the cost; overrides ``relative_epsilon``.
        relative_epsilon: Regularization as a share of the mean cost between ``x`` and ``y`` (weighted, detached).
        relative_to: ``"mean"``; ``"std"`` for a share of the costs' standard deviation; ``"typical"`` for one of their
            mean without outliers.
        weights: ``(n,)`` and ``(m,)`` weights; uniform by default. They sum to 1 unless ``rho`` is given.
        rho: Strength of soft marginals, in units of the cost (GeomLoss's ``reach`` is a distance); ``None`` for hard.
        solver: ``"auto"`` or one of the table above. It takes ``"dense"`` while the matrices fit (4096 x 4096 on a
            CPU, 16384 x 16384 on a GPU); beyond that ``"fused"`` on a CPU, for costs with a formula where there is a
            C++ compiler, else ``"blocked"``; also on a GPU, where ``"fused"`` has not been measured.
        tolerance: L1 marginal error at which ``"dense"``, ``"fused"``, ``"flash"`` and ``"blocked"`` stop; the gradient
            is then right to some twice as much of the gradient of what is paid.
        max_iterations: Most sweeps of these four.
        strict: Raise, rather than warn, where the tolerance was not reached.
        reach: Deprecated: ``rho``.

    Returns:
        The result; its ``value`` is differentiable in ``x``, ``y`` and the weights, twice with ``"dense"``,
        ``"fused"``, ``"flash"`` and ``"blocked"``.

    Raises:
        TypeError: An argument is no floating-point tensor, or ``max_iterations`` no integer.
        ValueError: Shapes do not fit, values are not finite, an option is unknown, or the solver cannot take the
            problem.
        RuntimeError: ``strict``, and the tolerance was not reached; or KeOps was named and cannot compile.
        ModuleNotFoundError: ``"flash"`` was named, and FlashSinkhorn is not installed.

    Example:
        >>> import torch
        >>> x = torch.linspace(0, 1, 100, dtype=torch.float64)[:, None]
        >>> result = optimal_transport(x, 2 * x, epsilon=1e-3, tolerance=1e-6)
        >>> result.converged, round(float(result.transport_cost()), 2)  # ∫ x² dx
        (True, 0.34)
        >>> optimal_transport(x, 2 * x, solver="exact").value.round(decimals=4)
        tensor(0.3350, dtype=torch.float64)
    """
    options = SolverOptions(solver, tolerance, max_iterations)
    rho = check_epsilon("rho", renamed("reach", "rho", reach, rho))
    regularization = Epsilon.given(options, epsilon, relative_epsilon, relative_to, rho=rho)
    one = y is x and weights[0] is weights[1]
    problem = checked_problem(x, y, weights, cost=cost, epsilon=regularization, rho=rho, one_weights=one)
    (result,) = solve_all([problem], options, strict=strict)
    return replace(result, value=result.value.to(problem.x.dtype))


@eager
def solve_all(
    problems: Sequence[Problem], options: SolverOptions, *, strict: bool = False, silent: bool = False
) -> list[OTResult]:
    """Solve problems whose arguments have been checked; those of one shape together, which costs little more than one.

    If ``silent``, it is left to the caller to look whether they converged. The values are in the widest format: what is
    subtracted from them may be nearly as large.
    """
    given, problems = problems, [p.counted() if options.solver != "exact" else p for p in problems]
    groups: dict[Any, list[int]] = {}
    for number, p in enumerate(problems):
        chosen = choose_solver(options.solver, p.cost, p.x, p.y)
        shape: Any = number
        if chosen == "dense":
            shape = (len(p.x), len(p.y), p.x.dtype, p.x.device, p.to_itself, p.rho is None)
        groups.setdefault((chosen, shape), []).append(number)
    results: dict[int, OTResult] = {}
    for (chosen, _), numbers in groups.items():
        first = problems[numbers[0]]
        together = max(1, LIMITS.together.on(first.x.device) // (len(first.x) * len(first.y)))
        for start in range(0, len(numbers), together):
            part = numbers[start : start + together]
            results |= zip(part, _solve_alike([problems[k] for k in part], chosen, options), strict=True)
    for number in range(0 if silent else len(problems)):
        if not results[number].converged:
            _report(results[number], options, strict)
    return [
        results[number] if p is whole else _for_all(whole, p, results[number])
        for number, (whole, p) in enumerate(zip(given, problems, strict=True))
    ]


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
            slope = weight_slope(potential, others, p.rho, epsilon)
            term = torch.where(w.detach() == 0, (w - w.detach()) * slope, 0).sum(dtype=value.dtype)
            value = value + once(term, "in weights of which some are 0: leave those samples out")
    return replace(result, value=value, f=potentials[0], g=potentials[1], problem=q)


def _solve_alike(problems: list[Problem], solver: str, options: SolverOptions) -> list[OTResult]:
    """Solve problems of one shape."""
    if solver == "exact":
        return [solve_exact(p) for p in problems]
    device = problems[0].x.device
    with torch.autocast(device.type, enabled=False), full_precision(device):
        if solver in ("dense", "fused", "flash", "blocked"):
            return solve_entropic(problems, solver, options)
        return [solve_geomloss(p, solver) for p in problems]


def report_unconverged(
    solver: str,
    marginal_error: float,
    epsilon: float,
    options: SolverOptions,
    dtype: torch.dtype,
    *,
    strict: bool = False,
) -> None:
    """Warn or raise for a problem that did not converge."""
    widest_already = dtype == torch.float64 or options.tolerance >= 1e-6
    _warn_or_raise(
        f"solver={solver!r} stopped with a marginal error of {marginal_error:.2g}, above the tolerance of "
        f"{options.tolerance:.2g}: raise max_iterations ({options.max_iterations} now) or epsilon ({epsilon:.3g} now)"
        + ("" if widest_already else ", or use float64"),
        strict,
    )


def _report(result: OTResult, options: SolverOptions, strict: bool) -> None:
    if result.solver == "exact":
        _warn_or_raise(
            f"solver='exact' ended with a plan that may cost up to {result.duality_gap:.2g} more than the best one",
            strict,
        )
        return
    dtype = result.problem.x.dtype
    report_unconverged(result.solver, result.marginal_error, result.epsilon, options, dtype, strict=strict)


def _warn_or_raise(told: str, strict: bool) -> None:
    if strict:
        raise RuntimeError(told)
    warnings.warn(told, ConvergenceWarning, stacklevel=5)


def _check_fused(cost: Cost, x: Tensor) -> None:
    """Raise where no compiled pass can be made."""
    formula, kind = formula_of(cost), x.device.type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"solver='fused' is for a CPU or CUDA, and the samples are on {x.device}: use 'blocked'")
    if formula is None:
        raise ValueError(f"solver='fused' needs a formula, which the cost {cost} has not: use 'blocked'")
    if kind == "cpu" and fused_library(cost) is None:
        raise RuntimeError("solver='fused' compiles C++: install g++ or clang++, or use solver='blocked'")
    if kind == "cuda" and not has_triton():
        raise RuntimeError("solver='fused' takes Triton on a GPU: pip install triton, or use solver='blocked'")
    if kind == "cuda" and (told := triton_failure()):
        raise RuntimeError(
            f"solver='fused' takes Triton on a GPU, and that cannot be imported here ({told}): install another "
            "release, or use solver='blocked'"
        )
    if kind == "cuda" and triton_expressions(formula) is None:
        raise ValueError(
            f"solver='fused' reads formulas as Python on a GPU, which that of the cost {cost} is not: write it in the "
            "words of CostFormula alone, or use 'blocked'"
        )


def _check_flash(cost: Cost, x: Tensor, y: Tensor) -> None:
    """Raise where FlashSinkhorn does not take the samples, or is not installed."""
    formula = formula_of(cost)
    if formula is None or not formula.is_square:
        raise ValueError(f"solver='flash' is for squared distances, got the cost {cost}: use 'fused' or 'blocked'")
    if x.device.type != "cuda":
        raise ValueError(f"solver='flash' is for CUDA, and the samples are on {x.device}: use 'fused' or 'blocked'")
    if x.dtype != torch.float32:
        raise ValueError(
            f"solver='flash' computes in float32, and the samples are {x.dtype}: use x.float(), or 'fused'"
        )
    if max(len(x), len(y)) * max(FLASH_COORDINATES, x.shape[-1]) >= FLASH_PLACES:
        raise ValueError(
            f"solver='flash' takes fewer than {FLASH_PLACES} coordinates of a side, at least {FLASH_COORDINATES} a "
            f"sample, and these are {len(x)} and {len(y)} samples: use 'fused'"
        )
    require_flash()


def choose_solver(solver: str, cost: Cost, x: Tensor, y: Tensor) -> str:
    """Return the solver to take, or raise ``ValueError`` where the one that is named cannot take the problem."""
    if solver == "auto":
        if len(x) * len(y) <= LIMITS.dense.on(x.device) and fits(x, y):
            return "dense"
        return "blocked" if x.device.type != "cpu" or fused_library(cost) is None else "fused"
    if solver == "fused":
        _check_fused(cost, x)
    if solver == "flash":
        _check_flash(cost, x, y)
    if solver in ("online", "multiscale") and cost.keops_formula is None:
        raise ValueError(f"solver={solver!r} needs a KeOps formula, which the cost {cost} has not: use 'blocked'")
    if solver == "multiscale" and not (isinstance(cost, SqEuclidean) and x.shape[1] <= 3):
        raise ValueError(
            f"solver='multiscale' is for squared distances in up to 3 dimensions, got the cost {cost} in {x.shape[1]}: "
            "use 'online' or 'blocked'"
        )
    if solver == "dense" and not fits(x, y):
        raise ValueError(
            f"solver='dense' needs {needed(x, y) / 1e9:.1f} GB for {len(x)} x {len(y)} samples, more than there is: "
            "use 'blocked', or 'online' on a GPU"
        )
    return solver
