r"""What a module adds to each example's gradient of one parameter, kept as factors, and the squared norms of it.

A parameter's gradient is a sum over examples i of :math:`\sum_t \delta_{it} x_{it}^T`. Of a group g of examples it has

.. math:: \Big\|\sum_{i \in g} \sum_t \delta_{it} x_{it}^T\Big\|^2
    = \langle X_g X_g^T, \Delta_g \Delta_g^T \rangle, \qquad X_g = (x_{it})_{i \in g, t},

or the norm of the gradient itself, formed for the group: whichever takes fewer operations.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from lightning_gap.regime.noise_sources.groups import Block, Groups

__all__ = ["Contribution", "Factors", "Lookups", "Sums", "group_squares", "wide"]


def wide(values: Tensor) -> Tensor:
    """Return values in at least single precision, in which squares do not overflow."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


class Contribution(ABC):
    """What one call of a module adds to the gradients of one parameter."""

    @abstractmethod
    def joined(self, others: Sequence[Any]) -> "Contribution":
        """Return the sum with others of the same kind."""

    @abstractmethod
    def squares(self, groups: Groups) -> Tensor:
        """Return the squared norm of each group's sum, (groups,)."""

    @abstractmethod
    def against(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the inner product of the sum over all examples with the matrix of ``rows`` times ``columns``."""


@dataclass(frozen=True)
class Sums(Contribution):
    """Gradients of examples as they are, (examples, p): of biases, and of scales of normalization."""

    gradients: Tensor

    def joined(self, others: Sequence["Sums"]) -> "Sums":
        """Add the gradients."""
        return Sums(torch.stack([self.gradients, *(other.gradients for other in others)]).sum(0))

    def squares(self, groups: Groups) -> Tensor:
        """Add within groups, then square."""
        found = []
        for block, first, last in groups.chunks(lambda size: size * self.gradients.shape[1]):
            taken = block.take(self.gradients, first, last).unflatten(0, (last - first, block.size))
            found.append(torch.linalg.vector_norm(taken.sum(1), dim=1).square())
        return torch.cat(found)

    def against(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Weigh the sum of all."""
        return torch.dot(self.gradients.sum(0), torch.outer(rows, columns).flatten())


@dataclass(frozen=True)
class _Factor:
    """Inputs and gradients of outputs, and what makes of some examples' (b, parts, t, m) and (b, parts, t, n)."""

    inputs: Tensor
    outputs: Tensor
    expand: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    terms: int  # t
    form: Callable[[Tensor, Tensor, int], Tensor] | None

    def formed(self, block: Block, first: int, last: int) -> Tensor:
        """Return the gradients of some groups, (groups, parameter's elements)."""
        if self.form is None:
            x, delta = self.chunk(block, first, last)
            return (delta.transpose(-1, -2) @ x).flatten(1)
        x, delta = (wide(block.take(values, first, last)) for values in (self.inputs, self.outputs))
        return self.form(x, delta, last - first)

    def chunk(self, block: Block, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return the factors of some groups, (groups, parts, size of a group times t, m or n)."""
        taken = (wide(block.take(values, first, last)) for values in (self.inputs, self.outputs))
        x, delta = self.expand(*taken)
        if block.size == 1:
            return x, delta
        x, delta = (f.unflatten(0, (last - first, block.size)).movedim(1, 2).flatten(2, 3) for f in (x, delta))
        return x, delta


@dataclass(frozen=True)
class Factors(Contribution):
    r"""Gradients :math:`\sum_t \delta_t x_t^T` of (parts · n, m): of linear layers, and of convolutions by patches."""

    factors: tuple[_Factor, ...]
    parts: int
    width: int  # m
    height: int  # n

    @classmethod
    def of(
        cls,
        inputs: Tensor,
        outputs: Tensor,
        expand: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        *,
        terms: int,
        width: int,
        height: int,
        parts: int = 1,
        form: Callable[[Tensor, Tensor, int], Tensor] | None = None,
    ) -> "Factors":
        """Return the contribution of one call.

        Args:
            inputs: (examples, ...).
            outputs: The gradients of the outputs, (examples, ...).
            expand: Makes (b, parts, t, m) and (b, parts, t, n) of b examples of both.
            terms: t.
            width: m.
            height: n.
            parts: Of a convolution's channels that do not meet.
            form: Makes the gradients of so many groups at once, (groups, parts · n · m), where there is a faster way
                than by the expanded factors.
        """
        return cls((_Factor(inputs, outputs, expand, terms, form),), parts, width, height)

    def joined(self, others: Sequence["Factors"]) -> "Factors":
        """Put the terms after each other."""
        every = (self, *others)
        return Factors(tuple(f for each in every for f in each.factors), self.parts, self.width, self.height)

    @property
    def _terms(self) -> int:
        return sum(factor.terms for factor in self.factors)

    def chunk(self, block: Block, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return the factors of some groups with the terms of all calls."""
        every = [factor.chunk(block, first, last) for factor in self.factors]
        if len(every) == 1:
            return every[0]
        return torch.cat([x for x, _ in every], -2), torch.cat([delta for _, delta in every], -2)

    def squares(self, groups: Groups) -> Tensor:
        """Square by inner products between terms, or the gradient itself."""
        found = []
        for block, first, last in groups.chunks(self._elements):
            terms = self._terms * block.size
            if terms == 1:
                x, delta = (torch.linalg.vector_norm(f, dim=-1) for f in self.chunk(block, first, last))
                found.append((x * delta).square().sum((1, 2)))
            elif terms * (self.width + self.height) <= self.width * self.height:
                x, delta = self.chunk(block, first, last)
                inner = x @ x.transpose(-1, -2) * (delta @ delta.transpose(-1, -2))
                found.append(inner.sum((1, 2, 3)).clamp_min(0))
            else:
                formed = [factor.formed(block, first, last) for factor in self.factors]
                gradient = formed[0] if len(formed) == 1 else torch.stack(formed).sum(0)
                found.append(torch.linalg.vector_norm(gradient, dim=1).square())
        return torch.cat(found)

    def _elements(self, size: int) -> int:
        """Return the memory that a group of so many examples takes: of its factors, and its gradient or products."""
        terms = self._terms * size
        if terms == 1:
            return self.parts * (self.width + self.height)
        return self.parts * (terms * (self.width + self.height) + min(self.width * self.height, 2 * terms**2))

    def against(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Weigh each term's factors."""
        heights = rows.view(self.parts, self.height, 1)
        whole = []
        for factor in self.factors:
            for block, first, last in Groups.of(len(factor.inputs)).chunks(self._elements):
                x, delta = factor.chunk(block, first, last)
                whole.append(((x @ columns.to(x)) * (delta @ heights.to(delta)).squeeze(-1)).sum())
        return torch.stack(whole).sum()


@dataclass(frozen=True)
class Lookups(Contribution):
    """Gradients of the rows that examples look up: (examples, t) numbers of rows, (examples, t, n) gradients."""

    rows: Tensor
    gradients: Tensor
    height: int

    def joined(self, others: Sequence["Lookups"]) -> "Lookups":
        """Put the terms after each other."""
        every = (self, *others)
        rows, gradients = torch.cat([e.rows for e in every], 1), torch.cat([e.gradients for e in every], 1)
        return Lookups(rows, gradients, self.height)

    def chunk(self, block: Block, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return the rows, (groups, size of a group times t), and gradients of some groups."""
        rows, gradients = (block.take(values, first, last) for values in (self.rows, self.gradients))
        groups = last - first
        return rows.reshape(groups, -1), wide(gradients).reshape(groups, -1, gradients.shape[-1])

    def squares(self, groups: Groups) -> Tensor:
        """Add the gradients of equal rows of a group, then square."""
        found = []
        for block, first, last in groups.chunks(lambda size: size * self.gradients[0].numel()):
            rows, gradients = self.chunk(block, first, last)
            count, terms = rows.shape
            if terms == 1:
                found.append(torch.linalg.vector_norm(gradients.flatten(1), dim=1).square())
                continue
            keys = (rows + self.height * torch.arange(count, device=rows.device)[:, None]).flatten()
            keys, order = keys.sort()
            new = torch.cat([keys.new_ones(1, dtype=torch.bool), keys[1:] != keys[:-1]])
            sums = torch.zeros_like(gradients.flatten(0, 1))
            sums.index_add_(0, new.cumsum(0) - 1, gradients.flatten(0, 1)[order])
            # As many sums as there are terms, so that nothing waits for their number; those after the last are zero.
            squares = torch.linalg.vector_norm(sums, dim=1).square()
            group = torch.div(keys, self.height, rounding_mode="floor")
            square = squares[new.cumsum(0) - 1] * new
            found.append(torch.zeros_like(squares[:count]).index_add_(0, group, square))
        return torch.cat(found)

    def against(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Weigh each row's gradients."""
        gradients = wide(self.gradients)
        return torch.sum(rows.to(gradients)[self.rows] * (gradients @ columns.to(gradients)))


def group_squares(contributions: Sequence[Contribution], groups: Groups) -> Tensor:
    r"""Return the squared norm of each group's gradient of one parameter, all calls of modules together.

    A row that is looked up and multiplied, as where an embedding is the output layer too, adds
    :math:`2 \sum_{t,s} \delta_{t, r_s} \langle x_t, e_s \rangle`.

    Args:
        contributions: Of every call of every module that has the parameter.
        groups: The examples that belong together.

    Returns:
        (groups,).

    Raises:
        NotImplementedError: If the calls are of kinds that cannot be added.
    """
    kinds: dict[type[Contribution], list[Contribution]] = {}
    for each in contributions:
        kinds.setdefault(type(each), []).append(each)
    whole = [first.joined(others) if others else first for first, *others in kinds.values()]
    squares = torch.stack([each.squares(groups) for each in whole]).sum(0)
    if len(whole) == 1:
        return squares
    for one, other in product(whole, whole):
        if isinstance(one, Factors) and isinstance(other, Lookups) and len(whole) == 2:
            return (squares + 2 * _between(one, other, groups)).clamp_min(0)
    raise NotImplementedError("modules of different kinds share it")


def _between(factors: Factors, lookups: Lookups, groups: Groups) -> Tensor:
    found = []
    # Squares are in the order of the blocks, whatever the chunks.
    elements = factors.factors[0].outputs[0].numel() + lookups.gradients[0].numel()
    for block, first, last in groups.chunks(lambda size: size * elements):
        x, delta = (factor.squeeze(1) for factor in factors.chunk(block, first, last))
        rows, gradients = lookups.chunk(block, first, last)
        chosen = delta.gather(2, rows[:, None, :].expand(-1, delta.shape[1], -1))
        found.append((chosen * (x @ gradients.transpose(1, 2))).sum((1, 2)))
    return torch.cat(found)
