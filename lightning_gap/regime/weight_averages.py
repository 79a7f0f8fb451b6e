"""Moving averages of the weights beside a run: their decay follows the batch, and is given back."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_gap.regime.plan import RegimePlan
from lightning_gap.regime.rules.auto import AUTO
from lightning_gap.regime.rules.factor import rule_name
from lightning_gap.regime.rules.memory import ema_momentum
from lightning_gap.trainer.internals.of_lightning import averaged_model
from lightning_gap.trainer.internals.of_torch import ema_decay, set_ema_decay

__all__ = ["EMARule", "WeightsAverage", "averages_of", "check_ema_rule"]

EMARule = Literal["none", "half_life"] | Callable[[float, float], float]


def check_ema_rule(rule: EMARule | None, *, auto: bool) -> EMARule:
    """Return a rule, the default where it is ``None``; refuse one that is not known by a ``ValueError``."""
    if rule is None:
        return "half_life" if auto else "none"
    if not callable(rule) and rule not in ("none", "half_life"):
        raise ValueError(f"ema_rule={rule!r} is not known; pass 'none', 'half_life' or a callable (decay, ratio).")
    return rule


class WeightsAverage:
    """A callback's moving average of the weights, and what its decay becomes."""

    def __init__(self, callback: Any, model: Any, decay: float, rule: EMARule, plan: RegimePlan) -> None:
        self._callback, self._model, self._rule, self.users = callback, model, rule, decay
        self.decay = rule(decay, plan.ratio) if callable(rule) else float(ema_momentum(decay, plan.passed))
        if not 0 <= self.decay <= 1:
            raise ValueError(f"ema_rule={rule_name(rule)} gave {self.decay!r} for the decay {decay:g}; from 0 to 1.")

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
    kept = [(callback, model) for callback in callbacks if (model := averaged_model(callback)) is not None]
    found = [(callback, model, decay) for callback, model in kept if (decay := ema_decay(model)) is not None]
    if not found and plan.lr_rule != AUTO:
        raise ValueError(
            f"ema_rule={rule_name(rule)} finds no moving average of the weights whose decay is known. Add "
            "EMAWeightAveraging, or WeightAveraging with torch's get_ema_avg_fn(decay), to the trainer's callbacks; or "
            'pass ema_rule="none".'
        )
    averages = [WeightsAverage(*each, rule, plan) for each in found]
    for average, (callback, *_) in zip(averages, found, strict=True):
        start = getattr(callback, "update_starting_at_step", None)
        if start and average.decay != average.users:
            rank_zero_warn(
                f"LargeBatchRegime: {type(callback).__name__} starts to average at update {start} of this run, and "
                f"{start / plan.passed:.0f} of them see the samples that {start} of the reference run see."
            )
    return [average for average in averages if average.decay != average.users]
