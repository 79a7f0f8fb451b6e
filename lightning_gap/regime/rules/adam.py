"""The square root of the ratio, with 1 - beta and eps scaled too: so Adam keeps its limiting SDE."""

import math
from typing import TYPE_CHECKING, Any

from lightning_gap.regime.rules.base import Rule

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["MOST_FORGOTTEN", "Adam", "remembered", "scale_moments"]

# Malladi et al. 2022 derive their rule for 1 - beta small after it is scaled.
MOST_FORGOTTEN = 0.5
# The shares of the past that moments keep: Adam's, RMSprop's, and the ends between which a scheduler moves the first of
# Adam's.
_MOMENT_KEYS = ("betas", "alpha", "max_momentum", "base_momentum")


class Adam(Rule):
    """Malladi et al. 2022."""

    name = "adam"
    optimizers = ("Adam", "AdamW", "RMSprop")
    equal_samples = moments = True

    def factor(self, ratio: float) -> float:
        """Return the square root of the ratio."""
        return math.sqrt(ratio)

    def check(self, optimizer: "Optimizer", ratio: float) -> None:
        r"""Refuse moments that would forget too much of the past for the rule to hold.

        Raises:
            ValueError: If :math:`\kappa (1 - \beta) \geq 1/2` for a :math:`\beta` of any group, or of the ends between
                which a scheduler moves it.
        """
        for key, value in ((key, group.get(key, ())) for group in optimizer.param_groups for key in _MOMENT_KEYS):
            for beta in map(float, value if isinstance(value, tuple) else (value,)):
                if ratio * (1 - beta) >= MOST_FORGOTTEN:
                    raise ValueError(
                        f'lr_rule="adam" at the ratio {ratio:g} would turn {key}={beta:g} into '
                        f"{remembered(beta, ratio):.3g}; it holds for ratio * (1 - beta) < {MOST_FORGOTTEN}. "
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
