"""AnnData through a map, forwards and backwards, as AnnData."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_gap.checks import check_integer
from lightning_gap.extras import library
from lightning_gap.monge.cells.models import CellMap, as_cell_map, written_conditions
from lightning_gap.monge.cells.reading import Cells, check_genes, read_cells

__all__ = ["pull", "push", "to_anndata"]

# Numbers of a block that is read at once: 64 MiB in single precision.
_NUMBERS = 2**24


def push(
    model: Any,
    cells: Any,
    condition: Any = None,
    *,
    condition_key: str | Sequence[str] | None = None,
    layer: str | None = None,
    obsm: str | None = None,
    batch_size: int = 65_536,
) -> Any:
    r"""Return the images :math:`T(x)` of cells, as AnnData.

    Genes go by name, whatever their order in ``cells``; the images have them in that order, so that they stand beside
    the given ones. Genes that the map does not know are left out, with a warning. A map that was trained on arrays, or
    on an embedding without names, goes by place; a data frame in ``obsm`` has names.

    Cells are read a block at once, from memory, from the file of a backed object, or from a path.

    Args:
        model: A fitted :class:`MongeMap`, a :class:`MapEnsemble`, or a fitted transformer of scikit-learn such as
            :class:`MongeMapTransformer`.
        cells: ``AnnData``, in memory or backed, or the path to an ``.h5ad`` file.
        condition: For a conditional map, as in :meth:`MongeMap.transport`: one condition for all cells or one for each.
        condition_key: Column of ``obs`` that holds each cell's condition, or columns, as ``["drug", "dose"]``. With
            ``condition`` it is where the images' ``obs`` says under which one they were mapped.
        layer: Layer of the cells; ``X`` by default where there is no layer, ``"X"`` where there are some.
        obsm: Embedding in place of a layer, as ``"X_pca"``.
        batch_size: Rows that go through the network at once.

    Returns:
        AnnData with the cells' ``obs``. Of genes, images are in ``X``, and with ``layer`` in the layer of this name,
        too, and ``var`` is the cells'. Of an embedding they are in ``obsm[obsm]``, as a data frame if it is one, and
        there are no genes. What was computed from the given values, such as neighbours and other embeddings, is not
        taken over; ``uns["lightning_gap"]`` says what made them.

    Raises:
        FileNotFoundError: There is no such file.
        ModuleNotFoundError: There is no anndata: ``pip install 'lightning_gap[files]'``.
        TypeError: ``cells`` is no AnnData, or ``model`` no map.
        ValueError: A gene of the map is missing, a layer or column does not exist, values are not finite, dimensions do
            not fit, or a condition is not known.

    Example:
        >>> import anndata, torch
        >>> from lightning_gap import MongeMap
        >>> from lightning_gap.monge import ResidualMLP
        >>> net, x = ResidualMLP(2, start="mean"), torch.randn(100, 2)
        >>> net.start(x, x + torch.tensor([0.0, 3.0]))
        >>> model = MongeMap(map=net, feature_names=["CD4", "CD8"])
        >>> cells = anndata.AnnData(x[:, [1, 0]].numpy())
        >>> cells.var_names = ["CD8", "CD4"]
        >>> images = push(model, cells)
        >>> list(images.var_names), (images.X - cells.X).mean(0).round(3).tolist()
        (['CD8', 'CD4'], [3.0, 0.0])
    """
    check_integer("batch_size", batch_size)
    cell_map = as_cell_map(model)
    read = _read(cell_map, "cells", cells, layer, obsm, "the map", cell_map.features)
    asked, written = _conditions(read, condition, condition_key)
    step = max(1, _NUMBERS // max(1, read.table.dim) // batch_size) * batch_size
    _refuse_wrong_lengths(cell_map, read, asked, step)
    images: Tensor | None = None
    for start in range(0, len(read), step):
        rows = np.arange(start, min(start + step, len(read)))
        samples = read.samples(None if len(rows) == len(read) else rows)
        moved = read.in_own_order(cell_map.forward(samples, _of_rows(asked, rows, len(read)), batch_size))
        if len(moved) == len(read):
            images = moved
            break
        images = moved.new_empty(len(read), moved.shape[1]) if images is None else images
        images[start : start + len(moved)] = moved
    if images is None:
        read.samples()  # says what is wrong
    assert images is not None
    return _as_anndata(images, read, layer, obsm, written, {"made_by": "push", "model": cell_map.title})


def pull(
    model: Any,
    cells: Any,
    condition: Any = None,
    *,
    condition_key: str | Sequence[str] | None = None,
    layer: str | None = None,
    obsm: str | None = None,
    near: Any = None,
    **options: Any,
) -> Any:
    r"""Return the cells whose images are given, :math:`T(x) = y`, as AnnData: where treated cells would come from.

    They are solved for, cell by cell, by :meth:`MongeMap.inverse`, which warns where the map has no preimage or several
    ones, or by ``inverse_transform`` of a transformer.

    Args:
        model: A fitted :class:`MongeMap`, or a transformer of scikit-learn that has an inverse.
        cells: The images: ``AnnData``, in memory or backed, or the path to an ``.h5ad`` file.
        condition: As in :func:`push`: that under which they are images.
        condition_key: As in :func:`push`.
        layer: As in :func:`push`.
        obsm: As in :func:`push`.
        near: Cells of the source from which the search starts, likewise, as in :meth:`MongeMap.inverse`.
        **options: ``tolerance`` and ``max_iterations`` of :meth:`MongeMap.inverse`.

    Returns:
        AnnData, as of :func:`push`.

    Raises:
        TypeError: ``cells`` is no AnnData, or the model has no inverse.
        ValueError: As of :func:`push`; or the network has no gradient in its samples.

    Example:
        >>> import anndata, torch
        >>> from lightning_gap import MongeMap
        >>> from lightning_gap.monge import ResidualMLP
        >>> net, x = ResidualMLP(2, start="gaussian"), torch.randn(100, 2)
        >>> net.start(x, 2 * x + 1)
        >>> model, cells = MongeMap(map=net), anndata.AnnData(x.numpy())
        >>> bool(abs(pull(model, push(model, cells)).X - cells.X).max() < 1e-3)
        True
    """
    cell_map = as_cell_map(model)
    if cell_map.backward is None:
        raise TypeError(f"{cell_map.title} has no inverse: pull through a MongeMap, as one of an ensemble's maps")
    read = _read(cell_map, "cells", cells, layer, obsm, "the map", cell_map.features)
    asked, written = _conditions(read, condition, condition_key)
    if near is not None:
        # A map that goes by place says nothing of the order, and the cells do.
        like = ("the map", cell_map.features) if cell_map.features is not None else ("cells", read.table.features)
        options["near"] = _read(cell_map, "near", near, layer, obsm, *like).samples()
    points = cell_map.backward(read.samples(), asked, **options)
    return _as_anndata(
        read.in_own_order(points), read, layer, obsm, written, {"made_by": "pull", "model": cell_map.title}
    )


def to_anndata(
    images: Any,
    cells: Any,
    *,
    genes: Sequence[str] | None = None,
    layer: str | None = None,
    obsm: str | None = None,
) -> Any:
    """Return images of cells as AnnData, beside the cells that they are images of.

    :func:`push` makes both; this is for what is computed otherwise, as by :meth:`MongeMap.transport` or
    :meth:`MongeMap.interpolate`.

    Args:
        images: ``(n, d)`` tensor or array, a row a cell.
        cells: The cells, in the same order: ``AnnData``, or the path to an ``.h5ad`` file.
        genes: Names of the columns of ``images``, as ``model.feature_names``; by default the cells' genes, in their
            order.
        layer: Name of a layer that gets the images beside ``X``.
        obsm: Name of the embedding that the images are, in place of genes.

    Returns:
        AnnData, as of :func:`push`: the genes are in the cells' order.

    Raises:
        TypeError: ``cells`` is no AnnData.
        ValueError: Rows or columns do not fit, or a gene is not among the cells'.

    Example:
        >>> import anndata, numpy as np
        >>> cells = anndata.AnnData(np.zeros((3, 2), dtype=np.float32))
        >>> cells.var_names = ["CD4", "CD8"]
        >>> to_anndata(np.array([[1, 2], [3, 4], [5, 6]]), cells, genes=["CD8", "CD4"]).to_df().loc["0"].to_dict()
        {'CD4': 2.0, 'CD8': 1.0}
    """
    if genes is not None and obsm is not None:
        raise ValueError(f"genes are for images of genes, but obsm={obsm!r} says that they are an embedding: give one")
    check_genes(genes, None)
    found = images.detach().cpu() if isinstance(images, Tensor) else torch.from_numpy(np.array(images))
    found = found if found.dtype in (torch.float32, torch.float64) else found.to(torch.float32)
    # The values of the cells are not read: any that are there tell rows and genes.
    read = read_cells("cells", cells, None if genes is None else list(map(str, genes)), whose="images", warns=False)
    if found.dim() != 2 or len(found) != len(read):
        raise ValueError(
            f"images must have shape (n, d), a row for each of {len(read)} cells, got {tuple(found.shape)}"
        )
    if obsm is None and found.shape[1] != len(read.var):
        raise ValueError(f"images have {found.shape[1]} columns for {len(read.var)} genes: name them by genes=")
    return _as_anndata(read.in_own_order(found), read, layer, obsm, {}, {"made_by": "to_anndata"})


def _read(
    cell_map: CellMap,
    argument: str,
    cells: Any,
    layer: str | None,
    obsm: str | None,
    whose: str,
    wanted: Sequence[str] | None,
) -> Cells:
    read = read_cells(argument, cells, wanted, whose=whose, layer=layer, obsm=obsm, asks_which=True)
    if cell_map.dim is not None and read.table.dim != cell_map.dim:
        what = "genes" if obsm is None else f"columns in obsm[{obsm!r}]"
        remedy = "" if obsm is not None else ": name the embedding that it was trained on by obsm=, or take its genes"
        raise ValueError(f"{read.title} has {read.table.dim} {what}, and the map takes {cell_map.dim}{remedy}")
    return read


def _conditions(cells: Cells, condition: Any, key: str | Sequence[str] | None) -> tuple[Any, dict[str, Any]]:
    """Return the conditions that are asked for, and what of them is written into ``obs``."""
    columns = [] if key is None else [key] if isinstance(key, str) else list(map(str, key))
    if condition is not None or key is None:
        if key is None:
            return condition, {}
        asked = written_conditions(condition, columns)
        return condition, {column: _as_column(column, value, len(cells)) for column, value in asked.items()}
    labels = {column: cells.labels("condition_key", column) for column in columns}
    return (list(labels[columns[0]]) if len(columns) == 1 else labels), {}


def _as_column(column: str, value: Any, length: int) -> Any:
    """Return what ``obs`` takes: one value, or one for each cell, of whatever index."""
    if hasattr(value, "iloc"):
        value = value.array  # a series would go by its index, which need not be that of the cells
    elif isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    shape = np.shape(value)
    if not shape:
        return value.item() if hasattr(value, "item") else value
    if shape == (1,):
        return value[0]
    if shape != (length,):
        raise ValueError(
            f"condition_key={column!r} writes a condition into obs, and condition has shape {shape} for {length} "
            "cells: give one or one for each cell, by name, or leave condition_key out"
        )
    return value


def _refuse_wrong_lengths(cell_map: CellMap, cells: Cells, asked: Any, step: int) -> None:
    """Refuse conditions that fit the rows of a block and not the cells, by what the map says of them and one cell."""
    blocks = {step, len(cells) % step}
    for value in asked.values() if isinstance(asked, Mapping) else [asked]:
        sized = hasattr(value, "__len__") and not isinstance(value, str) and np.ndim(value) > 0
        if sized and 1 < len(value) < len(cells) and len(value) in blocks:
            first = np.arange(1)
            try:
                cell_map.forward(cells.samples(first), _of_rows(asked, first, len(cells)), 1)
            except ValueError as error:
                raise ValueError(
                    f"condition has {len(value)} entries for {len(cells)} cells: give one, or one for each cell"
                ) from error


def _of_rows(conditions: Any, rows: NDArray[Any], length: int) -> Any:
    """Return the conditions of some rows, where there is one for each."""
    if len(rows) == length:
        return conditions
    if isinstance(conditions, dict):
        return {name: _of_rows(values, rows, length) for name, values in conditions.items()}
    if hasattr(conditions, "iloc"):
        return conditions.iloc[rows] if len(conditions) == length else conditions
    single = isinstance(conditions, str) or not hasattr(conditions, "__len__") or np.ndim(conditions) == 0
    if single or len(conditions) != length:
        return conditions
    return conditions[rows] if hasattr(conditions, "shape") else [conditions[row] for row in rows]


def _as_anndata(
    images: Tensor, cells: Cells, layer: str | None, obsm: str | None, written: dict[str, Any], made: dict[str, str]
) -> Any:
    anndata = library("anndata", "AnnData of images", "files")
    obs = cells.obs.copy()
    for column, value in written.items():
        obs[column] = value
    array = images.detach().cpu().numpy()
    if obsm is not None:
        # Without genes, but with X: anndata joins no objects of which some have one.
        nothing = np.zeros((len(array), 0), dtype=array.dtype)
        embedded: Any = array
        if cells.var is None and cells.table.features is not None:
            pd = library("pandas", "an embedding of named columns", "files")
            embedded = pd.DataFrame(array, columns=list(cells.table.features), index=obs.index)
        return anndata.AnnData(nothing, obs=obs, obsm={obsm: embedded}, uns={"lightning_gap": made | {"obsm": obsm}})
    layers = {} if layer in (None, "X") else {layer: array.copy()}
    made = made if layer is None else made | {"layer": layer}
    return anndata.AnnData(array, obs=obs, var=cells.var.copy(), layers=layers, uns={"lightning_gap": made})
