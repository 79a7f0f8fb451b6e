"""Batches that grow where a learning rate would fall."""

import math
from collections.abc import Sequence
from typing import Any

from lightning_gap.regime.batches.base import BatchSchedule, RateAt

__all__ = ["SeesawBatches", "seesaw_saving"]


class SeesawBatches(BatchSchedule):
    r"""Batches that grow where a scheduler lowers the learning rate: :math:`B(s) = B_0 \max_{r \le s} \eta(r)/\eta(s)`.

    Where the scheduler multiplies the rate by :math:`\alpha`, the batch is multiplied by :math:`1/\alpha`, and under
    the rule ``"sqrt"`` the rate by :math:`\sqrt\alpha`. A schedule :math:`\eta` over S samples takes
    :math:`\int \eta / \eta_{max}` of the reference run's updates: :math:`2/\pi` of them for a quarter of a cosine, a
    half for :math:`(1 + \cos)/2`.

    References:
        Meterez et al. 2025, "Seesaw: Accelerating training by balancing learning rate and batch size scheduling". Smith
        et al. 2018, "Don't decay the learning rate, increase the batch size".

    Example:
        >>> seesaw = SeesawBatches()
        >>> seesaw.begin(128, lambda samples: (0.1 if samples < 1000 else 0.025, 0.1))
        >>> seesaw.batch_at(999), seesaw.batch_at(1000)
        (128.0, 512.0)
    """

    needs_rates = rounds = True
    _base: int
    _rate_at: RateAt

    @property
    def name(self) -> str:
        """What to call the schedule in tables."""
        return "seesaw"

    def begin(self, reference_batch_size: int, rate_at: RateAt | None = None) -> None:
        """Begin a run whose reference run has this batch and this learning rate.

        Args:
            reference_batch_size: Samples per update of the reference run.
            rate_at: From samples seen, the reference run's learning rate there and the highest so far.
        """
        assert rate_at is not None
        self._base, self._rate_at = reference_batch_size, rate_at

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_rate_at"}  # of a run

    def batch_at(self, samples: int) -> float:
        """Return the batch of the update that begins after so many samples; infinite where the rate is 0.

        Args:
            samples: Samples seen.
        """
        rate, highest = self._rate_at(samples)
        return self._base * highest / rate if rate > 0 else math.inf


def seesaw_saving(shares: Sequence[float]) -> float:
    r"""Return the share of updates that :class:`SeesawBatches` saves, :math:`1 - \int \eta / \eta_{max}`.

    Args:
        shares: The learning rate at evenly spaced samples of the reference run, of any unit.

    Example:
        >>> cosine = [(1 + math.cos(math.pi * (i + 0.5) / 1000)) / 2 for i in range(1000)]
        >>> round(seesaw_saving(cosine), 6)
        0.5
    """
    highest, total = 0.0, 0.0
    for share in shares:
        highest = max(highest, share)
        total += share / highest if highest else 1.0
    return 1 - total / len(shares)
