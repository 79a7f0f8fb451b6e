r"""The two quantities everything in this room stands on: the Monge gap and the Sinkhorn divergence."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_gap.monge.costs import Cost, resolve
from lightning_gap.monge.samples import check_epsilon, check_pair, check_weights
from lightning_gap.monge.sinkhorn import choose_solver, mean_cost, samples_loss

__all__ = ["Convention", "CostLike", "monge_gap", "resolve_epsilon", "sinkhorn_divergence"]

Convention = Literal["shannon", "kl", "debiased"]
CostLike = str | Cost | Callable[[Tensor, Tensor], Tensor]


def monge_gap(
    x: Tensor,
    mapped: Tensor,
    *,
    cost: CostLike = "sqeuclidean",
    epsilon: float | None = None,
    relative_epsilon: float = 0.01,
    convention: Convention = "shannon",
    weights: Tensor | None = None,
    solver: str = "auto",
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
        x: ``(n, d)`` samples of the reference measure.
        mapped: ``(n, d)`` their images, row by row.
        cost: Ground cost: a name, an instance from :mod:`lightning_gap.costs`, or a function.
        epsilon: Regularization in units of the cost; overrides ``relative_epsilon``.
        relative_epsilon: Regularization as a share of the mean cost between ``x`` and ``mapped`` (detached).
        convention: ``"shannon"`` (default), ``"kl"`` or ``"debiased"``.
        weights: ``(n,)`` weights of the samples, summing to 1; uniform by default.
        solver: ``"auto"``, ``"tensorized"`` or ``"online"``.

    Returns:
        A scalar, differentiable in ``x`` and ``mapped``.

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
    if convention not in get_args(Convention):
        raise ValueError(f"convention must be one of {', '.join(get_args(Convention))}, got {convention!r}")
    check_pair("x", x, "mapped", mapped, same_length=True)
    a = check_weights("weights", weights, x)
    cost = resolve(cost)
    cost.check_domain("x", x)
    cost.check_domain("mapped", mapped)
    epsilon = resolve_epsilon(epsilon, relative_epsilon, x, mapped, cost)
    x, mapped, a = _solver_precision(x), _solver_precision(mapped), _solver_precision(a)
    transport = samples_loss(
        x,
        mapped,
        a,
        a,
        cost=cost,
        epsilon=epsilon,
        debias=convention == "debiased",
        solver=choose_solver(solver, cost, len(x), len(x)),
    )
    gap = (a * cost.paired(x, mapped)).sum() - transport
    if convention == "shannon":
        # KL(P | a⊗a) = 2H(a) - H(P)
        gap = gap + 2 * epsilon * torch.special.entr(a).sum()
    return gap


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
) -> Tensor:
    r"""Return the Sinkhorn divergence between two sets of samples, 0 where they agree.

    .. math::
        S_\varepsilon(\alpha, \beta) = OT_\varepsilon(\alpha, \beta)
            - \tfrac12 OT_\varepsilon(\alpha, \alpha) - \tfrac12 OT_\varepsilon(\beta, \beta)

    See Feydy et al. 2019, "Interpolating between optimal transport and MMD using Sinkhorn divergences", equation 3.

    Args:
        x: ``(n, d)`` samples.
        y: ``(m, d)`` samples.
        cost: Ground cost: a name, an instance from :mod:`lightning_gap.costs`, or a function.
        epsilon: Regularization in units of the cost; overrides ``relative_epsilon``.
        relative_epsilon: Regularization as a share of the mean cost between ``x`` and ``y`` (detached).
        weights: ``(n,)`` and ``(m,)`` weights; uniform by default. They sum to 1 unless ``reach`` is given.
        reach: Strength of the soft marginal constraints :math:`\rho`, in units of the cost, for unbalanced transport
            (Séjourné et al. 2019); ``None`` for balanced.
        solver: ``"auto"``, ``"tensorized"`` or ``"online"``.

    Returns:
        A scalar, differentiable in ``x`` and ``y``.

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
    check_pair("x", x, "y", y)
    reach = check_epsilon("reach", reach)
    a = check_weights("weights[0]", weights[0], x, balanced=reach is None)
    b = check_weights("weights[1]", weights[1], y, balanced=reach is None)
    cost = resolve(cost)
    cost.check_domain("x", x)
    cost.check_domain("y", y)
    return samples_loss(
        _solver_precision(x),
        _solver_precision(y),
        _solver_precision(a),
        _solver_precision(b),
        cost=cost,
        epsilon=resolve_epsilon(epsilon, relative_epsilon, x, y, cost),
        reach=reach,
        debias=True,
        solver=choose_solver(solver, cost, len(x), len(y)),
    )


def resolve_epsilon(epsilon: float | None, relative_epsilon: float, x: Tensor, y: Tensor, cost: Cost) -> float:
    """Return the absolute epsilon.

    Args:
        epsilon: An absolute one, which wins, or ``None``.
        relative_epsilon: A share of the mean cost.
        x: ``(n, d)`` samples.
        y: ``(m, d)`` samples.
        cost: The ground cost.

    Raises:
        ValueError: An epsilon is not positive, or all costs are 0 so that no share of them is.
    """
    absolute = check_epsilon("epsilon", epsilon)
    if absolute is not None:
        return absolute
    relative = check_epsilon("relative_epsilon", relative_epsilon)
    if relative is None:
        raise ValueError("relative_epsilon must be a positive finite number where epsilon is None, got None")
    mean = mean_cost(x, y, cost)
    if not mean > 0:
        raise ValueError(f"the mean {cost} cost is {mean}: give an absolute epsilon")
    return relative * mean


def _solver_precision(tensor: Tensor) -> Tensor:
    """Return half-precision tensors as float32: exponentials of costs do not fit in sixteen bits."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
