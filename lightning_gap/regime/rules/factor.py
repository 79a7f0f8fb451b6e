"""The factor of the learning rate, by the name of a rule or by a function."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from lightning_gap.regime.rules.adam import Adam
from lightning_gap.regime.rules.base import Rule
from lightning_gap.regime.rules.linear import Linear
from lightning_gap.regime.rules.none import Unscaled
from lightning_gap.regime.rules.sqrt import Sqrt

__all__ = ["LR_RULES", "RULES", "LRRule", "lr_factor", "rule_name"]

LRRule = str | Callable[[float], float]

RULES: Mapping[str, Rule] = MappingProxyType({rule.name: rule for rule in (Sqrt(), Linear(), Adam(), Unscaled())})
# The table of rules, as far as the learning rate goes.
LR_RULES: Mapping[str, Callable[[float], float]] = MappingProxyType({name: rule.factor for name, rule in RULES.items()})


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


def rule_name(rule: str | Callable[..., float]) -> str:
    """Return what to call a rule in tables and messages."""
    return rule if isinstance(rule, str) else f"{getattr(rule, '__name__', type(rule).__name__)}()"
