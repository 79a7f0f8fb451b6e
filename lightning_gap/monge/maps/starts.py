"""Where a map starts: at the identity, at the map between means or Gaussians, or at the images of a transport plan."""

from typing import Literal

from torch import Tensor

from lightning_gap.monge.ot.gaussian import gaussian_map
from lightning_gap.monge.ot.solve import optimal_transport
from lightning_gap.monge.ot.subsets import fixed_rows

__all__ = ["BrenierStart", "Start", "affine_start", "plan_start"]

Start = Literal["identity", "mean", "gaussian"]
BrenierStart = Literal["identity", "gaussian", "plan"]

_PLAN_TOLERANCE = 1e-2


def affine_start(start: str, source: Tensor, target: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return A and b of the map ``A x + b`` to start at; A is ``None`` for the translation between the means."""
    if start == "mean":
        return None, target.double().mean(0) - source.double().mean(0)
    return gaussian_map(source, target, shrinkage="auto")


def plan_start(source: Tensor, target: Tensor, *, relative_epsilon: float, most: int) -> tuple[Tensor, Tensor]:
    """Return samples of the source, and their images by the barycentric projection of an entropic plan."""
    x, y = (_some(samples, most) for samples in (source, target))
    plan = optimal_transport(x, y, relative_epsilon=relative_epsilon, tolerance=_PLAN_TOLERANCE)
    return x, plan.barycentric_projection()


def _some(samples: Tensor, most: int) -> Tensor:
    rows = fixed_rows(len(samples), most)
    return samples if rows is None else samples[rows.to(samples.device)]
