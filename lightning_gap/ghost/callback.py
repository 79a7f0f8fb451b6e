"""The callback that trains any model with ghost batch normalization and hands it back as it was."""

from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_gap.ghost.convert import GhostConversion, Skip, plan_ghost_batchnorm
from lightning_gap.ghost.functional import Grouping, RunningStats, check_settings
from lightning_gap.parallel import (
    data_parallel_size,
    holds_whole_weights,
    replaces_batchnorm_by_syncbatchnorm,
    strategy_name,
)

__all__ = ["GhostBatchNorm"]


class GhostBatchNorm(Callback):
    r"""Normalize over ghost batches of the reference size during ``fit``, whatever the batch size.

    When ``fit`` starts, once the strategy has built and wrapped the model, its BatchNorm layers turn into ghost batch
    normalization in place (:func:`~lightning_gap.ghost.convert_ghost_batchnorm`): each ghost of ``ghost_batch_size``
    samples is normalized by its own statistics, and evaluation stays plain batch normalization. When ``fit`` ends, by
    an exception too, the layers are what they were before, with the weights and statistics that they have learned.
    Checkpoints load with and without the callback.

    A ghost lies within the micro-batch that one rank sees in one forward pass. So with k ranks, or with accumulation
    over k micro-batches of n samples, a micro-batch that is a multiple of ``ghost_batch_size`` falls into ghosts of
    exactly that size, and no communication is needed. A micro-batch below it is one ghost of n samples, which is plain
    batch normalization; the callback warns. Under ``DDPStrategy`` the running statistics are those of rank 0, as
    with plain BatchNorm. Learning-rate and batch-size finders run before ``fit`` does, hence with plain layers.

    Several of these callbacks, with ``skip`` so that they share no layer, give parts of a model different ghosts.

    Args:
        ghost_batch_size: Samples that share statistics, :math:`|B_S|`: the batch size of the reference run.
        running_stats: ``"sequential"``: one update of the running statistics for each ghost, the paper's.
            ``"per_step"``: the memory of plain batch normalization.
        grouping: Which samples form a ghost: ``"contiguous"`` runs of the batch, the paper's, or ``"strided"``.
        skip: Layers to leave as they are: names (of the layer or of a module around it; ``*`` as in file names),
            module classes, functions of name and layer that return a bool, or several of these.

    Raises:
        TypeError: If ``ghost_batch_size`` is not an int.
        ValueError: If another argument is out of range.
        MisconfigurationException: When ``fit`` starts, before anything is changed: if the strategy shards layers, if
            ``sync_batchnorm=True`` would replace them, or if the model has no BatchNorm layer to convert.

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
    ) -> None:
        check_settings(ghost_batch_size, running_stats, grouping)
        self.ghost_batch_size = ghost_batch_size
        self.running_stats: RunningStats = running_stats
        self.grouping: Grouping = grouping
        self.skip = skip if isinstance(skip, str) or callable(skip) else tuple(skip)
        self._undo: Callable[[], None] | None = None
        self._seen_a_batch = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a trainer under which the layers would not do what is asked, before it builds anything."""
        if stage != "fit":
            return
        if not holds_whole_weights(trainer):
            raise MisconfigurationException(
                f"GhostBatchNorm does not handle {strategy_name(trainer)}, where the running statistics of the ranks "
                "drift apart; use strategy='ddp' or a single device"
            )
        if replaces_batchnorm_by_syncbatchnorm(trainer):
            raise MisconfigurationException(
                "sync_batchnorm=True would replace the layers that GhostBatchNorm converts: their statistics would "
                "span all ranks instead of ghost batches; use Trainer(sync_batchnorm=False)"
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
        for name, reason in plan.unable.items():
            rank_zero_warn(
                f"GhostBatchNorm leaves layer {name!r} as it is: it {reason}; add it to skip to silence this warning"
            )
        self._report(trainer, plan)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Warn at the first batch if it is below the ghost size."""
        if self._seen_a_batch:
            return
        self._seen_a_batch = True
        micro_batch = _samples(batch)
        if micro_batch is None or micro_batch >= self.ghost_batch_size:
            return
        ranks, accumulated = data_parallel_size(trainer), trainer.accumulate_grad_batches
        rank_zero_warn(
            f"GhostBatchNorm(ghost_batch_size={self.ghost_batch_size}): a forward pass sees {micro_batch} samples "
            f"({ranks} ranks, accumulate_grad_batches={accumulated}), so each layer is plain batch normalization over "
            f"these {micro_batch}. Raise the loader's batch size to a multiple of {self.ghost_batch_size}, or set "
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

    @rank_zero_only
    def _report(self, trainer: Trainer, plan: GhostConversion) -> None:
        facts: dict[str, int | str] = {
            "ghost_batch_size": self.ghost_batch_size,
            "running_stats": self.running_stats,
            "grouping": self.grouping,
            "converted_layers": len(plan.layers),
            "skipped_layers": len(plan.asked_to_skip) + len(plan.unable),
        }
        table = Table(title="Ghost batch normalization", title_justify="left", show_header=False)
        for name, value in facts.items():
            table.add_row(name, str(value))
        for name in plan.asked_to_skip:
            table.add_row(name, "left as it is: in skip")
        for name, reason in plan.unable.items():
            table.add_row(name, f"left as it is: {reason}")
        Console().print(table)
        for logger in trainer.loggers:
            logger.log_hyperparams({f"lightning_gap/ghost/{name}": value for name, value in facts.items()})


def _samples(batch: Any) -> int | None:
    """Return the length of the first dimension, if all tensors of a batch agree on it."""
    sizes: set[int] = set()
    apply_to_collection(batch, Tensor, lambda tensor: sizes.add(len(tensor)) if tensor.dim() else None)
    return sizes.pop() if len(sizes) == 1 else None
