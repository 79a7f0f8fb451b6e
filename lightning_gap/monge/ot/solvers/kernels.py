r"""Sinkhorn updates, as operators on potentials.

A sweep takes the columns' potential :math:`G`, finds the rows' best :math:`F`, and says how far the columns' best
answer to it is. All potentials here are in units of :math:`\varepsilon`, and the plan is
:math:`P_{ij} = a_i b_j e^{F_i + G_j - C_{ij}/\varepsilon}`. A kernel holds several problems of one shape, which are
swept together: a sweep of a small problem is mostly calls.

* :class:`DenseKernel` keeps :math:`K = e^{F_0 \oplus G_0 - C/\varepsilon}`, formed once around absorbed potentials
  (Schmitzer 2019, "Stabilized sparse scaling algorithms"): a sweep is two matrix-vector products instead of
  :math:`2 n^2` exponentials.
* :class:`BlockedKernel` never holds the matrix: it forms a block of rows at a time, in cache, and gets both updates
  from one pass, because a row's :math:`F_i` depends on that row alone.

A measure against itself has one potential for both sides; its sweep is half of one.

Potentials are NumPy arrays on a CPU and tensors elsewhere: an operation on a short vector costs NumPy a quarter of what
it costs torch, and a product with a vector up to a third, where torch's MKL does not know the processor. Both take the
same arithmetic. They are in double, whatever the matrices are: they are thousands in units of a small epsilon, and a
rounding of one, in float32, would be an error of the plan.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import local
from typing import Any

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from lightning_gap.monge.ot.costs import Cost, PlanFactors
from lightning_gap.precision import widest

__all__ = [
    "BlockedKernel",
    "DenseKernel",
    "Kernel",
    "Vector",
    "as_tensor",
    "as_vector",
    "buffers",
    "damping",
    "exponentiate",
    "row_blocks",
    "soft_minimum",
    "threads",
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
# NumPy's exponential takes half the time of torch's on one thread, but knows only that one.
_FEW_THREADS, _FEW_NUMBERS = 2, 1 << 16
# A matrix up to this size takes one thread: waking others costs more than they do of so short an operation, and
# milliseconds where another process has their cores.
_ONE_THREAD_NUMBERS = 1 << 20


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


@cache
def _blas() -> list[Any]:
    """NumPy's and SciPy's BLAS, as threadpoolctl's controllers; its context costs as much as a small solve's sweep."""
    return list(ThreadpoolController().select(user_api="blas").lib_controllers)


@contextmanager
def _blas_threads(count: int) -> Iterator[None]:
    before = [library.get_num_threads() for library in _blas()]
    for library in _blas():
        library.set_num_threads(count)
    try:
        yield
    finally:
        for library, threads_before in zip(_blas(), before, strict=True):
            library.set_num_threads(threads_before)


@contextmanager
def threads(numbers: int) -> Iterator[None]:
    """Let torch and NumPy's BLAS take one thread for small matrices, and as many as torch has for large ones.

    Args:
        numbers: Size of the matrix.
    """
    before = torch.get_num_threads()
    count = 1 if numbers <= _ONE_THREAD_NUMBERS else before
    if count != before:
        torch.set_num_threads(count)
    try:
        with _blas_threads(count):
            yield
    finally:
        if count != before:
            torch.set_num_threads(before)


def block_rows(like: Tensor, m: int) -> int:
    """Return how many rows a block of ``m`` columns has."""
    return max(1, (_BLOCK if like.device.type == "cpu" else _GPU_BLOCK) // m)


def row_blocks(x: Tensor, m: int) -> Iterator[slice]:
    """Yield slices of the rows of ``x``, in blocks of ``m`` columns."""
    n, rows = len(x), block_rows(x, m)
    for start in range(0, n, rows):
        yield slice(start, min(n, start + rows))


def exponentiate(exponents: Tensor, *, at_most: float = 3e38) -> Tensor:
    """Replace exponents by their exponentials.

    Args:
        exponents: A contiguous matrix.
        at_most: A bound that is known; larger ones become infinite.
    """
    on_cpu = exponents.device.type == "cpu"
    if on_cpu and (torch.get_num_threads() <= _FEW_THREADS or exponents.numel() <= _FEW_NUMBERS):
        array = exponents.numpy()
        # Two bounds are clipped four times as fast as one.
        np.clip(array, _LOWEST_EXPONENT, at_most, out=array)
        with np.errstate(over="ignore"):
            np.exp(array, out=array)
        return exponents
    return exponents.clamp_min_(_LOWEST_EXPONENT).exp_()


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
    F, b = x.new_empty(len(x), dtype=widest(x.device)), b.to(x.dtype)
    fill, buffer = cost.exponents(y, G, epsilon), x.new_empty(min(len(x), block_rows(x, len(y))), len(y))
    for rows in row_blocks(x, len(y)):
        block = fill(buffer[: rows.stop - rows.start], x[rows])
        top = block.amax(dim=1)
        sums = exponentiate(block.sub_(top[:, None]), at_most=0) @ b
        F[rows] = -top - sums.log()
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


class Kernel(ABC):
    """B problems of one shape, as the fixed-point iteration needs them: see the module's text.

    Args:
        a: ``(B, n)`` weights of the rows.
        b: ``(B, m)`` weights of the columns.
        dtype: Of the matrices.
        epsilons: B regularizations, in units of the cost.
        rhos: B strengths of soft marginals, in units of the cost; all ``None`` for hard ones.
        largest: B largest costs, or nearly.
        symmetric: Whether these are measures against themselves.
    """

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        dtype: torch.dtype,
        epsilons: Sequence[float],
        rhos: Sequence[float | None],
        largest: Sequence[float],
        symmetric: bool,
    ) -> None:
        self.dtype, self.largest = dtype, list(largest)
        self.a, self.b = (w.to(widest(w.device)) for w in (a, b))
        if rhos[0] is None:
            # Masses that differ by a rounding of float32 would let the potentials drift.
            self.a, self.b = (w / w.sum(1, keepdim=True) for w in (self.a, self.b))
        self.a_vector, self.b_vector = as_vector(self.a), as_vector(self.b)
        self.numerics: Any = np if isinstance(self.a_vector, np.ndarray) else torch
        self.epsilons, self.rhos, self.symmetric = list(epsilons), list(rhos), symmetric
        # Share of the way to the columns' best answer that is taken: the averaged fixed point of a measure against
        # itself converges in a few sweeps (Feydy et al. 2019, section 3.2).
        self.relaxation = 0.5 if symmetric else 1.0
        # Of the last sweep: by how much the columns' best answers differ from the potentials, and what of it is a
        # constant that the rows' potentials make up for.
        self.residual: Vector = None
        self.constant: Vector = 0.0
        self.damping: Vector = None
        if rhos[0] is not None:
            shares = [[damping(epsilon, rho)] for epsilon, rho in zip(epsilons, rhos, strict=True)]
            self.damping = as_vector(self.a.new_tensor(shares))
            # Epsilon in units of rho.
            self.softness = 1 / self.damping - 1

    def __getitem__(self, part: slice) -> "Kernel":
        """Return some of the problems."""
        return self

    def exponents_fit(self, least: float, most: float) -> bool:
        """Return whether each problem's largest cost is between so many epsilons, or 0.

        Args:
            least: Below it, exponentials are all nearly 1, and their differences rounded away.
            most: Above it, exponents are rounded to more than a small part of 1.
        """
        sizes = zip(self.largest, self.epsilons, strict=True)
        return all(size == 0 or least * epsilon <= size <= most * epsilon for size, epsilon in sizes)

    def begin(self, F: Tensor, G: Tensor) -> Vector:
        """Prepare for potentials; return the columns' ones to start from.

        Args:
            F: ``(B, n)`` potentials that answer ``G``.
            G: ``(B, m)`` potentials.
        """
        return as_vector(G)

    def restart(self, i: int, G: Tensor) -> Vector:
        """Prepare a problem anew for a potential that may be far off; return the one to go on from.

        Args:
            i: Which problem.
            G: ``(m,)`` potential.
        """
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

        Args:
            F: ``(B, n)`` potentials of the rows.
            G: ``(B, m)`` potentials of the columns.
        """
        rows = (self.a_vector * self.numerics.exp(-self.softness * F)).sum(1)
        columns = (self.b_vector * self.numerics.exp(-self.softness * G)).sum(1)
        return self.numerics.log(rows / columns)[:, None] / (2 * self.softness)

    def sweeps(self, G: Tensor, count: int) -> Tensor:
        """Return ``(B, m)`` potentials of the columns after so many sweeps, on a device, of which nothing is kept.

        Args:
            G: ``(B, m)`` potentials of the columns.
            count: How many.
        """
        for _ in range(count):
            residual, _ = self.sweep(G)
            G = G + self.relaxation * residual
        return G

    @property
    @abstractmethod
    def row_potentials(self) -> Vector:
        """The ``(B, n)`` potentials of the rows after the last sweep."""

    def settle(self, G_next: Vector, which: Iterable[int] | None = None) -> None:  # noqa: B027
        """Absorb potentials, after a sweep that was finite.

        Args:
            G_next: ``(B, m)`` potentials.
            which: Of which problems; ``None`` for those that have drifted.
        """

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

    @abstractmethod
    def mass(self, i: int) -> Tensor:
        """Return the mass of a problem's plan, once its factors were yielded."""


class DenseKernel(Kernel):
    """Kernel matrices in memory.

    Args:
        C: ``(B, n, m)`` costs.
        K: ``(B, n, m)`` buffer.
        a: See :class:`Kernel`.
        b: See :class:`Kernel`.
        epsilons: See :class:`Kernel`.
        rhos: See :class:`Kernel`.
        largest: See :class:`Kernel`.
        symmetric: See :class:`Kernel`.
    """

    def __init__(
        self,
        C: Tensor,
        K: Tensor,
        a: Tensor,
        b: Tensor,
        epsilons: Sequence[float],
        rhos: Sequence[float | None],
        largest: Sequence[float],
        symmetric: bool = False,
    ) -> None:
        super().__init__(a, b, K.dtype, epsilons, rhos, largest, symmetric)
        self.C, self.K = C, K
        self.matrices = as_vector(K)
        self.F0, self.G0 = as_vector(torch.zeros_like(self.a)), as_vector(torch.zeros_like(self.b))
        self._a, self._b = (w.to(self.dtype)[..., None] for w in (self.a, self.b))

    def __getitem__(self, part: slice) -> "DenseKernel":
        """Return some of the problems, in the same memory."""
        a, b = self.a[part], self.b[part]
        numbers = self.epsilons[part], self.rhos[part], self.largest[part]
        return DenseKernel(self.C[part], self.K[part], a, b, *numbers, self.symmetric)

    def begin(self, F: Tensor, G: Tensor) -> Vector:
        """Form the kernels around the potentials."""
        for i in range(len(F)):
            self._absorb(i, F[i], G[i])
        return as_vector(G.clone())

    def center(self, G: Vector) -> Vector:
        """Form the kernels around the potentials and their hard c-transforms, so that no row is without a 1."""
        for i, one in enumerate(as_tensor(G)):
            K = torch.mul(self.C[i], 1 / self.epsilons[i], out=self.K[i])
            self._absorb(i, K.sub_(one.to(K.dtype)).amin(dim=1), one)
        return G

    def restart(self, i: int, G: Tensor) -> Vector:
        """Form a kernel around hard c-transforms, so that no row or column is without a 1."""
        K = torch.mul(self.C[i], 1 / self.epsilons[i], out=self.K[i])
        F = K.sub_(G.to(K.dtype)).amin(dim=1)
        G = G + K.sub_(F[:, None]).amin(dim=0)
        self._absorb(i, F, G)
        return as_vector(G)

    def _absorb(self, i: int, F: Tensor, G: Tensor) -> None:
        self.F0[i], self.G0[i] = as_vector(F), as_vector(G)
        K = torch.sub(G.to(self.dtype), self.C[i], alpha=1 / self.epsilons[i], out=self.K[i])
        # Asking a device would cost more than adding zeros.
        if K.device.type != "cpu" or F.any():
            K.add_(F.to(self.dtype)[:, None])
        exponentiate(K)

    def sweep(self, G: Vector) -> tuple[Vector, Vector]:
        """Two matrix-vector products for each problem; one for a measure against itself."""
        self.G = G
        scale = self.numerics.exp(G - self.G0)
        self.v = self._narrow(scale * self.b_vector)
        self.s = (self.matrices @ self.v[..., None])[..., 0]
        if self.symmetric:
            self.w, sums = self.v, self.s
        else:
            w = self.a_vector / self.s
            if self.damping is not None:
                w = self.a_vector * self.numerics.exp(self.row_potentials - self.F0)
            self.w = self._narrow(w)
            sums = (self.w[:, None] @ self.matrices)[:, 0]
        if self.damping is None:
            # The plan's columns, as shares of what they should be.
            shares = scale * sums
            residual = -self.numerics.log(shares)
            shares -= 1
        else:
            answer = self.damping * (self.G0 - self._log(sums))
            if not self.symmetric:
                self.constant = self.balanced(self.row_potentials, answer)
                answer = answer - self.constant
            residual = answer - G
            shares = self._excess(residual)
        self.residual = residual
        return residual, (self.b_vector * abs(shares)).sum(1)

    def sweeps(self, G: Tensor, count: int) -> Tensor:
        """Make the sweeps of hard marginals by four operations each, on the scalings themselves."""
        if self.damping is not None:
            return super().sweeps(G, count)
        v: Tensor = ((G - self.G0).exp_() * self.b).to(self.dtype)[..., None]
        for _ in range(count):
            # Of a measure against itself the geometric mean of a scaling and of the best answer to it.
            sums = torch.bmm(self.K, v)
            v = (v * self._b / sums).sqrt_() if self.symmetric else self._b / torch.bmm(self.K.mT, self._a / sums)
        swept: Tensor = self.G0 + (v / self._b)[..., 0].log_()
        return swept

    def _narrow(self, vector: Vector) -> Vector:
        """Return a vector in the matrices' dtype."""
        return vector.to(self.dtype) if isinstance(vector, Tensor) else vector.astype(self.matrices.dtype)

    def _log(self, sums: Vector) -> Vector:
        """Return the logarithms of sums, in double."""
        return self.numerics.log(
            sums.to(self.a.dtype) if isinstance(sums, Tensor) else sums.astype(self.a_vector.dtype)
        )

    @property
    def row_potentials(self) -> Vector:
        """The rows' answers, from their sums; a measure against itself has its one potential."""
        if self.symmetric:
            return self.G
        F = self.F0 - self._log(self.s)
        return F if self.damping is None else F * self.damping

    def settle(self, G_next: Vector, which: Iterable[int] | None = None) -> None:
        """Form kernels anew around the potentials, or where the last sweep ended far from them."""
        if which is None:
            far = ~(abs(G_next - self.G0).max(1) < _DRIFT)
            if not far.any():
                return
            which = far.nonzero()[0].tolist()
        F = G_next if self.symmetric else self.row_potentials
        if self.damping is not None and not self.symmetric:
            F = F + self.damping * self.constant
        for i in which:
            self._absorb(i, as_tensor(F[i]), as_tensor(G_next[i]))

    def drift(self, G: Vector) -> Vector:
        """Return how far the farthest of each problem's potentials is from the absorbed ones."""
        return self.numerics.amax(abs(G - self.G0), 1)[:, None]

    def plan_factors(self, i: int) -> Iterator[PlanFactors]:
        """One block."""
        w, v = as_tensor(self.w[i]), as_tensor(self.v[i])
        yield PlanFactors(slice(0, len(w)), w, self.K[i], v, self.C[i])

    def mass(self, i: int) -> Tensor:
        """Return the mass of a problem's plan."""
        w, s = as_tensor(self.w[i]), as_tensor(self.s[i])
        return torch.dot(w.to(self.a.dtype), s.to(self.a.dtype))


class BlockedKernel(Kernel):
    """A kernel of one problem that is formed block by block, in ``O(block * m)`` memory.

    Args:
        x: ``(n, d)`` samples.
        y: ``(m, d)`` samples.
        cost: The ground cost.
        a: ``(n,)`` weights of the rows.
        b: ``(m,)`` weights of the columns.
        epsilon: See :class:`Kernel`.
        rho: See :class:`Kernel`.
        largest: See :class:`Kernel`.
        symmetric: See :class:`Kernel`.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        cost: Cost,
        a: Tensor,
        b: Tensor,
        epsilon: float,
        rho: float | None,
        largest: float,
        symmetric: bool = False,
    ) -> None:
        super().__init__(a[None], b[None], x.dtype, [epsilon], [rho], [largest], symmetric)
        self.x, self.y, self.cost, self.epsilon = x, y, cost, epsilon
        self.share = damping(epsilon, rho)

    def sweep(self, G: Vector) -> tuple[Vector, Vector]:
        """One pass of exponentials for both updates: a block's columns are summed as soon as its rows are known."""
        self.G = as_tensor(G)[0]
        columns = torch.zeros_like(self.G)
        self._F = torch.empty_like(self.a[0])

        def visit(rows: slice, F: Tensor, top: Tensor, sums: Tensor, block: Tensor, columns: Tensor) -> None:
            self._F[rows] = F
            if not self.symmetric:
                weights = (F + top).exp_().mul_(self.a[0, rows]).to(block.dtype)
                columns += as_tensor(as_vector(weights) @ as_vector(block))

        for part in self._visit_blocks(visit):
            columns += part
        if self.symmetric:
            answer = self._F
        elif float(columns.min()) > 0:
            answer = (self.G - columns.log()).mul_(self.share)
        else:
            # A column that no row reaches within the format's range: answer it through its own soft minimum.
            answer = soft_minimum(self.y, self.x, self.a[0], self._F, self.cost.transposed(), self.epsilon)
            answer.mul_(self.share)
        if self.damping is not None and not self.symmetric:
            answer = answer - as_tensor(self.balanced(as_vector(self._F)[None], as_vector(answer)[None]))[0]
        self.residual = residual = as_vector(answer - self.G)[None]
        if self.symmetric:
            self._F = self.G
        return residual, (self.b_vector * abs(self._excess(residual))).sum(1)

    @property
    def row_potentials(self) -> Vector:
        """The rows' answers."""
        return as_vector(self._F)[None]

    def _blocks(self, rows_of: range) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
        """Yield rows, their answer ``F``, and their part of the kernel: its logarithmic scale, row sums, and values."""
        m, fill = len(self.y), self.cost.exponents(self.y, self.G, self.epsilon)
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
        workers = min(torch.get_num_threads(), n) if self.cost.by_matrix_product and self.x.device.type == "cpu" else 1

        def work(number: int) -> Tensor:
            columns = torch.zeros_like(self.G)
            with np.errstate(all="ignore"), torch.no_grad():
                for block in self._blocks(range(number * n // workers, (number + 1) * n // workers)):
                    visit(*block, columns)
            return columns

        if workers == 1:
            return [work(0)]
        with ThreadPoolExecutor(workers) as pool, _blas_threads(1):
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
