"""Batches that are told beforehand: by steps, or by a function."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

from lightning_gap.checks import check_integer
from lightning_gap.regime.batches.base import BatchSchedule

__all__ = ["BatchSteps", "CallableBatches"]


class BatchSteps(BatchSchedule):
    """Batches that change after given numbers of samples.

    Args:
        steps: Pairs ``(samples, batch)``: from so many samples on, this batch. The first is from 0 on.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If there are no steps, or the first is not from 0 on, or they are not in order.

    Example:
        >>> steps = BatchSteps([(0, 128), (50_000, 256), (150_000, 1024)])
        >>> [steps.batch_at(samples) for samples in (0, 49_999, 50_000, 10**6)]
        [128, 128, 256, 1024]
    """

    def __init__(self, steps: Sequence[tuple[int, int]]) -> None:
        pairs = [tuple(step) for step in steps]
        if not pairs or any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"steps={steps!r} must be pairs (samples, batch), as [(0, 128), (50_000, 256)].")
        for samples, batch in pairs:
            check_integer("schedule: samples", samples, 0, "samples seen before the batch changes")
            check_integer("schedule: batch", batch, what="samples per update over all devices")
        self.starts, self.batches = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        if self.starts[0] != 0:
            raise ValueError(f"steps={steps!r} must begin at 0 samples: put (0, batch) first.")
        if any(after <= before for before, after in zip(self.starts, self.starts[1:], strict=False)):
            raise ValueError(f"steps={steps!r} must have growing numbers of samples.")

    @property
    def name(self) -> str:
        """What to call the schedule in tables."""
        return ", ".join(f"{batch} from {start}" for start, batch in zip(self.starts, self.batches, strict=True))

    def batch_at(self, samples: int) -> float:
        """Return the batch of the update that begins after so many samples.

        Args:
            samples: Samples seen.
        """
        return self.batches[bisect_right(self.starts, samples) - 1]


class CallableBatches(BatchSchedule):
    """Batches by a function of the samples seen.

    Args:
        function: From the samples seen to the batch; it must give the same for the same samples.
    """

    rounds = True

    def __init__(self, function: Callable[[int], float]) -> None:
        self.function = function

    @property
    def name(self) -> str:
        """What to call the schedule in tables."""
        return f"{getattr(self.function, '__name__', type(self.function).__name__)}()"

    def batch_at(self, samples: int) -> float:
        """Return the batch of the update that begins after so many samples.

        Args:
            samples: Samples seen.
        """
        batch = self.function(samples)
        if isinstance(batch, bool) or not isinstance(batch, (int, float)) or not 1 <= batch < math.inf:
            raise ValueError(f"schedule={self.name} gave {batch!r} at {samples} samples; it must give 1 or more.")
        return batch
