"""A solved transport problem."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_gap.monge.ot.problem import Problem
from lightning_gap.monge.ot.solvers.blocks import exponentiate, row_blocks
from lightning_gap.precision import full_precision

__all__ = ["ConvergenceWarning", "OTResult"]


class ConvergenceWarning(UserWarning):
    """A solver stopped before it reached its tolerance."""


@dataclass(frozen=True)
class OTResult:
    r"""A solved transport problem.

    Attributes:
        value: :math:`OT_\varepsilon`, a scalar that is differentiable in samples and weights.
        f: ``(n,)`` potential of the source, detached; ``None`` for an exact assignment.
        g: ``(m,)`` potential of the target, detached; ``None`` for an exact assignment.
        epsilon: The absolute regularization, 0 for exact transport.
        marginal_error: L1 distance of the plan's marginals from the weights; NaN with ``"online"`` and
            ``"multiscale"``, where finding out would cost as much as the solve.
        iterations: Sweeps over the full problem; 0 for solvers that do not count.
        converged: Whether the tolerance was reached, or the marginal error is not known.
        solver: The solver that was chosen.
        problem: What was solved, detached.
        entries: Rows, columns and masses of an exact plan.
        duality_gap: What an exact plan costs beyond the bound that its dual potentials prove over all pairs, which is
            rounding if it converged; ``None`` where the matrix was solved, by SciPy or POT.
    """

    value: Tensor
    f: Tensor | None
    g: Tensor | None
    epsilon: float
    marginal_error: float = 0.0
    iterations: int = 0
    converged: bool = True
    solver: str = field(kw_only=True)
    problem: Problem = field(kw_only=True, repr=False)
    entries: tuple[Tensor, Tensor, Tensor] | None = field(default=None, repr=False)
    duality_gap: float | None = None

    def plan(self) -> Tensor:
        """Return the plan as an ``(n, m)`` matrix, detached."""
        p = self.problem
        plan = p.x.new_zeros(len(p.x), len(p.y))
        for rows, block in self.plan_blocks():
            plan[rows] = block
        return plan

    def apply(self, values: Tensor) -> Tensor:
        """Return ``plan() @ values`` without ever holding the plan.

        Args:
            values: ``(m, k)`` values on the target samples.

        Returns:
            ``(n, k)`` sums on the source samples, detached.
        """
        with full_precision(values.device):
            return torch.cat([block @ values.detach() for _, block in self.plan_blocks()])

    def barycentric_projection(self) -> Tensor:
        """Return where each source sample is sent on average: ``(n, d)``, detached.

        A sample of weight 0 is sent where it would be with a small one. Where an exact plan has no mass, that is the
        sample itself.
        """
        p = self.problem
        y = torch.cat([torch.ones_like(p.y[:, :1]), p.y], dim=1).detach()
        with full_precision(y.device):
            images = torch.cat([block @ y for _, block in self.plan_blocks(conditional=True)])
        return torch.where(images[:, :1] > 0, images[:, 1:] / images[:, :1], p.x)

    def transport_cost(self) -> Tensor:
        r"""Return :math:`\langle P, C \rangle`, the cost without the entropy, detached."""
        p = self.problem
        with torch.no_grad():
            # A forbidden pair has no mass, and infinitely much of it costs nothing.
            parts = [
                torch.where(block > 0, block * p.cost.pairwise(p.x[rows], p.y), 0).sum()
                for rows, block in self.plan_blocks()
            ]
        return torch.stack(parts).sum()

    def of(self, problem: Problem) -> "OTResult":
        """Return what was solved in double as the result of the given problem."""
        f, g = (None if potential is None else potential.to(problem.x.dtype) for potential in (self.f, self.g))
        return replace(self, f=f, g=g, problem=problem)

    @torch.no_grad()
    def plan_blocks(self, *, conditional: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows of the plan, block by block.

        Args:
            conditional: Give each row up to a factor, which also a row of weight 0 has.
        """
        p = self.problem
        for rows in row_blocks(p.x, len(p.y)):
            block = p.x.new_zeros(rows.stop - rows.start, len(p.y))
            if self.entries is not None:
                i, j, mass = self.entries
                here = (i >= rows.start) & (i < rows.stop)
                block[i[here] - rows.start, j[here]] = mass[here]
            else:
                assert self.f is not None
                assert self.g is not None
                p.cost.geometry.fill(block, p.x[rows], p.y)
                block.sub_(self.f[rows, None]).sub_(self.g).mul_(-1 / self.epsilon)
                if conditional:
                    block.sub_(torch.where(p.b > 0, block, -torch.inf).amax(1, keepdim=True))
                exponentiate(block)
                block.mul_(p.b) if conditional else block.mul_(p.a[rows, None]).mul_(p.b)
                # What is far off and has no weight may be infinite here.
                block.masked_fill_(p.b == 0, 0)
                if not conditional:
                    block.masked_fill_(p.a[rows, None] == 0, 0)
            yield rows, block
