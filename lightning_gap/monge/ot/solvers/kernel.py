r"""Sinkhorn updates, as operators on potentials.

A sweep takes the columns' potential :math:`G`, finds the rows' best :math:`F`, and says how far the columns' best
answer to it is. All potentials here are in units of :math:`\varepsilon`, and the plan is
:math:`P_{ij} = a_i b_j e^{F_i + G_j - C_{ij}/\varepsilon}`. A kernel holds several problems of one shape, which are
swept together: a sweep of a small problem is mostly calls. A measure against itself has one potential for both sides;
its sweep is half of one.

Potentials are in double, whatever the matrices are: they are thousands in units of a small epsilon, and a rounding of
one, in float32, would be an error of the plan.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from lightning_gap.monge.ot.costs import Cost, PlanFactors
from lightning_gap.monge.ot.problem import Problem
from lightning_gap.monge.ot.solvers.blocks import soft_minimum
from lightning_gap.monge.ot.solvers.vectors import Vector, as_tensor, as_vector, numerics
from lightning_gap.precision import widest

__all__ = ["REGULARIZATIONS", "Kernel", "damping"]

# Shares of the diagonal by which an extrapolation's least squares are made regular.
REGULARIZATIONS = {torch.float32: 1e-8, torch.float64: 1e-14}


def damping(epsilon: float, rho: float | None) -> float:
    """Return the share of an answer that soft marginals of strength ``rho`` leave of it; 1 for hard ones."""
    return 1.0 if rho is None else rho / (rho + epsilon)


class Kernel(ABC):
    """B problems of one shape, without a graph, at B epsilons, as the fixed-point iteration needs them."""

    def __init__(
        self,
        problems: Sequence[Problem],
        epsilons: Sequence[float],
        largest: Sequence[float],
        weights: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        first = problems[0]
        self.problems, self.epsilons, self.largest = list(problems), list(epsilons), list(largest)
        self.dtype, self.rhos, self.symmetric = first.x.dtype, [p.rho for p in problems], first.to_itself
        if weights is None:
            a = torch.stack([p.a for p in problems])
            weights = a, a if self.symmetric else torch.stack([p.b for p in problems])
        self.a, self.b = (w.to(widest(w.device)) for w in weights)
        soft = first.rho is not None
        if not soft:
            # Masses that differ by a rounding of float32 would let the potentials drift.
            self.a, self.b = (w / w.sum(1, keepdim=True) for w in (self.a, self.b))
        self.a_vector, self.b_vector = as_vector(self.a), as_vector(self.b)
        self.numerics = numerics(self.a_vector)
        self.on_device = self.numerics is torch
        # Share of the way to the columns' best answer that is taken: the averaged fixed point of a measure against
        # itself converges in a few sweeps (Feydy et al. 2019, section 3.2).
        self.relaxation = 0.5 if self.symmetric else 1.0
        # Of the last sweep: by how much the columns' best answers differ from the potentials, and what of it is a
        # constant that the rows' potentials make up for.
        self.residual: Vector = None
        self.constant: Vector = 0.0
        self.damping: Vector = None
        if soft:
            shares = [[damping(epsilon, rho)] for epsilon, rho in zip(self.epsilons, self.rhos, strict=True)]
            self.damping = as_vector(self.a.new_tensor(shares))
            # Epsilon in units of rho.
            self.softness = 1 / self.damping - 1

    def steep(self) -> list[int]:
        """Return the problems for which zero potentials are no good start."""
        return list(range(len(self.problems)))

    def warmer(self) -> Iterator["Kernel"]:
        """Yield kernels of the same problems at larger epsilons, each a quarter of the last, in the same memory."""
        return iter(())

    @abstractmethod
    def coarsened(self, problems: Sequence[Problem]) -> AbstractContextManager["Kernel"]:
        """Lend a kernel of fewer points at the same epsilons."""

    def __getitem__(self, part: slice) -> "Kernel":
        """Return some of the problems."""
        return self

    def exponents_fit(self, least: float, most: float) -> bool:
        """Return whether each problem's largest cost is between so many epsilons, or 0.

        Below, exponentials are all nearly 1, and their differences rounded away; above, exponents are rounded to more
        than a small part of 1.
        """
        sizes = zip(self.largest, self.epsilons, strict=True)
        return all(size == 0 or least * epsilon <= size <= most * epsilon for size, epsilon in sizes)

    @property
    def regularization(self) -> float:
        """The share of the diagonal by which an extrapolation's least squares are made regular."""
        return REGULARIZATIONS[self.dtype]

    def too_large(self, i: int) -> FloatingPointError:
        """Return the error for a problem whose exponents its floating-point format does not bear."""
        return FloatingPointError(
            f"the costs are too large for epsilon = {self.epsilons[i]:.3g} in {self.dtype}: use a larger epsilon, or "
            "float64; if a network made the samples, lower its learning rate"
        )

    def begin(self, F: Tensor, G: Tensor) -> Vector:
        """Prepare for potentials; return the columns' ones to start from."""
        return as_vector(G)

    def restart(self, i: int, G: Tensor) -> Vector:
        """Prepare a problem anew for a potential that may be far off; return the one to go on from."""
        return as_vector(G)

    def center(self, G: Vector) -> Vector:
        """Prepare for potentials that may be far from the last ones; return them."""
        return G

    @abstractmethod
    def sweep(self, G: Vector) -> tuple[Vector, Vector]:
        """Answer ``(B, m)`` potentials; keep the rows' answers.

        Returns:
            ``(B, m)`` differences of the columns' best answers from ``G``, and the B marginal errors; not finite where
            the floating-point format does not bear ``G``.
        """

    def balanced(self, F: Vector, G: Vector) -> Vector:
        r"""Return by how much soft marginals let all of ``F`` rise and all of ``G`` fall.

        What soft marginals leave undecided longest is a constant between the two sides; the dual value is greatest in
        it where both plans' masses agree (Séjourné et al. 2022, "Faster unbalanced optimal transport: translation
        invariant Sinkhorn and 1-D Frank-Wolfe", proposition 1):
        :math:`\lambda = \tfrac{\rho}{2 \varepsilon} \log (\sum_i a_i e^{-\varepsilon F_i / \rho}
        / \sum_j b_j e^{-\varepsilon G_j / \rho})`.
        """
        rows = (self.a_vector * self.numerics.exp(-self.softness * F)).sum(1)
        columns = (self.b_vector * self.numerics.exp(-self.softness * G)).sum(1)
        return self.numerics.log(rows / columns)[:, None] / (2 * self.softness)

    def sweeps(self, G: Tensor, count: int) -> Tensor:
        """Return ``(B, m)`` potentials of the columns after so many sweeps, on a device, of which nothing is kept."""
        for _ in range(count):
            residual, _ = self.sweep(G)
            G = G + self.relaxation * residual
        return G

    @property
    @abstractmethod
    def row_potentials(self) -> Vector:
        """The ``(B, n)`` potentials of the rows after the last sweep."""

    def settle(self, G_next: Vector, which: Iterable[int] | None = None) -> None:  # noqa: B027
        """Absorb potentials, after a sweep that was finite: of the named problems, or of those that have drifted."""

    def drift(self, G: Vector) -> Vector:
        """Return ``(B, 1)`` distances of potentials from the absorbed ones."""
        return 0 * G[:, :1]

    @abstractmethod
    def plan_factors(self, i: int) -> Iterator[PlanFactors]:
        """Yield the last sweep's plan of a problem, block by block."""

    def _excess(self, residual: Vector) -> Vector:
        """Return by what share columns are too heavy; of soft ones, which may be so beyond any number, at most e^50."""
        return self.numerics.expm1(-residual if self.damping is None else (-residual).clip(None, 50.0))

    def column_factors(self, i: int) -> Tensor:
        """Return by what the columns of a problem's last plan are to be multiplied so that their sums are right."""
        return as_tensor(self.residual)[i].exp()

    def gradients(self, i: int, need: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of what the last plan of a problem pays, where needed; then its mass is known."""
        p, plan = self.problems[i], self.plan_factors(i)
        if any(need):
            return p.cost.geometry.plan_gradients(p.x, p.y, plan, need)
        for _ in plan:
            pass
        return None, None

    def soft_minimum(self, x: Tensor, y: Tensor, b: Tensor, G: Tensor, cost: Cost) -> Tensor:
        r"""Return :math:`-\log \sum_j b_j e^{G_j - c(x_i, y_j)/\varepsilon}` for other samples than the kernel's."""
        return soft_minimum(x, y, b, G, cost, self.epsilons[0])

    @abstractmethod
    def mass(self, i: int) -> Tensor:
        """Return the mass of a problem's plan, once its factors were yielded."""
