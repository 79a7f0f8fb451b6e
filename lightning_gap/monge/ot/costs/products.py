"""Squared distances as matrix products: where these cancel, and what of their digits has to be kept."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_gap.monge.ot.costs.geometry import Fill, Geometry, Gradients, PlanFactors
from lightning_gap.monge.ot.limits import LIMITS
from lightning_gap.precision import full_precision, widest

if TYPE_CHECKING:
    from lightning_gap.monge.ot.costs.base import Cost

__all__ = [
    "MANY_NEAR",
    "NEAR",
    "SquaredGeometry",
    "Squares",
    "accurate",
    "displacements",
    "safe_sqrt",
    "squared_distances",
]

# Squared distances below this share of the points' own squares are formed again, from differences: the product that
# gave them has cancelled all but ten of its digits.
NEAR = 1e-6
# Where so large a share of a block is near, all of it is formed from differences.
MANY_NEAR = 1 / 16


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return ``|x_i - y_j|²`` as ``(..., n, m)`` through one matrix product; where that cancels, from differences."""
    # |x|² - 2xy + |y|² cancels: distances are measured from the middle of the cloud, and in double, where that costs
    # less than a millisecond at n = 1024 and makes float32 distances exact to the last digits.
    dtype = x.dtype
    x, y = accurate(x), accurate(y)
    middle = y.detach().mean(dim=-2, keepdim=True)
    x, y = x - middle, y - middle
    with torch.autocast(x.device.type, enabled=False):
        products = torch.matmul(x, y.mT)
    own = x.square().sum(-1)[..., :, None]
    squared = (own + y.square().sum(-1)[..., None, :] - 2 * products).clamp_min(0)
    # Asking a device which ones are near would stop it, and its float32 samples are as close as double takes them.
    if x.device.type == "cpu" or dtype == x.dtype:
        squared = _from_differences(squared, x, y, 4 * NEAR * own.detach())
    return squared.to(dtype)


def _from_differences(squared: Tensor, x: Tensor, y: Tensor, bound: Tensor) -> Tensor:
    """Return squared distances of which those up to a bound are formed from the differences, differentiably."""
    near = squared.detach() <= bound
    count = int(near.count_nonzero())
    if count == 0:
        return squared
    shape = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    x, y = x.expand(*shape, *x.shape[-2:]), y.expand(*shape, *y.shape[-2:])
    if count <= MANY_NEAR * near.numel():
        *batch, i, j = near.nonzero(as_tuple=True)
        found = (x[(*batch, i)] - y[(*batch, j)]).square().sum(-1)
        return squared.index_put((*batch, i, j), found)
    rows = max(1, LIMITS.cached.on(y.device) // max(1, y.numel()))
    blocks = [(part[..., :, None, :] - y[..., None, :, :]).square().sum(-1) for part in x.split(rows, dim=-2)]
    return torch.cat(blocks, dim=-2)


def displacements(x: Tensor, y: Tensor, plan: Iterable[PlanFactors], need: tuple[bool, bool]) -> Gradients:
    """Return ``Σ_j P_ij (x_i - y_j)`` and ``Σ_i P_ij (y_j - x_i)``."""
    # In double and from the middle of the cloud, so that the differences keep their digits.
    dtype, x, y = x.dtype, accurate(x), accurate(y)
    middle = y.mean(dim=0)
    x, y = x - middle, y - middle
    x_columns, y_columns = (torch.cat([torch.ones_like(p[:, :1]), p], dim=1) for p in (x, y))
    gx = torch.empty_like(x) if need[0] else None
    sources = torch.zeros_like(y_columns)
    height = max(1, LIMITS.cached.on(y.device) // len(y))
    for part in plan:
        w, right = part.w[:, None].to(x.dtype), part.v[:, None] * y_columns
        for start in range(0, len(part.K), height):
            K, some = part.K[start : start + height].to(x.dtype), slice(start, start + height)
            rows = slice(part.rows.start + start, part.rows.start + start + len(K))
            if gx is not None:
                images = _thin_product(K, right)
                gx[rows] = w[some] * (images[:, :1] * x[rows] - images[:, 1:])
            if need[1]:
                sources += _thin_product(K.t(), w[some] * x_columns[rows]).mul_(part.v[:, None])
    gy = (sources[:, :1] * y - sources[:, 1:]).to(dtype) if need[1] else None
    return None if gx is None else gx.to(dtype), gy


def _thin_product(K: Tensor, columns: Tensor) -> Tensor:
    """Return ``K @ columns``."""
    return _matrix_product(K, columns, columns.new_empty(len(K), columns.shape[1]))


def _matrix_product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Write ``left @ right``; on a CPU by NumPy's BLAS, which takes thin products 2 to 10 times faster than torch's."""
    if out.device.type == "cpu":
        with np.errstate(invalid="ignore"):  # of lanes that no result comes from, in some kernels beside an infinity
            np.matmul(left.numpy(), right.numpy(), out=out.numpy())
        return out
    with full_precision(out.device):
        return torch.mm(left, right, out=out)


class Squares:
    """Writes ``offset + scale * |x - y|²`` as scalar products of augmented points."""

    def __init__(
        self,
        y: Tensor,
        offset: Tensor | None = None,
        scale: float = 1.0,
        image: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.image = image or (lambda x: x)
        y = self.image(accurate(y))
        # From the middle of the cloud, so that little cancels.
        self.middle = y.mean(dim=0)
        y = y - self.middle
        squares = y.square().sum(1, keepdim=True)
        self.dtype, self.scale = y.dtype, scale
        last = scale * squares if offset is None else scale * squares + offset[:, None].to(y.dtype)
        self.right = torch.cat([y, torch.ones_like(squares), last], dim=1).mT.contiguous()
        self.squares = squares

    def narrowed(self, dtype: torch.dtype) -> "Squares":
        """Take the product in another dtype, from now on."""
        self.dtype, self.right = dtype, self.right.to(dtype)
        return self

    def centered(self, x: Tensor) -> Tensor:
        """Return images of points, from the middle of the cloud."""
        return self.image(accurate(x)) - self.middle

    def product(self, out: Tensor, x: Tensor) -> Tensor:
        """Write to a matrix of the product's own dtype, from centered points."""
        squares = x.square().sum(1, keepdim=True)
        left = torch.cat([-2 * self.scale * x, self.scale * squares, torch.ones_like(squares)], dim=1).to(self.dtype)
        return _matrix_product(left, self.right, out)

    def __call__(self, out: Tensor, x: Tensor) -> Tensor:
        """Write to a matrix of any dtype."""
        if out.dtype == self.dtype:
            return self.product(out, self.centered(x))
        rows = max(1, LIMITS.cached.on(out.device) // max(1, out.shape[1]))
        block = out.new_empty(min(rows, len(x)), out.shape[1], dtype=self.dtype)
        for start in range(0, len(x), rows):
            part = self.centered(x[start : start + rows])
            out[start : start + rows] = self.product(block[: len(part)], part)
        return out


class SquaredGeometry(Geometry):
    """The matrix of ``scale * |image(x) - image(y)|²``, by products; images are taken in the widest format."""

    by_matrix_product: ClassVar[bool] = True

    def __init__(self, cost: "Cost", scale: float = 1.0, image: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__(cost)
        self.scale, self.image = scale, image

    def filler(self, y: Tensor) -> Fill:
        """Return a function that writes one product of augmented points, taken in double."""
        return Squares(y, None, self.scale, self.image)

    def exponents(self, y: Tensor, G: Tensor, epsilon: float) -> Fill:
        """Return a function that writes one product, in double where float32 would round too much."""
        wide = Squares(y, G, -self.scale / epsilon, self.image)
        spread = float(wide.squares.amax()) * self.scale
        # An exponent is then right to 1e-4 of itself, which a sum over a row averages.
        fine = y.dtype != torch.float32 or torch.finfo(torch.float32).eps * spread <= 1e-4 * epsilon
        return wide.narrowed(y.dtype) if fine else wide


def accurate(x: Tensor) -> Tensor:
    """Return points in the widest format of their device."""
    return x.to(widest(x.device))


def safe_sqrt(squared: Tensor) -> Tensor:
    """Return the square root with gradient 0, rather than infinity, where the argument is 0."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1).sqrt(), 0)
