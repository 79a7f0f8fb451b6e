"""What becomes of all hyperparameters of the optimizers of a run: decided, checked, and told, before any changes."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch.optim import Optimizer

from lightning_gap.regime.plan import RegimePlan
from lightning_gap.regime.rules.auto import choose
from lightning_gap.regime.rules.hyperparameters import LR_KEYS
from lightning_gap.regime.scaling import Rate

__all__ = ["change_of_groups", "decided", "groups_of"]

# Parameter groups as they were, each with its optimizer.
Groups = Sequence[tuple[Optimizer, dict[str, Any]]]
# What the table calls them.
_WORDS = {"weight_decay": "weight decay", "max_momentum": "largest momentum", "base_momentum": "least momentum"}


def decided(plan: RegimePlan, optimizers: Iterable[Optimizer], noise_scale: float | None = None) -> RegimePlan:
    """Return a plan with what ``lr_rule="auto"`` chooses for the optimizers; another plan as it is.

    Args:
        plan: The plan.
        optimizers: The reference run's.
        noise_scale: In samples, where it is known.
    """
    if plan.decided or plan.rate is Rate.FOUND:
        return plan
    choice = choose(
        [each for each in optimizers if each.param_groups],
        ratio=plan.ratio,
        batch_size=plan.batch_size,
        train_longer=plan.train_longer,
        updates=plan.updates,
        noise_scale=noise_scale,
    )
    warmup = 0 if choice.factor == 1.0 else plan.warmup_updates or choice.warmup_updates
    return replace(plan, lr_factor=choice.factor, warmup_updates=warmup, why=choice.why)


def groups_of(optimizers: Iterable[Optimizer]) -> Groups:
    """Return all parameter groups as they are now, each with its optimizer."""
    return [(optimizer, dict(group)) for optimizer in optimizers for group in optimizer.param_groups]


def change_of_groups(plan: RegimePlan, before: Groups) -> list[tuple[str, str, str]]:
    """Return a line for all but learning rates that a plan changes in parameter groups: what it is, before and after.

    Raises:
        ValueError: If a rule does not know one of the optimizers, or does not hold for it.
    """
    rows, rules = [], {"weight_decay": plan.weight_decay_rule}
    for index, (optimizer, group) in enumerate(before):
        for key, value in plan.rescaling.at(optimizer, group).items():
            if key not in LR_KEYS:
                label = f"{_WORDS.get(key, key)}, group {index} ({rules.get(key, plan.betas_rule)})"
                rows.append((label, _told(group[key]), _told(value)))
    return rows


def _told(value: Any) -> str:
    return ", ".join(map(_told, value)) if isinstance(value, (tuple, list)) else f"{float(value):.6g}"
