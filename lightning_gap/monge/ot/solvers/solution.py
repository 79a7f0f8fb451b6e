"""What the fixed-point iterations on a CPU and on a device have in common."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gap.monge.ot.solvers.kernel import Kernel

__all__ = ["LONGEST_JUMP", "MEMORY", "PLAIN_SWEEPS", "STUCK", "Solution", "regularization", "too_large"]

# A short memory stagnates at tight tolerances; a long one costs little beside a sweep.
MEMORY = 15
# A measure against itself is nearly always solved after so many averaged sweeps, each cheaper than an extrapolation.
PLAIN_SWEEPS = 8
# An extrapolation that moves a potential further, in units of epsilon, is not to be trusted.
LONGEST_JUMP = 20.0
# A marginal error above it is still large.
STUCK = 1e-3


@dataclass(frozen=True)
class Solution:
    """Where the iteration of B problems ended: ``(B, n)`` and ``(B, m)`` potentials, in units of epsilon, and errors."""

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
