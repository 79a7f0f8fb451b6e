r"""Entropic optimal transport between samples, one entry with several solvers behind it.

.. math::
    OT_\varepsilon(\alpha, \beta) = \min_{P \in \Pi(a, b)} \langle P, C \rangle
        + \varepsilon\, KL(P \,|\, a \otimes b)

Gradients are those of the envelope theorem, :math:`\partial_{x_i} OT_\varepsilon = \sum_j P_{ij} \nabla_1 c(x_i, y_j)`,
never back-propagated through iterations.
"""

import io
from contextlib import redirect_stdout
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_gap.monge.costs import Cost

__all__ = ["Solver", "choose_solver", "mean_cost", "samples_loss"]

Solver = Literal["auto", "tensorized", "online"]

# GeomLoss takes dense matrices up to here in its own "auto"; beyond, they outgrow memory and caches.
_DENSE_PAIRS = 5_000**2
# The ratio of successive epsilons in GeomLoss's annealing: .5, its default, leaves gradients 20 to 70 % off.
_SCALING = 0.9
_BLOCK_PAIRS = 1 << 24


def choose_solver(solver: str, cost: Cost, n: int, m: int) -> Literal["tensorized", "online"]:
    """Return the solver for a problem of ``n`` times ``m`` pairs.

    Args:
        solver: ``"auto"``, or a solver's name.
        cost: The ground cost.
        n: Number of source samples.
        m: Number of target samples.

    Raises:
        ValueError: The name is unknown, or the solver cannot take this cost.
    """
    if solver not in get_args(Solver):
        raise ValueError(f"solver must be one of {', '.join(get_args(Solver))}, got {solver!r}")
    if solver == "auto":
        solver = "tensorized" if n * m <= _DENSE_PAIRS or cost.keops_formula is None else "online"
    if solver == "online" and cost.keops_formula is None:
        raise ValueError(f"solver='online' needs a KeOps formula, which {cost} has not: use solver='tensorized'")
    return "tensorized" if solver == "tensorized" else "online"


def mean_cost(x: Tensor, y: Tensor, cost: Cost) -> float:
    """Return the mean of all costs ``c(x_i, y_j)``, detached, in blocks of bounded memory.

    Args:
        x: ``(n, d)`` samples.
        y: ``(m, d)`` samples.
        cost: The ground cost.
    """
    with torch.no_grad():
        rows = max(1, _BLOCK_PAIRS // len(y))
        total = sum(cost.pairwise(block, y).sum(dtype=torch.float64).item() for block in x.split(rows))
    return total / (len(x) * len(y))


def samples_loss(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    cost: Cost,
    epsilon: float,
    reach: float | None = None,
    debias: bool,
    solver: Literal["tensorized", "online"],
) -> Tensor:
    r"""Return :math:`OT_\varepsilon`, or its debiased divergence, by GeomLoss.

    Args:
        x: ``(n, d)`` samples.
        y: ``(m, d)`` samples.
        a: ``(n,)`` weights.
        b: ``(m,)`` weights.
        cost: The ground cost.
        epsilon: Regularization, in units of the cost.
        reach: Strength of the soft marginal constraints, in units of the cost; ``None`` for balanced transport.
        debias: Whether to subtract the self terms, half each.
        solver: ``"tensorized"`` for dense matrices, ``"online"`` for KeOps.

    Returns:
        A scalar, differentiable in samples and weights.
    """
    SamplesLoss = _samples_loss_class()
    # p = 1 makes GeomLoss's epsilon equal to its blur, whatever the cost: all are in units of the cost here.
    loss = SamplesLoss(
        "sinkhorn",
        p=1,
        blur=epsilon,
        reach=reach,
        diameter=max(_largest_cost(x, y, cost), epsilon),
        scaling=_SCALING,
        cost=cost.pairwise if solver == "tensorized" else cost.keops_formula,
        debias=debias,
        backend=solver,
    )
    if solver == "online":
        _require_compiler()
    # GeomLoss leaves gradients switched on, also under the caller's no_grad.
    with torch.autocast(x.device.type, enabled=False), torch.set_grad_enabled(torch.is_grad_enabled()):
        return loss(a, x, b, y).reshape(())  # type: ignore[no-any-return]


def _largest_cost(x: Tensor, y: Tensor, cost: Cost) -> float:
    """Return a rough upper bound of the costs, from which the annealing of epsilon starts."""
    with torch.no_grad():
        both = torch.cat([x, y]).detach()
        return 2 * float(cost.pairwise(both[:: max(1, len(both) // 256)], both[:: max(1, len(both) // 255)]).max())


@cache
def _samples_loss_class() -> Any:
    # KeOps prints a notice on import where there is no CUDA: nothing the caller did, or can change.
    with redirect_stdout(io.StringIO()):
        from geomloss import SamplesLoss
    return SamplesLoss


@cache
def _require_compiler() -> None:
    from shutil import which

    if not torch.cuda.is_available() and which("g++") is None and which("clang++") is None:
        raise RuntimeError("solver='online' compiles KeOps formulas: install g++, or use solver='tensorized'")
