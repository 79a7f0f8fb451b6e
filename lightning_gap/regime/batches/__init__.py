"""How large a batch is as training goes on: a function of the samples seen. Nothing here imports Lightning."""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

from lightning_gap.checks import check_choice
from lightning_gap.regime.batches.base import BatchSchedule
from lightning_gap.regime.batches.noise import NoiseBatches
from lightning_gap.regime.batches.plateau import PlateauBatches
from lightning_gap.regime.batches.seesaw import SeesawBatches
from lightning_gap.regime.batches.steps import BatchSteps, CallableBatches

__all__ = ["batch_schedule"]

_NAMED: Mapping[str, Callable[[], BatchSchedule]] = {
    "seesaw": SeesawBatches,
    "plateau": PlateauBatches,
    "noise": NoiseBatches,
}


def batch_schedule(
    schedule: str | Sequence[tuple[int, int]] | Callable[[int], float] | BatchSchedule,
) -> BatchSchedule:
    """Return the schedule that is meant: by its name, by steps, by a function, or as it is.

    Args:
        schedule: ``"seesaw"``, ``"plateau"``, ``"noise"``, pairs (samples, batch), a function of samples, or a
            :class:`BatchSchedule`.

    Raises:
        TypeError: If it is none of these.
        ValueError: If the name is not known, or the steps are not in order.
    """
    if isinstance(schedule, BatchSchedule):
        return schedule
    if isinstance(schedule, str):
        check_choice("schedule", schedule, tuple(_NAMED))
        return _NAMED[schedule]()
    if callable(schedule):
        return CallableBatches(schedule)
    if isinstance(schedule, Sequence):
        return BatchSteps(cast(Sequence[tuple[int, int]], schedule))
    raise TypeError(
        f"schedule={schedule!r} must be pairs (samples, batch), a function of the samples seen, or one of "
        f"{', '.join(_NAMED)}."
    )
