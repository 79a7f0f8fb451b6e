"""Ghost batch normalization layers: subclasses of torch's, so that whatever looks for BatchNorm finds it."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from lightning_gap.ghost.functional import (
    Grouping,
    RunningStats,
    check_rows_per_sample,
    check_settings,
    ghost_batch_norm,
)
from lightning_gap.ghost.samples import BatchRows
from lightning_gap.ranks.group import RankGroup

__all__ = ["GhostBatchNorm1d", "GhostBatchNorm2d", "GhostBatchNorm3d", "GhostNorm", "ghost_class"]


class GhostNorm(_BatchNorm):
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

    plain_class: ClassVar[type[_BatchNorm]]
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
        process_group: torch.distributed.ProcessGroup | RankGroup | None = None,
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
        self.process_group = rank_group(process_group)

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
            return self._own_forward(super().forward, input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        tracks = self.track_running_stats  # freezing callbacks switch it off while the buffers are still there
        return self._over_ghosts(
            input, self.running_mean if tracks else None, self.running_var if tracks else None, self.weight, self.bias
        )

    def _over_ghosts(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        rows = self.rows_per_sample
        return ghost_batch_norm(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            ghost_batch_size=self.ghost_batch_size,
            momentum=self.momentum,
            eps=self.eps,
            running_stats=self.running_stats,
            grouping=self.grouping,
            rows_per_sample=rows if isinstance(rows, int) else rows.of(self, len(input)),
            num_batches_tracked=self.num_batches_tracked if running_mean is not None else None,
            process_group=self.process_group,
        )

    def _own_forward(self, forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        updates = None if self.num_batches_tracked is None else self.num_batches_tracked.clone()
        redirected: list[bool] = []  # no attribute of the mode: compilers lose those
        with _OverGhosts(self, updates, redirected):
            output = forward(input)
        if not redirected:
            name = type(self).plain_class.__name__
            raise RuntimeError(
                f"the forward of {name} does not call torch.nn.functional.batch_norm with its own running statistics "
                f"in training, so it cannot normalize over ghosts; convert with skip={name}"
            )
        return output

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
        if type(self) in _NAMED or not is_made(type(self)):
            return reduced
        return (_empty_layer, (self.plain_class,), *reduced[2:])


class _OverGhosts(TorchFunctionMode):
    """Sends the call to ``batch_norm`` that a layer's own forward makes in training to the ghosts."""

    def __init__(self, layer: GhostNorm, updates: Tensor | None, redirected: list[bool]) -> None:
        super().__init__()
        self.layer, self.updates, self.redirected = layer, updates, redirected

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.batch_norm:
            return func(*args, **kwargs or {})
        return self._batch_norm(*args, **kwargs or {})

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        self.redirected.append(True)
        if self.updates is not None and self.layer.num_batches_tracked is not None:
            self.layer.num_batches_tracked.copy_(self.updates)  # the forward has counted one; the ghosts count theirs
        return self.layer._over_ghosts(input, running_mean, running_var, weight, bias)


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


def rank_group(process_group: torch.distributed.ProcessGroup | RankGroup | None) -> RankGroup | None:
    """Return a process group as a :class:`~lightning_gap.trainer.strategy.RankGroup`.

    Args:
        process_group: A process group, already a rank group, or None for none.
    """
    if process_group is None or isinstance(process_group, RankGroup):
        return process_group
    return RankGroup(process_group)


def keeps_forward(plain: type[_BatchNorm]) -> bool:
    """Return whether a BatchNorm class has torch's ``forward`` and no other.

    Args:
        plain: Any BatchNorm class.
    """
    return plain.forward is _BatchNorm.forward


def is_made(cls: type[nn.Module]) -> bool:
    """Return whether ``cls`` stands for one plain class, and is no further subclass that someone else derived.

    Args:
        cls: Any module class.
    """
    return issubclass(cls, GhostNorm) and "plain_class" in vars(cls)


def ghost_class(plain: type[_BatchNorm]) -> type[GhostNorm]:
    """Return the ghost class of a BatchNorm class, made on first use where it is not one of torch's three.

    Lazy layers, layers that wrappers have subclassed (parametrizations, sharding) and users' subclasses
    get a class of their own, so that a converted layer is still what it was.

    Args:
        plain: A BatchNorm class.

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
