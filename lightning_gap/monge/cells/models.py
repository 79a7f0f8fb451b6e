"""What is asked of whatever maps cells: MongeMap, an ensemble of them, or a transformer of scikit-learn."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_gap.extras import library

__all__ = ["CellMap", "as_cell_map", "written_conditions"]


@dataclass(frozen=True)
class CellMap:
    """A map of raw samples, whose features have names or go by place."""

    title: str
    features: tuple[str, ...] | None
    dim: int | None  # of the samples, where it is known
    forward: Callable[[Tensor, Any, int], Tensor]  # of samples, conditions, and rows at once
    backward: Callable[..., Tensor] | None  # likewise, and of options


def as_cell_map(model: Any) -> CellMap:
    """Return what maps the samples of a model."""
    if callable(getattr(model, "transport", None)):
        first = model.maps[0] if hasattr(model, "maps") else model
        names = getattr(first, "feature_names", None)
        encoding = getattr(first, "representation", None)
        dim = len(encoding.mean) if encoding is not None else getattr(getattr(first, "map", None), "dim", None)
        return CellMap(
            type(model).__name__, None if names is None else tuple(names), dim,
            lambda x, condition, rows: model.transport(x, condition, batch_size=rows),
            getattr(model, "inverse", None),
        )  # fmt: skip
    if callable(getattr(model, "transform", None)):
        return _of_scikit_learn(model)
    raise TypeError(
        f"model must be a MongeMap, a MapEnsemble or a fitted transformer of scikit-learn, got {type(model).__name__}"
    )


def _of_scikit_learn(model: Any) -> CellMap:
    names: Sequence[str] | None = getattr(model, "feature_names_in_", None)

    def through(method: str, samples: Tensor, condition: Any, **options: Any) -> Tensor:
        if condition is not None or options:
            given = "condition" if condition is not None else next(iter(options))
            raise ValueError(f"{given} is for MongeMap, and {type(model).__name__} has none: leave it out")
        array: Any = samples.numpy()
        if names is not None:
            array = library("pandas", "a transformer of named features", "files").DataFrame(array, columns=names)
        return torch.from_numpy(np.array(getattr(model, method)(array)))

    return CellMap(
        type(model).__name__, None if names is None else tuple(map(str, names)), getattr(model, "n_features_in_", None),
        lambda x, condition, rows: through("transform", x, condition),
        (lambda x, condition, **options: through("inverse_transform", x, condition, **options))
        if hasattr(model, "inverse_transform") else None,
    )  # fmt: skip


def written_conditions(condition: Any, columns: Sequence[str]) -> dict[str, Any]:
    """Return the columns of ``obs`` that say under which conditions cells were mapped."""
    if not isinstance(condition, Mapping):
        if len(columns) != 1:
            raise ValueError(
                f"condition_key names {len(columns)} columns, and condition is {condition!r}: give a value for each, "
                f"as in {{{columns[0]!r}: ...}}"
            )
        return {columns[0]: condition}
    missing = [name for name in columns if name not in condition]
    if missing:
        raise ValueError(f"condition has no {missing[0]!r}, which condition_key names: give it")
    return {name: condition[name] for name in columns}
