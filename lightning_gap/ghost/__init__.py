"""Ghost batch normalization: statistics of small batches whatever the batch size."""

from lightning_gap.ghost.callback import GhostBatchNorm
from lightning_gap.ghost.convert import (
    GhostConversion,
    convert_ghost_batchnorm,
    plan_ghost_batchnorm,
    revert_ghost_batchnorm,
)
from lightning_gap.ghost.functional import ghost_batch_norm, ghost_slices
from lightning_gap.ghost.layers import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d, GhostNorm
from lightning_gap.ghost.recalibrate import recalibrate_batchnorm
from lightning_gap.ghost.synchronize import RunningStatisticsSync

__all__ = [
    "GhostBatchNorm",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "GhostConversion",
    "GhostNorm",
    "RunningStatisticsSync",
    "convert_ghost_batchnorm",
    "ghost_batch_norm",
    "ghost_slices",
    "plan_ghost_batchnorm",
    "recalibrate_batchnorm",
    "revert_ghost_batchnorm",
]
