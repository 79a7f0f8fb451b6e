r"""Sinkhorn updates, as operators on potentials.

A sweep takes the columns' potential :math:`G`, finds the rows' best :math:`F`, and returns the columns' best answer to
it. All potentials here are in units of :math:`\varepsilon`, and the plan is
:math:`P_{ij} = a_i b_j e^{F_i + G_j - C_{ij}/\varepsilon}`.

* :class:`DenseKernel` keeps :math:`K = e^{F_0 \oplus G_0 - C/\varepsilon}`, formed once around absorbed potentials
  (Schmitzer 2019, "Stabilized sparse scaling algorithms"): a sweep is two matrix-vector products instead of
  :math:`2 n^2` exponentials.
* :class:`BlockedKernel` never holds the matrix: it forms a block of rows at a time, in cache, and gets both updates
  from one pass, because a row's :math:`F_i` depends on that row alone.
* :class:`SymmetricKernel` is for a measure against itself, where both potentials agree.

Potentials are NumPy arrays on a CPU and tensors elsewhere: an operation on a short vector costs NumPy a quarter of what
it costs torch, and a product with a vector up to a third, where torch's MKL does not know the processor. Both take the
same arithmetic. Passes over whole matrices are torch's.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from threading import local
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_gap.monge.costs import Cost

__all__ = [
    "BlockedKernel",
    "DenseKernel",
    "Kernel",
    "PlanFactors",
    "SymmetricKernel",
    "Vector",
    "as_tensor",
    "as_vector",
    "buffers",
    "damping",
    "row_blocks",
    "soft_minimum",
]

# Smaller exponents add nothing to a sum, but make subnormal numbers, on which a CPU is slow.
_LOWEST_EXPONENT = -70.0
# How far potentials may drift from the absorbed ones before the kernel is formed anew.
_DRIFT = 30.0
# Numbers in a block of rows: it should stay in a CPU's cache, and fill a GPU.
_BLOCK = 1 << 20
_GPU_BLOCK = 1 << 26
# Memory kept from one call to the next, for each thread: fresh pages cost more than the work on them.
_KEPT_BYTES = 1 << 28


class _Pool(local):
    def __init__(self) -> None:
        self.free: list[Tensor] = []


_POOL = _Pool()


@contextmanager
def buffers(count: int, n: int, m: int, like: Tensor) -> Iterator[list[Tensor]]:
    """Lend ``count`` uninitialized ``(n, m)`` matrices; on a CPU from memory that this thread used before.

    Args:
        count: How many.
        n: Rows.
        m: Columns.
        like: Gives dtype and device.
    """
    pool = _POOL.free if like.device.type == "cpu" else []
    taken = []
    for _ in range(count):
        fitting = [t for t in pool if t.dtype == like.dtype and t.numel() >= n * m]
        if fitting:
            flat = min(fitting, key=Tensor.numel)
            pool[:] = [t for t in pool if t is not flat]
        else:
            # Outside of inference mode, or training could not write to it later.
            with torch.inference_mode(False):
                flat = torch.empty(n * m, dtype=like.dtype, device=like.device)
        taken.append(flat)
    try:
        yield [flat[: n * m].view(n, m) for flat in taken]
    finally:
        for flat in taken:
            if sum(t.nbytes for t in pool) + flat.nbytes > _KEPT_BYTES:
                pool.clear()
            if flat.nbytes <= _KEPT_BYTES // 2:
                pool.append(flat)


def block_rows(like: Tensor, m: int) -> int:
    """Return how many rows a block of ``m`` columns has."""
    return max(1, (_BLOCK if like.device.type == "cpu" else _GPU_BLOCK) // m)


def row_blocks(x: Tensor, m: int) -> Iterator[slice]:
    """Yield slices of the rows of ``x``, in blocks of ``m`` columns."""
    n, rows = len(x), block_rows(x, m)
    for start in range(0, n, rows):
        yield slice(start, min(n, start + rows))


def soft_minimum(x: Tensor, y: Tensor, b: Tensor, G: Tensor, cost: Cost, epsilon: float) -> Tensor:
    r"""Return :math:`-\log \sum_j b_j e^{G_j - c(x_i, y_j)/\varepsilon}` for each row, in blocks.

    Args:
        x: ``(n, d)`` samples.
        y: ``(m, d)`` samples.
        b: ``(m,)`` weights.
        G: ``(m,)`` potential, in units of epsilon.
        cost: The ground cost.
        epsilon: Regularization, in units of the cost.
    """
    F = x.new_empty(len(x))
    offset = G + b.log()
    fill, buffer = cost.filler(y), x.new_empty(min(len(x), block_rows(x, len(y))), len(y))
    for rows in row_blocks(x, len(y)):
        block = fill(buffer[: rows.stop - rows.start], x[rows])
        torch.sub(offset, block, alpha=1 / epsilon, out=block)
        top = block.amax(dim=1)
        F[rows] = -top - block.sub_(top[:, None]).exp_().sum(dim=1).log()
    return F


# A NumPy array on a CPU, a tensor elsewhere.
Vector = Any


def as_vector(tensor: Tensor) -> Vector:
    """Return a tensor as what this device computes vectors with, sharing memory."""
    return tensor.detach().numpy() if tensor.device.type == "cpu" else tensor


def as_tensor(vector: Vector) -> Tensor:
    """Return a vector as a tensor, sharing memory."""
    return torch.from_numpy(vector) if isinstance(vector, np.ndarray) else vector


def damping(epsilon: float, rho: float | None) -> float:
    """Return the share of an answer that soft marginals of strength ``rho`` leave of it; 1 for hard ones."""
    return 1.0 if rho is None else rho / (rho + epsilon)


class PlanFactors(NamedTuple):
    """Rows of a plan ``w[:, None] * K * v``; ``K`` and ``C`` may be overwritten.

    Attributes:
        rows: Which rows.
        w: ``(rows,)`` factors.
        K: ``(rows, m)`` matrix.
        v: ``(m,)`` factors.
        C: ``(rows, m)`` costs, where they are at hand.
    """

    rows: slice
    w: Tensor
    K: Tensor
    v: Tensor
    C: Tensor | None


class Kernel(ABC):
    """What the fixed-point iteration needs: see the module's text.

    Args:
        a: ``(n,)`` weights of the rows.
        b: ``(m,)`` weights of the columns.
        epsilon: Regularization, in units of the cost.
        rho: Strength of soft marginals, in units of the cost; ``None`` for hard ones.
    """

    F: Vector
    # Share of the way to the columns' best answer that is taken.
    relaxation = 1.0

    def __init__(self, a: Tensor, b: Tensor, epsilon: float, rho: float | None) -> None:
        self.a, self.b = a, b
        self.a_vector, self.b_vector = as_vector(a), as_vector(b)
        self.numerics: Any = np if isinstance(self.a_vector, np.ndarray) else torch
        self.epsilon, self.rho = epsilon, rho
        self.damping = damping(epsilon, rho)
        self.mass = math.nan

    def begin(self, F: Tensor | None, G: Tensor | None) -> Vector:
        """Prepare for potentials; return the columns' one to start from.

        Args:
            F: ``(n,)`` potential that answers ``G``, or ``None`` where ``G`` may be far off.
            G: ``(m,)`` potential; ``None`` for zeros on both sides.
        """
        return as_vector(torch.zeros_like(self.b) if G is None else G)

    @abstractmethod
    def sweep(self, G: Vector) -> Vector:
        """Set ``F`` and return the columns' answer; not finite where the floating-point format does not bear ``G``."""

    def settle(self, G_next: Vector) -> None:  # noqa: B027
        """Absorb potentials that have drifted, after a sweep that was finite."""

    @abstractmethod
    def plan_factors(self) -> Iterator[PlanFactors]:
        """Yield the last sweep's plan, block by block."""


class DenseKernel(Kernel):
    """A kernel matrix in memory.

    Args:
        C: ``(n, m)`` costs.
        K: ``(n, m)`` buffer.
        a: See :class:`Kernel`.
        b: See :class:`Kernel`.
        epsilon: See :class:`Kernel`.
        rho: See :class:`Kernel`.
    """

    def __init__(self, C: Tensor, K: Tensor, a: Tensor, b: Tensor, epsilon: float, rho: float | None) -> None:
        super().__init__(a, b, epsilon, rho)
        self.C, self.K = C, K

    def begin(self, F: Tensor | None, G: Tensor | None) -> Vector:
        """Form the kernel; from an unknown ``G`` by hard c-transforms, so that no row or column is without a 1."""
        if G is None:
            torch.mul(self.C, -1 / self.epsilon, out=self.K)
            F, G = torch.zeros_like(self.a), torch.zeros_like(self.b)
        else:
            if F is None:
                torch.mul(self.C, 1 / self.epsilon, out=self.K)
                F = self.K.sub_(G).amin(dim=1)
                G = G + self.K.sub_(F[:, None]).amin(dim=0)
            torch.sub(G, self.C, alpha=1 / self.epsilon, out=self.K).add_(F[:, None])
        self.K.clamp_min_(_LOWEST_EXPONENT).exp_()
        self.F0, self.G0 = as_vector(F), as_vector(G)
        self.matrix = as_vector(self.K)
        return self.G0

    def rows(self, G: Vector) -> Vector:
        """Return the rows' answer to ``G``: one matrix-vector product."""
        self.v = self.numerics.exp(G - self.G0) * self.b_vector
        self.s = self.matrix @ self.v
        F = self.F0 - self.numerics.log(self.s)
        return F if self.damping == 1 else F * self.damping

    def sweep(self, G: Vector) -> Vector:
        """Two matrix-vector products."""
        self.F = self.rows(G)
        if self.damping == 1:
            self.w = self.a_vector / self.s
        else:
            self.w = self.a_vector * self.numerics.exp(self.F - self.F0)
        answer = self.G0 - self.numerics.log(self.w @ self.matrix)
        return answer if self.damping == 1 else answer * self.damping

    def settle(self, G_next: Vector) -> None:
        """Form the kernel anew where the last sweep ended far from it."""
        if not abs(G_next - self.G0).max() < _DRIFT:
            self.begin(as_tensor(self.F), as_tensor(G_next))

    def plan_factors(self) -> Iterator[PlanFactors]:
        """One block."""
        self.mass = float(self.w @ self.s)
        yield PlanFactors(slice(0, len(self.w)), as_tensor(self.w), self.K, as_tensor(self.v), self.C)


class BlockedKernel(Kernel):
    """A kernel that is formed block by block, in ``O(block * m)`` memory.

    Args:
        x: ``(n, d)`` samples.
        y: ``(m, d)`` samples.
        cost: The ground cost.
        a: See :class:`Kernel`.
        b: See :class:`Kernel`.
        epsilon: See :class:`Kernel`.
        rho: See :class:`Kernel`.
    """

    def __init__(
        self, x: Tensor, y: Tensor, cost: Cost, a: Tensor, b: Tensor, epsilon: float, rho: float | None
    ) -> None:
        super().__init__(a, b, epsilon, rho)
        self.x, self.y, self.cost = x, y, cost
        self.fill = cost.filler(y)

    def rows(self, G: Vector) -> Vector:
        """Return the rows' answer to ``G``: one pass of exponentials."""
        return as_vector(torch.cat([F for _, F, _, _, _ in self._blocks(as_tensor(G))]))

    def sweep(self, G: Vector) -> Vector:
        """One pass of exponentials for both updates: a block's columns are summed as soon as its rows are known."""
        self.G = G
        columns = torch.zeros_like(self.b, dtype=torch.float64)
        parts = []
        for rows, F, top, _, block in self._blocks(as_tensor(G)):
            parts.append(F)
            columns += as_tensor(as_vector((F + top).exp_().mul_(self.a[rows])) @ as_vector(block))
        F = torch.cat(parts)
        self.F = as_vector(F)
        if float(columns.min()) > 0:
            answer = (as_tensor(G).double() - columns.log()).to(F.dtype)
        else:
            # A column that no row reaches within the format's range: answer it through its own soft minimum.
            answer = soft_minimum(self.y, self.x, self.a, F, self.cost.transposed(), self.epsilon)
        return as_vector(answer if self.damping == 1 else answer.mul_(self.damping))

    def _blocks(self, G: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
        """Yield rows, their answer ``F``, and their part of the kernel: its logarithmic scale, row sums, and values."""
        buffer = self.x.new_empty(min(len(self.x), block_rows(self.x, len(self.y))), len(self.y))
        for rows in row_blocks(self.x, len(self.y)):
            block = self.fill(buffer[: rows.stop - rows.start], self.x[rows])
            torch.sub(G, block, alpha=1 / self.epsilon, out=block)
            top = block.amax(dim=1)
            block.sub_(top[:, None]).clamp_min_(_LOWEST_EXPONENT).exp_()
            sums = as_tensor(as_vector(block) @ self.b_vector)
            yield rows, (top + sums.log()).mul_(-self.damping), top, sums, block

    def plan_factors(self) -> Iterator[PlanFactors]:
        """Block after block, formed once more."""
        self.mass = 0.0
        F = as_tensor(self.F)
        for rows, _, top, sums, block in self._blocks(as_tensor(self.G)):
            w = (F[rows] + top).exp_().mul_(self.a[rows])
            self.mass += float(torch.dot(w, sums))
            yield PlanFactors(rows, w, block, self.b, None)


class SymmetricKernel(Kernel):
    r"""A measure against itself: the averaged fixed point :math:`F \leftarrow \tfrac12 (F + T F)`.

    It converges in a few sweeps of one update each (Feydy et al. 2019, section 3.2).

    Args:
        kernel: The kernel of the measure against itself; :class:`DenseKernel` or :class:`BlockedKernel`.
    """

    relaxation = 0.5

    def __init__(self, kernel: DenseKernel | BlockedKernel) -> None:
        super().__init__(kernel.a, kernel.a, kernel.epsilon, kernel.rho)
        self.kernel = kernel

    def begin(self, F: Tensor | None, G: Tensor | None) -> Vector:
        """Form the kernel around one potential for both sides."""
        return self.kernel.begin(G, G)

    def sweep(self, G: Vector) -> Vector:
        """One update."""
        self.F = G
        return self.kernel.rows(G)

    def plan_factors(self) -> Iterator[PlanFactors]:
        """The plan that has the same potential on both sides."""
        kernel = self.kernel
        if isinstance(kernel, DenseKernel):
            kernel.w = kernel.v
        else:
            kernel.F = kernel.G = self.F
        yield from kernel.plan_factors()
        self.mass = kernel.mass
