"""What the rules must know of an optimizer: one line for each class, in one table that users can extend."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["OPTIMIZERS", "GradientNorm", "OptimizerKind", "kind_of", "names_of"]

GradientNorm = Literal["euclidean", "l1", "nuclear"]


@dataclass(frozen=True)
class OptimizerKind:
    r"""How an optimizer uses its hyperparameters, as far as the batch size matters to them.

    Args:
        lr_rules: The learning-rate rules that are derived for it.
        adaptive: Whether it divides by the size of its gradients, so that the square root of the ratio is the
            learning-rate part of its rule at equal samples. ``"sqrt"`` takes it with a warning.
        decoupled: Whether its weight decay is :math:`w \to (1 - \eta\lambda) w` beside the update, and no part of the
            gradient; or the key of the group that says so.
        second_moments: Where a group keeps how long squared gradients are remembered: a key, or a key and an index.
        moments: The same for gradients, where these are averages (1 - beta is the weight of the newest).
        heavy_ball: Whether ``momentum`` sums gradients instead, so that the update grows as 1 / (1 - momentum).
        norm: The norm of gradients whose steepest descent its update is, or nearly: ``"l1"`` of signs, and of what is
            divided by the size of each coordinate's gradients; ``"nuclear"`` of orthogonal matrices. For
            ``GradientNoiseScale(norm="auto")``; ``None`` where it is not known.

    Example:
        >>> OPTIMIZERS["MyAdamW"] = OptimizerKind(
        ...     adaptive=True, decoupled=True, second_moments=(("betas", 1),), moments=(("betas", 0),)
        ... )
        >>> kind_of("MyAdamW").decouples({"weight_decay": 0.1})
        True
        >>> del OPTIMIZERS["MyAdamW"]
    """

    lr_rules: tuple[str, ...] = ()
    adaptive: bool = False
    decoupled: bool | str = False
    second_moments: tuple[tuple[str, int | None], ...] = ()
    moments: tuple[tuple[str, int | None], ...] = ()
    heavy_ball: bool = False
    norm: GradientNorm | None = None

    def decouples(self, group: Mapping[str, Any]) -> bool:
        """Return whether a group's weight decay is no part of the gradient.

        Args:
            group: A parameter group of the optimizer.
        """
        return bool(group.get(self.decoupled, False)) if isinstance(self.decoupled, str) else self.decoupled


_FIRST, _SECOND = ("betas", 0), ("betas", 1)


def _adam(*, decoupled: bool | str, lr_rules: tuple[str, ...] = ()) -> OptimizerKind:
    return OptimizerKind(
        lr_rules, adaptive=True, decoupled=decoupled, second_moments=(_SECOND,), moments=(_FIRST,), norm="l1"
    )


# By class name, since most are other libraries': add a line for one of your own. A subclass is what its nearest named
# ancestor is.
OPTIMIZERS: dict[str, OptimizerKind] = {
    "SGD": OptimizerKind(("sqrt", "linear"), heavy_ball=True, norm="euclidean"),
    "SGDW": OptimizerKind(("sqrt", "linear"), decoupled=True, heavy_ball=True, norm="euclidean"),
    "SGDP": OptimizerKind(("sqrt", "linear"), decoupled=True, heavy_ball=True, norm="euclidean"),
    # Their step is a share of the weight's norm, whatever the gradient's; decay turns it by as much as in AdamW, while
    # the norm of LAMB's update stays what it is.
    "Lamb": OptimizerKind(("sqrt",), decoupled=True, second_moments=(_SECOND,), moments=(_FIRST,)),
    "LAMB": OptimizerKind(("sqrt",), decoupled=True, second_moments=(_SECOND,), moments=(_FIRST,)),
    "Lars": OptimizerKind(("linear",), heavy_ball=True),
    "LARS": OptimizerKind(("linear",), heavy_ball=True),
    "Adam": _adam(lr_rules=("adam",), decoupled="decoupled_weight_decay"),
    "AdamW": _adam(lr_rules=("adam",), decoupled=True),
    "RMSprop": OptimizerKind(("adam",), adaptive=True, second_moments=(("alpha", None),), heavy_ball=True, norm="l1"),
    "NAdam": _adam(decoupled="decoupled_weight_decay"),
    "NAdamW": _adam(decoupled=True),
    "RAdam": _adam(decoupled="decoupled_weight_decay"),
    "Adamax": _adam(decoupled=False),
    "AdamP": _adam(decoupled=True),
    "Adopt": _adam(decoupled="decoupled"),
    # A sign, and a matrix of orthogonal directions, have one size: only the share of them that is no noise grows as
    # the square root of the batch, as in Adam.
    "Lion": OptimizerKind(adaptive=True, decoupled=True, moments=(_FIRST, _SECOND), norm="l1"),
    "Muon": OptimizerKind(adaptive=True, decoupled=True, moments=(("momentum", None),), norm="nuclear"),
}


def names_of(optimizer: Any) -> tuple[str, ...]:
    """Return the class names of an optimizer, the nearest first.

    Args:
        optimizer: An optimizer, its class, the name of its class, or names or classes in the order of an ``__mro__``.
    """
    if isinstance(optimizer, str):
        return (optimizer,)
    if isinstance(optimizer, type):
        return tuple(kind.__name__ for kind in optimizer.__mro__)
    if isinstance(optimizer, Iterable):
        return tuple(each if isinstance(each, str) else each.__name__ for each in optimizer)
    return names_of(type(optimizer))


def kind_of(optimizer: Any) -> OptimizerKind | None:
    """Return the line of an optimizer in :data:`OPTIMIZERS`; ``None`` where neither it nor an ancestor has one.

    Args:
        optimizer: As in :func:`names_of`.
    """
    return next((OPTIMIZERS[name] for name in names_of(optimizer) if name in OPTIMIZERS), None)
