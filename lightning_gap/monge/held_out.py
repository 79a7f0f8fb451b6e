"""The scores of a map over all samples of a validation or a test."""

from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_gap.monge.border import checked, images
from lightning_gap.monge.dual_loss import semidual_loss
from lightning_gap.monge.samples.batches import UnpairedBatch
from lightning_gap.monge.schedules import now
from lightning_gap.monge.scores.map_scores import MapScores
from lightning_gap.monge.signs import drawn_together
from lightning_gap.monge.training_log import log_scores
from lightning_gap.trainer.strategy import data_parallel_group
from lightning_gap.trainer.terminal import say

if TYPE_CHECKING:
    from lightning_gap.monge.module import MongeMap

__all__ = ["HeldOut", "sizes_of_whole"]


class HeldOut:
    """Keeps the samples and images of a stage in ``model.scores[stage]`` until its end, and no longer."""

    def __init__(self, model: "MongeMap") -> None:
        self._model = model
        self._losses: list[Tensor] = []  # of a fitting loss of the user's own, a batch each
        self._said: set[str] = set()  # by the scores of earlier epochs

    def forget(self, stage: str) -> None:
        """Forget what a stage that was interrupted has left."""
        self._losses.clear()
        if stage in self._model.scores:
            del self._model.scores[stage]

    def keep(self, stage: str, batch: Any) -> None:
        """Keep a batch and the images of its source."""
        model = self._model
        b = checked(model, batch)
        mapped = images(model, b.source, b.condition)
        if stage not in model.scores:
            named = b.condition is not None and not b.condition.is_floating_point()
            model.scores[stage] = MapScores(
                cost=model.cost,
                fitting_cost=model.fitting_cost,
                fitting_epsilon=model.epsilons.fitting,
                gap_epsilon=model.epsilons.gap,
                rho=None if model.objective.reweight else model.objective.rho,
                solver=model.solver,
                conditions=model.condition_names if named else None,
                certificates=stage == "test",
            ).to(model.device)
            cast(MapScores, model.scores[stage]).said = self._said
        if model.objective.fitting_loss == "semidual":
            self._losses.append(semidual_loss(model, b, data_parallel_group(model.trainer)))
        elif callable(model.objective.fitting_loss):
            weights = b.source_weights, b.target_weights
            terms = model.objective.terms(
                b.source, mapped, b.target, weights=weights, with_gap=False, fitting_epsilon=model.epsilons.fitting,
                gap_epsilon=None,
            )  # fmt: skip
            self._losses.append(terms.loss)
        cast(MapScores, model.scores[stage]).update(
            b.source,
            mapped,
            b.target,
            source_weights=b.source_weights,
            target_weights=b.target_weights,
            parts_of=sizes_of_whole(model, b),
            condition=b.condition,
            true_images=b.true_images,
            target_again=b.target_again,
        )

    def log(self, stage: str) -> None:
        """Log the scores, and the loss among them; nothing without a single batch."""
        model = self._model
        if stage not in model.scores:
            return
        scores, name = cast(MapScores, model.scores.pop(stage)), model.objective.loss_name
        values = scores.compute()
        if self._losses:
            values[name] = torch.stack(self._losses).mean()
            self._losses.clear()
        values["loss"] = values[name] + now(model.gap_weight, model.global_step) * values["monge_gap"]
        log_scores(model, stage, values)
        if not model.trainer.sanity_checking:
            model.record.note(stage, values)
        if "l2_uvp_bound" in values:
            say(f"L2-UVP ≤ {float(values['l2_uvp_bound']):.3g} %, 95 %")
        elif "suboptimality_upper" in values:
            say(f"Paid in vain ≤ {float(values['suboptimality_upper']):.3g} %, 95 %")
        fitting = model.trainer.state.fn == TrainerFn.FITTING and not model.trainer.sanity_checking
        if fitting and model.objective.fitting_loss == "sinkhorn":
            model.remarks.say("drawn together", lambda: drawn_together(scores, values))


def sizes_of_whole(model: "MongeMap", b: UnpairedBatch) -> tuple[int, int] | None:
    """Return the sizes of the batch whose weights this process has a part of; ``None`` where it has all."""
    group = data_parallel_group(model.trainer)
    if group is None or (b.source_weights is None and b.target_weights is None):
        return None
    sizes = torch.tensor([b.source.shape[-2], b.target.shape[-2]], device=model.device)
    n, m = group.sum(sizes).tolist()
    return n, m
