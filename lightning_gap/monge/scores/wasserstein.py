"""The entropic Wasserstein cost between two sets of samples."""

from typing import Any

from torch import Tensor

from lightning_gap.monge.ot.checks import check_epsilon
from lightning_gap.monge.ot.costs import Cost, CostLike, resolve
from lightning_gap.monge.ot.options import Solver, SolverOptions
from lightning_gap.monge.ot.solve import optimal_transport
from lightning_gap.monge.scores.pooling import TwoSampleMetric

__all__ = ["EntropicWasserstein", "entropic_wasserstein"]


def entropic_wasserstein(
    x: Tensor,
    y: Tensor,
    *,
    cost: CostLike = "euclidean",
    epsilon: float = 0.1,
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
    solver: Solver = "auto",
    tolerance: float = 1e-3,
) -> Tensor:
    r"""Return the regularized transport cost, by default the entropic Wasserstein-1 distance.

    .. math::
        OT_\varepsilon = \min_P \langle P, C \rangle + \varepsilon\, KL(P \,|\, a \otimes b)

    It is not debiased, so that it is not 0 between equal samples (Cuturi 2013, "Sinkhorn Distances"): set it beside its
    floor, or take :func:`sinkhorn_divergence`.

    Args:
        x: ``(n, d)`` samples.
        y: ``(m, d)`` samples.
        cost: Ground cost: a name, an instance from :mod:`lightning_gap.costs`, or a function.
        epsilon: Regularization in units of the cost.
        weights: ``(n,)`` and ``(m,)`` weights, each summing to 1; uniform by default.
        solver: See :func:`optimal_transport`.
        tolerance: L1 marginal error at which the solver stops.

    Returns:
        A scalar, differentiable in samples and weights.

    Raises:
        TypeError: An argument is no floating-point tensor, or the dtypes differ.
        ValueError: Shapes or devices do not fit, a value is not finite, or an option is out of range.

    Example:
        >>> import torch
        >>> entropic_wasserstein(torch.zeros(4, 1), torch.full((6, 1), 3.0))
        tensor(3.)
    """
    return optimal_transport(
        x, y, cost=cost, epsilon=epsilon, weights=weights, solver=solver, tolerance=tolerance
    ).value  # fmt: skip


class EntropicWasserstein(TwoSampleMetric):
    """The regularized transport cost between all samples of two kinds; see :func:`entropic_wasserstein`.

    All samples are kept, and gathered from all processes. Values carry no gradient.

    Args:
        cost: As in :func:`entropic_wasserstein`, like the following.
        epsilon: Regularization in units of the cost.
        solver: See :func:`optimal_transport`.
        tolerance: L1 marginal error at which the solver stops.
        **kwargs: Of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: An option is not known or out of range.

    Example:
        >>> import torch
        >>> metric = EntropicWasserstein()
        >>> metric.update(torch.zeros(4, 1), torch.full((6, 1), 3.0))
        >>> metric.compute()
        tensor(3.)
    """

    cost: Cost

    def __init__(
        self,
        cost: CostLike = "euclidean",
        *,
        epsilon: float = 0.1,
        solver: Solver = "auto",
        tolerance: float = 1e-3,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.cost = resolve(cost)
        self.options = SolverOptions(solver, tolerance)
        self.epsilon = epsilon
        check_epsilon("epsilon", epsilon)

    def compute(self) -> Tensor:
        """Return the cost between all samples, a scalar."""
        first, second = self.kept_weights()
        return entropic_wasserstein(
            *self.kept(), cost=self.cost, epsilon=self.epsilon, weights=(first, second),
            solver=self.options.solver, tolerance=self.options.tolerance,
        )  # fmt: skip
