"""Names and vectors of conditions."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_gap.monge.samples.files.read import is_file, open_frame
from lightning_gap.monge.samples.files.table import as_texts, there_is

__all__ = ["condition_names", "condition_vectors_of", "conditions_of", "label_indices", "place_of"]


def condition_names(labels: Iterable[NDArray[Any] | None]) -> tuple[str, ...]:
    """Return all names in order: by number if all are numbers, by text otherwise."""
    names = {str(name) for given in labels if given is not None for name in np.unique(given)}
    try:
        return tuple(sorted(names, key=float))
    except ValueError:
        return tuple(sorted(names))


def condition_vectors_of(given: Any, names: Sequence[str], dtype: torch.dtype) -> Tensor:
    """Return the ``(K, p)`` vectors of the named conditions, from what ``condition_vectors=`` may be."""
    if is_file(given):
        given = open_frame("condition_vectors", str(given))
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
            raise ValueError(f"condition_vectors has no vector of the condition {name!r}; {there_is(table)}")
        try:
            vector = torch.as_tensor(table[name], dtype=torch.float64, device="cpu").reshape(-1)
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


def conditions_of(
    given: Any, n: int, names: Sequence[str], *, vector_dim: int | None = None, labels: bool = False
) -> Tensor:
    """Return ``(n,)`` labels (int64) or ``(n, p)`` vectors: from one condition for all samples, or one for each.

    ``vector_dim`` is the dimension of vectors as far as it is known; ``labels`` tells that conditions are no vectors. A
    number that could be a name or a label is refused.
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
            array, unknown = _places(np.array([str(name) for name in array.ravel()]), names)
            if unknown is not None:
                known = ", ".join(names) or "without names"
                raise ValueError(f"condition {unknown!r} is not known; the conditions are {known}")
        elif array.dtype.kind == "f" and vector_dim is None and array.ndim < 2:
            array = _named_numbers(array, names, labels)
        given = torch.from_numpy(np.array(array))
    elif given.is_floating_point() and vector_dim is None and given.dim() < 2:
        given = torch.from_numpy(np.array(_named_numbers(given.cpu().numpy(), names, labels)))
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


def _named_numbers(numbers: NDArray[Any], names: Sequence[str], labels: bool) -> NDArray[Any]:
    """Return the labels whose names are numbers: 0.1 is the name "0.1"; the numbers themselves where they are none."""
    places, unknown = _places(as_texts(np.atleast_1d(numbers)), names)
    if unknown is None:
        return places
    if labels:
        known = ", ".join(map(repr, names)) or "without names"
        raise ValueError(
            f"condition {unknown} is no name of a condition; the conditions are {known}: give a name, or labels as a "
            "tensor of integers"
        )
    return numbers


def _refuse_ambiguous(numbers: NDArray[Any], names: Sequence[str]) -> None:
    """Raise for a number that is the name of one condition and would be taken for the label of another."""
    for number in np.unique(numbers).tolist():
        place = place_of(number, names)
        if place is not None and place != number:
            raise ValueError(
                f"condition={number} could be the label {number}, or the name {names[place]!r} of the label {place}: "
                "give names as text, and labels as a tensor"
            )


def label_indices(argument: str, labels: NDArray[Any], names: Sequence[str]) -> Tensor:
    """Return the place of each label among some names, ``(n,)`` int64."""
    places, unknown = _places(as_texts(labels), names)
    if unknown is not None:
        raise ValueError(
            f"{argument}: the map has no condition {unknown!r}; its conditions are {', '.join(map(repr, names[:12]))}"
        )
    return torch.from_numpy(places)


def _places(texts: NDArray[Any], names: Sequence[str]) -> tuple[NDArray[Any], str | None]:
    """Return the place of each text among the names, and a text that is no such name."""
    distinct, inverse = np.unique(texts, return_inverse=True)
    found = {text: place_of(text, names) for text in distinct.tolist()}
    unknown = next((text for text, place in found.items() if place is None), None)
    places = np.array([-1 if place is None else place for place in found.values()], dtype=np.int64)
    return places[inverse], unknown


def place_of(label: Any, names: Sequence[str]) -> int | None:
    """Return the place of a label among names, as text or else as a number: 0.1, "0.1" and "0.10" are one name."""
    text = str(as_texts(np.array([label], dtype=object))[0])
    if text in names:
        return list(names).index(text)
    try:
        number = float(text)
    except ValueError:
        return None
    for place, name in enumerate(names):
        with suppress(ValueError):
            if float(name) == number:
                return place
    return None
