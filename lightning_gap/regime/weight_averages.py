"""Moving averages of the weights beside a run: their decay follows the batch, and is given back."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_gap.regime.plan import RegimePlan
from lightning_gap.regime.rules.auto import AUTO
from lightning_gap.regime.rules.factor import rule_name
from lightning_gap.regime.rules.memory import ema_momentum
from lightning_gap.trainer.internals.of_lightning import averaged_model
from lightning_gap.trainer.internals.of_torch import ema_decay, set_ema_decay

__all__ = ["EMARule", "FollowingAverages", "WeightsAverage", "averages_of", "check_ema_rule"]

EMARule = Literal["none", "half_life"] | Callable[[float, float], float]


def check_ema_rule(rule: EMARule | None, *, auto: bool) -> EMARule:
    """Return a rule, the default where it is ``None``; refuse one that is not known by a ``ValueError``."""
    if rule is None:
        return "half_life" if auto else "none"
    if not callable(rule) and rule not in ("none", "half_life"):
        raise ValueError(f"ema_rule={rule!r} is not known; pass 'none', 'half_life' or a callable (decay, ratio).")
    return rule


def _decay(rule: EMARule, decay: float, ratio: float, passed: float) -> float:
    """Return what a decay becomes at a ratio of batches, where so many updates of the reference run pass in one."""
    found = rule(decay, ratio) if callable(rule) else float(ema_momentum(decay, passed))
    if not isinstance(found, int | float) or not 0 <= found <= 1:
        raise ValueError(f"ema_rule={rule_name(rule)} gave {found!r} for the decay {decay:g}; from 0 to 1.")
    return found


def _found(callbacks: Iterable[Any]) -> list[tuple[Any, Any, float]]:
    """Return the callbacks that keep a moving average, the averages, and their decays."""
    kept = [(callback, model) for callback in callbacks if (model := averaged_model(callback)) is not None]
    return [(callback, model, decay) for callback, model in kept if (decay := ema_decay(model)) is not None]


def _no_average(rule: EMARule) -> str:
    return (
        f"ema_rule={rule_name(rule)} finds no moving average of the weights whose decay is known. Add "
        "EMAWeightAveraging, or WeightAveraging with torch's get_ema_avg_fn(decay), to the trainer's callbacks; or "
        'pass ema_rule="none".'
    )


class WeightsAverage:
    """A callback's moving average of the weights, and what its decay becomes."""

    def __init__(self, callback: Any, model: Any, decay: float, rule: EMARule, plan: RegimePlan) -> None:
        self._callback, self._model, self._rule, self.users = callback, model, rule, decay
        self.decay = _decay(rule, decay, plan.ratio, plan.passed)

    def take(self) -> tuple[str, str, str]:
        """Change the decay, and return a line of the plan's table."""
        set_ema_decay(self._model, self.decay)
        name = type(self._callback).__name__
        return f"decay of {name} ({rule_name(self._rule)})", f"{self.users:.6g}", f"{self.decay:.6g}"

    def give_back(self) -> None:
        """Give the user's decay back."""
        set_ema_decay(self._model, self.users)


def averages_of(callbacks: Iterable[Any], plan: RegimePlan, rule: EMARule) -> list[WeightsAverage]:
    """Return the moving averages whose decay a rule changes.

    Raises:
        ValueError: If a rule was asked for, and there is no average with a decay.
    """
    if rule == "none":
        return []
    found = _found(callbacks)
    if not found and plan.lr_rule != AUTO:
        raise ValueError(_no_average(rule))
    averages = [WeightsAverage(*each, rule, plan) for each in found]
    for average, (callback, *_) in zip(averages, found, strict=True):
        start = getattr(callback, "update_starting_at_step", None)
        if start and average.decay != average.users:
            rank_zero_warn(
                f"LargeBatchRegime: {type(callback).__name__} starts to average at update {start} of this run, and "
                f"{start / plan.passed:.0f} of them see the samples that {start} of the reference run see."
            )
    return [average for average in averages if average.decay != average.users]


class FollowingAverages:
    r"""Moving averages of the weights whose decays follow a batch that changes.

    At an update of :math:`\kappa` times the reference run's batch a decay is :math:`\rho^\kappa`, so that the average
    remembers as many samples throughout. An average that is taken at the end of an epoch, which has the same samples,
    keeps the user's.

    Args:
        callbacks: Those of the trainer, in their order, once the averages are made.
        rule: ``None`` for the default, half-lives of what averages there are.
        ours: The callback that calls, whose place among the others says when the others' hooks have run.

    Raises:
        ValueError: If a rule was asked for and there is no average, or if it gives what is no decay.
    """

    def __init__(self, callbacks: Sequence[Any], rule: EMARule | None, ours: Any) -> None:
        self.rule: EMARule = "half_life" if rule is None else rule
        self.found = [] if self.rule == "none" else _found(callbacks)
        if rule not in (None, "none") and not self.found:
            raise ValueError(_no_average(self.rule))
        for ratio in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0):
            self.at(ratio)  # raises before training
        self._put = [decay for *_, decay in self.found]
        before = list(callbacks[: callbacks.index(ours)])
        self._before = [any(callback is each for each in before) for callback, *_ in self.found]

    @property
    def name(self) -> str:
        """The rule's, ``"none"`` where it changes nothing."""
        return rule_name(self.rule) if self.found else "none"

    def at(self, ratio: float) -> list[float]:
        """Return the decays at a ratio of the batch."""
        return [_decay(self.rule, decay, ratio, ratio) for *_, decay in self.found]

    def put(self, ratio: float) -> None:
        """Let the next update be averaged by the decays of its batch."""
        if self.found:
            self._write(self.at(ratio), [True] * len(self.found))

    def end_batch(self) -> None:
        """Give decays back to the averages that have been updated by now; others are so at the end of the epoch."""
        self._write([decay for *_, decay in self.found], self._before)

    def give_back(self) -> None:
        """Give all the user's decays back."""
        self._write([decay for *_, decay in self.found], [True] * len(self.found))

    def _write(self, decays: list[float], which: list[bool]) -> None:
        for index, (decay, wanted) in enumerate(zip(decays, which, strict=True)):
            if wanted and decay != self._put[index]:
                set_ema_decay(self.found[index][1], decay)
                self._put[index] = decay

    def rows(self, ratio: float | None) -> list[tuple[str, str, str]]:
        """Return lines of a table: the decays, and what they are at the largest batch, where it is known."""
        decays = [None] * len(self.found) if ratio is None else self.at(ratio)
        return [
            (
                f"decay of {type(callback).__name__}",
                f"{decay:.6g}",
                self.name if there is None else f"{self.name}, {there:.6g} at the largest batch",
            )
            for (callback, _, decay), there in zip(self.found, decays, strict=True)
        ]

    def warn_of_starts(self, update_after: Callable[[int], int | None]) -> None:
        """Warn of averages that start at an update of this run, other than the reference run's.

        Args:
            update_after: From an update of the reference run that of this run at the same samples, if it is known.
        """
        for callback, *_ in self.found:
            start = getattr(callback, "update_starting_at_step", None)
            there = update_after(start) if start else None
            if start and there != start:
                known = "fewer" if there is None else str(there)
                rank_zero_warn(
                    f"BatchSizeSchedule: {type(callback).__name__} starts to average at update {start} of this run, "
                    f"and {known} of them see the samples that {start} of the reference run see. Pass "
                    "update_starting_at_step in updates of this run, which the table counts."
                )
