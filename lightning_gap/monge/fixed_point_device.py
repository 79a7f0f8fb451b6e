"""The fixed-point iteration where asking for a number is dear: on a GPU, which is not waited for after each sweep.

It takes the same steps as :mod:`lightning_gap.monge.fixed_point` and decides on the device what that decides in Python.
The marginal errors are fetched after eight sweeps and then at most after every eighth, so that some sweeps more than
needed are made, and nearly none is waited for.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gap.monge.kernels import Kernel, as_tensor

__all__ = [
    "LONGEST_JUMP",
    "MEMORY",
    "PLAIN_SWEEPS",
    "STUCK",
    "Solution",
    "iterate_on_device",
    "regularization",
    "too_large",
]

# A short memory stagnates at tight tolerances; a long one costs little beside a sweep.
MEMORY = 15
# A measure against itself is nearly always solved after so many averaged sweeps, each cheaper than an extrapolation.
PLAIN_SWEEPS = 8
# An extrapolation that moves a potential further, in units of epsilon, is not to be trusted.
LONGEST_JUMP = 20.0
# A marginal error above it is still large.
STUCK = 1e-3
# Sweeps to the first question, and the fewest between two.
_UNASKED = 8
# Sweeps after which kernels are formed anew unasked, and the drift from which they are when it is known.
_UNSETTLED = (1, 2, 4)
_FAR = 15.0


@dataclass(frozen=True)
class Solution:
    """Where the iteration of B problems ended.

    Attributes:
        F: ``(B, n)`` potentials of the rows, in units of epsilon.
        G: ``(B, m)`` potentials of the columns, in units of epsilon.
        iterations: Sweeps over each problem, until it was solved.
        marginal_errors: L1 distance of each plan's marginals from the given ones.
        converged: Whether each one reached the tolerance.
    """

    F: Tensor
    G: Tensor
    iterations: list[int]
    marginal_errors: list[float]
    converged: list[bool]


def regularization(kernel: Kernel) -> float:
    """Return the share of the diagonal by which the extrapolation's least squares are made regular."""
    return 1e-8 if kernel.dtype == torch.float32 else 1e-14


def too_large(kernel: Kernel, i: int) -> FloatingPointError:
    """Return the error for a problem whose exponents its floating-point format does not bear."""
    return FloatingPointError(
        f"the costs are too large for epsilon = {kernel.epsilons[i]:.3g} in {kernel.dtype}: use a larger epsilon, or "
        "float64; if a network made the samples, lower its learning rate"
    )


class _Anderson:
    """The last steps and residuals of each problem, and what they extrapolate to."""

    def __init__(self, kernel: Kernel) -> None:
        count, m = kernel.b.shape
        self.memory = max(1, min(MEMORY, m // 4))
        self.steps = kernel.b.new_zeros(count, self.memory, m, dtype=kernel.dtype)
        self.residuals = kernel.b.new_zeros(count, self.memory, m, dtype=kernel.dtype)
        self.regularization = regularization(kernel)
        self.calls = 0
        self.last_image = self.last_residual = kernel.b
        # Which problems have a last step to compare with, and how many steps there are.
        self.known = kernel.b.new_zeros(count, 1)
        self.lengths = kernel.b.new_zeros(count, 1)

    def forget(self, which: Tensor) -> None:
        """Drop what is known of some problems: rows of zeros do not extrapolate."""
        kept = (~which).to(self.lengths.dtype)
        self.known, self.lengths = self.known * kept, self.lengths * kept
        self.steps *= kept[..., None].to(self.steps.dtype)
        self.residuals *= kept[..., None].to(self.steps.dtype)

    def extrapolate(self, image: Tensor, residual: Tensor) -> Tensor:
        """Return the next points, from the fixed-point map's images and their weighted residuals."""
        # A comparison, as a product would not forget what is not finite.
        step, change = (
            torch.where(self.known > 0, new - last, 0)
            for new, last in ((image, self.last_image), (residual, self.last_residual))
        )
        self.lengths = (self.lengths + 1) * self.known
        self.last_image, self.last_residual, self.known = image, residual, torch.ones_like(self.known)
        j, self.calls = self.calls % self.memory, self.calls + 1
        self.steps[:, j], self.residuals[:, j] = step.to(self.steps.dtype), change.to(self.steps.dtype)
        if self.calls > 3 and self.calls % 2 == 0:
            return image
        q = min(self.calls, self.memory)
        rows = self.residuals[:, :q]
        matrix = (rows @ rows.mT).to(image.dtype)
        right = (rows @ residual.to(rows.dtype)[..., None]).to(image.dtype)
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        diagonal += self.regularization * diagonal.amax(1, keepdim=True) + torch.finfo(diagonal.dtype).tiny
        weights, _ = torch.linalg.solve_ex(matrix, right)
        jump = (weights.mT.to(rows.dtype) @ self.steps[:, :q])[:, 0]
        return image - torch.where(jump.abs().amax(1, keepdim=True) < LONGEST_JUMP, jump, 0)


def iterate_on_device(
    kernel: Kernel, G: Tensor, tolerance: float, max_iterations: int, patience: int | None = None
) -> Solution:
    """Sweep until the marginal error of each problem is small enough; see :func:`fixed_point.iterate`."""
    anderson = _Anderson(kernel)
    root = kernel.b.sqrt()
    safe, iterations, question = G, 0, _UNASKED
    best, solved_after = torch.full_like(root[:, :1], math.inf), torch.zeros_like(root[:, :1])
    restarted: list[int] = []
    while True:
        residual, marginal_errors = kernel.sweep(G)
        errors = as_tensor(marginal_errors)[:, None]
        iterations += 1
        solved_after = torch.where((solved_after == 0) & (errors <= tolerance), iterations, solved_after)
        finite, solved = errors.isfinite(), solved_after > 0
        lost: list[int] = []
        if iterations >= max_iterations <= _UNASKED:
            # Of so few sweeps, those of an annealing's stage, nobody asks how they ended.
            nothing = [math.nan] * len(G)
            return Solution(as_tensor(kernel.row_potentials), G, [iterations] * len(G), nothing, [False] * len(G))
        if asking := iterations >= min(question, max_iterations):
            question = iterations + max(_UNASKED, iterations // 2)
            told = torch.stack([errors, solved_after, finite.to(errors.dtype), kernel.drift(G)])[..., 0].tolist()
            found, after, well, drifts = told
            ended = iterations >= max_iterations
            if patience is not None and iterations >= patience:
                ended, patience = ended or max(found) > STUCK, None
            if all(after) or (ended and all(well)):
                return Solution(
                    as_tensor(kernel.row_potentials),
                    G,
                    [int(number) or iterations for number in after],
                    found,
                    [number > 0 for number in after],
                )
            lost = [i for i, is_finite in enumerate(well) if not is_finite]
        image = G + (residual if kernel.relaxation == 1 else kernel.relaxation * residual)
        # Where an extrapolation led astray: back to where plain Sinkhorn would have gone. What is solved stays where it
        # is while the others go on.
        astray = ~finite | (~(errors <= 4 * best) & (anderson.lengths > 0))
        best = torch.where(astray, math.inf, torch.minimum(best, errors))
        image = torch.where(solved, G, torch.where(astray, safe, image))
        residual = torch.where(solved | astray, 0, residual)
        for i in lost:
            if i in restarted:
                raise too_large(kernel, i)
            image[i] = kernel.restart(i, safe[i])
        restarted = lost if asking else restarted
        anderson.forget(astray)
        # Potentials move most at first.
        if iterations in _UNSETTLED:
            kernel.settle(image, range(len(G)))
        elif asking:
            kernel.settle(image, [i for i, drift in enumerate(drifts) if drift > _FAR and i not in lost])
        safe = image
        plain = kernel.symmetric and iterations < PLAIN_SWEEPS
        G = image if plain else anderson.extrapolate(image, residual * root)
