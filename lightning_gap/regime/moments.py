"""The moments of Adam and RMSprop at another batch size."""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["MOST_FORGOTTEN", "check_moments", "remembered", "scale_moments"]

# Malladi et al. 2022 derive their rule for 1 - beta small after it is scaled.
MOST_FORGOTTEN = 0.5
# The shares of the past that moments keep: Adam's, RMSprop's, and the ends between which a scheduler moves the first of
# Adam's.
_MOMENT_KEYS = ("betas", "alpha", "max_momentum", "base_momentum")


def check_moments(optimizer: "Optimizer", ratio: float) -> None:
    r"""Refuse an optimizer whose moments would forget too much of the past for Adam's rule to hold.

    Raises:
        ValueError: If :math:`\kappa (1 - \beta) \geq 1/2` for a :math:`\beta` of any group, or of the ends between
            which a scheduler moves it.

    Example:
        >>> import torch
        >>> adam = torch.optim.Adam([torch.zeros(1, requires_grad=True)], betas=(0.9, 0.999))
        >>> check_moments(adam, 4.0)
        >>> check_moments(adam, 8.0)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: lr_rule="adam" at the ratio 8 would turn betas=0.9 into 0.2; it holds for ...
    """
    for group in optimizer.param_groups:
        for key in _MOMENT_KEYS:
            value = group.get(key, ())
            for beta in value if isinstance(value, tuple) else (value,):
                if ratio * (1 - float(beta)) >= MOST_FORGOTTEN:
                    raise ValueError(
                        f'lr_rule="adam" at the ratio {ratio:g} would turn {key}={float(beta):g} into '
                        f"{remembered(float(beta), ratio):.3g}; it holds for ratio * (1 - beta) < {MOST_FORGOTTEN}. "
                        'Use a smaller batch, or lr_rule="sqrt", which scales the learning rate alone.'
                    )


def scale_moments(optimizer: "Optimizer", ratio: float) -> None:
    r"""Turn the moments of Adam or RMSprop into those of a batch ``ratio`` times as large, in place.

    .. math:: 1 - \beta \to \kappa (1 - \beta), \qquad \epsilon \to \epsilon / \sqrt \kappa

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
