"""The Monge gap: optimal transport maps for any cost (Uscidda and Cuturi 2023)."""

from lightning_gap.monge import costs
from lightning_gap.monge.batches import UnpairedBatch
from lightning_gap.monge.brenier import BrenierMap
from lightning_gap.monge.conditional import ConditionalMap
from lightning_gap.monge.conservativity import conservativity
from lightning_gap.monge.data import SamplesDataModule
from lightning_gap.monge.energy import energy_distance
from lightning_gap.monge.figure import MapFigure
from lightning_gap.monge.gap import divergence_and_gap, monge_gap, sinkhorn_divergence
from lightning_gap.monge.gaussian import gaussian_map
from lightning_gap.monge.maps import MLP, ResidualMLP
from lightning_gap.monge.marginal import marginal_wasserstein
from lightning_gap.monge.metrics import (
    DisplacementCosine,
    EnergyDistance,
    MarginalWasserstein,
    MongeGap,
    SinkhornDivergence,
    UnexplainedVariance,
)
from lightning_gap.monge.minibatch_energy import minibatch_energy_distance
from lightning_gap.monge.module import MongeMap
from lightning_gap.monge.objective import unbalanced_weights
from lightning_gap.monge.plot import plot_map
from lightning_gap.monge.representation import AffineRepresentation
from lightning_gap.monge.schedules import Anneal
from lightning_gap.monge.scores import MapScores
from lightning_gap.monge.sinkhorn import ConvergenceWarning, OTResult, optimal_transport
from lightning_gap.monge.sphere import SphereMap
from lightning_gap.monge.structured import StructuredMap

__all__ = [
    "MLP",
    "AffineRepresentation",
    "Anneal",
    "BrenierMap",
    "ConditionalMap",
    "ConvergenceWarning",
    "DisplacementCosine",
    "EnergyDistance",
    "MapFigure",
    "MapScores",
    "MarginalWasserstein",
    "MongeGap",
    "MongeMap",
    "OTResult",
    "ResidualMLP",
    "SamplesDataModule",
    "SinkhornDivergence",
    "SphereMap",
    "StructuredMap",
    "UnexplainedVariance",
    "UnpairedBatch",
    "conservativity",
    "costs",
    "divergence_and_gap",
    "energy_distance",
    "gaussian_map",
    "marginal_wasserstein",
    "minibatch_energy_distance",
    "monge_gap",
    "optimal_transport",
    "plot_map",
    "sinkhorn_divergence",
    "unbalanced_weights",
]
