"""Samples, in batches and in the inputs of layers: a layer may see several rows of each sample, such as its tokens."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BatchRows", "samples_in"]


class BatchRows:
    """The rows of a sample in the inputs of layers: k where an input has kB rows in a batch of B ``samples``.

    While ``watching`` what each layer is answered is ``seen``; ``unfit`` are layers whose rows are no multiple, with
    rows and samples. A copy of a layer shares this object, and a pickle of it holds 1.

    Example:
        >>> rows, layer = BatchRows(), nn.BatchNorm1d(4)
        >>> rows.samples = 16
        >>> rows.of(layer, 16), rows.of(layer, 160), rows.of(layer, 37)
        (1, 10, 1)
        >>> rows.unfit[layer]
        (37, 16)
    """

    def __init__(self, fixed: int | None = None) -> None:
        self.fixed, self.samples, self.watching = fixed, None, False  # type: tuple[int | None, int | None, bool]
        self.seen: dict[nn.Module, set[int]] = {}
        self.unfit: dict[nn.Module, tuple[int, int]] = {}

    def of(self, layer: nn.Module, rows: int) -> int:
        """Return how many of a layer's rows are one sample; 1 where that cannot be told."""
        answer = 1
        if self.fixed is not None:
            answer = self.fixed
        elif self.samples and rows != self.samples:
            if rows and rows % self.samples == 0:
                answer = rows // self.samples
            elif rows and not torch.compiler.is_compiling():
                self.unfit.setdefault(layer, (rows, self.samples))
        if self.watching and not torch.compiler.is_compiling():
            self.seen.setdefault(layer, set()).add(answer)
        return answer

    def __repr__(self) -> str:
        return "auto" if self.fixed is None else str(self.fixed)

    def __deepcopy__(self, memo: Any) -> "BatchRows":
        return self

    def __reduce__(self) -> Any:
        return int, (self.fixed or 1,)


def samples_in(batch: Any) -> int | None:
    """Return how many samples a batch has, None where it cannot be told.

    They are the length of the first dimension, if all tensors agree on it, or else of the batch's members, if these do.

    Example:
        >>> samples_in({"image": torch.zeros(8, 3), "boxes": [torch.zeros(n, 4) for n in range(8)]})
        8
        >>> samples_in([torch.zeros(8, 3), torch.zeros(16, 3)])
    """
    lengths = {len(tensor) for tensor in _tensors(batch)}
    if len(lengths) > 1:
        members = {
            len(member)
            for member in _members(batch)
            if isinstance(member, list | tuple) or (isinstance(member, Tensor) and member.dim())
        }
        # Lists that are shorter than their tensors, which agree in each, are batches: of several loaders.
        agree = all(len({len(tensor) for tensor in _tensors(member)}) < 2 for member in _members(batch))
        lengths = set() if agree and max(members, default=0) < min(lengths) else members
    return lengths.pop() if len(lengths) == 1 else None


def _members(batch: Any) -> Iterator[Any]:
    if isinstance(batch, Mapping):
        yield from batch.values()
    elif isinstance(batch, list | tuple):
        yield from batch
    elif is_dataclass(batch) and not isinstance(batch, type):
        yield from (getattr(batch, field.name) for field in fields(batch))


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        if batch.dim():
            yield batch
    else:
        for member in _members(batch):
            yield from _tensors(member)
