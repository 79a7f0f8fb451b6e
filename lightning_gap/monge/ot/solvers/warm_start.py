"""Where the iteration starts: from every fourth point and so on down, or by annealing epsilon."""

from dataclasses import replace

import torch
from torch import Tensor

from lightning_gap.monge.ot.limits import LIMITS
from lightning_gap.monge.ot.solvers.iterate import iterate
from lightning_gap.monge.ot.solvers.kernel import Kernel, damping
from lightning_gap.monge.ot.solvers.vectors import as_vector

__all__ = ["STRIDE", "coarse_start"]

STRIDE = 4


def coarse_start(kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Return first potentials of rows and columns."""
    F, G = torch.zeros_like(kernel.a), torch.zeros_like(kernel.b)
    count, steep = len(F), kernel.steep()
    # Problems that are all to be started are so together, others one by one.
    parts = [slice(0, count)] if len(steep) == count else [slice(i, i + 1) for i in steep]
    for part in parts:
        F[part], G[part] = _start(kernel[part])
    return F, G


def _start(kernel: Kernel) -> tuple[Tensor, Tensor]:
    if min(kernel.a.shape[1], kernel.b.shape[1]) <= LIMITS.coarsest.on(kernel.a.device):
        return _anneal(kernel)
    F, G = torch.zeros_like(kernel.a), torch.zeros_like(kernel.b)
    rows, columns = (w[:, ::STRIDE] for w in (kernel.a, kernel.b))
    row_sums, column_sums = (w.sum(1, keepdim=True) for w in (rows, columns))
    if not (float(row_sums.min()) > 0 and float(column_sums.min()) > 0):
        return F, G
    rows = rows * (kernel.a.sum(1, keepdim=True) / row_sums)
    columns = columns * (kernel.b.sum(1, keepdim=True) / column_sums)
    fewer = [
        replace(p, x=p.x[::STRIDE].contiguous(), y=p.y[::STRIDE].contiguous(), a=a, b=b)
        for p, a, b in zip(kernel.problems, rows, columns, strict=True)
    ]
    with kernel.coarsened(fewer) as coarse:
        found = iterate(coarse, coarse.begin(*coarse_start(coarse)), tolerance=0.02, max_iterations=60)
    for i, (p, few, epsilon) in enumerate(zip(kernel.problems, fewer, kernel.epsilons, strict=True)):
        share, part = damping(epsilon, p.rho), kernel[i : i + 1]
        F[i] = share * part.soft_minimum(p.x, few.y, few.b, found.G[i], p.cost)
        G[i] = share * part.soft_minimum(p.y, few.x, few.a, found.F[i], p.cost.transposed())
    return F, G


def _anneal(kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Return the potentials, followed from a large epsilon down; zeros where a kernel has none."""
    F, G = torch.zeros_like(kernel.a), torch.zeros_like(kernel.b)
    for stage, warmer in enumerate(kernel.warmer()):
        if stage == 0:
            start = as_vector(G)
            for i in range(len(G)):
                start[i] = warmer.restart(i, G[i])
        else:
            start = warmer.begin(F, G)
        found = iterate(warmer, start, tolerance=0.1, max_iterations=8)
        # Potentials scale with 1/ε in units of ε.
        F, G = 4 * found.F, 4 * found.G
    return F, G
