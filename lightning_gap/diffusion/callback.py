"""The callback that watches the weights diffuse."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_gap.checks import check_integer
from lightning_gap.diffusion.anchor import Anchor, folder_of_shards, weights_of
from lightning_gap.diffusion.distance import ParameterFilter, check_filter, present_parameters
from lightning_gap.diffusion.fit import DiffusionFit
from lightning_gap.diffusion.grid import next_update
from lightning_gap.diffusion.plot import plot_diffusion
from lightning_gap.diffusion.reference import ReferenceRun, advice, read_reference
from lightning_gap.diffusion.summary import laws_to_log, publish, summary
from lightning_gap.diffusion.trace import LiveComparison, Trace, free_stem
from lightning_gap.trainer.internals.of_lightning import batches_that_stepped
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
        if anchor_dtype not in (None, "float16", "bfloat16"):
            raise ValueError(f"anchor_dtype must be 'float16', 'bfloat16' or None, got {anchor_dtype!r}")
        self.points_per_decade = points_per_decade
        self.every_n_updates = every_n_updates
        self.per_layer = per_layer
        self.groups = dict(groups or {})
        self.exclude = exclude
        self.reference = reference
        self.anchor_device = None if anchor_device is None else torch.device(anchor_device)
        self.anchor_dtype = anchor_dtype
        self._anchor: Anchor | None = None
        self._loaded: dict[str, Any] = {}  # from a checkpoint, until the model is known
        self._trace = Trace()
        self._folder: str | None = None
        self._stem = "diffusion"
        self._reference_run: ReferenceRun | None = None
        self._comparison: LiveComparison | None = None
        self._recording = False
        self._waiting = False  # for the first batch of lazy modules
        self._told: set[str] = set()
        self._sharded = False
        self._step = 0
        self._due = 0
        self._learning_rate: float | Tensor = math.nan
        self._evaluating = False

    @property
    def trace(self) -> dict[str, list[float]]:
        """A copy of what was recorded: ``updates``, ``learning_rate``, ``distance``, ``relative_distance``,
        ``weight_norm`` and ``cosine``, and the last four as ``distance/GROUP`` for every group; lists of equal length.
        """  # noqa: D205
        return {column: list(values) for column, values in self._trace.columns.items()}

    @property
    def diffusion_fit(self) -> DiffusionFit | None:
        """The laws fitted to the trace so far; None where it is too short to fit."""
        try:
            return self._trace.fit()[0]
        except ValueError:
            return None

    @property
    def advice(self) -> str | None:
        """Where this run stands beside its reference, and how much longer to train; None without a reference."""
        updates, distances, _ = self._trace.finite()
        if self._reference_run is None or not updates:
            return None
        forecast = self._trace.forecast(self._reference_run.target[1])
        return advice(self._reference_run, updates[-1], distances[-1], forecast)

    def plot(self, ax: Any = None) -> tuple[Any, Any]:
        """Draw the distances against log t with both laws, the drops of the learning rate, and the reference.

        Args:
            ax: Matplotlib axes to draw on; new ones by default.

        Returns:
            The figure and its axes.

        Raises:
            ModuleNotFoundError: Matplotlib is not installed.
        """
        return plot_diffusion(self._trace.columns, self.diffusion_fit, self._reference_run, ax=ax)

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
            with _refused(OSError, ValueError):
                self._reference_run = read_reference(self.reference)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._recording = self._waiting = False
        self._told.discard("not finite")
        self._step = trainer.global_step
        self._due = next_update(self._step, self.points_per_decade, self.every_n_updates)
        self._folder = None if trainer.fast_dev_run else _folder_of(trainer)  # type: ignore[attr-defined]
        with _refused(ValueError):
            if self._step == 0:
                self._anchor, self._loaded, self._trace = None, {}, Trace()
                self._waiting = any(p.requires_grad and is_lazy(p) for p in pl_module.parameters())
                if self._waiting:
                    return
                self._take_anchor(trainer, pl_module)
            elif self._loaded:
                self._adopt_anchor(trainer, pl_module, self._loaded)
                self._loaded = {}
            elif self._anchor is not None:
                weights_of(pl_module, self._anchor.shapes, self.exclude)
            else:
                rank_zero_warn(
                    f"UltraSlowDiffusion was added after {self._step} updates and the initial weights are not in the "
                    "checkpoint: nothing is recorded in this run. Train from the start with the callback to record."
                )
                return
        self._start(trainer)

    def _start(self, trainer: Trainer) -> None:
        assert self._anchor is not None
        self._recording = True
        parameters = self._anchor.parameters
        self._comparison = None
        if self._reference_run is not None:
            self._comparison = LiveComparison(self._reference_run, self.points_per_decade, self._step)
            if said := self._reference_run.mismatch(parameters):
                rank_zero_warn(f"UltraSlowDiffusion {said}")
        log_facts(trainer.loggers, _PREFIX, {"parameters": parameters, "reference": self.reference or "none"})

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._waiting:  # the first forward pass has been made, no update yet
            self._waiting = False
            with _refused(ValueError):
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
            self._due = next_update(self._step, self.points_per_decade, self.every_n_updates)
            self._record(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._recording:
            return
        self._write_trace()
        fit: DiffusionFit | None = None
        try:
            fit, whole = self._trace.fit()
        except ValueError as reason:
            say(f"UltraSlowDiffusion: {len(self._trace)} points recorded, no law fitted: {reason}")
        else:
            self._log(trainer, {_PREFIX + name: x for name, x in laws_to_log(fit).items()})
            say(summary(fit, varied=whole))
        if said := self.advice:
            say(f"UltraSlowDiffusion: {said}")
        if trainer.is_global_zero and len(self._trace) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            step = batches_that_stepped(trainer)
            publish(trainer.loggers, _PREFIX, step, self._trace.columns, fit, self._reference_run)

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
            return self._loaded
        return {**self._anchor.state_dict(), "trace": self.trace, "stem": self._stem}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._evaluating:  # testing an older checkpoint must not cut the trace of the finished run
            return
        self._anchor, self._loaded = None, {"anchor": None, "anchor_folder": None} | state_dict
        self._trace.columns = {column: list(values) for column, values in state_dict["trace"].items()}

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._evaluating = False

    def _take_anchor(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = present_parameters(pl_module, exclude=self.exclude)
        anchor, folder = Anchor(weights, **self._options()), self._folder or trainer.default_root_dir
        self._stem = from_rank_zero(trainer, free_stem(folder))
        if self._sharded:
            anchor.write(weights, f"{folder}/{self._stem}_anchor")
        self._anchor, self._trace = anchor, Trace(anchor.groups)

    def _adopt_anchor(self, trainer: Trainer, pl_module: LightningModule, state: Mapping[str, Any]) -> None:
        """Check the checkpoint's anchor against the model, and bring it to where it is kept."""
        weights, folder = weights_of(pl_module, state["shapes"], self.exclude), state["anchor_folder"]
        if folder is not None:
            folder = from_rank_zero(trainer, folder_of_shards(folder, trainer.ckpt_path))
        anchor = Anchor.resumed(state, weights, folder, **self._options())
        self._anchor, self._stem, self._trace = anchor, state["stem"], Trace(anchor.groups, state["trace"])

    def _options(self) -> dict[str, Any]:
        kept = {"sharded": self._sharded, "device": self.anchor_device, "dtype": self.anchor_dtype}
        return kept | {"groups": self.groups, "per_layer": self.per_layer}

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._anchor is not None
        anchor = self._anchor
        if "late" not in self._told and (late := anchor.added(pl_module, self.exclude)):
            self._told.add("late")
            rank_zero_warn(
                f"UltraSlowDiffusion leaves out {len(late)} parameters that were added or unfrozen after training "
                f"started ({late[0]}, ...): they have no initial weights to be compared with."
            )
        try:
            squares = anchor.squares(anchor.tracked_in(pl_module))
        except ValueError as error:
            self._recording = False
            rank_zero_warn(f"UltraSlowDiffusion stops recording at update {self._step}, the model was changed: {error}")
            return
        now = anchor.displacement(squares)
        if not math.isfinite(now.distance) and "not finite" not in self._told:
            self._told.add("not finite")
            rank_zero_warn(
                f"UltraSlowDiffusion: the distance is NaN or infinite at update {self._step}"
                f"{self._trace.last_number()}: {anchor.astray(squares)}. Such points stay in the trace and "
                "out of loggers, laws and advice. Lower the learning rate, or clip the gradients."
            )
        groups = {group: anchor.displacement(squares, rows) for group, rows in anchor.groups.items()}
        point = self._trace.add(self._step, float(self._learning_rate), now, groups)
        seen = {_PREFIX + name: x for name, x in point.items() if "/" not in name or name.startswith("distance/")}
        seen[_PREFIX + "log_updates"] = math.log(self._step)
        beside = self._comparison.numbers(self._trace, self._step, now.distance) if self._comparison else {}
        beside = {_PREFIX + name: value for name, value in beside.items() if math.isfinite(value)}
        self._log(trainer, seen | beside)
        # For `trainer.callback_metrics`, and the reference for the progress bar.
        for numbers, prog_bar in ((seen, False), (beside, True)):
            tensors = {name: filled(number, pl_module.device) for name, number in numbers.items()}
            pl_module.log_dict(tensors, logger=False, prog_bar=prog_bar)

    def _log(self, trainer: Trainer, numbers: Mapping[str, float]) -> None:
        axis = f"{_PREFIX}log_updates"
        finite = {name: x for name, x in numbers.items() if math.isfinite(x)} | {axis: math.log(self._step)}
        define_axes(trainer.loggers, axis, finite)
        log_at_update(trainer, finite)

    @rank_zero_only
    def _write_trace(self) -> None:
        if self._folder is not None and self._anchor is not None and len(self._trace):
            self._trace.write(f"{self._folder}/{self._stem}.csv", self._anchor.parameters)


@contextmanager
def _refused(*errors: type[Exception]) -> Iterator[None]:
    """Say of what is refused that it is the callback's."""
    try:
        yield
    except errors as error:
        raise MisconfigurationException(f"UltraSlowDiffusion: {error}") from error


def _folder_of(trainer: Trainer) -> str | None:
    """Return where the run writes its checkpoints, or else its logs; None if it writes neither. Collective."""
    folder = getattr(trainer.checkpoint_callback, "dirpath", None) or (trainer.log_dir if trainer.loggers else None)
    return None if folder is None else str(folder)
