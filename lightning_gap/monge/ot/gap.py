r"""The two quantities everything in this room stands on: the Monge gap and the Sinkhorn divergence."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_gap.monge.ot.checks import check_epsilon, check_pair, check_transforms, check_weights, solver_precision
from lightning_gap.monge.ot.compiling import eager
from lightning_gap.monge.ot.costs import CallableCost, resolve
from lightning_gap.monge.ot.sinkhorn import CostLike, OTResult, Problem, RelativeTo, check_regularization, solve_all
from lightning_gap.precision import widest

__all__ = [
    "Convention",
    "Terms",
    "check_convention",
    "divergence_and_gap",
    "divergence_problem",
    "divergences_and_gaps",
    "gap_problem",
    "monge_gap",
    "sinkhorn_divergence",
]

Convention = Literal["shannon", "kl", "debiased"]

# A difference smaller than this share of its terms is known to less than a thousandth in float32.
_CANCELLED = 1e-4


class Terms(NamedTuple):
    """Divergences and gaps that were solved together.

    Attributes:
        divergences: Scalars.
        gaps: Scalars.
        marginal_error: The largest L1 marginal error of all their problems; NaN where a solver does not tell.
        converged: Whether all of them reached the tolerance.
    """

    divergences: list[Tensor]
    gaps: list[Tensor]
    marginal_error: float
    converged: bool


def monge_gap(
    x: Tensor,
    mapped: Tensor,
    *,
    cost: CostLike = "sqeuclidean",
    epsilon: float | None = None,
    relative_epsilon: float = 0.01,
    relative_to: RelativeTo = "mean",
    convention: Convention = "shannon",
    weights: Tensor | None = None,
    reach: float | None = None,
    solver: str = "auto",
    tolerance: float = 1e-5,
    max_iterations: int = 2000,
) -> Tensor:
    r"""Return how far a map is from optimal: the Monge gap of the pairs :math:`(x_i, T(x_i))`.

    .. math::
        M^c_{\varepsilon}(T) = \sum_i a_i\, c(x_i, T(x_i)) - W_{c,\varepsilon}(\rho_n, T\sharp\rho_n)

    It compares what the map pays with what the best rearrangement of the same points would pay (Uscidda and Cuturi
    2023, equation 8). It is a regularizer: added to a fitting loss, it makes the learned map c-optimal.

    The conventions differ by constants, except the last one:

    * ``"shannon"``, the paper's: :math:`W_{c,\varepsilon} = \min_P \langle P, C \rangle - \varepsilon H(P)`. The gap is
      positive, at least :math:`\varepsilon H(a)`, which is :math:`\varepsilon \log n` for uniform weights.
    * ``"kl"``: :math:`\min_P \langle P, C \rangle + \varepsilon KL(P | a \otimes b)`; lower by
      :math:`2 \varepsilon \log n`, and possibly negative.
    * ``"debiased"``: subtracts the Sinkhorn divergence of source and image, and, of a cost that charges for standing
      still, that charge: :math:`\sum_i a_i (c(x_i, T(x_i)) - \tfrac12 c(x_i, x_i) - \tfrac12 c(T(x_i), T(x_i)))
      - S_{c,\varepsilon}`; 0 for the identity map.

    Args:
        x: ``(n, d)`` samples of the reference measure, any that covers the source; or ``(B, n, d)``, B problems.
        mapped: Their images, row by row, of the same shape.
        cost: Ground cost: a name, an instance from :mod:`lightning_gap.costs`, or a function.
        epsilon: Regularization in units of the cost; overrides ``relative_epsilon``.
        relative_epsilon: Regularization as a share of the mean cost between ``x`` and ``mapped`` (weighted, detached).
        relative_to: ``"mean"``; ``"std"`` for a share of the costs' standard deviation; ``"typical"`` for one of their
            mean without outliers.
        convention: ``"shannon"`` (default), ``"kl"`` or ``"debiased"``.
        weights: ``(n,)`` weights of the samples, summing to 1; uniform by default.
        reach: Strength of soft marginals of the best rearrangement, in units of the cost; not with ``"shannon"``.
        solver: See :func:`optimal_transport`; ``"exact"`` gives the gap without regularization, whatever the
            convention.
        tolerance: L1 marginal error at which the solver stops.
        max_iterations: Most sweeps of the solver.

    Returns:
        A scalar, or ``(B,)`` values, differentiable in ``x`` and ``mapped``.

    Raises:
        TypeError: An argument is no floating-point tensor.
        ValueError: Shapes do not fit, values are not finite, or an option is unknown.

    Example:
        >>> import torch
        >>> from lightning_gap import monge_gap
        >>> x = torch.linspace(0, 1, 50)[:, None]
        >>> shifted, flipped = x + 1, 2 - x  # same image; only the first is optimal
        >>> float(monge_gap(x, flipped, convention="debiased") - monge_gap(x, shifted, convention="debiased")) > 0.1
        True
    """
    check_convention(convention, reach)
    regularization = check_epsilon("reach", reach), epsilon, relative_epsilon, relative_to, solver
    if isinstance(x, Tensor) and isinstance(mapped, Tensor) and x.dim() == mapped.dim() == 3:
        each = _each("mapped", x, mapped, weights)
        problems = [_problem(x, mapped, [w], cost, *regularization, paired=True) for x, mapped, w in each]
    else:
        problems = [_problem(x, mapped, [weights], cost, *regularization, paired=True)]
    gaps = _values([], problems, convention, solver, tolerance, max_iterations).gaps
    return _stacked(gaps, x)


def check_convention(convention: str, reach: float | None) -> None:
    """Raise ``ValueError`` unless the convention is known, and has a meaning for soft marginals if there are any.

    Args:
        convention: One of :data:`Convention`.
        reach: Strength of soft marginals, or ``None``.
    """
    if convention not in get_args(Convention):
        raise ValueError(f"convention must be one of {', '.join(get_args(Convention))}, got {convention!r}")
    if reach is not None and convention == "shannon":
        raise ValueError("reach needs convention='kl' or 'debiased': the Shannon entropy is that of balanced plans")


def sinkhorn_divergence(
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
) -> Tensor:
    r"""Return the Sinkhorn divergence between two sets of samples, 0 where they agree.

    .. math::
        S_\varepsilon(\alpha, \beta) = OT_\varepsilon(\alpha, \beta)
            - \tfrac12 OT_\varepsilon(\alpha, \alpha) - \tfrac12 OT_\varepsilon(\beta, \beta)

    See Feydy et al. 2019, "Interpolating between optimal transport and MMD using Sinkhorn divergences", equation 3.

    Args:
        x: ``(n, d)`` samples; or ``(B, n, d)``, B problems.
        y: ``(m, d)`` samples; or ``(B, m, d)``.
        cost: Ground cost: a name, an instance from :mod:`lightning_gap.costs`, or a function.
        epsilon: Regularization in units of the cost; overrides ``relative_epsilon``.
        relative_epsilon: Regularization as a share of the mean cost between ``x`` and ``y`` (weighted,
            detached).
        relative_to: ``"mean"``; ``"std"`` for a share of the costs' standard deviation; ``"typical"`` for one of their
            mean without outliers.
        weights: ``(n,)`` and ``(m,)`` weights; uniform by default. They sum to 1 unless ``reach`` is given.
        reach: Strength of the soft marginal constraints :math:`\rho`, in units of the cost, for unbalanced transport
            (Séjourné et al. 2019); ``None`` for balanced.
        solver: See :func:`optimal_transport`; ``"exact"`` gives the transport cost itself.
        tolerance: L1 marginal error at which the solver stops.
        max_iterations: Most sweeps of the solver.

    Returns:
        A scalar, or ``(B,)`` values, differentiable in ``x`` and ``y``.

    Raises:
        TypeError: An argument is no floating-point tensor.
        ValueError: Shapes do not fit, values are not finite, or an option is unknown.

    Example:
        >>> import torch
        >>> from lightning_gap import sinkhorn_divergence
        >>> x = torch.linspace(0, 1, 50)[:, None]
        >>> round(float(sinkhorn_divergence(x, x + 3, epsilon=0.01)), 2)
        9.0
    """
    regularization = check_epsilon("reach", reach), epsilon, relative_epsilon, relative_to, solver
    if isinstance(x, Tensor) and isinstance(y, Tensor) and x.dim() == y.dim() == 3:
        each = _each("y", x, y, *weights)
        problems = [_problem(x, y, w, cost, *regularization) for x, y, *w in each]
    else:
        problems = [_problem(x, y, weights, cost, *regularization)]
    divergences = _values(problems, [], "kl", solver, tolerance, max_iterations).divergences
    return _stacked(divergences, x)


def divergence_and_gap(
    x: Tensor,
    mapped: Tensor,
    y: Tensor,
    *,
    fitting_cost: CostLike = "sqeuclidean",
    fitting_epsilon: float | None = None,
    cost: CostLike = "sqeuclidean",
    gap_epsilon: float | None = None,
    reach: float | None = None,
    solver: str = "auto",
    tolerance: float = 1e-5,
    max_iterations: int = 2000,
) -> tuple[Tensor, Tensor]:
    r"""Return the two terms that a transport map is trained by, solved together.

    .. math::
        S_{\varepsilon_1}(T\sharp\mu, \nu), \quad M^c_{\varepsilon_2}(T)

    The values are those of ``sinkhorn_divergence(mapped, y)`` and ``monge_gap(x, mapped)``. For batches of some hundred
    samples a solver's time is that of its calls, which the terms share here where their shapes agree.

    Args:
        x: ``(n, d)`` samples of the source.
        mapped: ``(n, d)`` images of them.
        y: ``(m, d)`` samples of the target.
        fitting_cost: Ground cost of the divergence.
        fitting_epsilon: Its regularization, in units of the cost; by default 5 % of the mean cost.
        cost: Ground cost of the gap.
        gap_epsilon: Its regularization, in units of the cost; by default 1 % of the mean cost.
        reach: Strength of the divergence's soft marginals, in units of its cost; ``None`` for balanced ones.
        solver: See :func:`optimal_transport`.
        tolerance: L1 marginal error at which the solver stops.
        max_iterations: Most sweeps of the solver.

    Returns:
        Two scalars, differentiable in ``x``, ``mapped`` and ``y``.

    Raises:
        TypeError: An argument is no floating-point tensor.
        ValueError: Shapes do not fit, values are not finite, or an option is unknown.

    Example:
        >>> import torch
        >>> from lightning_gap.monge import divergence_and_gap
        >>> x = torch.linspace(0, 1, 50)[:, None]
        >>> divergence, gap = divergence_and_gap(x, x + 1, x + 1)
        >>> abs(round(float(divergence), 4))
        0.0
    """
    fitting = divergence_problem(
        mapped, y, (None, None), cost=fitting_cost, epsilon=fitting_epsilon, reach=reach, solver=solver
    )
    regularizing = gap_problem(x, mapped, None, cost=cost, epsilon=gap_epsilon, solver=solver)
    terms = _values([fitting], [regularizing], "shannon", solver, tolerance, max_iterations)
    return terms.divergences[0], terms.gaps[0]


def divergence_problem(
    mapped: Tensor,
    y: Tensor,
    weights: tuple[Tensor | None, Tensor | None],
    *,
    cost: CostLike,
    epsilon: float | None,
    reach: float | None,
    solver: str,
) -> Problem:
    """Check the arguments of a Sinkhorn divergence, for :func:`divergences_and_gaps`.

    Args:
        mapped: ``(n, d)`` images.
        y: ``(m, d)`` samples of the target.
        weights: ``(n,)`` and ``(m,)`` weights, or ``None`` for uniform ones.
        cost: Ground cost.
        epsilon: Regularization in units of the cost; 5 % of the mean cost if ``None``.
        reach: Strength of soft marginals, or ``None``.
        solver: See :func:`optimal_transport`.
    """
    return _problem(mapped, y, weights, cost, check_epsilon("reach", reach), epsilon, 0.05, "mean", solver)


def gap_problem(
    x: Tensor, mapped: Tensor, weights: Tensor | None, *, cost: CostLike, epsilon: float | None, solver: str
) -> Problem:
    """Check the arguments of a Monge gap, for :func:`divergences_and_gaps`.

    Args:
        x: ``(n, d)`` samples.
        mapped: Their images.
        weights: ``(n,)`` weights, or ``None`` for uniform ones.
        cost: Ground cost.
        epsilon: Regularization in units of the cost; 1 % of the mean cost if ``None``.
        solver: See :func:`optimal_transport`.
    """
    return _problem(x, mapped, [weights], cost, None, epsilon, 0.01, "mean", solver, paired=True)


def divergences_and_gaps(
    fitting: list[Problem],
    regularizing: list[Problem],
    *,
    solver: str = "auto",
    tolerance: float = 1e-5,
    max_iterations: int = 2000,
) -> Terms:
    """Return several divergences and gaps (Shannon convention), solved together where their shapes agree.

    Whether they converged is for the caller to tell.

    Args:
        fitting: Of :func:`divergence_problem`.
        regularizing: Of :func:`gap_problem`.
        solver: See :func:`optimal_transport`.
        tolerance: L1 marginal error at which the solver stops.
        max_iterations: Most sweeps of the solver.
    """
    return _values(fitting, regularizing, "shannon", solver, tolerance, max_iterations, silent=True)


@eager
def _problem(
    x: Tensor,
    y: Tensor,
    weights: Sequence[Tensor | None],
    cost: CostLike,
    rho: float | None,
    epsilon: float | None,
    relative_epsilon: float,
    relative_to: str,
    solver: str,
    *,
    paired: bool = False,
) -> Problem:
    """Check the arguments of a divergence, or with ``paired`` of a gap, whose samples share one set of weights."""
    y_name = "mapped" if paired else "y"
    check_transforms(x, y)
    check_pair("x", x, y_name, y, same_length=paired)
    cost = resolve(cost)
    cost.check_domain("x", x)
    cost.check_domain(y_name, y)
    x, y = solver_precision(x), solver_precision(y)
    a = check_weights("weights" if paired else "weights[0]", weights[0], x, balanced=rho is None)
    b = a if paired else check_weights("weights[1]", weights[1], y, balanced=rho is None)
    regularization = check_regularization(epsilon, relative_epsilon, relative_to, rho, solver)
    return Problem(x, y, a, b, cost, rho, *regularization, uniform=all(w is None for w in weights))


@eager
def _values(
    fitting: list[Problem],
    regularizing: list[Problem],
    convention: str,
    solver: str,
    tolerance: float,
    max_iterations: int,
    *,
    silent: bool = False,
) -> Terms:
    """Return the divergences and the gaps of problems whose arguments have been checked."""
    problems = fitting + regularizing
    options: dict[str, Any] = {"tolerance": tolerance, "max_iterations": max_iterations, "silent": silent}
    solved = solve_all(problems, solver=solver, **options)
    values = [result.value for result in solved]
    if solver == "exact":
        divergences = [value.to(p.x.dtype) for p, value in zip(fitting, values, strict=False)]
        gaps = [(_paid(p) - value).to(p.x.dtype) for p, value in zip(regularizing, values[len(fitting) :], strict=True)]
        return Terms(divergences, gaps, 0.0, True)
    debiased = len(fitting) + (len(regularizing) if convention == "debiased" else 0)
    to_themselves = _to_themselves(problems[:debiased], solved[:debiased], solver, options)
    self_terms = [(first.value + second.value) / 2 for first, second in to_themselves]
    divergences = [_divergence(*one) for one in zip(fitting, solved, self_terms, strict=False)]
    gaps = []
    for k, p in enumerate(regularizing, start=len(fitting)):
        gap = _paid(p) - solved[k].value
        if convention == "debiased":
            gap = gap + self_terms[k] - _standing(p)
        elif convention == "shannon":
            # KL(P | a⊗a) = 2H(a) - H(P)
            gap = gap + 2 * solved[k].epsilon * torch.special.entr(p.a).sum()
        gaps.append(gap)
    if not silent and _cancelled(divergences + gaps, problems, solved):
        # What is left of float32's digits is too little: once more in double.
        fitting, regularizing = ([p.to(torch.float64) for p in part] for part in (fitting, regularizing))
        terms = _values(fitting, regularizing, convention, solver, tolerance, max_iterations)
        narrow = problems[0].x.dtype
        return terms._replace(
            divergences=[value.to(narrow) for value in terms.divergences],
            gaps=[value.to(narrow) for value in terms.gaps],
        )
    everything = solved + [result for pair in to_themselves for result in pair]
    error = max((result.marginal_error for result in everything), default=0.0)
    divergences = [value.to(p.x.dtype) for p, value in zip(fitting, divergences, strict=True)]
    gaps = [value.to(p.x.dtype) for p, value in zip(regularizing, gaps, strict=True)]
    return Terms(divergences, gaps, error, all(result.converged for result in everything))


def _cancelled(values: list[Tensor], problems: list[Problem], solved: list[OTResult]) -> bool:
    """Return whether a value is so small a difference of its terms that float32 costs do not tell it."""
    if not problems or problems[0].x.dtype != torch.float32 or problems[0].x.device.type != "cpu":
        return False
    pairs = zip(values, solved, strict=True)
    return any(abs(float(value.detach())) < _CANCELLED * abs(float(result.value.detach())) for value, result in pairs)


def _stacked(values: list[Tensor], x: Tensor) -> Tensor:
    """Return the value of one problem, or the values of as many as there are."""
    if x.dim() < 3:
        return values[0]
    return torch.stack(values) if values else x.new_zeros(0)


def _paid(p: Problem) -> Tensor:
    x, y, a = p.x, p.y, p.a
    if not p.uniform:
        # What has no weight may be infinitely far.
        rows = a.detach() > 0
        kept = a.requires_grad or bool(rows.all())
        x, y, a = (x, y, a) if kept else (x[rows], y[rows], a[rows])
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
    problems: list[Problem], solved: list[OTResult], solver: str, options: dict[str, Any]
) -> list[tuple[OTResult, OTResult]]:
    """Return the transport of both measures to themselves, for each problem, at the epsilon it was solved at."""
    both = [
        Problem(points, points, w, w, p.cost, p.rho, result.epsilon, uniform=p.uniform)
        for p, result in zip(problems, solved, strict=True)
        for points, w in ((p.x, p.a), (p.y, p.b))
    ]
    results = solve_all(both, solver=solver, **options)
    return list(zip(results[::2], results[1::2], strict=True))


def _each(name: str, x: Tensor, y: Tensor, *weights: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Return the arguments of each of ``(B, n, d)`` problems."""
    if len(x) != len(y):
        raise ValueError(f"x holds {len(x)} problems but {name} {len(y)}: their first dimensions must agree")
    for w in weights:
        if w is not None and (w.dim() != 2 or len(w) != len(x)):
            raise ValueError(f"weights must have shape ({len(x)}, n) for {len(x)} problems, got {tuple(w.shape)}")
    rows = ([None] * len(x) if w is None else list(w) for w in weights)
    return zip(x, y, *rows, strict=True)
