"""How good a transport map is: metrics that add up over batches and processes."""

from lightning_gap.monge.scores.distances import EnergyDistance, MarginalWasserstein
from lightning_gap.monge.scores.divergence import SinkhornDivergence
from lightning_gap.monge.scores.gap import MongeGap
from lightning_gap.monge.scores.map_scores import MapScores
from lightning_gap.monge.scores.truth import (
    DisplacementCosine,
    UnexplainedVariance,
    displacement_cosine,
    unexplained_variance,
)

__all__ = [
    "DisplacementCosine",
    "EnergyDistance",
    "MapScores",
    "MarginalWasserstein",
    "MongeGap",
    "SinkhornDivergence",
    "UnexplainedVariance",
    "displacement_cosine",
    "unexplained_variance",
]
