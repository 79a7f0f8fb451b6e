"""A checkpoint of a regime: what it holds, whether it fits this run, and how this run takes it up."""

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_gap.regime.clock import Fate
from lightning_gap.regime.plan import RegimePlan
from lightning_gap.regime.schedules import scale

if TYPE_CHECKING:
    from lightning_gap.regime.run import RegimeRun
    from lightning_gap.regime.takeover import Taken

__all__ = ["state_of", "take_up"]


def state_of(run: "RegimeRun") -> dict[str, Any]:
    """Return a run's plan and where it is in it, as plain Python."""
    progress, taken = run.progress, run.taken
    noise = None if taken is None else taken.noise
    return {
        "plan": run.planned.to_dict(),
        "ticked": progress.ticked,
        "epoch_start": progress.epoch_start,
        "samples": progress.samples,
        "metrics": dict(run.plateaus.metrics),
        "made": [] if taken is None else [warmup.made for warmup in taken.clock.warmups],
        "clipped": [int(progress.clipped), progress.clippable],
        "noise": None if noise is None else [noise.seed, noise.draws],
    }


def take_up(trainer: Trainer, plan: RegimePlan, taken: "Taken", saved: dict[str, Any] | None) -> bool:
    """Take up what a checkpoint left; return whether it is of another batch, at which not every one can go on."""
    if saved is None:
        return False
    for warmup, made in zip(taken.clock.warmups, saved["made"], strict=True):
        warmup.made = made
    if taken.noise is not None:
        taken.noise.seed, taken.noise.draws = saved["noise"]
    before = saved["plan"]
    if before["batch_size"] == plan.batch_size:
        return False
    full = before["updates_per_epoch"]
    if full and (trainer.global_step - saved["epoch_start"]) % full:
        raise MisconfigurationException(
            f"The checkpoint was written within an epoch, at the batch {before['batch_size']}. To go on at "
            f"{plan.batch_size}, take one from the end of an epoch."
        )
    for fate in plan.schedulers:
        if fate.fate is Fate.THIS_RUNS and fate.interval == "epoch":
            raise MisconfigurationException(
                f"{fate.name} has the length of a run at the batch {before['batch_size']}, "
                "which the checkpoint restores. To go on at another batch, give it the reference run's epochs."
            )
    if plan.pace != 1 and any(clock.interval == "step" for clock in taken.clock.clocks):
        raise MisconfigurationException(
            "A scheduler of updates, at train_longer=False, cannot go on at another batch: its updates behind it "
            "were of other lengths. Go on at the batch of the checkpoint, or step it by epochs."
        )
    correction = plan.lr_factor / before["lr_factor"]
    moment_ratio = plan.ratio / before["ratio"] if plan.scales_moments else 1.0
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    scale(trainer.optimizers, schedulers, correction, moment_ratio)
    rank_zero_info(
        f"LargeBatchRegime goes on at the batch {plan.batch_size} from {before['batch_size']}: learning rates "
        f"times {correction:.4g}."
    )
    return True
