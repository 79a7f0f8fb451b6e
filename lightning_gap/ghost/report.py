"""What a run with ghosts says: a table, once, and warnings."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table
from torch import nn

from lightning_gap.ghost.samples import BatchRows

__all__ = ["other_reference", "rows_in_words", "table_of", "unfit_in_words"]


def table_of(facts: Mapping[str, int | str], notes: Mapping[str, str]) -> Table:
    """Return facts and notes as a table for the terminal."""
    table = Table(title="Ghost batch normalization", title_justify="left", show_header=False)
    for row in (*facts.items(), *notes.items()):
        table.add_row(*map(str, row))
    return table


def rows_in_words(layers: Mapping[str, nn.Module], rows: Sequence[BatchRows]) -> dict[str, str]:
    """Return, of each layer that has seen several rows of a sample, how many."""
    seen = {name: set().union(*(each.seen.get(layer, ()) for each in rows)) - {1} for name, layer in layers.items()}
    return {name: f"{' or '.join(map(str, sorted(counts)))} rows a sample" for name, counts in seen.items() if counts}


def other_reference(callbacks: Iterable[Any], ghost_batch_size: int) -> str | None:
    """Say of a regime's reference run, if one trains by another's batch, that it is not the ghosts'; else None."""
    for callback in callbacks:
        reference = getattr(callback, "reference_batch_size", ghost_batch_size)
        if reference not in (None, ghost_batch_size):  # None: what the loader has
            name = type(callback).__name__
            return f"the reference run of {name} has {reference} samples a batch, a ghost {ghost_batch_size}"
    return None


def unfit_in_words(module: nn.Module, unfit: Mapping[nn.Module, tuple[int, int]], ghost_batch_size: int) -> str:
    """Say of which layers it cannot be told how many rows a sample has."""
    names = {layer: name for name, layer in module.named_modules()}
    each = ", ".join(f"{names.get(layer)!r} ({n} rows for {samples} samples)" for layer, (n, samples) in unfit.items())
    return (
        f"GhostBatchNorm cannot tell how many rows a sample has in the input of layer {each}: each row counts as "
        f"one of ghost_batch_size={ghost_batch_size}; set rows_per_sample={{name: rows}}, 1 if this is right"
    )
