"""The Monge gap: optimal transport maps for any cost (Uscidda and Cuturi 2023)."""

from typing import TYPE_CHECKING

from lightning_gap.faces import lazy
from lightning_gap.monge.moved import answer_for

if TYPE_CHECKING:
    from lightning_gap.monge import costs as costs
    from lightning_gap.monge.ensemble import MapEnsemble as MapEnsemble
    from lightning_gap.monge.ensemble import fit_ensemble as fit_ensemble
    from lightning_gap.monge.figure import MapFigure as MapFigure
    from lightning_gap.monge.maps.brenier import BrenierMap as BrenierMap
    from lightning_gap.monge.maps.conditional import ConditionalMap as ConditionalMap
    from lightning_gap.monge.maps.conservativity import conservativity as conservativity
    from lightning_gap.monge.maps.entropic import EntropicMap as EntropicMap
    from lightning_gap.monge.maps.mlp import MLP as MLP
    from lightning_gap.monge.maps.residual import ResidualMLP as ResidualMLP
    from lightning_gap.monge.maps.semidual import semidual as semidual
    from lightning_gap.monge.maps.sphere import SphereMap as SphereMap
    from lightning_gap.monge.maps.starts import StartPair as StartPair
    from lightning_gap.monge.maps.structured import StructuredMap as StructuredMap
    from lightning_gap.monge.module import MongeMap as MongeMap
    from lightning_gap.monge.ot.divergence import divergence_and_gap as divergence_and_gap
    from lightning_gap.monge.ot.divergence import sinkhorn_divergence as sinkhorn_divergence
    from lightning_gap.monge.ot.energy import energy_distance as energy_distance
    from lightning_gap.monge.ot.gap import monge_gap as monge_gap
    from lightning_gap.monge.ot.gaussian import gaussian_map as gaussian_map
    from lightning_gap.monge.ot.marginal import marginal_wasserstein as marginal_wasserstein
    from lightning_gap.monge.ot.minibatch_energy import minibatch_energy_distance as minibatch_energy_distance
    from lightning_gap.monge.ot.result import ConvergenceWarning as ConvergenceWarning
    from lightning_gap.monge.ot.result import OTResult as OTResult
    from lightning_gap.monge.ot.solve import optimal_transport as optimal_transport
    from lightning_gap.monge.ot.unbalanced import unbalanced_weights as unbalanced_weights
    from lightning_gap.monge.perturbation_scoring import PerturbationScoring as PerturbationScoring
    from lightning_gap.monge.plot import plot_map as plot_map
    from lightning_gap.monge.samples.batches import UnpairedBatch as UnpairedBatch
    from lightning_gap.monge.samples.bootstrap import bootstrap as bootstrap
    from lightning_gap.monge.samples.condition_encoding import ConditionEncoding as ConditionEncoding
    from lightning_gap.monge.samples.datamodule import SamplesDataModule as SamplesDataModule
    from lightning_gap.monge.samples.standardize import AffineRepresentation as AffineRepresentation
    from lightning_gap.monge.schedules import Anneal as Anneal
    from lightning_gap.monge.scores.certificate import error_certificate as error_certificate
    from lightning_gap.monge.scores.distances import EnergyDistance as EnergyDistance
    from lightning_gap.monge.scores.distances import MarginalWasserstein as MarginalWasserstein
    from lightning_gap.monge.scores.divergence import SinkhornDivergence as SinkhornDivergence
    from lightning_gap.monge.scores.gap import MongeGap as MongeGap
    from lightning_gap.monge.scores.map_scores import MapScores as MapScores
    from lightning_gap.monge.scores.perturbation import PerturbationScores as PerturbationScores
    from lightning_gap.monge.scores.suboptimality import suboptimality as suboptimality
    from lightning_gap.monge.scores.truth import DisplacementCosine as DisplacementCosine
    from lightning_gap.monge.scores.truth import UnexplainedVariance as UnexplainedVariance
    from lightning_gap.monge.scores.truth import displacement_cosine as displacement_cosine
    from lightning_gap.monge.scores.truth import unexplained_variance as unexplained_variance
    from lightning_gap.monge.trajectory import Trajectory as Trajectory
    from lightning_gap.monge.trajectory_fits import fit_trajectory as fit_trajectory
    from lightning_gap.monge.trajectory_fits import held_out_times as held_out_times

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
answer_for()
