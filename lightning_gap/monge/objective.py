"""What a transport map is trained by, as one function of samples and their images."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_gap.monge.ot.checks import check_weights
from lightning_gap.monge.ot.costs import Cost
from lightning_gap.monge.ot.energy import energy_distance
from lightning_gap.monge.ot.epsilon import FITTING_SHARE, GAP_SHARE, Epsilon
from lightning_gap.monge.ot.options import SolverOptions
from lightning_gap.monge.ot.problem import Problem, checked_problem
from lightning_gap.monge.ot.terms import solve_terms
from lightning_gap.monge.ot.unbalanced import normalized, unbalanced_weights

__all__ = ["FittingLoss", "GapOn", "MapObjective", "ObjectiveTerms"]

FittingLoss = Literal["sinkhorn", "energy", "semidual"] | Callable[..., Tensor]
GapOn = Literal["source", "reference", "both"]
Weights = tuple[Tensor | None, Tensor | None]

# Names of the fitting losses where they are logged.
_LOSS_NAMES = {"sinkhorn": "sinkhorn_divergence", "energy": "energy_distance", "semidual": "semidual"}


class ObjectiveTerms(NamedTuple):
    """Means over the conditions (``gap`` only if asked for), and how well the solver knows them, at the worst."""

    loss: Tensor
    gap: Tensor | None
    marginal_error: float
    converged: bool


@dataclass(frozen=True)
class MapObjective:
    """The terms that a map is trained by (Uscidda and Cuturi 2023, section 3); see :class:`MongeMap` for the fields."""

    cost: Cost
    fitting_cost: Cost
    fitting_loss: FittingLoss = "sinkhorn"
    rho: float | None = None
    reweight: bool = False
    gap_on: GapOn = "source"
    options: SolverOptions = field(default_factory=SolverOptions)

    def __post_init__(self) -> None:
        loss = self.fitting_loss
        if not (callable(loss) or loss in _LOSS_NAMES):
            raise ValueError(f"fitting_loss must be one of {', '.join(_LOSS_NAMES)}, or a function, got {loss!r}")
        if self.reweight and self.rho is None:
            raise ValueError("reweight=True needs rho, the strength of the soft marginals: give rho=..., or neither")
        if self.rho is not None and not self.reweight and loss != "sinkhorn":
            raise ValueError(
                "rho softens the marginals of the Sinkhorn divergence only: give reweight=True for another "
                "fitting_loss, or leave rho out"
            )
        if self.options.solver == "exact":
            raise ValueError(
                "solver='exact' has no epsilon, and MongeMap trains with one: leave it out, and score a trained map by "
                "monge_gap(x, model.transport(x), solver='exact')"
            )

    @property
    def loss_name(self) -> str:
        """The fitting loss where it is logged."""
        return "fitting_loss" if callable(self.fitting_loss) else _LOSS_NAMES[self.fitting_loss]

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
        """Return the terms of ``(n, d)`` samples, or ``(K, n, d)`` of K conditions, which have been checked.

        Weights have any positive sum; ``reference`` are further samples and their images, for ``gap_on``. Epsilons that
        are ``None`` are 5 % and 1 % of the mean cost.
        """
        many, options = source.dim() == 3, self.options
        each: list[list[Any]] = [
            [None] * (len(source) if many else 1) if part is None else list(part) if many else [part]
            for part in (source, mapped, target, *weights, *(reference or (None, None)))
        ]
        fitting: list[Problem] = []
        regularizing: list[Problem] = []
        other: list[Tensor] = []
        soft = None if self.reweight else self.rho
        near: dict[str, Any] = {"epsilon": Epsilon.given(options, fitting_epsilon, FITTING_SHARE), "check": False}
        far: dict[str, Any] = {"epsilon": Epsilon.given(options, gap_epsilon, GAP_SHARE), "check": False}
        how: dict[str, Any] = {"cost": self.fitting_cost, "epsilon": fitting_epsilon, "solver": options.solver}
        for x, t, y, a, b, r, tr in zip(*each, strict=True):
            if self.reweight:
                a, b = unbalanced_weights(x, y, rho=self.rho, weights=(a, b), **how)
            a, b = normalized(a), normalized(b)
            if self.fitting_loss == "sinkhorn":
                for name, points in (("mapped", t), ("target", y)):
                    self.fitting_cost.check_domain(name, points)
                fitting.append(checked_problem(t, y, (a, b), cost=self.fitting_cost, rho=soft, **near))
            elif self.fitting_loss == "energy":
                other.append(energy_distance(t, y, weights=(a, b)))
            elif self.fitting_loss == "semidual":
                other.append(t.new_zeros(()))  # it is of the map, not of its images
            else:
                weighted = {} if a is None and b is None else {"weights": (a, b)}
                other.append(self.fitting_loss(t, y, **weighted))
            if with_gap:
                s, image, w = self._gap_samples(x, t, a, r, tr)
                for name, points in (("source", s), ("mapped", image)):
                    self.cost.check_domain(name, points)
                regularizing.append(checked_problem(s, image, [w], cost=self.cost, paired=True, **far))
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
