"""The callback that trains any model with ghost batch normalization and hands it back as it was."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from rich.table import Table
from torch import Tensor

from lightning_gap.arguments import check_count
from lightning_gap.ghost.convert import GhostConversion, Skip, plan_ghost_batchnorm
from lightning_gap.ghost.functional import Grouping, RunningStats, check_settings
from lightning_gap.ghost.layers import GhostNorm
from lightning_gap.ghost.synchronize import RunningStatisticsSync
from lightning_gap.loggers import log_facts
from lightning_gap.parallel import (
    data_parallel_group,
    data_parallel_size,
    data_parallel_subgroup,
    holds_whole_weights,
    replaces_batchnorm_by_syncbatchnorm,
    require_lightning,
    shards_by_dtensor,
    strategy_name,
)
from lightning_gap.terminal import say

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

    The first batch decides. Learning-rate and batch-size finders run before ``fit`` does, hence with plain layers.

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
        ranks_per_ghost: Ranks that share a ghost: ``"auto"`` as above; 1 for never more than one; or a number that
            divides the ranks, whose micro-batches together are then one ghost.
        sync_running_stats: Whether to join the running statistics of all ranks after each batch, one collective. None
            for where nothing else keeps them equal.

    Raises:
        TypeError: If ``ghost_batch_size`` or ``ranks_per_ghost`` is not an int.
        ValueError: If another argument is out of range.
        MisconfigurationException: When ``fit`` starts, before anything is changed: if the strategy is none of those
            above, if ``sync_batchnorm=True`` would replace the layers, if ``ranks_per_ghost`` does not divide the
            ranks, or if the model has no BatchNorm layer to convert.

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
        ranks_per_ghost: int | Literal["auto"] = "auto",
        sync_running_stats: bool | None = None,
    ) -> None:
        check_settings(ghost_batch_size, running_stats, grouping)
        if ranks_per_ghost != "auto":
            check_count("ranks_per_ghost", ranks_per_ghost, what="the ranks that share a ghost, or 'auto'")
        self.ghost_batch_size = ghost_batch_size
        self.running_stats: RunningStats = running_stats
        self.grouping: Grouping = grouping
        self.skip = skip if isinstance(skip, str) or callable(skip) else tuple(skip)
        self.ranks_per_ghost = ranks_per_ghost
        self.sync_running_stats = sync_running_stats
        self._undo: Callable[[], None] | None = None
        self._plan: GhostConversion | None = None
        self._sync: RunningStatisticsSync | None = None
        self._largest: int | None = None  # samples of this rank in a ghost over ranks
        self._seen_a_batch = False

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

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Convert the layers; by now every strategy has built, moved and wrapped the model."""
        self._restore()
        self._seen_a_batch = False
        try:
            plan = plan_ghost_batchnorm(pl_module, self.skip)
        except ValueError as error:
            raise MisconfigurationException(f"GhostBatchNorm: {error}") from error
        self._undo = plan.apply(self.ghost_batch_size, self.running_stats, self.grouping)
        self._plan = plan
        for name, reason in plan.unable.items():
            rank_zero_warn(
                f"GhostBatchNorm leaves layer {name!r} as it is: it {reason}; add it to skip to silence this warning"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """See at the first batch how the ghosts lie over the ranks, and say so."""
        if not self._seen_a_batch:
            self._seen_a_batch = True
            self._lay_out(trainer, _samples(batch))
        elif self._largest is not None and (_samples(batch) or 0) > self._largest:
            rank_zero_warn(
                f"GhostBatchNorm: a micro-batch has more than the first one, {self._largest} samples, so that "
                f"ghosts over ranks have more than ghost_batch_size={self.ghost_batch_size}; keep the batch size"
            )
            self._largest = None
        if self._sync is not None:
            self._sync.remember()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Join the ranks' running statistics, where asked or needed."""
        if self._sync is not None:
            self._sync.join()

    def _lay_out(self, trainer: Trainer, micro_batch: int | None) -> None:
        assert self._plan is not None
        layers = [layer for layer in self._plan.layers.values() if isinstance(layer, GhostNorm)]
        ranks, sizes = data_parallel_group(trainer), [micro_batch or 0]
        if ranks is not None:
            sizes = ranks.gather(torch.tensor(sizes[0], device=trainer.strategy.root_device)).tolist()
        strided = self.grouping == "strided"
        together = self.ranks_per_ghost
        if together == "auto":
            together = _ranks_per_ghost(sizes, self.ghost_batch_size, strided)
        if together > 1:
            group = data_parallel_subgroup(trainer, together, strided=strided)
            for layer in layers:
                layer.process_group = group
            self._largest = micro_batch
            self._warn_of_other_sizes(sizes, together)
        elif all(sizes) and min(sizes) < self.ghost_batch_size:
            self._warn_of_small_batches(trainer, min(sizes), len(sizes))
        wanted = shards_by_dtensor(trainer) if self.sync_running_stats is None else self.sync_running_stats
        if ranks is not None and wanted:
            parts = len(sizes) // together
            one_of_each = range(parts) if strided else range(0, len(sizes), together)
            self._sync = RunningStatisticsSync(layers, ranks, one_of_each)
        self._report(trainer, self._plan, together, _describe(sizes, self.ghost_batch_size, together))

    def _warn_of_other_sizes(self, sizes: list[int], together: int) -> None:
        total, share = sum(sizes), len(sizes) // together
        if all(sizes) and total != share * self.ghost_batch_size:
            rank_zero_warn(
                f"GhostBatchNorm(ghost_batch_size={self.ghost_batch_size}, ranks_per_ghost={together}): ghosts have "
                f"{total / share:g} samples. Use micro-batches of {self.ghost_batch_size / together:g}, or "
                "ranks_per_ghost='auto'."
            )

    def _warn_of_small_batches(self, trainer: Trainer, micro_batch: int, ranks: int) -> None:
        wanted = self.ghost_batch_size
        rank_zero_warn(
            f"GhostBatchNorm(ghost_batch_size={wanted}): a forward pass sees {micro_batch} samples ({ranks} ranks, "
            f"accumulate_grad_batches={trainer.accumulate_grad_batches}), so each layer is plain batch normalization "
            f"over these {micro_batch}: accumulation does not join micro-batches, and no equal share of the ranks sees "
            f"{wanted} in all. Raise the loader's batch size to a multiple of {wanted}, or set "
            f"ghost_batch_size={micro_batch}."
        )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the layers back after a failed fit; Lightning calls no teardown then."""
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the layers back."""
        self._restore()

    def _restore(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None
        self._plan = self._sync = self._largest = None

    @rank_zero_only
    def _report(self, trainer: Trainer, plan: GhostConversion, ranks_per_ghost: int, lie: str) -> None:
        facts: dict[str, int | str] = {
            "ghost_batch_size": self.ghost_batch_size,
            "running_stats": self.running_stats,
            "grouping": self.grouping,
            "converted_layers": len(plan.layers),
            "skipped_layers": len(plan.asked_to_skip) + len(plan.unable),
            "ranks_per_ghost": ranks_per_ghost,
            "ghosts": lie,
        }
        table = Table(title="Ghost batch normalization", title_justify="left", show_header=False)
        for name, value in facts.items():
            table.add_row(name, str(value))
        for name in plan.asked_to_skip:
            table.add_row(name, "left as it is: in skip")
        for name, reason in plan.unable.items():
            table.add_row(name, f"left as it is: {reason}")
        say(table)
        log_facts(trainer.loggers, "lightning_gap/ghost/", facts)


def _samples(batch: Any) -> int | None:
    """Return the length of the first dimension, if all tensors of a batch agree on it."""
    sizes: set[int] = set()
    apply_to_collection(batch, Tensor, lambda tensor: sizes.add(len(tensor)) if tensor.dim() else None)
    return sizes.pop() if len(sizes) == 1 else None


def _ranks_per_ghost(sizes: list[int], ghost_batch_size: int, strided: bool) -> int:
    """Return into how many ranks a ghost must reach, 1 if none needs to or no equal share of the ranks fills it."""
    if min(sizes) >= ghost_batch_size or not all(sizes):
        return 1
    for size in range(2, len(sizes) + 1):
        parts, left_over = divmod(len(sizes), size)
        groups = [sizes[i::parts] if strided else sizes[i * size : (i + 1) * size] for i in range(parts)]
        if not left_over and all(sum(group) == ghost_batch_size for group in groups):
            return size
    return 1


def _describe(sizes: list[int], ghost_batch_size: int, ranks_per_ghost: int) -> str:
    if ranks_per_ghost > 1:
        return f"{len(sizes) // ranks_per_ghost}, each over {ranks_per_ghost} ranks"
    if not all(sizes):
        return "within each rank's batch, whose size is not known: its tensors differ in their first dimension"
    full, rest = divmod(min(sizes), ghost_batch_size)
    if full == 0:
        return f"1 of {rest} samples on each of {len(sizes)} ranks"
    return f"{full} on each of {len(sizes)} ranks" + (f", and one of {rest} samples" if rest else "")
