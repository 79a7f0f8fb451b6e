"""What becomes of all hyperparameters of the optimizers of a run: decided, checked, and told, before any changes."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_gap.regime.plan import RegimePlan
from lightning_gap.regime.rules.auto import AUTO, choose
from lightning_gap.regime.rules.hyperparameters import LR_KEYS
from lightning_gap.regime.scaling import Rate

__all__ = ["change_of_groups", "choice_verdict", "decided", "groups_of"]

if TYPE_CHECKING:
    from torch.optim import Optimizer

# Parameter groups as they were, each with its optimizer.
Groups = Sequence[tuple["Optimizer", dict[str, Any]]]
# What the table calls them.
_WORDS = {"weight_decay": "weight decay", "max_momentum": "largest momentum", "base_momentum": "least momentum"}


def decided(plan: RegimePlan, optimizers: "Iterable[Optimizer | str]", noise_scale: float | None = None) -> RegimePlan:
    """Return a plan with what ``lr_rule="auto"`` chooses for the optimizers; another plan as it is.

    Args:
        plan: The plan.
        optimizers: The reference run's, or the names of their classes.
        noise_scale: In samples, where it is known.
    """
    if plan.decided or plan.rate is Rate.FOUND:
        return plan
    choice = choose(
        [each for each in optimizers if isinstance(each, str) or each.param_groups],
        ratio=plan.ratio,
        batch_size=plan.batch_size,
        train_longer=plan.train_longer,
        updates=plan.updates,
        noise_scale=noise_scale,
    )
    warmup = 0 if choice.factor == 1.0 else plan.warmup_updates or choice.warmup_updates
    return replace(plan, lr_factor=choice.factor, warmup_updates=warmup, why=choice.why)


def choice_verdict(plan: RegimePlan, optimizers: "Iterable[Optimizer]", noise_scale: float) -> str:
    """Say what ``lr_rule="auto"`` would have chosen by a noise scale, where that is another factor by 5 % or more.

    Args:
        plan: That was decided before the noise scale was known.
        optimizers: The run's.
        noise_scale: In samples; not above 0 where it is not known.
    """
    if plan.lr_rule != AUTO or plan.rate is Rate.FOUND or not noise_scale > 0:
        return ""
    knowing = decided(replace(plan, why=""), optimizers, noise_scale)
    if abs(knowing.lr_factor / plan.lr_factor - 1) < 0.05:
        return ""
    return (
        f'With noise_scale={noise_scale:.4g}, lr_rule="auto" would multiply the learning rate by '
        f"{knowing.lr_factor:.4g} instead of {plan.lr_factor:.4g}."
    )


def groups_of(optimizers: "Iterable[Optimizer]") -> Groups:
    """Return all parameter groups as they are now, each with its optimizer."""
    return [(optimizer, dict(group)) for optimizer in optimizers for group in optimizer.param_groups]


def change_of_groups(plan: RegimePlan, before: Groups) -> list[tuple[str, str, str]]:
    """Return a line for all but learning rates that a plan changes in parameter groups: what it is, before and after.

    Raises:
        ValueError: If a rule does not know one of the optimizers, or does not hold for it.
    """
    rows, rules = [], {"weight_decay": plan.weight_decay_rule}
    if plan.momentum_rule != "none":
        rules["momentum"] = plan.momentum_rule
    for index, (optimizer, group) in enumerate(before):
        for key, value in plan.rescaling.at(optimizer, group).items():
            if key not in LR_KEYS:
                label = f"{_WORDS.get(key, key)}, group {index} ({rules.get(key, plan.betas_rule)})"
                rows.append((label, _told(group[key]), _told(value)))
    return rows


def _told(value: Any) -> str:
    return ", ".join(map(_told, value)) if isinstance(value, (tuple, list)) else f"{float(value):.6g}"
