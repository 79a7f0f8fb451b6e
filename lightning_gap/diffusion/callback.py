"""The callback that watches the weights diffuse."""

import math
from collections.abc import Mapping
from typing import Any

import rich
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.table import Table
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_gap.diffusion.distance import (
    WeightDisplacement,
    check_same_tensors,
    displacement_from_squares,
    square_sums,
    tracked_parameters,
)
from lightning_gap.diffusion.law import DiffusionFit, constant_lr_segments, fit_diffusion, next_log_update
from lightning_gap.parallel import (
    holds_whole_weights,
    local_shard,
    shard_copies,
    shard_like,
    shards_by_dtensor,
    strategy_name,
    sum_over_ranks,
    whole_tensor,
)

__all__ = ["UltraSlowDiffusion"]

_PREFIX = "lightning_gap/diffusion/"
_COLUMNS = ("updates", "learning_rate", *WeightDisplacement._fields)


class UltraSlowDiffusion(Callback):
    r"""Record ‖w_t − w_0‖ while a model trains, and say which law of diffusion it follows.

    The anchor w_0 is copied once, in ``on_train_start``: after conversions, ``configure_model`` and loading of
    pretrained weights, before the first update. It is kept in checkpoints, never taken anew on resume, and is the only
    memory the callback holds: one copy of the tracked parameters, which are those with ``requires_grad=True`` at that
    moment, tied ones once. Parameters unfrozen or added later have no w_0 and are left out, with a warning.

    t is ``trainer.global_step``, the number of optimizer steps. With k optimizers it runs k times as fast, which shifts
    a of a + b·log t and c of c·t^p, and changes neither b nor p. A point is recorded after the first batch at or beyond
    each point of the grid, and logged at once to all loggers (``log_every_n_steps`` does not thin it out) under
    ``lightning_gap/diffusion/``: ``distance``, ``relative_distance``, ``weight_norm``, ``cosine``, ``learning_rate``,
    and ``updates`` and ``log_updates`` as x axes. The latest values are in ``trainer.callback_metrics`` too. The logged
    step is that of ``self.log`` in the same hook.

    The laws hold for a constant learning rate, so they are fitted to the constant stretch (of the first parameter group
    of the first optimizer) that spans the most decades, usually the paper's initial high-rate phase. Where no
    constant stretch spans two decades the whole trace is fitted, and the summary says that the rate varied. Data that
    span under two decades are not fitted, and the summary says so.

    Nothing here draws random numbers or touches weights: a run with the callback is bit-equal to the run without.
    Works on one device, under DDP, and under ``ModelParallelStrategy`` (FSDP2): there each rank holds the anchor of its
    own shards, a point costs one reduction of two numbers, and a checkpoint gathers the anchor in the memory of rank
    zero. ``FSDPStrategy`` and DeepSpeed are refused.

    Args:
        points_per_decade: Points for every factor of ten in t, on the grid round(10^(k / points_per_decade)).
        every_n_updates: Record at every multiple of this many updates instead of the logarithmic grid. The last
            decade then holds nine tenths of the points, and decides the fit.

    Raises:
        ValueError: An argument is not a positive integer.
        MisconfigurationException: When training starts: the strategy is not one of these, no parameter requires a
            gradient, or the anchor in the checkpoint belongs to another model.

    References:
        Hoffer, Hubara, Soudry 2017, "Train longer, generalize better" (arXiv:1705.08741), section 3 and figure 2.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> diffusion = UltraSlowDiffusion(points_per_decade=10)
        >>> trainer = Trainer(max_epochs=30, callbacks=[diffusion], logger=False)  # doctest: +SKIP
        >>> trainer.fit(model)  # doctest: +SKIP
        >>> diffusion.diffusion_fit.log_slope, diffusion.diffusion_fit.preferred  # doctest: +SKIP
    """

    def __init__(self, *, points_per_decade: int = 20, every_n_updates: int | None = None) -> None:
        _require_positive_int("points_per_decade", points_per_decade)
        if every_n_updates is not None:
            _require_positive_int("every_n_updates", every_n_updates)
        self.points_per_decade = points_per_decade
        self.every_n_updates = every_n_updates
        self._anchor: dict[str, Tensor] | None = None
        self._anchor_norm = math.nan
        self._trace: dict[str, list[float]] = {column: [] for column in _COLUMNS}
        self._recording = False
        self._sharded = False
        self._step = 0
        self._due = 0
        self._learning_rate: float | Tensor = math.nan
        self._told_late = False
        self._evaluating = False

    @property
    def trace(self) -> dict[str, list[float]]:
        """A copy of what was recorded: ``updates``, ``learning_rate``, ``distance``, ``relative_distance``,
        ``weight_norm`` and ``cosine``, lists of equal length.
        """  # noqa: D205
        return {column: list(values) for column, values in self._trace.items()}

    @property
    def diffusion_fit(self) -> DiffusionFit | None:
        """The laws fitted to the trace so far; None where it is too short to fit."""
        try:
            return self._fit()[0]
        except ValueError:
            return None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._evaluating = stage != "fit"
        if self._evaluating:
            return
        self._sharded = shards_by_dtensor(trainer)
        if not (self._sharded or holds_whole_weights(trainer)):
            raise MisconfigurationException(
                f"UltraSlowDiffusion cannot read the weights under strategy={strategy_name(trainer)}: train with "
                "strategy='ddp', a ModelParallelStrategy (FSDP2) or on one device, or remove the callback."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._recording = False
        weights = tracked_parameters(pl_module)
        self._step = trainer.global_step
        self._due = self._next_due(self._step)
        if self._step == 0:
            self._take_anchor(weights)
        elif self._anchor is None:
            rank_zero_warn(
                f"UltraSlowDiffusion was added after {self._step} updates and the initial weights are not in the "
                "checkpoint: nothing is recorded in this run. Train from the start with the callback to record."
            )
            return
        else:
            self._adopt_anchor(pl_module)
        self._recording = True

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._recording and optimizer is trainer.optimizers[0]:
            rate = optimizer.param_groups[0]["lr"]
            # A tensor is changed in place by its scheduler; it is read out, which waits for the device, only when due.
            self._learning_rate = rate.clone() if isinstance(rate, Tensor) else rate

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._recording or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._step >= self._due:
            self._due = self._next_due(self._step)
            self._record(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._recording:
            return
        try:
            fit, whole = self._fit()
        except ValueError as reason:
            _print(f"UltraSlowDiffusion: {len(self._trace['updates'])} points recorded, no law fitted: {reason}")
            return
        self._log(trainer, _fit_metrics(fit))
        _print(_summary(fit, varied=whole))

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._anchor is None:
            return {}
        whole = {name: whole_tensor(start) for name, start in self._anchor.items()}
        return {"anchor": {name: start for name, start in whole.items() if start is not None}, "trace": self.trace}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._evaluating:  # testing an older checkpoint must not cut the trace of the finished run
            return
        self._anchor = dict(state_dict["anchor"])
        self._trace = {column: list(state_dict["trace"][column]) for column in _COLUMNS}

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._evaluating = False

    def _next_due(self, step: int) -> int:
        if self.every_n_updates is None:
            return next_log_update(step, self.points_per_decade)
        return (step // self.every_n_updates + 1) * self.every_n_updates

    def _take_anchor(self, weights: Mapping[str, Tensor]) -> None:
        if not weights:
            raise MisconfigurationException(
                "UltraSlowDiffusion found no parameter with requires_grad=True: unfreeze some before training starts, "
                "or remove the callback."
            )
        self._anchor = {name: weight.clone() for name, weight in weights.items()}
        self._anchor_norm = math.sqrt(self._square_sums(self._anchor)[1])
        self._trace = {column: [] for column in _COLUMNS}

    def _adopt_anchor(self, pl_module: LightningModule) -> None:
        """Check the checkpoint's anchor against the model, and bring it to the weights' devices."""
        assert self._anchor is not None
        weights = self._weights(pl_module)
        try:
            check_same_tensors(weights, self._anchor)
        except ValueError as error:
            raise MisconfigurationException(
                f"UltraSlowDiffusion: the initial weights in the checkpoint are those of another model: {error}. "
                "Resume with the same model, or remove the callback."
            ) from error
        self._anchor = {name: shard_like(start, weights[name]) for name, start in self._anchor.items()}
        self._anchor_norm = math.sqrt(self._square_sums(self._anchor)[1])

    def _weights(self, pl_module: LightningModule) -> dict[str, Tensor]:
        """The tracked parameters as they are now, frozen since or not."""
        assert self._anchor is not None
        return {name: p.detach() for name, p in pl_module.named_parameters() if name in self._anchor}

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._anchor is not None
        self._warn_of_late_parameters(pl_module)
        weights = self._weights(pl_module)
        try:
            check_same_tensors(weights, self._anchor)
        except ValueError as error:
            self._recording = False
            rank_zero_warn(f"UltraSlowDiffusion stops recording at update {self._step}, the model was changed: {error}")
            return
        now = displacement_from_squares(*self._square_sums(weights), self._anchor_norm)
        point = {"updates": float(self._step), "learning_rate": float(self._learning_rate), **now._asdict()}
        for column, value in point.items():
            self._trace[column].append(value)
        metrics = {_PREFIX + column: value for column, value in point.items()}
        metrics[_PREFIX + "log_updates"] = math.log(self._step)
        self._log(trainer, metrics)
        pl_module.log_dict(metrics, logger=False)  # for the progress bar and `trainer.callback_metrics`

    def _square_sums(self, weights: Mapping[str, Tensor]) -> tuple[float, float]:
        """Return ‖w − w_0‖² and ‖w‖² of the whole model."""
        assert self._anchor is not None
        if not self._sharded:
            return square_sums(weights, self._anchor)
        local = {name: local_shard(weight) for name, weight in weights.items()}
        start = {name: local_shard(weight) for name, weight in self._anchor.items()}
        copies = {name: shard_copies(weight) for name, weight in weights.items()}
        device = next(iter(local.values())).device
        sums = sum_over_ranks(torch.tensor(square_sums(local, start, copies), dtype=torch.float64, device=device))
        return float(sums[0]), float(sums[1])

    def _warn_of_late_parameters(self, pl_module: LightningModule) -> None:
        assert self._anchor is not None
        late = [name for name in tracked_parameters(pl_module) if name not in self._anchor]
        if late and not self._told_late:
            self._told_late = True
            rank_zero_warn(
                f"UltraSlowDiffusion leaves out {len(late)} parameters that were added or unfrozen after training "
                f"started ({late[0]}, ...): they have no initial weights to be compared with."
            )

    @staticmethod
    def _log(trainer: Trainer, metrics: dict[str, float]) -> None:
        # As Lightning's own monitors do: `pl_module.log` would keep one point in `log_every_n_steps`.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def _fit(self) -> tuple[DiffusionFit, bool]:
        """Return the fit, and whether it is one of the whole trace in spite of a learning rate that varied."""
        updates, distances = self._trace["updates"], self._trace["distance"]
        segments = constant_lr_segments(self._trace["learning_rate"])
        if len(segments) > 1:
            longest = max(segments, key=lambda s: updates[s.stop - 1] / updates[s.start])
            try:
                return fit_diffusion(updates[longest], distances[longest]), False
            except ValueError:
                return fit_diffusion(updates, distances), True
        return fit_diffusion(updates, distances), False


def _require_positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _fit_metrics(fit: DiffusionFit) -> dict[str, float]:
    names = ("log_slope", "log_r2", "power_exponent", "power_r2", "log_weight", "alpha")
    return {_PREFIX + name: getattr(fit, name) for name in names if math.isfinite(getattr(fit, name))}


def _summary(fit: DiffusionFit, *, varied: bool) -> Table:
    span = f"updates {fit.first_update:g} to {fit.last_update:g}, {fit.points} points"
    rate = "the learning rate varied: read with care" if varied else "at constant learning rate"
    table = Table("law", "fit", "R²", "Akaike weight", title=f"‖w_t − w_0‖ over {span}, {rate}")
    log = f"{fit.log_intercept:.4g} + {fit.log_slope:.4g}·log t"
    power = f"{fit.power_coefficient:.4g}·t^{fit.power_exponent:.4g}"
    table.add_row("ultra-slow", log, f"{fit.log_r2:.4f}", f"{fit.log_weight:.3f}")
    table.add_row("power", power, f"{fit.power_r2:.4f}", f"{1 - fit.log_weight:.3f}")
    name = "ultra-slow" if fit.preferred == "log" else "power"
    table.caption = f"preferred: {name}" + (f"; α = {fit.alpha:.3g}" if math.isfinite(fit.alpha) else "")
    return table


@rank_zero_only
def _print(message: str | Table) -> None:
    rich.print(message)
