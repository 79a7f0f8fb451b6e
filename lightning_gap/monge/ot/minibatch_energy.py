"""A divergence whose gradient has no bias in batches: the energy distance between distributions of batches."""

from torch import Tensor

from lightning_gap.monge.ot.checks import check_epsilon, check_pair
from lightning_gap.monge.ot.costs import resolve
from lightning_gap.monge.ot.sinkhorn import CostLike, optimal_transport, share_of_mean_cost

__all__ = ["minibatch_energy_distance"]


def minibatch_energy_distance(
    x: Tensor,
    y: Tensor,
    *,
    cost: CostLike = "sqeuclidean",
    epsilon: float | None = None,
    relative_epsilon: float = 0.05,
    solver: str = "auto",
    tolerance: float = 1e-3,
    max_iterations: int = 2000,
) -> Tensor:
    r"""Return the minibatch energy distance between two sets of samples, whose expectation is 0 where they agree.

    .. math::
        \tfrac14 \sum_{i,j} OT_\varepsilon(X_i, Y_j) - \tfrac12 OT_\varepsilon(X_1, X_2)
            - \tfrac12 OT_\varepsilon(Y_1, Y_2)

    with :math:`X_1, X_2` the two halves of ``x`` and :math:`Y_1, Y_2` those of ``y`` (half of Salimans et al. 2018,
    "Improving GANs Using Optimal Transport", equation 5).

    A Sinkhorn divergence takes the self terms of a batch *with itself*, where nothing has to move; between two batches
    of one distribution there is mass to move, by chance, and the difference pulls a map that is trained on batches
    away from the true one. Here the self terms are between independent halves too, and the pulls cancel in expectation,
    at any size of batch. The price: half as many samples in each problem, twice as many problems, and values that are
    negative as often as not once the distributions agree.

    Args:
        x: ``(n, d)`` independent samples, at least 2.
        y: ``(m, d)`` independent samples, at least 2.
        cost: Ground cost: a name, an instance from :mod:`lightning_gap.costs`, or a function.
        epsilon: Regularization in units of the cost; overrides ``relative_epsilon``.
        relative_epsilon: Regularization as a share of the mean cost between the halves of ``y`` (detached).
        solver: See :func:`optimal_transport`.
        tolerance: L1 marginal error at which the solver stops.
        max_iterations: Most sweeps of the solver.

    Returns:
        A scalar, differentiable in ``x`` and ``y``.

    Raises:
        TypeError: An argument is no floating-point tensor.
        ValueError: Shapes do not fit, values are not finite, an option is unknown, or a set has less than 2 samples.

    Example:
        >>> import torch
        >>> from lightning_gap.monge import minibatch_energy_distance
        >>> x = torch.linspace(0, 1, 51)[torch.arange(50) * 7 % 50, None]
        >>> round(float(minibatch_energy_distance(x, x + 3, epsilon=0.01)), 1)
        9.0
    """
    check_pair("x", x, "y", y)
    for name, samples in (("x", x), ("y", y)):
        if len(samples) < 2:
            raise ValueError(f"{name} must hold at least 2 samples, one for each half, got {len(samples)}")
    cost = resolve(cost)
    (x1, x2), (y1, y2) = (samples.tensor_split(2) for samples in (x, y))
    if check_epsilon("epsilon", epsilon) is None and solver != "exact":
        epsilon = share_of_mean_cost(relative_epsilon, y1, y2, cost)

    def between(a: Tensor, b: Tensor) -> Tensor:
        return optimal_transport(
            a, b, cost=cost, epsilon=epsilon, solver=solver, tolerance=tolerance, max_iterations=max_iterations
        ).value

    across = between(x1, y1) + between(x1, y2) + between(x2, y1) + between(x2, y2)
    return across / 4 - (between(x1, x2) + between(y1, y2)) / 2
