"""The callback that watches the weights diffuse."""

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, Literal

import fsspec
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_gap.checks import check_integer
from lightning_gap.diffusion.distance import (
    ParameterFilter,
    WeightDisplacement,
    check_filter,
    check_same_tensors,
    displacement_from_squares,
    holds_values,
    layer_of,
    matches,
    present_parameters,
    square_sums,
)
from lightning_gap.diffusion.law import DiffusionFit, Forecast, fit_diffusion, forecast_updates, next_log_update
from lightning_gap.diffusion.plot import plot_diffusion
from lightning_gap.diffusion.reference import ReferenceRun, advice, read_reference, write_trace
from lightning_gap.diffusion.summary import publish, summary
from lightning_gap.precision import widest
from lightning_gap.ranks.group import sum_over_ranks
from lightning_gap.ranks.shards import load_shards, local_shard, save_shards, shard_copies, shard_like
from lightning_gap.trainer.loggers import define_axes, filled, log_at_update, log_facts
from lightning_gap.trainer.strategy import (
    from_rank_zero,
    holds_whole_weights,
    require_lightning,
    shards_by_dtensor,
    strategy_name,
)
from lightning_gap.trainer.terminal import say

__all__ = ["UltraSlowDiffusion"]

_PREFIX = "lightning_gap/diffusion/"
_COLUMNS = ("updates", "learning_rate", *WeightDisplacement._fields)
_OVERLAY = ("reference_distance", "reference_update")
_FORECAST = ("remaining_updates", "remaining_updates_low", "remaining_updates_high")
# What draws the laws again, beside what `DiffusionFit.numbers` returns.
_LAWS = ("log_intercept", "power_coefficient", "first_update", "last_update")
_HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# A forecast in the middle of a run is made again soon; the summary's has the full number of resamples.
_LIVE_RESAMPLES = 199


class UltraSlowDiffusion(Callback):
    r"""Record ‖w_t − w_0‖ while a model trains, say which law of diffusion it follows, and how much longer to train.

    The anchor w_0 is copied once, in ``on_train_start``: after conversions, ``configure_model`` and loading of
    pretrained weights, before the first update. Where modules are lazy it is copied when the first batch has given
    their weights shapes and values. It is never taken anew on resume: a checkpoint holds it, or, where
    weights are sharded, names the folder beside it to which each rank wrote its shards once. The anchor is the only
    memory the callback holds: one copy of the tracked parameters, which are those with ``requires_grad=True`` at that
    moment, tied ones once. Parameters frozen later stay in; those unfrozen or added later have no w_0 and are left
    out, with a warning.

    t is ``trainer.global_step``, the number of optimizer steps. With k optimizers it runs k times as fast, which shifts
    a of a + b·log t and c of c·t^p, and changes neither b nor p. A point is recorded after the first batch at or beyond
    each point of the grid, and logged at once to all loggers (``log_every_n_steps`` does not thin it out) under
    ``lightning_gap/diffusion/``: ``distance``, ``relative_distance``, ``weight_norm``, ``cosine``, ``learning_rate``,
    ``distance/GROUP`` for every group, and ``updates`` and ``log_updates`` as x axes. The latest values are in
    ``trainer.callback_metrics`` too. The logged step is that of ``self.log`` in the same hook.

    The laws hold for a constant learning rate, so they are fitted to the constant stretch (of the first parameter group
    of the first optimizer) that spans the most decades, usually the paper's initial high-rate phase. Where no
    constant stretch spans two decades the whole trace is fitted, and the summary says that the rate varied. Data that
    span under two decades are not fitted, and the summary says so.

    With every checkpoint, and at the end, the trace is written to ``diffusion.csv`` beside the checkpoints (or in the
    logger's folder; nowhere, where there is neither). At the end a summary is printed, and a figure and a table go to
    the loggers: those of W&B, TensorBoard, MLflow and CSV.

    With ``reference``, each point is also placed on the curve of another run, usually one with a small batch:
    ``reference_distance`` is how far that run was after as many updates, ``reference_update`` the update at which it
    was where this one is now, and ``remaining_updates`` with ``_low`` and ``_high`` forecast how many more updates at
    this learning rate will bring this run as far as that one was at the end of its constant rate.

    Nothing here draws from the random number generators or touches weights: a run with the callback is bit-equal to the
    run without. Works on one device, under DDP, and under ``ModelParallelStrategy`` (FSDP2): there each rank holds the
    anchor of its own shards, and a point costs one reduction. ``FSDPStrategy`` and DeepSpeed are refused.

    Args:
        points_per_decade: Points for every factor of ten in t, on the grid round(10^(k / points_per_decade)).
        every_n_updates: Record at every multiple of this many updates instead of the logarithmic grid. The last
            decade then holds nine tenths of the points, and decides the fit.
        per_layer: Measure each module that owns parameters as a group too.
        groups: Further groups to be measured, name -> a regular expression searched for in the parameters' names, or
            a function of name and parameter. Groups may overlap.
        exclude: Parameters that are not measured at all: a regular expression, or a function as
            :func:`lightning_gap.diffusion.norms_and_biases`.
        reference: The ``diffusion.csv`` of another run, or a folder that holds exactly one.
        anchor_device: Where the anchor is kept, as ``"cpu"``; with the weights if None. On another device a measurement
            moves it there piece by piece.
        anchor_dtype: ``"float16"`` or ``"bfloat16"`` to keep the anchor in half precision. The squared rounding error
            ‖w_0 − rounded w_0‖² is subtracted from ‖w_t − rounded w_0‖²; what is left of the error is their inner
            product, small because roundings are unrelated to the path.

    Raises:
        ValueError: An argument is out of range.
        MisconfigurationException: When training starts: the strategy is not one of these, no parameter is left, a
            group has none, the reference cannot be read, or the anchor in the checkpoint belongs to another model.

    References:
        Hoffer, Hubara, Soudry 2017, "Train longer, generalize better" (arXiv:1705.08741), section 3 and figure 2.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> diffusion = UltraSlowDiffusion(points_per_decade=10)
        >>> trainer = Trainer(max_epochs=30, callbacks=[diffusion], logger=False)  # doctest: +SKIP
        >>> trainer.fit(model)  # doctest: +SKIP
        >>> diffusion.diffusion_fit.log_slope, diffusion.diffusion_fit.preferred  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        points_per_decade: int = 20,
        every_n_updates: int | None = None,
        per_layer: bool = False,
        groups: Mapping[str, ParameterFilter] | None = None,
        exclude: ParameterFilter | None = None,
        reference: str | None = None,
        anchor_device: str | None = None,
        anchor_dtype: Literal["float16", "bfloat16"] | None = None,
    ) -> None:
        check_integer("points_per_decade", points_per_decade)
        if every_n_updates is not None:
            check_integer("every_n_updates", every_n_updates)
        for name, which in (groups or {}).items():
            check_filter(f"groups[{name!r}]", which)
        if exclude is not None:
            check_filter("exclude", exclude)
        if anchor_dtype is not None and anchor_dtype not in _HALF:
            raise ValueError(f"anchor_dtype must be 'float16', 'bfloat16' or None, got {anchor_dtype!r}")
        self.points_per_decade = points_per_decade
        self.every_n_updates = every_n_updates
        self.per_layer = per_layer
        self.groups = dict(groups or {})
        self.exclude = exclude
        self.reference = reference
        self.anchor_device = None if anchor_device is None else torch.device(anchor_device)
        self.anchor_dtype = anchor_dtype
        self._anchor: dict[str, Tensor] | None = None
        self._loaded: dict[str, Any] | None = None
        self._shapes: dict[str, list[int]] = {}
        self._anchor_folder: str | None = None
        # Rows as the anchor's tensors: ‖w_0 − anchor‖², which is zero unless rounded, and ‖w_0‖².
        self._start_squares = torch.zeros(0, 2, dtype=torch.float64, device="cpu")
        self._rows: dict[str, Tensor] = {}
        self._trace: dict[str, list[float]] = {column: [] for column in _COLUMNS}
        self._folder: str | None = None
        self._stem = "diffusion"
        self._reference_run: ReferenceRun | None = None
        self._forecast: Forecast | None = None
        self._forecast_due = 0
        self._recording = False
        self._waiting = False  # for the first batch of lazy modules
        self._told_not_finite = False
        self._sharded = False
        self._step = 0
        self._due = 0
        self._learning_rate: float | Tensor = math.nan
        self._told_late = False
        self._evaluating = False

    @property
    def trace(self) -> dict[str, list[float]]:
        """A copy of what was recorded: ``updates``, ``learning_rate``, ``distance``, ``relative_distance``,
        ``weight_norm`` and ``cosine``, and the last four as ``distance/GROUP`` for every group; lists of equal length.
        """  # noqa: D205
        return {column: list(values) for column, values in self._trace.items()}

    @property
    def diffusion_fit(self) -> DiffusionFit | None:
        """The laws fitted to the trace so far; None where it is too short to fit."""
        try:
            return self._fit()[0]
        except ValueError:
            return None

    @property
    def advice(self) -> str | None:
        """Where this run stands beside its reference, and how much longer to train; None without a reference."""
        updates, distances, _ = self._finite_points()
        if self._reference_run is None or not updates:
            return None
        return advice(self._reference_run, updates[-1], distances[-1], self._forecast_updates(resamples=999))

    def plot(self, ax: Any = None) -> tuple[Any, Any]:
        """Draw the distances against log t with both laws, the drops of the learning rate, and the reference.

        Args:
            ax: Matplotlib axes to draw on; new ones by default.

        Returns:
            The figure and its axes.

        Raises:
            ModuleNotFoundError: Matplotlib is not installed.
        """
        return plot_diffusion(self._trace, self.diffusion_fit, self._reference_run, ax=ax)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._evaluating = stage != "fit"
        if self._evaluating:
            return
        require_lightning(trainer, type(self).__name__)
        self._sharded = shards_by_dtensor(trainer)
        if not (self._sharded or holds_whole_weights(trainer)):
            raise MisconfigurationException(
                f"UltraSlowDiffusion cannot read the weights under strategy={strategy_name(trainer)}: train with "
                "strategy='ddp', a ModelParallelStrategy (FSDP2) or on one device, or remove the callback."
            )
        if self.reference is not None:
            try:
                self._reference_run = read_reference(self.reference)
            except (OSError, ValueError) as error:
                raise MisconfigurationException(f"UltraSlowDiffusion: {error}") from error

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._recording = self._waiting = False
        self._told_not_finite = False
        self._step = trainer.global_step
        self._due = self._next_due(self._step)
        self._forecast, self._forecast_due = None, self._step
        self._folder = None if trainer.fast_dev_run else _folder_of(trainer)  # type: ignore[attr-defined]
        if self._step == 0 and any(p.requires_grad and is_lazy(p) for p in pl_module.parameters()):
            self._anchor, self._loaded, self._trace = None, None, {column: [] for column in _COLUMNS}
            self._waiting = True
            return
        if self._step == 0:
            self._take_anchor(trainer, pl_module)
        elif self._loaded is not None:
            self._adopt_anchor(trainer, pl_module, self._loaded)
            self._loaded = None
        elif self._anchor is None:
            rank_zero_warn(
                f"UltraSlowDiffusion was added after {self._step} updates and the initial weights are not in the "
                "checkpoint: nothing is recorded in this run. Train from the start with the callback to record."
            )
            return
        else:
            self._check_model(pl_module, self._shapes)
        self._start(trainer)

    def _start(self, trainer: Trainer) -> None:
        self._recording = True
        self._compare_with_reference()
        log_facts(trainer.loggers, _PREFIX, {"parameters": self._parameters, "reference": self.reference or "none"})

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._waiting:  # the first forward pass has been made, no update yet
            self._waiting = False
            self._take_anchor(trainer, pl_module)
            self._start(trainer)
        # Lightning's stand-in for no optimizer has no groups.
        if self._recording and optimizer is trainer.optimizers[0] and optimizer.param_groups:
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
        self._write_trace()
        fit: DiffusionFit | None = None
        try:
            fit, whole = self._fit()
        except ValueError as reason:
            say(f"UltraSlowDiffusion: {len(self._trace['updates'])} points recorded, no law fitted: {reason}")
        else:
            numbers = fit.numbers() | {name: getattr(fit, name) for name in _LAWS}
            numbers["log_updates"] = math.log(self._step)
            numbers = {_PREFIX + name: x for name, x in numbers.items() if math.isfinite(x)}
            define_axes(trainer.loggers, f"{_PREFIX}log_updates", numbers)
            log_at_update(trainer, numbers)
            say(summary(fit, varied=whole))
        if said := self.advice:
            say(f"UltraSlowDiffusion: {said}")
        if trainer.is_global_zero and self._trace["updates"] and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            publish(trainer.loggers, _PREFIX, step, self._trace, fit, self._reference_run)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._recording:
            self._write_trace()

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._recording:
            self._write_trace()

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._anchor is None:
            return self._loaded or {}
        state: dict[str, Any] = {
            "shapes": dict(self._shapes),
            "start_squares": self._start_squares,
            "trace": self.trace,
            "stem": self._stem,
        }
        return state | ({"anchor_folder": self._anchor_folder} if self._anchor_folder else {"anchor": self._anchor})

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._evaluating:  # testing an older checkpoint must not cut the trace of the finished run
            return
        self._anchor, self._loaded = None, dict(state_dict)  # the model is not known yet
        self._trace = {column: list(values) for column, values in state_dict["trace"].items()}

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._evaluating = False

    def _next_due(self, step: int) -> int:
        if self.every_n_updates is None:
            return next_log_update(step, self.points_per_decade)
        return (step // self.every_n_updates + 1) * self.every_n_updates

    def _take_anchor(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = present_parameters(pl_module, exclude=self.exclude)
        if not weights:
            raise MisconfigurationException(
                "UltraSlowDiffusion found no parameter with requires_grad=True that is not excluded: unfreeze some "
                "before training starts, exclude less, or remove the callback."
            )
        rows = self._rows_of_groups(weights)
        self._loaded = None
        self._stem = _free_stem(trainer, self._folder)
        self._anchor_folder = None
        self._keep(weights, weights)
        if self._sharded:
            self._anchor_folder = f"{self._folder or trainer.default_root_dir}/{self._stem}_anchor"
            save_shards(weights, self._anchor_folder)
        self._rows = rows
        self._trace = {column: [] for column in (*_COLUMNS, *_group_columns(rows))}

    def _adopt_anchor(self, trainer: Trainer, pl_module: LightningModule, state: Mapping[str, Any]) -> None:
        """Check the checkpoint's anchor against the model, and bring it to where it is kept."""
        weights = self._check_model(pl_module, state["shapes"])
        rows = self._rows_of_groups(weights)
        self._anchor_folder = state.get("anchor_folder")
        if self._anchor_folder is None:
            start = {name: shard_like(state["anchor"][name], weight) for name, weight in weights.items()}
        else:
            self._anchor_folder = from_rank_zero(trainer, _existing(self._anchor_folder, trainer.ckpt_path))
            start = load_shards(weights, self._anchor_folder)
        self._keep(weights, start)
        rounding = self._start_squares[:, 0]
        self._start_squares = state["start_squares"].clone()
        if self._anchor_folder is None:  # may have been rounded before, and rounded again now
            self._start_squares[:, 0] += rounding
        else:
            self._start_squares[:, 0] = rounding
        self._rows, self._stem = rows, state["stem"]
        unknown = [math.nan] * len(state["trace"]["updates"])  # for groups that are new
        columns = (*_COLUMNS, *_group_columns(rows))
        self._trace = {column: list(state["trace"].get(column, unknown)) for column in columns}

    def _check_model(self, pl_module: LightningModule, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Return the weights that belong to the anchor, or refuse a model or an ``exclude`` that do not."""
        named = {name: p.detach() for name, p in pl_module.named_parameters() if holds_values(p)}
        gone = [name for name in shapes if name not in named]
        reshaped = [name for name in shapes if name in named and list(named[name].shape) != list(shapes[name])]
        out = [name for name in shapes if self.exclude and name in named and matches(self.exclude, name, named[name])]
        for names, what in ((gone, "is not in the model"), (reshaped, "has another shape"), (out, "is excluded now")):
            if names:
                raise MisconfigurationException(
                    f"UltraSlowDiffusion: the initial weights are those of another model: {names[0]} {what}. Resume "
                    "with the same model and the same `exclude`, or remove the callback."
                )
        return {name: named[name] for name in shapes}

    def _rows_of_groups(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return which tensors each group is made of, by their number."""
        members = {
            group: [row for row, (name, weight) in enumerate(weights.items()) if matches(which, name, weight)]
            for group, which in self.groups.items()
        }
        if empty := [group for group, rows in members.items() if not rows]:
            raise MisconfigurationException(
                f"UltraSlowDiffusion: groups[{empty[0]!r}] matches no tracked parameter; they are named "
                f"{', '.join(list(weights)[:5])}, ..."
            )
        layers: dict[str, list[int]] = {}
        for row, name in enumerate(weights if self.per_layer else ()):
            layers.setdefault(layer_of(name), []).append(row)
        if both := sorted(layers.keys() & members.keys()):
            raise MisconfigurationException(
                f"UltraSlowDiffusion: {both[0]!r} is the name of a layer and one of `groups`: rename the group."
            )
        return {group: torch.tensor(rows, device="cpu") for group, rows in (members | layers).items()}

    def _keep(self, weights: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> None:
        """Keep a copy of ``start``, this rank's part of it, as the anchor."""
        local = {name: local_shard(tensor) for name, tensor in start.items()}
        self._anchor = {name: self._stored(tensor) for name, tensor in local.items()}
        self._shapes = {name: list(weight.shape) for name, weight in weights.items()}
        self._start_squares = self._square_sums(start)
        if not self._start_squares[:, 0].isfinite().all() and self._start_squares[:, 1].isfinite().all():
            self._anchor = None
            raise MisconfigurationException(
                f"UltraSlowDiffusion: anchor_dtype={self.anchor_dtype!r} cannot hold the initial weights, some are too "
                "large: use 'bfloat16' or None."
            )

    def _stored(self, tensor: Tensor) -> Tensor:
        dtype = tensor.dtype if self.anchor_dtype is None else _HALF[self.anchor_dtype]
        if not tensor.is_floating_point() or dtype.itemsize >= tensor.dtype.itemsize:
            dtype = tensor.dtype
        return tensor.to(self.anchor_device or tensor.device, dtype, copy=True)

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._anchor is not None
        self._warn_of_late_parameters(pl_module)
        weights = {name: p.detach() for name, p in pl_module.named_parameters() if name in self._anchor}
        try:
            check_same_tensors({name: local_shard(weight) for name, weight in weights.items()}, self._anchor)
        except ValueError as error:
            self._recording = False
            rank_zero_warn(f"UltraSlowDiffusion stops recording at update {self._step}, the model was changed: {error}")
            return
        squares = self._square_sums(weights)
        now = self._displacement(squares)
        if not (math.isfinite(now.distance) or self._told_not_finite):
            self._warn_of_no_number(squares)
        point = {"updates": float(self._step), "learning_rate": float(self._learning_rate), **now._asdict()}
        for group, rows in self._rows.items():
            moved = self._displacement(squares, rows)._asdict()
            point |= {f"{name}/{group}": value for name, value in moved.items()}
        for column, value in point.items():
            self._trace[column].append(value)
        seen = {_PREFIX + name: point[name] for name in self._trace if "/" not in name or name.startswith("distance/")}
        seen[_PREFIX + "log_updates"] = math.log(self._step)
        beside = self._beside_reference(now.distance)
        beside = {_PREFIX + name: value for name, value in beside.items() if math.isfinite(value)}
        numbers = {name: value for name, value in (seen | beside).items() if math.isfinite(value)}
        define_axes(trainer.loggers, f"{_PREFIX}log_updates", numbers)
        log_at_update(trainer, numbers)
        # For `trainer.callback_metrics`, and the reference for the progress bar.
        for numbers, prog_bar in ((seen, False), (beside, True)):
            tensors = {name: filled(number, pl_module.device) for name, number in numbers.items()}
            pl_module.log_dict(tensors, logger=False, prog_bar=prog_bar)

    def _square_sums(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return ‖w − w_0‖² and ‖w‖² of every tensor: (tensors, 2), over all ranks."""
        assert self._anchor is not None
        local = {name: local_shard(weights[name]) for name in self._anchor}
        sums = square_sums(local, self._anchor)
        if not self._sharded:
            return sums
        copies = [shard_copies(weights[name]) for name in self._anchor]
        share = sums / torch.tensor(copies, dtype=torch.float64, device="cpu")[:, None]
        device = next(iter(local.values())).device
        return sum_over_ranks(share.to(widest(device)).to(device)).cpu().double()

    def _displacement(self, squares: Tensor, rows: Tensor | slice = slice(None)) -> WeightDisplacement:
        """Return the displacement of all tensors or of a group."""
        start = self._start_squares[rows].sum(0)
        distance2, norm2 = squares[rows].sum(0)
        rounding, start2 = start
        return displacement_from_squares(
            float((distance2 - rounding).clamp(min=0)), float(norm2), math.sqrt(float(start2))
        )

    def _warn_of_late_parameters(self, pl_module: LightningModule) -> None:
        assert self._anchor is not None
        if self._told_late:
            return
        late = [name for name in present_parameters(pl_module, exclude=self.exclude) if name not in self._anchor]
        if late:
            self._told_late = True
            rank_zero_warn(
                f"UltraSlowDiffusion leaves out {len(late)} parameters that were added or unfrozen after training "
                f"started ({late[0]}, ...): they have no initial weights to be compared with."
            )

    def _warn_of_no_number(self, squares: Tensor) -> None:
        assert self._anchor is not None
        self._told_not_finite = True
        names = [
            name for name, finite in zip(self._anchor, squares.isfinite().all(1).tolist(), strict=True) if not finite
        ]
        updates = self._finite_points()[0]
        before = f", and was a number at update {updates[-1]:.0f}" if updates else ""
        rank_zero_warn(
            f"UltraSlowDiffusion: the distance is NaN or infinite at update {self._step}{before}: {len(names)} of "
            f"{len(self._anchor)} parameters are no finite numbers ({names[0]}, ...). Such points stay in the trace "
            "and out of loggers, laws and advice. Lower the learning rate, or clip the gradients."
        )

    def _compare_with_reference(self) -> None:
        if self._reference_run is None:
            return
        parameters = self._parameters
        if self._reference_run.parameters not in (0, parameters):
            rank_zero_warn(
                f"UltraSlowDiffusion measures {parameters} parameters here, and measured "
                f"{self._reference_run.parameters} in its reference: the distances are not those of the same weights."
            )

    @property
    def _parameters(self) -> int:
        return sum(math.prod(shape) for shape in self._shapes.values())

    def _beside_reference(self, distance: float) -> dict[str, float]:
        if self._reference_run is None:
            return {}
        if self._step >= self._forecast_due:
            self._forecast_due = next_log_update(self._step, self.points_per_decade)
            self._forecast = self._forecast_updates(_LIVE_RESAMPLES)
        there = self._reference_run.distance_at(self._step), self._reference_run.update_at(distance)
        remaining = [max(t - self._step, 0.0) for t in self._forecast] if self._forecast else [math.nan] * 3
        return dict(zip((*_OVERLAY, *_FORECAST), (*there, *remaining), strict=True))

    def _forecast_updates(self, resamples: int) -> Forecast | None:
        """Return when this run will be where the reference was; None where that is already so or too early to say."""
        assert self._reference_run is not None
        (updates, distances, rates), goal = self._finite_points(), self._reference_run.target[1]
        if not distances or distances[-1] >= goal:
            return None
        try:
            return forecast_updates(updates, distances, goal, learning_rates=rates, resamples=resamples)
        except ValueError:
            return None

    def _finite_points(self) -> tuple[list[float], list[float], list[float]]:
        """Return updates, distances and learning rates of the points whose distance is a number."""
        columns = (self._trace[name] for name in ("updates", "distance", "learning_rate"))
        points = [point for point in zip(*columns, strict=True) if math.isfinite(point[1])]
        updates, distances, rates = ([point[i] for point in points] for i in range(3))
        return updates, distances, rates

    def _fit(self) -> tuple[DiffusionFit, bool]:
        """Return the fit, and whether it is one of the whole trace in spite of a learning rate that varied."""
        updates, distances, rates = self._finite_points()
        try:
            return fit_diffusion(updates, distances, learning_rates=rates), False
        except ValueError:
            return fit_diffusion(updates, distances), True

    @rank_zero_only
    def _write_trace(self) -> None:
        if self._folder is None or not self._trace["updates"]:
            return
        filesystem, path = fsspec.core.url_to_fs(f"{self._folder}/{self._stem}.csv")
        filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
        with filesystem.open(path, "w") as file:
            write_trace(file, self._trace, self._parameters)


def _group_columns(groups: Mapping[str, Any]) -> list[str]:
    return [f"{name}/{group}" for group in groups for name in WeightDisplacement._fields]


def _folder_of(trainer: Trainer) -> str | None:
    """Return where the run writes its checkpoints, or else its logs; None if it writes neither. Collective."""
    folder = getattr(trainer.checkpoint_callback, "dirpath", None) or (trainer.log_dir if trainer.loggers else None)
    return None if folder is None else str(folder)


def _free_stem(trainer: Trainer, folder: str | None) -> str:
    """Return ``diffusion``, or with ``-v1``, ``-v2``, ... what no other run in this folder has taken. Collective."""
    stem, version = "diffusion", 0
    filesystem, place = fsspec.core.url_to_fs(folder or trainer.default_root_dir)
    while any(filesystem.exists(f"{place}/{stem}{end}") for end in (".csv", "_anchor")):
        version += 1
        stem = f"diffusion-v{version}"
    return from_rank_zero(trainer, stem)


def _existing(folder: str, ckpt_path: Any) -> str:
    """Return the anchor's folder where it was written, or beside the checkpoint if that was moved."""
    beside = PurePath(str(ckpt_path)).parent / PurePath(folder).name
    for place in (folder, str(beside)):
        filesystem, path = fsspec.core.url_to_fs(place)
        if filesystem.exists(path):
            return place
    raise MisconfigurationException(
        f"UltraSlowDiffusion: the initial weights are neither in {folder} nor in {beside}: put the folder beside the "
        "checkpoint, or remove the callback."
    )
