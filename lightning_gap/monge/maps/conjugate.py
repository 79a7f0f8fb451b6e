"""Where a convex potential's conjugate is attained: the inverse of its gradient."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["conjugate_point"]

_HALVINGS = 12
_ENTRIES = 2**23  # of Hessians that are held at once


@torch.no_grad()
def conjugate_point(
    gradient: Callable[[Tensor], Tensor],
    hessian: Callable[[Tensor], Tensor],
    y: Tensor,
    start: Tensor,
    *,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor]:
    r"""Return the points x with :math:`\nabla \psi(x) = y`, where :math:`\langle x, y \rangle - \psi(x)` is greatest.

    Newton's steps for each point, halved until the residual :math:`|\nabla \psi(x) - y|` falls: for a convex function
    with a positive definite Hessian such a step is always found, so that it converges from anywhere. Only points that
    are not there yet are computed.

    Args:
        gradient: The gradient of a strictly convex function, of ``(n, d)`` points.
        hessian: Its ``(n, d, d)`` Hessians.
        y: ``(n, d)`` images.
        start: ``(n, d)`` points to begin with.
        tolerance: Residual, in units of y, that is small enough.
        max_iterations: Most steps.

    Returns:
        ``(n, d)`` points and their ``(n,)`` residuals.
    """
    rows = max(1, _ENTRIES // max(1, y.shape[1]) ** 2)
    parts = [
        _newton(gradient, hessian, target, begin, tolerance, max_iterations)
        for target, begin in zip(y.split(rows), start.split(rows), strict=True)
    ]
    return torch.cat([x for x, _ in parts]), torch.cat([residual for _, residual in parts])


def _newton(
    gradient: Callable[[Tensor], Tensor],
    hessian: Callable[[Tensor], Tensor],
    y: Tensor,
    start: Tensor,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor]:
    x, gap = start.clone(), gradient(start) - y
    residual = gap.norm(dim=-1)
    todo = torch.arange(len(y), device=y.device)
    for _ in range(max_iterations):
        todo = todo[~(residual[todo] <= tolerance)]
        if not len(todo):
            break
        here, off, before = x[todo], gap[todo], residual[todo]
        factor, failed = torch.linalg.cholesky_ex(hessian(here))
        step = torch.cholesky_solve(off[..., None], factor)[..., 0]
        step = torch.where((failed == 0)[:, None] & step.isfinite().all(-1, keepdim=True), step, off)
        share, stuck = torch.ones_like(before), torch.arange(len(todo), device=y.device)
        for _ in range(_HALVINGS):
            tried = here[stuck] - share[stuck, None] * step[stuck]
            found = gradient(tried) - y[todo[stuck]]
            length = found.norm(dim=-1)
            better = length < before[stuck] * (1 - 1e-4 * share[stuck])
            rows = todo[stuck[better]]
            x[rows], gap[rows], residual[rows] = tried[better], found[better], length[better]
            stuck = stuck[~better]
            if not len(stuck):
                break
            share[stuck] /= 2
        todo = todo[~torch.isin(torch.arange(len(todo), device=y.device), stuck)]  # to the last digit
    return x, residual
