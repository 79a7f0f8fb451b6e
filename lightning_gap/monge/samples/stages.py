"""What is trained on and what is held out, from the arguments that say so."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_gap.monge.samples.draws import Endless
from lightning_gap.monge.samples.files.table import Reading
from lightning_gap.monge.samples.given import Side, is_stream, read_sides
from lightning_gap.monge.samples.splits import SplitRule, named_groups

__all__ = ["Given", "Request", "read_stages"]

Given = tuple[Side | Endless, Side | Endless]


@dataclass(frozen=True)
class Request:
    """What is asked for of the samples, by the arguments of :class:`SamplesDataModule`."""

    rule: SplitRule
    batch_size: int
    default_batch: bool = False  # nobody asked for the batch size: it gives way
    small_conditions: str = "refuse"
    condition_vectors: Any = None
    conditions_per_batch: int | None = None
    standardize: bool = False
    components: int | None = None
    eval_batch_size: int = 2048


def read_stages(
    source: Any,
    target: Any,
    reading: Reading,
    *,
    fractions: tuple[float | None, float],
    held_groups: tuple[Any, Any],
    explicit: tuple[Any, Any],
    seed: int,
    **options: Any,
) -> tuple[Given, dict[str, tuple[Side, Side]], SplitRule]:
    """Return both sides, those of ``"val"`` and ``"test"`` that are given apart, and what is held out of the others.

    ``fractions``, ``held_groups`` and ``explicit`` are pairs, of validation and of the test.
    """
    shares = _fractions(fractions, held_groups, explicit)
    sides = read_sides(source, target, reading, **options)
    apart = {
        stage: _read_explicit(stage, given, reading, sides)
        for stage, given in zip(("val", "test"), explicit, strict=True)
        if given is not None
    }
    return sides, apart, _split_rule(sides, shares, held_groups, seed)


def _fractions(
    fractions: tuple[float | None, float], held_groups: tuple[Any, Any], explicit: tuple[Any, Any]
) -> tuple[float, float]:
    """Return the shares of the rows that are held out, checked."""
    found = []
    for stage, fraction, groups, apart, default in zip(
        ("val", "test"), fractions, held_groups, explicit, (0.1, 0.0), strict=True
    ):
        if fraction is None:
            fraction = default if groups is None and apart is None else 0.0
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction < 1:
            raise ValueError(f"{stage}_fraction must be in [0, 1), got {fraction!r}")
        given = [f"{stage}_fraction"] * bool(fraction)
        given += [name for name, x in ((f"{stage}_groups", groups), (stage, apart)) if x is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say what is held out: give one of them")
        found.append(float(fraction))
    if sum(found) >= 1:
        raise ValueError(f"val_fraction + test_fraction = {sum(found)} leaves nothing to train on")
    return found[0], found[1]


def _split_rule(sides: Given, fractions: tuple[float, float], held_groups: tuple[Any, Any], seed: int) -> SplitRule:
    labels = [side.groups for side in sides if isinstance(side, Side)]
    have = [x for x in labels if x is not None]
    if all(groups is None for groups in held_groups):
        if have:
            raise ValueError("groups are for val_groups and test_groups: name the groups to hold out, or their share")
        return SplitRule(*fractions, seed=seed)
    if not have or len(have) < len(labels):
        raise ValueError("val_groups and test_groups need the groups of both sides: give groups=, their labels")
    available = sorted({str(name) for names in have for name in np.unique(names)})
    return SplitRule(*fractions, *named_groups(*held_groups, available, seed), seed=seed)


_EXPLICIT = ("source", "target", "weights", "conditions", "true_images")


def _read_explicit(stage: str, given: Any, reading: Reading, train: Given) -> tuple[Side, Side]:
    """Return the sides that were given for one stage."""
    if isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2:
        given = dict(zip(("source", "target"), given, strict=True))
    if not isinstance(given, Mapping) or not {"source", "target"} <= set(given) <= set(_EXPLICIT):
        raise TypeError(
            f"{stage} must be a pair (source, target), or a mapping with these and any of "
            f"{', '.join(_EXPLICIT[2:])}, got {type(given).__name__}"
            + (f" with {', '.join(map(repr, given))}" if isinstance(given, Mapping) else "")
        )
    options = {name: value for name, value in given.items() if name not in ("source", "target")}
    for name in ("source", "target"):
        if is_stream(given[name]):
            raise TypeError(f"{stage}: {name} must be samples, got {type(given[name]).__name__}: draw them first")
    wanted = next((side for side in train if isinstance(side, Side) and side.features is not None), None)
    source, target = read_sides(given["source"], given["target"], reading, prefix=f"{stage} ", like=wanted, **options)
    assert isinstance(source, Side)
    assert isinstance(target, Side)
    for name, side, trained in zip(("source", "target"), (source, target), train, strict=True):
        labelled = isinstance(trained, Side) and trained.conditions is not None
        if labelled != (side.conditions is not None):
            raise ValueError(
                f"{stage}: the {name} {'needs' if labelled else 'takes no'} conditions, as in training: give "
                f"{stage}={{'source': ..., 'target': ..., 'conditions': (of the source, of the target)}}"
            )
    return source, target
