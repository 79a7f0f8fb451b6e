"""Sinkhorn updates with kernel matrices in memory."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from lightning_gap.monge.ot.costs import PlanFactors
from lightning_gap.monge.ot.problem import Problem
from lightning_gap.monge.ot.solvers.blocks import exponentiate
from lightning_gap.monge.ot.solvers.kernel import Kernel
from lightning_gap.monge.ot.solvers.memory import buffers
from lightning_gap.monge.ot.solvers.sizes import size_and_epsilon
from lightning_gap.monge.ot.solvers.vectors import Vector, as_tensor, as_vector, in_format_of

__all__ = ["DRIFT", "FLAT", "DenseKernel"]

# Where no cost is more than this many epsilons, zero potentials are a good start.
FLAT = 60.0
# How far potentials may drift from the absorbed ones before the kernel is formed anew.
DRIFT = 30.0


class DenseKernel(Kernel):
    r"""``(B, n, m)`` kernel matrices in memory, beside the costs.

    Keeps :math:`K = e^{F_0 \oplus G_0 - C/\varepsilon}`, formed once around absorbed potentials (Schmitzer 2019,
    "Stabilized sparse scaling algorithms"): a sweep is two matrix-vector products, not :math:`2 n^2` exponentials.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        C: Tensor,
        K: Tensor,
        epsilons: Sequence[float],
        largest: Sequence[float],
        weights: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__(problems, epsilons, largest, weights)
        self.C, self.K = C, K
        self.matrices = as_vector(K)
        self.F0, self.G0 = as_vector(torch.zeros_like(self.a)), as_vector(torch.zeros_like(self.b))
        self._a, self._b = (w.to(self.dtype)[..., None] for w in (self.a, self.b))

    @classmethod
    @contextmanager
    def of(cls, problems: Sequence[Problem]) -> Iterator["DenseKernel"]:
        """Lend the kernel of problems of one shape."""
        with _matrices(problems) as (C, K):
            told = []
            for p, costs in zip(problems, C, strict=True):
                p.cost.geometry.fill(costs, p.x, p.y)
                told.append(torch.stack([costs.amin(), costs.amax(), torch.dot(p.a @ costs, p.b)]))
            # One question to the device for all of them.
            sizes = zip(problems, torch.stack(told).tolist(), strict=True)
            largest, epsilons = zip(*(size_and_epsilon(p, *numbers) for p, numbers in sizes), strict=True)
            yield cls(problems, C, K, epsilons, largest)

    def __getitem__(self, part: slice) -> "DenseKernel":
        """Return some of the problems, in the same memory."""
        numbers = self.epsilons[part], self.largest[part], (self.a[part], self.b[part])
        return DenseKernel(self.problems[part], self.C[part], self.K[part], *numbers)

    def steep(self) -> list[int]:
        """Return the problems with costs of many epsilons."""
        sizes = zip(self.largest, self.epsilons, strict=True)
        return [i for i, (size, epsilon) in enumerate(sizes) if size >= FLAT * epsilon]

    def warmer(self) -> Iterator["DenseKernel"]:
        """Begin where no cost is more than 256 epsilons."""
        stages = 1
        while any(e * 4**stages < size / 256 for e, size in zip(self.epsilons, self.largest, strict=True)):
            stages += 1
        for k in range(stages, 0, -1):
            warm = [epsilon * 4**k for epsilon in self.epsilons]
            yield DenseKernel(self.problems, self.C, self.K, warm, self.largest, (self.a, self.b))

    @classmethod
    @contextmanager
    def at(cls, problems: Sequence[Problem], like: Kernel) -> Iterator["DenseKernel"]:
        """Lend the kernel of problems of one shape, at another's epsilons."""
        with _matrices(problems) as (C, K):
            for p, costs in zip(problems, C, strict=True):
                p.cost.geometry.fill(costs, p.x, p.y)
            yield cls(problems, C, K, like.epsilons, like.largest)

    def coarsened(self, problems: Sequence[Problem]) -> AbstractContextManager[Kernel]:
        """Lend matrices of the fewer points."""
        return self.at(problems, self)

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
        self.v = in_format_of(scale * self.b_vector, self.matrices)
        self.s = (self.matrices @ self.v[..., None])[..., 0]
        if self.symmetric:
            self.w, sums = self.v, self.s
        else:
            w = self.a_vector / self.s
            if self.damping is not None:
                w = self.a_vector * self.numerics.exp(self.row_potentials - self.F0)
            self.w = in_format_of(w, self.matrices)
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

    def _log(self, sums: Vector) -> Vector:
        """Return the logarithms of sums, in double."""
        return self.numerics.log(in_format_of(sums, self.a_vector))

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
            far = ~(abs(G_next - self.G0).max(1) < DRIFT)
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


@contextmanager
def _matrices(problems: Sequence[Problem]) -> Iterator[tuple[Tensor, ...]]:
    """Lend memory for the costs of problems of one shape, and for their kernels."""
    count, n, m = len(problems), len(problems[0].x), len(problems[0].y)
    with buffers(2, count * n, m, problems[0].x) as matrices:
        yield tuple(matrix.view(count, n, m) for matrix in matrices)
