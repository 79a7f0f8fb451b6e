"""How the learning rate follows the batch size, and the arithmetic that applies a factor."""

import math
from collections.abc import Callable, Mapping
from enum import Enum, auto
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_gap.regime.rules import RULES
from lightning_gap.regime.rules.base import MOMENT_KEYS

__all__ = [
    "EQUAL_SAMPLES",
    "LR_RULES",
    "LRRule",
    "Rate",
    "check_rule",
    "default_train_longer",
    "lr_factor",
    "remembered",
    "rule_name",
    "scale_optimizer",
    "scaled",
]

LRRule = str | Callable[[float], float]

# The table of rules, as far as the learning rate goes.
LR_RULES: Mapping[str, Callable[[float], float]] = MappingProxyType({name: rule.factor for name, rule in RULES.items()})
# Rules that keep the learning rate times the samples: with them a run makes fewer updates, on the same samples.
EQUAL_SAMPLES = tuple(name for name, rule in RULES.items() if rule.equal_samples)

# Where an optimizer's group keeps learning rates: its own, and those its scheduler left there.
_GROUP_KEYS = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")


class Rate(Enum):
    """Where a run's learning rate comes from."""

    RULED = auto()  # by the rule, from the reference run's
    FOUND = auto()  # by LearningRateFinder, at the batch that runs


def lr_factor(rule: LRRule, ratio: float) -> float:
    r"""Return by how much the learning rate grows when the batch grows by ``ratio``.

    .. math:: \eta_L = f(|B_L| / |B_S|) \, \eta_S, \qquad
        f(r) = \sqrt r \ \text{("sqrt", "adam")}, \ r \ \text{("linear")}, \ 1 \ \text{("none")}

    Args:
        rule: A key of :data:`LR_RULES`, or a callable from the ratio to the factor.
        ratio: The batch that runs over the reference batch.

    Returns:
        The factor, a finite positive float.

    Raises:
        ValueError: If the rule is not in the table, or a callable's factor is not a finite positive number.

    References:
        Hoffer, Hubara, Soudry 2017, "Train longer, generalize better", section 4. Goyal et al. 2017, "Accurate, Large
        Minibatch SGD". Malladi, Lyu, Panigrahi, Arora 2022, "On the SDEs and scaling rules for adaptive gradient
        algorithms".

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
    """Return what to call a rule in tables and messages."""
    return rule if isinstance(rule, str) else f"{getattr(rule, '__name__', type(rule).__name__)}()"


def default_train_longer(rule: LRRule) -> float:
    """Return how far a rule goes from the reference run's epochs, 0, to its updates, 1, where nothing else is asked."""
    return 0.0 if rule in EQUAL_SAMPLES else 1.0


def check_rule(optimizer: Optimizer, rule: str, ratio: float, train_longer: float) -> str | None:
    """Refuse an optimizer that a rule is not for, and return what is doubtful about one that it takes."""
    known = RULES.get(rule)
    if ratio == 1.0 or rule == "none":
        return None
    if any(group.get("lr") is None for group in optimizer.param_groups):
        raise ValueError(
            f"{type(optimizer).__name__} finds its own learning rate, which lr_rule={rule!r} cannot scale. Pass "
            'lr_rule="none".'
        )
    if known is None:
        return None
    if not {kind.__name__ for kind in type(optimizer).__mro__} & set(known.optimizers):
        return known.doubt(optimizer, train_longer)
    known.check(optimizer, ratio)
    return None


def scaled(value: Any, factor: float) -> Any:
    """Return ``factor`` times a learning rate: a number, a tensor (a new one), ``None``, or a list of these."""
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return [scaled(item, factor) for item in value]
    return (value.detach() * factor) if isinstance(value, Tensor) else value * factor


def remembered(beta: Any, ratio: float) -> Any:
    """Return 1 - ratio * (1 - beta), for a number, a tensor, or a tuple or list of these."""
    if isinstance(beta, (tuple, list)):
        return type(beta)(remembered(each, ratio) for each in beta)
    return 1 - ratio * (1 - beta)


def scale_optimizer(optimizer: Optimizer, factor: float, moment_ratio: float = 1.0) -> None:
    r"""Multiply every learning rate that an optimizer holds, in place: those of its groups and its default.

    Tensor learning rates are replaced by new tensors, for a scheduler may hold the old ones too. The moments of Adam or
    RMSprop become those of a batch :math:`\kappa` times as large, by Malladi et al. 2022:

    .. math:: 1 - \beta \to \kappa (1 - \beta), \qquad \epsilon \to \epsilon / \sqrt \kappa

    Example:
        >>> import torch
        >>> adam = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=0.5, betas=(0.9, 0.999), eps=1e-8)
        >>> scale_optimizer(adam, 2.0, 4.0)
        >>> group = adam.param_groups[0]
        >>> group["lr"], [round(beta, 6) for beta in group["betas"]], group["eps"]
        (1.0, [0.6, 0.996], 5e-09)
    """
    for group in (optimizer.defaults, *optimizer.param_groups):
        if factor != 1.0:
            group.update({key: scaled(group[key], factor) for key in _GROUP_KEYS if key in group})
        if moment_ratio != 1.0:
            group.update({key: remembered(group[key], moment_ratio) for key in MOMENT_KEYS if key in group})
            group["eps"] = group["eps"] / math.sqrt(moment_ratio)
