"""How the learning rate follows the batch size: a table of rules, and the arithmetic that applies a factor."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.optim import SGD, Optimizer

__all__ = ["LR_RULES", "LRRule", "lr_factor", "rule_name", "scale_optimizer"]

LRRule = str | Callable[[float], float]

LR_RULES: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {
        "sqrt": math.sqrt,  # Hoffer et al. 2017, section 4: the covariance of an SGD update goes as lr^2 / batch
        "linear": float,  # Goyal et al. 2017: the mean of an SGD update over one pass goes as lr / batch
        "none": lambda ratio: 1.0,
    }
)

# The rules of the table are derived for updates proportional to the gradient.
RULED_OPTIMIZERS = (SGD,)

# Where an optimizer's group keeps learning rates: its own, and those its scheduler left there.
_GROUP_KEYS = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")


def lr_factor(rule: LRRule, ratio: float) -> float:
    r"""Return by how much the learning rate grows when the batch grows by ``ratio``.

    .. math:: \eta_L = f(|B_L| / |B_S|) \, \eta_S, \qquad f(r) = \sqrt r \ \text{("sqrt")}, \ r \ \text{("linear")}

    Args:
        rule: A key of :data:`LR_RULES`, or a callable from the ratio to the factor.
        ratio: The batch that runs over the reference batch.

    Returns:
        The factor, a finite positive float.

    Raises:
        ValueError: If the rule is not in the table, or a callable's factor is not a finite positive number.

    References:
        Hoffer, Hubara, Soudry 2017, "Train longer, generalize better", section 4. Goyal et al. 2017, "Accurate, Large
        Minibatch SGD".

    Example:
        >>> lr_factor("sqrt", 16), lr_factor("linear", 16), lr_factor(lambda ratio: ratio**0.25, 16)
        (4.0, 16.0, 2.0)
    """
    if isinstance(rule, str) and rule not in LR_RULES:
        raise ValueError(
            f"lr_rule={rule!r} is not known; pass one of {sorted(LR_RULES)} or a callable ratio -> factor."
        )
    factor = LR_RULES[rule](ratio) if isinstance(rule, str) else rule(ratio)
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not math.isfinite(factor) or factor <= 0:
        raise ValueError(
            f"lr_rule={rule_name(rule)} gave {factor!r} for the ratio {ratio:g}; it must give a finite positive float."
        )
    return float(factor)


def rule_name(rule: LRRule) -> str:
    """Return what to call a rule in tables and messages.

    Args:
        rule: A key of :data:`LR_RULES` or a callable.

    Example:
        >>> rule_name("sqrt"), rule_name(math.cbrt)
        ('sqrt', 'cbrt')
    """
    return rule if isinstance(rule, str) else str(getattr(rule, "__name__", type(rule).__name__))


def scaled(value: Any, factor: float) -> Any:
    """Return ``factor`` times a learning rate: a number, a tensor (a new one), ``None``, or a list of these."""
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return [scaled(item, factor) for item in value]
    return (value.detach() * factor) if isinstance(value, Tensor) else value * factor


def scale_optimizer(optimizer: Optimizer, factor: float) -> None:
    """Multiply every learning rate that an optimizer holds, in place: those of its groups and its default.

    Tensor learning rates are replaced by new tensors, for a scheduler may hold the old ones too.

    Args:
        optimizer: Any torch optimizer.
        factor: What to multiply by.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> scale_optimizer(sgd, 4.0)
        >>> sgd.param_groups[0]["lr"]
        2.0
    """
    for group in (optimizer.defaults, *optimizer.param_groups):
        group.update({key: scaled(group[key], factor) for key in _GROUP_KEYS if key in group})
