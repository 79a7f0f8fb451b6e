"""The Monge gap as a metric."""

from typing import Any

from torch import Tensor

from lightning_gap.checks import renamed
from lightning_gap.monge.ot.checks import check_epsilon
from lightning_gap.monge.ot.costs import Cost, CostLike, resolve
from lightning_gap.monge.ot.epsilon import GAP_SHARE, Epsilon, Scale
from lightning_gap.monge.ot.gap import check_convention
from lightning_gap.monge.ot.options import Solver, SolverOptions
from lightning_gap.monge.ot.problem import checked_problem
from lightning_gap.monge.ot.terms import Convention, solve_terms
from lightning_gap.monge.scores.pooling import SampleMetric

__all__ = ["MongeGap"]


class MongeGap(SampleMetric):
    r"""The Monge gap of a map over all pairs :math:`(x_i, T(x_i))` that it was given; see :func:`monge_gap`.

    .. math::
        \tfrac1n \sum_i c(x_i, T(x_i)) - W_{c,\varepsilon}(\rho_n, T\sharp\rho_n)

    (Uscidda and Cuturi 2023, equation 8.) The gap of many pairs is not the mean of the gaps of their batches, which is
    lower: all pairs are kept, and gathered from all processes. ``solver="exact"`` gives the gap without regularization,
    which is 0 for an optimal map.

    Values carry no gradient: train with :func:`monge_gap`.

    Args:
        cost: Ground cost: a name, an instance from :mod:`lightning_gap.costs`, or a function (one that can be pickled,
            if the metric is to be).
        epsilon: Regularization in units of the cost; overrides ``relative_epsilon``.
        relative_epsilon: Regularization as a share of the mean cost between all ``x`` and all ``mapped``.
        relative_to: ``"mean"``, or ``"std"`` for a share of the costs' standard deviation.
        convention: ``"shannon"`` (default), ``"kl"`` or ``"debiased"``.
        rho: Strength of soft marginals, in units of the cost; not with ``"shannon"``.
        solver: See :func:`optimal_transport`.
        tolerance: L1 marginal error at which the solver stops.
        max_iterations: Most sweeps of the solver.
        reach: Old name of ``rho``.
        **kwargs: Of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: An option is not known or out of range.

    Example:
        >>> import torch
        >>> metric = MongeGap(solver="exact")
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> metric.update(x, 3 - x)  # crosses: |0 - 3|² and |1 - 2|² instead of twice |2|²
        >>> metric.compute()
        tensor(1.)
    """

    sets = ("x", "mapped")
    masses = ("weights",)
    paired = True
    cost: Cost
    x: list[Tensor]
    mapped: list[Tensor]
    weights: list[Tensor]

    def __init__(
        self,
        cost: CostLike = "sqeuclidean",
        *,
        epsilon: float | None = None,
        relative_epsilon: float = GAP_SHARE,
        relative_to: Scale = "mean",
        convention: Convention = "shannon",
        rho: float | None = None,
        solver: Solver = "auto",
        tolerance: float = 1e-3,
        max_iterations: int = 2000,
        reach: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.cost = resolve(cost)
        self.options = SolverOptions(solver, tolerance, max_iterations)
        self.rho = check_epsilon("rho", renamed("reach", "rho", reach, rho))
        self.epsilon = Epsilon.given(self.options, epsilon, relative_epsilon, relative_to, rho=self.rho)
        check_convention(convention, self.rho)
        self.convention = convention

    def update(self, x: Tensor, mapped: Tensor, *, weights: Tensor | None = None) -> None:
        """Add pairs.

        Args:
            x: ``(n, d)`` samples.
            mapped: ``(n, d)`` images, row by row.
            weights: ``(n,)`` weights of the pairs, summing to 1; uniform by default. Batches count by their numbers of
                pairs.

        Raises:
            TypeError: An argument is no floating-point tensor, or the dtypes differ.
            ValueError: Shapes or devices do not fit, values are not finite, or the cost is not defined there.
        """
        self.keep(x, mapped, weights)

    def compute(self) -> Tensor:
        """Return the gap of all pairs, a scalar."""
        how: dict[str, Any] = {"cost": self.cost, "epsilon": self.epsilon, "rho": self.rho}
        problem = checked_problem(*self.kept(), self.kept_weights(), **how, paired=True, check=False)
        return solve_terms([], [problem], self.options, convention=self.convention).gaps[0]
