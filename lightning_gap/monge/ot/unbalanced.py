"""How much of each sample takes part in unbalanced transport."""

import torch
from torch import Tensor

from lightning_gap.checks import renamed
from lightning_gap.monge.ot.checks import check_weights
from lightning_gap.monge.ot.costs import Cost
from lightning_gap.monge.ot.options import Solver
from lightning_gap.monge.ot.solve import optimal_transport

__all__ = ["normalized", "unbalanced_weights"]

# The solver lets no sample keep less than exp(-70) of its mass: what is left of nothing.
_NOTHING = 1e-20


def normalized(weights: Tensor | None) -> Tensor | None:
    """Return non-negative weights, not all 0, so that they sum to 1."""
    return None if weights is None else weights / weights.sum()


@torch.no_grad()
def unbalanced_weights(
    x: Tensor,
    y: Tensor,
    *,
    rho: float | None = None,
    cost: Cost | str = "sqeuclidean",
    epsilon: float | None = None,
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
    solver: Solver = "auto",
    reach: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Return how much of each sample takes part in unbalanced transport, as weights that sum to 1.

    The plan P of unbalanced transport leaves aside mass that would have to travel further than it is worth. Its
    marginals, which its potentials give without the plan,

    .. math::
        P \mathbf 1 = a\, e^{-f / \rho}, \qquad P^\top \mathbf 1 = b\, e^{-g / \rho},

    weigh the samples: outliers and dead cells count for little, and populations whose shares changed are matched by
    their shapes (Eyring et al. 2024, "Unbalancedness in neural Monge maps improves unpaired domain translation").

    Args:
        x: ``(n, d)`` source samples.
        y: ``(m, d)`` target samples.
        rho: Strength :math:`\rho` of the soft marginals, in units of the cost: mass whose cost is well above it is left
            aside.
        cost: Ground cost.
        epsilon: Regularization in units of the cost; 5 % of the mean cost by default.
        weights: ``(n,)`` and ``(m,)`` weights before; uniform by default.
        solver: See :func:`optimal_transport`.
        reach: Old name of ``rho``.

    Returns:
        ``(n,)`` and ``(m,)`` weights, detached.

    Raises:
        TypeError: An argument is no floating-point tensor.
        ValueError: Shapes do not fit, values are not finite, or an option is unknown.
        FloatingPointError: No mass is left: all samples are further apart than ``rho`` allows.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [1.0], [100.0]])
        >>> unbalanced_weights(x, x[:2], rho=10.0, epsilon=0.1)[0].round(decimals=2)
        tensor([0.5000, 0.5000, 0.0000])
    """
    rho = renamed("reach", "rho", reach, rho)
    if rho is None:
        raise TypeError("unbalanced_weights needs rho, the strength of the soft marginals: give it")
    a, b = (normalized(w) for w in weights)
    result = optimal_transport(x, y, cost=cost, epsilon=epsilon, weights=(a, b), rho=rho, solver=solver, tolerance=1e-3)
    if result.f is None or result.g is None:
        raise ValueError(f"solver={solver!r} has no soft marginals: use 'dense', 'blocked' or 'auto'")
    found = []
    for w, potential, samples in ((a, result.f, x), (b, result.g, y)):
        mass = check_weights("weights", w, samples) * (-potential / rho).to(samples.dtype).exp()
        total = float(mass.sum())
        if not total > _NOTHING:
            raise FloatingPointError(
                f"rho={rho:.3g} leaves no mass: the samples are further apart than that, raise it to the scale of "
                "the costs between source and target"
            )
        found.append(mass / total)
    return found[0], found[1]
