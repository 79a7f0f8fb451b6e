"""How the learning rate follows the batch size: a rule a file, in a table by name. None of these imports torch."""

from collections.abc import Mapping
from types import MappingProxyType

from lightning_gap.regime.rules.adam import Adam
from lightning_gap.regime.rules.base import Rule
from lightning_gap.regime.rules.linear import Linear
from lightning_gap.regime.rules.none import Unscaled
from lightning_gap.regime.rules.sqrt import Sqrt

__all__ = ["RULES", "RULE_NAMES", "Rule"]

RULES: Mapping[str, Rule] = MappingProxyType({rule.name: rule for rule in (Sqrt(), Linear(), Adam(), Unscaled())})
RULE_NAMES = tuple(RULES)
