r"""Ground costs :math:`c(x, y)`, as small frozen classes.

A cost says how dear it is to move a unit of mass from :math:`x` to :math:`y`. Each class knows its matrix over two sets
of samples, its values over pairs, its KeOps formula, and, where :math:`c(x, y) = h(x - y)` with :math:`h` strictly
convex, the gradient of the conjugate :math:`h^*` which structured maps need (Uscidda and Cuturi 2023, section 4).

``"sqeuclidean"`` is :math:`\|x - y\|^2` as in OTT-JAX, POT and SciPy, and not the half of it as in GeomLoss, so that an
:math:`\varepsilon` means the same here and there.
"""

import ast
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cache, lru_cache
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_gap.checks import check_number
from lightning_gap.monge.ot.compiling import eager
from lightning_gap.precision import full_precision, widest

__all__ = [
    "CallableCost",
    "Cosine",
    "Cost",
    "Elastic",
    "Euclidean",
    "Geodesic",
    "Mahalanobis",
    "PNorm",
    "PlanFactors",
    "SqEuclidean",
    "SqPNorm",
    "TranslationInvariantCost",
    "resolve",
]

# Up to this many elements the differences x_i - y_j of one block are formed at once; a GPU wants few and large blocks.
_BLOCK_ELEMENTS, _GPU_BLOCK_ELEMENTS = 1 << 22, 1 << 27
# Numbers of a block that should stay in a CPU's cache.
_CACHE_ELEMENTS = 1 << 18
# Squared distances below this share of the points' own squares are formed again, from differences: the product that
# gave them has cancelled all but ten of its digits.
_NEAR = 1e-6
# Where so large a share of a block is near, all of it is formed from differences.
_MANY_NEAR = 1 / 16


def _block_elements(device: torch.device, cached: bool = False) -> int:
    """Return how many numbers a block has, on a CPU such as stay in its cache if that is asked for."""
    if device.type != "cpu":
        return _GPU_BLOCK_ELEMENTS
    return _CACHE_ELEMENTS if cached else _BLOCK_ELEMENTS


class PlanFactors(NamedTuple):
    """Rows of a plan ``w[:, None] * K * v``; ``K`` and ``C`` may be overwritten.

    Attributes:
        rows: Which rows.
        w: ``(rows,)`` factors.
        K: ``(rows, m)`` matrix.
        v: ``(m,)`` factors.
        C: ``(rows, m)`` costs, where they are at hand.
    """

    rows: slice
    w: Tensor
    K: Tensor
    v: Tensor
    C: Tensor | None


class Cost(ABC):
    """A ground cost between points of :math:`R^d`.

    A new cost is a frozen dataclass that gives ``name`` and :meth:`elementwise`; the rest has defaults which are
    right, and can be replaced by faster forms.
    """

    name: ClassVar[str]

    @abstractmethod
    def elementwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``c(x, y)`` for points that broadcast.

        Args:
            x: ``(..., d)`` points.
            y: ``(..., d)`` points, broadcastable with ``x``.

        Returns:
            ``(...)`` costs, differentiable in both.
        """

    def paired(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the costs of the pairs ``(x_i, y_i)``.

        Args:
            x: ``(..., n, d)`` points.
            y: ``(..., n, d)`` points.

        Returns:
            ``(..., n)`` costs, differentiable in both.
        """
        return self.elementwise(x, y)

    def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the matrix of all costs.

        Args:
            x: ``(..., n, d)`` points.
            y: ``(..., m, d)`` points.

        Returns:
            ``(..., n, m)`` costs, differentiable in both.
        """
        rows = max(1, _block_elements(y.device) // max(1, y.numel()))
        blocks = [self.elementwise(block[..., :, None, :], y[..., None, :, :]) for block in x.split(rows, dim=-2)]
        return torch.cat(blocks, dim=-2)

    def filler(self, y: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function that writes costs to ``y``, having prepared what it can, without a graph.

        Args:
            y: ``(m, d)`` points.

        Returns:
            A function of an ``(n, m)`` matrix to write to and of ``(n, d)`` points, which returns the matrix.
        """

        def fill(out: Tensor, x: Tensor) -> Tensor:
            # Differences are formed of all coordinates: a row of a GPU's block takes d numbers a pair.
            numbers = len(y) if y.device.type == "cpu" else y.numel()
            rows = max(1, _block_elements(y.device, cached=True) // max(1, numbers))
            for start in range(0, len(x), rows):
                with torch.no_grad():
                    out[start : start + rows] = self.pairwise(x[start : start + rows], y)
            return out

        return fill

    def fill(self, out: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Write the matrix of all costs, without a graph and with little memory beside.

        Args:
            out: ``(n, m)`` matrix to write to.
            x: ``(n, d)`` points.
            y: ``(m, d)`` points.

        Returns:
            ``out``.
        """
        return self.filler(y.detach())(out, x.detach())

    def mean(self, x: Tensor, y: Tensor) -> float:
        """Return the mean of all costs ``c(x_i, y_j)``, detached, in blocks of bounded memory.

        Args:
            x: ``(n, d)`` points.
            y: ``(m, d)`` points.
        """
        fill, total = self.filler(y.detach()), 0.0
        for block in x.detach().split(max(1, _block_elements(y.device) // len(y))):
            total += fill(block.new_empty(len(block), len(y)), block).sum(dtype=widest(y.device)).item()
        return total / (len(x) * len(y))

    def std(self, x: Tensor, y: Tensor) -> float:
        """Return the standard deviation of all costs ``c(x_i, y_j)``, detached, in blocks of bounded memory.

        Args:
            x: ``(n, d)`` points.
            y: ``(m, d)`` points.
        """
        fill, mean, total = self.filler(y.detach()), self.mean(x, y), 0.0
        for block in x.detach().split(max(1, _block_elements(y.device) // len(y))):
            costs = fill(block.new_empty(len(block), len(y)), block).to(widest(y.device))
            total += costs.sub_(mean).square_().sum().item()
        return math.sqrt(total / (len(x) * len(y)))

    # Whether ``exponents`` is a matrix product by NumPy, which several threads may take at once.
    by_matrix_product: ClassVar[bool] = False

    def exponents(self, y: Tensor, G: Tensor, epsilon: float) -> Callable[[Tensor, Tensor], Tensor]:
        r"""Return a function that writes :math:`G_j - c(x_i, y_j)/\varepsilon`, without a graph.

        Args:
            y: ``(m, d)`` points.
            G: ``(m,)`` potential.
            epsilon: Regularization, in units of the cost.

        Returns:
            A function of an ``(n, m)`` matrix to write to and of ``(n, d)`` points, which returns the matrix.
        """
        fill = self.filler(y)
        return lambda out, x: torch.sub(G.to(out.dtype), fill(out, x), alpha=1 / epsilon, out=out)

    def plan_gradients(
        self, x: Tensor, y: Tensor, plan: Iterable[PlanFactors], need: tuple[bool, bool] = (True, True)
    ) -> tuple[Tensor | None, Tensor | None]:
        r"""Return the gradients of :math:`\sum_{ij} P_{ij}\, c(x_i, y_j)` with respect to the points.

        Args:
            x: ``(n, d)`` points.
            y: ``(m, d)`` points.
            plan: The plan :math:`P`, block by block.
            need: Which of the two gradients is wanted.

        Returns:
            ``(n, d)`` and ``(m, d)`` gradients, ``None`` where not wanted.
        """
        gx, gy = torch.zeros_like(x), torch.zeros_like(y)
        height = max(1, _block_elements(y.device, cached=True) // max(1, y.numel()))
        for part in plan:
            own, offset = x[part.rows], part.rows.start
            for start in range(0, len(own), height):
                rows = slice(start, min(len(own), start + height))
                with torch.enable_grad():
                    points = own[rows].detach().requires_grad_(), y.detach().requires_grad_()
                    costs = self.pairwise(*points)
                P = part.w[rows, None] * part.K[rows] * part.v
                gx[offset + start : offset + rows.stop], dy = torch.autograd.grad(costs, points, P)
                gy += dy
        return gx if need[0] else None, gy if need[1] else None

    @property
    def symmetric(self) -> bool:
        """Whether ``c(x, y) = c(y, x)``."""
        return True

    def transposed(self) -> "Cost":
        """Return the cost with its arguments exchanged."""
        return self if self.symmetric else _Transposed(self)

    @property
    def keops_formula(self) -> str | None:
        """The cost as a KeOps formula in ``X`` and ``Y``, or ``None`` where KeOps cannot express it."""
        return None

    def embedded(self, points: Tensor) -> "tuple[Cost, Tensor]":
        """Return a cost whose KeOps formula needs no data of its own, and the points between which it is this cost.

        Args:
            points: ``(n, d)`` points.

        Returns:
            A cost, and ``(n, k)`` points, differentiable in the given ones.
        """
        return self, points

    def check_domain(self, name: str, points: Tensor) -> None:  # noqa: B027
        """Raise ``ValueError`` where the cost is not defined at some of the points.

        Args:
            name: The caller's argument, for the message.
            points: ``(..., n, d)`` points.
        """

    def __str__(self) -> str:
        arguments = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))  # type: ignore[arg-type]
        return f"{self.name}({arguments})" if arguments else self.name


class _Transposed(Cost):
    name: ClassVar[str] = "transposed"

    def __init__(self, cost: Cost) -> None:
        self.cost = cost

    def elementwise(self, x: Tensor, y: Tensor) -> Tensor:
        return self.cost.elementwise(y, x)

    def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
        return self.cost.pairwise(y, x).mT


class TranslationInvariantCost(Cost):
    """A cost ``c(x, y) = h(x - y)`` with convex ``h``."""

    @abstractmethod
    def h(self, z: Tensor) -> Tensor:
        """Return ``h(z)``: ``(..., d)`` displacements to ``(...)`` costs."""

    def grad_h_conjugate(self, w: Tensor) -> Tensor:
        r"""Return :math:`\nabla h^*(w)`, the inverse of :math:`\nabla h`.

        Args:
            w: ``(..., d)`` gradients of a potential.

        Returns:
            ``(..., d)`` displacements.

        Raises:
            NotImplementedError: Where ``h`` is not strictly convex, so that no such map exists.
        """
        raise NotImplementedError(f"the cost {self} has no ∇h*: h is not strictly convex")

    def regular_point(self, w: Tensor) -> Tensor:
        r"""Return the point itself, or one near it where the slope of :math:`\nabla h^*` is neither 0 nor infinite.

        A map :math:`x - \nabla h^*(F(x))` takes its slope there while it learns, or it could not leave points where
        :math:`\nabla h^*` is flat. The default is for costs without such points.

        Args:
            w: ``(..., d)`` gradients of a potential.
        """
        return w

    def elementwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``h(x - y)``."""
        return self.h(x - y)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return ``|x_i - y_j|²`` as ``(..., n, m)`` through one matrix product; where that cancels, from differences."""
    # |x|² - 2xy + |y|² cancels: distances are measured from the middle of the cloud, and in double, where that costs
    # less than a millisecond at n = 1024 and makes float32 distances exact to the last digits.
    dtype = x.dtype
    x, y = _accurate(x), _accurate(y)
    middle = y.detach().mean(dim=-2, keepdim=True)
    x, y = x - middle, y - middle
    with torch.autocast(x.device.type, enabled=False):
        products = torch.matmul(x, y.mT)
    own = x.square().sum(-1)[..., :, None]
    squared = (own + y.square().sum(-1)[..., None, :] - 2 * products).clamp_min(0)
    # Asking a device which ones are near would stop it, and its float32 samples are as close as double takes them.
    if x.device.type == "cpu" or dtype == x.dtype:
        squared = _from_differences(squared, x, y, 4 * _NEAR * own.detach())
    return squared.to(dtype)


def _from_differences(squared: Tensor, x: Tensor, y: Tensor, bound: Tensor) -> Tensor:
    """Return squared distances of which those up to a bound are formed from the differences, differentiably."""
    near = squared.detach() <= bound
    count = int(near.count_nonzero())
    if count == 0:
        return squared
    shape = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    x, y = x.expand(*shape, *x.shape[-2:]), y.expand(*shape, *y.shape[-2:])
    if count <= _MANY_NEAR * near.numel():
        *batch, i, j = near.nonzero(as_tuple=True)
        found = (x[(*batch, i)] - y[(*batch, j)]).square().sum(-1)
        return squared.index_put((*batch, i, j), found)
    rows = max(1, _block_elements(y.device, cached=True) // max(1, y.numel()))
    blocks = [(part[..., :, None, :] - y[..., None, :, :]).square().sum(-1) for part in x.split(rows, dim=-2)]
    return torch.cat(blocks, dim=-2)


def _displacements(
    x: Tensor, y: Tensor, plan: Iterable[PlanFactors], need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return ``Σ_j P_ij (x_i - y_j)`` and ``Σ_i P_ij (y_j - x_i)``."""
    # In double and from the middle of the cloud, so that the differences keep their digits.
    dtype, x, y = x.dtype, _accurate(x), _accurate(y)
    middle = y.mean(dim=0)
    x, y = x - middle, y - middle
    x_columns, y_columns = (torch.cat([torch.ones_like(p[:, :1]), p], dim=1) for p in (x, y))
    gx = torch.empty_like(x) if need[0] else None
    sources = torch.zeros_like(y_columns)
    height = max(1, _block_elements(y.device, cached=True) // len(y))
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
        np.matmul(left.numpy(), right.numpy(), out=out.numpy())
        return out
    with full_precision(out.device):
        return torch.mm(left, right, out=out)


class _Squares:
    """Writes ``offset + scale * |x - y|²`` as scalar products of augmented points.

    Args:
        y: ``(m, d)`` points.
        offset: ``(m,)`` numbers, or ``None``.
        scale: Factor of the squares.
        image: What the points are replaced by, in the widest format.
    """

    def __init__(
        self,
        y: Tensor,
        offset: Tensor | None = None,
        scale: float = 1.0,
        image: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.image = image or (lambda x: x)
        y = self.image(_accurate(y))
        # From the middle of the cloud, so that little cancels.
        self.middle = y.mean(dim=0)
        y = y - self.middle
        squares = y.square().sum(1, keepdim=True)
        self.dtype, self.scale = y.dtype, scale
        last = scale * squares if offset is None else scale * squares + offset[:, None].to(y.dtype)
        self.right = torch.cat([y, torch.ones_like(squares), last], dim=1).mT.contiguous()
        self.squares = squares

    def narrowed(self, dtype: torch.dtype) -> "_Squares":
        """Take the product in another dtype, from now on."""
        self.dtype, self.right = dtype, self.right.to(dtype)
        return self

    def centered(self, x: Tensor) -> Tensor:
        """Return images of points, from the middle of the cloud."""
        return self.image(_accurate(x)) - self.middle

    def product(self, out: Tensor, x: Tensor) -> Tensor:
        """Write to a matrix of the product's own dtype, from centered points."""
        squares = x.square().sum(1, keepdim=True)
        left = torch.cat([-2 * self.scale * x, self.scale * squares, torch.ones_like(squares)], dim=1).to(self.dtype)
        return _matrix_product(left, self.right, out)

    def __call__(self, out: Tensor, x: Tensor) -> Tensor:
        """Write to a matrix of any dtype."""
        if out.dtype == self.dtype:
            return self.product(out, self.centered(x))
        rows = max(1, _block_elements(out.device, cached=True) // max(1, out.shape[1]))
        block = out.new_empty(min(rows, len(x)), out.shape[1], dtype=self.dtype)
        for start in range(0, len(x), rows):
            part = self.centered(x[start : start + rows])
            out[start : start + rows] = self.product(block[: len(part)], part)
        return out


def _exponents_of_squares(
    y: Tensor, G: Tensor, epsilon: float, scale: float = 1.0, image: Callable[[Tensor], Tensor] | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function that writes ``G_j - scale * |x_i - y_j|²/ε``, in double where float32 would round too much."""
    wide = _Squares(y, G, -scale / epsilon, image)
    spread = float(wide.squares.amax()) * scale
    # An exponent is then right to 1e-4 of itself, which a sum over a row averages.
    fine = y.dtype != torch.float32 or torch.finfo(torch.float32).eps * spread <= 1e-4 * epsilon
    return wide.narrowed(y.dtype) if fine else wide


def _root(squares: Tensor) -> Tensor:
    """Replace squares by their roots; on a CPU by NumPy's, which take a third of the time of torch's."""
    if squares.device.type == "cpu":
        array = squares.numpy()
        np.clip(array, 0, np.inf, out=array)
        np.sqrt(array, out=array)
        return squares
    return squares.clamp_min_(0).sqrt_()


def _accurate(x: Tensor) -> Tensor:
    """Return points in the widest format of their device."""
    return x.to(widest(x.device))


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Return all Euclidean distances from the differences, without a graph."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _safe_sqrt(squared: Tensor) -> Tensor:
    """Return the square root with gradient 0, rather than infinity, where the argument is 0."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1).sqrt(), 0)


@dataclass(frozen=True)
class SqEuclidean(TranslationInvariantCost):
    r"""Squared Euclidean cost :math:`c(x, y) = \|x - y\|_2^2`.

    Example:
        >>> import torch
        >>> SqEuclidean().pairwise(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor([[25.]])
    """

    name: ClassVar[str] = "sqeuclidean"

    def h(self, z: Tensor) -> Tensor:
        """Return ``|z|²``."""
        return z.square().sum(-1)

    def grad_h_conjugate(self, w: Tensor) -> Tensor:
        """Return ``w / 2``."""
        return w / 2

    def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return all squared distances through one matrix product."""
        return _squared_distances(x, y)

    def filler(self, y: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function that writes one product of augmented points, taken in double."""
        return _Squares(y)

    by_matrix_product: ClassVar[bool] = True

    def exponents(self, y: Tensor, G: Tensor, epsilon: float) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function that writes one product of augmented points."""
        return _exponents_of_squares(y, G, epsilon)

    def mean(self, x: Tensor, y: Tensor) -> float:
        """Return the mean of the squared distances, by their moments."""
        x, y = _accurate(x.detach()), _accurate(y.detach())
        between = (x.mean(0) - y.mean(0)).square().sum()
        return float(x.var(0, correction=0).sum() + y.var(0, correction=0).sum() + between)

    def plan_gradients(
        self, x: Tensor, y: Tensor, plan: Iterable[PlanFactors], need: tuple[bool, bool] = (True, True)
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return twice the differences to the plan's images, through thin matrix products."""
        doubled = (part._replace(w=2 * part.w) for part in plan)
        return _displacements(x, y, doubled, need)

    @property
    def keops_formula(self) -> str:
        """``SqDist(X,Y)``."""
        return "SqDist(X,Y)"


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
    by_matrix_product: ClassVar[bool] = True

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
            image: Tensor = _accurate(x) @ _matrix(self.factor, widest(x.device), x.device).mT
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
        return _squared_distances(self.image(_accurate(x)), self.image(_accurate(y))).to(x.dtype)

    def filler(self, y: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function that writes one product of augmented images."""
        return _Squares(y, image=self.image)

    def exponents(self, y: Tensor, G: Tensor, epsilon: float) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function that writes one product of augmented images."""
        return _exponents_of_squares(y, G, epsilon, image=self.image)

    def plan_gradients(
        self, x: Tensor, y: Tensor, plan: Iterable[PlanFactors], need: tuple[bool, bool] = (True, True)
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the images' gradients, through ``A``."""
        A = _matrix(self.factor, widest(x.device), x.device)
        found = SqEuclidean().plan_gradients(self.image(_accurate(x)), self.image(_accurate(y)), plan, need)
        gx, gy = (None if part is None else (part @ A).to(x.dtype) for part in found)
        return gx, gy

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

    @property
    def keops_formula(self) -> str:
        """``SqDist(X,Y)``, of the images."""
        return "SqDist(X,Y)"


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

    def h(self, z: Tensor) -> Tensor:
        """Return ``|z|``, also where squares would underflow or overflow."""
        return _p_norm(z, 2.0)

    def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return all distances through one matrix product."""
        # The root in double, too, whose range squares need.
        return _safe_sqrt(_squared_distances(_accurate(x), _accurate(y))).to(x.dtype)

    def filler(self, y: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function that writes roots of products in double; distances of near points from differences."""
        if y.device.type != "cpu":
            return lambda out, x: out.copy_(_distances(x, y))
        squares = _Squares(y)
        ys = squares.centered(y)
        rows = max(1, _CACHE_ELEMENTS // max(1, len(y)))

        def fill(out: Tensor, x: Tensor) -> Tensor:
            block = out.new_empty(min(rows, len(x)), len(y), dtype=squares.dtype)
            # A root halves the relative error: it need not be taken in double, unless squares are beyond float32.
            size = float(max(squares.right[-1].amax(), squares.centered(x).square().sum(1).amax()))
            early = not 1e-26 < size < 1e30
            for start in range(0, len(x), rows):
                part = squares.centered(x[start : start + rows])
                found = squares.product(block[: len(part)], part)
                bound = (4 * _NEAR * part.square().sum(1, keepdim=True)).numpy()
                near = np.flatnonzero(found.numpy() <= bound)
                if len(near) > _MANY_NEAR * found.numel():
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
    ) -> tuple[Tensor | None, Tensor | None]:
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

    @property
    def keops_formula(self) -> str:
        """``Norm2(X-Y)``."""
        return "Norm2(X-Y)"


def _pulls(P: Tensor, x: Tensor, y: Tensor, C: Tensor) -> Tensor:
    """Return ``Σ_j P_ij (x_i - y_j) / C_ij``, the differences over the distances; 0 where these are 0."""
    pulls: Tensor = torch.ops.aten._cdist_backward(P, x, y.contiguous(), 2.0, C)
    return pulls


def _rational(value: float) -> str:
    """Return a KeOps constant, which can only be rational."""
    fraction = Fraction(value).limit_denominator(1000)
    if float(fraction) != value:
        fraction = Fraction(value)
    return f"RatCst({fraction.numerator},{fraction.denominator})"


def _keops_power(base: str, exponent: float) -> str:
    """Return a power whose gradient KeOps can derive for a rational exponent, and which is finite at 0."""
    return f"Exp({_rational(exponent)} * Log({base} + RatCst(1,{10**36})))"


@dataclass(frozen=True)
class PNorm(TranslationInvariantCost):
    r"""Power of a p-norm, :math:`c(x, y) = \tfrac1p \|x - y\|_p^p = \tfrac1p \sum_k |x_k - y_k|^p`.

    Args:
        p: Exponent, at least 1.

    Example:
        >>> import torch
        >>> PNorm(3.0).paired(torch.zeros(1, 2), torch.tensor([[1.0, 2.0]]))
        tensor([3.])
    """

    p: float
    name: ClassVar[str] = "pnorm"

    def __post_init__(self) -> None:
        object.__setattr__(self, "p", check_number("p", self.p, least=1))

    def h(self, z: Tensor) -> Tensor:
        """Return ``Σ|z|^p / p``."""
        return z.abs().pow(self.p).sum(-1) / self.p

    def grad_h_conjugate(self, w: Tensor) -> Tensor:
        """Return ``sign(w) |w|^(q-1)`` with ``1/p + 1/q = 1``."""
        if self.p == 1:
            return super().grad_h_conjugate(w)
        return w.sign() * w.abs().pow(1 / (self.p - 1))

    def regular_point(self, w: Tensor) -> Tensor:
        """Return ``w`` with each coordinate's absolute value at least that where the slope is 0.1, or 10 if p > 2."""
        return _at_least(w, _regular_radius(1 / (self.p - 1)))

    @property
    def keops_formula(self) -> str:
        """The sum of powers."""
        return f"({_rational(1 / self.p)} * Sum({_keops_power('Abs(X-Y)', self.p)}))"


@dataclass(frozen=True)
class SqPNorm(TranslationInvariantCost):
    r"""Half a squared p-norm, :math:`c(x, y) = \tfrac12 \|x - y\|_p^2`.

    Args:
        p: Exponent of the norm, above 1.

    Example:
        >>> import torch
        >>> SqPNorm(2.0).paired(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor([12.5000])
    """

    p: float
    name: ClassVar[str] = "sqpnorm"

    def __post_init__(self) -> None:
        object.__setattr__(self, "p", check_number("p", self.p, above=1))

    def h(self, z: Tensor) -> Tensor:
        """Return ``|z|_p² / 2``."""
        return _p_norm(z, self.p).square() / 2

    def grad_h_conjugate(self, w: Tensor) -> Tensor:
        """Return ``|w|_q^(2-q) sign(w) |w|^(q-1)`` with ``1/p + 1/q = 1``."""
        q = self.p / (self.p - 1)
        norm = _p_norm(w, q)[..., None]
        return norm * w.sign() * (w.abs() / torch.where(norm > 0, norm, 1)).pow(q - 1)

    def regular_point(self, w: Tensor) -> Tensor:
        """Return ``w`` with no coordinate far below the largest one, as for :class:`PNorm`."""
        largest = w.abs().amax(-1, keepdim=True)
        return torch.where(largest > 0, _at_least(w, _regular_radius(1 / (self.p - 1)) * largest), 1)

    @property
    def keops_formula(self) -> str:
        """The power of the sum of powers."""
        powers = f"Sum({_keops_power('Abs(X-Y)', self.p)})"
        return f"({_rational(0.5)} * {_keops_power(powers, 2 / self.p)})"


def _regular_radius(power: float) -> float:
    """Return the number at which ``|w|^power`` has slope 0.1 if it is flat at 0, and 10 if it is steep there."""
    # At 0 itself no power's slope is computed right: not even that of the first.
    return max(1e-6, ((0.1 if power > 1 else 10) / power) ** (1 / (power - 1))) if power != 1 else 1e-6


def _at_least(w: Tensor, radius: float | Tensor) -> Tensor:
    """Return ``w`` moved away from 0 to the radius, where it is closer."""
    return torch.where(w.abs() < radius, torch.where(w < 0, -1.0, 1.0).to(w) * radius, w)


def _p_norm(z: Tensor, p: float) -> Tensor:
    """Return ``|z|_p`` over the last dimension, with gradient 0 where it is 0."""
    # Powers of numbers up to 1 neither overflow nor all vanish; the scale cancels, so it needs no gradient.
    scale = z.detach().abs().amax(-1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1)
    powers = (z / scale).abs().pow(p).sum(-1)
    positive = powers > 0
    return torch.where(positive, torch.where(positive, powers, 1).pow(1 / p), 0) * scale[..., 0]


@dataclass(frozen=True)
class Elastic(TranslationInvariantCost):
    r"""Elastic cost :math:`c(x, y) = \tfrac12 \|x - y\|_2^2 + \lambda \|x - y\|_1`, whose maps move few coordinates.

    Args:
        lam: Weight :math:`\lambda \ge 0` of the 1-norm.

    Example:
        >>> import torch
        >>> Elastic(1.0).paired(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor([19.5000])
    """

    lam: float = 1.0
    name: ClassVar[str] = "elastic"

    def __post_init__(self) -> None:
        object.__setattr__(self, "lam", check_number("lam", self.lam, least=0))

    def h(self, z: Tensor) -> Tensor:
        """Return ``|z|²/2 + λ|z|_1``."""
        return z.square().sum(-1) / 2 + self.lam * z.abs().sum(-1)

    def grad_h_conjugate(self, w: Tensor) -> Tensor:
        """Return ``w`` soft-thresholded at λ."""
        return w.sign() * (w.abs() - self.lam).clamp_min(0)

    def regular_point(self, w: Tensor) -> Tensor:
        """Return ``w`` with each coordinate's absolute value just above λ, where the threshold lets it pass."""
        return _at_least(w, 1.001 * self.lam + 1e-6)

    @property
    def keops_formula(self) -> str:
        """Half the squared distance and the sum of absolute values."""
        return f"({_rational(0.5)} * SqDist(X,Y) + {_rational(self.lam)} * Sum(Abs(X-Y)))"


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

    def elementwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return one minus the cosine."""
        return ((_unit(x) - _unit(y)).square().sum(-1) / 2).to(x.dtype)

    def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return one minus all cosines, through one matrix product."""
        return (_squared_distances(_unit(x), _unit(y)) / 2).to(x.dtype)

    by_matrix_product: ClassVar[bool] = True

    def filler(self, y: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function that writes one product of augmented unit vectors."""
        return _Squares(y, None, 0.5, _unit)

    def exponents(self, y: Tensor, G: Tensor, epsilon: float) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function that writes one product of augmented unit vectors."""
        return _exponents_of_squares(y, G, epsilon, 0.5, _unit)

    @property
    def keops_formula(self) -> str:
        """Half the squared distance of the normalized vectors."""
        return f"({_rational(0.5)} * SqDist(Normalize(X),Normalize(Y)))"

    def check_domain(self, name: str, points: Tensor) -> None:
        """Refuse zero vectors."""
        zero = ~(points.detach() != 0).any(-1)
        if bool(zero.any()):
            raise ValueError(
                f"{name} has {int(zero.sum())} zero vectors (first at row {_first(zero)}), "
                "which have no cosine: remove them, or shift the data"
            )


def _unit(x: Tensor) -> Tensor:
    x = _accurate(x)
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
    _TOLERANCE: ClassVar[float] = 1e-3

    def elementwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the angle."""
        chord = _safe_sqrt((x - y).square().sum(-1))
        return 2 * torch.atan2(chord, _safe_sqrt((x + y).square().sum(-1)))

    def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return all angles through two matrix products."""
        return 2 * torch.atan2(_safe_sqrt(_squared_distances(x, y)), _safe_sqrt(_squared_distances(x, -y)))

    @property
    def keops_formula(self) -> str:
        """Twice the angle of the half chords."""
        return "(IntCst(2) * Atan2(Norm2(X-Y),Norm2(X+Y)))"

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


@dataclass(frozen=True)
class CallableCost(Cost):
    """A cost given as a function.

    Args:
        function: Takes two broadcastable ``(..., d)`` tensors and returns ``(...)`` costs, differentiable in both.

    Example:
        >>> import torch
        >>> cost = CallableCost(lambda x, y: (x - y).abs().amax(-1))
        >>> cost.pairwise(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor([[4.]])
    """

    function: Callable[[Tensor, Tensor], Tensor]
    name: ClassVar[str] = "callable"

    @property
    def symmetric(self) -> bool:
        """Nobody knows."""
        return False

    def elementwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the function's values, checked for their shape."""
        value = self.function(x, y)
        expected = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
        if not isinstance(value, Tensor) or value.shape != expected:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"the cost function returned {got} for points of shapes {tuple(x.shape)} and {tuple(y.shape)}: "
                f"it must reduce the last dimension only, and return {tuple(expected)}"
            )
        return value

    def __str__(self) -> str:
        return f"callable({getattr(self.function, '__qualname__', repr(self.function))})"


_BY_NAME: dict[str, type[Cost]] = {
    cls.name: cls for cls in (SqEuclidean, Euclidean, Mahalanobis, PNorm, SqPNorm, Elastic, Cosine, Geodesic)
}


def resolve(cost: "str | Cost | Callable[[Tensor, Tensor], Tensor]") -> Cost:
    """Return the cost that is meant.

    Args:
        cost: An instance; a name such as ``"euclidean"``, or ``"pnorm(p=1.5)"`` with arguments (what ``str(cost)``
            gives); or a function of two broadcastable ``(..., d)`` tensors.

    Raises:
        ValueError: The name or its arguments are not known.
        TypeError: It is none of these.

    Example:
        >>> resolve("pnorm(p=1.5)")
        PNorm(p=1.5)
    """
    if isinstance(cost, Cost):
        return cost
    if isinstance(cost, str):
        return _parse(cost)
    if isinstance(cost, type):
        raise TypeError(f"cost must be an instance, got the class {cost.__name__}: write {cost.__name__}(...)")
    if callable(cost):
        return CallableCost(cost)
    raise TypeError(f"cost must be a name, a Cost or a function of two tensors, got {cost!r}")


@eager
@cache
def _parse(text: str) -> Cost:
    name, _, arguments = text.strip().partition("(")
    cls = _BY_NAME.get(name.strip().lower())
    if cls is None:
        raise ValueError(f"unknown cost {text!r}: choose one of {', '.join(sorted(_BY_NAME))}, or pass a function")
    try:
        call = ast.parse(f"f({arguments or ')'}", mode="eval").body
        assert isinstance(call, ast.Call)
        args = [ast.literal_eval(a) for a in call.args]
        kwargs = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        inspect.signature(cls).bind(*args, **kwargs)
    except (SyntaxError, ValueError, TypeError, AssertionError) as error:
        signature = str(inspect.signature(cls)).split(" ->")[0]
        raise ValueError(f"cost {text!r} cannot be read: {name} takes {signature}") from error
    return cls(*args, **kwargs)
