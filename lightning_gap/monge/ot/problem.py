"""A transport problem, as solvers take it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_gap.monge.ot.checks import check_pair, check_transforms, check_weights, solver_precision
from lightning_gap.monge.ot.compiling import eager
from lightning_gap.monge.ot.costs import Cost, CostLike, resolve
from lightning_gap.monge.ot.epsilon import Epsilon, Weighted
from lightning_gap.monge.ot.subsets import weighing

__all__ = ["Problem", "checked_problem"]


@dataclass(frozen=True)
class Problem:
    """Samples, weights, cost and regularization that have been checked.

    Attributes:
        x: ``(n, d)`` samples, of weights ``a``.
        y: ``(m, d)`` samples, of weights ``b``; ``x`` itself, with ``b`` being ``a``, for a measure against itself.
        rho: Strength of soft marginals, in units of the cost; ``None`` for hard ones.
        uniform: Whether no weights were given, so that none is 0.
    """

    x: Tensor
    y: Tensor
    a: Tensor
    b: Tensor
    cost: Cost
    epsilon: Epsilon
    rho: float | None = None
    uniform: bool = False

    @property
    def to_itself(self) -> bool:
        """Whether both potentials agree."""
        return self._one_measure and self.cost.symmetric

    @property
    def _one_measure(self) -> bool:
        return self.x is self.y and self.a is self.b

    def resolved_epsilon(self, largest: float, mean: float | None = None) -> float:
        """Return the epsilon that is given or that a relative one means; from the mean cost where it is known."""
        if self.epsilon.absolute is None and largest == 0:
            # All is where it should be, whatever epsilon is; the share of no cost is nearly none.
            return 4 * torch.finfo(self.x.dtype).tiny
        scale = mean if self.epsilon.of == "mean" else None
        return self.epsilon.resolve(self.cost, (Weighted(self.x, self.a), Weighted(self.y, self.b)), scale=scale)

    def detached(self) -> "Problem":
        """Return the same problem without a graph."""
        return self._with_both(lambda points, weights: (points.detach(), weights.detach()))

    def to(self, dtype: torch.dtype) -> "Problem":
        """Return the same problem in another precision, differentiably."""
        return self._with_both(lambda points, weights: (points.to(dtype), weights.to(dtype)))

    def counted(self) -> "Problem":
        """Return the problem without its samples of weight 0, itself where there are none."""
        if self.uniform or (rows := weighing(*((self.a,) if self._one_measure else (self.a, self.b)))) is None:
            return self
        every = iter(rows)
        return self._with_both(lambda points, weights: (points[some := next(every)], weights[some]))

    def _with_both(self, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> "Problem":
        x, a = change(self.x, self.a)
        y, b = (x, a) if self._one_measure else change(self.y, self.b)
        return replace(self, x=x, y=y, a=a, b=b)


@eager
def checked_problem(
    x: Tensor,
    y: Tensor,
    weights: Sequence[Tensor | None],
    *,
    cost: CostLike,
    epsilon: Epsilon,
    rho: float | None = None,
    paired: bool = False,
    one_weights: bool = False,
    check: bool = True,
) -> Problem:
    """Return a problem of what a public function was given, once that has been checked.

    Samples that are ``paired`` row by row, as points and images are, share the one tensor of weights that is given;
    ``one_weights`` says that both sets have the same. ``check`` unless that has been done: a device is waited for.
    """
    y_name, a_name = ("mapped", "weights") if paired else ("y", "weights[0]")
    cost = resolve(cost)
    check_transforms(x, y, *weights)
    if check:
        check_pair("x", x, y_name, y, same_length=paired)
        cost.check_domain("x", x)
        if y is not x:
            cost.check_domain(y_name, y)
    x, y = (solver_precision(x),) * 2 if y is x else (solver_precision(x), solver_precision(y))
    how = {"balanced": rho is None, "check": check}
    a = check_weights(a_name, weights[0], x, **how)
    b = a if paired or one_weights else check_weights("weights[1]", weights[1], y, **how)
    return Problem(x, y, a, b, cost, epsilon, rho, uniform=all(w is None for w in weights))
