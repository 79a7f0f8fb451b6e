"""The square root of the ratio: the covariance of an SGD update goes as lr² / batch."""

import math
from typing import TYPE_CHECKING

from lightning_gap.regime.rules.base import MOST_FORGOTTEN, Rule
from lightning_gap.regime.rules.optimizers import OPTIMIZERS, kind_of

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["Sqrt"]


class Sqrt(Rule):
    """Hoffer et al. 2017, section 4; LAMB: You et al. 2020, with a warm-up."""

    name = "sqrt"

    @property
    def also(self) -> str:
        """What it takes with a warning: the square root is the learning-rate part of their rule too."""
        return f", takes {', '.join(name for name, kind in OPTIMIZERS.items() if kind.adaptive)} with a warning"

    def factor(self, ratio: float) -> float:
        """Return the square root of the ratio."""
        return math.sqrt(ratio)

    def doubt(self, optimizer: "Optimizer", train_longer: float) -> str | None:
        """Return what it leaves out of the rule of an adaptive optimizer."""
        name = type(optimizer).__name__
        kind = kind_of(optimizer)
        if kind is None or not kind.adaptive:
            return super().doubt(optimizer, train_longer)
        decays = any(group.get("weight_decay") and kind.decouples(group) for group in optimizer.param_groups)
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
