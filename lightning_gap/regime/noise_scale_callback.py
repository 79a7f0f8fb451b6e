"""The callback that measures the gradient noise scale while a model trains."""

from typing import Any, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_gap.checks import check_choice, check_integer
from lightning_gap.regime.callback import PREFIX, LargeBatchRegime
from lightning_gap.regime.dual_norms import DualNoiseScaleEstimate, dual_verdict
from lightning_gap.regime.group_changes import choice_verdict
from lightning_gap.regime.loader import effective_batch_size, pass_over_data, training_loader
from lightning_gap.regime.noise_scale import (
    NoiseScaleEstimate,
    batch_verdict,
    normalization_note,
    plan_verdict,
    unmeasured_note,
)
from lightning_gap.regime.noise_sources.optimizer_norms import NoiseNorm
from lightning_gap.regime.noise_sources.sources import Estimate, NoiseSource, Source, Window, source_of
from lightning_gap.regime.sample_noise import mixing_layers
from lightning_gap.regime.scheduled_loader import ScheduledLoader
from lightning_gap.trainer.internals.of_lightning import is_compiled_by_lightning
from lightning_gap.trainer.loggers import log_now
from lightning_gap.trainer.strategy import (
    data_parallel_rank,
    data_parallel_size,
    gradients_stay_scaled,
    holds_whole_weights,
    loss_scale,
    require_lightning,
    strategy_name,
)
from lightning_gap.trainer.terminal import say

__all__ = ["FIRST_VERDICT", "GradientNoiseScale"]

# Measurements after which the first verdict is said; fewer are mostly noise.
FIRST_VERDICT = 10


class GradientNoiseScale(Callback):
    r"""Measure the gradient noise scale, and say whether the batch that runs is past the critical one.

    .. math:: B_{simple} = \frac{\operatorname{tr} \Sigma}{|G|^2}

    is the variance of a sample's gradient over the squared mean gradient. A batch far below it wastes updates, one far
    above it wastes samples. Both parts are estimated from gradients over two batch sizes that training computes anyway:
    the update's, and those of a smaller batch. What is added is the norms of these, every few updates. ``source`` says
    what the smaller batch is:

    * ``"accumulation"``, ``"replicas"``: single micro-batches, before they are accumulated or averaged over replicas.
    * ``"examples"``: single examples, in the one backward pass of their batch, from what layers are given and the
      gradients of what they return (:class:`~lightning_gap.regime.ExampleGradients`): on one device, without
      accumulation. Weights that are used past a layer that is known are left out, with a warning that names them.
    * ``"ghosts"``: the ghosts of ghost BatchNorm, which is the gradient that is defined there.
    * ``"auto"``: micro-batches where an update has two or more; else examples, or ghosts where layers normalize over
      the batch.

    Logged under ``lightning_gap/regime/``: ``noise_scale``, of averages that forget, ``critical_batch_size``, of
    averages over the whole run, and ``batch_over_critical``, the batch that runs over the latter; in another norm than
    the Euclidean one with its name behind, as in ``noise_scale_l1``. Numerator and denominator are averaged separately.
    NaN means that the noise has not been averaged out yet. After ten measurements, and at the end of training, a line
    says which side of the critical batch this run is on, and beside a ``LargeBatchRegime`` how many updates its batch
    needs, by this measure, and how many are planned; beside one with ``lr_rule="auto"`` also what that would choose
    knowing it, with ``noise_scale=``.

    Where layers normalize over the batch, as BatchNorm and ghost BatchNorm do, a sample has no gradient of its own. The
    noise scale is then that of batches made of more groups of the size that is normalized over (the micro-batch, or the
    ghost), another number for each size, and that is warned of. With ghosts it does not depend on the micro-batch.

    ``norm`` says in which norm noise and gradient are compared. ``"euclidean"`` is that of SGD. Signs (Lion, nearly
    Adam) and orthogonal matrices (Muon) are steepest descent in others, whose duals measure gradients:

    .. math:: B_{l1} = \frac{(\sum_i \sigma_i)^2}{\|G\|_1^2}, \qquad
        B_{nuclear} = \frac{(\sum_W \operatorname{tr} (E[n_W n_W^T])^{1/2})^2}{(\sum_W \|G_W\|_{nuc})^2},

    by a coordinate's standard deviation over samples, and by each matrix's noise n, its smaller side first, a vector as
    one row. ``"auto"`` takes each parameter in its optimizer's norm by :data:`OPTIMIZERS`, weighted by its learning
    rate. They take micro-batches, of accumulation or replicas, and the verdict has bounds
    (:class:`~lightning_gap.regime.DualNoiseScaleEstimate`). Training is bit for bit the same without this observer.

    Args:
        every_n_updates: Measure at every n-th update; not at one before a lazy module's first batch.
        source: What the smaller batch is, as above.
        max_examples: Of examples and ghosts, take the norms of about so many examples of each micro-batch, drawn
            anew at each update by numbers of its own; ``None`` for all. The mean is that over all, on average.
        decay: The weight that the averages of ``noise_scale`` keep from one measurement to the next, in [0, 1).
        norm: ``"euclidean"``, ``"l1"`` or ``"nuclear"`` for all parameters, or ``"auto"``, as above.

    Attributes:
        estimate: The :class:`~lightning_gap.regime.NoiseScaleEstimate` of the latest fit; in another norm than the
            Euclidean one a :class:`~lightning_gap.regime.DualNoiseScaleEstimate`.

    Raises:
        TypeError: If ``every_n_updates`` is not an int.
        ValueError: If an argument is out of its range.
        MisconfigurationException: When ``fit`` starts, if there are no two batch sizes, as of BatchNorm over the one
            micro-batch of an update, or one is unknown; for examples and ghosts under ``torch.compile``, and with
            layers of ``batch_first=False``; under strategies that shard weights; with manual optimization; with a
            fused optimizer in 16-bit mixed precision; with ``"auto"`` if an optimizer's norm is not known, or a
            Euclidean one stands beside others; after a ``LargeBatchRegime`` that clips gradients; beside one
            with ``gradient_noise``. Before the first update, if no weight's examples can be told.

    References:
        McCandlish, Kaplan, Amodei 2018, "An empirical model of large-batch training", section 2 and appendix A.1.
        Gray et al. 2024, "Normalization layer per-example gradients are sufficient to predict gradient noise scale in
        transformers" (single examples). Naganuma et al. 2026, "Adaptive batch sizes using non-Euclidean gradient noise
        scales for stochastic sign and spectral descent", arXiv:2602.03001 (the l1 and the nuclear norm).

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

    def __init__(
        self,
        *,
        every_n_updates: int = 10,
        source: NoiseSource = "auto",
        max_examples: int | None = 16,
        decay: float = 0.95,
        norm: NoiseNorm = "euclidean",
    ) -> None:
        check_integer("every_n_updates", every_n_updates)
        if max_examples is not None:
            check_integer("max_examples", max_examples, what="the examples of a micro-batch that are measured, or None")
        check_choice("source", source, get_args(NoiseSource))
        check_choice("norm", norm, get_args(NoiseNorm))
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be in [0, 1): 0 forgets at once.")
        self.every_n_updates, self.decay = every_n_updates, decay
        self.source: NoiseSource = source
        self.max_examples = max_examples
        self.norm: NoiseNorm = norm
        self.estimate: Estimate = NoiseScaleEstimate(decay)
        self._heard: Source | None = None
        self._fitting = self._measuring = self._told = False
        self._notes: list[str] = []  # for which model the numbers do not hold
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
        self.estimate, self._notes, self._told = NoiseScaleEstimate(self.decay), [], False
        self._fitting = True

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse gradients that keep the loss scale."""
        for optimizer in trainer.optimizers:
            if gradients_stay_scaled(trainer, optimizer):
                raise MisconfigurationException(
                    f"GradientNoiseScale: a fused {type(optimizer).__name__} unscales gradients inside its step. Pass "
                    "fused=False to it, or use bf16-mixed."
                )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the source, refuse batches of unknown size, find out whether the last of an epoch is smaller."""
        accumulated, replicas = trainer.accumulate_grad_batches, data_parallel_size(trainer)
        try:
            micro_batch = effective_batch_size(trainer) // accumulated // replicas
        except MisconfigurationException as error:
            raise MisconfigurationException(
                "GradientNoiseScale compares batch sizes, and that of the training data cannot be told. Use one "
                "DataLoader with a batch_size, or a batch sampler that has one."
            ) from error
        try:
            self._heard = source = source_of(
                self.source,
                mixing_layers(pl_module),
                micro_batch,
                accumulated=accumulated,
                replicas=replicas,
                max_examples=self.max_examples,
                norm=self.norm,
                optimizers=trainer.optimizers,
            )
            source.check(pl_module, compiled=is_compiled_by_lightning(pl_module))
        except ValueError as error:
            raise MisconfigurationException(f"GradientNoiseScale: {error}.") from error
        self._begin(source)
        try:
            epoch = pass_over_data(trainer)
        except MisconfigurationException:
            self._full = True  # a stream has no last batch
        else:
            self._full = epoch.drop_last or epoch.samples % epoch.batch_size == 0

    def _begin(self, source: Source) -> None:
        """Go on with a checkpoint's averages if they are of this norm."""
        kept = self.estimate
        if kept.norm == source.norm:
            return
        if kept.measurements:
            rank_zero_warn(
                f"GradientNoiseScale: the checkpoint's averages are in the {kept.norm} norm, and this run measures in "
                f"the {source.norm} one: they begin anew. Resume with the norm= of the run before to go on with them."
            )
        self.estimate = source.new_estimate(self.decay)

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
                if self._measuring and self._heard is not None:
                    self._measuring = self._follow(trainer, self._heard) and self._listen(
                        self._heard, trainer, pl_module, parameters
                    )

    def _follow(self, trainer: Trainer, source: Source) -> bool:
        """Take the size of the present batch, which may change; return whether the update's parts are of one size."""
        loader = training_loader(trainer)
        if isinstance(loader, ScheduledLoader):
            source.micro_batch = loader.batch_size
            if not loader.even and not self.estimate.measurements:
                self._say_once("does not measure updates whose parts are of several sizes")
            return loader.even
        return True

    def _listen(self, source: Source, trainer: Trainer, pl_module: LightningModule, parameters: list[Tensor]) -> bool:
        try:
            # The update names the draw, so that a resumed run draws the same; ranks draw different ones.
            seed = trainer.global_step * data_parallel_size(trainer) + data_parallel_rank(trainer)
            source.listen(pl_module, parameters, seed)
        except ValueError as error:  # the model has changed since training began
            self._say_once(f"does not measure any more: {error}")
            return False
        return True

    def _say_once(self, note: str) -> None:
        if note and note not in self._notes:
            self._notes.append(note)
            rank_zero_warn(f"GradientNoiseScale: {note}")

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count a micro-batch."""
        self._micro_batches += 1

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Compare the gradients of the update's micro-batches with their mean."""
        micro_batches, self._micro_batches = self._micro_batches, 0
        source, replicas = self._heard, data_parallel_size(trainer)
        if not self._measuring or source is None:
            return
        if trainer.is_last_batch and not self._full:
            source.pause()
            return
        division = trainer.accumulate_grad_batches  # of every loss, in an incomplete last window too
        measured = source.measure(Window(micro_batches, division, loss_scale(trainer), replicas))
        if measured is None and source.unmeasured and not self.estimate.measurements:
            why = "; ".join(f"{name}: {reason}" for name, reason in list(source.unmeasured.items())[:3])
            raise MisconfigurationException(
                f"GradientNoiseScale: no weight's gradient can be told for single examples ({why}). Use "
                "accumulate_grad_batches of 2 or more with as much smaller batches, or several replicas."
            )
        if measured is None:
            return
        self.estimate.update(*measured)
        if not self._notes:
            self._say_once(normalization_note(mixing_layers(pl_module), source.micro_batch, replicas))
        self._say_once(unmeasured_note(source.unmeasured, pl_module))

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
        if isinstance(self.estimate, DualNoiseScaleEstimate):  # another number, which is not to be taken for the first
            facts = {key if key == "updates" else f"{key}_{self.estimate.norm}": value for key, value in facts.items()}
        log_now(trainer, pl_module.device, PREFIX, facts)
        if not self._told and self.estimate.measurements >= FIRST_VERDICT and critical > 0:
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
        if isinstance(self.estimate, DualNoiseScaleEstimate):
            verdict = dual_verdict(self._batch(trainer), self.estimate)
            say(f"{when}: {' '.join([verdict, *self._notes])}")
            return
        sentences = [batch_verdict(self._batch(trainer), self.estimate)]
        regime = self._regime(trainer)
        if regime is not None and (plan := regime.plan) is not None:
            made = plan.updates / plan.reference_updates if plan.updates and plan.reference_updates else None
            sentences.append(plan_verdict(plan.batch_size, plan.reference_batch_size, self.estimate, planned=made))
            sentences.append(choice_verdict(plan, trainer.optimizers, self.estimate.critical_batch_size))
        say(f"{when}: {' '.join(filter(None, [*sentences, *self._notes]))}")

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
            kind = DualNoiseScaleEstimate if "norm" in state_dict else NoiseScaleEstimate
            self.estimate = kind(**{**state_dict, "decay": self.decay})

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening to gradients."""
        self._stop()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening to gradients after an exception, for there is no teardown then."""
        self._stop()

    def _stop(self) -> None:
        if self._heard is not None:
            self._heard.remove()
        self._heard = None
        self._micro_batches = 0
        self._fitting = self._measuring = False
