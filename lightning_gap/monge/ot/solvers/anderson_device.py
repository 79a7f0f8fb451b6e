"""The fixed-point iteration where asking for a number is dear: on a GPU, which is not waited for after each sweep.

It extrapolates as :mod:`lightning_gap.monge.ot.solvers.anderson` does, but from rounds of a few sweeps, as an
operation on a short vector takes as long as a sweep. The marginal errors are fetched after the first rounds, and then
when they should have reached the tolerance.
"""

import math

import torch
from torch import Tensor

from lightning_gap.monge.ot.solvers.anderson import LONGEST_JUMP, MEMORY, PLAIN_SWEEPS, STUCK, Solution
from lightning_gap.monge.ot.solvers.kernel import Kernel
from lightning_gap.monge.ot.solvers.vectors import as_tensor

__all__ = ["iterate_on_device"]

# Sweeps of a round, rounds to the first question, and the most between two.
_ROUND, _UNASKED, _LONGEST = 4, 3, 24
# Sweeps after each of which kernels are formed anew, at first.
_SETTLING = 2
# A drift from the kernels' potentials from which these are formed anew.
_FAR = 15.0


class _Anderson:
    """The last steps and residuals of all problems, and what they extrapolate to."""

    def __init__(self, kernel: Kernel) -> None:
        count, m = kernel.b.shape
        self.memory = max(1, min(MEMORY, m))
        self.root = kernel.b.sqrt()
        self.steps = kernel.b.new_zeros(count, self.memory, m, dtype=kernel.dtype)
        self.residuals = torch.zeros_like(self.steps)
        self.last = kernel.b, kernel.b
        self.regularization = kernel.regularization
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.calls = -1

    def extrapolate(self, image: Tensor, residual: Tensor) -> Tensor:
        """Return the next points, from the images under a round of sweeps and from the residuals."""
        residual = residual * self.root
        last, self.last, self.calls = self.last, (image, residual), self.calls + 1
        if self.calls == 0:
            return image
        j, q = (self.calls - 1) % self.memory, min(self.calls, self.memory)
        self.steps[:, j], self.residuals[:, j] = image - last[0], residual - last[1]
        rows = self.residuals[:, :q]
        matrix = (rows @ rows.mT).to(image.dtype)
        right = (rows @ residual.to(rows.dtype)[..., None]).to(image.dtype)
        matrix.diagonal(dim1=1, dim2=2).mul_(1 + self.regularization).add_(torch.finfo(matrix.dtype).tiny)
        weights: Tensor = torch.linalg.solve_ex(matrix, right)[0]
        jump = (weights.mT.to(rows.dtype) @ self.steps[:, :q])[:, 0]
        return image - jump.clamp_(-LONGEST_JUMP, LONGEST_JUMP)


def iterate_on_device(
    kernel: Kernel, G: Tensor, tolerance: float, max_iterations: int, patience: int | None = None
) -> Solution:
    """Sweep until the marginal error of each problem is small enough; see :func:`iterate.iterate`."""
    every = range(len(G))
    if max_iterations <= _ROUND * _UNASKED:
        # Of so few sweeps, those of an annealing's stage, nobody asks how they ended.
        G = kernel.sweeps(G, max_iterations - 1)
        kernel.sweep(G)
        nothing = [math.nan for _ in every]
        return Solution(as_tensor(kernel.row_potentials), G, [max_iterations for _ in every], nothing, [False] * len(G))
    # From hard c-transforms, whose kernels overflow nowhere: nobody would see it for some rounds.
    safe = torch.stack([kernel.restart(i, G[i]) for i in every])
    G = _settled(kernel, safe)
    anderson, iterations, rounds = _Anderson(kernel), _SETTLING, _UNASKED
    best, last, restarted = [math.inf for _ in every], (0, [math.inf for _ in every]), list[int]()
    solved_after: list[int] = [0 for _ in every]
    while True:
        for _ in range(rounds):
            if iterations + _ROUND >= max_iterations:
                break
            image = kernel.sweeps(G, _ROUND)
            plain = kernel.symmetric and iterations < PLAIN_SWEEPS
            G, iterations = image if plain else anderson.extrapolate(image, image - G), iterations + _ROUND
        residual, marginal_errors = kernel.sweep(G)
        iterations += 1
        errors, drifts = torch.stack([as_tensor(marginal_errors), kernel.drift(G)[:, 0]]).tolist()
        for i in every:
            if errors[i] <= tolerance and not solved_after[i]:
                solved_after[i] = iterations
        lost = [i for i in every if not math.isfinite(errors[i])]
        ended = iterations + 1 >= max_iterations
        if patience is not None and iterations >= patience:
            ended, patience = ended or max(errors) > STUCK, None
        if all(error <= tolerance for error in errors) or (ended and not lost):
            converged = [error <= tolerance for error in errors]
            swept = [after if ok else iterations for after, ok in zip(solved_after, converged, strict=True)]
            return Solution(as_tensor(kernel.row_potentials), G, swept, errors, converged)
        image = G + kernel.relaxation * residual
        astray = [i for i in every if not errors[i] <= 4 * best[i] or i in lost]
        for i in astray:
            # The extrapolation led astray: back to where plain Sinkhorn had been.
            if i in lost and i in restarted:
                raise kernel.too_large(i)
            image[i] = kernel.restart(i, safe[i]) if i in lost else safe[i]
        if astray:
            anderson.forget()
        if lost:
            image, iterations = _settled(kernel, image), iterations + _SETTLING
        best = [math.inf if i in astray else min(best[i], errors[i]) for i in every]
        kernel.settle(image, [i for i in every if drifts[i] > _FAR and not lost])
        rounds = _rounds_to_go(iterations - last[0], last[1], errors, tolerance)
        G = safe = image
        last, restarted = (iterations, errors), lost


def _settled(kernel: Kernel, G: Tensor) -> Tensor:
    """Return potentials after the first sweeps, in which they move most: the kernels are formed anew after each."""
    for _ in range(_SETTLING):
        residual, _ = kernel.sweep(G)
        G = G + kernel.relaxation * residual
        kernel.settle(G, range(len(G)))
    return G


def _rounds_to_go(sweeps: int, before: list[float], errors: list[float], tolerance: float) -> int:
    """Return after how many rounds the errors should reach the tolerance, at the pace they had over so many sweeps."""
    most = 1.0
    for last, error in zip(before, errors, strict=True):
        if error <= tolerance:
            continue
        if not math.isfinite(last) or not 0 < error < last:
            return _UNASKED
        most = max(most, math.log(error / tolerance) * sweeps / math.log(last / error) / _ROUND)
    return min(_LONGEST, math.ceil(most))
