"""How hyperparameters follow the batch size: a rule a file, in tables by name. None of these imports torch."""

from lightning_gap.regime.rules.base import Rule
from lightning_gap.regime.rules.factor import RULES, LRRule, lr_factor
from lightning_gap.regime.rules.hyperparameters import OptimizerRules
from lightning_gap.regime.rules.memory import batchnorm_momentum, ema_momentum
from lightning_gap.regime.rules.optimizers import OPTIMIZERS, OptimizerKind

__all__ = [
    "OPTIMIZERS",
    "RULES",
    "RULE_NAMES",
    "LRRule",
    "OptimizerKind",
    "OptimizerRules",
    "Rule",
    "batchnorm_momentum",
    "ema_momentum",
    "lr_factor",
]

RULE_NAMES = tuple(RULES)
