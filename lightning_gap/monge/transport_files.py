"""A trained map, from its checkpoint, applied to a file of samples."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_gap.checks import check_count
from lightning_gap.monge.checkpoint_files import read_checkpoint
from lightning_gap.monge.module import MongeMap
from lightning_gap.monge.samples.conditions import label_indices, place_of
from lightning_gap.monge.samples.files.stream import Block, RowFile, open_rows
from lightning_gap.monge.samples.files.table import as_texts
from lightning_gap.monge.samples.files.write import Output

__all__ = ["load_map", "transport_file"]

Conditions = Callable[[Block], Tensor | None]


def load_map(path: str | Path, *, device: str | torch.device = "cpu") -> MongeMap:
    """Return the map of a checkpoint, on a device.

    Args:
        path: The file.
        device: Where to put it.

    Raises:
        FileNotFoundError: There is no such file.
        MisconfigurationException: Its network was one of the user's own, which a checkpoint does not hold.
        ValueError: It is damaged, no checkpoint of a :class:`MongeMap`, or asks for more than this package's own
            classes.
    """
    read_checkpoint(path)
    return MongeMap.load_from_checkpoint(Path(path).expanduser(), map_location=torch.device(device))


def transport_file(
    model: MongeMap,
    source: str | Path,
    output: str | Path,
    *,
    condition: str | None = None,
    columns: Sequence[str] | None = None,
    batch_size: int = 8192,
    overwrite: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> int:
    """Write the images of the samples in a file, in constant memory.

    The next block is read and the last one written while the network maps this one. The output gets its name only when
    it is complete. In tables and AnnData, everything but the samples is kept as it is.

    Features are matched by name where map and source both name them: in whatever order the source has them, and with a
    warning of what else it has. Without names on one side they go by place.

    Args:
        model: The map, on its device.
        source: Path to an ``.npy``, ``.npz``, ``.csv``, ``.tsv``, ``.parquet``, ``.feather`` or ``.h5ad`` file; after
            ``::`` it names an array within an ``.npz`` or ``.h5ad`` file.
        output: Path to an ``.npy``, ``.csv``, ``.tsv``, ``.parquet`` or ``.feather`` file; or, for an ``.h5ad`` source,
            to an ``.h5ad`` file.
        condition: For a conditional map: the name of the condition of all samples, or of the column of the source
            that holds each one's. For conditions that are vectors: numbers with commas between, or columns.
        columns: Names of the features in the source; by default those of the map, and where it has no names all
            columns of numbers that ``condition`` does not name. Names that the map does not know stand for its
            features by place.
        batch_size: Rows that go through the network at once.
        overwrite: Whether to replace a file that exists.
        progress: Called with the number of rows done, and of all where it is known.

    Returns:
        The number of rows.

    Raises:
        FileExistsError: The output exists.
        FileNotFoundError: There is no source.
        ModuleNotFoundError: A library for such files is missing.
        TypeError: Samples are no real numbers.
        ValueError: A feature is missing, dimensions do not fit, samples are not finite, the condition is not known, or
            the output cannot be written.

    Example:
        >>> from lightning_gap.monge.transport_files import load_map, transport_file
        >>> transport_file(load_map("map.ckpt"), "control.npy", "predicted.npy")  # doctest: +SKIP
        10000000
    """
    check_count("batch_size", batch_size)
    rows = open_rows(
        "IN", str(source), columns=columns, wanted=model.feature_names, labels=_label_columns(model, condition),
        least=batch_size,
    )  # fmt: skip
    label_names, conditions = _conditions(model, rows, condition)
    _check_dim(model, rows)
    if rows.features is None and model.feature_names is not None:
        rows = replace(rows, features=tuple(model.feature_names))
    written = Output("OUT", str(output), rows, overwrite=overwrite)
    try:
        done = _transport(model, rows.blocks(label_names), conditions, written, batch_size, rows.length, progress)
        written.keep()
    except BaseException:
        written.discard()
        raise
    return done


def _transport(
    model: MongeMap,
    blocks: Iterator[Block],
    conditions: Conditions,
    written: Output,
    batch_size: int,
    length: int | None,
    progress: Callable[[int, int | None], None] | None,
) -> int:
    done = 0
    with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(1) as writing:
        ahead: Future[Block | None] = reading.submit(next, blocks, None)
        behind: Future[None] | None = None
        while (block := ahead.result()) is not None:
            ahead = reading.submit(next, blocks, None)
            images = _images(model, block, conditions(block), batch_size)
            if behind is not None:
                behind.result()
            behind = writing.submit(written.write, block, images)
            done += len(images)
            if progress is not None:
                progress(done, length)
        if behind is not None:
            behind.result()
    return done


def _images(model: MongeMap, block: Block, condition: Tensor | None, batch_size: int) -> NDArray[Any]:
    images: NDArray[Any] = model.transport(block.samples, condition, batch_size=batch_size).numpy()
    return images


def _check_dim(model: MongeMap, rows: RowFile) -> None:
    """Refuse samples of another dimension, before any file is made."""
    dim = len(model.representation.mean) if model.representation is not None else getattr(model.map, "dim", None)
    if dim is not None and dim != rows.dim:
        named = f" ({', '.join(rows.features[:6])}{', ...' if rows.dim > 6 else ''})" if rows.features else ""
        remedy = ": name the features by --columns" if rows.features and rows.dim > dim else ""
        raise ValueError(f"the map takes {dim} features, and {rows.title} has {rows.dim}{named}{remedy}")


def _label_columns(model: MongeMap, given: str | None) -> list[str]:
    """Return the columns that a condition may name."""
    if given is None or place_of(given, _known(model)) is not None:
        return []
    return [given] if getattr(model.map, "condition_dim", None) is None else [word.strip() for word in given.split(",")]


def _known(model: MongeMap) -> list[str]:
    """Return the names of the labels."""
    if getattr(model.map, "condition_dim", None) is not None:
        return []
    return list(model.condition_names or ()) or [str(i) for i in range(getattr(model.map, "conditions", None) or 0)]


def _conditions(model: MongeMap, rows: RowFile, given: str | None) -> tuple[list[str], Conditions]:
    """Return which labels are wanted, and what makes conditions of them."""
    names = list(model.condition_names or ())
    if not getattr(model.map, "conditional", False):
        if given is not None:
            raise ValueError(f"--condition {given}: this map has no conditions: leave it out")
        return [], lambda block: None
    vector_dim = getattr(model.map, "condition_dim", None)
    if given is None:
        what = f"one of {', '.join(map(repr, names[:12]))}" if names and vector_dim is None else "numbers"
        raise ValueError(f"this map is conditional: give --condition, {what}, or a column of IN")
    if vector_dim is not None:
        return _vectors(rows, given, vector_dim)
    known = _known(model)
    place = place_of(given, known)
    if place is not None:
        label = torch.tensor([place], device="cpu")
        return [], lambda block: label
    if given not in rows.label_names:
        columns = f", nor has {rows.title} such a column" if rows.label_names else ""
        raise ValueError(
            f"--condition {given}: the map has no such condition{columns}; its conditions are "
            f"{', '.join(map(repr, known[:12]))}"
        )
    return [given], lambda block: label_indices("--condition", _labels(block), known)


def _vectors(rows: RowFile, given: str, dim: int) -> tuple[list[str], Conditions]:
    words = [word.strip() for word in given.split(",")]
    if len(words) != dim:
        raise ValueError(f"--condition {given}: this map's conditions are {dim} numbers, got {len(words)}")
    if all(word in rows.label_names for word in words):
        return words, lambda block: _numbers(rows, block, given).reshape(-1, dim)
    try:
        vector = torch.tensor([[float(word) for word in words]], device="cpu")
    except ValueError:
        raise ValueError(
            f"--condition {given}: neither {dim} numbers nor columns of {rows.title}: give one or the other"
        ) from None
    if not bool(vector.isfinite().all()):
        raise ValueError(f"--condition {given}: give finite numbers")
    return [], lambda block: vector


def _labels(block: Block) -> NDArray[Any]:
    assert block.labels is not None
    return block.labels


def _numbers(rows: RowFile, block: Block, given: str) -> Tensor:
    labels = _labels(block)
    try:
        numbers = np.array(as_texts(labels.ravel()), dtype=np.float64)
    except ValueError:
        numbers = np.full(1, np.nan)
    if not np.isfinite(numbers).all():
        raise ValueError(
            f"--condition {given}: {rows.title} has something else than a finite number there, in rows "
            f"{block.start} to {block.start + len(labels) - 1}: correct it"
        )
    return torch.from_numpy(numbers).float()
