"""Names and vectors of conditions."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_gap.monge.files import is_file, open_frame
from lightning_gap.monge.tables import as_texts

__all__ = ["condition_names", "condition_vectors_of"]


def condition_names(labels: Iterable[NDArray[Any] | None]) -> tuple[str, ...]:
    """Return all names in order: by number if all are numbers, by text otherwise.

    Args:
        labels: Names of the rows of some sets.
    """
    names = {str(name) for given in labels if given is not None for name in np.unique(given)}
    try:
        return tuple(sorted(names, key=float))
    except ValueError:
        return tuple(sorted(names))


def condition_vectors_of(given: Any, names: Sequence[str], dtype: torch.dtype) -> Tensor:
    """Return the vectors of the named conditions, ``(K, p)``.

    Args:
        given: ``{name: vector or number}``, a data frame with the names as its index, or a path to a table whose first
            column holds the names.
        names: The names, in order.
        dtype: Precision of the result.

    Raises:
        TypeError: It is no such table, or an entry is no number.
        ValueError: A name has no vector, lengths differ, or an entry is not finite.
    """
    if is_file(given):
        frame = open_frame("condition_vectors", str(given))
        given = frame.set_index(frame.columns[0])
    if hasattr(given, "to_dict") and hasattr(given, "index"):
        rows = as_texts(np.array(list(given.index), dtype=object))
        given = dict(zip(rows.tolist(), given.to_numpy().tolist(), strict=True))
    if not isinstance(given, Mapping):
        raise TypeError(
            "condition_vectors must be a table, {name: vector}, a data frame or a path to one, "
            f"got {type(given).__name__}"
        )
    table = {str(as_texts(np.array([name], dtype=object))[0]): vector for name, vector in given.items()}
    vectors: list[Tensor] = []
    for name in names:
        if name not in table:
            listed = ", ".join(map(repr, list(table)[:12]))
            raise ValueError(f"condition_vectors has no vector of the condition {name!r}; there is {listed}")
        try:
            vector = torch.as_tensor(table[name], dtype=torch.float64).reshape(-1)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"condition_vectors[{name!r}] must be numbers, got {table[name]!r}") from error
        if vectors and len(vector) != len(vectors[0]):
            raise ValueError(
                f"condition_vectors must have one length, got {len(vectors[0])} for {names[0]!r} and {len(vector)} for "
                f"{name!r}"
            )
        if not len(vector) or not bool(vector.isfinite().all()):
            raise ValueError(f"condition_vectors[{name!r}] must be finite numbers, got {table[name]!r}")
        vectors.append(vector)
    return torch.stack(vectors).to(dtype)


def conditions_of(given: Any, n: int, names: Sequence[str], *, vector_dim: int | None = None) -> Tensor:
    """Return a condition for each of n samples.

    Args:
        given: One condition for all samples, or one for each: names, labels, or vectors.
        n: Number of samples.
        names: Names of the labels, in order.
        vector_dim: Dimension of the vectors where conditions are vectors, as far as it is known.

    Returns:
        ``(n,)`` labels (int64) or ``(n, p)`` vectors.

    Raises:
        ValueError: A name is not known, a number could be a name or a label, names are given where conditions are
            vectors, or there is neither one condition nor one for each sample.
    """
    if not isinstance(given, Tensor):
        array = np.asarray(given)
        if array.dtype.kind in "USO" and vector_dim is not None:
            raise ValueError(
                f"condition={array.ravel()[0]!s} is a name, but the conditions of this map are vectors of {vector_dim} "
                "numbers, whose names it does not hold: give the vector"
            )
        if array.dtype.kind in "iu" and vector_dim is None:
            _refuse_ambiguous(array, names)
        if array.dtype.kind in "USO":
            wanted = [str(name) for name in array.ravel()]
            unknown = sorted(set(wanted) - set(names))
            if unknown:
                known = ", ".join(names) or "without names"
                raise ValueError(f"condition {unknown[0]!r} is not known; the conditions are {known}")
            array = np.array([list(names).index(name) for name in wanted])
        given = torch.from_numpy(np.array(array))
    each: Tensor
    if vector_dim is not None:
        given = given if given.is_floating_point() else given.to(torch.get_default_dtype())
        if vector_dim == 1 and given.dim() == 1:
            given = given[:, None]
    if given.is_floating_point():
        each = given[None] if given.dim() < 2 else given
        each = each[:, None] if each.dim() == 1 else each
    else:
        each = given.reshape(-1).long()
    if len(each) == 1:
        each = each.expand(n, *each.shape[1:])
    if len(each) != n:
        raise ValueError(f"condition holds {len(each)} conditions for {n} samples: give one, or one for each")
    return each


def _refuse_ambiguous(numbers: NDArray[Any], names: Sequence[str]) -> None:
    """Raise for a number that is the name of one condition and would be taken for the label of another."""
    place = {name: label for label, name in enumerate(names)}
    for number in np.unique(numbers).tolist():
        if place.get(str(number), number) != number:
            raise ValueError(
                f"condition={number} could be the label {number}, or the name {str(number)!r} of the label "
                f"{place[str(number)]}: give names as text, and labels as a tensor"
            )
