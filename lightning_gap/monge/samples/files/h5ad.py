"""AnnData, in memory and in ``.h5ad`` files."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_gap.monge.samples.files.arrays import dense_rows, dim_of
from lightning_gap.monge.samples.files.table import Format, Reading, Table, library, objects, readable, there_is

__all__ = ["H5AD", "InFile", "InMemory", "anndata_table"]

Array = NDArray[Any]


class InMemory:
    """An ``AnnData`` object, backed or not."""

    def __init__(self, data: Any) -> None:
        self.obs: Any = data.obs
        self.var: Any = data.var
        self.genes = [str(name) for name in data.var_names]
        self.layers = tuple(map(str, data.layers))
        self.obsm = tuple(map(str, data.obsm))
        self._data = data

    def matrix(self, layer: str | None, obsm: str | None) -> Any:
        """Return an array; the matrix of a backed object may still be in its file."""
        if obsm is not None:
            return self._data.obsm[obsm]
        found = self._x() if layer is None else self._data.layers[layer]
        stored = getattr(found, "group", None)
        if stored is None:
            return found
        return _SparseRows(stored) if found.format == "csr" else found.to_memory().tocsr()

    def _x(self) -> Any:
        try:
            return self._data.X
        except AttributeError as error:
            if not (self._data.isbacked and self._data.is_view):
                raise
            raise ValueError(
                "anndata does not read a view of backed cells whose X is sparse: take the view of cells in memory, as "
                "cells.to_memory()[rows], or write its cells to a file first"
            ) from error


class InFile:
    """An ``.h5ad`` file, of which only what is asked for is read."""

    def __init__(self, path: Path) -> None:
        self._io = library("anndata.io", path.name)
        with readable(path.name, path, " as AnnData"):
            self._file = library("h5py", path.name).File(path, "r")
            self.obs: Any = self._io.read_elem(self._file["obs"])
            self.var: Any = self._io.read_elem(self._file["var"])
            self.genes = [str(name) for name in self.var.index]
            self.layers = tuple(self._file.get("layers", ()))
            self.obsm = tuple(self._file.get("obsm", ()))

    def matrix(self, layer: str | None, obsm: str | None) -> Any:
        """Return an array, of which rows can be read, or ``None`` where there is none."""
        element = self._file.get(_key(layer, obsm))
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


def anndata_table(title: str, data: "InMemory | InFile", reading: Reading) -> Table:
    """Return the table of AnnData."""
    layer, obsm = reading.layer, reading.obsm
    if layer is not None and layer not in data.layers:
        raise ValueError(f"layer: {title} has no layer {layer!r}; {there_is(data.layers)}")
    if obsm is not None and obsm not in data.obsm:
        raise ValueError(f"obsm: {title} has no embedding {obsm!r}; {there_is(data.obsm)}")
    matrix = data.matrix(layer, obsm)
    if matrix is None:
        raise ValueError(f"{title} has no X: name a layer ({there_is(data.layers)}) or obsm ({there_is(data.obsm)})")
    stored: list[str] | None = data.genes if obsm is None else None
    if hasattr(matrix, "to_numpy"):
        # An embedding may be a data frame.
        stored = [str(name) for name in matrix.columns] if obsm is not None else stored
        matrix = matrix.to_numpy()
    features, places = _chosen(title, stored, reading)
    obs = data.obs
    return Table(
        title,
        int(matrix.shape[0]),
        dim_of(matrix) if places is None else len(places),
        None if features is None else tuple(features),
        tuple(map(str, obs.columns)),
        lambda rows: torch.from_numpy(dense_rows(title, matrix, rows, places)),
        lambda name: objects(obs[name]),
        origin=_Stored(matrix, places),
        layers=tuple(name for name in data.layers if name != layer) if obsm is None else None,
    )


def _chosen(title: str, stored: list[str] | None, reading: Reading) -> tuple[list[str] | None, Array | None]:
    """Return the features, and their places among the stored ones; ``None`` where they are these as they stand."""
    if stored is None:
        if reading.columns is not None:
            raise ValueError(f"columns are genes, but obsm={reading.obsm!r} of {title} has none: leave one of them out")
        return None, None
    columns = None if reading.columns is None else [str(name) for name in reading.columns]
    place = {name: i for i, name in enumerate(stored)}
    for name in columns or ():
        if name not in place:
            raise ValueError(f"columns: {title} has no gene {name!r}; {there_is(stored)}")
    if columns is not None and (
        len(set(columns)) < len(columns) or sum(name in set(columns) for name in stored) > len(columns)
    ):
        raise ValueError(f"columns: the genes of {title} are not unique: call adata.var_names_make_unique() first")
    features = reading.matched(title, stored if columns is None else columns)
    return features, None if features == stored else np.array([place[name] for name in features])


@dataclass(frozen=True)
class _Stored:
    """The array of a file, of which a table's samples are columns."""

    matrix: Any
    places: Array | None  # of the features; None where they are all columns, in order
    path: Path = Path()
    key: str = ""  # of the array in its file


def _key(layer: str | None, obsm: str | None) -> str:
    return f"obsm/{obsm}" if obsm is not None else "X" if layer is None else f"layers/{layer}"


def _open(title: str, path: Path, within: str | None, reading: Reading) -> Table:
    if within is not None:
        if reading.layer is not None or reading.obsm is not None:
            raise ValueError(f"{title}: '::{within}' names an array already; leave out layer and obsm")
        group, _, name = within.partition("/")
        if within != "X" and (group not in ("layers", "obsm") or not name):
            raise ValueError(f"{title}: '::{within}' must be ::X, ::layers/NAME or ::obsm/NAME")
        reading = replace(reading, layer=name if group == "layers" else None, obsm=name if group == "obsm" else None)
    table = anndata_table(title, InFile(path), reading)
    return replace(table, origin=replace(table.origin, path=path, key=_key(reading.layer, reading.obsm)))


class _Writer:
    """A copy of the file, with the images in the array's place."""

    def __init__(self, path: Path, suffix: str, table: Table, images: Array) -> None:
        h5py = library("h5py", table.title)
        self._file = h5py.File(path, "w")
        self._title, self._stored = table.title, table.origin
        group, _, name = self._stored.key.rpartition("/")
        with h5py.File(self._stored.path, "r") as given:
            self._file.attrs.update(given.attrs)
            for key in given:
                if group and key == group:
                    made = self._file.create_group(key)
                    made.attrs.update(given[key].attrs)
                    for other in given[key]:
                        if other != name:
                            given.copy(f"{key}/{other}", made)
                elif key != self._stored.key:
                    given.copy(key, self._file)
        self._array = self._file.create_dataset(self._stored.key, self._stored.matrix.shape, dtype=images.dtype)
        self._array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})

    def write(self, block: Table, images: Array) -> None:
        start = block.start or 0
        rows = np.arange(start, start + len(images))
        if self._stored.places is not None:
            # What is no feature of the map stays as it is, and all in the file's order.
            whole = dense_rows(self._title, self._stored.matrix, rows).astype(images.dtype)
            whole[:, self._stored.places] = images
            images = whole
        self._array[start : start + len(images)] = images

    def close(self) -> None:
        self._file.close()


H5AD = Format(_open, writer=_Writer, libraries=("h5py",), holds_named=True, holds_anndata=True, copies=_Stored)
