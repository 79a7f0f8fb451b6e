"""Sinkhorn updates by blocks of rows, in bounded memory."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor

from lightning_gap.monge.ot.costs import PlanFactors
from lightning_gap.monge.ot.limits import LIMITS
from lightning_gap.monge.ot.problem import Problem
from lightning_gap.monge.ot.solvers.blocks import block_rows, exponentiate, soft_minimum
from lightning_gap.monge.ot.solvers.dense import DenseKernel
from lightning_gap.monge.ot.solvers.kernel import Kernel, damping
from lightning_gap.monge.ot.solvers.memory import blas_threads
from lightning_gap.monge.ot.solvers.sizes import range_of_costs, size_and_epsilon
from lightning_gap.monge.ot.solvers.vectors import Vector, as_tensor, as_vector

__all__ = ["BlockedKernel"]


class BlockedKernel(Kernel):
    """A kernel of one problem that is formed block by block, in ``O(block * m)`` memory.

    It never holds the matrix: it forms a block of rows at a time, in cache, and gets both updates from one pass,
    because a row's :math:`F_i` depends on that row alone.
    """

    def __init__(self, problems: Sequence[Problem], epsilons: Sequence[float], largest: Sequence[float]) -> None:
        super().__init__(problems, epsilons, largest)
        (p,) = problems
        self.x, self.y, self.cost, self.epsilon = p.x, p.y, p.cost, self.epsilons[0]
        self.share = damping(self.epsilon, p.rho)

    @classmethod
    @contextmanager
    def of(cls, problems: Sequence[Problem]) -> Iterator["BlockedKernel"]:
        """Lend the kernel of a problem."""
        (p,) = problems
        least, most = range_of_costs(p)
        largest, epsilon = size_and_epsilon(p, least, most)
        yield cls(problems, [epsilon], [largest])

    def coarsened(self, problems: Sequence[Problem]) -> AbstractContextManager[Kernel]:
        """Lend a kernel of fewer points, in memory where it fits."""
        (p,) = problems
        if len(p.x) * len(p.y) <= LIMITS.dense.on(p.x.device):
            return DenseKernel.at(problems, self)
        return nullcontext(BlockedKernel(problems, self.epsilons, self.largest))

    def sweep(self, G: Vector) -> tuple[Vector, Vector]:
        """One pass of exponentials for both updates."""
        self.G = as_tensor(G)[0]
        self._F, answer = self._answers()
        if self.damping is not None and not self.symmetric:
            answer = answer - as_tensor(self.balanced(as_vector(self._F)[None], as_vector(answer)[None]))[0]
        self.residual = residual = as_vector(answer - self.G)[None]
        if self.symmetric:
            self._F = self.G
        return residual, (self.b_vector * abs(self._excess(residual))).sum(1)

    def _answers(self) -> tuple[Tensor, Tensor]:
        """Return the answers of rows and columns: a block's columns are summed as soon as its rows are known."""
        columns = torch.zeros_like(self.G)
        answers = torch.empty_like(self.a[0])

        def visit(rows: slice, F: Tensor, top: Tensor, sums: Tensor, block: Tensor, columns: Tensor) -> None:
            answers[rows] = F
            if not self.symmetric:
                weights = (F + top).exp_().mul_(self.a[0, rows]).to(block.dtype)
                columns += as_tensor(as_vector(weights) @ as_vector(block))

        for part in self._visit_blocks(visit):
            columns += part
        if self.symmetric:
            return answers, answers
        if float(columns.min()) > 0:
            return answers, (self.G - columns.log()).mul_(self.share)
        # A column that no row reaches within the format's range: answer it through its own soft minimum.
        answer = soft_minimum(self.y, self.x, self.a[0], answers, self.cost.transposed(), self.epsilon)
        return answers, answer.mul_(self.share)

    @property
    def row_potentials(self) -> Vector:
        """The rows' answers."""
        return as_vector(self._F)[None]

    def _blocks(self, rows_of: range) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
        """Yield rows, their answer ``F``, and their part of the kernel: its logarithmic scale, row sums, and values."""
        m, fill = len(self.y), self.cost.geometry.exponents(self.y, self.G, self.epsilon)
        height = block_rows(self.x, m)
        buffer, b = self.x.new_empty(min(len(rows_of), height), m), as_vector(self.b[0].to(self.dtype))
        for start in range(rows_of.start, rows_of.stop, height):
            rows = slice(start, min(rows_of.stop, start + height))
            block = fill(buffer[: rows.stop - start], self.x[rows])
            exponents = as_vector(block)
            highest = self.numerics.amax(exponents, 1)
            exponents -= highest[:, None]
            exponentiate(block, at_most=0)
            top, sums = as_tensor(highest).to(self.b.dtype), as_tensor(as_vector(block) @ b).to(self.b.dtype)
            yield rows, (top + sums.log()).mul_(-self.share), top, sums, block

    def _visit_blocks(self, visit: Callable[..., None]) -> list[Tensor]:
        """Visit all blocks; return what each worker summed over the columns."""
        n = len(self.x)
        workers = (
            min(torch.get_num_threads(), n)
            if self.cost.geometry.by_matrix_product and self.x.device.type == "cpu"
            else 1
        )

        def work(number: int) -> Tensor:
            columns = torch.zeros_like(self.G)
            with np.errstate(all="ignore"), torch.no_grad():
                for block in self._blocks(range(number * n // workers, (number + 1) * n // workers)):
                    visit(*block, columns)
            return columns

        if workers == 1:
            return [work(0)]
        with ThreadPoolExecutor(workers) as pool, blas_threads(1):
            return list(pool.map(work, range(workers)))

    def plan_factors(self, i: int) -> Iterator[PlanFactors]:
        """Block after block, formed once more."""
        self._mass = self.a.new_zeros(())
        F = self._F
        for rows, _, top, sums, block in self._blocks(range(len(self.x))):
            w = (F[rows] + top).exp_().mul_(self.a[0, rows])
            self._mass += torch.dot(w, sums)
            yield PlanFactors(rows, w.to(self.dtype), block, self.b[0].to(self.dtype), None)

    def mass(self, i: int) -> Tensor:
        """Return the mass of the plan that was yielded."""
        return self._mass
