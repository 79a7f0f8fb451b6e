"""A checkpoint of a regime: what it holds, whether it fits this run, and how this run takes it up."""

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_gap.regime.clock import Fate
from lightning_gap.regime.plan import RegimePlan
from lightning_gap.regime.refusals import refused_as
from lightning_gap.regime.schedules import scale

if TYPE_CHECKING:
    from lightning_gap.regime.run import RegimeRun
    from lightning_gap.regime.takeover import Taken

__all__ = ["disagreements", "state_of", "take_up"]

# What must agree between a checkpoint's plan and the plan of the run that resumes from it; with what plans of before
# there was such a rule did.
_IDENTITY = ("reference_batch_size", "lr_rule", "train_longer", "reference_updates_per_epoch", "noise_variance")
_RULES = {"weight_decay_rule": "none", "betas_rule": "none", "ema_rule": "none", "momentum_rule": "none"}


def disagreements(plan: RegimePlan, saved: dict[str, Any]) -> list[str]:
    """Return how a saved plan differs from one in what a resumed run cannot change.

    The batch may change where the updates do not depend on it; at one batch the factor stays.

    Args:
        plan: The plan of this run.
        saved: What :meth:`RegimePlan.to_dict` returned when the checkpoint was written.
    """
    names = [*_IDENTITY, *_RULES]
    names += ["batch_size"] if plan.train_longer not in (0, 1) or plan.noise_variance else []
    if saved.get("batch_size") == plan.batch_size and plan.decided:
        names.append("lr_factor")  # two functions may have one name
    now = plan.to_dict()
    older = _RULES | ({"betas_rule": "sde"} if saved.get("lr_rule") == "adam" else {})
    before = older | saved
    return [f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in names if before.get(name) != now[name]]


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
        if before["lr_factor"] != plan.lr_factor:  # decided only now
            raise MisconfigurationException(
                f'lr_rule="{plan.lr_rule}" multiplied the learning rate by {before["lr_factor"]:g} when the checkpoint '
                f"was written, and would by {plan.lr_factor:g} now. Resume with the noise_scale and the length of then."
            )
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
    rescaling = refused_as(plan.rescaling_after, before)
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    scale(trainer.optimizers, schedulers, rescaling, defaults=False)  # which no checkpoint holds
    rank_zero_info(
        f"LargeBatchRegime goes on at the batch {plan.batch_size} from {before['batch_size']}: learning rates "
        f"times {rescaling.lr_factor:.4g}."
    )
    return True
