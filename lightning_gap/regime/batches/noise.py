"""Batches that follow the gradient noise scale."""

from typing import Any

from lightning_gap.checks import check_number
from lightning_gap.regime.batches.base import AdaptiveBatches

__all__ = ["NoiseBatches"]


class NoiseBatches(AdaptiveBatches):
    r"""Batches that follow the gradient noise scale: doubled until the next doubling would pass a share of it.

    Hysteresis: the batch B doubles once :math:`share \cdot B_{simple} \ge hysteresis \cdot B`, so that a noise scale
    that is measured to a few tens of percent does not make it jump; it never shrinks.

    Args:
        share: Of the noise scale that the batch is to be, above 0.
        hysteresis: How many times the present batch the share must reach before the batch doubles, 1 or more.

    Raises:
        ValueError: If an argument is out of its range.

    References:
        McCandlish, Kaplan, Amodei 2018, "An empirical model of large-batch training", section 2.

    Example:
        >>> noise = NoiseBatches()
        >>> noise.begin(32)
        >>> for scale in (float("nan"), 50.0, 150.0, 90.0):
        ...     noise.observe_noise(scale)
        ...     print(noise.batch_at(0))
        32.0
        32.0
        64.0
        64.0
    """

    def __init__(self, *, share: float = 1.0, hysteresis: float = 2.0) -> None:
        self.share = check_number("share", share, above=0)
        self.hysteresis = check_number("hysteresis", hysteresis, least=1)

    @property
    def name(self) -> str:
        """What to call the schedule in tables."""
        return "gradient noise scale" if self.share == 1 else f"{self.share:g} of the gradient noise scale"

    def observe_noise(self, noise_scale: float) -> None:
        """Double the batch if it is far below the noise scale.

        Args:
            noise_scale: In samples; NaN where it is not known yet.
        """
        if self.share * noise_scale >= self.hysteresis * self._base * self._ratio:
            self._ratio *= 2

    def state_dict(self) -> dict[str, Any]:
        """Return how far the batch has grown."""
        return {"ratio": self._ratio}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint left.

        Args:
            state: What :meth:`state_dict` returned.
        """
        self._ratio = state["ratio"]
