"""What a training step pays: the fitting loss and the regularizers of the global batch."""

from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn

from lightning_gap.monge.border import as_network_takes, flat, images
from lightning_gap.monge.dual_loss import semidual_loss
from lightning_gap.monge.maps.conservativity import conservativity
from lightning_gap.monge.ot.costs import Cost
from lightning_gap.monge.ot.result import ConvergenceWarning
from lightning_gap.monge.samples.batches import UnpairedBatch
from lightning_gap.monge.samples.draws import FiniteSamples, Turn, generator
from lightning_gap.monge.schedules import now
from lightning_gap.monge.signs import not_converged
from lightning_gap.ranks.group import RankGroup
from lightning_gap.trainer.strategy import data_parallel_group, data_parallel_rank, data_parallel_size

if TYPE_CHECKING:
    from lightning_gap.monge.module import MongeMap

__all__ = ["gathered", "training_loss"]

S = TypeVar("S", Tensor, Tensor | None)

_PROBES = 1  # first entry of the key of random draws


def training_loss(model: "MongeMap", b: UnpairedBatch, batch_idx: int) -> tuple[Tensor, dict[str, float | Tensor]]:
    """Return the loss, and all that is to be logged, by name; warn where the solver did not converge."""
    group = data_parallel_group(model.trainer) if model.global_batch else None
    gap_weight, factor = now(model.gap_weight, model.global_step), now(model.epsilon_factor, model.global_step)
    source, target = gathered(b.source, group), gathered(b.target, group)
    mapped = images(model, b.source, b.condition)
    with_gap = gap_weight > 0
    terms = model.objective.terms(
        source,
        gathered(mapped, group),
        target,
        **model.epsilons.annealed(factor),
        weights=(gathered(b.source_weights, group, -1), gathered(b.target_weights, group, -1)),
        reference=_reference_pair(model, b, batch_idx, group) if with_gap else None,
        with_gap=with_gap,
    )
    if not terms.converged:
        sign = partial(not_converged, model.global_step, terms, model.objective.options)
        model.remarks.say("convergence", sign, ConvergenceWarning)
    if model.objective.fitting_loss == "semidual":
        terms = terms._replace(loss=semidual_loss(model, b, group))
        if not bool(terms.loss.isfinite()):
            raise FloatingPointError(
                f"the semi-dual is {float(terms.loss):g} at update {model.global_step}: the map has diverged; lower "
                "the learning rate"
            )
    total = terms.loss
    values: dict[str, float | Tensor] = {model.objective.loss_name: terms.loss}
    if terms.gap is not None:
        values["monge_gap"] = terms.gap
        total = total + gap_weight * terms.gap
    if model.conservative_weight:
        field = cast(nn.Module, cast(nn.Module, model.map).field)
        # By epoch, batch and rank, so that a resumed run draws the same.
        draws = generator(0, _PROBES, model.current_epoch, batch_idx, data_parallel_rank(model.trainer))
        rotation = conservativity(
            field, *flat(b.source, b.condition), probes=model.conservative_probes, generator=draws
        )
        values["conservativity"] = rotation
        total = total + model.conservative_weight * rotation
    values["loss"] = total
    if terms.marginal_error == terms.marginal_error:
        values["marginal_error"] = terms.marginal_error
    with torch.no_grad():
        values["displacement"] = _displacement(model.cost, b.source, mapped, b.source_weights)
    if callable(model.gap_weight):
        values["gap_weight"] = gap_weight
    if callable(model.epsilon_factor):
        values["epsilon_factor"] = factor
    return total, values


def gathered(samples: S, group: RankGroup | None, dim: int = -2) -> S:
    """Return the samples of all processes."""
    return samples if group is None or samples is None else group.gather_rows(samples, dim)


def _reference_pair(
    model: "MongeMap", b: UnpairedBatch, batch_idx: int, group: RankGroup | None
) -> tuple[Tensor, Tensor] | None:
    """Return reference samples, as many as the batch has of the source, and their images."""
    if model.objective.gap_on == "source":
        return None
    assert model.gap_reference is not None
    here, ranks = (0, 1) if group is None else (data_parallel_rank(model.trainer), data_parallel_size(model.trainer))
    n = b.source.shape[-2]
    # By epoch and batch, so that a resumed run sees the same, and no one else's random numbers change.
    turn = Turn((0,), model.current_epoch, batch_idx, 0, ranks * n, slice(here * n, (here + 1) * n))
    rows = FiniteSamples(model.gap_reference).rows(turn)[turn.part]
    samples = model.gap_reference[rows.to(model.gap_reference.device)]
    if model.representation is not None:
        samples = model.representation.encode(samples)
    samples = as_network_takes(model, samples)
    if b.source.dim() == 3:
        samples = samples.expand(len(b.source), *samples.shape)
    return gathered(samples, group), gathered(images(model, samples, b.condition), group)


def _displacement(cost: Cost, source: Tensor, mapped: Tensor, weights: Tensor | None) -> Tensor:
    paid = cost.paired(source.reshape(-1, source.shape[-1]), mapped.reshape(-1, mapped.shape[-1]))
    if weights is None:
        return paid.mean()
    return ((paid.view(weights.shape) * weights).sum(-1) / weights.sum(-1)).mean()
