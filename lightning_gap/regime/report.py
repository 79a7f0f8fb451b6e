"""What a run says: its plan when it starts, and where it is at every update that loggers get."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_gap.regime.plan import PLAN_COLUMNS, RegimePlan
from lightning_gap.regime.words import advice
from lightning_gap.trainer.internals.of_torch import BatchNormBase
from lightning_gap.trainer.loggers import log_facts, log_now, log_table
from lightning_gap.trainer.terminal import say

if TYPE_CHECKING:
    from lightning_gap.regime.run import RegimeRun

__all__ = ["PREFIX", "log_update", "report"]

# What the keys of everything that is logged begin with.
PREFIX = "lightning_gap/regime/"


@rank_zero_only
def report(trainer: Trainer, pl_module: LightningModule, plan: RegimePlan, noise_scale: float | None) -> None:
    """Print the plan, and log it."""
    layers = list(pl_module.modules())
    # By name: the layers and the callback of another room, and one that knows this one.
    names, others = _names(layers), _names(cast(Any, trainer).callbacks)
    ghosts = "GhostNorm" in names or "GhostBatchNorm" in others
    measures = noise_scale is None and "GradientNoiseScale" in others
    batchnorm = any(isinstance(layer, BatchNormBase) for layer in layers)
    say(plan.table(), *advice(plan, batchnorm=batchnorm, ghosts=ghosts, measures=measures))
    log_facts(trainer.loggers, PREFIX, plan.to_dict())
    log_table(trainer.loggers, f"{PREFIX}plan", PLAN_COLUMNS, plan.rows())


def _names(objects: Iterable[Any]) -> set[str]:
    return {kind.__name__ for each in objects for kind in type(each).__mro__}


def log_update(trainer: Trainer, pl_module: LightningModule, run: "RegimeRun", reference_epoch: float) -> None:
    """Log where a run is."""
    progress, warmup = run.progress, run.running.clock.warmups[0]
    facts: dict[str, Any] = {
        "updates": float(trainer.global_step),
        "samples_seen": float(progress.samples),
        "reference_epoch": reference_epoch,
    }
    if warmup.made and warmup.known:
        facts["learning_rate"] = warmup.rate
        facts["lr_over_batch"] = warmup.rate / run.planned.batch_size
    if progress.clippable:
        facts["clipped_fraction"] = progress.clipped / progress.clippable
    log_now(trainer, pl_module.device, PREFIX, facts)
