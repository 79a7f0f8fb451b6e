"""The square root of the ratio, with 1 - beta and eps scaled too: so Adam keeps its limiting SDE."""

import math

from lightning_gap.regime.rules.base import Rule

__all__ = ["Adam"]


class Adam(Rule):
    """Malladi et al. 2022."""

    name = "adam"
    equal_samples = moments = True

    def factor(self, ratio: float) -> float:
        """Return the square root of the ratio."""
        return math.sqrt(ratio)
