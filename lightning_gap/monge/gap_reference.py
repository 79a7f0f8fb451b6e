"""Samples of the reference measure on which a Monge gap may be measured."""

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_gap.checks import check_choice
from lightning_gap.monge.objective import GapOn
from lightning_gap.monge.samples.draws import FiniteSamples, Turn
from lightning_gap.monge.samples.files.read import open_table

__all__ = ["check_gap_on", "drawn_reference", "read_reference"]


def read_reference(samples: Any) -> tuple[Tensor | None, tuple[str, ...] | None]:
    """Return the samples, and the names of their features where they have names.

    Args:
        samples: ``(r, d)`` samples or a path to them; their shape, of a checkpoint whose state holds them; or ``None``.
    """
    if samples is None:
        return None, None
    if isinstance(samples, Mapping):
        return torch.zeros(samples["shape"]), None
    table = open_table("gap_reference", samples)
    return table.samples(None), table.features


def check_gap_on(gap_on: GapOn | None, reference: Tensor | None) -> GapOn:
    """Return where the gap is measured.

    Args:
        gap_on: What was given.
        reference: Samples of the reference measure, or ``None``.

    Raises:
        ValueError: It is not known, or there is no reference.
    """
    chosen = gap_on or ("source" if reference is None else "reference")
    check_choice("gap_on", chosen, get_args(GapOn))
    if chosen != "source" and reference is None:
        raise ValueError(f"gap_on={gap_on!r} needs gap_reference, samples of the reference measure: give them")
    return chosen


def drawn_reference(samples: Tensor, n: int, place: tuple[int, int], rank: int, ranks: int) -> Tensor:
    """Return n of the samples for this process, by epoch and batch.

    So a resumed run sees the same, and no one else's random numbers change.

    Args:
        samples: ``(r, d)`` samples.
        n: How many this process takes.
        place: Epoch, and batch of it.
        rank: Which process this is,
        ranks: of how many.
    """
    turn = Turn((0,), *place, 0, ranks * n, slice(rank * n, (rank + 1) * n))
    rows = FiniteSamples(samples).rows(turn)[turn.part]
    return samples[rows.to(samples.device)]
