"""Costs of angles: between vectors, and on the unit sphere."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_gap.monge.ot.costs.base import Cost
from lightning_gap.monge.ot.costs.formula import SQUARES, CostFormula
from lightning_gap.monge.ot.costs.geometry import Geometry
from lightning_gap.monge.ot.costs.products import SquaredGeometry, accurate, safe_sqrt, squared_distances

__all__ = ["Cosine", "Geodesic"]


@dataclass(frozen=True)
class Cosine(Cost):
    r"""Cosine cost :math:`c(x, y) = 1 - \langle x, y \rangle / (\|x\| \|y\|)`; zero vectors are refused.

    Computed as half the squared distance of the unit vectors, which keeps its digits where they are close.

    Example:
        >>> import torch
        >>> Cosine().paired(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([1.])
    """

    name: ClassVar[str] = "cosine"
    keops_formula = "(RatCst(1,2) * SqDist(Normalize(X),Normalize(Y)))"

    def elementwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return one minus the cosine."""
        return ((_unit(x) - _unit(y)).square().sum(-1) / 2).to(x.dtype)

    def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return one minus all cosines, through one matrix product."""
        return (squared_distances(_unit(x), _unit(y)) / 2).to(x.dtype)

    @property
    def formula(self) -> CostFormula:
        """Half the squared distances of the unit vectors."""
        return SQUARES._replace(scale=0.5, image=_unit)

    @property
    def geometry(self) -> Geometry:
        """Products of augmented unit vectors."""
        return SquaredGeometry(self, 0.5, _unit)

    def check_domain(self, name: str, points: Tensor) -> None:
        """Refuse zero vectors."""
        zero = ~(points.detach() != 0).any(-1)
        if bool(zero.any()):
            raise ValueError(
                f"{name} has {int(zero.sum())} zero vectors (first at row {_first(zero)}), "
                "which have no cosine: remove them, or shift the data"
            )


def _unit(x: Tensor) -> Tensor:
    x = accurate(x)
    norm: Tensor = vector_norm(x, dim=-1, keepdim=True)
    return x / norm


@dataclass(frozen=True)
class Geodesic(Cost):
    r"""Geodesic distance on the unit sphere, :math:`c(x, y) = \arccos \langle x, y \rangle`.

    Computed as :math:`2\,\mathrm{atan2}(\|x - y\|, \|x + y\|)`, which keeps its digits, and a finite gradient, for
    points that coincide or are antipodal. Points off the sphere are refused.

    Example:
        >>> import torch
        >>> Geodesic().paired(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor([1.5708])
    """

    name: ClassVar[str] = "geodesic"
    keops_formula = "(IntCst(2) * Atan2(Norm2(X-Y),Norm2(X+Y)))"
    _TOLERANCE: ClassVar[float] = 1e-3

    @property
    def formula(self) -> CostFormula:
        """Angles by the chords of unit vectors: two arcsines of half of them."""
        slope = "inverse(root(s * absolute(4 - s)))"
        return SQUARES._replace(outer="2 * arcsine(root(s) / 2)", outer_slope=slope, image=_unit, double=True)

    def elementwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the angle."""
        chord = safe_sqrt((x - y).square().sum(-1))
        return 2 * torch.atan2(chord, safe_sqrt((x + y).square().sum(-1)))

    def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return all angles through two matrix products."""
        return 2 * torch.atan2(safe_sqrt(squared_distances(x, y)), safe_sqrt(squared_distances(x, -y)))

    def check_domain(self, name: str, points: Tensor) -> None:
        """Refuse points off the unit sphere."""
        off = (vector_norm(points.detach(), dim=-1) - 1).abs() > self._TOLERANCE
        if bool(off.any()):
            raise ValueError(
                f"{name} has {int(off.sum())} points off the unit sphere (first at row {_first(off)}): "
                f"divide the samples by their norm"
            )


def _first(mask: Tensor) -> int:
    """Return the index of the first true row, counted over the last dimension."""
    return int(mask.nonzero()[0][-1])
