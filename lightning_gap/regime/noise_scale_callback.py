"""The callback that measures the gradient noise scale while a model trains."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_gap.checks import check_integer
from lightning_gap.ranks.group import mean_over_ranks
from lightning_gap.regime.callback import PREFIX, LargeBatchRegime
from lightning_gap.regime.loader import effective_batch_size, pass_over_data
from lightning_gap.regime.micro_batches import MicroBatchGradients
from lightning_gap.regime.noise_scale import (
    NoiseScaleEstimate,
    batch_verdict,
    gradient_moments,
    normalization_note,
    plan_verdict,
)
from lightning_gap.regime.sample_noise import mixing_layers
from lightning_gap.trainer.loggers import log_now
from lightning_gap.trainer.strategy import (
    data_parallel_size,
    gradients_stay_scaled,
    holds_whole_weights,
    loss_scale,
    require_lightning,
    strategy_name,
)
from lightning_gap.trainer.terminal import say

__all__ = ["GradientNoiseScale"]

# Measurements after which the first verdict is said; fewer are mostly noise.
_FIRST_VERDICT = 10


class GradientNoiseScale(Callback):
    r"""Measure the gradient noise scale, and say whether the batch that runs is past the critical one.

    .. math:: B_{simple} = \frac{\operatorname{tr} \Sigma}{|G|^2}

    is the variance of a sample's gradient over the squared mean gradient. A batch far below it wastes updates, one far
    above it wastes samples. Both parts are estimated from gradients over two batch sizes that training computes anyway:
    those of single micro-batches, before they are accumulated or averaged over replicas, and their mean. What is added
    is the norms of these gradients, every few updates.

    Logged under ``lightning_gap/regime/``: ``noise_scale``, of averages that forget, ``critical_batch_size``, of
    averages over the whole run, and ``batch_over_critical``, the batch that runs over the latter. Numerator and
    denominator are averaged separately. NaN means that the noise has not been averaged out yet. After ten measurements,
    and at the end of training, a line says which side of the critical batch this run is on, and beside a
    ``LargeBatchRegime`` how many updates its batch needs, by this measure, and how many are planned.

    Where layers normalize over the batch, as BatchNorm and ghost BatchNorm do, a sample has no gradient of its own. The
    noise scale is then that of batches made of more groups of the size that is normalized over (the micro-batch, or the
    ghost), another number for each size, and that is warned of. With ghosts it does not depend on the micro-batch.

    It only observes: training is bit for bit the same without it.

    Args:
        every_n_updates: Measure at every n-th update; not at one before a lazy module's first batch.
        decay: The weight that the averages of ``noise_scale`` keep from one measurement to the next, in [0, 1).

    Attributes:
        estimate: The :class:`~lightning_gap.regime.noise_scale.NoiseScaleEstimate` of the latest fit.

    Raises:
        TypeError: If ``every_n_updates`` is not an int.
        ValueError: If an argument is out of its range.
        MisconfigurationException: When ``fit`` starts, if an update has a single micro-batch, so that there are no two
            batch sizes, or one of unknown size; under strategies that shard weights; with manual optimization; with a
            fused optimizer in 16-bit mixed precision; after a ``LargeBatchRegime`` that clips gradients; beside one
            with ``gradient_noise``.

    References:
        McCandlish, Kaplan, Amodei 2018, "An empirical model of large-batch training", section 2 and appendix A.1.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> scale = GradientNoiseScale(every_n_updates=1)
        >>> trainer = Trainer(
        ...     max_epochs=1, accumulate_grad_batches=4, accelerator="cpu", callbacks=[scale], logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> data = torch.utils.data.DataLoader(torch.randn(64, 32), batch_size=4)
        >>> trainer.fit(BoringModel(), data)  # doctest: +ELLIPSIS
        Gradient noise scale: ...
        >>> scale.estimate.measurements
        4
    """

    def __init__(self, *, every_n_updates: int = 10, decay: float = 0.95) -> None:
        check_integer("every_n_updates", every_n_updates)
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be in [0, 1): 0 forgets at once.")
        self.every_n_updates, self.decay = every_n_updates, decay
        self.estimate = NoiseScaleEstimate(decay)
        self._gradients = MicroBatchGradients()
        self._fitting = self._measuring = self._told = False
        self._note = ""  # what the numbers mean where layers normalize over the batch
        self._micro_batches = 0
        self._full = True  # whether the last batch of an epoch is as large as the others

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be measured."""
        if stage != "fit":
            return
        require_lightning(trainer, type(self).__name__)
        # Gradients that an earlier callback has clipped are not the batch's.
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        earlier = callbacks[: callbacks.index(self)]
        refusals = (
            (
                not holds_whole_weights(trainer),
                f"{strategy_name(trainer)} is not supported. Use one device or DDP.",
            ),
            (
                not pl_module.automatic_optimization,
                "manual optimization does not tell which gradients make an update. Use automatic optimization.",
            ),
            (
                any(isinstance(callback, LargeBatchRegime) and callback.clip_norm for callback in earlier),
                "LargeBatchRegime(clip_norm=...) clips the gradients first. Put GradientNoiseScale before it.",
            ),
            (
                any(isinstance(callback, LargeBatchRegime) and callback.gradient_noise for callback in callbacks),
                "LargeBatchRegime(gradient_noise=...) weights the samples at random, and that noise would be measured "
                "too. Measure in a run without it.",
            ),
        )
        for refused, reason in refusals:
            if refused:
                raise MisconfigurationException(f"GradientNoiseScale: {reason}")
        self.estimate, self._note, self._told = NoiseScaleEstimate(self.decay), "", False
        self._fitting = True

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse an update of one micro-batch, and gradients that keep the loss scale."""
        if trainer.accumulate_grad_batches * data_parallel_size(trainer) < 2:
            raise MisconfigurationException(
                "GradientNoiseScale compares gradients over two batch sizes, and an update has one micro-batch. Use "
                "accumulate_grad_batches of 2 or more with as much smaller batches, or several replicas."
            )
        for optimizer in trainer.optimizers:
            if gradients_stay_scaled(trainer, optimizer):
                raise MisconfigurationException(
                    f"GradientNoiseScale: a fused {type(optimizer).__name__} unscales gradients inside its step. Pass "
                    "fused=False to it, or use bf16-mixed."
                )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse batches of unknown size, and find out whether the last one of an epoch is smaller than the others."""
        try:
            effective_batch_size(trainer)
        except MisconfigurationException as error:
            raise MisconfigurationException(
                "GradientNoiseScale compares batch sizes, and that of the training data cannot be told. Use one "
                "DataLoader with a batch_size, or a batch sampler that has one."
            ) from error
        try:
            epoch = pass_over_data(trainer)
        except MisconfigurationException:
            self._full = True  # a stream has no last batch
        else:
            self._full = epoch.drop_last or epoch.samples % epoch.batch_size == 0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start to measure if this is the first batch of an update that is due."""
        if self._micro_batches == 0:
            self._measuring = trainer.global_step % self.every_n_updates == 0
            if self._measuring:
                # Not the module's: what no optimizer updates, nothing sets to zero.
                groups = [group["params"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
                parameters = [parameter for group in groups for parameter in group]
                self._measuring = not any(map(is_lazy, parameters))  # before a lazy module's first batch
                if self._measuring:
                    self._gradients.listen(parameters)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count a micro-batch."""
        self._micro_batches += 1

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Compare the gradients of the update's micro-batches with their mean."""
        micro_batches, self._micro_batches = self._micro_batches, 0
        heard = self._gradients.squares() if self._measuring else None
        if heard is None or not (self._full or not trainer.is_last_batch):
            return
        replicas = data_parallel_size(trainer)
        if micro_batches * replicas < 2:
            return
        micro_batch = effective_batch_size(trainer) // trainer.accumulate_grad_batches // replicas
        # Lightning divides every loss by the accumulation, in an incomplete last window too.
        division = trainer.accumulate_grad_batches
        small, big, _ = heard
        small = mean_over_ranks(small) * division**2 / micro_batches
        numbers = torch.stack((small, big, loss_scale(trainer).to(small.device)))
        small_square, big_square, scale = numbers.tolist()  # the only wait for the device
        moments = gradient_moments(
            small_square / scale**2,
            big_square * (division / micro_batches) ** 2,
            micro_batch,
            micro_batch * micro_batches * replicas,
        )
        self.estimate.update(*moments)
        if not self._note:
            self._note = normalization_note(mixing_layers(pl_module), micro_batch, replicas)
            if self._note:
                rank_zero_warn(f"GradientNoiseScale: {self._note}")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the noise scale if it was measured in this update."""
        if not (self._measuring and self._micro_batches == 0 and self.estimate.measurements):
            return
        critical = self.estimate.critical_batch_size
        facts = {
            "updates": float(trainer.global_step),
            "noise_scale": self.estimate.noise_scale,
            "critical_batch_size": critical,
            "batch_over_critical": self._batch(trainer) / critical if critical > 0 else float("nan"),
        }
        log_now(trainer, pl_module.device, PREFIX, facts)
        if not self._told and self.estimate.measurements >= _FIRST_VERDICT and critical > 0:
            self._told = True
            self._say(trainer, f"Gradient noise scale after {trainer.global_step} updates")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which side of the critical batch this run was on."""
        self._say(trainer, "Gradient noise scale")

    def _regime(self, trainer: Trainer) -> LargeBatchRegime | None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        return next((callback for callback in callbacks if isinstance(callback, LargeBatchRegime)), None)

    def _batch(self, trainer: Trainer) -> int:
        regime = self._regime(trainer)
        return effective_batch_size(trainer) if regime is None or regime.plan is None else regime.plan.batch_size

    def _say(self, trainer: Trainer, when: str) -> None:
        sentences = [batch_verdict(self._batch(trainer), self.estimate)]
        regime = self._regime(trainer)
        if regime is not None and (plan := regime.plan) is not None:
            made = plan.updates / plan.reference_updates if plan.updates and plan.reference_updates else None
            sentences.append(plan_verdict(plan.batch_size, plan.reference_batch_size, self.estimate, planned=made))
        say(f"{when}: {' '.join(filter(None, [*sentences, self._note]))}")

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the averages, as plain Python."""
        return vars(self.estimate).copy()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the averages up where a checkpoint left them.

        Args:
            state_dict: What :meth:`state_dict` returned when the checkpoint was written.
        """
        if self._fitting:
            self.estimate = NoiseScaleEstimate(**{**state_dict, "decay": self.decay})

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening to gradients."""
        self._stop()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening to gradients after an exception, for there is no teardown then."""
        self._stop()

    def _stop(self) -> None:
        self._gradients.remove()
        self._micro_batches = 0
        self._fitting = self._measuring = False
