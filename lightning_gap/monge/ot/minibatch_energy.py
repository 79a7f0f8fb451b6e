"""A divergence whose gradient has no bias in batches: the energy distance between distributions of batches."""

from torch import Tensor

from lightning_gap.monge.ot.checks import check_pair
from lightning_gap.monge.ot.costs import CostLike, resolve
from lightning_gap.monge.ot.epsilon import FITTING_SHARE, Epsilon, Weighted
from lightning_gap.monge.ot.options import Solver, SolverOptions
from lightning_gap.monge.ot.problem import checked_problem
from lightning_gap.monge.ot.solve import solve_all

__all__ = ["minibatch_energy_distance"]


def minibatch_energy_distance(
    x: Tensor,
    y: Tensor,
    *,
    cost: CostLike = "sqeuclidean",
    epsilon: float | None = None,
    relative_epsilon: float = FITTING_SHARE,
    solver: Solver = "auto",
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
        TypeError: An argument is no floating-point tensor, or ``max_iterations`` no integer.
        ValueError: Shapes do not fit, values are not finite, an option is unknown, or a set has less than 2 samples.

    Example:
        >>> import torch
        >>> from lightning_gap.monge import minibatch_energy_distance
        >>> x = torch.linspace(0, 1, 51)[torch.arange(50) * 7 % 50, None]
        >>> round(float(minibatch_energy_distance(x, x + 3, epsilon=0.01)), 1)
        9.0
    """
    options = SolverOptions(solver, tolerance, max_iterations)
    regularization = Epsilon.given(options, epsilon, relative_epsilon)
    check_pair("x", x, "y", y)
    for name, samples in (("x", x), ("y", y)):
        if len(samples) < 2:
            raise ValueError(f"{name} must hold at least 2 samples, one for each half, got {len(samples)}")
    cost = resolve(cost)
    (x1, x2), (y1, y2) = (samples.tensor_split(2) for samples in (x, y))
    regularization = Epsilon(regularization.resolve(cost, (Weighted(y1), Weighted(y2))))

    def between(a: Tensor, b: Tensor) -> Tensor:
        problem = checked_problem(a, b, (None, None), cost=cost, epsilon=regularization)
        return solve_all([problem], options)[0].value.to(problem.x.dtype)

    across = between(x1, y1) + between(x1, y2) + between(x2, y1) + between(x2, y2)
    return across / 4 - (between(x1, x2) + between(y1, y2)) / 2
