"""How the learning rate follows the batch size, and the arithmetic that applies a factor."""

from enum import Enum, auto
from typing import TYPE_CHECKING

from lightning_gap.regime.rules.factor import LR_RULES, RULES, LRRule, lr_factor, rule_name
from lightning_gap.regime.rules.hyperparameters import OptimizerRules, Rescaling
from lightning_gap.regime.rules.hyperparameters import times as scaled
from lightning_gap.regime.rules.optimizers import names_of

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = [
    "EQUAL_SAMPLES",
    "LR_RULES",
    "LRRule",
    "OptimizerRules",
    "Rate",
    "check_rule",
    "default_train_longer",
    "lr_factor",
    "rule_name",
    "scale_optimizer",
    "scaled",
]

# Rules that keep the learning rate times the samples: with them a run makes fewer updates, on the same samples.
EQUAL_SAMPLES = tuple(name for name, rule in RULES.items() if rule.equal_samples)


class Rate(Enum):
    """Where a run's learning rate comes from."""

    RULED = auto()  # by the rule, from the reference run's
    FOUND = auto()  # by LearningRateFinder, at the batch that runs


def default_train_longer(rule: LRRule) -> float:
    """Return how far a rule goes from the reference run's epochs, 0, to its updates, 1, where nothing else is asked."""
    return 0.0 if rule in EQUAL_SAMPLES else 1.0


def check_rule(
    optimizer: "Optimizer", rule: str, ratio: float, train_longer: float, rules: OptimizerRules | None = None
) -> str | None:
    """Refuse an optimizer that a rule is not for, and return what is doubtful about one that it takes."""
    known = RULES.get(rule)
    if ratio == 1.0 or rule == "none":
        return None
    if any(group.get("lr") is None for group in optimizer.param_groups):
        raise ValueError(
            f"{type(optimizer).__name__} finds its own learning rate, which lr_rule={rule!r} cannot scale. Pass "
            'lr_rule="none".'
        )
    if known is None:
        return None
    if not set(names_of(optimizer)) & set(known.optimizers):
        return known.doubt(optimizer, train_longer, told=_told(rules))
    if rules is None or rules.betas_rule == "sde":
        known.check(optimizer, ratio)
    return None


def _told(rules: OptimizerRules | None) -> tuple[bool, bool]:
    """Return whether weight decay, and the betas, have rules of their own."""
    return (False, False) if rules is None else (rules.weight_decay != "none", rules.betas_rule != "none")


def scale_optimizer(optimizer: "Optimizer", rescaling: Rescaling, *, defaults: bool = True) -> None:
    r"""Change every hyperparameter of an optimizer by rules, in place: those of its groups and its defaults.

    Tensor learning rates are replaced by new tensors, for a scheduler may hold the old ones too.

    Example:
        >>> import torch
        >>> adam = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=0.5, betas=(0.9, 0.999), eps=1e-8)
        >>> scale_optimizer(adam, OptimizerRules("adam").rescaling(4.0, 4.0))
        >>> group = adam.param_groups[0]
        >>> group["lr"], [round(beta, 6) for beta in group["betas"]], group["eps"]
        (1.0, [0.6, 0.996], 5e-09)
    """
    for group in (*([optimizer.defaults] if defaults else []), *optimizer.param_groups):
        group.update(rescaling.at(optimizer, group))
