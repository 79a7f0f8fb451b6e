r"""The two quantities everything in this room stands on: the Monge gap and the Sinkhorn divergence."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_gap.monge.costs import resolve
from lightning_gap.monge.samples import check_epsilon, check_pair, check_weights, solver_precision
from lightning_gap.monge.sinkhorn import CostLike, OTResult, Problem, solve

__all__ = ["Convention", "check_convention", "monge_gap", "sinkhorn_divergence"]

Convention = Literal["shannon", "kl", "debiased"]


def monge_gap(
    x: Tensor,
    mapped: Tensor,
    *,
    cost: CostLike = "sqeuclidean",
    epsilon: float | None = None,
    relative_epsilon: float = 0.01,
    convention: Convention = "shannon",
    weights: Tensor | None = None,
    reach: float | None = None,
    solver: str = "auto",
    tolerance: float = 1e-3,
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
    * ``"debiased"``: subtracts the Sinkhorn divergence of source and image; 0 for the identity map.

    Args:
        x: ``(n, d)`` samples of the reference measure, any that covers the source; or ``(B, n, d)``, B problems.
        mapped: Their images, row by row, of the same shape.
        cost: Ground cost: a name, an instance from :mod:`lightning_gap.costs`, or a function.
        epsilon: Regularization in units of the cost; overrides ``relative_epsilon``.
        relative_epsilon: Regularization as a share of the mean cost between ``x`` and ``mapped`` (detached).
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
    if isinstance(x, Tensor) and isinstance(mapped, Tensor) and x.dim() == mapped.dim() == 3:
        return _batched(
            lambda x, mapped, w: monge_gap(
                x, mapped, cost=cost, epsilon=epsilon, relative_epsilon=relative_epsilon, convention=convention,
                weights=w, reach=reach, solver=solver, tolerance=tolerance, max_iterations=max_iterations,
            ),
            "mapped", x, mapped, weights,
        )  # fmt: skip
    check_pair("x", x, "mapped", mapped, same_length=True)
    cost, rho = resolve(cost), check_epsilon("reach", reach)
    cost.check_domain("x", x)
    cost.check_domain("mapped", mapped)
    x, mapped = solver_precision(x), solver_precision(mapped)
    a = check_weights("weights", weights, x, balanced=rho is None)
    options: dict[str, Any] = {"solver": solver, "tolerance": tolerance, "max_iterations": max_iterations}
    problem = Problem(x, mapped, a, a, cost, rho)
    transport = solve(problem, epsilon=epsilon, relative_epsilon=relative_epsilon, **options)
    gap = (a * cost.paired(x, mapped)).sum() - transport.value
    if transport.solver == "exact":
        return gap
    if convention == "debiased":
        gap = gap + _self_terms(problem, transport, options)
    elif convention == "shannon":
        # KL(P | a⊗a) = 2H(a) - H(P)
        gap = gap + 2 * transport.epsilon * torch.special.entr(a).sum()
    return gap


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
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
    reach: float | None = None,
    solver: str = "auto",
    tolerance: float = 1e-3,
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
        relative_epsilon: Regularization as a share of the mean cost between ``x`` and ``y`` (detached).
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
    if isinstance(x, Tensor) and isinstance(y, Tensor) and x.dim() == y.dim() == 3:
        return _batched(
            lambda x, y, v, w: sinkhorn_divergence(
                x, y, cost=cost, epsilon=epsilon, relative_epsilon=relative_epsilon, weights=(v, w), reach=reach,
                solver=solver, tolerance=tolerance, max_iterations=max_iterations,
            ),
            "y", x, y, *weights,
        )  # fmt: skip
    check_pair("x", x, "y", y)
    cost, rho = resolve(cost), check_epsilon("reach", reach)
    cost.check_domain("x", x)
    cost.check_domain("y", y)
    x, y = solver_precision(x), solver_precision(y)
    a = check_weights("weights[0]", weights[0], x, balanced=rho is None)
    b = check_weights("weights[1]", weights[1], y, balanced=rho is None)
    options: dict[str, Any] = {"solver": solver, "tolerance": tolerance, "max_iterations": max_iterations}
    problem = Problem(x, y, a, b, cost, rho)
    transport = solve(problem, epsilon=epsilon, relative_epsilon=relative_epsilon, **options)
    if transport.solver == "exact":
        return transport.value
    divergence = transport.value - _self_terms(problem, transport, options)
    if rho is not None:
        divergence = divergence + transport.epsilon / 2 * (a.sum() - b.sum()).square()
    return divergence


def _self_terms(problem: Problem, transport: OTResult, options: dict[str, Any]) -> Tensor:
    """Return half of the costs of both measures to themselves, solved as the transport between them was."""
    options = options | {"solver": transport.solver}
    terms = [
        solve(
            Problem(points, points, w, w, problem.cost, problem.rho),
            epsilon=transport.epsilon,
            relative_epsilon=1.0,
            **options,
        ).value
        for points, w in ((problem.x, problem.a), (problem.y, problem.b))
    ]
    return torch.stack(terms).sum() / 2


def _batched(function: Callable[..., Tensor], name: str, x: Tensor, y: Tensor, *weights: Tensor | None) -> Tensor:
    """Return the function's values for each of ``(B, n, d)`` problems."""
    if len(x) != len(y):
        raise ValueError(f"x holds {len(x)} problems but {name} {len(y)}: their first dimensions must agree")
    for w in weights:
        if w is not None and (w.dim() != 2 or len(w) != len(x)):
            raise ValueError(f"weights must have shape ({len(x)}, n) for {len(x)} problems, got {tuple(w.shape)}")
    rows = ([None] * len(x) if w is None else list(w) for w in weights)
    return torch.stack([function(*problem) for problem in zip(x, y, *rows, strict=True)])
