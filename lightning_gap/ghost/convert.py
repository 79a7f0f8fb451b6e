"""Conversion of a model's BatchNorm layers to ghost batch normalization and back, in place.

Only the class of a layer changes. Parameters, buffers, hooks, state-dict keys and every reference to them (optimizers,
averaged copies, tied layers, wrappers such as ``DistributedDataParallel``) are those of before.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar
from warnings import warn

from torch import nn
from torch.distributed import ProcessGroup

from lightning_gap.ghost.foreign import is_made, keeps_forward
from lightning_gap.ghost.functional import Grouping, RunningStats, check_rows_per_sample, check_settings, rank_group
from lightning_gap.ghost.hidden import calls_batch_norm, frozen_layers, scripted_layers
from lightning_gap.ghost.layers import GhostNorm, ghost_class
from lightning_gap.ghost.samples import BatchRows
from lightning_gap.ranks.group import RankGroup
from lightning_gap.trainer.internals.of_torch import BatchNormBase

__all__ = [
    "GhostConversion",
    "NoBatchNormError",
    "Skip",
    "convert_ghost_batchnorm",
    "plain_layers",
    "plan_ghost_batchnorm",
    "revert_ghost_batchnorm",
]

Module = TypeVar("Module", bound=nn.Module)
Skip = str | type[nn.Module] | Callable[[str, nn.Module], bool]
RowsPerSample = int | BatchRows | Mapping[str, int | BatchRows]


class NoBatchNormError(ValueError):
    """Raised where a module has no BatchNorm layer that can be converted."""


class _Settings(NamedTuple):
    """The attributes of a ghost layer that a plain one has not."""

    ghost_batch_size: int
    running_stats: RunningStats
    grouping: Grouping
    rows_per_sample: int | BatchRows
    process_group: RankGroup | None


@dataclass(frozen=True)
class GhostConversion:
    """What a conversion changes: computed without changing anything, then applied, then undone.

    Attributes:
        layers: The layers to convert, by name.
        asked_to_skip: Names of the BatchNorm layers that ``skip`` holds back.
        unable: Names of the layers that cannot be converted, each with the reason.
    """

    layers: dict[str, BatchNormBase]
    asked_to_skip: tuple[str, ...]
    unable: dict[str, str]

    def apply(
        self,
        ghost_batch_size: int,
        running_stats: RunningStats,
        grouping: Grouping,
        process_group: ProcessGroup | RankGroup | None = None,
        rows_per_sample: RowsPerSample = 1,
    ) -> Callable[[], None]:
        """Convert the layers, and return a function that puts each back to what it was.

        Args:
            ghost_batch_size: Samples that share statistics.
            running_stats: ``"sequential"`` or ``"per_step"``.
            grouping: ``"contiguous"`` or ``"strided"``.
            process_group: Ranks whose batches together are one ghost.
            rows_per_sample: As for :func:`convert_ghost_batchnorm`.

        Raises:
            TypeError: If ``ghost_batch_size`` or a number of rows is not an int.
            ValueError: If an argument is out of range, or if a name in ``rows_per_sample`` fits no layer.
        """
        check_settings(ghost_batch_size, running_stats, grouping)
        rows = self.rows_of_layers(rows_per_sample)
        ranks = None if process_group is None else rank_group(process_group)
        channels = {name: layer.num_features for name, layer in self.layers.items()}
        before = [
            (layer, {n: getattr(layer, n) for n in _Settings._fields} if isinstance(layer, GhostNorm) else None)
            for layer in self.layers.values()
        ]
        for number, (name, layer) in enumerate(self.layers.items()):
            group = ranks and ranks.for_layer(number, channels)
            _set(layer, _Settings(ghost_batch_size, running_stats, grouping, rows[name], group)._asdict())

        def undo() -> None:
            for layer, settings in before:
                if settings is None:
                    _revert(layer)
                elif isinstance(layer, GhostNorm):  # else reverted in the meantime
                    _set(layer, settings)

        return undo

    def left_in_words(self) -> dict[str, str]:
        """Return why layers are left as they are, by name."""
        skipped = dict.fromkeys(self.asked_to_skip, "left as it is: in skip")
        return skipped | {name: f"left as it is: {reason}" for name, reason in self.unable.items()}

    def rows_of_layers(
        self, rows_per_sample: RowsPerSample, otherwise: int | BatchRows = 1
    ) -> dict[str, int | BatchRows]:
        """Return the rows per sample of each layer.

        Args:
            rows_per_sample: As for :func:`convert_ghost_batchnorm`.
            otherwise: What layers get that a mapping does not name.

        Raises:
            TypeError: If a number of rows is not an int.
            ValueError: If a number is below 1, or if a name in ``rows_per_sample`` fits no layer.
        """
        if not isinstance(rows_per_sample, Mapping):
            rows_per_sample = {"*": rows_per_sample}
        for pattern, rows in rows_per_sample.items():
            if not isinstance(rows, BatchRows):
                check_rows_per_sample(rows)
            if not any(_matches(pattern, name, layer) for name, layer in self.layers.items()):
                raise ValueError(
                    f"rows_per_sample names {pattern!r}, which fits none of the layers {list(self.layers)}"
                )
        return {
            name: next((rows for p, rows in rows_per_sample.items() if _matches(p, name, layer)), otherwise)
            for name, layer in self.layers.items()
        }


def plan_ghost_batchnorm(module: nn.Module, skip: Skip | Iterable[Skip] = ()) -> GhostConversion:
    """Find the layers of ``module`` that can be converted, and say why the others cannot.

    Args:
        module: Any module; it may be a BatchNorm layer itself.
        skip: As for :func:`convert_ghost_batchnorm`.

    Returns:
        The plan; nothing is changed.

    Raises:
        TypeError: If an entry of ``skip`` is neither a string, nor a module class, nor a callable.
        NoBatchNormError: If there is nothing to convert, a ValueError.
        ValueError: If a layer is a ``SyncBatchNorm``, or if a name in ``skip`` fits no BatchNorm layer.

    Example:
        >>> plan = plan_ghost_batchnorm(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
        >>> list(plan.layers)
        ['1']
    """
    rules = _rules(skip)
    names: dict[BatchNormBase, list[str]] = {}  # a tied layer has several
    hidden: dict[nn.Module, list[str]] = {}  # modules that normalize without a BatchNorm layer to be seen
    reasons = scripted_layers(module)
    calling = {cls for cls in {type(layer) for layer in module.modules()} if calls_batch_norm(cls)}
    for name, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, BatchNormBase):
            names.setdefault(layer, []).append(name.replace("_orig_mod.", ""))
        elif layer in reasons or type(layer) in calling:
            hidden.setdefault(layer, []).append(name.replace("_orig_mod.", ""))

    used: set[str] = set()
    layers: dict[str, BatchNormBase] = {}
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
    for inner, aliases in hidden.items():
        kinds = [rule for rule in rules if isinstance(rule, str | type)]  # and no functions of BatchNorm layers
        hits = [rule for rule in kinds if any(_matches(rule, name, inner) for name in aliases)]
        used.update(rule for rule in hits if isinstance(rule, str))
        if hits:
            skipped.append(aliases[0])
        else:
            unable[aliases[0]] = reasons.get(inner, f"is a {type(inner).__name__}, which calls batch_norm itself")

    for rule in rules:
        if names and isinstance(rule, str) and rule not in used:
            raise ValueError(f"skip={rule!r} fits none of the BatchNorm layers: {[a[0] for a in names.values()]}")
    if not layers:
        found = f"it has {len(skipped)} that skip holds back" if skipped else "it has none at all"
        if unable:
            found = "; ".join(f"{name!r} {reason}" for name, reason in unable.items())
        elif frozen := frozen_layers(module):
            found = f"its {frozen} have fixed statistics, whatever the batch"
        raise NoBatchNormError(
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
    rows_per_sample: int | Mapping[str, int] = 1,
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
        rows_per_sample: Rows of a layer's input that are one sample: k where a sample's k tokens, nodes or frames come
            as rows, one after another. A number for all layers, or numbers by names (patterns as in ``skip``), the
            first that fits; the others have 1.
        process_group: Ranks whose batches together are one ghost, for batches below ``ghost_batch_size``; see
            :func:`~lightning_gap.ghost.ghost_batch_norm`.

    Returns:
        ``module`` itself.

    Raises:
        TypeError: If ``ghost_batch_size`` or ``rows_per_sample`` is not an int, or an entry of ``skip`` is of another
            type.
        ValueError: If there is nothing to convert, if a layer is a ``SyncBatchNorm``, if a name in ``skip`` or
            ``rows_per_sample`` fits no BatchNorm layer, or if another argument is out of range. Nothing has been
            changed then.

    References:
        Hoffer, Hubara, Soudry, "Train longer, generalize better", 2017, Algorithm 1.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
        >>> convert_ghost_batchnorm(model, 32)[1]  # doctest: +ELLIPSIS
        GhostBatchNorm1d(4, ..., ghost_batch_size=32, running_stats=sequential, grouping=contiguous)
    """
    check_settings(ghost_batch_size, running_stats, grouping)
    plan = plan_ghost_batchnorm(module, skip)
    plan.rows_of_layers(rows_per_sample)
    for name, reason in plan.unable.items():
        warn(f"layer {name!r} is left as it is: it {reason}; add it to skip to silence this warning", stacklevel=2)
    plan.apply(ghost_batch_size, running_stats, grouping, process_group, rows_per_sample)
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


def plain_layers(module: nn.Module) -> set[nn.Module]:
    """Return the BatchNorm layers of a module that are no ghost layers."""
    return {
        layer for layer in module.modules() if isinstance(layer, BatchNormBase) and not isinstance(layer, GhostNorm)
    }


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


def _cannot(layer: BatchNormBase) -> str | None:
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


def _set(layer: BatchNormBase, settings: Mapping[str, Any]) -> None:
    if not isinstance(layer, GhostNorm):
        layer.__class__ = ghost_class(type(layer))
    vars(layer).update(settings)


def _revert(layer: BatchNormBase) -> None:
    cls = type(layer)
    if not issubclass(cls, GhostNorm):
        return
    if not is_made(cls, GhostNorm):
        warn(f"a {cls.__name__} layer stays a ghost layer: it has no plain class of its own", stacklevel=3)
        return
    layer.__class__ = cls.plain_class
    for name in _Settings._fields:
        vars(layer).pop(name, None)
