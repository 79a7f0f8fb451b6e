"""Ultra-slow diffusion (Hoffer, Hubara, Soudry 2017, section 3): how far the weights travel, and by which law."""

from lightning_gap.diffusion.callback import UltraSlowDiffusion
from lightning_gap.diffusion.distance import WeightDisplacement, tracked_parameters, weight_displacement, weight_norm
from lightning_gap.diffusion.law import DiffusionFit, constant_lr_segments, fit_diffusion, next_log_update

__all__ = [
    "DiffusionFit",
    "UltraSlowDiffusion",
    "WeightDisplacement",
    "constant_lr_segments",
    "fit_diffusion",
    "next_log_update",
    "tracked_parameters",
    "weight_displacement",
    "weight_norm",
]
