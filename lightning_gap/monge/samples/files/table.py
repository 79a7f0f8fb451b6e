"""Samples in rows, with labels beside them, whatever they are read from."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "Table",
    "as_tensor",
    "as_texts",
    "first_line",
    "library",
    "objects",
    "refuse_not_finite",
    "there_is",
    "titled",
]

Array = NDArray[Any]


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
            raise ValueError(f"{argument}: {self.title} has no {name!r}; {there_is(self.label_names)}")
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
                        f"{there_is(np.unique(labels).tolist())}"
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
        refuse_not_finite(self.title, samples, rows, self.features)
        return samples


def refuse_not_finite(
    title: str, samples: Tensor, rows: Array | None = None, features: Sequence[str] | None = None
) -> None:
    """Raise for samples that hold NaN or infinity.

    Args:
        title: How messages call them.
        samples: ``(n, d)`` samples.
        rows: Numbers of their rows, for the message; by default from 0 on.
        features: Names of the columns, likewise.

    Raises:
        ValueError: Some are not finite; the rows are named.
    """
    # One pass, and no copy, where all is well; two large numbers may overflow in it.
    if not samples.is_floating_point() or bool(samples.detach().sum().isfinite()):
        return
    finite = samples.isfinite()
    bad = (~finite).any(dim=1).nonzero().flatten()
    if len(bad):
        where = [int(i) if rows is None else int(rows[int(i)]) for i in bad[:5]]
        shown = ", ".join(map(str, where)) + (", ..." if len(bad) > 5 else "")
        column = int((~finite[bad[0]]).nonzero()[0])
        first = f", first in {features[column]!r}" if features else ""
        raise ValueError(
            f"{title} holds NaN or infinity in {len(bad)} of {len(samples)} rows ({shown}{first}): "
            "remove or fill them; rows count from 0"
        )


def titled(table: Table, argument: str) -> Table:
    """Return the same table as another argument."""
    _, parenthesis, file = table.title.partition(" (")
    return replace(table, title=argument + parenthesis + file)


def as_texts(labels: Array) -> Array:
    """Return labels as strings: whole numbers in floating point as integers, a missing label as ``""``."""
    # A float32 of 0.1 is 0.1, and not what it is as a double.
    small = labels.dtype in (np.float32, np.float16)
    values = [float(str(label)) for label in labels.ravel()] if small else labels.tolist()
    return np.array([_text(label) for label in values], dtype=str)


def _text(label: Any) -> str:
    if label is None or label != label:
        return ""
    if isinstance(label, bytes):
        return label.decode()
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(label)


def library(name: str, what: str) -> Any:
    """Return an optional module, or say what installs it."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{what}: reading it needs {name}: pip install 'lightning_gap[files]'") from error


def there_is(names: Iterable[str]) -> str:
    """Return the names as the end of a message."""
    shown = [repr(name) for name in names]
    if not shown:
        return "it has no names"
    return "there is " + ", ".join(shown[:12]) + (f", ... ({len(shown)} in all)" if len(shown) > 12 else "")


def objects(series: Any) -> Array:
    """Return a column of labels, with None where one is missing: the missing value of pandas has no truth value."""
    if str(series.dtype) in ("float32", "Float32", "float[pyarrow]"):
        single: Array = series.to_numpy(dtype=np.float32, na_value=np.nan)
        return single
    labels: Array = series.to_numpy(dtype=object, na_value=None)
    return labels


def as_tensor(array: Array) -> Tensor:
    """Return an array as float64 if it is that, and as float32 otherwise."""
    # A copy: read-only arrays and foreign byte orders are welcome, and later changes to the array do no harm.
    return torch.from_numpy(np.array(array, dtype=np.float64 if array.dtype == np.float64 else np.float32))


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
