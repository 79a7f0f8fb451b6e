"""One call of a layer, and how what it was given divides into examples."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_gap.regime.noise_sources.contributions import Contribution, Factors, Sums, wide

__all__ = ["Call", "CannotMeasureError", "Part", "linear_parts"]

Part = tuple[Tensor, Contribution]


class CannotMeasureError(Exception):
    """A call of a layer cannot be taken apart into examples, for the reason given."""


@dataclass(frozen=True)
class Call:
    """One call of a layer: what it was given, detached, and how many examples its micro-batch has."""

    inputs: tuple[Any, ...]
    examples: int
    named: Mapping[str, Any] = field(default_factory=dict)

    def by_example(self, values: Tensor) -> Tensor:
        """Return (examples · k, ...) as (examples, k, ...): an example's rows follow each other."""
        rows = len(values) if values.dim() else 0
        if rows == 0 or rows % self.examples:
            raise CannotMeasureError(
                f"its shape {tuple(values.shape)} has no dimension of the {self.examples} examples"
            )
        return values.reshape(self.examples, rows // self.examples, *values.shape[1:])

    def terms(self, values: Tensor, dims: int = 1) -> Tensor:
        """Return (examples · k, ..., *shape) as (examples, t, *shape), where ``shape`` has so many dimensions."""
        if values.dim() <= dims:
            raise CannotMeasureError("its input has no dimension of the examples")
        return self.by_example(values).flatten(1, values.dim() - dims)


def _matrices(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, None], delta[:, None]


def linear_parts(weight: Tensor | None, bias: Tensor | None, x: Tensor, delta: Tensor) -> Iterator[Part]:
    """Yield what a linear map of x, (examples, t, m), to outputs with gradients (examples, t, n) adds."""
    if weight is not None:
        yield (
            weight,
            Factors.of(x, delta, _matrices, terms=x.shape[1], width=x.shape[-1], height=delta.shape[-1]),
        )
    if bias is not None:
        yield bias, Sums(wide(delta).sum(1))
