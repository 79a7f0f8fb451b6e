"""Tables of arrays: NumPy's, tensors and sparse matrices in memory, and ``.npy`` and ``.npz`` files."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_gap.monge.samples.files.table import Format, Reading, Table, as_tensor, readable, there_is

__all__ = ["NPY", "NPZ", "array_table", "check_real", "dense_rows", "dim_of", "load_array", "plain_table"]

Array = NDArray[Any]


def array_table(title: str, data: Any, reading: Reading) -> Table:
    """Return the table of an array, a tensor or a sparse matrix."""
    if reading.columns is not None:
        raise ValueError(f"columns are names, but {title} has none: select them yourself, as in x[:, [0, 1]]")
    if isinstance(data, Tensor):
        tensor = data.detach()
        if tensor.is_complex():
            raise TypeError(f"{title} must hold real numbers, got a tensor of {tensor.dtype}: convert it first")
        return plain_table(title, tensor, lambda rows: _tensor_rows(tensor, rows))
    if hasattr(data, "tocsr"):
        matrix = data.tocsr()
        return plain_table(title, matrix, lambda rows: torch.from_numpy(dense_rows(title, matrix, rows)))
    array = np.asarray(data)
    check_real(title, array.dtype)
    return plain_table(title, array, lambda rows: as_tensor(array if rows is None else array[rows]))


def plain_table(title: str, data: Any, read: Any) -> Table:
    """Return a table without names, of the shape of ``data``."""
    length = int(data.shape[0]) if data.shape else 0
    return Table(title, length, dim_of(data), None, (), read, lambda name: np.empty(0))


def dim_of(data: Any) -> int:
    """Return the number of columns of a matrix; 0 where there is none."""
    return int(data.shape[1]) if len(data.shape) == 2 else 0


def check_real(title: str, dtype: Any) -> None:
    """Raise ``TypeError`` for an array that holds no real numbers."""
    if np.dtype(dtype).kind not in "fiub":
        raise TypeError(f"{title} must hold real numbers, got an array of {dtype}: convert it first")


def _tensor_rows(tensor: Tensor, rows: Array | None) -> Tensor:
    # A copy in every case: later changes to the tensor do no harm.
    chosen = tensor.clone() if rows is None else tensor[torch.from_numpy(rows).to(tensor.device)]
    return chosen if chosen.dtype == torch.float64 else chosen.float()


def dense_rows(
    title: str, matrix: Any, rows: Array | None = None, columns: Array | None = None, *, block: int = 2**24
) -> Array:
    """Return rows of a dense or sparse matrix, in memory or in a file, never holding much more than the result.

    ``rows`` are in increasing order; ``block`` numbers are read at once where there are more than are wanted: 64 MiB in
    single precision.
    """
    length, width = (int(size) for size in matrix.shape)
    dtype = np.dtype(matrix.dtype)
    check_real(title, dtype)
    rows = np.arange(length) if rows is None else rows
    result = np.empty(
        (len(rows), width if columns is None else len(columns)), np.float64 if dtype == np.float64 else np.float32
    )
    step = max(1, block // max(1, width))
    for start in range(0, length, step):
        first, last = np.searchsorted(rows, (start, start + step))
        if first == last:
            continue
        part = matrix[start : start + step]
        part = part[rows[first:last] - start]
        part = part if columns is None else part[:, columns]
        result[first:last] = part.toarray() if hasattr(part, "toarray") else np.asarray(part)
    return result


def load_array(title: str, path: Path, within: str | None, *, mmap: bool = False) -> Array:
    """Return an array of an ``.npy`` or ``.npz`` file: the one there is, or the one of a name within."""
    if not path.name.lower().endswith(".npz"):
        with readable(title, path):
            array: Array = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
        return array
    shapes = _npz_shapes(title, path)
    if within is None and len(shapes) > 1:
        raise ValueError(f"{title} holds several arrays: name one, as in '{path.name}::{next(iter(shapes))}'")
    return _npz_array(title, path, next(iter(shapes)) if within is None else within, shapes)


def _open_npy(title: str, path: Path, within: str | None, reading: Reading) -> Table:
    _refuse_columns(title, reading)

    def read(rows: Array | None) -> Any:
        # Opened anew: pages of a mapped file count as memory until it is closed.
        array = load_array(title, path, None, mmap=True)
        return as_tensor(array if rows is None else array[rows])

    shape = load_array(title, path, None, mmap=True)
    check_real(title, shape.dtype)
    return plain_table(title, shape, read)


def _open_npz(title: str, path: Path, within: str | None, reading: Reading) -> Table:
    _refuse_columns(title, reading)
    shapes = _npz_shapes(title, path)
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    if within is None:
        if len(shapes) > 1 and len(matrices) != 1:
            listed = ", ".join(f"{name!r} {shape}" for name, shape in list(shapes.items())[:12])
            raise ValueError(
                f"{title} holds several arrays ({listed}): name one, as in "
                f"'{path.name}::{(matrices or list(shapes))[0]}'"
            )
        within = matrices[0] if matrices else next(iter(shapes))
    array = _npz_array(title, path, within, shapes)
    title = f"{title}::{within}" if len(shapes) > 1 else title
    check_real(title, array.dtype)
    length = len(array) if array.ndim else 0
    beside = tuple(other for other, shape in shapes.items() if shape == (length,) and other != within)
    return Table(
        title,
        length,
        dim_of(array),
        None,
        beside,
        lambda rows: as_tensor(array if rows is None else array[rows]),
        lambda label: _npz_array(title, path, label, shapes),
    )


def _npz_array(title: str, path: Path, name: str, shapes: dict[str, tuple[int, ...]]) -> Array:
    if name not in shapes:
        raise ValueError(f"{title} holds no array {name!r}; {there_is(shapes)}")
    with readable(title, path, f" ({name!r})"), np.load(path, allow_pickle=False) as arrays:
        array: Array = arrays[name]
    return array


def _npz_shapes(title: str, path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays in a file, from their headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    with readable(title, path, " as an .npz file"), np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            with arrays.zip.open(f"{name}.npy" if f"{name}.npy" in arrays.zip.namelist() else name) as file:
                version = np.lib.format.read_magic(file)
                header = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                shapes[name] = header(file)[0]
    if not shapes:
        raise ValueError(f"{title} holds no arrays")
    return shapes


def _refuse_columns(title: str, reading: Reading) -> None:
    if reading.columns is not None:
        raise ValueError(f"columns are names, but {title} has none: use a .csv or .parquet file, or select before")


class _NpyWriter:
    def __init__(self, path: Path, suffix: str, table: Table, images: Array) -> None:
        self._file = path.open("wb")
        self._dtype, self._dim, self._length = images.dtype, images.shape[1], 0
        self._file.write(self._header())

    def _header(self) -> bytes:
        # Of one length whatever the shape: NumPy leaves room for a growing first axis.
        header = BytesIO()
        np.lib.format.write_array_header_1_0(
            header,
            {
                "descr": np.lib.format.dtype_to_descr(self._dtype),
                "fortran_order": False,
                "shape": (self._length, self._dim),
            },
        )
        return header.getvalue()

    def write(self, block: Table, images: Array) -> None:
        self._file.write(np.ascontiguousarray(images).data)
        self._length += len(images)

    def close(self) -> None:
        self._file.seek(0)
        self._file.write(self._header())
        self._file.close()


NPY = Format(_open_npy, writer=_NpyWriter)
NPZ = Format(_open_npz, holds_named=True)
