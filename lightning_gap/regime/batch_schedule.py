"""How large a batch is as training goes on: a function of the samples seen. Nothing here imports Lightning."""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_gap.checks import check_choice, check_integer, check_number

__all__ = [
    "BatchSchedule",
    "BatchSteps",
    "CallableBatches",
    "NoiseBatches",
    "PlateauBatches",
    "SeesawBatches",
    "batch_schedule",
    "seesaw_saving",
]

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
            raise ValueError(f"schedule={steps!r} must be pairs (samples, batch), as [(0, 128), (50_000, 256)].")
        for samples, batch in pairs:
            check_integer("schedule: samples", samples, 0, "samples seen before the batch changes")
            check_integer("schedule: batch", batch, what="samples per update over all devices")
        self.starts, self.batches = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        if self.starts[0] != 0:
            raise ValueError(f"schedule={steps!r} must begin at 0 samples: put (0, batch) first.")
        if any(after <= before for before, after in zip(self.starts, self.starts[1:], strict=False)):
            raise ValueError(f"schedule={steps!r} must have growing numbers of samples.")

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

    def batch_at(self, samples: int) -> float:
        """Return the batch of the update that begins after so many samples; infinite where the rate is 0.

        Args:
            samples: Samples seen.
        """
        rate, highest = self._rate_at(samples)
        return self._base * highest / rate if rate > 0 else math.inf


class _AdaptiveBatches(BatchSchedule):
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


class PlateauBatches(_AdaptiveBatches):
    """Batches that grow where a metric no longer gets better, in the place of a learning rate that falls there.

    When to grow is decided by torch's ``ReduceLROnPlateau``, with its arguments.

    Args:
        monitor: The metric's name.
        mode: ``"min"``, where less is better, or ``"max"``.
        factor: By what the batch grows, more than 1.
        patience: Validations without progress before the batch grows.
        threshold: The least relative progress that counts.
        cooldown: Validations after a growth that do not count.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> plateau = PlateauBatches(patience=0)
        >>> plateau.begin(128)
        >>> for loss in (1.0, 0.5, 0.5, 0.4):
        ...     plateau.observe({"val_loss": loss})
        ...     print(plateau.batch_at(0))
        128.0
        128.0
        256.0
        256.0
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        *,
        mode: str = "min",
        factor: float = 2.0,
        patience: int = 3,
        threshold: float = 1e-3,
        cooldown: int = 0,
    ) -> None:
        check_choice("mode", mode, ("min", "max"))
        check_number("factor", factor, above=1)
        check_integer("patience", patience, 0, "validations without progress")
        check_integer("cooldown", cooldown, 0, "validations that do not count")
        self.monitor, self.factor = monitor, float(factor)
        self._options: dict[str, Any] = {
            "mode": mode, "factor": 0.5, "patience": patience, "threshold": threshold, "cooldown": cooldown, "eps": 0.0,
        }  # fmt: skip
        self._detector = self._new()

    def _new(self) -> ReduceLROnPlateau:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        return ReduceLROnPlateau(optimizer, **self._options)

    @property
    def name(self) -> str:
        """What to call the schedule in tables."""
        return f"times {self.factor:g} where {self.monitor} stays"

    def begin(self, reference_batch_size: int, rate_at: RateAt | None = None) -> None:
        """Begin a run whose reference run has this batch.

        Args:
            reference_batch_size: Samples per update of the reference run.
            rate_at: Not asked.
        """
        super().begin(reference_batch_size)
        self._detector = self._new()

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Grow the batch if the metric has not got better for long enough.

        Args:
            metrics: What has been logged, by name.
        """
        if self.monitor not in metrics:
            raise ValueError(
                f"monitor={self.monitor!r} has not been logged by the end of a validation; there are "
                f"{sorted(metrics)}. Log it, or set monitor to one of these."
            )
        group = self._detector.optimizer.param_groups[0]
        group["lr"] = 1.0
        self._detector.step(float(metrics[self.monitor]))
        if group["lr"] < 1.0:
            self._ratio *= self.factor

    def state_dict(self) -> dict[str, Any]:
        """Return how far the batch has grown, and what has been seen."""
        seen = {key: getattr(self._detector, key) for key in ("best", "num_bad_epochs", "cooldown_counter")}
        return {"ratio": self._ratio, **{key: float(value) for key, value in seen.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint left.

        Args:
            state: What :meth:`state_dict` returned.
        """
        self._ratio = state["ratio"]
        self._detector.best = state["best"]
        self._detector.num_bad_epochs, self._detector.cooldown_counter = (
            int(state[key]) for key in ("num_bad_epochs", "cooldown_counter")
        )


class NoiseBatches(_AdaptiveBatches):
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


_NAMED: Mapping[str, Callable[[], BatchSchedule]] = {
    "seesaw": SeesawBatches,
    "plateau": PlateauBatches,
    "noise": NoiseBatches,
}


def batch_schedule(schedule: "str | Sequence[tuple[int, int]] | Callable[[int], float] | BatchSchedule") -> BatchSchedule:
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
        return BatchSteps(schedule)
    raise TypeError(
        f"schedule={schedule!r} must be pairs (samples, batch), a function of the samples seen, or one of "
        f"{', '.join(_NAMED)}."
    )


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
