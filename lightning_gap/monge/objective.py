"""What a transport map is trained by, as one function of samples and their images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_gap.monge.ot.checks import check_weights
from lightning_gap.monge.ot.costs import Cost
from lightning_gap.monge.ot.energy import energy_distance
from lightning_gap.monge.ot.options import Solver, SolverOptions
from lightning_gap.monge.ot.problem import Problem
from lightning_gap.monge.ot.solve import optimal_transport
from lightning_gap.monge.ot.terms import divergence_problem, gap_problem, solve_terms

__all__ = ["FittingLoss", "GapOn", "MapObjective", "ObjectiveTerms", "unbalanced_weights"]

FittingLoss = Literal["sinkhorn", "energy"] | Callable[..., Tensor]
GapOn = Literal["source", "reference", "both"]
Weights = tuple[Tensor | None, Tensor | None]

# The solver lets no sample keep less than exp(-70) of its mass: what is left of nothing.
_NOTHING = 1e-20


class ObjectiveTerms(NamedTuple):
    """What a map is trained by, and how well it is known.

    Attributes:
        loss: The fitting loss, the mean over the conditions.
        gap: The gap, likewise; ``None`` if not asked for.
        marginal_error: The largest L1 marginal error of all transport problems solved; 0 if there was none.
        converged: Whether all of them reached the tolerance.
    """

    loss: Tensor
    gap: Tensor | None
    marginal_error: float
    converged: bool


@dataclass(frozen=True)
class MapObjective:
    r"""The terms that a map T is trained by (Uscidda and Cuturi 2023, section 3).

    .. math::
        \Delta(T\sharp\mu, \nu) \quad\text{and}\quad M^c_{\rho, \varepsilon}(T)

    Attributes:
        cost: Ground cost of the gap.
        fitting_cost: Ground cost of the Sinkhorn divergence, and of the plan that reweights.
        fitting_loss: :math:`\Delta`: ``"sinkhorn"``, ``"energy"``, or a function of ``(n, d)`` images and ``(m, d)``
            target samples, and of a keyword ``weights``, a pair, where there are weights.
        reach: Strength of soft marginals, in units of the fitting cost; ``None`` for balanced transport.
        reweight: Whether ``reach`` weighs the samples by the unbalanced plan between source and target (see
            :func:`unbalanced_weights`), rather than softening the divergence's marginals.
        gap_on: Where the gap is measured: on the source samples, on the reference's, or on both as one sample.
        solver: See :func:`optimal_transport`.
        tolerance: L1 marginal error at which the solver stops.
        max_iterations: Most sweeps of the solver.
    """

    cost: Cost
    fitting_cost: Cost
    fitting_loss: FittingLoss = "sinkhorn"
    reach: float | None = None
    reweight: bool = False
    gap_on: GapOn = "source"
    solver: Solver = "auto"
    tolerance: float = 1e-5
    max_iterations: int = 2000

    def __call__(self, source: Tensor, mapped: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Return the fitting loss and the gap of :meth:`terms`, which takes the same arguments."""
        terms = self.terms(source, mapped, target, **options)
        return terms.loss, terms.gap

    def terms(
        self,
        source: Tensor,
        mapped: Tensor,
        target: Tensor,
        *,
        fitting_epsilon: float | None,
        gap_epsilon: float | None,
        weights: Weights = (None, None),
        reference: tuple[Tensor, Tensor] | None = None,
        with_gap: bool = True,
    ) -> ObjectiveTerms:
        """Return the fitting loss and the gap, each the mean over the conditions.

        Args:
            source: ``(n, d)`` samples, or ``(K, n, d)`` of K conditions.
            mapped: Their images, of the same shape.
            target: ``(m, d)`` samples, or ``(K, m, d)``.
            fitting_epsilon: Regularization of the divergence, in units of its cost; 5 % of the mean cost if ``None``.
            gap_epsilon: Regularization of the gap, likewise; 1 % if ``None``.
            weights: ``(n,)`` and ``(m,)`` weights, or ``(K, n)`` and ``(K, m)``, of any positive sum.
            reference: Further samples and their images, for ``gap_on``; of the shape of ``source`` but for n.
            with_gap: Whether the gap is wanted.

        Raises:
            TypeError: An argument is no floating-point tensor, or the dtypes differ.
            ValueError: Shapes or devices do not fit, values are not finite, or a cost is not defined there.
        """
        options = SolverOptions(self.solver, self.tolerance, self.max_iterations)
        many = source.dim() == 3
        each: list[list[Any]] = [
            [None] * (len(source) if many else 1) if part is None else list(part) if many else [part]
            for part in (source, mapped, target, *weights, *(reference or (None, None)))
        ]
        fitting: list[Problem] = []
        regularizing: list[Problem] = []
        other: list[Tensor] = []
        soft = None if self.reweight else self.reach
        for x, t, y, a, b, r, tr in zip(*each, strict=True):
            if self.reweight:
                assert self.reach is not None  # checked with the arguments of MongeMap
                a, b = unbalanced_weights(
                    x, y, cost=self.fitting_cost, epsilon=fitting_epsilon, reach=self.reach, weights=(a, b),
                    solver=self.solver,
                )  # fmt: skip
            a, b = normalized(a), normalized(b)
            if self.fitting_loss == "sinkhorn":
                fitting.append(
                    divergence_problem(t, y, (a, b), options, cost=self.fitting_cost, epsilon=fitting_epsilon, rho=soft)
                )
            elif self.fitting_loss == "energy":
                other.append(energy_distance(t, y, weights=(a, b)))
            else:
                weighted = {} if a is None and b is None else {"weights": (a, b)}
                other.append(self.fitting_loss(t, y, **weighted))
            if with_gap:
                where = self._gap_samples(x, t, a, r, tr)
                regularizing.append(gap_problem(*where, options, cost=self.cost, epsilon=gap_epsilon))
        terms = solve_terms(fitting, regularizing, options, silent=True)
        loss = torch.stack(terms.divergences or other).mean()
        gap = torch.stack(terms.gaps).mean() if with_gap else None
        return ObjectiveTerms(loss, gap, terms.marginal_error, terms.converged)

    def _gap_samples(
        self, x: Tensor, mapped: Tensor, weights: Tensor | None, r: Tensor | None, r_mapped: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.gap_on == "source":
            return x, mapped, weights
        assert r is not None
        assert r_mapped is not None
        if self.gap_on == "reference":
            return r, r_mapped, None
        halves = [check_weights("weights", w, s) / 2 for w, s in ((weights, x), (None, r))]
        return torch.cat([x, r]), torch.cat([mapped, r_mapped]), torch.cat(halves)


def normalized(weights: Tensor | None) -> Tensor | None:
    """Return weights that sum to 1.

    Args:
        weights: ``(n,)`` non-negative weights, not all 0, or ``None``.
    """
    return None if weights is None else weights / weights.sum()


@torch.no_grad()
def unbalanced_weights(
    x: Tensor,
    y: Tensor,
    *,
    reach: float,
    cost: Cost | str = "sqeuclidean",
    epsilon: float | None = None,
    weights: Weights = (None, None),
    solver: Solver = "auto",
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
        reach: Strength :math:`\rho` of the soft marginals, in units of the cost: mass whose cost is well above it is
            left aside.
        cost: Ground cost.
        epsilon: Regularization in units of the cost; 5 % of the mean cost by default.
        weights: ``(n,)`` and ``(m,)`` weights before; uniform by default.
        solver: See :func:`optimal_transport`.

    Returns:
        ``(n,)`` and ``(m,)`` weights, detached.

    Raises:
        TypeError: An argument is no floating-point tensor.
        ValueError: Shapes do not fit, values are not finite, or an option is unknown.
        FloatingPointError: No mass is left: all samples are further apart than ``reach`` allows.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [1.0], [100.0]])
        >>> unbalanced_weights(x, x[:2], reach=10.0, epsilon=0.1)[0].round(decimals=2)
        tensor([0.5000, 0.5000, 0.0000])
    """
    a, b = (normalized(w) for w in weights)
    result = optimal_transport(
        x, y, cost=cost, epsilon=epsilon, weights=(a, b), rho=reach, solver=solver, tolerance=1e-3
    )
    if result.f is None or result.g is None:
        raise ValueError(f"solver={solver!r} has no soft marginals: use 'dense', 'blocked' or 'auto'")
    found = []
    for w, potential, samples in ((a, result.f, x), (b, result.g, y)):
        mass = check_weights("weights", w, samples) * (-potential / reach).to(samples.dtype).exp()
        total = float(mass.sum())
        if not total > _NOTHING:
            raise FloatingPointError(
                f"reach={reach:.3g} leaves no mass: the samples are further apart than that, raise it to the scale of "
                "the costs between source and target"
            )
        found.append(mass / total)
    return found[0], found[1]
