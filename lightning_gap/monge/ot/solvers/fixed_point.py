r"""The fixed-point iteration behind every entropic solver: Anderson acceleration and a coarse-to-fine start.

Anderson acceleration (Walker and Ni 2011, "Anderson acceleration for fixed-point iterations") extrapolates from the
last residuals and cuts the number of Sinkhorn sweeps by a factor of 3 to 8. It is safeguarded: where the marginal error
grows, the iteration goes back to where plain Sinkhorn would have gone.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lightning_gap.monge.ot.costs import Cost
from lightning_gap.monge.ot.solvers.fixed_point_device import (
    LONGEST_JUMP,
    MEMORY,
    PLAIN_SWEEPS,
    STUCK,
    Solution,
    iterate_on_device,
    regularization,
    too_large,
)
from lightning_gap.monge.ot.solvers.kernels import (
    BlockedKernel,
    DenseKernel,
    Kernel,
    Vector,
    as_tensor,
    as_vector,
    buffers,
    damping,
    soft_minimum,
)

__all__ = ["Solution", "coarse_start", "dense_pairs", "iterate", "iterate_to_end"]

# Problems of up to this many points anneal epsilon; larger ones start from every fourth of their points.
_COARSEST = 256
# On a GPU, where a sweep of few points takes as long as one of some thousand.
_GPU_COARSEST = 4096
_STRIDE = 4
# Where no cost is more than this many epsilons, zero potentials are a good start.
_FLAT = 60.0
# Sweeps after which a marginal error that is still large will not become small, how often to leap then, and the sweeps
# of a leap's line search.
_PATIENCE, _LEAPS, _LEAP_SWEEPS = 128, 8, 24


class _Anderson:
    """The last steps and residuals of each problem, and what they extrapolate to; on every other call, as good."""

    def __init__(self, kernel: Kernel) -> None:
        count, m = kernel.b.shape
        # More steps than unknowns would be dependent.
        self.memory = max(1, min(MEMORY, m))
        # In the matrices' precision: what they know of a residual.
        self.steps = as_vector(kernel.b.new_zeros(count, self.memory, m, dtype=kernel.dtype))
        # The last row is the present residual: one product then gives all that the least squares need.
        self.residuals = as_vector(kernel.b.new_zeros(count, self.memory + 1, m, dtype=kernel.dtype))
        self.regularization = regularization(kernel)
        self.calls = 0
        self.last: Vector | None = None
        # Problems without a last step to compare with, and how many steps each one has.
        self.fresh: set[int] = set(range(count))
        self.lengths = [0] * count

    def forget(self, i: int) -> None:
        """Drop what is known of a problem: rows of zeros do not extrapolate."""
        self.steps[i] = 0
        self.residuals[i] = 0
        self.fresh.add(i)
        self.lengths[i] = 0

    def extrapolate(self, image: Vector, residual: Vector) -> Vector:
        """Return the next points, from the fixed-point map's images and their weighted residuals."""
        last, self.last = self.last, image
        if last is None:
            self.residuals[:, -1] = residual
            self.fresh.clear()
            return image
        j = self.calls % self.memory
        self.steps[:, j] = image - last
        self.residuals[:, j] = residual - self.residuals[:, -1]
        self.residuals[:, -1] = residual
        for i in range(len(self.lengths)):
            self.lengths[i] += 1
        for i in self.fresh:
            self.steps[i, j] = 0
            self.residuals[i, j] = 0
            self.lengths[i] = 0
        self.fresh.clear()
        self.calls += 1
        if self.calls > 2 and self.calls % 2:
            return image
        q = min(self.calls, self.memory)
        gram = (self.residuals @ self.residuals.swapaxes(1, 2)).astype(np.float64)
        matrix, right = gram[:, :q, :q], gram[:, :q, -1:]
        diagonal = np.einsum("bii->bi", matrix)
        diagonal += self.regularization * diagonal.max(1, keepdims=True) + 1e-300
        try:
            weights = np.linalg.solve(matrix, right).swapaxes(1, 2)
        except np.linalg.LinAlgError:  # residuals of nothing but roundings
            return image
        jump = (weights.astype(self.steps.dtype) @ self.steps[:, :q])[:, 0]
        near = abs(jump).max(1) < LONGEST_JUMP
        return image - jump if near.all() else image - jump * near[:, None]


def iterate_to_end(kernel: Kernel, start: tuple[Tensor, Tensor], *, tolerance: float, max_iterations: int) -> Solution:
    """Sweep as :func:`iterate` does, and leap where that hardly moves.

    Args:
        kernel: The problems.
        start: ``(B, n)`` and ``(B, m)`` potentials of rows and columns to start from, in units of epsilon.
        tolerance: See :func:`iterate`.
        max_iterations: See :func:`iterate`.

    Returns:
        See :func:`iterate`.

    Raises:
        FloatingPointError: See :func:`iterate`.
    """
    swept, G = 0, kernel.begin(*start)
    solved_after = [0] * len(G)
    for leaps in range(_LEAPS + 1):
        patience = None if kernel.symmetric or leaps == _LEAPS else _PATIENCE
        found = iterate(kernel, G, tolerance=tolerance, max_iterations=max_iterations - swept, patience=patience)
        for i, (sweeps, converged) in enumerate(zip(found.iterations, found.converged, strict=True)):
            if converged and not solved_after[i]:
                solved_after[i] = swept + sweeps
        swept += max(found.iterations)
        if all(found.converged) or swept >= max_iterations or max(found.marginal_errors) <= STUCK:
            break
        G = _leap(kernel, as_vector(found.G))
    return replace(found, iterations=[after or swept for after in solved_after])


def _leap(kernel: Kernel, G: Vector) -> Vector:
    """Return potentials far along the last residuals, as far as the dual value rises.

    Clusters far apart whose masses differ a little are left with residuals that are constant on each: a sweep raises
    potentials by the logarithm of the masses' ratio, and has to raise them by as many epsilons as they are apart.
    """
    numerics, (step, errors) = kernel.numerics, kernel.sweep(G)
    # What is nearly solved stays where it is.
    step = step * (errors > STUCK)[:, None]
    near, far, widening = 0 * step[:, :1], 0 * step[:, :1] + 1, numerics.isfinite(step[:, :1])
    for _ in range(_LEAP_SWEEPS):
        middle = numerics.where(widening, far, (near + far) / 2)
        residual, _ = kernel.sweep(kernel.center(G + middle * step))
        rising = (kernel.b_vector * -numerics.expm1(-residual) * step).sum(1)[:, None] > 0
        near = numerics.where(rising, middle, near)
        far = numerics.where(rising & widening, 4 * middle, numerics.where(rising, far, middle))
        widening = widening & rising
    return kernel.center(G + near * step)


def iterate(
    kernel: Kernel, G: Vector, *, tolerance: float, max_iterations: int, patience: int | None = None
) -> Solution:
    """Sweep until the marginal error of each problem is small enough.

    Args:
        kernel: The problems, begun at ``G``.
        G: ``(B, m)`` potentials of the columns to start from, in units of epsilon.
        tolerance: L1 marginal error at which to stop.
        max_iterations: Most sweeps.
        patience: Sweeps after which to give up where an error is still large.

    Returns:
        The last swept potentials; the kernel's plans are theirs.

    Raises:
        FloatingPointError: The costs are too large for epsilon in this floating-point format.
    """
    if isinstance(G, Tensor):
        return iterate_on_device(kernel, G, tolerance, max_iterations, patience)
    with np.errstate(all="ignore"):
        return _iterate(kernel, G, tolerance, max_iterations, patience)


def _iterate(kernel: Kernel, G: Vector, tolerance: float, max_iterations: int, patience: int | None) -> Solution:
    count = len(G)
    anderson = _Anderson(kernel)
    root = np.sqrt(kernel.b_vector)
    safe, iterations = G, 0
    best, solved_after, restarted = [math.inf] * count, [0] * count, [-1] * count
    while True:
        residual, marginal_errors = kernel.sweep(G)
        errors = marginal_errors.tolist()
        iterations += 1
        for i, error in enumerate(errors):
            if error <= tolerance and not solved_after[i]:
                solved_after[i] = iterations
        ended = iterations >= max_iterations or (iterations == patience and max(errors) > STUCK)
        if all(solved_after) or (ended and all(map(math.isfinite, errors))):
            return Solution(
                as_tensor(kernel.row_potentials),
                as_tensor(G),
                [after or iterations for after in solved_after],
                errors,
                [after > 0 for after in solved_after],
            )
        image = G + (residual if kernel.relaxation == 1 else kernel.relaxation * residual)
        for i, error in enumerate(errors):
            if solved_after[i]:
                # It stays where it is while the others go on.
                image[i] = G[i]
                residual[i] = 0
            elif not math.isfinite(error):
                if iterations == restarted[i] + 1:
                    raise too_large(kernel, i)
                image[i] = kernel.restart(i, as_tensor(safe[i]))
                residual[i] = 0
                best[i], restarted[i] = math.inf, iterations
                anderson.forget(i)
            elif not error <= 4 * best[i] and anderson.lengths[i]:
                # The extrapolation led astray: back to where plain Sinkhorn would have gone.
                image[i] = safe[i]
                residual[i] = 0
                best[i] = math.inf
                anderson.forget(i)
            else:
                best[i] = min(best[i], error)
        if iterations < 4 or iterations % 4 == 0:
            kernel.settle(image)
        safe = image
        plain = kernel.symmetric and iterations < PLAIN_SWEEPS
        G = image if plain else anderson.extrapolate(image, residual * root)


def coarse_start(
    kernel: Kernel, xs: Sequence[Tensor], ys: Sequence[Tensor], costs: Sequence[Cost]
) -> tuple[Tensor, Tensor]:
    """Return first potentials of rows and columns, from every fourth point and so on down, or by annealing epsilon.

    Args:
        kernel: The kernel of B problems.
        xs: B sets of ``(n, d)`` samples.
        ys: B sets of ``(m, d)`` samples.
        costs: B ground costs.

    Returns:
        ``(B, n)`` and ``(B, m)`` potentials, in units of epsilon.
    """
    F, G = torch.zeros_like(kernel.a), torch.zeros_like(kernel.b)
    steep = list(range(len(xs)))
    if isinstance(kernel, DenseKernel):
        steep = [i for i in steep if kernel.largest[i] >= _FLAT * kernel.epsilons[i]]
    # Problems that are all to be started are so together, others one by one.
    parts = [slice(0, len(xs))] if len(steep) == len(xs) else [slice(i, i + 1) for i in steep]
    for part in parts:
        F[part], G[part] = _start(kernel[part], xs[part], ys[part], costs[part])
    return F, G


def _start(kernel: Kernel, xs: Sequence[Tensor], ys: Sequence[Tensor], costs: Sequence[Cost]) -> tuple[Tensor, Tensor]:
    F, G = torch.zeros_like(kernel.a), torch.zeros_like(kernel.b)
    coarsest = _GPU_COARSEST if isinstance(kernel.a_vector, Tensor) else _COARSEST
    if min(kernel.a.shape[1], kernel.b.shape[1]) <= coarsest:
        return _anneal(kernel) if isinstance(kernel, DenseKernel) else (F, G)
    rows, columns = (w[:, ::_STRIDE] for w in (kernel.a, kernel.b))
    row_sums, column_sums = (w.sum(1, keepdim=True) for w in (rows, columns))
    if not (float(row_sums.min()) > 0 and float(column_sums.min()) > 0):
        return F, G
    rows = rows * (kernel.a.sum(1, keepdim=True) / row_sums)
    columns = columns * (kernel.b.sum(1, keepdim=True) / column_sums)
    fewer_xs, fewer_ys = ([points[::_STRIDE].contiguous() for points in sets] for sets in (xs, ys))
    count, n, m = len(xs), rows.shape[1], columns.shape[1]
    like = xs[0]
    with buffers(2 if n * m <= dense_pairs(like) else 0, count * n, m, like) as matrices:
        coarse: Kernel
        if matrices:
            C, K = (matrix.view(count, n, m) for matrix in matrices)
            for i, cost in enumerate(costs):
                cost.fill(C[i], fewer_xs[i], fewer_ys[i])
            coarse = DenseKernel(C, K, rows, columns, kernel.epsilons, kernel.rhos, kernel.largest)
        else:
            coarse = BlockedKernel(
                fewer_xs[0],
                fewer_ys[0],
                costs[0],
                rows[0],
                columns[0],
                kernel.epsilons[0],
                kernel.rhos[0],
                kernel.largest[0],
            )
        start = coarse.begin(*coarse_start(coarse, fewer_xs, fewer_ys, costs))
        found = iterate(coarse, start, tolerance=0.02, max_iterations=60)
    for i, (cost, epsilon, rho) in enumerate(zip(costs, kernel.epsilons, kernel.rhos, strict=True)):
        share = damping(epsilon, rho)
        F[i] = share * soft_minimum(xs[i], fewer_ys[i], columns[i], found.G[i], cost, epsilon)
        G[i] = share * soft_minimum(ys[i], fewer_xs[i], rows[i], found.F[i], cost.transposed(), epsilon)
    return F, G


def _anneal(kernel: DenseKernel) -> tuple[Tensor, Tensor]:
    """Return the potentials, followed from a large epsilon down, in the kernel's own buffers."""
    stages = 1
    while any(epsilon * 4**stages < size / 256 for epsilon, size in zip(kernel.epsilons, kernel.largest, strict=True)):
        stages += 1
    F, G = torch.zeros_like(kernel.a), torch.zeros_like(kernel.b)
    for k in range(stages, 0, -1):
        warm = [epsilon * 4**k for epsilon in kernel.epsilons]
        stage = DenseKernel(kernel.C, kernel.K, kernel.a, kernel.b, warm, kernel.rhos, kernel.largest)
        if k == stages:
            start = as_vector(G)
            for i in range(len(G)):
                start[i] = stage.restart(i, G[i])
        else:
            start = stage.begin(F, G)
        found = iterate(stage, start, tolerance=0.1, max_iterations=8)
        # Potentials scale with 1/ε in units of ε.
        F, G = 4 * found.F, 4 * found.G
    return F, G


def dense_pairs(like: Tensor) -> int:
    """Return up to how many pairs a kernel matrix is kept in memory.

    Args:
        like: Gives the device.
    """
    return 1 << 24 if like.device.type == "cpu" else 1 << 28
