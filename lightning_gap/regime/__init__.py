"""Train longer, generalize better: the regime of the small-batch reference run, for the batch that really runs."""

from typing import TYPE_CHECKING

from lightning_gap.faces import lazy

if TYPE_CHECKING:
    from lightning_gap.regime.batch_schedule_callback import BatchSizeSchedule as BatchSizeSchedule
    from lightning_gap.regime.batches.base import BatchSchedule as BatchSchedule
    from lightning_gap.regime.batches.noise import NoiseBatches as NoiseBatches
    from lightning_gap.regime.batches.plateau import PlateauBatches as PlateauBatches
    from lightning_gap.regime.batches.seesaw import SeesawBatches as SeesawBatches
    from lightning_gap.regime.batches.steps import BatchSteps as BatchSteps
    from lightning_gap.regime.branches import BranchLosses as BranchLosses
    from lightning_gap.regime.branches import measure_critical_batch as measure_critical_batch
    from lightning_gap.regime.callback import LargeBatchRegime as LargeBatchRegime
    from lightning_gap.regime.critical_batch import CriticalBatchFit as CriticalBatchFit
    from lightning_gap.regime.critical_batch import fit_critical_batch as fit_critical_batch
    from lightning_gap.regime.critical_batch import samples_to_target as samples_to_target
    from lightning_gap.regime.critical_batch import trade_off_at as trade_off_at
    from lightning_gap.regime.critical_batch import updates_to_target as updates_to_target
    from lightning_gap.regime.dual_norms import DualNoiseScaleEstimate as DualNoiseScaleEstimate
    from lightning_gap.regime.loader import effective_batch_size as effective_batch_size
    from lightning_gap.regime.micro_batches import MicroBatchGradients as MicroBatchGradients
    from lightning_gap.regime.noise_scale import NoiseScaleEstimate as NoiseScaleEstimate
    from lightning_gap.regime.noise_scale import gradient_moments as gradient_moments
    from lightning_gap.regime.noise_scale_callback import GradientNoiseScale as GradientNoiseScale
    from lightning_gap.regime.noise_sources.dual_gradients import DualNormGradients as DualNormGradients
    from lightning_gap.regime.noise_sources.example_gradients import ExampleGradients as ExampleGradients
    from lightning_gap.regime.plan import RegimePlan as RegimePlan
    from lightning_gap.regime.planned import plan_regime as plan_regime
    from lightning_gap.regime.rules.factor import LR_RULES as LR_RULES
    from lightning_gap.regime.rules.factor import lr_factor as lr_factor
    from lightning_gap.regime.rules.hyperparameters import OptimizerRules as OptimizerRules
    from lightning_gap.regime.rules.memory import batchnorm_momentum as batchnorm_momentum
    from lightning_gap.regime.rules.memory import ema_momentum as ema_momentum
    from lightning_gap.regime.rules.optimizers import OPTIMIZERS as OPTIMIZERS
    from lightning_gap.regime.rules.optimizers import OptimizerKind as OptimizerKind
    from lightning_gap.regime.sample_noise import noise_variance as noise_variance
    from lightning_gap.regime.sample_noise import sample_weights as sample_weights

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
