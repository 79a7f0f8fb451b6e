"""Close two gaps with PyTorch Lightning.

* The **generalization gap** of large-batch training (Hoffer, Hubara, Soudry 2017, "Train longer, generalize
  better"): :class:`LargeBatchRegime`, :class:`GhostBatchNorm`, :class:`UltraSlowDiffusion` and
  :class:`GradientNoiseScale` are callbacks for any ``Trainer``.
* The **Monge gap** (Uscidda, Cuturi 2023): :class:`MongeMap` learns an optimal transport map between two sets of
  samples for any cost; :func:`monge_gap` and :func:`sinkhorn_divergence` are the mathematics.

Each name is imported when it is first used, so that ``import lightning_gap`` costs next to nothing.
"""

from typing import TYPE_CHECKING

from lightning_gap.faces import lazy

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lightning_gap.diffusion.callback import UltraSlowDiffusion as UltraSlowDiffusion
    from lightning_gap.ghost.callback import GhostBatchNorm as GhostBatchNorm
    from lightning_gap.ghost.convert import convert_ghost_batchnorm as convert_ghost_batchnorm
    from lightning_gap.ghost.convert import revert_ghost_batchnorm as revert_ghost_batchnorm
    from lightning_gap.ghost.recalibrate import recalibrate_batchnorm as recalibrate_batchnorm
    from lightning_gap.monge import costs as costs
    from lightning_gap.monge.figure import MapFigure as MapFigure
    from lightning_gap.monge.module import MongeMap as MongeMap
    from lightning_gap.monge.ot.divergence import sinkhorn_divergence as sinkhorn_divergence
    from lightning_gap.monge.ot.gap import monge_gap as monge_gap
    from lightning_gap.monge.samples.datamodule import SamplesDataModule as SamplesDataModule
    from lightning_gap.regime.batch_schedule_callback import BatchSizeSchedule as BatchSizeSchedule
    from lightning_gap.regime.callback import LargeBatchRegime as LargeBatchRegime
    from lightning_gap.regime.loader import effective_batch_size as effective_batch_size
    from lightning_gap.regime.noise_scale_callback import GradientNoiseScale as GradientNoiseScale

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
