"""Sinkhorn updates whose costs, exponentials and sums are compiled passes, without a matrix."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property

import torch
from torch import Tensor

from lightning_gap.monge.ot.costs import Cost
from lightning_gap.monge.ot.limits import LIMITS
from lightning_gap.monge.ot.problem import Problem
from lightning_gap.monge.ot.solvers.blocked import BlockedKernel
from lightning_gap.monge.ot.solvers.dense import DenseKernel
from lightning_gap.monge.ot.solvers.fused.flash_passes import FlashPasses
from lightning_gap.monge.ot.solvers.fused.pairs import PairPasses
from lightning_gap.monge.ot.solvers.fused.passes import Passes
from lightning_gap.monge.ot.solvers.fused.triton_passes import TritonPasses
from lightning_gap.monge.ot.solvers.kernel import Kernel
from lightning_gap.monge.ot.solvers.vectors import as_tensor

__all__ = ["FlashKernel", "FusedKernel", "passes_on"]

# An exponent is to be right to this in float32, which is all that FlashSinkhorn knows.
_FLASH_ERROR = 1e-3


def passes_on(device: torch.device) -> type[PairPasses]:
    """Return what takes the passes on a device."""
    return Passes if device.type == "cpu" else TritonPasses


class FusedKernel(BlockedKernel):
    """A kernel of one problem, for a cost that has a formula; in ``O(n + m)`` memory."""

    def __init__(self, problems: Sequence[Problem], epsilons: Sequence[float], largest: Sequence[float]) -> None:
        super().__init__(problems, epsilons, largest)
        self.passes = self._passes()(self.x, self.y, self.cost, self.epsilon, self.largest[0])

    def _passes(self) -> type[PairPasses]:
        return passes_on(self.x.device)

    @classmethod
    @contextmanager
    def of(cls, problems: Sequence[Problem]) -> Iterator[BlockedKernel]:
        """Lend the kernel of a problem; blocks where the formula does not give its costs."""
        with super().of(problems) as kernel:
            assert isinstance(kernel, FusedKernel)
            if kernel.passes.are_right():
                yield kernel
                return
            warnings.warn(
                f"the formula of the cost {kernel.cost} does not give its values for these samples, whose powers may "
                "leave the floating-point format: solver='blocked' is run instead. Divide the samples by their scale",
                RuntimeWarning,
                stacklevel=2,
            )
            yield BlockedKernel(problems, kernel.epsilons, kernel.largest)

    @cached_property
    def transposed(self) -> PairPasses:
        """The passes for the columns' answers."""
        return self.passes.transposed()

    def coarsened(self, problems: Sequence[Problem]) -> AbstractContextManager[Kernel]:
        """Lend a kernel of fewer points, in memory where it fits."""
        (p,) = problems
        if len(p.x) * len(p.y) <= LIMITS.dense.on(p.x.device):
            return DenseKernel.at(problems, self)
        return nullcontext(type(self)(problems, self.epsilons, self.largest))

    def soft_minimum(self, x: Tensor, y: Tensor, b: Tensor, G: Tensor, cost: Cost) -> Tensor:
        """Return the soft minima of other samples, at the same epsilon."""
        return self.passes.of(x, y, cost).soft_minimum(G, b.to(G.dtype))[0]

    def _answers(self) -> tuple[Tensor, Tensor]:
        """One pass for both updates, so that rounding is the same for both; two where a pass answers one side."""
        weights = self.a[0] if self.passes.sums_columns and not self.symmetric else None
        F, columns = self.passes.soft_minimum(self.G, self.b[0], share=self.share, weights=weights)
        if self.symmetric:
            return F, F
        if columns is None:
            return F, self._conserving(self.transposed.soft_minimum(F, self.a[0], share=self.share)[0])
        if float(columns.min()) > 0:
            return F, (self.G - columns.log()).mul_(self.share)
        # A column that no row reaches within the format's range: answer it through its own soft minimum.
        return F, self.transposed.soft_minimum(F, self.a[0], share=self.share)[0]

    def _conserving(self, answer: Tensor) -> Tensor:
        """Return the columns' answers, less what the two passes' rounding makes of the plan's mass."""
        if self.damping is not None:
            return answer
        # The rows are exact, and so is the mass, by which hard marginals would let the potentials drift.
        return answer + (self.b[0] * (self.G - answer).exp()).sum().log()

    def gradients(self, i: int, need: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of what the last sweep's plan pays, by a pass for each side."""
        F, G, a, b = as_tensor(self._F), self.G, self.a[0], self.b[0]
        gx = gy = None
        if need[0] or not any(need):
            gx, masses = self.passes.pulls(F, a, G, b)
        if need[1]:
            gy, masses = self.transposed.pulls(G, b, F, a)
        self._mass = masses.sum()
        return gx if need[0] else None, gy


class FlashKernel(FusedKernel):
    """A fused kernel on CUDA whose soft minima of squared distances are FlashSinkhorn's, in float32."""

    def __init__(self, problems: Sequence[Problem], epsilons: Sequence[float], largest: Sequence[float]) -> None:
        size, epsilon = largest[0], epsilons[0]
        if torch.finfo(torch.float32).eps * size > _FLASH_ERROR * epsilon or problems[0].x.dtype != torch.float32:
            raise ValueError(
                f"solver='flash' computes in float32, which does not resolve costs of {size / epsilon:.2g} epsilons: "
                "use another epsilon, or solver='fused'"
            )
        super().__init__(problems, epsilons, largest)

    def _passes(self) -> type[PairPasses]:
        return FlashPasses
