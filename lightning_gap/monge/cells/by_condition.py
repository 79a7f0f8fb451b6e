"""How far images of cells are from treated cells, condition by condition."""

from collections.abc import Iterator, Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_gap.extras import library
from lightning_gap.monge.cells.groups import metrics_of
from lightning_gap.monge.cells.reading import Cells, check_genes, read_cells
from lightning_gap.monge.samples.features import listed
from lightning_gap.monge.scores.perturbation import PerturbationScores
from lightning_gap.monge.scores.population_distances import perturbation_distance

__all__ = ["distances_by_condition", "scores_by_condition"]

# The name of the row where there are no conditions.
_ALL = "all"


def distances_by_condition(
    mapped: Any,
    treated: Any,
    *,
    by: str | Sequence[str] | None = None,
    metrics: str | Sequence[str] = "edistance",
    layer: str | None = None,
    obsm: str | None = None,
    genes: Sequence[str] | None = None,
    **options: Any,
) -> Any:
    """Return the distances between images and treated cells, of each condition.

    Args:
        mapped: The images, as of :func:`push`: ``AnnData``, in memory or backed, or the path to an ``.h5ad`` file.
        treated: The treated cells, likewise. Their genes are put in the images' order, by name; others are left out.
        by: Column or columns of both ``obs`` that tell the condition, such as ``"drug"`` or ``["drug", "dose"]``;
            without it all cells are compared at once.
        metrics: Name of a distance, or several; see :func:`perturbation_distance`.
        layer: Layer of both; ``X`` by default.
        obsm: Embedding of both in place of a layer; columns of data frames go by name, too.
        genes: Names of the genes to compare in, such as the most variable ones; by default those of ``mapped``.
        **options: Of :func:`perturbation_distance`.

    Returns:
        Data frame with a row for each condition and a column for each metric.

    Raises:
        TypeError: An argument is no AnnData, or an option is not one of the metric.
        ValueError: A column, a gene or a metric does not exist, or there are no treated cells of a condition.

    Example:
        >>> import anndata, numpy as np, pandas as pd
        >>> obs = pd.DataFrame({"drug": ["A", "A", "B"]}, index=list("abc"))
        >>> mapped = anndata.AnnData(np.zeros((3, 2)), obs=obs)
        >>> treated = anndata.AnnData(np.array([[3.0, 4.0], [3.0, 4.0], [0.0, 1.0]]), obs=obs)
        >>> distances_by_condition(mapped, treated, by="drug", metrics="euclidean")["euclidean"].to_dict()
        {'A': 5.0, 'B': 1.0}
    """
    names = metrics_of(metrics)
    pairs = _pairs(mapped, treated, by, layer, obsm, genes)
    rows = {name: [perturbation_distance(x, y, m, **options) for m in names] for name, x, y, _ in pairs}
    return _table(rows, names, by)


def scores_by_condition(
    mapped: Any,
    treated: Any,
    *,
    by: str | Sequence[str] | None = None,
    treated_again: Any = None,
    layer: str | None = None,
    obsm: str | None = None,
    genes: Sequence[str] | None = None,
    max_samples: int = 2048,
) -> Any:
    """Return the five scores of the conditional Monge gap, of each condition and beside their floors.

    They are those of :class:`PerturbationScores`: ``r2``, ``drug_signature``, ``mmd``, ``wasserstein``,
    ``sinkhorn_divergence``, and of each its floor. They depend on the units and the number of features and on the
    numbers of cells; ``mmd`` and ``wasserstein`` are by other constants than pertpy's distances of these names.

    Args:
        mapped: The images, as of :func:`push`: ``AnnData``, in memory or backed, or the path to an ``.h5ad`` file.
        treated: The treated cells, likewise. Their genes are put in the images' order, by name; others are left out.
        by: Column or columns of both ``obs`` that tell the condition; without it all cells are compared at once.
        treated_again: Other treated cells, for the floors: such as those that were trained on, where ``treated`` was
            held out. By default one half of the treated cells is compared with the other half.
        layer: Layer of both; ``X`` by default.
        obsm: Embedding of both in place of a layer; columns of data frames go by name, too.
        genes: Names of the genes to score in; by default those of ``mapped``.
        max_samples: Most cells of each set and condition in the last three scores.

    Returns:
        Data frame with a row for each condition, and a column for each score and each floor.

    Raises:
        TypeError: An argument is no AnnData.
        ValueError: A column or a gene does not exist, or there are no treated cells of a condition.

    Example:
        >>> import anndata, numpy as np
        >>> cells = anndata.AnnData(np.random.default_rng(0).normal(size=(60, 3)))
        >>> scores = scores_by_condition(cells, cells)
        >>> scores.loc["all", ["r2", "drug_signature", "mmd"]].tolist()
        [1.0, 0.0, 0.0]
    """
    rows = {}
    for name, x, y, again in _pairs(mapped, treated, by, layer, obsm, genes, treated_again):
        metric = PerturbationScores(max_samples=max_samples)
        metric.update(x, x, y, target_again=again)
        rows[name] = {score: float(value) for score, value in metric.compute().items()}
    return _table(rows, list(next(iter(rows.values()))), by)


def _pairs(
    mapped: Any,
    treated: Any,
    by: str | Sequence[str] | None,
    layer: str | None,
    obsm: str | None,
    genes: Sequence[str] | None,
    again: Any = None,
) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
    """Yield the samples of each condition, in double precision."""
    check_genes(genes, obsm)
    first = read_cells("mapped", mapped, genes, whose="the argument genes", layer=layer, obsm=obsm, warns=False)
    # Of an embedding they are the names of a data frame's columns, and of an array there are none.
    wanted = first.table.features if genes is None else genes
    others = {
        name: read_cells(name, given, wanted, whose="mapped", layer=layer, obsm=obsm, warns=False)
        for name, given in (("treated", treated), ("treated_again", again))
        if given is not None
    }
    for cells in others.values():
        if cells.table.dim != first.table.dim:
            raise ValueError(
                f"{cells.title} has {cells.table.dim} features, and mapped {first.table.dim}: give the same ones"
            )
    rows, rows_of = _rows(first, by), {name: _rows(cells, by) for name, cells in others.items()}
    for name, found in rows_of.items():
        missing = [condition for condition in rows if condition not in found]
        if missing:
            raise ValueError(f"{name} has no cells of {listed(missing)}; there is {listed(found, 12)}")
    unmapped = [condition for condition in rows_of["treated"] if condition not in rows]
    if unmapped:
        rank_zero_warn(f"treated has cells of {listed(unmapped)}, and mapped has none: these are not scored")
    for condition, chosen in rows.items():
        of = {name: cells.samples(rows_of[name][condition]).double() for name, cells in others.items()}
        yield condition, first.samples(chosen).double(), of["treated"], of.get("treated_again")


def _rows(cells: Cells, by: str | Sequence[str] | None) -> dict[str, Any]:
    return {_ALL: None} if by is None else cells.groups("by", [by] if isinstance(by, str) else by)


def _table(rows: dict[str, Any], columns: list[str], by: str | Sequence[str] | None) -> Any:
    pd = library("pandas", "a table of scores", "files")
    name = None if by is None else by if isinstance(by, str) else ", ".join(by)
    values = [[row[c] for c in columns] if isinstance(row, dict) else row for row in rows.values()]
    return pd.DataFrame(values, index=pd.Index(list(rows), name=name), columns=columns)
