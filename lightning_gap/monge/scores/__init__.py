"""How good a transport map is: metrics that add up over batches and processes."""

from typing import TYPE_CHECKING

from lightning_gap.faces import lazy

if TYPE_CHECKING:
    from lightning_gap.monge.scores.distances import EnergyDistance as EnergyDistance
    from lightning_gap.monge.scores.distances import MarginalWasserstein as MarginalWasserstein
    from lightning_gap.monge.scores.divergence import SinkhornDivergence as SinkhornDivergence
    from lightning_gap.monge.scores.gap import MongeGap as MongeGap
    from lightning_gap.monge.scores.map_scores import MapScores as MapScores
    from lightning_gap.monge.scores.truth import DisplacementCosine as DisplacementCosine
    from lightning_gap.monge.scores.truth import UnexplainedVariance as UnexplainedVariance
    from lightning_gap.monge.scores.truth import displacement_cosine as displacement_cosine
    from lightning_gap.monge.scores.truth import unexplained_variance as unexplained_variance

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
