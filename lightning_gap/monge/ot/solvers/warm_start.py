"""Where the iteration starts: from every fourth point and so on down, or by annealing epsilon."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_gap.monge.ot.epsilon import Epsilon
from lightning_gap.monge.ot.limits import LIMITS, STRIDE
from lightning_gap.monge.ot.options import SolverOptions
from lightning_gap.monge.ot.problem import Problem
from lightning_gap.monge.ot.solvers.fused.native_dense import solve_natively
from lightning_gap.monge.ot.solvers.iterate import iterate
from lightning_gap.monge.ot.solvers.kernel import Kernel, damping
from lightning_gap.monge.ot.solvers.vectors import as_vector

__all__ = ["coarse_start"]

# What the start of a finer problem has to be solved to.
_TOLERANCE, _SWEEPS = 0.02, 60


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
    found = _solved(kernel, fewer)
    for i, (p, few, epsilon) in enumerate(zip(kernel.problems, fewer, kernel.epsilons, strict=True)):
        share, part = damping(epsilon, p.rho), kernel[i : i + 1]
        F[i] = share * part.soft_minimum(p.x, few.y, few.b, found[1][i], p.cost)
        G[i] = share * part.soft_minimum(p.y, few.x, few.a, found[0][i], p.cost.transposed())
    return F, G


def _solved(kernel: Kernel, fewer: list[Problem]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return the potentials of problems of fewer points, roughly solved at a kernel's epsilons."""
    options = SolverOptions("dense", _TOLERANCE, _SWEEPS)
    if len(fewer[0].x) * len(fewer[0].y) <= LIMITS.dense.on(fewer[0].x.device):
        given = [replace(p, epsilon=Epsilon(epsilon)) for p, epsilon in zip(fewer, kernel.epsilons, strict=True)]
        answers = [solve_natively(p, options, (False, False)) for p in given]
        if all(answer is not None for answer in answers):
            known = [(answer.f / e, answer.g / e) for answer, e in zip(answers, kernel.epsilons, strict=True) if answer]
            return [f for f, _ in known], [g for _, g in known]
    with kernel.coarsened(fewer) as coarse:
        found = iterate(coarse, coarse.begin(*coarse_start(coarse)), tolerance=_TOLERANCE, max_iterations=_SWEEPS)
    return list(found.F), list(found.G)


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
