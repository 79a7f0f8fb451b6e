"""The Sinkhorn divergence between samples, alone and beside the Monge gap of the map that made them."""

from torch import Tensor

from lightning_gap.checks import renamed
from lightning_gap.monge.ot.checks import check_epsilon
from lightning_gap.monge.ot.costs import CostLike
from lightning_gap.monge.ot.epsilon import FITTING_SHARE, GAP_SHARE, Epsilon, Scale
from lightning_gap.monge.ot.options import Solver, SolverOptions
from lightning_gap.monge.ot.problem import checked_problem
from lightning_gap.monge.ot.terms import each, solve_terms, stacked

__all__ = ["divergence_and_gap", "sinkhorn_divergence"]


def sinkhorn_divergence(
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
    reach: float | None = None,
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
        relative_epsilon: Regularization as a share of the mean cost between ``x`` and ``y`` (weighted, detached).
        relative_to: ``"mean"``; ``"std"`` for a share of the costs' standard deviation; ``"typical"`` for one of their
            mean without outliers.
        weights: ``(n,)`` and ``(m,)`` weights; uniform by default. They sum to 1 unless ``rho`` is given.
        rho: Strength of the soft marginal constraints :math:`\rho`, in units of the cost, for unbalanced transport
            (Séjourné et al. 2019); ``None`` for balanced.
        solver: See :func:`optimal_transport`; ``"exact"`` gives the transport cost itself.
        tolerance: L1 marginal error at which the solver stops.
        max_iterations: Most sweeps of the solver.
        reach: Deprecated: ``rho``.

    Returns:
        A scalar, or ``(B,)`` values, differentiable in ``x`` and ``y``.

    Raises:
        TypeError: An argument is no floating-point tensor, or ``max_iterations`` no integer.
        ValueError: Shapes do not fit, values are not finite, or an option is unknown.

    Example:
        >>> import torch
        >>> from lightning_gap import sinkhorn_divergence
        >>> x = torch.linspace(0, 1, 50)[:, None]
        >>> round(float(sinkhorn_divergence(x, x + 3, epsilon=0.01)), 2)
        9.0
    """
    options = SolverOptions(solver, tolerance, max_iterations)
    rho = check_epsilon("rho", renamed("reach", "rho", reach, rho))
    regularization = Epsilon.given(options, epsilon, relative_epsilon, relative_to, rho=rho)
    problems = [
        checked_problem(x, y, w, cost=cost, epsilon=regularization, rho=rho) for x, y, *w in each("y", x, y, *weights)
    ]
    return stacked(solve_terms(problems, [], options).divergences, x)


def divergence_and_gap(
    x: Tensor,
    mapped: Tensor,
    y: Tensor,
    *,
    fitting_cost: CostLike = "sqeuclidean",
    fitting_epsilon: float | None = None,
    cost: CostLike = "sqeuclidean",
    gap_epsilon: float | None = None,
    rho: float | None = None,
    solver: Solver = "auto",
    tolerance: float = 1e-5,
    max_iterations: int = 2000,
    reach: float | None = None,
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
        rho: Strength of the divergence's soft marginals, in units of its cost; ``None`` for balanced ones.
        solver: See :func:`optimal_transport`.
        tolerance: L1 marginal error at which the solver stops.
        max_iterations: Most sweeps of the solver.
        reach: Deprecated: ``rho``.

    Returns:
        Two scalars, differentiable in ``x``, ``mapped`` and ``y``.

    Raises:
        TypeError: An argument is no floating-point tensor, or ``max_iterations`` no integer.
        ValueError: Shapes do not fit, values are not finite, or an option is unknown.

    Example:
        >>> import torch
        >>> from lightning_gap.monge import divergence_and_gap
        >>> x = torch.linspace(0, 1, 50)[:, None]
        >>> divergence, gap = divergence_and_gap(x, x + 1, x + 1)
        >>> abs(round(float(divergence), 4))
        0.0
    """
    options = SolverOptions(solver, tolerance, max_iterations)
    rho = check_epsilon("rho", renamed("reach", "rho", reach, rho))
    regularization = Epsilon.given(options, fitting_epsilon, FITTING_SHARE, rho=rho)
    fitting = checked_problem(mapped, y, (None, None), cost=fitting_cost, epsilon=regularization, rho=rho)
    regularization = Epsilon.given(options, gap_epsilon, GAP_SHARE)
    regularizing = checked_problem(x, mapped, [None], cost=cost, epsilon=regularization, paired=True)
    terms = solve_terms([fitting], [regularizing], options)
    return terms.divergences[0], terms.gaps[0]
