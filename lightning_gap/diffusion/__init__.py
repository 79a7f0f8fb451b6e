"""Ultra-slow diffusion (Hoffer, Hubara, Soudry 2017, section 3): how far the weights travel, and by which law."""

from typing import TYPE_CHECKING

from lightning_gap.faces import lazy

if TYPE_CHECKING:
    from lightning_gap.diffusion.callback import UltraSlowDiffusion as UltraSlowDiffusion
    from lightning_gap.diffusion.distance import WeightDisplacement as WeightDisplacement
    from lightning_gap.diffusion.distance import norms_and_biases as norms_and_biases
    from lightning_gap.diffusion.distance import tracked_parameters as tracked_parameters
    from lightning_gap.diffusion.distance import weight_displacement as weight_displacement
    from lightning_gap.diffusion.distance import weight_norm as weight_norm
    from lightning_gap.diffusion.fit import DiffusionFit as DiffusionFit
    from lightning_gap.diffusion.fit import fit_diffusion as fit_diffusion
    from lightning_gap.diffusion.forecast import Forecast as Forecast
    from lightning_gap.diffusion.forecast import forecast_updates as forecast_updates
    from lightning_gap.diffusion.grid import constant_lr_segments as constant_lr_segments
    from lightning_gap.diffusion.grid import next_log_update as next_log_update
    from lightning_gap.diffusion.landscape import LandscapeFit as LandscapeFit
    from lightning_gap.diffusion.landscape import estimate_alpha as estimate_alpha
    from lightning_gap.diffusion.metrics import UltraSlowDiffusionFit as UltraSlowDiffusionFit
    from lightning_gap.diffusion.metrics import WeightDistance as WeightDistance
    from lightning_gap.diffusion.plot import plot_diffusion as plot_diffusion
    from lightning_gap.diffusion.reference import ReferenceRun as ReferenceRun
    from lightning_gap.diffusion.reference import read_reference as read_reference

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
