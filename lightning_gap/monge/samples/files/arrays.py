"""Tables of arrays in memory: NumPy's, tensors, sparse matrices."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_gap.monge.samples.files.table import Reading, Table, as_tensor

__all__ = ["array_table", "check_real", "dense_rows", "dim_of", "plain_table"]

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
