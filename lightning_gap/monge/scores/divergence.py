"""The Sinkhorn divergence as a metric."""

from typing import Any

from torch import Tensor

from lightning_gap.checks import renamed
from lightning_gap.monge.ot.checks import check_epsilon
from lightning_gap.monge.ot.costs import Cost, CostLike, resolve
from lightning_gap.monge.ot.epsilon import FITTING_SHARE, Epsilon, Scale
from lightning_gap.monge.ot.options import Solver, SolverOptions
from lightning_gap.monge.ot.problem import checked_problem
from lightning_gap.monge.ot.terms import solve_terms
from lightning_gap.monge.scores.pooling import TwoSampleMetric

__all__ = ["SinkhornDivergence"]


class SinkhornDivergence(TwoSampleMetric):
    r"""The Sinkhorn divergence between all samples of two kinds; see :func:`sinkhorn_divergence`.

    .. math::
        S_\varepsilon(\alpha, \beta) = OT_\varepsilon(\alpha, \beta)
            - \tfrac12 OT_\varepsilon(\alpha, \alpha) - \tfrac12 OT_\varepsilon(\beta, \beta)

    (Feydy et al. 2019, equation 3.) All samples are kept, and gathered from all processes: the divergence of many is
    not the mean of the divergences of their batches, which is higher.

    Values carry no gradient: train with :func:`sinkhorn_divergence`.

    Args:
        cost: Ground cost: a name, an instance from :mod:`lightning_gap.costs`, or a function.
        epsilon: Regularization in units of the cost; overrides ``relative_epsilon``.
        relative_epsilon: Regularization as a share of the mean cost between all ``x`` and all ``y``.
        relative_to: ``"mean"``, or ``"std"`` for a share of the costs' standard deviation.
        rho: Strength of soft marginals, in units of the cost; ``None`` for balanced transport.
        solver: See :func:`optimal_transport`; ``"exact"`` gives the transport cost itself.
        tolerance: L1 marginal error at which the solver stops.
        max_iterations: Most sweeps of the solver.
        reach: Old name of ``rho``.
        **kwargs: Of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: An option is not known or out of range.

    Example:
        >>> import torch
        >>> metric = SinkhornDivergence(epsilon=0.01)
        >>> metric.update(torch.zeros(4, 1), torch.full((6, 1), 3.0))
        >>> metric.compute()
        tensor(9.)
    """

    cost: Cost

    def __init__(
        self,
        cost: CostLike = "sqeuclidean",
        *,
        epsilon: float | None = None,
        relative_epsilon: float = FITTING_SHARE,
        relative_to: Scale = "mean",
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

    def compute(self) -> Tensor:
        """Return the divergence between all samples, a scalar."""
        how: dict[str, Any] = {"cost": self.cost, "epsilon": self.epsilon, "rho": self.rho}
        problem = checked_problem(*self.kept(), self.kept_weights(), **how, check=False)
        return solve_terms([problem], [], self.options).divergences[0]
