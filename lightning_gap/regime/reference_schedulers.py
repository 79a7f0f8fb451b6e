"""The schedulers of a reference run, taken out of Lightning's hands to be stepped by the samples seen."""

from collections.abc import Callable
from fractions import Fraction
from typing import cast

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_gap.regime.clock import Interval, ReferenceClock, Stepping
from lightning_gap.regime.fit import Fit
from lightning_gap.regime.parts import PassClock
from lightning_gap.regime.rates import Rollout
from lightning_gap.regime.rollout import roll_out

__all__ = ["RolledOut", "rates_by_samples", "reference_schedulers"]

RolledOut = tuple[LRSchedulerConfig, ReferenceClock, Rollout]


def reference_schedulers(
    fit: Fit, clock: PassClock, last: int | None, stepping: Stepping, *, follow: bool
) -> list[RolledOut]:
    """Return the schedulers that the reference run steps by itself, rolled out; refuse those that fail there.

    ``follow`` says that batches follow the rate, which then must be known beforehand. Plateaus stay Lightning's.
    """
    found = []
    for config in fit.configs:
        name, by_epoch = type(config.scheduler).__name__, config.interval == "epoch"
        if config.reduce_on_plateau or isinstance(config.scheduler, ReduceLROnPlateau):
            if follow:
                raise MisconfigurationException(
                    f'BatchSizeSchedule("seesaw") follows a scheduler that is known beforehand, and {name} looks at a '
                    f'metric. Use PlateauBatches(monitor="{config.monitor}") in its place.'
                )
            continue
        if by_epoch and clock.samples is None:
            continue  # Lightning knows when an epoch is over
        interval: Interval = "epoch" if by_epoch else "step"
        own = ReferenceClock(
            config.scheduler, interval, config.frequency, clock.updates_per_pass, Fraction(1), last, stepping
        )
        seen = Rollout([], None, whole=False) if last is None else roll_out(own)
        if seen.error is not None:
            raise MisconfigurationException(
                f"BatchSizeSchedule: {name} fails within the reference run's {last} updates at the batch "
                f"{clock.batch_size}: {seen.error}"
            )
        found.append((config, own, seen))
    return found


def rates_by_samples(
    rolled: list[RolledOut], clock: PassClock, last: int | None
) -> Callable[[int], tuple[float, float]]:
    """Return what gives the reference run's rate after so many samples, and the highest up to then."""
    if len(rolled) != 1 or not rolled[0][2].whole or clock.samples is None:
        raise MisconfigurationException(
            'BatchSizeSchedule("seesaw") follows one scheduler over a reference run of known length, and there are '
            f"{len(rolled)} that can be rolled out. Return one from configure_optimizers, set max_epochs or max_steps, "
            "or give the batches as steps."
        )
    _, own, seen = rolled[0]
    highest, most = [], 0.0
    for rate in seen.rates:
        most = max(most, rate)
        highest.append(most)

    def rate_at(samples: int) -> tuple[float, float]:
        update = clock.update(*divmod(samples, cast(int, clock.samples)))
        step = min(own.steps_until(min(update, cast(int, last))), len(highest) - 1)
        return seen.rates[step], highest[step]

    return rate_at
