"""Tables of AnnData, in memory and in ``.h5ad`` files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_gap.monge.samples.files.table import Table, first_line, library, objects, there_is

__all__ = ["InFile", "InMemory", "anndata_table", "dense_rows", "within_h5ad"]

Array = NDArray[Any]

# Numbers that are read at once where a file holds more than is wanted: 64 MiB in single precision.
_BLOCK = 2**24


class InMemory:
    """An ``AnnData`` object, backed or not."""

    def __init__(self, data: Any) -> None:
        self.obs: Any = data.obs
        self.genes = [str(name) for name in data.var_names]
        self.layers = tuple(map(str, data.layers))
        self.obsm = tuple(map(str, data.obsm))
        self._data = data

    def matrix(self, layer: str | None, obsm: str | None) -> Any:
        """Return an array; the matrix of a backed object may still be in its file."""
        if obsm is not None:
            return self._data.obsm[obsm]
        found = self._data.X if layer is None else self._data.layers[layer]
        stored = getattr(found, "group", None)
        if stored is None:
            return found
        return _SparseRows(stored) if found.format == "csr" else found.to_memory().tocsr()


class InFile:
    """An ``.h5ad`` file, of which only what is asked for is read."""

    def __init__(self, path: Path) -> None:
        self._io = library("anndata.io", path.name)
        try:
            self._file = library("h5py", path.name).File(path, "r")
            self.obs: Any = self._io.read_elem(self._file["obs"])
            self.genes = [str(name) for name in self._io.read_elem(self._file["var"]).index]
            self.layers = tuple(self._file.get("layers", ()))
            self.obsm = tuple(self._file.get("obsm", ()))
        except (OSError, KeyError) as error:
            raise ValueError(f"{path.name}: cannot read {str(path)!r} as AnnData: {first_line(error)}") from error

    def matrix(self, layer: str | None, obsm: str | None) -> Any:
        """Return an array, of which rows can be read, or ``None`` where there is none."""
        key = f"obsm/{obsm}" if obsm is not None else "X" if layer is None else f"layers/{layer}"
        element = self._file.get(key)
        if element is None or hasattr(element, "shape"):
            return element
        if element.attrs.get("encoding-type") == "csr_matrix":
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


def within_h5ad(argument: str, within: str) -> tuple[str | None, str | None]:
    """Return layer and embedding that a name within a file means."""
    group, _, name = within.partition("/")
    if within == "X":
        return None, None
    if group in ("layers", "obsm") and name:
        return (name, None) if group == "layers" else (None, name)
    raise ValueError(f"{argument}: '::{within}' must be ::X, ::layers/NAME or ::obsm/NAME")


def anndata_table(
    title: str, data: "InMemory | InFile", columns: Sequence[str] | None, layer: str | None, obsm: str | None
) -> Table:
    """Return the table of AnnData.

    Args:
        title: How messages call it.
        data: The object or file.
        columns: Genes, in this order; all by default.
        layer: Layer; ``X`` by default.
        obsm: Embedding, in place of a layer.
    """
    if layer is not None and layer not in data.layers:
        raise ValueError(f"layer: {title} has no layer {layer!r}; {there_is(data.layers)}")
    if obsm is not None and obsm not in data.obsm:
        raise ValueError(f"obsm: {title} has no embedding {obsm!r}; {there_is(data.obsm)}")
    matrix = data.matrix(layer, obsm)
    if matrix is None:
        raise ValueError(f"{title} has no X: name a layer ({there_is(data.layers)}) or obsm ({there_is(data.obsm)})")
    features: list[str] | None = data.genes if obsm is None else None
    if hasattr(matrix, "to_numpy"):
        # An embedding may be a data frame.
        features = [str(name) for name in matrix.columns] if obsm is not None else features
        matrix = matrix.to_numpy()
    length, width = (int(size) for size in matrix.shape)
    chosen: Array | None = None
    if columns is not None:
        if features is None:
            raise ValueError(f"columns are genes, but obsm={obsm!r} of {title} has none: leave one of them out")
        columns = [str(name) for name in columns]
        place = {name: i for i, name in enumerate(features)}
        for name in columns:
            if name not in place:
                raise ValueError(f"columns: {title} has no gene {name!r}; {there_is(features)}")
        if len(set(columns)) < len(columns) or sum(name in set(columns) for name in features) > len(columns):
            raise ValueError(f"columns: the genes of {title} are not unique: call adata.var_names_make_unique() first")
        chosen = np.array([place[name] for name in columns])
        features = columns
    obs = data.obs

    def read(rows: Array | None) -> Tensor:
        return torch.from_numpy(dense_rows(title, matrix, np.arange(length) if rows is None else rows, chosen, width))

    return Table(
        title,
        length,
        None if features is None else tuple(features),
        tuple(map(str, obs.columns)),
        read,
        lambda name: objects(obs[name]),
    )


def dense_rows(title: str, matrix: Any, rows: Array, columns: Array | None, width: int) -> Array:
    """Return rows of a dense or sparse matrix, in memory or in a file, never holding much more than the result.

    Args:
        title: How messages call it.
        matrix: The matrix, of which slices of rows can be taken.
        rows: Numbers of the rows, in increasing order.
        columns: Numbers of the columns; all by default.
        width: Number of the matrix's columns.

    Raises:
        TypeError: It holds no real numbers.
    """
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
