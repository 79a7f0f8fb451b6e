"""What is trained on and what is held out: by row, by group, or given apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_gap.monge.samples.draws import Endless, generator
from lightning_gap.monge.samples.features import listed
from lightning_gap.monge.samples.files.table import Reading, as_texts
from lightning_gap.monge.samples.given import Side, is_stream, read_sides
from lightning_gap.monge.samples.held_conditions import held_conditions_of

__all__ = ["Given", "Request", "SplitRule", "named_groups", "read_stages", "split_rows"]

Array = NDArray[Any]
Given = tuple[Side | Endless, Side | Endless]
_EXPLICIT = ("source", "target", "weights", "conditions", "true_images")
STAGES = ("train", "val", "test")
# Share of the rows without labels that is held out with conditions.
_OF_SHARED = 0.1
# First entries of the keys of random draws.
_GROUPS, _ROWS = 1, 2


@dataclass(frozen=True)
class SplitRule:
    """What is held out: shares of the rows that are not held out whole, and groups and conditions that are."""

    val_fraction: float
    test_fraction: float
    val_groups: tuple[str, ...] = ()
    test_groups: tuple[str, ...] = ()
    val_conditions: tuple[str, ...] = ()
    test_conditions: tuple[str, ...] = ()
    seed: int = 0

    def holds_out(self, stage: str) -> bool:
        """Return whether the stage, ``"val"`` or ``"test"``, gets any rows."""
        return any(getattr(self, f"{stage}_{what}") for what in ("fraction", "groups", "conditions"))

    def conditions(self, stage: str) -> tuple[str, ...]:
        """Return the conditions that a stage holds out whole."""
        held: tuple[str, ...] = getattr(self, f"{stage}_conditions")
        return held

    def testing(self, conditions: tuple[str, ...]) -> "SplitRule":
        """Return the rule that tests on some conditions alone, held out whole."""
        others = tuple(name for name in self.val_conditions if name not in conditions)
        share = self.test_fraction if self.test_conditions else _OF_SHARED
        return replace(self, val_conditions=others, test_conditions=conditions, test_groups=(), test_fraction=share)

    def stage_of(self, condition: str | None) -> str | None:
        """Return the stage that holds a condition out whole; ``None`` where it is trained on."""
        return next((stage for stage in ("val", "test") if condition in self.conditions(stage)), None)


def named_groups(
    val_groups: Sequence[Any] | float | None,
    test_groups: Sequence[Any] | float | None,
    available: Sequence[str],
    seed: int,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the groups that are held out for validation and for the test: named, or a share that chance picks."""
    named: dict[str, tuple[str, ...]] = {}
    for argument, groups in (("test_groups", test_groups), ("val_groups", val_groups)):
        if isinstance(groups, str | bool) or (
            groups is not None and not isinstance(groups, Sequence | float | int | np.ndarray)
        ):
            raise TypeError(f"{argument} must be a list of names or a share, got {groups!r}: write [{groups!r}]")
        if groups is None or isinstance(groups, float | int):
            named[argument] = ()
            continue
        names = tuple(as_texts(np.array(list(groups), dtype=object)).tolist())
        if not names:
            raise ValueError(f"{argument} is empty: name a group, or leave it out")
        for name in names:
            if name not in available:
                raise ValueError(f"{argument} names {name!r}, which is no group; there is {listed(available, 12)}")
            if names.count(name) > 1:
                raise ValueError(f"{argument} names {name!r} twice")
        named[argument] = names
    both = [name for name in named["val_groups"] if name in named["test_groups"]]
    if both:
        raise ValueError(f"val_groups and test_groups both name {both[0]!r}: a group is held out for one of them")
    free = [name for name in available if name not in named["val_groups"] + named["test_groups"]]
    free = [free[i] for i in torch.randperm(len(free), generator=generator(seed, _GROUPS), device="cpu").tolist()]
    for argument, groups in (("test_groups", test_groups), ("val_groups", val_groups)):
        if isinstance(groups, float | int):
            if not 0 < groups < 1:
                raise ValueError(f"{argument} must be names or a share in (0, 1), got {groups!r}")
            count = max(1, round(groups * len(available)))
            named[argument], free = tuple(sorted(free[:count])), free[count:]
    if not free:
        held = named["val_groups"] + named["test_groups"]
        raise ValueError(f"val_groups and test_groups hold out all groups ({listed(held, 12)}): leave one to train on")
    return named["val_groups"], named["test_groups"]


def split_rows(
    title: str,
    strata: Array,
    groups: Array | None,
    usable: Array,
    rule: SplitRule,
    side: int,
    *,
    strict: bool = True,
    held: Mapping[str, Array] | None = None,
    shared: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """Return the rows of one side in each stage, in random order.

    Rows of ``held`` go first, masks by stage, and those of groups; then each of the ``(n,)`` strata is divided by the
    fractions, at least one row a stage, where the stage's mask in ``shared`` does not say otherwise. One that is
    too small is refused where ``strict``, and else trained on. Rows that are not ``usable`` are in no stage.
    """
    parts: dict[str, list[Array]] = {stage: [] for stage in STAGES}
    whole = {stage: [mask] for stage, mask in (held or {}).items()}
    for stage, names in (("val", rule.val_groups), ("test", rule.test_groups)):
        if groups is not None:
            whole.setdefault(stage, []).append(np.isin(groups, names))
    free = usable.copy()
    for stage, masks in whole.items():
        for mask in masks:
            parts[stage].append(np.flatnonzero(free & mask))
            free &= ~mask
    fractions = {"test": rule.test_fraction, "val": rule.val_fraction}
    draws = generator(rule.seed, _ROWS, side)
    for stratum in np.unique(strata):
        rows = np.flatnonzero(free & (strata == stratum))
        if not len(rows):
            continue
        n = len(rows)
        order = rows[torch.randperm(n, generator=draws, device="cpu").numpy()]
        n_test, n_val = (
            max(1, round(n * part)) if part and (shared is None or stage not in shared or shared[stage][rows[0]]) else 0
            for stage, part in fractions.items()
        )
        if n - n_val - n_test < 1 and not strict:
            n_val = n_test = 0
        if n - n_val - n_test < 1:
            raise ValueError(
                f"val_fraction={rule.val_fraction} and test_fraction={rule.test_fraction} of {n} samples of {title} "
                "leave nothing to train on: lower them, or set them to 0"
            )
        for stage, part in zip(STAGES, np.split(order, [n - n_val - n_test, n - n_test]), strict=True):
            parts[stage].append(part)
    rows_of = {stage: np.concatenate(part) if part else np.empty(0, np.int64) for stage, part in parts.items()}
    return {
        stage: rows[torch.randperm(len(rows), generator=draws, device="cpu").numpy()].astype(np.int64)
        for stage, rows in rows_of.items()
    }


@dataclass(frozen=True)
class Request:
    """What is asked for of the samples, by the arguments of :class:`SamplesDataModule`."""

    rule: SplitRule
    batch_size: int
    default_batch: bool = False  # nobody asked for the batch size: it gives way
    small_conditions: str = "refuse"
    condition_vectors: Any = None
    condition_embeddings: Any = None
    condition_kinds: Mapping[str, str | None] = field(default_factory=dict)  # by column, as far as they are given
    encoded: bool = False  # whether conditions are of named columns, which make their vectors
    conditions_per_batch: int | None = None
    standardize: bool = False
    components: int | None = None
    eval_batch_size: int = 2048

    @property
    def has_vectors(self) -> bool:
        """Whether conditions are vectors rather than labels."""
        return self.encoded or self.condition_vectors is not None


def read_stages(
    source: Any,
    target: Any,
    reading: Reading,
    *,
    fractions: tuple[float | None, float],
    held_groups: tuple[Any, Any],
    held_conditions: tuple[Any, Any],
    explicit: tuple[Any, Any],
    seed: int,
    **options: Any,
) -> tuple[Given, dict[str, tuple[Side, Side]], SplitRule]:
    """Return both sides, those of ``"val"`` and ``"test"`` that are given apart, and what is held out of the others.

    ``fractions``, ``held_groups``, ``held_conditions`` and ``explicit`` are pairs, of validation and of the test.
    """
    shares = _fractions(fractions, held_groups, held_conditions, explicit)
    sides = read_sides(source, target, reading, **options)
    how: dict[str, Any] = {name: options[name] for name in ("condition_key", "condition_column") if name in options}
    apart = {
        stage: _read_explicit(stage, given, reading, sides, how)
        for stage, given in zip(("val", "test"), explicit, strict=True)
        if given is not None
    }
    val, test = held_conditions_of(sides, *held_conditions)
    rule = replace(_split_rule(sides, shares, held_groups, seed), val_conditions=val, test_conditions=test)
    return sides, apart, rule


def _fractions(
    fractions: tuple[float | None, float],
    held_groups: tuple[Any, Any],
    held_conditions: tuple[Any, Any],
    explicit: tuple[Any, Any],
) -> tuple[float, float]:
    """Return the shares of the rows that are held out, checked."""
    found = []
    for stage, fraction, groups, conditions, apart, default in zip(
        ("val", "test"), fractions, held_groups, held_conditions, explicit, (0.1, 0.0), strict=True
    ):
        if conditions is not None:
            # A share of the rows that serve both kinds of conditions.
            default, fraction = _OF_SHARED, fraction or None
        if fraction is None:
            fraction = default if groups is None and apart is None else 0.0
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction < 1:
            raise ValueError(f"{stage}_fraction must be in [0, 1), got {fraction!r}")
        given = [f"{stage}_fraction"] * bool(fraction and conditions is None)
        others = ((f"{stage}_groups", groups), (f"{stage}_conditions", conditions), (stage, apart))
        given += [name for name, x in others if x is not None]
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


def _read_explicit(stage: str, given: Any, reading: Reading, train: Given, how: Mapping[str, Any]) -> tuple[Side, Side]:
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
    options |= {name: value for name, value in how.items() if name != "condition_key" or "conditions" not in given}
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
