"""Costs of Euclidean distances: squared, after a linear map, and the distance itself."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_gap.monge.ot.costs.base import Cost, TranslationInvariantCost
from lightning_gap.monge.ot.costs.formula import SQUARES, CostFormula
from lightning_gap.monge.ot.costs.geometry import Fill, Geometry, Gradients, PlanFactors
from lightning_gap.monge.ot.costs.norms import p_norm
from lightning_gap.monge.ot.costs.products import (
    MANY_NEAR,
    NEAR,
    SquaredGeometry,
    Squares,
    accurate,
    displacements,
    safe_sqrt,
    squared_distances,
)
from lightning_gap.monge.ot.limits import LIMITS
from lightning_gap.precision import widest
from lightning_gap.trainer.internals.of_torch import distances_backward

__all__ = ["Euclidean", "Mahalanobis", "SqEuclidean"]


@dataclass(frozen=True)
class SqEuclidean(TranslationInvariantCost):
    r"""Squared Euclidean cost :math:`c(x, y) = \|x - y\|_2^2`.

    Example:
        >>> import torch
        >>> SqEuclidean().pairwise(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor([[25.]])
    """

    name: ClassVar[str] = "sqeuclidean"
    keops_formula = "SqDist(X,Y)"
    formula = SQUARES

    def h(self, z: Tensor) -> Tensor:
        """Return ``|z|²``."""
        return z.square().sum(-1)

    def grad_h_conjugate(self, w: Tensor) -> Tensor:
        """Return ``w / 2``."""
        return w / 2

    def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return all squared distances through one matrix product."""
        return squared_distances(x, y)

    @property
    def geometry(self) -> Geometry:
        """Products of augmented points."""
        return _SqEuclideanGeometry(self)


class _SqEuclideanGeometry(SquaredGeometry):
    def mean(self, x: Tensor, y: Tensor) -> float:
        """Return the mean of the squared distances, by their moments."""
        x, y = accurate(x.detach()), accurate(y.detach())
        between = (x.mean(0) - y.mean(0)).square().sum()
        return float(x.var(0, correction=0).sum() + y.var(0, correction=0).sum() + between)

    def plan_gradients(
        self, x: Tensor, y: Tensor, plan: Iterable[PlanFactors], need: tuple[bool, bool] = (True, True)
    ) -> Gradients:
        """Return twice the differences to the plan's images, through thin matrix products."""
        doubled = (part._replace(w=2 * part.w) for part in plan)
        return displacements(x, y, doubled, need)


@dataclass(frozen=True)
class Mahalanobis(TranslationInvariantCost):
    r"""Squared distance after a linear map, :math:`c(x, y) = \|A (x - y)\|_2^2`; of low rank where A has few rows.

    With :math:`A^\top A = \Sigma^{-1}` it is the squared Mahalanobis distance of the covariance :math:`\Sigma`.

    Args:
        factor: ``(k, d)`` matrix :math:`A`: a tensor, an array, or nested sequences; kept as nested tuples.

    Example:
        >>> import torch
        >>> Mahalanobis([[2.0, 0.0]]).paired(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor([36.])
    """

    factor: Any
    name: ClassVar[str] = "mahalanobis"
    keops_formula = "SqDist(X,Y)"  # of the images

    def __post_init__(self) -> None:
        if isinstance(self.factor, Tensor) and self.factor.requires_grad:
            raise ValueError(
                "factor is kept as numbers, and would learn nothing: give factor.detach(), or as the cost a function "
                "such as lambda x, y: ((x - y) @ factor.T).square().sum(-1)"
            )
        try:
            rows = tuple(tuple(float(number) for number in row) for row in self.factor)
        except (TypeError, ValueError):
            rows = ()
        if not rows or not rows[0] or len({len(row) for row in rows}) > 1 or not all(map(math.isfinite, chain(*rows))):
            raise ValueError(f"factor must be a (k, d) matrix of finite numbers, got {self.factor!r}")
        object.__setattr__(self, "factor", rows)

    def image(self, x: Tensor) -> Tensor:
        """Return ``A x``: ``(..., d)`` points to ``(..., k)`` points."""
        # In the widest format: float32 products are TensorFloat-32's where a user lets torch take it.
        with torch.autocast(x.device.type, enabled=False):
            image: Tensor = accurate(x) @ _matrix(self.factor, widest(x.device), x.device).mT
            return image.to(x.dtype)

    def h(self, z: Tensor) -> Tensor:
        """Return ``|Az|²``."""
        return self.image(z).square().sum(-1)

    def grad_h_conjugate(self, w: Tensor) -> Tensor:
        """Return ``(AᵀA)⁻¹ w / 2``; there is none where A has no full column rank."""
        A = _matrix(self.factor, widest(w.device), w.device)
        if int(torch.linalg.matrix_rank(A)) < A.shape[1]:
            return super().grad_h_conjugate(w)
        inverse: Tensor = torch.linalg.inv(A.mT @ A) / 2
        return w @ inverse.to(w.dtype)

    def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return all squared distances of the images through one matrix product."""
        return squared_distances(self.image(accurate(x)), self.image(accurate(y))).to(x.dtype)

    @property
    def formula(self) -> CostFormula:
        """Squared distances of the images."""
        return SQUARES._replace(image=self.image)

    @property
    def geometry(self) -> Geometry:
        """Products of augmented images."""
        return _MahalanobisGeometry(self)

    def check_domain(self, name: str, points: Tensor) -> None:
        """Refuse points of another dimension."""
        if points.shape[-1] != len(self.factor[0]):
            raise ValueError(
                f"{name} has dimension {points.shape[-1]}, but the factor of the mahalanobis cost has "
                f"{len(self.factor[0])} columns: they must agree"
            )

    def embedded(self, points: Tensor) -> "tuple[Cost, Tensor]":
        """Return the squared Euclidean cost, and the images."""
        return SqEuclidean(), self.image(points)


class _MahalanobisGeometry(SquaredGeometry):
    def __init__(self, cost: Mahalanobis) -> None:
        super().__init__(cost, image=cost.image)
        self.linear = cost

    def plan_gradients(
        self, x: Tensor, y: Tensor, plan: Iterable[PlanFactors], need: tuple[bool, bool] = (True, True)
    ) -> Gradients:
        """Return the images' gradients, through ``A``."""
        A = _matrix(self.linear.factor, widest(x.device), x.device)
        x_images, y_images = (self.linear.image(accurate(points)) for points in (x, y))
        found = SqEuclidean().geometry.plan_gradients(x_images, y_images, plan, need)
        gx, gy = (None if part is None else (part @ A).to(x.dtype) for part in found)
        return gx, gy


@lru_cache(maxsize=32)
def _matrix(factor: tuple[tuple[float, ...], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(factor, dtype=dtype, device=device)


@dataclass(frozen=True)
class Euclidean(TranslationInvariantCost):
    r"""Euclidean cost :math:`c(x, y) = \|x - y\|_2`, Monge's own; its gradient at :math:`x = y` is 0.

    Example:
        >>> import torch
        >>> Euclidean().pairwise(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor([[5.]])
    """

    name: ClassVar[str] = "euclidean"
    keops_formula = "Norm2(X-Y)"
    formula = SQUARES._replace(outer="root(s)", outer_slope="inverse(2 * root(s))")

    def h(self, z: Tensor) -> Tensor:
        """Return ``|z|``, also where squares would underflow or overflow."""
        return p_norm(z, 2.0)

    def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return all distances through one matrix product."""
        # The root in double, too, whose range squares need.
        return safe_sqrt(squared_distances(accurate(x), accurate(y))).to(x.dtype)

    @property
    def geometry(self) -> Geometry:
        """Roots of products, or of differences where points are near."""
        return _EuclideanGeometry(self)


class _EuclideanGeometry(Geometry):
    def filler(self, y: Tensor) -> Fill:
        """Return a function that writes roots of products in double; distances of near points from differences."""
        if y.device.type != "cpu":
            return lambda out, x: out.copy_(_distances(x, y))
        squares = Squares(y)
        ys = squares.centered(y)
        rows = max(1, LIMITS.cached.cpu // max(1, len(y)))

        def fill(out: Tensor, x: Tensor) -> Tensor:
            block = out.new_empty(min(rows, len(x)), len(y), dtype=squares.dtype)
            # A root halves the relative error: it need not be taken in double, unless squares are beyond float32.
            size = float(max(squares.right[-1].amax(), squares.centered(x).square().sum(1).amax()))
            early = not 1e-26 < size < 1e30
            for start in range(0, len(x), rows):
                part = squares.centered(x[start : start + rows])
                found = squares.product(block[: len(part)], part)
                bound = (4 * NEAR * part.square().sum(1, keepdim=True)).numpy()
                near = np.flatnonzero(found.numpy() <= bound)
                if len(near) > MANY_NEAR * found.numel():
                    found = _distances(part, ys)
                    out[start : start + rows] = found if early else found.square_()
                    continue
                if len(near):
                    i, j = (torch.from_numpy(index) for index in np.divmod(near, len(ys)))
                    found.view(-1)[torch.from_numpy(near)] = (part[i] - ys[j]).square().sum(1)
                out[start : start + rows] = _root(found) if early else found
            return out if early else _root(out)

        return fill

    def plan_gradients(
        self, x: Tensor, y: Tensor, plan: Iterable[PlanFactors], need: tuple[bool, bool] = (True, True)
    ) -> Gradients:
        """Return the sums of unit vectors, each from its difference; points that coincide pull nowhere."""
        fill = self.filler(y)
        gx = torch.zeros_like(x) if need[0] else None
        gy = torch.zeros_like(y) if need[1] else None
        for part in plan:
            own = x[part.rows].contiguous()
            C = fill(torch.empty_like(part.K), own) if part.C is None else part.C
            P = part.K.mul_(part.w[:, None]).mul_(part.v)
            if gx is not None:
                gx[part.rows] = _pulls(P, own, y, C)
            if gy is not None:
                gy += _pulls(P.t().contiguous(), y.contiguous(), own, C.t().contiguous())
        return gx, gy


def _pulls(P: Tensor, x: Tensor, y: Tensor, C: Tensor) -> Tensor:
    """Return ``Σ_j P_ij (x_i - y_j) / C_ij``, the differences over the distances; 0 where these are 0."""
    pulls: Tensor = distances_backward(P, x, y.contiguous(), 2.0, C)
    return pulls


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Return all Euclidean distances from the differences, without a graph."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _root(squares: Tensor) -> Tensor:
    """Replace squares by their roots; on a CPU by NumPy's, which take a third of the time of torch's."""
    if squares.device.type == "cpu":
        array = squares.numpy()
        np.clip(array, 0, np.inf, out=array)
        np.sqrt(array, out=array)
        return squares
    return squares.clamp_min_(0).sqrt_()
