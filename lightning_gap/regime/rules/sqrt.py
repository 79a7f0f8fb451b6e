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

    def doubt(
        self, optimizer: "Optimizer", train_longer: float, *, told: tuple[bool, bool] = (False, False)
    ) -> str | None:
        """Return what it leaves out of the rule of an adaptive optimizer."""
        name = type(optimizer).__name__
        kind = kind_of(optimizer)
        if kind is None or not kind.adaptive:
            return super().doubt(optimizer, train_longer, told=told)
        decay_told, betas_told = told
        decays = not decay_told and any(
            group.get("weight_decay") and kind.decouples(group) for group in optimizer.param_groups
        )
        longer = (
            f" At train_longer={train_longer:g} it is nobody's rule: it is derived for {name} at equal samples, "
            'train_longer=False; lr_rule="none" leaves the rate as it is.'
            if train_longer
            else ""
        )
        if not decays and betas_told and not longer:
            return None  # the whole of its rule
        with_decay = ", and its weight decay with it," if decays else ""
        left = "" if betas_told else " and leaves its betas and eps as they are"
        return (
            f'lr_rule="sqrt" scales the learning rate of {name}{with_decay}{left}. betas_rule="half_life" and '
            'weight_decay_rule="timescale" let these follow, and lr_rule="adam" scales betas and eps, for ratio * '
            f"(1 - beta) < {MOST_FORGOTTEN}.{longer}"
        )
