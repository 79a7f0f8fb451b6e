"""The fixed-point iteration on a CPU, with Anderson acceleration.

Anderson acceleration (Walker and Ni 2011, "Anderson acceleration for fixed-point iterations") extrapolates from the
last residuals and cuts the number of Sinkhorn sweeps by a factor of 3 to 8. It is safeguarded: where the marginal error
grows, the iteration goes back to where plain Sinkhorn would have gone.
"""

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lightning_gap.monge.ot.solvers.kernel import Kernel
from lightning_gap.monge.ot.solvers.vectors import Vector, as_tensor, as_vector

__all__ = ["LONGEST_JUMP", "MEMORY", "PLAIN_SWEEPS", "SLOW", "STUCK", "Solution", "iterate_on_cpu"]

# A short memory stagnates at tight tolerances; a long one costs little beside a sweep.
MEMORY = 15
# A measure against itself is nearly always solved after so many averaged sweeps, each cheaper than an extrapolation.
PLAIN_SWEEPS = 8
# An extrapolation that moves a potential further, in units of epsilon, is not to be trusted.
LONGEST_JUMP = 20.0
# A marginal error above it is still large; on a CPU a smaller one has so many times as long to become a tenth.
STUCK, SLOW = 1e-3, 4


@dataclass(frozen=True)
class Solution:
    """Where the iteration of B problems ended: ``(B, n)`` and ``(B, m)`` potentials in units of epsilon, and errors."""

    F: Tensor
    G: Tensor
    iterations: list[int]
    marginal_errors: list[float]
    converged: list[bool]


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
        self.regularization = kernel.regularization
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


def iterate_on_cpu(
    kernel: Kernel, G: Vector, tolerance: float, max_iterations: int, patience: int | None = None
) -> Solution:
    """Sweep until the marginal error of each problem is small enough; see :func:`iterate.iterate`."""
    count = len(G)
    anderson = _Anderson(kernel)
    root = np.sqrt(kernel.b_vector)
    safe, iterations, early = G, 0, math.inf
    best, solved_after, restarted = [math.inf] * count, [0] * count, [-1] * count
    while True:
        residual, marginal_errors = kernel.sweep(G)
        errors = marginal_errors.tolist()
        iterations += 1
        for i, error in enumerate(errors):
            if error <= tolerance and not solved_after[i]:
                solved_after[i] = iterations
        ended = iterations >= max_iterations
        if patience is not None and iterations == patience:
            ended, early = ended or max(errors) > STUCK, max(errors)
        elif patience is not None and iterations == SLOW * patience:
            ended = ended or max(errors) > early / 10
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
                    raise kernel.too_large(i)
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
