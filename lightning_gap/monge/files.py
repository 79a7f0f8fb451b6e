"""Tables of samples: arrays, data frames, AnnData, and files of them, with the labels beside their rows."""

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Table", "as_texts", "is_file", "open_frame", "open_table", "read_vector", "titled"]

Array = NDArray[Any]

# What stands after this in a path names an array within the file: "cells.npz::counts", "cells.h5ad::obsm/X_pca".
_WITHIN = "::"
_SUFFIXES = (".npy", ".npz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet", ".h5ad")
# Numbers that are read at once where a file holds more than is wanted: 64 MiB in single precision.
_BLOCK = 2**24


@dataclass(frozen=True)
class Table:
    """Samples in rows, and labels of the rows. Samples are read when they are asked for.

    Attributes:
        title: How messages call it: the argument, and the file.
        length: Number of rows.
        features: Names of the columns of samples, where they have names.
        label_names: Names of the labels beside the rows.
        read: Returns the samples of some rows, in increasing order; of all where ``None``.
        label: Returns the labels of a name, one a row.
    """

    title: str
    length: int
    features: tuple[str, ...] | None
    label_names: tuple[str, ...]
    read: Callable[[Array | None], Tensor]
    label: Callable[[str], Array]

    def labels(self, argument: str, name: str) -> Array:
        """Return the labels called ``name``, which ``argument`` asks for."""
        if name not in self.label_names:
            raise ValueError(f"{argument}: {self.title} has no {name!r}; {_there_is(self.label_names)}")
        return self.label(name)

    def rows(self, argument: str, wanted: Mapping[str, Any] | None) -> Array | None:
        """Return the rows whose labels are among the wanted ones, ``{name: value or values}``; ``None`` for all."""
        if wanted is None:
            return None
        if not isinstance(wanted, Mapping) or not wanted:
            raise TypeError(f"{argument} must map a column to the values to keep, got {wanted!r}")
        keep = np.ones(self.length, dtype=bool)
        for name, values in wanted.items():
            labels = as_texts(self.labels(argument, name))
            values = [values] if isinstance(values, str) or not isinstance(values, Iterable) else list(values)
            texts = as_texts(np.array(values, dtype=object))
            for text in texts.tolist():
                if text not in labels:
                    raise ValueError(
                        f"{argument}: {name!r} of {self.title} is never {text!r}; "
                        f"{_there_is(np.unique(labels).tolist())}"
                    )
            keep &= np.isin(labels, texts)
        if not keep.any():
            raise ValueError(f"{argument}={dict(wanted)!r} leaves no row of {self.title}: ask for less at once")
        return np.flatnonzero(keep)

    def samples(self, rows: Array | None) -> Tensor:
        """Return the samples of some rows, float64 if they are stored so and float32 otherwise.

        Raises:
            TypeError: They are no real numbers.
            ValueError: They are no ``(n, d)`` matrix, there are none, or some are not finite (the rows are named).
        """
        samples = self.read(rows)
        if samples.dim() != 2:
            remedy = "add the missing dimension, as in x[:, None]" if samples.dim() == 1 else "flatten each sample"
            raise ValueError(f"{self.title} must have shape (n, d), got {tuple(samples.shape)}: {remedy}")
        if samples.numel() == 0:
            raise ValueError(f"{self.title} is empty, with shape {tuple(samples.shape)}: it needs at least one sample")
        finite = samples.isfinite()
        if not bool(finite.all()):
            bad = (~finite).any(dim=1).nonzero().flatten()
            where = [int(i) if rows is None else int(rows[int(i)]) for i in bad[:5]]
            shown = ", ".join(map(str, where)) + (", ..." if len(bad) > 5 else "")
            column = int((~finite[bad[0]]).nonzero()[0])
            first = f", first in {self.features[column]!r}" if self.features else ""
            raise ValueError(
                f"{self.title} holds NaN or infinity in {len(bad)} of {len(samples)} rows ({shown}{first}): "
                "remove or fill them; rows count from 0"
            )
        return samples


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
    """Return the table of an array, tensor, data frame, AnnData, or a path to a file of one.

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
    if is_file(data):
        table = _open_file(argument, str(data), columns, layer, obsm, labels)
    elif _is_instance(data, "pandas", "DataFrame"):
        _refuse_anndata_options(argument, layer, obsm)
        table = _frame_table(argument, data, columns, labels)
    elif _is_instance(data, "anndata", "AnnData"):
        table = _anndata_table(argument, _InMemory(data), columns, layer, obsm)
    else:
        _refuse_anndata_options(argument, layer, obsm)
        if columns is not None:
            raise ValueError(f"columns are names, but {argument} has none: select them yourself, as in x[:, [0, 1]]")
        table = _array_table(argument, data)
    return table


def open_frame(argument: str, location: str) -> Any:
    """Return a ``.csv``, ``.tsv`` or ``.parquet`` file as a data frame.

    Args:
        argument: The caller's argument, for messages.
        location: The path.
    """
    path, within = _resolve(argument, location)
    suffix = _suffix(path)
    if within is not None or suffix in (".npy", ".npz", ".h5ad"):
        raise ValueError(f"{argument}: {location!r} is no .csv, .tsv or .parquet file")
    return _load_frame(f"{argument} ({path.name})", path, suffix, None, frozenset())


def titled(table: Table, argument: str) -> Table:
    """Return the same table as another argument."""
    _, parenthesis, file = table.title.partition(" (")
    return replace(table, title=argument + parenthesis + file)


def read_vector(argument: str, data: Any) -> Array:
    """Return a one-dimensional array, from memory or from an ``.npy`` or ``.npz`` file.

    Args:
        argument: The caller's argument, for messages.
        data: Array, tensor, sequence, pandas series, or path.
    """
    if is_file(data):
        path, within = _resolve(argument, str(data))
        if _suffix(path) not in (".npy", ".npz"):
            raise ValueError(f"{argument}: {path} is no .npy or .npz file; give the name of a column, or an array")
        data = _load_npy(argument, path, mmap=False) if _suffix(path) == ".npy" else _load_npz(argument, path, within)
    array = data.detach().cpu().numpy() if isinstance(data, Tensor) else np.asarray(data)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"{argument} must have one entry a row, got shape {array.shape}")
    return array


def as_texts(labels: Array) -> Array:
    """Return labels as strings: whole numbers in floating point as integers, a missing label as ``""``."""
    return np.array([_text(label) for label in labels.tolist()], dtype=str)


def _text(label: Any) -> str:
    if label is None or label != label:
        return ""
    if isinstance(label, bytes):
        return label.decode()
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(label)


def _open_file(
    argument: str,
    location: str,
    columns: Sequence[str] | None,
    layer: str | None,
    obsm: str | None,
    labels: frozenset[str],
) -> Table:
    path, within = _resolve(argument, location)
    title = f"{argument} ({path.name})"
    suffix = _suffix(path)
    if suffix == ".h5ad":
        if within is not None:
            if layer is not None or obsm is not None:
                raise ValueError(f"{argument}: {location!r} names an array already; leave out layer and obsm")
            layer, obsm = _within_h5ad(argument, within)
        return _anndata_table(title, _InFile(path), columns, layer, obsm)
    _refuse_anndata_options(title, layer, obsm)
    if suffix in (".npy", ".npz") and columns is not None:
        raise ValueError(f"columns are names, but {title} has none: use a .csv or .parquet file, or select before")
    if suffix == ".npz":
        return _npz_table(title, path, within)
    if within is not None:
        raise ValueError(f"{argument}: only .npz and .h5ad files hold named arrays, got {location!r}")
    if suffix == ".npy":
        return _array_table(title, _load_npy(title, path, mmap=True))
    return _frame_table(title, _load_frame(title, path, suffix, columns, labels), columns, labels)


def _resolve(argument: str, location: str) -> tuple[Path, str | None]:
    name, _, within = location.partition(_WITHIN)
    path = Path(name).expanduser()
    if _suffix(path) is None:
        raise ValueError(f"{argument}: cannot read {name!r}: the name must end in one of {', '.join(_SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: there is no file {str(path)!r} in {str(Path.cwd())!r}")
    if path.stat().st_size == 0:
        raise ValueError(f"{argument}: the file {str(path)!r} is empty")
    return path, within or None


def _suffix(path: Path) -> str | None:
    return next((s for s in sorted(_SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(s)), None)


def _library(name: str, what: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{what}: reading it needs {name}: pip install 'lightning_gap[files]'") from error


def _is_instance(data: object, module: str, name: str) -> bool:
    """Return whether ``data`` is of a class of an optional library, which is not imported for the question."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(data, getattr(loaded, name))


def _refuse_anndata_options(title: str, layer: str | None, obsm: str | None) -> None:
    if layer is not None or obsm is not None:
        option = f"layer={layer!r}" if layer is not None else f"obsm={obsm!r}"
        raise ValueError(f"{option} is for AnnData and .h5ad files, but {title} is none: leave it out")


def _there_is(names: Iterable[str]) -> str:
    shown = [repr(name) for name in names]
    if not shown:
        return "it has no names"
    return "there is " + ", ".join(shown[:12]) + (f", ... ({len(shown)} in all)" if len(shown) > 12 else "")


# Arrays


def _array_table(title: str, data: Any) -> Table:
    if isinstance(data, Tensor):
        tensor = data.detach()
        if tensor.is_complex():
            raise TypeError(f"{title} must hold real numbers, got a tensor of {tensor.dtype}: convert it first")
        return _plain_table(title, len(tensor) if tensor.dim() else 0, lambda rows: _tensor_rows(tensor, rows))
    array = np.asarray(data)
    _check_real(title, array)
    return _plain_table(title, len(array) if array.ndim else 0, lambda rows: _as_tensor(_array_rows(array, rows)))


def _plain_table(title: str, length: int, read: Callable[[Array | None], Tensor]) -> Table:
    return Table(title, length, None, (), read, lambda name: np.empty(0))


def _tensor_rows(tensor: Tensor, rows: Array | None) -> Tensor:
    # A copy in every case: later changes to the tensor do no harm.
    chosen = tensor.clone() if rows is None else tensor[torch.from_numpy(rows).to(tensor.device)]
    return chosen if chosen.dtype == torch.float64 else chosen.float()


def _array_rows(array: Array, rows: Array | None) -> Array:
    return array if rows is None else array[rows]


def _as_tensor(array: Array) -> Tensor:
    # A copy: read-only arrays and foreign byte orders are welcome, and later changes to the array do no harm.
    return torch.from_numpy(np.array(array, dtype=np.float64 if array.dtype == np.float64 else np.float32))


def _check_real(title: str, array: Array) -> None:
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{title} must hold real numbers, got an array of {array.dtype}: convert it first")


def _load_npy(title: str, path: Path, *, mmap: bool) -> Array:
    try:
        array: Array = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{title}: cannot read {str(path)!r}: {_first_line(error)}") from error
    return array


def _load_npz(title: str, path: Path, within: str | None) -> Array:
    shapes = _npz_shapes(title, path)
    if within is None and len(shapes) > 1:
        raise ValueError(f"{title} holds several arrays: name one, as in '{path.name}::{next(iter(shapes))}'")
    name = next(iter(shapes)) if within is None else within
    if name not in shapes:
        raise ValueError(f"{title} holds no array {name!r}; {_there_is(shapes)}")
    return _npz_array(title, path, name)


def _npz_array(title: str, path: Path, name: str) -> Array:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            array: Array = arrays[name]
    except ValueError as error:
        raise ValueError(f"{title}: cannot read the array {name!r}: {_first_line(error)}") from error
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
        raise ValueError(f"{title}: cannot read {str(path)!r} as an .npz file: {_first_line(error)}") from error
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
        raise ValueError(f"{title} holds no array {within!r}; {_there_is(shapes)}")
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
        lambda rows: _as_tensor(_array_rows(array, rows)),
        lambda label: _npz_array(title, path, label),
    )


# Data frames


def _load_frame(
    title: str, path: Path, suffix: str | None, columns: Sequence[str] | None, labels: frozenset[str]
) -> Any:
    pandas = _library("pandas", title)
    separator = "\t" if suffix is not None and suffix.startswith(".tsv") else ","
    try:
        if suffix == ".parquet":
            names = _library("pyarrow.parquet", title).read_schema(path).names
        else:
            names = pandas.read_csv(path, sep=separator, nrows=0).columns.tolist()
        wanted = names if columns is None else [name for name in names if name in {*map(str, columns), *labels}]
        _check_columns(title, columns, names)
        if suffix == ".parquet":
            return pandas.read_parquet(path, columns=None if columns is None else wanted, engine="pyarrow")
        return pandas.read_csv(path, sep=separator, usecols=wanted)
    except (ModuleNotFoundError, _NoColumnError):
        raise
    except Exception as error:
        raise ValueError(f"{title}: cannot read {str(path)!r}: {_first_line(error)}") from error


class _NoColumnError(ValueError):
    """A table has no such column."""


def _check_columns(title: str, columns: Sequence[str] | None, names: Sequence[str]) -> None:
    for name in map(str, columns or ()):
        if name not in names:
            raise _NoColumnError(f"columns: {title} has no column {name!r}; {_there_is(names)}")


def _frame_table(title: str, frame: Any, columns: Sequence[str] | None, labels: frozenset[str]) -> Table:
    pandas = _library("pandas", title)
    names = [str(name) for name in frame.columns]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{title} has two columns {twice!r}: rename one")
    frame = frame.set_axis(names, axis=1)
    if columns is None:
        # An unnamed first column is what pandas and R write of row names.
        features = [
            name for name in names if name not in labels and not re.fullmatch(r"Unnamed: 0|__index_level_0__", name)
        ]
    else:
        features = [str(name) for name in columns]
        _check_columns(title, features, names)
    if not features:
        raise ValueError(f"{title} has no columns of samples; {_there_is(names)}")
    texts = [name for name in features if not pandas.api.types.is_numeric_dtype(frame[name].dtype)]
    if texts:
        listed = ", ".join(map(repr, texts[:5])) + (", ..." if len(texts) > 5 else "")
        raise TypeError(
            f"{title}: the columns {listed} hold no numbers: name those of the samples, as in columns=['x', 'y']"
        )

    def read(rows: Array | None) -> Tensor:
        chosen = frame[features] if rows is None else frame[features].iloc[rows]
        single = all(dtype in ("float32", "Float32") for dtype in map(str, chosen.dtypes))
        return _as_tensor(chosen.to_numpy(dtype=np.float32 if single else np.float64, na_value=np.nan))

    return Table(
        title, len(frame), tuple(features), tuple(names), read, lambda name: frame[name].to_numpy(dtype=object)
    )


# AnnData


class _InMemory:
    """An ``AnnData`` object, backed or not."""

    def __init__(self, data: Any) -> None:
        self.obs: Any = data.obs
        self.genes = [str(name) for name in data.var_names]
        self.layers = tuple(map(str, data.layers))
        self.obsm = tuple(map(str, data.obsm))
        self._data = data

    def matrix(self, layer: str | None, obsm: str | None) -> Any:
        return (
            self._data.obsm[obsm] if obsm is not None else self._data.X if layer is None else self._data.layers[layer]
        )


class _InFile:
    """An ``.h5ad`` file, of which only what is asked for is read."""

    def __init__(self, path: Path) -> None:
        self._io = _library("anndata.io", path.name)
        try:
            self._file = _library("h5py", path.name).File(path, "r")
            self.obs: Any = self._io.read_elem(self._file["obs"])
            self.genes = [str(name) for name in self._io.read_elem(self._file["var"]).index]
            self.layers = tuple(self._file.get("layers", ()))
            self.obsm = tuple(self._file.get("obsm", ()))
        except (OSError, KeyError) as error:
            raise ValueError(f"{path.name}: cannot read {str(path)!r} as AnnData: {_first_line(error)}") from error

    def matrix(self, layer: str | None, obsm: str | None) -> Any:
        key = f"obsm/{obsm}" if obsm is not None else "X" if layer is None else f"layers/{layer}"
        element = self._file.get(key)
        if element is None:
            return None
        return element if element.attrs.get("encoding-type", "array") == "array" else self._sparse(element)

    def _sparse(self, element: Any) -> Any:
        if element.attrs["encoding-type"] == "csr_matrix":
            return _SparseRows(element)
        # Rows of a matrix that is stored by columns are found only in memory; a data frame is read whole.
        found = self._io.read_elem(element)
        return found.tocsr() if hasattr(found, "tocsr") else found


class _SparseRows:
    """A sparse matrix that a file stores by rows; slices of rows are read."""

    def __init__(self, group: Any) -> None:
        self.shape = tuple(map(int, group.attrs["shape"]))
        self.dtype = group["data"].dtype
        self._group = group
        self._starts = group["indptr"][:]

    def __getitem__(self, rows: slice) -> Any:
        # Imported here: it takes a while, which only sparse files should pay.
        from scipy.sparse import csr_matrix

        starts = self._starts[rows.start : rows.stop + 1]
        entries = slice(int(starts[0]), int(starts[-1]))
        parts = self._group["data"][entries], self._group["indices"][entries], starts - starts[0]
        return csr_matrix(parts, shape=(len(starts) - 1, self.shape[1]))


def _within_h5ad(argument: str, within: str) -> tuple[str | None, str | None]:
    group, _, name = within.partition("/")
    if within == "X":
        return None, None
    if group in ("layers", "obsm") and name:
        return (name, None) if group == "layers" else (None, name)
    raise ValueError(f"{argument}: '{_WITHIN}{within}' must be {_WITHIN}X, {_WITHIN}layers/NAME or {_WITHIN}obsm/NAME")


def _anndata_table(
    title: str, data: "_InMemory | _InFile", columns: Sequence[str] | None, layer: str | None, obsm: str | None
) -> Table:
    if layer is not None and layer not in data.layers:
        raise ValueError(f"layer: {title} has no layer {layer!r}; {_there_is(data.layers)}")
    if obsm is not None and obsm not in data.obsm:
        raise ValueError(f"obsm: {title} has no embedding {obsm!r}; {_there_is(data.obsm)}")
    matrix = data.matrix(layer, obsm)
    if matrix is None:
        raise ValueError(f"{title} has no X: name a layer ({_there_is(data.layers)}) or obsm ({_there_is(data.obsm)})")
    if hasattr(matrix, "to_numpy"):
        matrix = matrix.to_numpy()
    length, width = (int(size) for size in matrix.shape)
    features: list[str] | None = data.genes if obsm is None else None
    chosen: Array | None = None
    if columns is not None:
        if features is None:
            raise ValueError(f"columns are genes, but obsm={obsm!r} of {title} has none: leave one of them out")
        place = {name: i for i, name in enumerate(features)}
        if len(place) < len(features):
            raise ValueError(f"columns: the genes of {title} are not unique: call adata.var_names_make_unique() first")
        for name in columns:
            if name not in place:
                raise ValueError(f"columns: {title} has no gene {name!r}; {_there_is(features)}")
        chosen = np.array([place[name] for name in columns])
        features = list(columns)
    obs = data.obs

    def read(rows: Array | None) -> Tensor:
        return torch.from_numpy(_dense_rows(title, matrix, np.arange(length) if rows is None else rows, chosen, width))

    return Table(
        title,
        length,
        None if features is None else tuple(features),
        tuple(map(str, obs.columns)),
        read,
        lambda name: obs[name].to_numpy(dtype=object),
    )


def _dense_rows(title: str, matrix: Any, rows: Array, columns: Array | None, width: int) -> Array:
    """Return rows of a dense or sparse matrix, in memory or in a file, never holding much more than the result."""
    dtype = np.dtype(matrix.dtype)
    if dtype.kind not in "fiub":
        raise TypeError(f"{title} must hold real numbers, got {dtype}: convert it first")
    result = np.empty(
        (len(rows), width if columns is None else len(columns)), np.float64 if dtype == np.float64 else np.float32
    )
    step = max(1, _BLOCK // max(1, width))
    for start in range(0, int(matrix.shape[0]), step):
        first, last = np.searchsorted(rows, (start, start + step))
        if first == last:
            continue
        block = matrix[start : start + step]
        block = block[rows[first:last] - start]
        block = block if columns is None else block[:, columns]
        result[first:last] = block.toarray() if hasattr(block, "toarray") else np.asarray(block)
    return result


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
