"""Train longer, generalize better: the regime of the small-batch reference run, for the batch that really runs."""

from lightning_gap.regime.batch import effective_batch_size
from lightning_gap.regime.callback import LargeBatchRegime
from lightning_gap.regime.plan import RegimePlan, plan_regime
from lightning_gap.regime.scaling import LR_RULES, lr_factor

__all__ = ["LR_RULES", "LargeBatchRegime", "RegimePlan", "effective_batch_size", "lr_factor", "plan_regime"]
