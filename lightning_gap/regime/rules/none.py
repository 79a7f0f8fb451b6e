"""The learning rate as it is."""

from lightning_gap.regime.rules.base import Rule

__all__ = ["Unscaled"]


class Unscaled(Rule):
    """No rule: for all optimizers."""

    name = "none"

    def factor(self, ratio: float) -> float:
        """Return 1."""
        return 1.0
