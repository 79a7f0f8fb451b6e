"""The callback that trains any model with ghost batch normalization and hands it back as it was."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_gap.checks import check_choice, check_integer
from lightning_gap.ghost.convert import (
    GhostConversion,
    NoBatchNormError,
    Skip,
    plain_layers,
    plan_ghost_batchnorm,
    revert_ghost_batchnorm,
)
from lightning_gap.ghost.functional import Grouping, RunningStats, check_rows_per_sample, check_settings
from lightning_gap.ghost.joined_statistics import RunningStatisticsSync
from lightning_gap.ghost.layers import GhostNorm
from lightning_gap.ghost.ranks import GhostsOverRanks
from lightning_gap.ghost.recalibration import Recalibration
from lightning_gap.ghost.report import other_reference, rows_in_words, table_of, unfit_in_words
from lightning_gap.ghost.samples import BatchRows, samples_in
from lightning_gap.ghost.training_step import own_loader
from lightning_gap.ranks.group import RankGroup
from lightning_gap.trainer.loggers import log_facts
from lightning_gap.trainer.strategy import (
    data_parallel_group,
    data_parallel_size,
    data_parallel_subgroup,
    holds_whole_weights,
    replaces_batchnorm_by_syncbatchnorm,
    require_lightning,
    shards_by_dtensor,
    strategy_name,
)
from lightning_gap.trainer.terminal import say

__all__ = ["GhostBatchNorm"]


class GhostBatchNorm(Callback):
    r"""Normalize over ghost batches of the reference size during ``fit``, whatever the batch size.

    When ``fit`` starts, once the strategy has built and wrapped the model, its BatchNorm layers turn into ghost batch
    normalization in place (:func:`~lightning_gap.ghost.convert_ghost_batchnorm`): each ghost of ``ghost_batch_size``
    samples is normalized by its own statistics, and evaluation stays plain batch normalization. When ``fit`` ends, by
    an exception too, the layers are what they were before, with the weights and statistics that they have learned.
    Checkpoints load with and without the callback.

    ``ghost_batch_size`` counts samples of the reference run, whatever the number of ranks:

    * A rank's micro-batch of that many samples or more falls into ghosts, without communication. A smaller rest is a
      smaller last ghost.
    * A smaller micro-batch is part of a ghost that spans ranks, if ``ghost_batch_size`` is the sum over an equal share
      of the ranks: a ghost of 128 on eight ranks with 32 samples each spans four. These ranks exchange three numbers a
      channel in each layer's forward pass, and two in its backward pass. Neighbouring ranks are together; with
      ``grouping="strided"`` ranks at equal distances, so that under a distributed sampler the ghosts are those of one
      process.
    * Otherwise a smaller micro-batch is one ghost of its size, which is plain batch normalization, and the callback
      warns. Accumulation cannot help: a forward pass knows no other micro-batch.

    The first batch decides. A layer whose input has k rows for each sample of the batch, tokens or frames say, gets
    ghosts of k times as many rows. Layers that are added during training become ghost layers at the next epoch.
    Learning-rate and batch-size finders run before ``fit`` does, hence with plain layers.

    Under ``DDPStrategy`` the running statistics are those of rank 0, as with plain BatchNorm: DDP sends its buffers to
    all. Under ``ModelParallelStrategy`` nothing does, so after each batch the ranks' statistics are joined as if one
    process had seen every ghost (:class:`~lightning_gap.ghost.RunningStatisticsSync`), and validation and checkpoints
    see the same on every rank. ``sync_running_stats`` asks for either under both.

    Several of these callbacks, with ``skip`` so that they share no layer, give parts of a model different ghosts.

    Args:
        ghost_batch_size: Samples that share statistics, :math:`|B_S|`: the batch size of the reference run.
        running_stats: ``"sequential"``: one update of the running statistics for each ghost, the paper's.
            ``"per_step"``: the memory of plain batch normalization.
        grouping: Which samples form a ghost: ``"contiguous"`` runs of the batch, the paper's, or ``"strided"``.
        skip: Layers to leave as they are: names (of the layer or of a module around it; ``*`` as in file names),
            module classes, functions of name and layer that return a bool, or several of these.
        rows_per_sample: Rows of a layer's input that are one sample. ``"auto"``: k for a layer whose input has k times
            as many rows as the batch has samples, at each call; or a number for all layers; or numbers by layer names
            (patterns as in ``skip``), ``"auto"`` for the rest.
        ranks_per_ghost: Ranks that share a ghost: ``"auto"`` as above; 1 for never more than one; or a number that
            divides the ranks, whose micro-batches together are then one ghost.
        sync_running_stats: Whether to join the running statistics of all ranks after each batch, one collective. None
            for where nothing else keeps them equal.
        recalibrate: Before each validation, and when ``fit`` ends, take the running statistics anew, as plain averages
            over so many training batches at the present weights (:func:`~lightning_gap.ghost.recalibrate_batchnorm`);
            in a run without validation at the end of each epoch. None for running averages. Validation, and
            checkpoints after it, have them. Training is the same to the last bit: the batches come from a copy of the
            loader with random numbers of its own, and what the training step does to the module beside is undone. Under
            ``EMAWeightAveraging``, or another ``WeightAveraging``, they are those of the average, which is validated.
        missing: What to do with a model that has no BatchNorm layer to convert: ``"error"``, or ``"warn"`` and train it
            as it is, for one configuration of many models.

    Raises:
        TypeError: If ``ghost_batch_size``, ``ranks_per_ghost`` or a number of rows is not an int.
        ValueError: If another argument is out of range.
        MisconfigurationException: When ``fit`` starts, before anything is changed: if the strategy is none of those
            above, if ``sync_batchnorm=True`` would replace the layers, if ``ranks_per_ghost`` does not divide the
            ranks, if a name fits no layer, or if the model has no BatchNorm layer to convert.

    References:
        Hoffer, Hubara, Soudry, "Train longer, generalize better: closing the generalization gap in large batch
        training of neural networks", 2017, Algorithm 1.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> model = BoringModel()
        >>> model.layer = torch.nn.Sequential(torch.nn.BatchNorm1d(32), torch.nn.Linear(32, 2))
        >>> trainer = Trainer(
        ...     max_epochs=1, accelerator="cpu", callbacks=[GhostBatchNorm(8)], logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.fit(model, torch.utils.data.DataLoader(torch.randn(64, 32), batch_size=32))  # doctest: +ELLIPSIS
        Ghost batch normalization...
        >>> int(model.layer[0].num_batches_tracked)  # two batches of four ghosts
        8
    """

    def __init__(
        self,
        ghost_batch_size: int = 128,
        *,
        running_stats: RunningStats = "sequential",
        grouping: Grouping = "contiguous",
        skip: Skip | Iterable[Skip] = (),
        rows_per_sample: int | Mapping[str, int] | Literal["auto"] = "auto",
        ranks_per_ghost: int | Literal["auto"] = "auto",
        sync_running_stats: bool | None = None,
        recalibrate: int | None = None,
        missing: Literal["error", "warn"] = "error",
    ) -> None:
        check_settings(ghost_batch_size, running_stats, grouping)
        if recalibrate is not None:
            check_integer("recalibrate", recalibrate, what="the training batches to average statistics over, or None")
        check_choice("missing", missing, ("error", "warn"))
        for rows in rows_per_sample.values() if isinstance(rows_per_sample, Mapping) else [rows_per_sample]:
            if rows != "auto":
                check_rows_per_sample(rows)
        if ranks_per_ghost != "auto":
            check_integer("ranks_per_ghost", ranks_per_ghost, what="the ranks that share a ghost, or 'auto'")
        self.ghost_batch_size = ghost_batch_size
        self.running_stats: RunningStats = running_stats
        self.grouping: Grouping = grouping
        self.skip = skip if isinstance(skip, str) or callable(skip) else tuple(skip)
        self.rows_per_sample = dict(rows_per_sample) if isinstance(rows_per_sample, Mapping) else rows_per_sample
        self.ranks_per_ghost = ranks_per_ghost
        self.sync_running_stats = sync_running_stats
        self.recalibrate = recalibrate
        self.missing = missing
        self._forget()

    def _forget(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._plan: GhostConversion | None = None
        self._rows: list[BatchRows] = []  # of our layers, and of no others: copies of layers share them
        self._left: set[nn.Module] = set()  # BatchNorm layers that stay what they are
        self._ranks: RankGroup | None = None
        self._sync: RunningStatisticsSync | None = None
        self._largest: int | None = None  # samples of this rank in a ghost over ranks
        self._ghosts: GhostsOverRanks | None = None  # from the first batch on
        self._told: set[nn.Module] = set()  # layers that have been warned of
        self._batches = 0
        self._known: list[GhostNorm] = []
        self._statistics = Recalibration(self, self.recalibrate)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a trainer under which the layers would not do what is asked, before it builds anything."""
        if stage != "fit":
            return
        require_lightning(trainer, type(self).__name__)
        if not (holds_whole_weights(trainer) or shards_by_dtensor(trainer)):
            raise MisconfigurationException(
                f"GhostBatchNorm does not handle {strategy_name(trainer)}; use strategy='ddp', ModelParallelStrategy "
                "for sharded weights, or a single device"
            )
        if replaces_batchnorm_by_syncbatchnorm(trainer):
            raise MisconfigurationException(
                "sync_batchnorm=True would replace the layers that GhostBatchNorm converts: their statistics would "
                "span all ranks instead of ghost batches; use Trainer(sync_batchnorm=False)"
            )
        if self.ranks_per_ghost != "auto" and data_parallel_size(trainer) % self.ranks_per_ghost:
            raise MisconfigurationException(
                f"ranks_per_ghost={self.ranks_per_ghost} does not divide the {data_parallel_size(trainer)} ranks that "
                "see different samples; use a divisor of their number, or 'auto'"
            )
        if self.recalibrate is not None and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "GhostBatchNorm(recalibrate=...) runs training_step for its statistics alone, and with manual "
                "optimization that would train: use recalibrate=None, and call recalibrate_batchnorm(module, loader, "
                "forward=...) after the fit"
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Convert the layers; by now every strategy has built, moved and wrapped the model."""
        self._restore(pl_module)
        try:
            plan = plan_ghost_batchnorm(pl_module, self.skip)
            self._convert(plan)
        except NoBatchNormError as error:
            if self.missing == "error":
                raise MisconfigurationException(f"GhostBatchNorm: {error}; or set missing='warn'") from error
            rank_zero_warn(f"GhostBatchNorm: {error}. The model trains as it is.")
            return
        except ValueError as error:
            raise MisconfigurationException(f"GhostBatchNorm: {error}") from error
        self._plan = plan
        self._left = plain_layers(pl_module)
        for name, reason in plan.unable.items():
            rank_zero_warn(
                f"GhostBatchNorm leaves layer {name!r} as it is: it {reason}; add it to skip to silence this warning"
            )

    def _convert(self, plan: GhostConversion) -> None:
        auto, given = BatchRows(), self.rows_per_sample
        names = given if isinstance(given, dict) else {} if given == "auto" else {"*": given}
        rows = plan.rows_of_layers({name: BatchRows(number) for name, number in names.items()}, otherwise=auto)
        self._undo.append(plan.apply(self.ghost_batch_size, self.running_stats, self.grouping, rows_per_sample=rows))
        self._rows += {id(each): each for each in rows.values() if isinstance(each, BatchRows)}.values()

    def _layers(self, module: nn.Module) -> dict[str, GhostNorm]:
        """Return our layers, also those that training has copied or added."""
        ours = {id(rows) for rows in self._rows}
        named = {name: layer for name, layer in module.named_modules() if isinstance(layer, GhostNorm)}
        return {name: layer for name, layer in named.items() if id(layer.rows_per_sample) in ours}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a loader that cannot be copied to recalibrate with."""
        if self._plan is not None and self.recalibrate is not None:
            try:
                own_loader(trainer)
            except (TypeError, RuntimeError, ValueError) as error:
                raise MisconfigurationException(
                    f"GhostBatchNorm(recalibrate={self.recalibrate}) reads a copy of the training loader, and this one "
                    f"cannot be copied ({error}): use a map-style data set, or recalibrate=None"
                ) from error

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Convert the layers that have been added since the last epoch."""
        if self._plan is None or not (new := plain_layers(pl_module) - self._left):
            return
        try:
            found = plan_ghost_batchnorm(pl_module, self.skip)
            layers = {name: layer for name, layer in found.layers.items() if layer in new}
            if layers:
                self._convert(GhostConversion(layers, (), {}))
                rank_zero_info(f"GhostBatchNorm converts what has been added during training: {', '.join(layers)}")
        except ValueError as error:
            rank_zero_warn(f"GhostBatchNorm leaves what has been added during training as it is: {error}")
        self._left = plain_layers(pl_module)
        if self._batches:
            self._join_ranks(pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the batch's samples, and see at the first batch how the ghosts lie over the ranks."""
        if self._plan is None:
            return
        samples = samples_in(batch)
        if not self._batches:
            self._lay_out(trainer, pl_module, samples)
        elif self._largest is not None and (samples or 0) > self._largest:
            rank_zero_warn(
                f"GhostBatchNorm: a micro-batch has more than the first one, {self._largest} samples, so that "
                f"ghosts over ranks have more than ghost_batch_size={self.ghost_batch_size}; keep the batch size"
            )
            self._largest = None
        for rows in self._rows:
            rows.samples, rows.watching = samples, not self._batches
        if self._sync is not None:
            self._sync.remember()

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Join the ranks' running statistics, where asked or needed; say once what was done."""
        if self._plan is None:
            return
        if self._sync is not None:
            self._sync.join()
        for rows in self._rows:
            if new := {layer: unfit for layer, unfit in rows.unfit.items() if layer not in self._told}:
                self._told.update(new)
                rank_zero_warn(unfit_in_words(pl_module, new, self.ghost_batch_size))
            rows.samples, rows.watching = None, False
        if not self._batches:
            self._report(trainer, pl_module, self._plan)
        self._batches += 1
        self._statistics.note(self._known)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._statistics.take(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the running statistics anew, where asked and no validation ever does so."""
        if not trainer.enable_validation:
            self._statistics.take(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the running statistics anew, where asked and no validation has done so since the last update."""
        self._statistics.take(trainer, ends=True)

    def _lay_out(self, trainer: Trainer, pl_module: LightningModule, micro_batch: int | None) -> None:
        ranks, sizes = data_parallel_group(trainer), [micro_batch or 0]
        if ranks is not None:
            sizes = ranks.gather(torch.tensor(sizes[0], device=trainer.strategy.root_device)).tolist()
        strided = self.grouping == "strided"
        ghosts = GhostsOverRanks.of(sizes, self.ghost_batch_size, self.ranks_per_ghost, strided=strided)
        if ghosts.together > 1:
            self._ranks = data_parallel_subgroup(trainer, ghosts.together, strided=strided)
            self._largest = micro_batch
        if short := ghosts.falls_short(trainer.accumulate_grad_batches):
            rank_zero_warn(f"GhostBatchNorm(ghost_batch_size={self.ghost_batch_size}): {short}")
        wanted = shards_by_dtensor(trainer) if self.sync_running_stats is None else self.sync_running_stats
        if ranks is not None and wanted:
            self._sync = RunningStatisticsSync([], ranks, ghosts.representatives)
        self._join_ranks(pl_module)
        if micro_batch is None and any(rows.fixed is None for rows in self._rows):
            rank_zero_warn(
                "GhostBatchNorm: the batch's samples cannot be told, since its tensors share no first dimension, "
                f"so each row of a layer's input counts as one of ghost_batch_size={self.ghost_batch_size}; set "
                "rows_per_sample to the rows that a sample has, 1 if this is right"
            )
        self._ghosts = ghosts

    def _join_ranks(self, pl_module: LightningModule) -> None:
        layers = self._layers(pl_module)
        self._known = list(layers.values())
        if self._ranks is not None:
            channels = {name: layer.num_features for name, layer in layers.items()}
            for number, layer in enumerate(layers.values()):
                layer.process_group = self._ranks.for_layer(number, channels)
        if self._sync is not None:
            self._sync = RunningStatisticsSync(layers.values(), self._sync.ranks, self._sync.representatives)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the layers back after a failed fit; Lightning calls no teardown then."""
        self._restore(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore(pl_module)

    def _restore(self, pl_module: LightningModule) -> None:
        for undo in reversed(self._undo):
            undo()
        for layer in self._layers(pl_module).values():  # a copy that training has made
            revert_ghost_batchnorm(layer)
        self._forget()

    @rank_zero_only
    def _report(self, trainer: Trainer, pl_module: LightningModule, plan: GhostConversion) -> None:
        assert self._ghosts is not None
        facts: dict[str, int | str] = {
            "ghost_batch_size": self.ghost_batch_size,
            "running_stats": self.running_stats,
            "grouping": self.grouping,
            "converted_layers": len(plan.layers),
            "skipped_layers": len(plan.asked_to_skip) + len(plan.unable),
            "ranks_per_ghost": self._ghosts.together,
            "ghosts": self._ghosts.describe(),
        }
        if self.recalibrate is not None:
            facts["recalibrate"] = self.recalibrate
        layers = self._layers(pl_module)
        notes = rows_in_words(layers, self._rows) | plan.left_in_words()
        if other := other_reference(trainer.callbacks, self.ghost_batch_size):  # type: ignore[attr-defined]
            notes["note"] = other
        say(table_of(facts, notes))
        log_facts(trainer.loggers, "lightning_gap/ghost/", facts)
