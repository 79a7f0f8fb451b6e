"""What a ground cost is."""

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import ClassVar

import torch
from torch import Tensor

from lightning_gap.monge.ot.costs.formula import CostFormula
from lightning_gap.monge.ot.costs.geometry import Geometry
from lightning_gap.monge.ot.limits import LIMITS

__all__ = ["Cost", "TranslationInvariantCost"]


class Cost(ABC):
    """A ground cost between points of :math:`R^d`.

    A new cost is a frozen dataclass that gives ``name`` and :meth:`elementwise`; the rest has defaults which are
    right, and can be replaced by faster forms, as :attr:`geometry` by what solvers ask most.
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
        rows = max(1, LIMITS.differences.on(y.device) // max(1, y.numel()))
        blocks = [self.elementwise(block[..., :, None, :], y[..., None, :, :]) for block in x.split(rows, dim=-2)]
        return torch.cat(blocks, dim=-2)

    def mean(self, x: Tensor, y: Tensor) -> float:
        """Return the mean of all costs ``c(x_i, y_j)``, detached, in blocks of bounded memory.

        Args:
            x: ``(n, d)`` points.
            y: ``(m, d)`` points.
        """
        return self.geometry.mean(x, y)

    @property
    def geometry(self) -> Geometry:
        """How solvers take the matrix of this cost."""
        return Geometry(self)

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

    @property
    def formula(self) -> CostFormula | None:
        """The cost as expressions for the solver ``"fused"``, or ``None`` where these cannot express it."""
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
