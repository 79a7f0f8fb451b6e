"""Sweeps to a marginal error, wherever the vectors are, and leaps where sweeps hardly move."""

from dataclasses import replace

import numpy as np
from torch import Tensor

from lightning_gap.monge.ot.solvers.anderson import Solution, iterate_on_cpu
from lightning_gap.monge.ot.solvers.anderson_device import iterate_on_device
from lightning_gap.monge.ot.solvers.kernel import Kernel
from lightning_gap.monge.ot.solvers.vectors import Vector, as_vector

__all__ = ["LEAPS", "LEAP_SWEEPS", "PATIENCE", "iterate", "iterate_to_end"]

# Sweeps after which a marginal error that is still large will not become small, how often to leap then, and the sweeps
# of a leap's line search.
PATIENCE, LEAPS, LEAP_SWEEPS = 128, 8, 24


def iterate(
    kernel: Kernel, G: Vector, *, tolerance: float, max_iterations: int, patience: int | None = None
) -> Solution:
    """Sweep until the marginal error of each problem is small enough."""
    if kernel.on_device:
        return iterate_on_device(kernel, G, tolerance, max_iterations, patience)
    with np.errstate(all="ignore"):
        return iterate_on_cpu(kernel, G, tolerance, max_iterations, patience)


def iterate_to_end(kernel: Kernel, start: tuple[Tensor, Tensor], *, tolerance: float, max_iterations: int) -> Solution:
    """Sweep as :func:`iterate` does, and leap where that hardly moves."""
    swept, G = 0, kernel.begin(*start)
    solved_after = [0] * len(G)
    for leaps in range(LEAPS + 1):
        patience = None if kernel.symmetric or leaps == LEAPS else PATIENCE
        found = iterate(kernel, G, tolerance=tolerance, max_iterations=max_iterations - swept, patience=patience)
        for i, (sweeps, converged) in enumerate(zip(found.iterations, found.converged, strict=True)):
            if converged and not solved_after[i]:
                solved_after[i] = swept + sweeps
        swept += max(found.iterations)
        # A leap takes as many sweeps, and what is left after it has to tell how it ended.
        if all(found.converged) or swept + LEAP_SWEEPS >= max_iterations:
            break
        G = _leap(kernel, as_vector(found.G), tolerance)
    return replace(found, iterations=[after or swept for after in solved_after])


def _leap(kernel: Kernel, G: Vector, tolerance: float) -> Vector:
    """Return potentials far along the last residuals, as far as the dual value rises.

    Clusters far apart whose masses differ a little are left with residuals that are constant on each: a sweep raises
    potentials by the logarithm of the masses' ratio, and has to raise them by as many epsilons as they are apart.
    """
    numerics, (step, errors) = kernel.numerics, kernel.sweep(G)
    # What is solved stays where it is, and so does what an extrapolation has led to where nothing is left of a column.
    step = numerics.where(((errors > tolerance) & numerics.isfinite(step).all(1))[:, None], step, 0.0)
    near, far, widening = 0 * step[:, :1], 0 * step[:, :1] + 1, numerics.isfinite(step[:, :1])
    for _ in range(LEAP_SWEEPS):
        middle = numerics.where(widening, far, (near + far) / 2)
        residual, _ = kernel.sweep(kernel.center(G + middle * step))
        rising = (kernel.b_vector * -numerics.expm1(-residual) * step).sum(1)[:, None] > 0
        near = numerics.where(rising, middle, near)
        far = numerics.where(rising & widening, 4 * middle, numerics.where(rising, far, middle))
        widening = widening & rising
    return kernel.center(G + near * step)
