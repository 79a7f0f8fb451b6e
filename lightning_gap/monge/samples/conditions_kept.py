"""Which conditions are trained on, and which are scored: those with enough samples on both sides."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_gap.monge.samples.draws import FiniteSamples, Population
from lightning_gap.monge.samples.stages import Request

__all__ = ["ByName", "held_out_pairs", "trained_pairs"]

# Populations by condition; under None that of a side without labels, which serves every condition.
ByName = dict[str | None, Population]


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
        source, target = (by.get(name, by.get(None)) for by in populations)
        sizes = _size(source), _size(target)
        labelled = [size for size, by in zip(sizes, populations, strict=True) if None not in by]
        if labelled and not any(labelled):
            # No row of it is trained on. Labels of such a condition would mean nothing to a map; vectors do.
            if request.condition_vectors is None and request.small_conditions != "drop":
                raise ValueError(
                    f"condition {name!r} has no training samples: a map learns nothing of its label; give "
                    "condition_vectors, hold out less, or leave it out by small_conditions='drop'"
                )
            if request.condition_vectors is None:
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
            + ("; prediction leaves their rows out too" if request.condition_vectors is None else "")
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
    for name in names or (None,):
        source, target = (by.get(name, by.get(None)) for by in populations)
        if not isinstance(source, FiniteSamples) or not isinstance(target, FiniteSamples):
            one_sided += [name] if source is not None or target is not None else []
            continue
        if name not in trained and request.condition_vectors is None:
            continue
        if len(source) and len(target):
            pairs[name] = source, target
        else:
            one_sided.append(name)
    if not pairs:
        groups = getattr(request.rule, f"{stage}_groups")
        what = f"the groups {', '.join(map(repr, groups))} hold" if groups else "there is"
        raise ValueError(f"{stage}: {what} nothing of both source and target: hold out other samples")
    if one_sided:
        listed = ", ".join(map(repr, one_sided))
        rank_zero_info(f"{stage}: the conditions {listed} are held out on one side only, and are left out of scores")
    return pairs
