"""The ratio itself: the mean of an SGD update over one pass goes as lr / batch."""

from lightning_gap.regime.rules.base import Rule

__all__ = ["Linear"]


class Linear(Rule):
    """Goyal et al. 2017; LARS: You et al. 2017."""

    name = "linear"
    equal_samples = True

    def factor(self, ratio: float) -> float:
        """Return the ratio."""
        return float(ratio)
