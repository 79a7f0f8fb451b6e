"""Ultra-slow diffusion (Hoffer, Hubara, Soudry 2017, section 3): how far the weights travel, and by which law."""

from lightning_gap.diffusion.callback import UltraSlowDiffusion
from lightning_gap.diffusion.distance import (
    WeightDisplacement,
    norms_and_biases,
    tracked_parameters,
    weight_displacement,
    weight_norm,
)
from lightning_gap.diffusion.landscape import LandscapeFit, estimate_alpha
from lightning_gap.diffusion.law import (
    DiffusionFit,
    Forecast,
    constant_lr_segments,
    fit_diffusion,
    forecast_updates,
    next_log_update,
)
from lightning_gap.diffusion.metric import UltraSlowDiffusionFit, WeightDistance
from lightning_gap.diffusion.plot import plot_diffusion
from lightning_gap.diffusion.reference import ReferenceRun, read_reference

__all__ = [
    "DiffusionFit",
    "Forecast",
    "LandscapeFit",
    "ReferenceRun",
    "UltraSlowDiffusion",
    "UltraSlowDiffusionFit",
    "WeightDisplacement",
    "WeightDistance",
    "constant_lr_segments",
    "estimate_alpha",
    "fit_diffusion",
    "forecast_updates",
    "next_log_update",
    "norms_and_biases",
    "plot_diffusion",
    "read_reference",
    "tracked_parameters",
    "weight_displacement",
    "weight_norm",
]
