"""The Monge gap: optimal transport maps for any cost (Uscidda and Cuturi 2023)."""

from lightning_gap.monge import costs
from lightning_gap.monge.data import SamplesDataModule
from lightning_gap.monge.energy import energy_distance
from lightning_gap.monge.figure import MapFigure
from lightning_gap.monge.gap import divergence_and_gap, monge_gap, sinkhorn_divergence
from lightning_gap.monge.maps import ResidualMLP
from lightning_gap.monge.marginal import marginal_wasserstein
from lightning_gap.monge.metrics import (
    DisplacementCosine,
    EnergyDistance,
    MarginalWasserstein,
    MongeGap,
    SinkhornDivergence,
    UnexplainedVariance,
)
from lightning_gap.monge.module import MongeMap
from lightning_gap.monge.plot import plot_map
from lightning_gap.monge.scores import MapScores
from lightning_gap.monge.sinkhorn import ConvergenceWarning, OTResult, optimal_transport

__all__ = [
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
    "UnexplainedVariance",
    "costs",
    "divergence_and_gap",
    "energy_distance",
    "marginal_wasserstein",
    "monge_gap",
    "optimal_transport",
    "plot_map",
    "sinkhorn_divergence",
]
