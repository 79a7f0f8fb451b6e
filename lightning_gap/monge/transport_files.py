"""A trained map, from its checkpoint, applied to a file of samples."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_gap.checks import check_integer
from lightning_gap.monge.checkpoint_files import read_checkpoint
from lightning_gap.monge.module import MongeMap
from lightning_gap.monge.samples.condition_values import vectors_asked_for
from lightning_gap.monge.samples.conditions import label_indices, place_of
from lightning_gap.monge.samples.features import listed
from lightning_gap.monge.samples.files.read import open_file
from lightning_gap.monge.samples.files.table import Reading, Table, as_texts
from lightning_gap.monge.samples.files.write import Output

__all__ = ["load_map", "transport_blocks", "transport_file"]

# The condition of each row of a block, or one for all.
Conditions = Callable[[Table], Tensor | None]

# Numbers of a block: 16 MiB in single precision.
_NUMBERS = 2**22


def load_map(path: str | Path, *, device: str | torch.device = "cpu") -> MongeMap:
    """Return the map of a checkpoint, or of a folder that :meth:`MongeMap.save_pretrained` wrote, on a device.

    Args:
        path: The file or the folder.
        device: Where to put it.

    Raises:
        FileNotFoundError: There is no such file.
        MisconfigurationException: Its network was one of the user's own, which a checkpoint does not hold.
        ValueError: It is damaged, no checkpoint of a :class:`MongeMap`, or asks for more than this package's own
            classes.
    """
    if (Path(path).expanduser() / "config.json").is_file():
        return MongeMap.from_pretrained(path).to(torch.device(device))
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
            that holds each one's. For conditions that are vectors: numbers with commas between, or columns; for those
            of named columns, such as drug and dose: ``"A, 10"``, or ``"drug,dose"`` for each one's.
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
    check_integer("batch_size", batch_size)
    return transport_blocks(
        model, source, output, condition=condition, columns=columns, batch_size=batch_size, overwrite=overwrite,
        progress=progress,
    )  # fmt: skip


def transport_blocks(
    model: MongeMap,
    source: str | Path,
    output: str | Path,
    *,
    condition: str | None = None,
    columns: Sequence[str] | None = None,
    batch_size: int = 8192,
    block_size: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
    part: Path | None = None,
    finished: Callable[[Path], None] | None = None,
) -> int:
    """Do what :func:`transport_file` does, ``block_size`` rows at once: by default what takes 16 MiB in float32.

    ``part`` is the file's name until it is complete; ``finished`` is called with it before it gets its own, and may
    raise.
    """
    labels = [] if condition is None or place_of(condition, _known(model)) is not None else _words(model, condition)
    reading = Reading(columns, labels=labels, wanted=model.feature_names, texts_pass=columns is None)
    table = open_file("IN", str(source), reading)
    if table.dim == 0 or table.length == 0:
        table.samples()  # says what is wrong
    conditions = _conditions(model, table, condition)
    _check_dim(model, table)
    if table.features is None and model.feature_names is not None:
        table = replace(table, features=tuple(model.feature_names))
    if block_size is None:
        block_size = max(1, _NUMBERS // max(table.dim, len(table.label_names)) // batch_size) * batch_size
    written = Output("OUT", str(output), table, overwrite=overwrite, part=part)
    try:
        done = _transport(model, table, block_size, conditions, written, batch_size, progress)
        written.keep(finished)
    except BaseException:
        written.discard()
        raise
    return done


def _transport(
    model: MongeMap,
    table: Table,
    block_size: int,
    conditions: Conditions,
    written: Output,
    batch_size: int,
    progress: Callable[[int, int | None], None] | None,
) -> int:
    blocks, done = table.blocks(block_size), 0

    def read() -> tuple[Table, Tensor, Tensor | None] | None:
        block = next(blocks, None)
        return None if block is None else (block, block.samples(), conditions(block))

    with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(1) as writing:
        ahead = reading.submit(read)
        behind: Future[None] | None = None
        while (found := ahead.result()) is not None:
            block, samples, condition = found
            ahead = reading.submit(read)
            images = model.transport(samples, condition, batch_size=batch_size).numpy()
            if behind is not None:
                behind.result()
            behind = writing.submit(written.write, block, images)
            done += len(images)
            if progress is not None:
                progress(done, table.length)
        if behind is not None:
            behind.result()
    return done


def _check_dim(model: MongeMap, table: Table) -> None:
    """Refuse samples of another dimension, before any file is made."""
    dim = len(model.representation.mean) if model.representation is not None else getattr(model.map, "dim", None)
    if dim is not None and dim != table.dim:
        named = f" ({', '.join(table.features[:6])}{', ...' if table.dim > 6 else ''})" if table.features else ""
        remedy = ": name the features by --columns" if table.features and table.dim > dim else ""
        raise ValueError(f"the map takes {dim} features, and {table.title} has {table.dim}{named}{remedy}")


def _words(model: MongeMap, given: str) -> list[str]:
    """Return the columns that a condition may name: several, for the numbers of a vector."""
    return [given] if getattr(model.map, "condition_dim", None) is None else [word.strip() for word in given.split(",")]


def _known(model: MongeMap) -> list[str]:
    """Return the names of the labels."""
    if getattr(model.map, "condition_dim", None) is not None:
        return []
    return list(model.condition_names or ()) or [str(i) for i in range(getattr(model.map, "conditions", None) or 0)]


def _conditions(model: MongeMap, table: Table, given: str | None) -> Conditions:
    """Return what makes conditions of a block's labels, or one for all rows."""
    known, dim = _known(model), getattr(model.map, "condition_dim", None)
    if not getattr(model.map, "conditional", False):
        if given is not None:
            raise ValueError(f"--condition {given}: this map has no conditions: leave it out")
        return lambda block: None
    if given is None:
        what = f"one of {listed(known, 12)}" if known and model.condition_names else "numbers"
        if model.condition_encoding is not None:
            what = f"values of {listed(model.condition_encoding.names)} with commas between"
        raise ValueError(f"this map is conditional: give --condition, {what}, or a column of IN")
    words, encoding = _words(model, given), model.condition_encoding
    if encoding is not None:
        if set(words) == set(encoding.names) and all(word in table.label_names for word in words):
            return lambda block: vectors_asked_for({w: block.label(w) for w in words}, len(block), encoding)
        asked = vectors_asked_for(given, 1, encoding)
        return lambda block: asked
    if dim is not None and len(words) != dim:
        raise ValueError(f"--condition {given}: this map's conditions are {dim} numbers, got {len(words)}")
    place = place_of(given, known)
    if place is None and all(word in table.label_names for word in words):
        if dim is not None:
            return lambda block: _vectors(block, words, given)
        return lambda block: label_indices("--condition", _labels(block, given), known)
    if dim is None and place is None:
        columns = f", nor has {table.title} such a column" if table.label_names else ""
        raise ValueError(
            f"--condition {given}: the map has no such condition{columns}; its conditions are {listed(known, 12)}"
        )
    one = torch.tensor([place], device="cpu") if dim is None else _vector(table, words, given)
    return lambda block: one


def _labels(block: Table, column: str) -> NDArray[Any]:
    labels = as_texts(block.label(column))
    missing = np.flatnonzero(labels == "")
    if missing.size:
        row = (block.start or 0) + int(missing[0])
        raise ValueError(
            f"--condition {column}: {block.title} has nothing there in row {row}: fill it in, or leave such rows out"
        )
    return labels


def _vector(table: Table, words: Sequence[str], given: str) -> Tensor:
    try:
        vector = torch.tensor([[float(word) for word in words]], device="cpu")
    except ValueError:
        raise ValueError(
            f"--condition {given}: neither {len(words)} numbers nor columns of {table.title}: give one or the other"
        ) from None
    if not bool(vector.isfinite().all()):
        raise ValueError(f"--condition {given}: give finite numbers")
    return vector


def _vectors(block: Table, words: Sequence[str], given: str) -> Tensor:
    labels = np.stack([as_texts(block.label(word)) for word in words], axis=1)
    try:
        numbers = labels.astype(np.float64)
    except ValueError:
        numbers = np.full(labels.shape, np.nan)
    if not np.isfinite(numbers).all():
        start = block.start or 0
        raise ValueError(
            f"--condition {given}: {block.title} has something else than a finite number there, in rows "
            f"{start} to {start + len(labels) - 1}: correct it"
        )
    return torch.from_numpy(numbers).float()
