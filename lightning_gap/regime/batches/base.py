"""What a batch schedule says: how large a batch is, as a function of the samples seen."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

__all__ = ["AdaptiveBatches", "BatchSchedule", "RateAt"]

RateAt = Callable[[int], tuple[float, float]]


class BatchSchedule:
    r"""The batch :math:`B(s)` of the update that begins after s samples; a subclass says which.

    Attributes:
        adaptive: Whether the batch follows what training measures, so that it is not known beforehand.
        needs_rates: Whether the batch follows the learning rate of the reference run.
        rounds: Whether the batch is a real number, to be rounded.
    """

    adaptive: ClassVar[bool] = False
    needs_rates: ClassVar[bool] = False
    rounds: ClassVar[bool] = False

    def begin(self, reference_batch_size: int, rate_at: RateAt | None = None) -> None:
        """Begin a run whose reference run has this batch.

        Args:
            reference_batch_size: Samples per update of the reference run.
            rate_at: From samples seen, the reference run's learning rate there and the highest so far. Only where
                :attr:`needs_rates`.
        """

    def batch_at(self, samples: int) -> float:
        """Return the batch of the update that begins after so many samples.

        Args:
            samples: Samples seen.
        """
        raise NotImplementedError

    @property
    def name(self) -> str:
        """What to call the schedule in tables."""
        return type(self).__name__

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Take in what has been measured by the end of a validation, or of an epoch without one.

        Args:
            metrics: What has been logged, by name.
        """

    def observe_noise(self, noise_scale: float) -> None:
        """Take in the latest gradient noise scale.

        Args:
            noise_scale: In samples; NaN where it is not known yet.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what an adaptive schedule has learnt, as plain Python."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint left.

        Args:
            state: What :meth:`state_dict` returned.
        """


class AdaptiveBatches(BatchSchedule):
    """Batches that follow what training measures."""

    adaptive = True
    _base = 1
    _ratio = 1.0

    def begin(self, reference_batch_size: int, rate_at: RateAt | None = None) -> None:
        """Begin a run whose reference run has this batch.

        Args:
            reference_batch_size: Samples per update of the reference run.
            rate_at: Not asked.
        """
        self._base, self._ratio = reference_batch_size, 1.0

    def batch_at(self, samples: int) -> float:
        """Return the batch of the update that begins now.

        Args:
            samples: Samples seen.
        """
        return self._base * self._ratio
