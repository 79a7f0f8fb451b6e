"""Exact optimal transport between samples: an assignment where it is one, a linear program else."""

import numpy as np
import torch
from torch import Tensor

__all__ = ["exact_plan"]


def exact_plan(C: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return an optimal plan as its non-zero entries.

    Equal numbers of equally weighted samples are an assignment problem, solved by SciPy's
    ``linear_sum_assignment`` (Crouse 2016); it is quick where the identity is nearly optimal, as for a trained map.
    Other problems need POT's network simplex.

    Args:
        C: ``(n, m)`` costs.
        a: ``(n,)`` weights of the rows.
        b: ``(m,)`` weights of the columns.

    Returns:
        ``(k,)`` rows, columns and masses of the entries.

    Raises:
        ImportError: The problem is no assignment, and POT is not installed.
    """
    from scipy.optimize import linear_sum_assignment

    costs = C.detach().to("cpu", torch.float64).numpy()
    n, m = costs.shape
    if n == m and bool(((a - 1 / n).abs() < 1e-6 / n).all() and ((b - 1 / n).abs() < 1e-6 / n).all()):
        rows, columns = linear_sum_assignment(costs)
        masses = np.full(n, 1 / n)
    else:
        try:
            import ot
        except ImportError as error:
            raise ImportError(
                f"exact transport of {n} to {m} samples with these weights is a linear program: "
                "pip install 'lightning_gap[exact]', or use equal numbers without weights"
            ) from error
        weights = [t.detach().to("cpu", torch.float64).numpy() for t in (a, b)]
        plan = ot.emd(*(w / w.sum() for w in weights), costs, numItermax=10_000_000)
        rows, columns = np.nonzero(plan)
        masses = plan[rows, columns]
    return (
        torch.from_numpy(rows).to(C.device),
        torch.from_numpy(columns).to(C.device),
        torch.from_numpy(masses).to(C),
    )
