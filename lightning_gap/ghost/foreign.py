"""Other people's BatchNorm: classes that are derived from torch's, some with a ``forward`` of their own."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_gap.trainer.internals.of_torch import BatchNormBase

__all__ = ["class_of", "is_made", "keeps_forward", "normalizing_by"]

Layer = TypeVar("Layer", bound=BatchNormBase)
# (input, running_mean, running_var, weight, bias) -> output
Normalization = Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None], Tensor]


def keeps_forward(plain: type[BatchNormBase]) -> bool:
    """Return whether a BatchNorm class has torch's ``forward`` and no other."""
    return plain.forward is BatchNormBase.forward


def is_made(cls: type, base: type[BatchNormBase]) -> bool:
    """Return whether ``cls`` stands for one plain class, and is no further subclass that someone else derived."""
    return issubclass(cls, base) and "plain_class" in vars(cls)


def class_of(plain: type[BatchNormBase], base: type[Layer], prefix: str) -> type[Layer]:
    """Return the class of a new kind of layer that stands for a plain one, made on first use."""
    for cls in plain.__subclasses__():
        if issubclass(cls, base) and is_made(cls, base):
            return cls
    attributes: dict[str, Any] = {"plain_class": plain, "__module__": base.__module__, "__doc__": plain.__doc__}
    becomes = getattr(plain, "cls_to_become", None)  # a lazy class turns into this one at its first forward
    if becomes is not None:
        attributes["cls_to_become"] = class_of(becomes, base, prefix)
    return type(f"{prefix}{plain.__name__}", (base, plain), attributes)


def normalizing_by(
    normalization: Normalization, layer: Any, forward: Callable[[Tensor], Tensor], input: Tensor
) -> Tensor:
    """Call a layer's own forward, and have another normalization where it calls ``batch_norm`` in training."""
    updates = None if layer.num_batches_tracked is None else layer.num_batches_tracked.clone()
    redirected: list[bool] = []  # no attribute of the mode: compilers lose those
    with _Redirecting(normalization, layer, updates, redirected):
        output = forward(input)
    if not redirected:
        name = type(layer).plain_class.__name__
        raise RuntimeError(
            f"the forward of {name} does not call torch.nn.functional.batch_norm with its own running statistics "
            f"in training, so it cannot normalize over ghosts; convert with skip={name}"
        )
    return output


class _Redirecting(TorchFunctionMode):
    """Sends the call to ``batch_norm`` that a layer's own forward makes in training to another normalization."""

    def __init__(
        self, normalization: Normalization, layer: Any, updates: Tensor | None, redirected: list[bool]
    ) -> None:
        super().__init__()
        self.normalization, self.layer, self.updates, self.redirected = normalization, layer, updates, redirected

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.batch_norm:
            return func(*args, **kwargs or {})
        return self._batch_norm(*args, **kwargs or {})

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        self.redirected.append(True)
        if self.updates is not None and self.layer.num_batches_tracked is not None:
            self.layer.num_batches_tracked.copy_(self.updates)  # the forward has counted one; the ghosts count theirs
        return self.normalization(input, running_mean, running_var, weight, bias)
