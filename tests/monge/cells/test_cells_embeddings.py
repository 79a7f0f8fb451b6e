"""Embeddings that are data frames: their columns go by name, through a map and beside treated cells."""

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("anndata")
from cell_sets import Affine, by_name, cells

from lightning_gap import MongeMap
from lightning_gap.monge.cells import distances_by_condition, pull, push, scores_by_condition

FACTORS = ["f1", "f2", "f3"]


def framed(columns=FACTORS, n=8, seed=0):
    """Cells with three factors, whose values tell which one it is."""
    adata = cells(n)
    values = np.random.default_rng(seed).random((n, 3)).astype(np.float32) + 10 * np.arange(3, dtype=np.float32)
    adata.obsm["f"] = pd.DataFrame(values, columns=FACTORS, index=adata.obs_names)[list(columns)]
    return adata


@pytest.mark.parametrize("kind", ["memory", "path"])
def test_factors_go_by_name_and_keep_their_names(kind, tmp_path):
    model, adata = by_name(FACTORS), framed(["f3", "f1", "f2"])
    given = adata
    if kind == "path":
        given = tmp_path / "cells.h5ad"
        adata.write_h5ad(given)
    pushed = push(model, given, obsm="f")
    frame = pushed.obsm["f"]
    assert (list(frame.columns), list(frame.index)) == (["f3", "f1", "f2"], list(adata.obs_names))
    for place, name in enumerate(FACTORS):
        np.testing.assert_allclose(frame[name], 2 * adata.obsm["f"][name] + place + 1, rtol=1e-6)
    by_transport = model.transport(adata, obsm="f").numpy()
    np.testing.assert_allclose(frame[FACTORS], by_transport, rtol=1e-6)
    back = pull(model, pushed, obsm="f", near=framed(seed=1))
    np.testing.assert_allclose(back.obsm["f"], adata.obsm["f"], rtol=1e-5)


def test_further_factors_are_warned_of_and_missing_ones_refused():
    adata = framed(["f3", "f1", "f2"])
    with pytest.warns(UserWarning, match=r"obsm\['f'\] of cells has 'f1', which the map does not know"):
        pushed = push(by_name(["f2", "f3"]), adata, obsm="f").obsm["f"]
    assert list(pushed.columns) == ["f3", "f2"]
    np.testing.assert_allclose(pushed["f2"], 2 * adata.obsm["f"]["f2"] + 1, rtol=1e-6)
    with pytest.raises(ValueError, match=r"has no 'g'.*to go by place, make it an array"):
        push(by_name(["f1", "g", "f2"]), adata, obsm="f")
    adata.obsm["f"] = adata.obsm["f"].to_numpy()
    assert isinstance(push(by_name(["f1", "g", "f2"]), adata, obsm="f").obsm["f"], np.ndarray)


def test_cells_to_search_near_are_put_in_the_cells_order_where_the_map_has_no_names():
    model, adata = MongeMap(map=Affine(3)), framed()
    asked = []
    model.inverse = lambda points, condition, *, near: asked.append(near) or points
    for near in (framed(seed=1), framed(["f2", "f3", "f1"], seed=1)):
        pull(model, adata, obsm="f", near=near)
    assert (asked[0] == asked[1]).all()
    genes = adata[:, ["CD8", "CD3", "CD4"]].copy()
    pull(model, genes, near=adata[:, ["CD3", "CD4", "CD8"]].copy())
    assert (asked[2].numpy() == genes.X).all()


def test_sides_are_compared_by_name():
    mapped, treated = framed(), framed(["f2", "f3", "f1"])
    assert distances_by_condition(mapped, treated, obsm="f", metrics="euclidean").loc["all", "euclidean"] == 0
    scores = scores_by_condition(mapped, treated, treated_again=framed(["f3", "f2", "f1"]), obsm="f")
    assert scores.loc["all", ["drug_signature", "drug_signature_floor"]].tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"obsm\['f'\] of treated has no 'f3', which mapped has"):
        distances_by_condition(mapped, framed(["f1", "f2"]), obsm="f")
