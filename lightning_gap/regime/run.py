"""One fit under a regime, from its plan to its end: in which phase it is, and what it holds."""

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_gap.regime.answers import ReferenceAnswers, length_holder
from lightning_gap.regime.clock import RegimeClock
from lightning_gap.regime.counters import ValidationClock
from lightning_gap.regime.fit import Fit
from lightning_gap.regime.group_changes import change_of_groups, decided, groups_of
from lightning_gap.regime.limits import RunLimits
from lightning_gap.regime.loader import DataNotReady, same_data
from lightning_gap.regime.plan import RegimePlan
from lightning_gap.regime.planning import RunPlanner
from lightning_gap.regime.rates import curve
from lightning_gap.regime.refusals import check_fit, refused_as
from lightning_gap.regime.resume import disagreements, take_up
from lightning_gap.regime.sample_noise import output_module
from lightning_gap.regime.scaling import Rate
from lightning_gap.regime.schedules import scale
from lightning_gap.regime.takeover import ReferencePlateaus, Taken, stepping_of, take_schedulers
from lightning_gap.regime.warmup import Warmup
from lightning_gap.regime.weight_averages import averages_of

if TYPE_CHECKING:
    from lightning_gap.regime.callback import LargeBatchRegime

__all__ = ["Phase", "Progress", "RegimeRun"]


class Phase(IntEnum):
    """How far a fit is."""

    SET_UP = 1  # planned, or about to be once the module has its data; a checkpoint may be read now
    TAKEN_OVER = 2  # scaled and stepped by us; some strategies restore a checkpoint only now
    OVER = 3  # all is given back


@dataclass
class Progress:
    """Where a run is."""

    ticked: int | None = None  # up to which update the clocks have been read
    epoch_start: int = 0  # updates made before the present epoch
    epochs: int = 0  # of this run that are over
    samples: int = 0  # seen
    clipped: Tensor | int = 0  # gradients that were
    clippable: int = 0  # gradients of which the norm was taken


class RegimeRun:
    """A fit under a regime, whose arguments say what to do; or one that keeps the trainer's own lengths."""

    def __init__(self, regime: "LargeBatchRegime", *, keeps_lengths: bool) -> None:
        self.regime, self.phase = regime, Phase.SET_UP
        self.plan: RegimePlan | None = None  # until the data tell
        self.planner = RunPlanner(regime, keeps_lengths=keeps_lengths)
        self.progress, self.limits, self.plateaus = Progress(), RunLimits(), ReferencePlateaus()
        self.taken: Taken | None = None  # until on_fit_start
        self._answers: ReferenceAnswers | None = None
        self._read = False  # whether a checkpoint has been read
        self._early: dict[str, Any] | None = None  # its callbacks, if that was before there was a plan
        self._saved: dict[str, Any] | None = None  # a regime's state in it, until it is taken up

    @property
    def planned(self) -> RegimePlan:
        """The plan, once there is one."""
        assert self.plan is not None, "setup precedes every other hook of fit"
        return self.plan

    @property
    def running(self) -> Taken:
        """What has been taken over."""
        assert self.taken is not None, "on_fit_start precedes training"
        return self.taken

    # ------------------------------------------------------------------ plan

    def set_up(self, trainer: Trainer, pl_module: LightningModule, *, longer: bool) -> None:
        """Plan, and let the trainer answer as in the reference run until its schedulers are made."""
        truth = self.regime.stretch_schedulers is False
        try:
            self._make_plan(trainer)
        except DataNotReady:
            if truth and longer:
                raise  # the limits are to be this run's before configure_optimizers asks for them
        if self.planner.keeps_lengths:
            return
        if truth:
            self._set_limits(trainer)
            return
        self._answers = ReferenceAnswers(
            trainer, lambda: self._lengths(trainer), lambda loader: same_data(loader, self.planner.loader)
        )
        self._answers.begin(
            pl_module,
            length_holder(self.planner.loader),
            before=lambda: self._plan_late(trainer),
            after=lambda: self._set_limits(trainer),
        )

    def _make_plan(self, trainer: Trainer) -> RegimePlan:
        if self.plan is None:
            self.plan = self.planner.plan(trainer)
        return self.plan

    def _lengths(self, trainer: Trainer) -> dict[str, Any]:
        self._make_plan(trainer)
        return self.planner.lengths

    def _plan_late(self, trainer: Trainer) -> None:
        """Plan once the module's own setup has made its data, and look at a checkpoint that has been read before."""
        if self.plan is not None:
            return
        try:
            self._make_plan(trainer)
        except DataNotReady as error:
            raise error.__cause__ or error from None
        if self._early is not None:
            self.read(trainer, self._early)
            if state := self._early.get(self.regime.state_key):
                self.load(state)

    def _set_limits(self, trainer: Trainer) -> None:
        if self.plan is not None and (self.plan.updates_per_epoch is not None or self.regime.train_longer):
            self.limits.set(trainer, self.plan)

    # ---------------------------------------------------------------- change

    def take_over(self, trainer: Trainer, pl_module: LightningModule, *, rate_found: bool) -> None:
        """Check all, then scale the learning rates and take over the schedulers' clocks."""
        self._plan_late(trainer)
        plan, stretch, reference = self.planned, self.regime.stretch_schedulers, None
        if self._answers is not None:
            self._answers.end()
            reference = self._answers.at
        if plan.rate is Rate.RULED and self._saved is None and rate_found:
            rank_zero_warn(
                "LargeBatchRegime: LearningRateFinder found the learning rate of the batch that runs, so it is not "
                "scaled."
            )
            plan = plan.with_found_rate()
        fit = Fit.of(trainer, pl_module)
        plan, groups = decided(plan, fit.optimizers, self.regime.noise_scale), groups_of(fit.optimizers)
        stepping = stepping_of(pl_module, reference)
        rollouts = check_fit(
            fit,
            plan,
            stretch,
            stepping=stepping,
            batches=self.planner.batches,
            otherwise=self.planner.otherwise(self._answers, pl_module),
        )
        rows = refused_as(change_of_groups, plan, groups)
        averages = refused_as(averages_of, fit.callbacks, plan, self.regime.ema_rule)
        validations = refused_as(ValidationClock.of, trainer, fit, plan)
        noise = self.regime.gradient_noise
        weighted = refused_as(output_module, pl_module, noise) if plan.noise_variance else None
        if not self.planner.keeps_lengths:
            self._set_limits(trainer)
        self.limits.lift_updates(trainer)
        if self._read:
            self.limits.lift_epochs(trainer)
        before = fit.rates
        factor = plan.rescaling.rate_factor(*groups[0]) if groups else plan.lr_factor
        scale(fit.optimizers, fit.schedulers, plan.rescaling)
        clocks, fates = take_schedulers(fit, plan, self.plateaus, stepping, stretch=stretch)
        warmups = [Warmup(each, updates=plan.warmup_updates, factor=plan.lr_factor) for each in fit.optimizers]
        counts = [len(optimizer.param_groups) for optimizer in fit.optimizers]
        self.taken = Taken(RegimeClock(plan, clocks, warmups), validations, counts, averages=averages)
        if weighted is not None:
            self.taken.weigh_samples(trainer, weighted, plan.noise_variance)
        self.plan = replace(
            plan,
            learning_rates=tuple(zip(before, fit.rates, strict=True)),
            schedulers=fates,
            companions=self.taken.take_counters(trainer, fit, plan),
            curve=curve(plan, before[0], rollouts, factor) if before else (),
            hyperparameters=(*rows, *(average.take() for average in averages)),
        )
        self.phase = Phase.TAKEN_OVER

    def start(self, trainer: Trainer) -> None:
        """Check that the loaded data is what was planned for, and take up what a checkpoint left."""
        plan, taken = self.planned, self.running
        self.planner.check(trainer)
        saved, self._saved = self._saved, None
        changed = take_up(trainer, plan, taken, saved)
        self.limits.begin(trainer, plan, changed=changed)
        ticked = self.progress.ticked
        taken.clock.updates = trainer.global_step if ticked is None else ticked
        self.tick(trainer.global_step)
        if taken.validations is not None:
            taken.validations.begin(trainer.global_step)
        batches = trainer.fit_loop.epoch_loop
        if batches.restarted_on_train_batch_end and batches.batch_progress.is_last_batch and not changed:
            # A checkpoint of an epoch's last batch, from before its validation: Lightning goes on in the next epoch
            # without ending this one, nor starting that one. Plateaus still have this one's end before them.
            taken.set_counters(plan, trainer.global_step)
        else:
            self.start_epoch(trainer.global_step if changed else self.progress.epoch_start)

    def start_epoch(self, update: int) -> None:
        """Say what happens at the end of an epoch of this run."""
        self.progress.epoch_start = update
        self.running.set_counters(self.planned, update)

    def tick(self, update: int) -> None:
        """Step the schedulers that the reference run steps up to an update."""
        self.running.clock.advance(update)
        self.progress.ticked = update

    # ---------------------------------------------------------------- resume

    def read(self, trainer: Trainer, callbacks: dict[str, Any]) -> None:
        """Look at the checkpoint that is about to be restored."""
        if self.plan is None:
            self._early = callbacks
        elif self.plan.changes and self.regime.state_key not in callbacks:
            raise MisconfigurationException(
                "The checkpoint was written without LargeBatchRegime, so its learning rates and schedulers are not "
                "scaled and would be restored over the scaled ones. Resume without the callback, or start a new run "
                "from its weights."
            )
        self._read = True
        if self.phase is Phase.TAKEN_OVER:
            self.limits.lift_epochs(trainer)

    def load(self, state: dict[str, Any]) -> None:
        """Check that a checkpoint is of this regime, and go on where it was written."""
        if self.plan is None:
            return
        self.plan = self.plan.with_rate_of(state["plan"])
        if differences := disagreements(self.plan, state["plan"]):
            raise MisconfigurationException(
                f"The checkpoint is of another regime: {'; '.join(differences)}. Resume with the same LargeBatchRegime "
                "arguments and data, or start a new run from its weights."
            )
        if state["ticked"] is None:
            return  # written before training, by LearningRateFinder
        self._saved, progress = state, self.progress
        progress.ticked, progress.epoch_start, progress.samples = (
            state[name] for name in ("ticked", "epoch_start", "samples")
        )
        progress.clipped, progress.clippable = state["clipped"]
        self.plateaus.metrics = state["metrics"]

    def release(self, trainer: Trainer) -> None:
        """Give everything back that is the user's."""
        self.phase = Phase.OVER
        if self._answers is not None:
            self._answers.end()
            self._answers = None
        self.limits.give_back(trainer)
        if self.taken is not None:
            self.taken.give_back()
