"""What a table of samples is read from: arrays, data frames, AnnData, and files of them."""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_gap.monge.samples.features import feature_places
from lightning_gap.monge.samples.files.anndata import InFile, InMemory, anndata_table, dense_rows, within_h5ad
from lightning_gap.monge.samples.files.frames import FRAME_SUFFIXES, check_columns, frame_table, open_frame_file
from lightning_gap.monge.samples.files.table import Table, as_tensor, first_line, there_is

__all__ = ["is_file", "open_frame", "open_table", "read_matrix", "read_vector", "resolve_file"]

Array = NDArray[Any]

# What stands after this in a path names an array within the file: "cells.npz::counts", "cells.h5ad::obsm/X_pca".
_WITHIN = "::"
_SUFFIXES = (".npy", ".npz", *FRAME_SUFFIXES, ".h5ad")


def is_file(data: object) -> bool:
    """Return whether ``data`` is a path."""
    return isinstance(data, str | Path)


def open_table(
    argument: str,
    data: Any,
    *,
    columns: Sequence[str] | None = None,
    layer: str | None = None,
    obsm: str | None = None,
    labels: Iterable[str] = (),
) -> Table:
    """Return the table of an array, tensor, sparse matrix, data frame, AnnData, or a path to a file of one.

    Args:
        argument: The caller's argument, for messages.
        data: What to read. After ``::`` a path names an array within an ``.npz`` or ``.h5ad`` file.
        columns: Names of the features, in this order; by default all that are no labels.
        layer: Layer of AnnData; its ``X`` by default.
        obsm: Embedding of AnnData, in place of a layer.
        labels: Names that are used as labels, hence are no features.

    Raises:
        FileNotFoundError: There is no such file.
        ModuleNotFoundError: The library that reads such files is not installed.
        TypeError: Samples are no real numbers.
        ValueError: The file is of another kind, or has no such array, layer, embedding or column.
    """
    if layer is not None and obsm is not None:
        raise ValueError(f"layer={layer!r} and obsm={obsm!r} exclude each other: give one")
    if isinstance(columns, str):
        raise TypeError(f"columns must be a list of names, got {columns!r}: write columns=[{columns!r}]")
    labels = frozenset(labels)
    data = _as_pandas(data)
    if is_file(data):
        table = _open_file(argument, str(data), columns, layer, obsm, labels)
    elif _is_instance(data, "pandas", "DataFrame"):
        _refuse_anndata_options(argument, layer, obsm)
        table = frame_table(argument, data, columns, labels)
    elif _is_instance(data, "anndata", "AnnData"):
        table = anndata_table(argument, InMemory(data), columns, layer, obsm)
    else:
        _refuse_anndata_options(argument, layer, obsm)
        if columns is not None:
            raise ValueError(f"columns are names, but {argument} has none: select them yourself, as in x[:, [0, 1]]")
        table = _array_table(argument, data)
    return table


def open_frame(argument: str, location: str) -> Any:
    """Return a ``.csv``, ``.tsv``, ``.parquet`` or ``.feather`` file as a data frame, with the names of its rows.

    Args:
        argument: The caller's argument, for messages.
        location: The path. Names of rows are those that pandas has for an index, or else in the first column.
    """
    path, suffix, within = resolve_file(argument, location)
    if within is not None or suffix not in FRAME_SUFFIXES:
        raise ValueError(f"{argument}: {location!r} is no .csv, .tsv, .parquet or .feather file")
    file = open_frame_file(f"{argument} ({path.name})", path, suffix)
    return file.read().set_index(file.row_names[0] if file.row_names else file.names[0])


def read_matrix(
    argument: str,
    data: Any,
    features: Sequence[str] | None = None,
    *,
    whose: str = "the map",
    layer: str | None = None,
    obsm: str | None = None,
) -> Tensor:
    """Return samples in memory as a tensor, float64 if they are that and float32 otherwise.

    Args:
        argument: The caller's argument, for messages.
        data: Array, sparse matrix, data frame or ``AnnData``. It may be empty.
        features: Which features are wanted, in this order, where ``data`` names its own; by default all as they stand.
        whose: How messages call what wants them.
        layer: Layer of ``AnnData``; ``X`` by default.
        obsm: Embedding of ``AnnData`` in place of a layer.

    Raises:
        TypeError: It is a path, or holds no real numbers.
        ValueError: A feature is missing, or a row is not finite.
    """
    if is_file(data):
        raise TypeError(
            f"{argument} must be a tensor, an array or a table, got {type(data).__name__}: read the file, or use "
            "lightning_gap.monge.transport_files.transport_file"
        )
    data = _as_pandas(data)
    if _is_instance(data, "anndata", "AnnData"):
        if layer is None and obsm is None and len(data.layers):
            raise ValueError(
                f"{argument} has X and the layers {', '.join(map(repr, data.layers))}: say which one {whose} was "
                "trained on, by layer='X', another layer=, or obsm="
            )
        layer = None if layer == "X" and "X" not in data.layers else layer
    remedy = f"to go by place, give an array, {argument}.to_numpy()"
    if features is not None and _is_instance(data, "pandas", "DataFrame"):
        names = [str(name) for name in data.columns]
        places = feature_places(argument, names, features, whose, remedy=remedy)
        table = open_table(argument, data, columns=None if places is None else features, layer=layer, obsm=obsm)
    else:
        table = open_table(argument, data, layer=layer, obsm=obsm)
        if feature_places(argument, table.features, features, whose, remedy=remedy) is not None:
            table = open_table(argument, data, columns=features, layer=layer, obsm=obsm)
    return table.read(None)


def read_vector(argument: str, data: Any) -> Array:
    """Return a one-dimensional array, from memory or from an ``.npy`` or ``.npz`` file.

    Args:
        argument: The caller's argument, for messages.
        data: Array, tensor, sequence, pandas series, or path.
    """
    if is_file(data):
        path, suffix, within = resolve_file(argument, str(data))
        if suffix not in (".npy", ".npz"):
            raise ValueError(f"{argument}: {path} is no .npy or .npz file; give the name of a column, or an array")
        data = _load_npy(argument, path, mmap=False) if suffix == ".npy" else _load_npz(argument, path, within)
    array = data.detach().cpu().numpy() if isinstance(data, Tensor) else np.asarray(data)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"{argument} must have one entry a row, got shape {array.shape}")
    return array


def _open_file(
    argument: str,
    location: str,
    columns: Sequence[str] | None,
    layer: str | None,
    obsm: str | None,
    labels: frozenset[str],
) -> Table:
    path, suffix, within = resolve_file(argument, location)
    title = f"{argument} ({path.name})"
    if suffix == ".h5ad":
        if within is not None:
            if layer is not None or obsm is not None:
                raise ValueError(f"{argument}: {location!r} names an array already; leave out layer and obsm")
            layer, obsm = within_h5ad(argument, within)
        return anndata_table(title, InFile(path), columns, layer, obsm)
    _refuse_anndata_options(title, layer, obsm)
    if suffix in (".npy", ".npz") and columns is not None:
        raise ValueError(f"columns are names, but {title} has none: use a .csv or .parquet file, or select before")
    if suffix == ".npz":
        return _npz_table(title, path, within)
    if within is not None:
        raise ValueError(f"{argument}: only .npz and .h5ad files hold named arrays, got {location!r}")
    if suffix == ".npy":
        return _array_table(title, _load_npy(title, path, mmap=True))
    file = open_frame_file(title, path, suffix)
    names = None if columns is None else [str(name) for name in columns]
    check_columns(title, names, file.names)
    return frame_table(title, file.read(None if names is None else [*names, *labels]), names, labels, file.row_names)


def resolve_file(argument: str, location: str) -> tuple[Path, str, str | None]:
    """Return the path of a file, its kind, and the name of an array within it.

    Args:
        argument: The caller's argument, for messages.
        location: The path, and after ``::`` a name within.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is of another kind, or empty.
    """
    name, _, within = location.partition(_WITHIN)
    path = Path(name).expanduser()
    suffix = next((s for s in sorted(_SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(s)), None)
    if suffix is None:
        raise ValueError(f"{argument}: cannot read {name!r}: the name must end in one of {', '.join(_SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: there is no file {str(path)!r} in {str(Path.cwd())!r}")
    if path.stat().st_size == 0:
        raise ValueError(f"{argument}: the file {str(path)!r} is empty")
    return path, suffix, within or None


def _is_instance(data: object, module: str, name: str) -> bool:
    """Return whether ``data`` is of a class of an optional library, which is not imported for the question."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(data, getattr(loaded, name))


def _as_pandas(data: Any) -> Any:
    """Return a data frame of polars or arrow as one of pandas: as an array it has no names."""
    named = hasattr(data, "columns") or hasattr(data, "column_names")
    return data.to_pandas() if named and callable(getattr(data, "to_pandas", None)) else data


def _refuse_anndata_options(title: str, layer: str | None, obsm: str | None) -> None:
    if layer is not None or obsm is not None:
        option = f"layer={layer!r}" if layer is not None else f"obsm={obsm!r}"
        raise ValueError(f"{option} is for AnnData and .h5ad files, but {title} is none: leave it out")


def _array_table(title: str, data: Any) -> Table:
    if isinstance(data, Tensor):
        tensor = data.detach()
        if tensor.is_complex():
            raise TypeError(f"{title} must hold real numbers, got a tensor of {tensor.dtype}: convert it first")
        return _plain_table(title, len(tensor) if tensor.dim() else 0, lambda rows: _tensor_rows(tensor, rows))
    if hasattr(data, "tocsr"):
        return _sparse_table(title, data.tocsr())
    array = np.asarray(data)
    _check_real(title, array)
    return _plain_table(title, len(array) if array.ndim else 0, lambda rows: as_tensor(_array_rows(array, rows)))


def _sparse_table(title: str, matrix: Any) -> Table:
    length, width = (int(size) for size in matrix.shape)

    def read(rows: Array | None) -> Tensor:
        return torch.from_numpy(dense_rows(title, matrix, np.arange(length) if rows is None else rows, None, width))

    return _plain_table(title, length, read)


def _plain_table(title: str, length: int, read: Callable[[Array | None], Tensor]) -> Table:
    return Table(title, length, None, (), read, lambda name: np.empty(0))


def _tensor_rows(tensor: Tensor, rows: Array | None) -> Tensor:
    # A copy in every case: later changes to the tensor do no harm.
    chosen = tensor.clone() if rows is None else tensor[torch.from_numpy(rows).to(tensor.device)]
    return chosen if chosen.dtype == torch.float64 else chosen.float()


def _array_rows(array: Array, rows: Array | None) -> Array:
    return array if rows is None else array[rows]


def _check_real(title: str, array: Array) -> None:
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{title} must hold real numbers, got an array of {array.dtype}: convert it first")


def _load_npy(title: str, path: Path, *, mmap: bool) -> Array:
    try:
        array: Array = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{title}: cannot read {str(path)!r}: {first_line(error)}") from error
    return array


def _load_npz(title: str, path: Path, within: str | None) -> Array:
    shapes = _npz_shapes(title, path)
    if within is None and len(shapes) > 1:
        raise ValueError(f"{title} holds several arrays: name one, as in '{path.name}::{next(iter(shapes))}'")
    name = next(iter(shapes)) if within is None else within
    if name not in shapes:
        raise ValueError(f"{title} holds no array {name!r}; {there_is(shapes)}")
    return _npz_array(title, path, name)


def _npz_array(title: str, path: Path, name: str) -> Array:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            array: Array = arrays[name]
    except ValueError as error:
        raise ValueError(f"{title}: cannot read the array {name!r}: {first_line(error)}") from error
    return array


def _npz_shapes(title: str, path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays in a file, from their headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                with arrays.zip.open(f"{name}.npy" if f"{name}.npy" in arrays.zip.namelist() else name) as file:
                    version = np.lib.format.read_magic(file)
                    header = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0
                    )
                    shapes[name] = header(file)[0]
    except Exception as error:
        raise ValueError(f"{title}: cannot read {str(path)!r} as an .npz file: {first_line(error)}") from error
    if not shapes:
        raise ValueError(f"{title} holds no arrays")
    return shapes


def _npz_table(title: str, path: Path, within: str | None) -> Table:
    shapes = _npz_shapes(title, path)
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    if within is None:
        if len(shapes) > 1 and len(matrices) != 1:
            listed = ", ".join(f"{name!r} {shape}" for name, shape in list(shapes.items())[:12])
            raise ValueError(
                f"{title} holds several arrays ({listed}): name one, as in "
                f"'{path.name}{_WITHIN}{(matrices or list(shapes))[0]}'"
            )
        within = matrices[0] if matrices else next(iter(shapes))
    if within not in shapes:
        raise ValueError(f"{title} holds no array {within!r}; {there_is(shapes)}")
    name = within
    title = f"{title}{_WITHIN}{name}" if len(shapes) > 1 else title
    array = _npz_array(title, path, name)
    _check_real(title, array)
    length = len(array) if array.ndim else 0
    beside = tuple(other for other, shape in shapes.items() if shape == (length,) and other != name)
    return Table(
        title,
        length,
        None,
        beside,
        lambda rows: as_tensor(_array_rows(array, rows)),
        lambda label: _npz_array(title, path, label),
    )
