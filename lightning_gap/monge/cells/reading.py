"""Cells of AnnData, with the genes that are wanted of them, in the order in which they stand there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_gap.monge.samples.combinations import named_rows, rows_of_codes
from lightning_gap.monge.samples.features import feature_places, listed
from lightning_gap.monge.samples.files.h5ad import anndata_table
from lightning_gap.monge.samples.files.read import open_anndata
from lightning_gap.monge.samples.files.table import Reading, Table, as_texts

__all__ = ["Cells", "check_genes", "read_cells"]


@dataclass(frozen=True)
class Cells:
    """Cells, whose samples are read when they are asked for."""

    title: str  # how messages call them
    table: Table  # of the genes that are wanted, in their own order; or of an embedding
    obs: Any  # data frame, a row a cell
    var: Any  # data frame, a row a gene of the table; None of an embedding
    places: NDArray[Any] | None  # (d,) of the wanted features among those of the table; None where they stand so

    def __len__(self) -> int:
        return len(self.table)

    def samples(self, rows: NDArray[Any] | None = None) -> Tensor:
        """Return the ``(n, d)`` samples of some cells or of all, with the genes in the order that is wanted."""
        samples = self.table.samples(rows)
        return samples if self.places is None else samples[:, self.places]

    def in_own_order(self, images: Tensor) -> Tensor:
        """Return ``(n, d)`` images, whose genes are in the order that is wanted, with them in the cells' order."""
        return images if self.places is None else images[:, np.argsort(self.places)]

    def labels(self, argument: str, column: str) -> NDArray[Any]:
        """Return the labels in a column of ``obs`` as texts; none may be missing."""
        labels = as_texts(self.table.labels(argument, str(column)))
        if (missing := np.flatnonzero(labels == "")).size:
            raise ValueError(
                f"{argument}: {column!r} of {self.title} is missing in {missing.size} cells (the first is row "
                f"{missing[0]}): give each a value, or leave them out"
            )
        return labels

    def groups(self, argument: str, columns: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Return the rows of each combination of labels, by its name, in the order of the names."""
        codes, named = named_rows({str(c): self.labels(argument, c) for c in columns})
        rows = dict(zip(named, rows_of_codes(codes, len(named)), strict=True))
        return {name: rows[name] for name in sorted(rows)}


def check_genes(genes: Any, obsm: str | None) -> None:
    """Refuse names of genes that are no list, and those of an embedding."""
    if isinstance(genes, str):
        raise TypeError(f"genes must be a list of names, got {genes!r}: write genes=[{genes!r}]")
    if genes is not None and obsm is not None:
        raise ValueError(f"obsm={obsm!r} has no genes: leave genes out, or obsm")


def read_cells(
    argument: str,
    given: Any,
    wanted: Sequence[str] | None = None,
    *,
    whose: str = "the map",
    layer: str | None = None,
    obsm: str | None = None,
    warns: bool = True,
    asks_which: bool = False,
) -> Cells:
    """Return the cells of AnnData or of an ``.h5ad`` file.

    Args:
        argument: What messages call it.
        given: ``AnnData``, in memory or backed, or the path to a file.
        wanted: Names of the genes, in any order; all by default.
        whose: What messages call those who want them.
        layer: Layer; ``"X"`` and ``None`` mean ``X``.
        obsm: Embedding in place of a layer; its columns go by name where it is a data frame, and by place otherwise.
        warns: Whether further genes are warned of, which are left out.
        asks_which: Whether to refuse cells that have layers where none is named, nor ``"X"``.
    """
    title, data = open_anndata(argument, given)
    if asks_which and layer is None and obsm is None and data.layers:
        raise ValueError(
            f"{title} has X and the layers {listed(data.layers)}: say which one {whose} was trained on, by layer='X', "
            "another layer=, or obsm="
        )
    layer = None if layer == "X" and "X" not in data.layers else layer
    if obsm is not None:
        table = anndata_table(title, data, Reading(None, layer, obsm))
        by_place = f"to go by place, make it an array, {argument}.obsm[{obsm!r}] = {argument}.obsm[{obsm!r}].to_numpy()"
        named = f"obsm[{obsm!r}] of {title}"
        places = feature_places(named, table.features, wanted, whose, remedy=by_place, warns=warns)
        if places is None or table.features is None:
            return Cells(title, table, data.obs, None, None)
        kept = np.sort(places)
        table = anndata_table(title, data, Reading([table.features[k] for k in kept], layer, obsm))
        return Cells(title, table, data.obs, None, _order(kept, places))
    remedy = ""
    if wanted is not None and not set(wanted) <= set(data.genes):
        remedy = _remedy(argument, data.var, set(wanted))
    places = feature_places(title, data.genes, wanted, whose, remedy=remedy, warns=warns)
    if places is None:
        return Cells(title, anndata_table(title, data, Reading(None, layer)), data.obs, data.var, None)
    kept = np.sort(places)
    table = anndata_table(title, data, Reading([data.genes[k] for k in kept], layer))
    return Cells(title, table, data.obs, data.var.iloc[kept], _order(kept, places))


def _order(kept: NDArray[Any], places: NDArray[Any]) -> NDArray[Any] | None:
    """Return where wanted places stand among those that are kept; ``None`` where they stand so."""
    order = np.searchsorted(kept, places)
    return None if (np.diff(order) == 1).all() else order


def _remedy(argument: str, var: Any, wanted: set[str]) -> str:
    """Return what to do about missing genes: they may be there by another kind of name."""
    by_name = [str(c) for c in var.columns if wanted <= {str(value) for value in var[c]}]
    if by_name:
        return f"var[{by_name[0]!r}] has them: set {argument}.var_names = {argument}.var[{by_name[0]!r}] first"
    found = len(wanted & set(map(str, var.index)))
    columns = f"; var has the columns {listed(map(str, var.columns))}" if len(var.columns) else ""
    return (
        f"{found} of {len(wanted)} are there{columns}. Name the genes in var_names as those that were trained on, and "
        "add genes that were not measured yourself"
    )
