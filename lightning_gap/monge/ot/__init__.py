"""Optimal transport between samples: torch alone, importable without Lightning."""

from typing import TYPE_CHECKING

from lightning_gap.faces import lazy

if TYPE_CHECKING:
    from lightning_gap.monge.ot import costs as costs
    from lightning_gap.monge.ot.divergence import divergence_and_gap as divergence_and_gap
    from lightning_gap.monge.ot.divergence import sinkhorn_divergence as sinkhorn_divergence
    from lightning_gap.monge.ot.energy import energy_distance as energy_distance
    from lightning_gap.monge.ot.epsilon import Epsilon as Epsilon
    from lightning_gap.monge.ot.gap import monge_gap as monge_gap
    from lightning_gap.monge.ot.gaussian import gaussian_map as gaussian_map
    from lightning_gap.monge.ot.marginal import marginal_wasserstein as marginal_wasserstein
    from lightning_gap.monge.ot.minibatch_energy import minibatch_energy_distance as minibatch_energy_distance
    from lightning_gap.monge.ot.options import SolverOptions as SolverOptions
    from lightning_gap.monge.ot.result import ConvergenceWarning as ConvergenceWarning
    from lightning_gap.monge.ot.result import OTResult as OTResult
    from lightning_gap.monge.ot.solve import optimal_transport as optimal_transport

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
