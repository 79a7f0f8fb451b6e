"""Conversion of a model's BatchNorm layers to ghost batch normalization and back, in place.

Only the class of a layer changes. Parameters, buffers, hooks, state-dict keys and every reference to them (optimizers,
averaged copies, tied layers, wrappers such as ``DistributedDataParallel``) are those of before.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple, TypeVar
from warnings import warn

from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_gap.ghost.functional import Grouping, RunningStats, check_settings
from lightning_gap.ghost.layers import GhostNorm, ghost_class, is_made, keeps_forward, rank_group
from lightning_gap.parallel import RankGroup

__all__ = ["GhostConversion", "Skip", "convert_ghost_batchnorm", "plan_ghost_batchnorm", "revert_ghost_batchnorm"]

Module = TypeVar("Module", bound=nn.Module)
Skip = str | type[nn.Module] | Callable[[str, nn.Module], bool]


class _Settings(NamedTuple):
    """The attributes of a ghost layer that a plain one has not."""

    ghost_batch_size: int
    running_stats: RunningStats
    grouping: Grouping
    process_group: RankGroup | None


@dataclass(frozen=True)
class GhostConversion:
    """What a conversion changes: computed without changing anything, then applied, then undone.

    Attributes:
        layers: The layers to convert, by name.
        asked_to_skip: Names of the BatchNorm layers that ``skip`` holds back.
        unable: Names of the layers that cannot be converted, each with the reason.
    """

    layers: dict[str, _BatchNorm]
    asked_to_skip: tuple[str, ...]
    unable: dict[str, str]

    def apply(
        self,
        ghost_batch_size: int,
        running_stats: RunningStats,
        grouping: Grouping,
        process_group: ProcessGroup | RankGroup | None = None,
    ) -> Callable[[], None]:
        """Convert the layers, and return a function that puts each back to what it was.

        Args:
            ghost_batch_size: Samples that share statistics.
            running_stats: ``"sequential"`` or ``"per_step"``.
            grouping: ``"contiguous"`` or ``"strided"``.
            process_group: Ranks whose batches together are one ghost.

        Raises:
            TypeError: If ``ghost_batch_size`` is not an int.
            ValueError: If an argument is out of range.
        """
        check_settings(ghost_batch_size, running_stats, grouping)
        settings = _Settings(ghost_batch_size, running_stats, grouping, rank_group(process_group))
        before = [(layer, _settings(layer)) for layer in self.layers.values()]
        for layer in self.layers.values():
            _set(layer, settings)

        def undo() -> None:
            for layer, settings in before:
                if settings is None:
                    _revert(layer)
                elif isinstance(layer, GhostNorm):  # else reverted in the meantime
                    _set(layer, settings)

        return undo


def plan_ghost_batchnorm(module: nn.Module, skip: Skip | Iterable[Skip] = ()) -> GhostConversion:
    """Find the layers of ``module`` that can be converted, and say why the others cannot.

    Args:
        module: Any module; it may be a BatchNorm layer itself.
        skip: As for :func:`convert_ghost_batchnorm`.

    Returns:
        The plan; nothing is changed.

    Raises:
        TypeError: If an entry of ``skip`` is neither a string, nor a module class, nor a callable.
        ValueError: If there is nothing to convert, if a layer is a ``SyncBatchNorm``, or if a name in ``skip`` fits no
            BatchNorm layer.

    Example:
        >>> plan = plan_ghost_batchnorm(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
        >>> list(plan.layers)
        ['1']
    """
    rules = _rules(skip)
    names: dict[_BatchNorm, list[str]] = {}  # a tied layer has several
    for name, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, _BatchNorm):
            names.setdefault(layer, []).append(name.replace("_orig_mod.", ""))

    used: set[str] = set()
    layers: dict[str, _BatchNorm] = {}
    skipped: list[str] = []
    unable: dict[str, str] = {}
    for layer, aliases in names.items():
        hits = [rule for rule in rules if any(_matches(rule, name, layer) for name in aliases)]
        used.update(rule for rule in hits if isinstance(rule, str))
        name = aliases[0]
        if hits:
            skipped.append(name)
        elif isinstance(layer, nn.SyncBatchNorm):
            raise ValueError(
                f"layer {name!r} is a SyncBatchNorm, whose statistics span all ranks and so cannot be those of a ghost "
                f"batch; keep BatchNorm layers in the model, or add {name!r} to skip"
            )
        elif reason := _cannot(layer):
            unable[name] = reason
        else:
            layers[name] = layer

    for rule in rules:
        if isinstance(rule, str) and rule not in used:
            raise ValueError(f"skip={rule!r} fits none of the BatchNorm layers: {[a[0] for a in names.values()]}")
    if not layers:
        found = f"it has {len(skipped)} that skip holds back" if skipped else "it has none at all"
        if unable:
            found = "; ".join(f"{name!r} {reason}" for name, reason in unable.items())
        raise ValueError(
            f"module {type(module).__name__} holds no BatchNorm layer to convert ({found}); convert a model with "
            f"BatchNorm1d, BatchNorm2d or BatchNorm3d layers, after they have been built"
        )
    return GhostConversion(layers, tuple(skipped), unable)


def convert_ghost_batchnorm(
    module: Module,
    ghost_batch_size: int = 128,
    *,
    running_stats: RunningStats = "sequential",
    grouping: Grouping = "contiguous",
    skip: Skip | Iterable[Skip] = (),
    process_group: ProcessGroup | RankGroup | None = None,
) -> Module:
    """Turn the BatchNorm layers of ``module`` into ghost batch normalization, in place.

    In training each ghost of ``ghost_batch_size`` samples is normalized by its own statistics
    (:func:`~lightning_gap.ghost.ghost_batch_norm`); evaluation stays plain batch normalization. Only the class of a
    layer changes: parameters, buffers, hooks and state-dict keys are kept, so it does not matter whether an optimizer
    or a wrapper has seen the model. Layers that are ghost layers already get the new settings.

    Subclasses with a ``forward`` of their own (a fused activation, say) keep it; the call to ``batch_norm`` within it
    goes over ghosts. If it takes more than the input, the layer is left as it is, with a warning.

    Args:
        module: Any module; it may be a BatchNorm layer itself.
        ghost_batch_size: Samples that share statistics, per process.
        running_stats: ``"sequential"`` or ``"per_step"``.
        grouping: ``"contiguous"`` or ``"strided"``.
        skip: Layers to leave as they are: names (of the layer or of a module around it; ``*`` as in file names),
            module classes, functions of name and layer that return a bool, or several of these.
        process_group: Ranks whose batches together are one ghost, for batches below ``ghost_batch_size``; see
            :func:`~lightning_gap.ghost.ghost_batch_norm`.

    Returns:
        ``module`` itself.

    Raises:
        TypeError: If ``ghost_batch_size`` is not an int, or an entry of ``skip`` is of another type.
        ValueError: If there is nothing to convert, if a layer is a ``SyncBatchNorm``, if a name in ``skip`` fits no
            BatchNorm layer, or if another argument is out of range. Nothing has been changed then.

    References:
        Hoffer, Hubara, Soudry, "Train longer, generalize better", 2017, Algorithm 1.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
        >>> convert_ghost_batchnorm(model, 32)[1]  # doctest: +ELLIPSIS
        GhostBatchNorm1d(4, ..., ghost_batch_size=32, running_stats=sequential, grouping=contiguous)
    """
    check_settings(ghost_batch_size, running_stats, grouping)
    plan = plan_ghost_batchnorm(module, skip)
    for name, reason in plan.unable.items():
        warn(f"layer {name!r} is left as it is: it {reason}; add it to skip to silence this warning", stacklevel=2)
    plan.apply(ghost_batch_size, running_stats, grouping, process_group)
    return module


def revert_ghost_batchnorm(module: Module) -> Module:
    """Turn the ghost batch normalization layers of ``module`` back into the BatchNorm layers they stand for, in place.

    Args:
        module: Any module; without ghost layers it is left as it is.

    Returns:
        ``module`` itself, with the classes and attributes of before its conversion, and the statistics it has now.

    Example:
        >>> model = convert_ghost_batchnorm(nn.Sequential(nn.BatchNorm1d(4)))
        >>> type(revert_ghost_batchnorm(model)[0]) is nn.BatchNorm1d
        True
    """
    for layer in module.modules():
        if isinstance(layer, GhostNorm):
            _revert(layer)
    return module


def _rules(skip: Skip | Iterable[Skip]) -> list[Skip]:
    rules: list[Skip] = [skip] if isinstance(skip, str | nn.Module) or callable(skip) else list(skip)
    for rule in rules:
        known = issubclass(rule, nn.Module) if isinstance(rule, type) else isinstance(rule, str) or callable(rule)
        if not known or isinstance(rule, nn.Module):  # a module is callable, but no predicate
            raise TypeError(f"skip takes names, module classes and functions of (name, layer), got {rule!r}")
    return rules


def _matches(rule: Skip, name: str, layer: nn.Module) -> bool:
    if isinstance(rule, str):
        return name == rule or name.startswith(f"{rule}.") or fnmatchcase(name, rule)
    if isinstance(rule, type):
        return isinstance(layer, rule)
    return bool(rule(name, layer))


def _cannot(layer: _BatchNorm) -> str | None:
    """Say why a layer cannot become a ghost layer by a change of class, or None if it can."""
    if "forward" in vars(layer):
        return "has had its forward replaced"
    cls = type(layer)
    if isinstance(layer, GhostNorm) or keeps_forward(cls):
        return None
    _, *arguments = inspect.signature(cls.forward).parameters.values()  # without self
    named = [a for a in arguments if a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]
    if any(a.default is a.empty for a in named[1:]):
        return f"is a {cls.__name__}, whose forward takes more than the input"
    return None


def _settings(layer: _BatchNorm) -> _Settings | None:
    return _Settings(*(getattr(layer, name) for name in _Settings._fields)) if isinstance(layer, GhostNorm) else None


def _set(layer: _BatchNorm, settings: _Settings) -> None:
    if not isinstance(layer, GhostNorm):
        layer.__class__ = ghost_class(type(layer))
    vars(layer).update(settings._asdict())


def _revert(layer: _BatchNorm) -> None:
    cls = type(layer)
    if not issubclass(cls, GhostNorm):
        return
    if not is_made(cls):
        warn(f"a {cls.__name__} layer stays a ghost layer: it has no plain class of its own", stacklevel=3)
        return
    layer.__class__ = cls.plain_class
    for name in _Settings._fields:
        vars(layer).pop(name, None)
