"""Ghost batch normalization layers: subclasses of torch's, so that whatever looks for BatchNorm finds it."""

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_gap.ghost.functional import Grouping, RunningStats, check_settings, ghost_batch_norm

__all__ = ["GhostBatchNorm1d", "GhostBatchNorm2d", "GhostBatchNorm3d", "GhostNorm", "ghost_class"]


class GhostNorm(_BatchNorm):
    r"""What all ghost batch normalization layers share: training over ghosts, evaluation as plain BatchNorm.

    Use :class:`GhostBatchNorm1d`, :class:`GhostBatchNorm2d` or :class:`GhostBatchNorm3d`; test for this class to find
    any of them. A layer keeps no tensors beyond BatchNorm's own, so state dicts go both ways unchanged.

    Args:
        *args: As for ``torch.nn.BatchNorm*d``: ``num_features, eps, momentum, affine, track_running_stats``.
        ghost_batch_size: Samples that share statistics in training.
        running_stats: ``"sequential"`` or ``"per_step"``, see :func:`~lightning_gap.ghost.ghost_batch_norm`.
        grouping: ``"contiguous"`` or ``"strided"``, see :func:`~lightning_gap.ghost.ghost_slices`.
        **kwargs: As for ``torch.nn.BatchNorm*d``, by name.

    Raises:
        TypeError: If ``ghost_batch_size`` is not an int.
        ValueError: If an argument is out of range.
    """

    plain_class: ClassVar[type[_BatchNorm]]
    ghost_batch_size: int
    running_stats: RunningStats
    grouping: Grouping

    def __init__(
        self,
        *args: Any,
        ghost_batch_size: int = 128,
        running_stats: RunningStats = "sequential",
        grouping: Grouping = "contiguous",
        **kwargs: Any,
    ) -> None:
        check_settings(ghost_batch_size, running_stats, grouping)
        super().__init__(*args, **kwargs)
        self.ghost_batch_size = ghost_batch_size
        self.running_stats = running_stats
        self.grouping = grouping

    def forward(self, input: Tensor) -> Tensor:
        """Normalize over ghost batches in training, by the running statistics in evaluation.

        Args:
            input: (N, C) or (N, C, ...), as the plain layer takes.
        """
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        tracks = self.track_running_stats  # freezing callbacks switch it off while the buffers are still there
        return ghost_batch_norm(
            input,
            self.running_mean if tracks else None,
            self.running_var if tracks else None,
            self.weight,
            self.bias,
            ghost_batch_size=self.ghost_batch_size,
            momentum=self.momentum,
            eps=self.eps,
            running_stats=self.running_stats,
            grouping=self.grouping,
            num_batches_tracked=self.num_batches_tracked if tracks else None,
        )

    def extra_repr(self) -> str:
        """Describe the layer as BatchNorm does, and its ghosts."""
        own = f"ghost_batch_size={self.ghost_batch_size}, running_stats={self.running_stats}, grouping={self.grouping}"
        return f"{super().extra_repr()}, {own}"  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class that ghost_class made has no importable name: rebuild it from the plain class.
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        if type(self) in _NAMED or not is_made(type(self)):
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


_NAMED = (GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d)


def is_made(cls: type[nn.Module]) -> bool:
    """Return whether ``cls`` stands for one plain class, and is no further subclass that someone else derived.

    Args:
        cls: Any module class.
    """
    return issubclass(cls, GhostNorm) and "plain_class" in vars(cls)


def ghost_class(plain: type[_BatchNorm]) -> type[GhostNorm]:
    """Return the ghost class of a BatchNorm class, made on first use where it is not one of torch's three.

    Lazy layers, layers that wrappers have subclassed (parametrizations, sharding) and users' subclasses that keep
    BatchNorm's ``forward`` get a class of their own, so that a converted layer is still what it was.

    Args:
        plain: A BatchNorm class that inherits ``forward`` from torch's.

    Example:
        >>> ghost_class(nn.BatchNorm2d) is GhostBatchNorm2d
        True
        >>> ghost_class(nn.LazyBatchNorm1d).__name__
        'GhostLazyBatchNorm1d'
    """
    for cls in plain.__subclasses__():
        if issubclass(cls, GhostNorm) and is_made(cls):
            return cls
    attributes: dict[str, Any] = {"plain_class": plain, "__module__": __name__, "__doc__": plain.__doc__}
    becomes = getattr(plain, "cls_to_become", None)  # a lazy class turns into this one at its first forward
    if becomes is not None:
        attributes["cls_to_become"] = ghost_class(becomes)
    return type(f"Ghost{plain.__name__}", (GhostNorm, plain), attributes)


def _empty_layer(plain: type[_BatchNorm]) -> GhostNorm:
    cls = ghost_class(plain)
    return cls.__new__(cls)
