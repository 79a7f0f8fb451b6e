"""How good a transport map is: metrics that add up over batches and processes."""

from typing import TYPE_CHECKING

from lightning_gap.faces import lazy

if TYPE_CHECKING:
    from lightning_gap.monge.scores.certificate import ErrorCertificate as ErrorCertificate
    from lightning_gap.monge.scores.certificate import error_certificate as error_certificate
    from lightning_gap.monge.scores.distances import EnergyDistance as EnergyDistance
    from lightning_gap.monge.scores.distances import MarginalWasserstein as MarginalWasserstein
    from lightning_gap.monge.scores.divergence import SinkhornDivergence as SinkhornDivergence
    from lightning_gap.monge.scores.feature_means import DrugSignature as DrugSignature
    from lightning_gap.monge.scores.feature_means import FeatureMeansR2 as FeatureMeansR2
    from lightning_gap.monge.scores.feature_means import drug_signature as drug_signature
    from lightning_gap.monge.scores.feature_means import feature_means_r2 as feature_means_r2
    from lightning_gap.monge.scores.gap import MongeGap as MongeGap
    from lightning_gap.monge.scores.map_scores import MapScores as MapScores
    from lightning_gap.monge.scores.mmd import MaximumMeanDiscrepancy as MaximumMeanDiscrepancy
    from lightning_gap.monge.scores.mmd import maximum_mean_discrepancy as maximum_mean_discrepancy
    from lightning_gap.monge.scores.perturbation import PerturbationScores as PerturbationScores
    from lightning_gap.monge.scores.population_distances import DISTANCES as DISTANCES
    from lightning_gap.monge.scores.population_distances import perturbation_distance as perturbation_distance
    from lightning_gap.monge.scores.suboptimality import Suboptimality as Suboptimality
    from lightning_gap.monge.scores.suboptimality import suboptimality as suboptimality
    from lightning_gap.monge.scores.truth import DisplacementCosine as DisplacementCosine
    from lightning_gap.monge.scores.truth import UnexplainedVariance as UnexplainedVariance
    from lightning_gap.monge.scores.truth import displacement_cosine as displacement_cosine
    from lightning_gap.monge.scores.truth import unexplained_variance as unexplained_variance
    from lightning_gap.monge.scores.wasserstein import EntropicWasserstein as EntropicWasserstein
    from lightning_gap.monge.scores.wasserstein import entropic_wasserstein as entropic_wasserstein

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
