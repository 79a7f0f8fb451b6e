"""The Monge gap: how far a map is from optimal."""

from typing import get_args

from torch import Tensor

from lightning_gap.checks import check_choice, renamed
from lightning_gap.monge.ot.checks import check_epsilon
from lightning_gap.monge.ot.costs import CostLike
from lightning_gap.monge.ot.epsilon import GAP_SHARE, Epsilon, Scale
from lightning_gap.monge.ot.options import Solver, SolverOptions
from lightning_gap.monge.ot.problem import checked_problem
from lightning_gap.monge.ot.terms import Convention, each, solve_terms, stacked

__all__ = ["Convention", "check_convention", "monge_gap"]


def monge_gap(
    x: Tensor,
    mapped: Tensor,
    *,
    cost: CostLike = "sqeuclidean",
    epsilon: float | None = None,
    relative_epsilon: float = GAP_SHARE,
    relative_to: Scale = "mean",
    convention: Convention = "shannon",
    weights: Tensor | None = None,
    rho: float | None = None,
    solver: Solver = "auto",
    tolerance: float = 1e-5,
    max_iterations: int = 2000,
    reach: float | None = None,
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
        rho: Strength of soft marginals of the best rearrangement, in units of the cost; not with ``"shannon"``.
        solver: See :func:`optimal_transport`; ``"exact"`` gives the gap without regularization, whatever the
            convention.
        tolerance: L1 marginal error at which the solver stops.
        max_iterations: Most sweeps of the solver.
        reach: Deprecated: ``rho``.

    Returns:
        A scalar, or ``(B,)`` values, differentiable in ``x`` and ``mapped``.

    Raises:
        TypeError: An argument is no floating-point tensor, or ``max_iterations`` no integer.
        ValueError: Shapes do not fit, values are not finite, or an option is unknown.

    Example:
        >>> import torch
        >>> from lightning_gap import monge_gap
        >>> x = torch.linspace(0, 1, 50)[:, None]
        >>> shifted, flipped = x + 1, 2 - x  # same image; only the first is optimal
        >>> float(monge_gap(x, flipped, convention="debiased") - monge_gap(x, shifted, convention="debiased")) > 0.1
        True
    """
    options = SolverOptions(solver, tolerance, max_iterations)
    rho = check_epsilon("rho", renamed("reach", "rho", reach, rho))
    check_convention(convention, rho)
    regularization = Epsilon.given(options, epsilon, relative_epsilon, relative_to, rho=rho)
    problems = [
        checked_problem(x, mapped, [w], cost=cost, epsilon=regularization, rho=rho, paired=True)
        for x, mapped, w in each("mapped", x, mapped, weights)
    ]
    return stacked(solve_terms([], problems, options, convention=convention).gaps, x)


def check_convention(convention: str, rho: float | None) -> None:
    """Raise ``ValueError`` unless the convention is known, and has a meaning for soft marginals if there are any."""
    check_choice("convention", convention, get_args(Convention))
    if rho is not None and convention == "shannon":
        raise ValueError("rho needs convention='kl' or 'debiased': the Shannon entropy is that of balanced plans")
