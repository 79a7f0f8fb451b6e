"""Names and vectors of conditions, and which are trained on and scored: those with samples enough on both sides."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor

from lightning_gap.monge.samples.draws import FiniteSamples, Population
from lightning_gap.monge.samples.files.read import is_file, open_frame
from lightning_gap.monge.samples.files.table import as_texts, there_is
from lightning_gap.monge.samples.splits import Request

__all__ = [
    "ByName",
    "condition_vectors_of",
    "conditions_of",
    "held_out_pairs",
    "label_indices",
    "named_vectors",
    "place_of",
    "stacked_vectors",
    "trained_pairs",
]

# Populations by condition; under None that of a side without labels, which serves every condition.
ByName = dict[str | None, Population]


def named_vectors(argument: str, given: Any) -> dict[str, Any]:
    """Return vectors by name, as they are, from a mapping, a data frame or a path to one."""
    if is_file(given):
        given = open_frame(argument, str(given))
    if hasattr(given, "to_dict") and hasattr(given, "index"):
        rows = as_texts(np.array(list(given.index), dtype=object))
        given = dict(zip(rows.tolist(), given.to_numpy().tolist(), strict=True))
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{argument} must be a table, {{name: vector}}, a data frame or a path to one, got {type(given).__name__}"
        )
    return {str(as_texts(np.array([name], dtype=object))[0]): vector for name, vector in given.items()}


def stacked_vectors(argument: str, table: Mapping[str, Any], names: Sequence[str]) -> Tensor:
    """Return the ``(K, p)`` vectors of some names, in double, once they have been checked."""
    vectors: list[Tensor] = []
    for name in names:
        if name not in table:
            raise ValueError(f"{argument} has no vector of the condition {name!r}; {there_is(table)}")
        try:
            vector = torch.as_tensor(table[name], dtype=torch.float64, device="cpu").reshape(-1)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{argument}[{name!r}] must be numbers, got {table[name]!r}") from error
        if vectors and len(vector) != len(vectors[0]):
            raise ValueError(
                f"{argument} must have one length, got {len(vectors[0])} for {names[0]!r} and {len(vector)} for "
                f"{name!r}"
            )
        if not len(vector) or not bool(vector.isfinite().all()):
            raise ValueError(f"{argument}[{name!r}] must be finite numbers, got {table[name]!r}")
        vectors.append(vector)
    return torch.stack(vectors)


def condition_vectors_of(given: Any, names: Sequence[str], dtype: torch.dtype) -> Tensor:
    """Return the ``(K, p)`` vectors of the named conditions, from what ``condition_vectors=`` may be."""
    return stacked_vectors("condition_vectors", named_vectors("condition_vectors", given), names).to(dtype)


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


def _size(population: Population | None) -> float:
    return len(population) if isinstance(population, FiniteSamples) else 0 if population is None else math.inf


def trained_pairs(
    populations: Sequence[ByName], names: Sequence[str], request: Request
) -> tuple[dict[str | None, tuple[Population, Population]], int]:
    """Return the pairs of the conditions that are trained on, and the batch size."""
    pairs: dict[str | None, tuple[Population, Population]] = {}
    small: dict[str | None, tuple[float, float]] = {}
    batch_size = request.batch_size
    for name in names or (None,):
        if request.rule.stage_of(name) is not None:
            if not request.has_vectors:
                raise ValueError(
                    f"condition {name!r} is held out, and a map learns nothing of a label: give condition_key=[...], "
                    "columns, or condition_embeddings or condition_vectors"
                )
            continue
        source, target = (by.get(name, by.get(None)) for by in populations)
        sizes = _size(source), _size(target)
        labelled = [size for size, by in zip(sizes, populations, strict=True) if None not in by]
        if labelled and not any(labelled):
            # No row of it is trained on. Labels of such a condition would mean nothing to a map; vectors do.
            if not request.has_vectors and request.small_conditions != "drop":
                raise ValueError(
                    f"condition {name!r} has no training samples: a map learns nothing of its label; give "
                    "condition_vectors, hold out less, or leave it out by small_conditions='drop'"
                )
            if not request.has_vectors:
                small[name] = sizes
            continue
        if min(sizes) < batch_size:
            small[name] = sizes
        if min(sizes) > 0:
            assert source is not None
            assert target is not None
            pairs[name] = source, target
    if small:
        batch_size = _settle(pairs, small, request)
    return pairs, batch_size


def _settle(
    pairs: dict[str | None, tuple[Population, Population]],
    small: Mapping[str | None, tuple[float, float]],
    request: Request,
) -> int:
    """Refuse, drop, or shrink the batch for what is smaller than a batch; return the batch size."""
    wanted, whole = f"batch_size={request.batch_size}", None in small
    listed = ", ".join(
        f"{name!r} ({source:.0f} source, {target:.0f} target)" for name, (source, target) in list(small.items())[:8]
    ) + (", ..." if len(small) > 8 else "")
    if request.small_conditions == "drop" and not whole:
        for name in small:
            pairs.pop(name, None)
        if not pairs:
            raise ValueError(f"all conditions are smaller than {wanted}: {listed}")
        rank_zero_warn(
            f"conditions with fewer than {wanted} training samples are left out: {listed}"
            + ("; prediction leaves their rows out too" if not request.has_vectors else "")
        )
        return request.batch_size
    name, sizes = min(small.items(), key=lambda item: min(item[1]))
    source, target = (f"{size:.0f}" if size < math.inf else "endless" for size in sizes)
    least = int(min(sizes))
    if least < 1 and not whole:
        raise ValueError(
            f"condition {name!r} has {source} source and {target} target training samples: it must be on both sides; "
            "leave it out, or give small_conditions='drop'"
        )
    if least > 0 and (request.small_conditions == "shrink" or request.default_batch):
        drop = "; small_conditions='drop' leaves small ones out" if request.default_batch else ""
        rank_zero_warn(
            f"{'the default ' if request.default_batch else ''}{wanted} shrinks to {least}, "
            + ("the smaller training set" if whole else f"because of {listed}{drop}")
        )
        return least
    if whole:
        raise ValueError(
            f"{wanted} is larger than the training split ({source} source and {target} target samples): "
            f"use batch_size <= {least}, or hold out less"
        )
    raise ValueError(
        f"{wanted} is larger than the training samples of the conditions {listed}: "
        f"use batch_size <= {least}, or small_conditions='drop' or 'shrink'"
    )


def held_out_pairs(
    stage: str,
    populations: Sequence[ByName],
    names: Sequence[str],
    trained: Mapping[str | None, Any],
    request: Request,
) -> dict[str | None, tuple[FiniteSamples, FiniteSamples]]:
    """Return the held-out pairs of the conditions that have some on both sides."""
    pairs: dict[str | None, tuple[FiniteSamples, FiniteSamples]] = {}
    one_sided = []
    of_stage = request.rule.conditions(stage)
    for name in names or (None,):
        # What is held out whole is scored in its stage alone, and there is nothing else in it.
        if request.rule.stage_of(name) not in (None, stage) or (of_stage and name not in of_stage):
            continue
        source, target = (by.get(name, by.get(None)) for by in populations)
        if not isinstance(source, FiniteSamples) or not isinstance(target, FiniteSamples):
            one_sided += [name] if source is not None or target is not None else []
            continue
        if name not in trained and not request.has_vectors:
            continue
        if len(source) and len(target):
            pairs[name] = source, target
        else:
            one_sided.append(name)
    if not pairs:
        groups = getattr(request.rule, f"{stage}_groups")
        held = groups or of_stage
        what = f"the {'groups' if groups else 'conditions'} {', '.join(map(repr, held))} hold" if held else "there is"
        raise ValueError(f"{stage}: {what} nothing of both source and target: hold out other samples")
    if one_sided:
        listed = ", ".join(map(repr, one_sided))
        rank_zero_info(f"{stage}: the conditions {listed} are held out on one side only, and are left out of scores")
    return pairs
