"""Train longer, generalize better: the regime of the small-batch reference run, for the batch that really runs."""

from lightning_gap.regime.batch import effective_batch_size
from lightning_gap.regime.callback import LargeBatchRegime
from lightning_gap.regime.micro_batches import MicroBatchGradients
from lightning_gap.regime.monitor import GradientNoiseScale
from lightning_gap.regime.noise import noise_variance, sample_weights
from lightning_gap.regime.noise_scale import NoiseScaleEstimate, gradient_moments
from lightning_gap.regime.plan import RegimePlan, plan_regime
from lightning_gap.regime.scaling import LR_RULES, lr_factor

__all__ = [
    "LR_RULES",
    "GradientNoiseScale",
    "LargeBatchRegime",
    "MicroBatchGradients",
    "NoiseScaleEstimate",
    "RegimePlan",
    "effective_batch_size",
    "gradient_moments",
    "lr_factor",
    "noise_variance",
    "plan_regime",
    "sample_weights",
]
