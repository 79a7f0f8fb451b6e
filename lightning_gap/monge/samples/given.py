"""The source and the target as they are given: samples, and what is known of each row."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lightning_gap.monge.samples.combinations import LabelColumns, as_columns
from lightning_gap.monge.samples.draws import Endless, SampledSamples, StreamedSamples, map_images
from lightning_gap.monge.samples.features import feature_places, listed
from lightning_gap.monge.samples.files.read import is_file, open_table, read_vector
from lightning_gap.monge.samples.files.table import Reading, Table, as_texts, there_is, titled

__all__ = ["KnownMap", "Sampler", "Samples", "Side", "is_stream", "read_sides"]

Array = NDArray[Any]

_FEW = 256  # samples that tell whether all are counts


class Sampler(Protocol):
    """Draws samples."""

    def __call__(self, n: int, generator: torch.Generator, /) -> Any:
        """Return ``(n, d)`` samples."""


class KnownMap(Protocol):
    """Maps samples."""

    def __call__(self, samples: Tensor, /) -> Any:
        """Return their images."""


# Functions before text: a configuration file names them by their import path. As protocols, since a plain callable
# would claim all text when a configuration is written.
Samples: TypeAlias = Sampler | str | Path | ArrayLike | Tensor | Iterable[Any]


@dataclass(frozen=True, eq=False)
class Side:
    """The rows of one population."""

    title: str  # how messages call it: the argument, and the file
    samples: Tensor  # (n, d), raw
    features: tuple[str, ...] | None = None
    weights: Tensor | None = None  # (n,), not negative
    conditions: Array | None = None  # (n,) names
    groups: Array | None = None  # (n,) names
    images: Tensor | None = None  # (n, d), known
    label_columns: LabelColumns | None = None  # of which the names of conditions are combinations

    def moved(self, like: Tensor) -> "Side":
        """Return the same rows on the device and in the precision of a tensor."""
        weights, images = (None if x is None else x.to(like) for x in (self.weights, self.images))
        return replace(self, samples=self.samples.to(like), weights=weights, images=images)


def is_stream(data: object) -> bool:
    """Return whether ``data`` is a sampler or an iterable of samples rather than the samples themselves."""
    if is_file(data) or isinstance(data, Tensor | np.ndarray | Sequence):
        return False
    if hasattr(data, "__array__") or hasattr(data, "tocsr"):
        return False
    return callable(data) or (isinstance(data, Iterable) and not hasattr(data, "obs"))


def read_sides(
    source: Any,
    target: Any,
    reading: Reading,
    *,
    prefix: str = "",
    rows: tuple[Mapping[str, Any] | None, Mapping[str, Any] | None] = (None, None),
    weights: Any = None,
    conditions: Any = None,
    condition_key: Collection[str] = (),
    condition_column: str | None = None,
    groups: Any = None,
    true_images: Any = None,
    like: Side | None = None,
) -> tuple[Side | Endless, Side | Endless]:
    """Return both sides, of rows or endless; a file that holds both is read once.

    The arguments are those of :class:`SamplesDataModule`, named in messages after ``prefix``; ``condition_key`` are the
    columns alone, ``condition_column`` is how labels of one column are called if they have vectors, and ``like`` is a
    side whose features both are to have, in its order.
    """
    pairs = {
        name: _pair(prefix + name, given)
        for name, given in (("weights", weights), ("conditions", conditions), ("groups", groups))
    }
    sides: list[Side | Endless] = []
    opened: dict[str, Table] = {}
    counts: list[str] = []
    layers: list[tuple[str, ...]] = []
    for i, (argument, data) in enumerate((("source", source), ("target", target))):
        labels = {name: pair[i] for name, pair in pairs.items()}
        if condition_column is not None and labels["conditions"] is not None and not as_columns(labels["conditions"]):
            labels["conditions"] = {condition_column: labels["conditions"]}
        images = true_images if i == 0 else None
        if is_stream(data):
            sides.append(_endless(prefix, argument, data, rows[i], labels, images))
            continue
        named = (*labels.values(), *(as_columns(labels["conditions"]) or {}).values())
        names = [given for given in named if isinstance(given, str)]
        selected = rows[i]
        names += list(selected) if isinstance(selected, Mapping) else []
        names += condition_key
        key = f"{data} {sorted(names)}"
        if is_file(data) and key in opened:
            table = titled(opened[key], prefix + argument)
        else:
            table = opened[key] = open_table(prefix + argument, data, replace(reading, labels=names))
        keys = [name for name in condition_key if i == 1 or name in table.label_names]
        side = _read_side(prefix, argument, table, selected, labels, images, keys)
        if table.layers is not None and _are_counts(side.samples):
            counts.append(side.title)
            layers.append(table.layers)
        sides.append(side if like is None else _with_features(side, like))
    # Once: of samples for validation only where those of training are none.
    if counts and (like is None or not _are_counts(like.samples)):
        others = [name for name in layers[0] if all(name in each for each in layers)]
        rank_zero_warn(
            f"{counts[0]} holds counts, of which a few genes with many decide distances and maps: name a layer with "
            f"logarithms of normalized counts{f' ({there_is(others)})' if others else ''}, or make one by "
            "scanpy.pp.normalize_total and scanpy.pp.log1p"
        )
    if condition_key:
        if not isinstance(sides[1], Side):
            raise ValueError(f"{prefix}condition_key are of rows, and target is a sampler: leave it out")
        if isinstance(sides[0], Side):
            sides[0] = _with_what_it_tells(sides[0], sides[1], condition_key)
    return _aligned(sides[0], sides[1])


def _are_counts(samples: Tensor) -> bool:
    """Return whether the first samples are whole numbers from 0 on, and not of two values only, as presences are."""
    some = samples[:_FEW]
    return bool((some >= 0).all() and (some == some.round()).all() and some.max() > 1)


def _with_what_it_tells(source: Side, target: Side, key: Collection[str]) -> Side:
    """Return the source with those columns of its labels that have values of the target: a control has no dose."""
    mine, theirs = source.label_columns, target.label_columns
    told = [] if mine is None or theirs is None else [
        name for name in mine.names if set(np.unique(mine.values[name])) & set(np.unique(theirs.values[name]))
    ]  # fmt: skip
    rest = [name for name in key if name not in told]
    if rest:
        rank_zero_info(f"condition_key: {source.title} serves every {' and '.join(rest)}, of which it has no value")
    return _labelled(source, None if mine is None else mine.only(told), "")


def _labelled(side: Side, columns: LabelColumns | None, argument: str, rows: Array | None = None) -> Side:
    """Return a side whose conditions are the combinations of some columns."""
    if columns is None:
        return replace(side, conditions=None, label_columns=None)
    for name, texts in columns.values.items():
        _refuse_missing(f"{name!r} of the {argument}", texts, rows)
    return replace(side, conditions=columns.combined()[0], label_columns=columns)


def _endless(prefix: str, argument: str, data: Any, rows: Any, labels: Mapping[str, Any], true_images: Any) -> Endless:
    for name, given in labels.items():
        if given is not None:
            raise ValueError(f"{prefix}{name} are of rows, and {argument} is a sampler: leave them out")
    if rows is not None:
        raise ValueError(f"{argument}_rows selects rows, and {argument} is a sampler: leave it out")
    if true_images is not None and not callable(true_images):
        raise TypeError(f"{prefix}true_images must be a function where source is a sampler, got an array of images")
    if callable(data):
        return SampledSamples(argument, data, true_images)
    return StreamedSamples(argument, data, 0, true_images)


def _pair(argument: str, given: Any) -> tuple[Any, Any]:
    if given is None or isinstance(given, str):
        return given, given
    if isinstance(given, tuple | list) and len(given) == 2:
        return given[0], given[1]
    raise TypeError(
        f"{argument} must be the name of a column, or a pair (of the source, of the target), got "
        f"{type(given).__name__}: write {argument}=(a, b)"
    )


def _read_side(
    prefix: str,
    side: str,
    table: Table,
    rows: Mapping[str, Any] | None,
    labels: Mapping[str, Any],
    true_images: Any,
    condition_key: Sequence[str] = (),
) -> Side:
    chosen = table.rows(f"{side}_rows", rows)
    columns: dict[str, Any] | None = as_columns(labels["conditions"])
    if columns is not None:
        labels = {**labels, "conditions": None}
    columns = {name: name for name in condition_key} or columns
    found = {name: _of_rows(prefix + name, side, table, given, chosen) for name, given in labels.items()}
    samples = table.samples(chosen)
    made = Side(
        table.title,
        samples,
        table.features,
        None if found["weights"] is None else _as_weights(f"{prefix}weights of the {side}", found["weights"], samples),
        _as_names(_titled(prefix, "conditions", labels, side), found["conditions"], chosen),
        _as_names(_titled(prefix, "groups", labels, side), found["groups"], chosen),
        _images(prefix, side, table, chosen, samples, true_images),
    )
    if not columns:
        return made
    values = {}
    for name, given in columns.items():
        argument = prefix + ("condition_key" if condition_key else f"conditions[{name!r}]")
        texts = _of_rows(argument, side, table, given, chosen)
        # A control may have no dose in any row.
        if texts is not None and not (condition_key and side == "source" and (as_texts(texts) == "").all()):
            values[name] = texts
    return _labelled(made, LabelColumns.of(values) if values else None, side, chosen)


def _images(
    prefix: str, side: str, table: Table, rows: Array | None, samples: Tensor, true_images: Any
) -> Tensor | None:
    """Return the known images of a side's rows, its features in the same order."""
    if true_images is None:
        return None
    if callable(true_images):
        return map_images(side, true_images, samples)
    images = open_table(f"{prefix}true_images", true_images)
    if len(images) != len(table):
        raise ValueError(
            f"{images.title} has {len(images)} rows and {table.title} {len(table)}: they go together row by row"
        )
    remedy = "to go by place, give an array"
    places = feature_places(images.title, images.features, table.features, table.title, remedy=remedy)
    found = images.samples(rows).to(samples)
    if places is not None:
        found = found[:, torch.from_numpy(places).to(samples.device)]
    if found.shape != samples.shape:
        raise ValueError(
            f"{images.title} has shape {tuple(found.shape)} and {table.title} {tuple(samples.shape)}: they must agree"
        )
    return found


def _of_rows(argument: str, side: str, table: Table, given: Any, rows: Array | None) -> Array | None:
    if given is None:
        return None
    if isinstance(given, str) and (
        given in table.label_names or (not given.endswith((".npy", ".npz")) and "::" not in given)
    ):
        values = table.labels(argument, given)
    else:
        values = read_vector(f"{argument} of the {side}", given)
    if len(values) != len(table):
        raise ValueError(
            f"{argument} of the {side} has {len(values)} entries, but {table.title} has {len(table)} rows: "
            "give one entry a row"
        )
    return values if rows is None else values[rows]


def _titled(prefix: str, argument: str, labels: Mapping[str, Any], side: str) -> str:
    column = f" ({labels[argument]!r})" if isinstance(labels[argument], str) else ""
    return f"{prefix}{argument} of the {side}{column}"


def _as_names(argument: str, values: Array | None, rows: Array | None) -> Array | None:
    if values is None:
        return None
    names = as_texts(values)
    _refuse_missing(argument, names, rows)
    return names


def _refuse_missing(argument: str, names: Array, rows: Array | None) -> None:
    missing = np.flatnonzero(names == "")
    if len(missing):
        row = int(missing[0]) if rows is None else int(rows[missing[0]])
        raise ValueError(
            f"{argument} is missing in {len(missing)} of {len(names)} rows, first in row {row}: fill it in, "
            "or leave these rows out"
        )


def _as_weights(argument: str, values: Array, samples: Tensor) -> Tensor:
    try:
        weights = torch.from_numpy(np.array(values, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{argument} must be numbers, got {values[:3].tolist()!r}") from error
    bad = (~((weights >= 0) & weights.isfinite())).nonzero().flatten()
    if len(bad):
        row = int(bad[0])
        raise ValueError(
            f"{argument} must be finite and non-negative, got {float(weights[row])} in row {row}: correct it"
        )
    if not bool(weights.any()):
        raise ValueError(f"{argument} must not all be 0: give some samples a positive weight")
    return (weights / weights.mean()).to(samples)


def _aligned(source: Side | Endless, target: Side | Endless) -> tuple[Side | Endless, Side | Endless]:
    """Put the target's features in the source's order, and give both one precision."""
    if not isinstance(source, Side) or not isinstance(target, Side):
        return source, target
    here, there = source.features, target.features
    if source.samples.shape[1] != target.samples.shape[1]:
        only = [name for name in (here or ()) if name not in (there or ())]
        only += [name for name in (there or ()) if name not in (here or ())]
        named = here is not None and there is not None and bool(only)
        raise ValueError(
            f"{source.title} has dimension {source.samples.shape[1]} but {target.title} has "
            f"{target.samples.shape[1]}: they must agree"
            + (f"; {listed(only)} is in one of them only: name the features by columns=" if named else "")
        )
    if here is not None and there is not None and here != there:
        place = {name: i for i, name in enumerate(there)}
        missing = [name for name in here if name not in place]
        if missing or len(place) < len(there):
            what = f"{target.title} has no {missing[0]!r}" if missing else f"names in {target.title} repeat"
            raise ValueError(f"the features of {source.title} and {target.title} differ: {what}; name them by columns=")
        target = replace(target, samples=target.samples[:, [place[name] for name in here]], features=here)
    like = source.samples.new_empty(0, dtype=torch.promote_types(source.samples.dtype, target.samples.dtype))
    return source.moved(like), target.moved(like)


def _with_features(side: Side, like: Side) -> Side:
    """Return a side with the features of another, in its order."""
    remedy = "rename them, or give an array to go by place"
    places = feature_places(side.title, side.features, like.features, like.title, remedy=remedy)
    if places is None:
        return side
    index = torch.from_numpy(places).to(side.samples.device)
    images = None if side.images is None else side.images[:, index]
    return replace(side, samples=side.samples[:, index], features=like.features, images=images)
