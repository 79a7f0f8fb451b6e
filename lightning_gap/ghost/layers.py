"""Ghost batch normalization layers: subclasses of torch's, so that whatever looks for BatchNorm finds it."""

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.fx import Proxy

from lightning_gap.ghost.foreign import class_of, is_made, keeps_forward, normalizing_by
from lightning_gap.ghost.functional import (
    Grouping,
    RunningStats,
    check_rows_per_sample,
    check_settings,
    ghost_batch_norm,
    ghost_slices,
    rank_group,
)
from lightning_gap.ghost.samples import BatchRows
from lightning_gap.ranks.group import RankGroup
from lightning_gap.trainer.internals.of_torch import BatchNormBase, check_input_dim

__all__ = ["GhostBatchNorm1d", "GhostBatchNorm2d", "GhostBatchNorm3d", "GhostNorm", "ghost_class", "statistics_of"]


class GhostNorm(BatchNormBase):
    r"""What all ghost batch normalization layers share: training over ghosts, evaluation as plain BatchNorm.

    Use :class:`GhostBatchNorm1d`, :class:`GhostBatchNorm2d` or :class:`GhostBatchNorm3d`; test for this class to find
    any of them. A layer keeps no tensors beyond BatchNorm's own, so state dicts go both ways unchanged.

    Where the plain class has a ``forward`` of its own (with an activation fused to it, say), that one runs, and the
    call to ``batch_norm`` within it goes over ghosts.

    Args:
        *args: As for ``torch.nn.BatchNorm*d``: ``num_features, eps, momentum, affine, track_running_stats``.
        ghost_batch_size: Samples that share statistics in training.
        running_stats: ``"sequential"`` or ``"per_step"``, see :func:`~lightning_gap.ghost.ghost_batch_norm`.
        grouping: ``"contiguous"`` or ``"strided"``, see :func:`~lightning_gap.ghost.ghost_slices`.
        rows_per_sample: Rows of the input that are one sample, see :func:`~lightning_gap.ghost.ghost_batch_norm`; or
            what tells them during a batch.
        process_group: Ranks whose batches together are one ghost, see :func:`~lightning_gap.ghost.ghost_batch_norm`.
        **kwargs: As for ``torch.nn.BatchNorm*d``, by name.

    Raises:
        TypeError: If ``ghost_batch_size`` or ``rows_per_sample`` is not an int.
        ValueError: If an argument is out of range.
    """

    plain_class: ClassVar[type[BatchNormBase]]
    ghost_batch_size: int
    running_stats: RunningStats
    grouping: Grouping
    rows_per_sample: int | BatchRows
    process_group: RankGroup | None

    def __init__(
        self,
        *args: Any,
        ghost_batch_size: int = 128,
        running_stats: RunningStats = "sequential",
        grouping: Grouping = "contiguous",
        rows_per_sample: int | BatchRows = 1,
        process_group: ProcessGroup | RankGroup | None = None,
        **kwargs: Any,
    ) -> None:
        check_settings(ghost_batch_size, running_stats, grouping)
        if not isinstance(rows_per_sample, BatchRows):
            check_rows_per_sample(rows_per_sample)
        super().__init__(*args, **kwargs)
        self.ghost_batch_size = ghost_batch_size
        self.running_stats = running_stats
        self.grouping = grouping
        self.rows_per_sample = rows_per_sample
        self.process_group = None if process_group is None else rank_group(process_group)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize over ghost batches in training, by the running statistics in evaluation.

        Args:
            input: (N, C) or (N, C, ...), as the plain layer takes.
        """
        given: Any = input
        if isinstance(given, Proxy) and (self.training or keeps_forward(type(self).plain_class)):
            # Symbolic traces take torch's own layers whole, and no others; like those we look at what comes in.
            tracer: Any = given.tracer
            leaf: Tensor = tracer.create_proxy("call_module", tracer.path_of_module(self), (given,), {})
            return leaf
        if not self.training:
            return super().forward(input)
        if not keeps_forward(type(self).plain_class):
            return normalizing_by(self._over_ghosts, self, super().forward, input)
        check_input_dim(self, input)
        tracks = self.track_running_stats  # freezing callbacks switch it off while the buffers are still there
        return self._over_ghosts(
            input, self.running_mean if tracks else None, self.running_var if tracks else None, self.weight, self.bias
        )

    def _over_ghosts(self, input: Tensor, running_mean: Tensor | None, *others: Tensor | None) -> Tensor:
        rows = self.rows_per_sample
        return ghost_batch_norm(
            input,
            running_mean,
            *others,
            ghost_batch_size=self.ghost_batch_size,
            momentum=self.momentum,
            eps=self.eps,
            running_stats=self.running_stats,
            grouping=self.grouping,
            rows_per_sample=rows if isinstance(rows, int) else rows.of(self, len(input)),
            num_batches_tracked=self.num_batches_tracked if running_mean is not None else None,
            process_group=self.process_group,
        )

    def ghosts_in(self, samples: int) -> list[slice]:
        """Return which samples of a batch form each ghost; a lone last one joins, whatever the layer's positions."""
        return ghost_slices(samples, self.ghost_batch_size, grouping=self.grouping)

    def normalized(self, input: Tensor) -> Tensor:
        """Return the input normalized over ghosts as in training, without scale, shift and running statistics."""
        rows = self.rows_per_sample
        return ghost_batch_norm(
            input,
            None,
            None,
            ghost_batch_size=self.ghost_batch_size,
            eps=self.eps,
            grouping=self.grouping,
            rows_per_sample=rows if isinstance(rows, int) else rows.of(self, len(input)),
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        """Describe the layer as BatchNorm does, and its ghosts."""
        own = f"ghost_batch_size={self.ghost_batch_size}, running_stats={self.running_stats}, grouping={self.grouping}"
        if self.rows_per_sample != 1:
            own += f", rows_per_sample={self.rows_per_sample}"
        if self.process_group is not None:
            own += f", over {self.process_group.size} ranks"
        return f"{super().extra_repr()}, {own}"  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class that ghost_class made has no importable name: rebuild it from the plain class.
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        if type(self) in _NAMED or not is_made(type(self), GhostNorm):
            return reduced
        return (_empty_layer, (self.plain_class,), *reduced[2:])


class GhostBatchNorm1d(GhostNorm, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` that normalizes over ghost batches in training; arguments as :class:`GhostNorm`.

    Reference: Hoffer, Hubara, Soudry, "Train longer, generalize better", 2017, Algorithm 1.

    Example:
        >>> import torch
        >>> layer = GhostBatchNorm1d(16, ghost_batch_size=32)
        >>> layer(torch.randn(128, 16)).shape
        torch.Size([128, 16])
        >>> int(layer.num_batches_tracked)  # four ghosts, one after another
        4
    """

    plain_class = nn.BatchNorm1d


class GhostBatchNorm2d(GhostNorm, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` that normalizes over ghost batches in training; arguments as :class:`GhostNorm`.

    Reference: Hoffer, Hubara, Soudry, "Train longer, generalize better", 2017, Algorithm 1.

    Example:
        >>> import torch
        >>> layer = GhostBatchNorm2d(3, ghost_batch_size=8, running_stats="per_step")
        >>> layer(torch.randn(20, 3, 4, 4)).shape  # ghosts of 8, 8 and 4
        torch.Size([20, 3, 4, 4])
    """

    plain_class = nn.BatchNorm2d


class GhostBatchNorm3d(GhostNorm, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` that normalizes over ghost batches in training; arguments as :class:`GhostNorm`.

    Reference: Hoffer, Hubara, Soudry, "Train longer, generalize better", 2017, Algorithm 1.

    Example:
        >>> import torch
        >>> GhostBatchNorm3d(3, ghost_batch_size=8)(torch.randn(16, 3, 2, 4, 4)).shape
        torch.Size([16, 3, 2, 4, 4])
    """

    plain_class = nn.BatchNorm3d


def statistics_of(layer: BatchNormBase) -> tuple[Tensor, Tensor, Tensor]:
    """Return a layer's running mean and variance, which it has, and the number of their updates."""
    mean, var, updates = layer.running_mean, layer.running_var, layer.num_batches_tracked
    assert mean is not None and var is not None and updates is not None  # noqa: PT018
    return mean, var, updates


_NAMED = (GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d)


def ghost_class(plain: type[BatchNormBase]) -> type[GhostNorm]:
    """Return the ghost class of a BatchNorm class, made on first use where it is not one of torch's three.

    Lazy layers, layers that wrappers have subclassed (parametrizations, sharding) and users' subclasses
    get a class of their own, so that a converted layer is still what it was.
    """
    return class_of(plain, GhostNorm, "Ghost")


def _empty_layer(plain: type[BatchNormBase]) -> GhostNorm:  # pickles name it
    cls = ghost_class(plain)
    return cls.__new__(cls)
