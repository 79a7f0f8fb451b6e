"""The square root of the ratio: the covariance of an SGD update goes as lr² / batch."""

import math
from typing import TYPE_CHECKING

from lightning_gap.regime.rules.base import MOST_FORGOTTEN, Rule

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["ADAPTIVE_OPTIMIZERS", "Sqrt"]

# The square root is the learning-rate part of these optimizers' rule as well, at equal samples.
ADAPTIVE_OPTIMIZERS = ("Adam", "AdamW", "RMSprop", "NAdam", "NAdamW", "RAdam", "Adamax", "AdamP", "Adopt")


class Sqrt(Rule):
    """Hoffer et al. 2017, section 4; LAMB: You et al. 2020, with a warm-up."""

    name = "sqrt"
    optimizers = ("SGD", "SGDW", "SGDP", "Lamb", "LAMB")
    also = f", takes {', '.join(ADAPTIVE_OPTIMIZERS)} with a warning"

    def factor(self, ratio: float) -> float:
        """Return the square root of the ratio."""
        return math.sqrt(ratio)

    def doubt(self, optimizer: "Optimizer", train_longer: float) -> str | None:
        """Return what it leaves out of the rule of an adaptive optimizer."""
        name = type(optimizer).__name__
        if not {kind.__name__ for kind in type(optimizer).__mro__} & set(ADAPTIVE_OPTIMIZERS):
            return super().doubt(optimizer, train_longer)
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
