"""How the learning rate follows the batch size: a table of rules, and the arithmetic that applies a factor."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = [
    "LR_RULES",
    "LRRule",
    "check_moments",
    "check_rule",
    "default_train_longer",
    "lr_factor",
    "rule_name",
    "scale_moments",
    "scale_optimizer",
]

LRRule = str | Callable[[float], float]

LR_RULES: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {
        "sqrt": math.sqrt,  # Hoffer et al. 2017, section 4: the covariance of an SGD update goes as lr^2 / batch
        "linear": float,  # Goyal et al. 2017: the mean of an SGD update over one pass goes as lr / batch
        "adam": math.sqrt,  # Malladi et al. 2022: with 1 - beta and eps scaled too, Adam keeps its limiting SDE
        "none": lambda ratio: 1.0,
    }
)

# Which optimizers a rule of the table is derived for, by the names of their classes: most are other libraries'.
RULED_OPTIMIZERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "sqrt": ("SGD", "SGDW", "SGDP", "Lamb", "LAMB"),  # Hoffer et al. 2017; LAMB: You et al. 2020, with a warm-up
        "linear": ("SGD", "SGDW", "SGDP", "Lars", "LARS"),  # Goyal et al. 2017; LARS: You et al. 2017
        "adam": ("Adam", "AdamW", "RMSprop"),
    }
)
# The square root is the learning-rate part of these optimizers' rule as well, at equal samples.
ADAPTIVE_OPTIMIZERS = ("Adam", "AdamW", "RMSprop", "NAdam", "NAdamW", "RAdam", "Adamax", "AdamP", "Adopt")
# Rules that keep the learning rate times the samples: with them a run makes fewer updates, on the same samples.
EQUAL_SAMPLES = ("linear", "adam")

# Malladi et al. 2022 derive their rule for 1 - beta small after it is scaled.
MOST_FORGOTTEN = 0.5

# Where an optimizer's group keeps learning rates: its own, and those its scheduler left there.
_GROUP_KEYS = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
# And the shares of the past that its moments keep: Adam's, RMSprop's, and the ends between which a scheduler moves the
# first of Adam's.
_MOMENT_KEYS = ("betas", "alpha", "max_momentum", "base_momentum")


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
    """Return what to call a rule in tables and messages.

    Args:
        rule: A key of :data:`LR_RULES` or a callable.

    Example:
        >>> rule_name("sqrt"), rule_name(math.cbrt)
        ('sqrt', 'cbrt()')
    """
    return rule if isinstance(rule, str) else f"{getattr(rule, '__name__', type(rule).__name__)}()"


def default_train_longer(rule: LRRule) -> float:
    """Return how far a rule goes from the reference run's epochs, 0, to its updates, 1, where nothing else is asked.

    Args:
        rule: A key of :data:`LR_RULES` or a callable.

    Example:
        >>> default_train_longer("sqrt"), default_train_longer("linear"), default_train_longer("adam")
        (1.0, 0.0, 0.0)
    """
    return 0.0 if rule in EQUAL_SAMPLES else 1.0


def check_rule(optimizer: Optimizer, rule: str, ratio: float, train_longer: float) -> str | None:
    """Refuse an optimizer that a rule is not for, and return what is doubtful about one that it takes.

    Args:
        optimizer: An optimizer of the reference run.
        rule: The name of the rule; one that is not in the table is the user's own and takes all.
        ratio: The batch that runs over the reference batch.
        train_longer: How far the run goes from the reference run's epochs to its updates.

    Raises:
        ValueError: If the rule is not for it.

    Example:
        >>> import torch
        >>> check_rule(torch.optim.Rprop([torch.zeros(1, requires_grad=True)]), "linear", 4.0, 0.0)
        Traceback (most recent call last):
        ...
        ValueError: lr_rule="linear" is a rule for SGD, SGDW, SGDP, Lars, LARS, and the optimizer is Rprop. Pass \
lr_rule="none", which leaves its learning rate as it is, or a callable ratio -> factor to decide the factor yourself.
    """
    if ratio == 1.0 or rule in ("none", "found"):
        return None
    if any(group.get("lr") is None for group in optimizer.param_groups):
        raise ValueError(
            f"{type(optimizer).__name__} finds its own learning rate, which lr_rule={rule!r} cannot scale. Pass "
            'lr_rule="none".'
        )
    if rule not in RULED_OPTIMIZERS:
        return None
    name, kinds = type(optimizer).__name__, {kind.__name__ for kind in type(optimizer).__mro__}
    if kinds & set(RULED_OPTIMIZERS[rule]):
        if rule == "adam":
            check_moments(optimizer, ratio)
        return None
    if rule == "sqrt" and kinds & set(ADAPTIVE_OPTIMIZERS):
        decays = any(group.get("weight_decay") for group in optimizer.param_groups) and "W" in name
        longer = (
            f" At train_longer={train_longer:g} it is nobody's rule: it is derived for {name} at equal samples, "
            'train_longer=False; lr_rule="none" leaves the rate as it is.'
            if train_longer
            else ""
        )
        return (
            f'lr_rule="sqrt" scales the learning rate of {name}{", and its weight decay with it," if decays else ""} '
            f'and leaves its betas and eps as they are. lr_rule="adam" scales these too, for ratio * (1 - beta) < '
            f"{MOST_FORGOTTEN}.{longer}"
        )
    ruled = ", ".join(RULED_OPTIMIZERS[rule])
    taken = f", takes {', '.join(ADAPTIVE_OPTIMIZERS)} with a warning" if rule == "sqrt" else ""
    raise ValueError(
        f'lr_rule="{rule}" is a rule for {ruled}{taken}, and the optimizer is {name}. Pass lr_rule="none", which '
        "leaves its learning rate as it is, or a callable ratio -> factor to decide the factor yourself."
    )


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


def check_moments(optimizer: Optimizer, ratio: float) -> None:
    r"""Refuse an optimizer whose moments would forget too much of the past for Adam's rule to hold.

    Args:
        optimizer: An optimizer of the reference run.
        ratio: The batch that runs over the reference batch, :math:`\kappa`.

    Raises:
        ValueError: If :math:`\kappa (1 - \beta) \geq 1/2` for a :math:`\beta` of any group, or of the ends between
            which a scheduler moves it.

    Example:
        >>> import torch
        >>> adam = torch.optim.Adam([torch.zeros(1, requires_grad=True)], betas=(0.9, 0.999))
        >>> check_moments(adam, 4.0)
        >>> check_moments(adam, 8.0)
        Traceback (most recent call last):
        ...
        ValueError: lr_rule="adam" at the ratio 8 would turn betas=0.9 into 0.2; it holds for ratio * (1 - beta) < 0.5.
    """
    for group in optimizer.param_groups:
        for key in _MOMENT_KEYS:
            value = group.get(key, ())
            for beta in value if isinstance(value, tuple) else (value,):
                if ratio * (1 - float(beta)) >= MOST_FORGOTTEN:
                    raise ValueError(
                        f'lr_rule="adam" at the ratio {ratio:g} would turn {key}={float(beta):g} into '
                        f"{remembered(float(beta), ratio):.3g}; it holds for ratio * (1 - beta) < {MOST_FORGOTTEN}."
                    )


def scale_moments(optimizer: Optimizer, ratio: float) -> None:
    r"""Turn the moments of Adam or RMSprop into those of a batch ``ratio`` times as large, in place.

    .. math:: 1 - \beta \to \kappa (1 - \beta), \qquad \epsilon \to \epsilon / \sqrt \kappa

    Args:
        optimizer: An optimizer with ``betas`` or ``alpha``.
        ratio: The batch that runs over the reference batch, :math:`\kappa`.

    References:
        Malladi, Lyu, Panigrahi, Arora 2022, "On the SDEs and scaling rules for adaptive gradient algorithms".

    Example:
        >>> import torch
        >>> adam = torch.optim.Adam([torch.zeros(1, requires_grad=True)], betas=(0.9, 0.999), eps=1e-8)
        >>> scale_moments(adam, 4.0)
        >>> [round(beta, 6) for beta in adam.param_groups[0]["betas"]], adam.param_groups[0]["eps"]
        ([0.6, 0.996], 5e-09)
    """
    for group in (optimizer.defaults, *optimizer.param_groups):
        group.update({key: remembered(group[key], ratio) for key in _MOMENT_KEYS if key in group})
        group["eps"] = group["eps"] / math.sqrt(ratio)


def remembered(beta: Any, ratio: float) -> Any:
    """Return 1 - ratio * (1 - beta), for a number, a tensor, or a tuple or list of these."""
    if isinstance(beta, (tuple, list)):
        return type(beta)(remembered(each, ratio) for each in beta)
    return 1 - ratio * (1 - beta)
