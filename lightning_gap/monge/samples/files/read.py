"""What a table of samples is read from: arrays, data frames, AnnData, and files of them."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_gap.monge.samples.features import feature_places, names_of
from lightning_gap.monge.samples.files.arrays import NPY, NPZ, array_table, load_array
from lightning_gap.monge.samples.files.arrow import FEATHER, PARQUET
from lightning_gap.monge.samples.files.frames import frame_table
from lightning_gap.monge.samples.files.h5ad import H5AD, InFile, InMemory, anndata_table
from lightning_gap.monge.samples.files.table import Format, Reading, Table
from lightning_gap.monge.samples.files.text import TEXT

__all__ = [
    "FORMATS",
    "is_file",
    "open_anndata",
    "open_file",
    "open_frame",
    "open_table",
    "read_matrix",
    "read_vector",
    "suffix_of",
]

Array = NDArray[Any]

FORMATS: dict[str, Format] = {
    ".npy": NPY, ".npz": NPZ, ".csv": TEXT, ".csv.gz": TEXT, ".tsv": TEXT, ".tsv.gz": TEXT, ".parquet": PARQUET,
    ".feather": FEATHER, ".h5ad": H5AD,
}  # fmt: skip
# What stands after this in a path names an array within the file: "cells.npz::counts", "cells.h5ad::obsm/X_pca".
_WITHIN = "::"
_DEFAULT = Reading()


def is_file(data: object) -> bool:
    """Return whether ``data`` is a path."""
    return isinstance(data, str | Path)


def suffix_of(path: Path) -> str | None:
    """Return the ending of a path that tells its format; ``None`` for any other."""
    name = path.name.lower()
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), None)


def open_table(argument: str, data: Any, reading: Reading = _DEFAULT) -> Table:
    """Return the table of an array, tensor, sparse matrix, data frame, AnnData, or a path to a file of one."""
    if is_file(data):
        return open_file(argument, str(data), reading).whole()
    data = _as_pandas(data)
    if _is_instance(data, "anndata", "AnnData"):
        return anndata_table(argument, InMemory(data), reading)
    _refuse_anndata_options(argument, reading)
    make = frame_table if _is_instance(data, "pandas", "DataFrame") else array_table
    return make(argument, data, reading)


def open_file(argument: str, location: str, reading: Reading = _DEFAULT) -> Table:
    """Return the table of a file, of which no row is read yet but for an ``.npz`` file."""
    path, form, within = _resolved(argument, location)
    title = f"{argument} ({path.name})"
    if not form.holds_anndata:
        _refuse_anndata_options(title, reading)
    if within is not None and not form.holds_named:
        raise ValueError(f"{argument}: only .npz and .h5ad files hold named arrays, got {location!r}")
    return form.open(title, path, within, reading)


def open_anndata(argument: str, data: Any) -> tuple[str, InMemory | InFile]:
    """Return how messages call an ``AnnData`` or the ``.h5ad`` file at a path, and what it holds."""
    if is_file(data):
        path, form, within = _resolved(argument, str(data))
        if form is not H5AD:
            raise ValueError(f"{argument}: {str(path)!r} is no .h5ad file: give AnnData, or the path to such a file")
        if within is not None:
            raise ValueError(f"{argument}: '::{within}' is not for here: give layer= or obsm=")
        return f"{argument} ({path.name})", InFile(path)
    if not _is_instance(data, "anndata", "AnnData"):
        raise TypeError(f"{argument} must be AnnData or the path to an .h5ad file, got {type(data).__name__}")
    return argument, InMemory(data)


def open_frame(argument: str, location: str) -> Any:
    """Return a file of a table as a data frame, with its names of rows or else its first column as index."""
    path, form, within = _resolved(argument, location)
    if within is not None or form.frame is None:
        raise ValueError(f"{argument}: {location!r} is no .csv, .tsv, .parquet or .feather file")
    file = form.frame(f"{argument} ({path.name})", path)
    return next(file.frames(None, file.names, ())).set_index((file.row_names or file.names)[0])


def read_matrix(
    argument: str,
    data: Any,
    features: tuple[str, ...] | list[str] | None = None,
    *,
    whose: str = "the map",
    layer: str | None = None,
    obsm: str | None = None,
) -> Tensor:
    """Return samples in memory as a tensor, float64 if they are that and float32 otherwise.

    Where ``data`` names its features, the wanted ones are taken in their order; messages call what wants them
    ``whose``.
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
    reading, remedy = Reading(layer=layer, obsm=obsm), f"to go by place, give an array, {argument}.to_numpy()"
    framed = features is not None and _is_instance(data, "pandas", "DataFrame")
    # Of a data frame the names come first: columns that are not wanted may hold anything.
    table = None if framed else open_table(argument, data, reading)
    given = names_of(data) if table is None else table.features
    if feature_places(argument, given, features, whose, remedy=remedy) is not None:
        table = open_table(argument, data, replace(reading, columns=features))
    return (open_table(argument, data, reading) if table is None else table).read(None)


def read_vector(argument: str, data: Any) -> Array:
    """Return a one-dimensional array, from memory or from an ``.npy`` or ``.npz`` file."""
    if is_file(data):
        path, form, within = _resolved(argument, str(data))
        if form not in (NPY, NPZ):
            raise ValueError(f"{argument}: {path} is no .npy or .npz file; give the name of a column, or an array")
        data = load_array(argument, path, within)
    array = data.detach().cpu().numpy() if isinstance(data, Tensor) else np.asarray(data)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"{argument} must have one entry a row, got shape {array.shape}")
    return array


def _resolved(argument: str, location: str) -> tuple[Path, Format, str | None]:
    """Return the path of a file that exists, its format, and the name of an array within it."""
    name, _, within = location.partition(_WITHIN)
    path = Path(name).expanduser()
    suffix = suffix_of(path)
    if suffix is None:
        raise ValueError(f"{argument}: cannot read {name!r}: the name must end in one of {', '.join(FORMATS)}")
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: there is no file {str(path)!r} in {str(Path.cwd())!r}")
    if path.stat().st_size == 0:
        raise ValueError(f"{argument}: the file {str(path)!r} is empty")
    return path, FORMATS[suffix], within or None


def _is_instance(data: object, module: str, name: str) -> bool:
    """Return whether ``data`` is of a class of an optional library, which is not imported for the question."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(data, getattr(loaded, name))


def _as_pandas(data: Any) -> Any:
    """Return a data frame of polars or arrow as one of pandas: as an array it has no names."""
    named = hasattr(data, "columns") or hasattr(data, "column_names")
    return data.to_pandas() if named and callable(getattr(data, "to_pandas", None)) else data


def _refuse_anndata_options(title: str, reading: Reading) -> None:
    for option in ("layer", "obsm"):
        value = getattr(reading, option)
        if value is not None:
            raise ValueError(f"{option}={value!r} is for AnnData and .h5ad files, but {title} is none: leave it out")
