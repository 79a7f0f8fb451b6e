"""What a training decides once: relative epsilons, and their values beside the buffers that keep them."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_gap.monge.ot.costs import Cost
from lightning_gap.monge.ot.epsilon import cost_scale
from lightning_gap.monge.scores.priority_sampling import priority_sample

__all__ = ["Decisions", "Weighted", "by_condition", "few_of", "share_of_typical_cost", "typical_cost"]

# Samples of each side that tell the scale of costs; of many conditions each has its part of them.
_ENOUGH, _LEAST = 1024, 128


class Weighted(NamedTuple):
    """Samples ``(n, d)``, and their ``(n,)`` weights, or ``None`` for uniform ones."""

    samples: Tensor
    weights: Tensor | None = None


class Decisions:
    """Scalar buffers of a module that are decided once, with their values at hand as Python numbers.

    They are buffers, so that checkpoints hold them; a step that asked them for their values would wait for the device
    each time. Callbacks that average weights average buffers too, and exchange them through ``.data`` in validation:
    that leaves the numbers here as they are, and :meth:`restore` gives them back to the buffers.

    Args:
        module: The module.
        names: Its scalar buffers.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self._module = module
        self.names = tuple(names)
        self._known: dict[str, tuple[Tensor, int, float]] = {}

    def __getitem__(self, name: str) -> float:
        """Return a buffer's value, read again only where it was written to or replaced."""
        buffer: Tensor = getattr(self._module, name)
        if buffer.is_inference():  # such tensors do not tell when they were written to
            return float(buffer)
        known = self._known.get(name)
        if known is None or known[0] is not buffer or known[1] != buffer._version:
            known = self._known[name] = (buffer, buffer._version, float(buffer))
        return known[2]

    def decided(self, name: str) -> float | None:
        """Return the number, or ``None`` where it has not been decided.

        Args:
            name: Of the buffer.
        """
        value = self[name]
        return value if math.isfinite(value) else None

    def decide(self, name: str, value: float) -> None:
        """Set a buffer.

        Args:
            name: Of the buffer.
            value: Its value.
        """
        with torch.no_grad():
            getattr(self._module, name).fill_(value)
        self[name]

    def read(self) -> None:
        """Take the buffers' values, before anything exchanges them."""
        for name in self.names:
            self[name]

    def restore(self) -> None:
        """Give the buffers their values back, after averages were copied over them."""
        for name in self.names:
            self.decide(name, self[name])

    def write_to(self, state: Mapping[str, Any]) -> None:
        """Give the entries of a state dictionary, which may be that of an average, the values.

        Args:
            state: The dictionary, whose tensors are replaced.
        """
        for name in self.names:
            if name in state:
                state[name] = torch.full_like(state[name], self[name])  # type: ignore[index]


def by_condition(
    source: tuple[Tensor, Tensor | None], target: tuple[Tensor, Tensor | None]
) -> list[tuple[Weighted, Weighted]]:
    """Return source and target of each condition.

    Args:
        source: ``(n, d)`` samples and their weights, or ``(K, n, d)`` samples of K conditions.
        target: Those of the target.
    """
    if source[0].dim() == 2:
        return [(Weighted(*source), Weighted(*target))]
    sides = [
        [Weighted(x, w) for x, w in zip(samples, [None] * len(samples) if weights is None else weights, strict=True)]
        for samples, weights in (source, target)
    ]
    return list(zip(*sides, strict=True))


def few_of(
    pairs: Sequence[tuple[Weighted, Weighted]], take: Callable[[Tensor], Tensor]
) -> list[tuple[Weighted, Weighted]]:
    """Return as many samples of each pair as tell the scale of their costs, the same in whatever order they come.

    Args:
        pairs: Source and target of each condition.
        take: Brings what was chosen to where it is needed.
    """
    most = max(_LEAST, int(_ENOUGH / math.sqrt(len(pairs))))
    found: dict[int, Weighted] = {}  # a side without labels is in the pair of every condition

    def of(side: Weighted) -> Weighted:
        if id(side.samples) not in found:
            few, weights = priority_sample(*side, most)
            found[id(side.samples)] = Weighted(take(few), weights)
        return found[id(side.samples)]

    return [(of(x), of(y)) for x, y in pairs]


def share_of_typical_cost(share: float, cost: Cost, pairs: Sequence[tuple[Weighted, Weighted]]) -> float:
    """Return an epsilon that is a share of the typical cost, the mean over pairs of sets of samples.

    Outliers do not decide it: see :func:`~lightning_gap.monge.ot.epsilon.cost_scale`.

    Args:
        share: A positive number.
        cost: The ground cost.
        pairs: Source and target of each condition.

    Raises:
        ValueError: The costs are 0 or not finite, so that no share of them is an epsilon.

    Example:
        >>> import torch
        >>> from lightning_gap.monge.ot.costs import SqEuclidean
        >>> x = torch.linspace(-1, 1, 201)[:, None]
        >>> y = x.clone()
        >>> y[0] = 1e4
        >>> sets = [(Weighted(x), Weighted(x))], [(Weighted(y), Weighted(y))]
        >>> [round(share_of_typical_cost(0.05, SqEuclidean(), pairs), 3) for pairs in sets]
        [0.034, 0.033]
    """
    scale = typical_cost(cost, pairs)
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(
            f"the typical {cost} cost is {scale}, so no share of it can be epsilon: give an absolute epsilon"
        )
    return share * scale


def typical_cost(cost: Cost, pairs: Sequence[tuple[Weighted, Weighted]]) -> float:
    """Return the mean over pairs of sets of samples of the costs between them but for outlying ones.

    Args:
        cost: The ground cost.
        pairs: Source and target of each condition.
    """
    return fmean(_typical(cost, x, y) for x, y in pairs)


def _typical(cost: Cost, x: Weighted, y: Weighted) -> float:
    weights = x.weights, y.weights
    # Where most samples coincide, what is typical is 0.
    return cost_scale(cost, x.samples, y.samples, weights, "typical") or cost_scale(
        cost, x.samples, y.samples, weights, "mean"
    )
