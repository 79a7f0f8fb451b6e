r"""The fixed-point iteration behind every entropic solver: Anderson acceleration and a coarse-to-fine start.

Anderson acceleration (Walker and Ni 2011, "Anderson acceleration for fixed-point iterations") extrapolates from the
last residuals and cuts the number of Sinkhorn sweeps by a factor of 3 to 8. It is safeguarded: where the marginal error
grows, the iteration goes back to where plain Sinkhorn would have gone.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_gap.monge.costs import Cost
from lightning_gap.monge.kernels import (
    BlockedKernel,
    DenseKernel,
    Kernel,
    Vector,
    as_tensor,
    as_vector,
    buffers,
    soft_minimum,
)

__all__ = ["Solution", "coarse_start", "iterate"]

# Problems of up to this many points anneal epsilon; larger ones start from every fourth of their points.
_COARSEST = 256
_STRIDE = 4
# Where no cost is more than this many epsilons, zero potentials are a good start.
_FLAT = 60.0
# A short memory stagnates at tight tolerances; a long one costs little beside a sweep.
_MEMORY = 15
# An extrapolation that moves a potential further, in units of epsilon, is not to be trusted.
_LONGEST_JUMP = 20.0


@dataclass(frozen=True)
class Solution:
    """Where an iteration ended.

    Attributes:
        F: ``(n,)`` potential of the rows, in units of epsilon.
        G: ``(m,)`` potential of the columns, in units of epsilon.
        iterations: Sweeps over the full problem.
        marginal_error: L1 distance of the plan's marginals from the given ones.
        converged: Whether the tolerance was reached.
    """

    F: Tensor
    G: Tensor
    iterations: int
    marginal_error: float
    converged: bool


class _Anderson:
    """The last steps and residuals, and the point they extrapolate to; on every other call, which is as good."""

    def __init__(self, like: Tensor) -> None:
        # More steps than a fraction of the unknowns would be dependent.
        self.memory = max(1, min(_MEMORY, len(like) // 4))
        self.steps = as_vector(like.new_zeros(self.memory, len(like)))
        # The last row is the present residual: one product then gives all that the least squares need.
        self.residuals = as_vector(like.new_zeros(self.memory + 1, len(like)))
        self.regularization = 1e-8 if like.dtype == torch.float32 else 1e-14
        self.forget()

    def forget(self) -> None:
        self.count = 0
        self.last: Vector | None = None

    def extrapolate(self, image: Vector, residual: Vector) -> Vector:
        """Return the next point, from the fixed-point map's image and its weighted residual."""
        last, self.last = self.last, image
        if last is None:
            self.residuals[-1] = residual
            return image
        j = self.count % self.memory
        self.steps[j] = image - last
        self.residuals[j] = residual - self.residuals[-1]
        self.residuals[-1] = residual
        self.count += 1
        if self.count > 2 and self.count % 2:
            return image
        q = min(self.count, self.memory)
        gram = self.residuals @ self.residuals.T
        if isinstance(gram, Tensor):
            gram = gram.cpu().numpy()
        gram = gram.astype(np.float64)
        matrix, right = gram[:q, :q], gram[:q, -1]
        matrix.flat[:: q + 1] += self.regularization * matrix.diagonal().max() + 1e-300
        weights = np.linalg.solve(matrix, right)
        if isinstance(image, Tensor):
            jump = torch.from_numpy(weights).to(image) @ self.steps[:q]
        else:
            jump = weights.astype(image.dtype) @ self.steps[:q]
        return image - jump if float(abs(jump).max()) < _LONGEST_JUMP else image


def iterate(kernel: Kernel, G: Vector, *, tolerance: float, max_iterations: int) -> Solution:
    """Sweep until the marginal error is small enough.

    Args:
        kernel: The problem, begun at ``G``.
        G: ``(m,)`` potential of the columns to start from, in units of epsilon.
        tolerance: L1 marginal error at which to stop.
        max_iterations: Most sweeps.

    Returns:
        The last swept potentials; the kernel's plan is theirs.

    Raises:
        FloatingPointError: The costs are too large for epsilon in this floating-point format.
    """
    with np.errstate(all="ignore"):
        return _iterate(kernel, G, tolerance, max_iterations)


def _iterate(kernel: Kernel, G: Vector, tolerance: float, max_iterations: int) -> Solution:
    anderson = _Anderson(kernel.b)
    root = kernel.numerics.sqrt(kernel.b_vector)
    best, safe, iterations, restarted = math.inf, G, 0, -1
    while True:
        answer = kernel.sweep(G)
        residual = answer - G
        error = float(kernel.b_vector @ abs(kernel.numerics.expm1(-residual)))
        iterations += 1
        if not math.isfinite(error):
            if iterations == restarted + 1:
                raise FloatingPointError(
                    f"the costs are too large for epsilon = {kernel.epsilon:.3g} in {kernel.b.dtype}: use a larger "
                    "epsilon, or float64; if a network made the samples, lower its learning rate"
                )
            G = safe = kernel.begin(None, as_tensor(safe))
            best, restarted = math.inf, iterations
            anderson.forget()
            continue
        if error <= tolerance or iterations >= max_iterations:
            return Solution(as_tensor(kernel.F), as_tensor(G), iterations, error, error <= tolerance)
        if not error <= 4 * best and anderson.count:
            # The extrapolation led astray: back to where plain Sinkhorn would have gone.
            G, best = safe, math.inf
            anderson.forget()
            continue
        if iterations < 4 or iterations % 4 == 0:
            kernel.settle(answer)
        best = min(best, error)
        safe = answer if kernel.relaxation == 1 else G + kernel.relaxation * residual
        G = anderson.extrapolate(safe, residual * root)


def coarse_start(kernel: Kernel, x: Tensor, y: Tensor, cost: Cost) -> tuple[Tensor | None, Tensor | None]:
    """Return first potentials of rows and columns, from every fourth point and so on down, or by annealing epsilon.

    Args:
        kernel: The problem's kernel.
        x: ``(n, d)`` samples.
        y: ``(m, d)`` samples.
        cost: The ground cost.

    Returns:
        ``F`` (``None`` where ``G`` is only rough) and ``G`` (``None`` for zeros), in units of epsilon.
    """
    a, b, epsilon = kernel.a, kernel.b, kernel.epsilon
    if isinstance(kernel, DenseKernel) and float(kernel.C.amax()) < _FLAT * epsilon:
        return None, None
    if min(len(x), len(y)) <= _COARSEST:
        return None, _anneal(kernel) if isinstance(kernel, DenseKernel) else torch.zeros_like(b)
    rows, columns = a[::_STRIDE], b[::_STRIDE]
    if not (float(rows.sum()) > 0 and float(columns.sum()) > 0):
        return None, torch.zeros_like(b)
    rows, columns = rows * (a.sum() / rows.sum()), columns * (b.sum() / columns.sum())
    xs, ys = x[::_STRIDE].contiguous(), y[::_STRIDE].contiguous()
    n, m = len(xs), len(ys)
    with buffers(2 if n * m <= dense_pairs(x) else 0, n, m, x) as matrices:
        coarse: Kernel
        if matrices:
            coarse = DenseKernel(cost.fill(matrices[0], xs, ys), matrices[1], rows, columns, epsilon, kernel.rho)
        else:
            coarse = BlockedKernel(xs, ys, cost, rows, columns, epsilon, kernel.rho)
        F, G = coarse_start(coarse, xs, ys, cost)
        found = iterate(coarse, coarse.begin(F, G), tolerance=0.02, max_iterations=60)
    F = kernel.damping * soft_minimum(x, ys, columns, found.G, cost, epsilon)
    G = kernel.damping * soft_minimum(y, xs, rows, found.F, cost.transposed(), epsilon)
    return F, G


def _anneal(kernel: DenseKernel) -> Tensor:
    """Return the columns' potential, followed from a large epsilon down, in the kernel's own buffers."""
    G = torch.zeros_like(kernel.b)
    warm, enough = kernel.epsilon, float(kernel.C.mean()) / 32
    while warm < enough:
        warm *= 4
    while warm > 1.5 * kernel.epsilon:
        stage = DenseKernel(kernel.C, kernel.K, kernel.a, kernel.b, warm, kernel.rho)
        # Potentials scale with 1/ε in units of ε.
        G = 4 * iterate(stage, stage.begin(None, G), tolerance=0.1, max_iterations=8).G
        warm /= 4
    return G


def dense_pairs(like: Tensor) -> int:
    """Return up to how many pairs a kernel matrix is kept in memory.

    Args:
        like: Gives the device.
    """
    return 1 << 24 if like.device.type == "cpu" else 1 << 28
