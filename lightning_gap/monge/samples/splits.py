"""Which rows are trained on, and which are held out: by row, or by group."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_gap.monge.samples.features import listed
from lightning_gap.monge.samples.files.table import as_texts

__all__ = ["SplitRule", "generator", "named_groups", "split_rows"]

Array = NDArray[Any]
STAGES = ("train", "val", "test")
# First entries of the keys of random draws.
_GROUPS, _ROWS = 1, 2


def generator(seed: int, *key: int) -> torch.Generator:
    """Return a generator of its own for every seed and key of non-negative integers."""
    # With the length: a seed sequence takes [s] and [s, 0] for the same.
    state = np.random.SeedSequence([seed, len(key), *key]).generate_state(1, np.uint64)[0]
    return torch.Generator(device="cpu").manual_seed(int(state) & (2**63 - 1))


@dataclass(frozen=True)
class SplitRule:
    """What is held out: shares of the rows of groups that are not held out whole, and groups that are."""

    val_fraction: float
    test_fraction: float
    val_groups: tuple[str, ...] = ()
    test_groups: tuple[str, ...] = ()
    seed: int = 0

    def holds_out(self, stage: str) -> bool:
        """Return whether the stage, ``"val"`` or ``"test"``, gets any rows."""
        return bool(getattr(self, f"{stage}_fraction") or getattr(self, f"{stage}_groups"))


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
) -> dict[str, Array]:
    """Return the rows of one side in each stage, in random order.

    Groups go first; then each of the ``(n,)`` strata is divided by the fractions, at least one row a stage. One that is
    too small is refused where ``strict``, and else trained on. Rows that are not ``usable`` are in no stage.
    """
    parts: dict[str, list[Array]] = {stage: [] for stage in STAGES}
    held = {"val": rule.val_groups, "test": rule.test_groups}
    free = usable.copy()
    if groups is not None:
        for stage, names in held.items():
            chosen = usable & np.isin(groups, names)
            parts[stage].append(np.flatnonzero(chosen))
            free &= ~chosen
    draws = generator(rule.seed, _ROWS, side)
    for stratum in np.unique(strata):
        rows = np.flatnonzero(free & (strata == stratum))
        if not len(rows):
            continue
        n = len(rows)
        order = rows[torch.randperm(n, generator=draws, device="cpu").numpy()]
        n_test, n_val = (max(1, round(n * part)) if part else 0 for part in (rule.test_fraction, rule.val_fraction))
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
