"""Costs by name, and functions as costs."""

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from lightning_gap.monge.ot.compiling import eager
from lightning_gap.monge.ot.costs.angles import Cosine, Geodesic
from lightning_gap.monge.ot.costs.base import Cost
from lightning_gap.monge.ot.costs.euclidean import Euclidean, Mahalanobis, SqEuclidean
from lightning_gap.monge.ot.costs.norms import Elastic, PNorm, SqPNorm

__all__ = ["CallableCost", "CostLike", "is_learned", "resolve"]

CostLike = str | Cost | Callable[[Tensor, Tensor], Tensor]


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
    symmetric = False  # for all that is known

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


def resolve(cost: CostLike) -> Cost:
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


def is_learned(cost: Cost, like: Tensor) -> bool:
    """Return whether a cost of such samples depends on tensors that learn, such as parameters of a network."""
    if not torch.is_grad_enabled() or type(cost) in _BY_NAME.values():
        return False
    point = like[:1].detach()
    return cost.elementwise(point, point.clone()).requires_grad
