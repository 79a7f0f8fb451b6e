"""Ghost batch normalization: statistics of small batches whatever the batch size."""

from typing import TYPE_CHECKING

from lightning_gap.faces import lazy

if TYPE_CHECKING:
    from lightning_gap.ghost.callback import GhostBatchNorm as GhostBatchNorm
    from lightning_gap.ghost.convert import GhostConversion as GhostConversion
    from lightning_gap.ghost.convert import convert_ghost_batchnorm as convert_ghost_batchnorm
    from lightning_gap.ghost.convert import plan_ghost_batchnorm as plan_ghost_batchnorm
    from lightning_gap.ghost.convert import revert_ghost_batchnorm as revert_ghost_batchnorm
    from lightning_gap.ghost.functional import ghost_batch_norm as ghost_batch_norm
    from lightning_gap.ghost.functional import ghost_slices as ghost_slices
    from lightning_gap.ghost.joined_statistics import RunningStatisticsSync as RunningStatisticsSync
    from lightning_gap.ghost.layers import GhostBatchNorm1d as GhostBatchNorm1d
    from lightning_gap.ghost.layers import GhostBatchNorm2d as GhostBatchNorm2d
    from lightning_gap.ghost.layers import GhostBatchNorm3d as GhostBatchNorm3d
    from lightning_gap.ghost.layers import GhostNorm as GhostNorm
    from lightning_gap.ghost.recalibrate import recalibrate_batchnorm as recalibrate_batchnorm

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
