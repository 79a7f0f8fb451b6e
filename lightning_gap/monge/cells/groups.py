"""Distances between the groups of cells of one AnnData."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_gap.extras import library
from lightning_gap.monge.cells.reading import Cells, check_genes, read_cells
from lightning_gap.monge.samples.combinations import rows_of_codes
from lightning_gap.monge.samples.features import listed
from lightning_gap.monge.samples.files.table import as_texts
from lightning_gap.monge.scores.population_distances import check_distance, perturbation_distance

__all__ = ["distances_to", "metrics_of", "pairwise_distances"]


def distances_to(
    cells: Any,
    groupby: str,
    reference: Any,
    *,
    metrics: str | Sequence[str] = "edistance",
    by: str | Sequence[str] | None = None,
    groups: Sequence[Any] | None = None,
    layer: str | None = None,
    obsm: str | None = None,
    genes: Sequence[str] | None = None,
    **options: Any,
) -> Any:
    """Return the distance of each group of cells to a group of reference, such as the controls.

    The names and the values are those of pertpy's ``Distance(metric).onesided_distances``, see
    :func:`perturbation_distance`; there the default is ``obsm="X_pca"``, and here it is ``X``.

    Args:
        cells: ``AnnData``, in memory or backed, or the path to an ``.h5ad`` file.
        groupby: Column of ``obs`` that tells the groups, such as ``"perturbation"``.
        reference: Its value for the cells that the others are compared with.
        metrics: Name of a distance, or several.
        by: Column or columns of ``obs``, such as ``"cell_type"``, within whose values groups are compared.
        groups: The groups to compare; by default all others.
        layer: Layer of the cells; ``X`` by default.
        obsm: Embedding in place of a layer.
        genes: Names of the genes to compare in; all by default.
        **options: Of :func:`perturbation_distance`.

    Returns:
        Data frame with a row for each group, or for each value of ``by`` and group, and a column for each metric.

    Raises:
        TypeError: ``cells`` is no AnnData, or an option is not one of the metric.
        ValueError: A column, a group, a gene or a metric does not exist, or a value of ``by`` has no cells of the
            reference.

    Example:
        >>> import anndata, numpy as np, pandas as pd
        >>> obs = pd.DataFrame({"drug": ["none", "none", "A", "A"]}, index=list("abcd"))
        >>> cells = anndata.AnnData(np.array([[0.0, 0.0], [2.0, 0.0], [1.0, 3.0], [1.0, 5.0]]), obs=obs)
        >>> distances_to(cells, "drug", "none", metrics=["euclidean", "mse"]).loc["A"].tolist()
        [4.0, 8.0]
    """
    names, pd = metrics_of(metrics), library("pandas", "a table of distances", "files")
    read, (wanted, other) = _read(cells, genes, layer, obsm), (None, str(as_texts(np.array([reference], object))[0]))
    if groups is not None:
        wanted = _chosen(groups)
    index, values = [], []
    for value, found in _groups_within(read, groupby, by):
        _check_groups(read, groupby, [other, *([] if by is not None or wanted is None else wanted)], found, value)
        y = read.samples(found[other])
        for group in found if wanted is None else [g for g in wanted if g in found]:
            if group != other:
                x = read.samples(found[group])
                index.append(group if by is None else (value, group))
                values.append([perturbation_distance(x, y, metric, **options) for metric in names])
    if not index:
        raise ValueError(f"{groupby!r} of {read.title} has no other group than {other!r} to compare with it")
    if by is None:
        axis = pd.Index(index, name=groupby)
    else:
        axis = pd.MultiIndex.from_tuples(index, names=[_joined(by), groupby])
    return pd.DataFrame(values, index=axis, columns=names)


def pairwise_distances(
    cells: Any,
    groupby: str,
    *,
    metric: str = "edistance",
    groups: Sequence[Any] | None = None,
    layer: str | None = None,
    obsm: str | None = None,
    genes: Sequence[str] | None = None,
    **options: Any,
) -> Any:
    """Return the distances between all groups of cells.

    The names and the values are those of pertpy's ``Distance(metric).pairwise``, see :func:`perturbation_distance`: a
    group is at distance 0 from itself, and each pair is computed once, in the order of the groups.

    Args:
        cells: ``AnnData``, in memory or backed, or the path to an ``.h5ad`` file.
        groupby: Column of ``obs`` that tells the groups.
        metric: Name of the distance.
        groups: The groups to compare; by default all, in the order of their names.
        layer: Layer of the cells; ``X`` by default.
        obsm: Embedding in place of a layer.
        genes: Names of the genes to compare in; all by default.
        **options: Of :func:`perturbation_distance`.

    Returns:
        Symmetric data frame with a row and a column for each group.

    Raises:
        TypeError: ``cells`` is no AnnData, or an option is not one of the metric.
        ValueError: A column, a group, a gene or the metric does not exist.

    Example:
        >>> import anndata, numpy as np, pandas as pd
        >>> obs = pd.DataFrame({"drug": ["none", "A", "B"]}, index=list("abc"))
        >>> cells = anndata.AnnData(np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]]), obs=obs)
        >>> float(pairwise_distances(cells, "drug", metric="euclidean").loc["none", "A"])
        5.0
    """
    (name,), pd = metrics_of(metric), library("pandas", "a table of distances", "files")
    read = _read(cells, genes, layer, obsm)
    ((_, found),) = _groups_within(read, groupby, None)
    chosen = list(found) if groups is None else _chosen(groups)
    _check_groups(read, groupby, chosen, found, "")
    samples = {group: read.samples(found[group]) for group in chosen}
    axis = pd.Index(chosen, name=groupby)
    table = pd.DataFrame(0.0, index=axis, columns=axis)
    for first, second in combinations(chosen, 2):
        distance = perturbation_distance(samples[first], samples[second], name, **options)
        table.loc[first, second] = table.loc[second, first] = distance
    return table


def metrics_of(metrics: str | Sequence[str]) -> list[str]:
    """Return the names of metrics, each of which is known."""
    names = [metrics] if isinstance(metrics, str) else list(metrics)
    if not names:
        raise ValueError("metrics is empty: name one at least")
    for name in names:
        check_distance(name)
    return names


def _read(cells: Any, genes: Sequence[str] | None, layer: str | None, obsm: str | None) -> Cells:
    check_genes(genes, obsm)
    # Others are left out on purpose, and are no cause of a warning.
    return read_cells("cells", cells, genes, whose="the argument genes", layer=layer, obsm=obsm, warns=False)


def _chosen(groups: Any) -> list[str]:
    """Return the groups that are asked for, each once."""
    if isinstance(groups, str):
        raise TypeError(f"groups must be a list of groups, got {groups!r}: write groups=[{groups!r}]")
    texts: list[str] = as_texts(np.array(list(groups), dtype=object)).tolist()
    if not texts:
        raise ValueError("groups is empty: name one at least, or leave it out for all")
    if twice := [text for k, text in enumerate(texts) if text in texts[:k]]:
        raise ValueError(f"groups names {listed(twice)} twice: name each group once")
    return texts


def _groups_within(
    cells: Cells, groupby: str, by: str | Sequence[str] | None
) -> Iterator[tuple[str, dict[str, NDArray[Any]]]]:
    """Yield each value of other columns, with the rows of each group that are of it."""
    groups = cells.groups("groupby", [groupby])
    if by is None:
        yield "", groups
        return
    codes = np.empty(len(cells), dtype=np.int64)
    for code, members in enumerate(groups.values()):
        codes[members] = code
    for value, rows in cells.groups("by", [by] if isinstance(by, str) else by).items():
        within = zip(groups, rows_of_codes(codes[rows], len(groups)), strict=True)
        yield value, {group: rows[members] for group, members in within if members.size}


def _check_groups(
    cells: Cells, groupby: str, wanted: Sequence[str], found: dict[str, NDArray[Any]], value: str
) -> None:
    for group in wanted:
        if group not in found:
            where = f" within {value!r}" if value else ""
            raise ValueError(f"{groupby!r} of {cells.title} is never {group!r}{where}; there is {listed(found, 12)}")


def _joined(by: str | Sequence[str]) -> str:
    return by if isinstance(by, str) else ", ".join(by)
