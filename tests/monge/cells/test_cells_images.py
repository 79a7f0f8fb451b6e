"""AnnData through a map and back: genes by name, in whatever form the cells come."""

import re
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("anndata")
import anndata
from cell_sets import GENES, KINDS, Affine, at, by_name, cells

import lightning_gap
from lightning_gap import MongeMap
from lightning_gap.monge import MapEnsemble, ResidualMLP
from lightning_gap.monge.cells import images as module
from lightning_gap.monge.cells import pull, push, to_anndata
from lightning_gap.monge.samples.condition_encoding import ConditionEncoding

SHUFFLED = ["IFNG", "CD4", "CD3", "CD8"]


def expected(adata, layer=None):
    """2 x + 1 + the place of the gene in the map, gene by gene."""
    values = adata.to_df(layer)
    return np.stack([2 * values[gene] + 1 + GENES.index(gene) for gene in adata.var_names], axis=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", ["X", "logcounts"])
def test_images_stand_beside_the_cells(kind, layer, tmp_path):
    adata = cells(genes=SHUFFLED, layers=["logcounts"])
    pushed = push(by_name(), at(kind, adata, tmp_path), layer=layer)
    assert list(pushed.var_names) == SHUFFLED
    assert pushed.obs["drug"].tolist() == adata.obs["drug"].tolist()
    assert pushed.var["symbol"].tolist() == adata.var["symbol"].tolist()
    np.testing.assert_allclose(pushed.X, expected(adata, None if layer == "X" else layer), rtol=1e-6)
    assert pushed.X.dtype == np.float32
    assert set(pushed.layers) == {layer} - {"X"}
    assert dict(pushed.obsm) == {}
    if layer != "X":
        np.testing.assert_array_equal(pushed.layers[layer], pushed.X)
    if kind != "view":  # whose names got an ending
        assert list(pushed.obs_names) == list(adata.obs_names)
    back = pull(by_name(), pushed, layer=layer)
    np.testing.assert_allclose(back.X, adata.X if layer == "X" else adata.layers[layer], rtol=1e-5)


def test_the_cells_are_left_as_they_were():
    adata = cells(genes=SHUFFLED)
    before = adata.copy()
    pushed = by_name().push(adata)
    pushed.obs["drug"] = "none"
    pushed.var["symbol"] = ""
    pushed.X[:] = 0
    assert (adata.X == before.X).all()
    assert adata.obs.equals(before.obs)
    assert adata.var.equals(before.var)
    assert list(adata.uns) == []


def test_genes_that_the_map_does_not_know_are_left_out():
    adata = cells(genes=["CD8", "MT-1", "CD4", "IFNG", "CD3"])
    with pytest.warns(UserWarning, match="cells has 'MT-1', which the map does not know: ignored"):
        pushed = push(by_name(), adata)
    known = adata[:, ["CD8", "CD4", "IFNG", "CD3"]]
    assert list(pushed.var_names) == list(known.var_names)
    np.testing.assert_allclose(pushed.X, expected(known), rtol=1e-6)


def test_missing_genes_are_named_with_the_remedy():
    with pytest.raises(ValueError, match=r"cells has no 'CD3', 'CD8', which the map has .*2 of 4 are there; var has"):
        push(by_name(), cells(genes=["CD4", "IFNG"]))
    adata = cells()
    adata.var["symbol"], adata.var_names = adata.var_names, [f"ENSG{i}" for i in range(4)]
    with pytest.raises(ValueError, match=r"set cells.var_names = cells.var\['symbol'\] first"):
        push(by_name(), adata)
    adata.var_names = adata.var["symbol"]
    np.testing.assert_allclose(push(by_name(), adata).X, expected(adata), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_goes_by_place_and_stays_one(kind, tmp_path):
    adata, model = cells(), MongeMap(map=Affine(2))
    pushed = push(model, at(kind, adata, tmp_path), obsm="X_pca")
    assert pushed.shape == (12, 0)
    np.testing.assert_allclose(pushed.obsm["X_pca"], 2 * adata.obsm["X_pca"] + [1, 2], rtol=1e-5)
    np.testing.assert_allclose(pull(model, pushed, obsm="X_pca").obsm["X_pca"], adata.obsm["X_pca"], atol=1e-4)
    both = anndata.concat([adata, pushed], keys=["control", "images"], label="of", index_unique="-")
    assert both.obsm["X_pca"].shape == (24, 2)


def test_a_map_of_arrays_goes_by_place():
    adata = cells(genes=SHUFFLED)
    pushed = push(MongeMap(map=Affine()), adata)
    np.testing.assert_allclose(pushed.X, 2 * adata.X + [1, 2, 3, 4], rtol=1e-6)
    with pytest.raises(ValueError, match=r"cells has 2 genes, and the map takes 4: name the embedding"):
        push(MongeMap(map=Affine()), cells(genes=["CD3", "CD4"]))
    with pytest.raises(ValueError, match=r"cells has 2 columns in obsm\['X_pca'\], and the map takes 4"):
        push(MongeMap(map=Affine()), adata, obsm="X_pca")


@pytest.mark.parametrize("kind", ["memory", "path"])
def test_blocks_of_cells_are_as_one(kind, tmp_path, monkeypatch):
    adata, model = cells(genes=SHUFFLED), MongeMap(map=Affine(conditions=2), feature_names=GENES, condition_names="AB")
    whole = push(model, adata, condition_key="drug").X
    monkeypatch.setattr(module, "_NUMBERS", 12)
    given = at(kind, adata, tmp_path)
    for condition in (list(adata.obs["drug"]), np.array(adata.obs["drug"], dtype=str), adata.obs["drug"]):
        np.testing.assert_array_equal(push(model, given, condition, batch_size=2).X, whole)
    np.testing.assert_array_equal(push(model, given, condition_key="drug", batch_size=3).X, whole)
    assert len(push(model, given, "A", batch_size=5)) == 12


def test_conditions_are_columns_of_obs():
    adata = cells()
    model = MongeMap(map=Affine(conditions=2), feature_names=GENES, condition_names=["A", "B"])
    pushed = push(model, adata, condition_key="drug")
    np.testing.assert_allclose(pushed.X, expected(adata) + 1000 * np.array([[0], [1]] * 6), rtol=1e-6)
    other = push(model, adata, "B", condition_key="drug")
    np.testing.assert_allclose(other.X, expected(adata) + 1000, rtol=1e-6)
    assert other.obs["drug"].tolist() == ["B"] * 12
    np.testing.assert_allclose(pull(model, other, condition_key="drug").X, adata.X, atol=1e-3)
    adata.obs["drug"] = [None] + ["A"] * 11
    with pytest.raises(ValueError, match=r"'drug' of cells is missing in 1 cells \(the first is row 0\)"):
        push(model, adata, condition_key="drug")
    with pytest.raises(ValueError, match="condition_key: cells has no 'line'; there is 'drug', 'dose'"):
        push(model, adata, condition_key="line")
    with pytest.raises(ValueError, match="this map is conditional: give condition="):
        push(model, adata)


def test_conditions_of_several_columns_go_by_name():
    encoding = ConditionEncoding.fit(["drug", "dose"], ["category", "number"], [("A", "1"), ("B", "10")])
    net = Affine(condition_dim=encoding.dim)
    model = MongeMap(map=net, feature_names=GENES, condition_encoding=encoding)
    adata = cells()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pairs that were not trained on
        pushed = push(model, adata, condition_key=["drug", "dose"])
        under = push(model, adata, {"drug": "B", "dose": 10}, condition_key=["dose", "drug"])
    vectors = torch.cat([encoding.encode([(a, str(b))]) for a, b in zip(adata.obs.drug, adata.obs.dose, strict=True)])
    np.testing.assert_allclose(pushed.X, expected(adata) + 1000 * vectors.sum(-1, keepdim=True).numpy(), rtol=1e-5)
    assert (under.obs["drug"].unique().tolist(), under.obs["dose"].unique().tolist()) == (["B"], [10])
    with pytest.raises(ValueError, match="condition_key names 2 columns, and condition is 'B, 10'"):
        push(model, adata, "B, 10", condition_key=["drug", "dose"])
    with pytest.raises(ValueError, match="condition has no 'dose', which condition_key names"):
        push(model, adata, {"drug": "B"}, condition_key=["drug", "dose"])


def test_pull_starts_near_given_cells():
    adata = cells(genes=SHUFFLED)
    pushed = push(by_name(), adata)
    back = pull(by_name(), pushed, near=adata[:, GENES], max_iterations=50)
    np.testing.assert_allclose(back.X, adata.X, rtol=1e-5)


def test_images_of_other_origin():
    adata, model = cells(genes=SHUFFLED), by_name()
    images = model.transport(adata)  # in the map's order
    found = to_anndata(images, adata, genes=model.feature_names, layer="logcounts")
    np.testing.assert_allclose(found.X, push(model, adata).X)
    np.testing.assert_allclose(found.layers["logcounts"], found.X)
    assert (to_anndata(adata.X, adata).X == adata.X).all()
    assert (to_anndata(np.ones((12, 3)), adata, obsm="X_umap").obsm["X_umap"] == 1).all()
    some = to_anndata(np.ones((12, 2), dtype=int), adata, genes=["CD3", "IFNG"])
    assert list(some.var_names) == ["IFNG", "CD3"]
    for wrong, options, message in (
        (np.ones((11, 4)), {}, r"a row for each of 12 cells, got \(11, 4\)"),
        (np.ones((12, 3)), {}, "images have 3 columns for 4 genes: name them by genes="),
        (np.ones((12, 1)), {"genes": ["CD5"]}, "cells has no 'CD5', which images has among its features"),
        (np.ones((12, 1)), {"genes": ["CD3"], "obsm": "X_pca"}, "genes are for images of genes"),
    ):
        with pytest.raises(ValueError, match=message):
            to_anndata(wrong, adata, **options)


def test_images_go_into_a_file_and_come_back(tmp_path):
    pushed = push(by_name(), cells(layers=["logcounts"]), layer="logcounts")
    pushed.write_h5ad(tmp_path / "images.h5ad")
    found = anndata.read_h5ad(tmp_path / "images.h5ad")
    assert (found.X == pushed.X).all()
    assert dict(found.uns["lightning_gap"]) == {"made_by": "push", "model": "MongeMap", "layer": "logcounts"}


def test_a_transformer_of_scikit_learn_maps_cells():
    pytest.importorskip("sklearn")
    from lightning_gap.monge.estimator import MongeMapTransformer

    adata = cells(genes=SHUFFLED)
    frame = adata.to_df()[GENES]
    transformer = MongeMapTransformer(hidden=(4,), max_steps=1, random_state=0)
    transformer.fit(frame, frame[::-1] + np.float32(2))
    pushed = push(transformer, adata)
    np.testing.assert_allclose(pushed.to_df()[GENES], transformer.transform(frame), rtol=1e-6)
    np.testing.assert_allclose(pull(transformer, pushed).X, adata.X, atol=1e-3)
    with pytest.raises(ValueError, match="condition is for MongeMap, and MongeMapTransformer has none"):
        push(transformer, adata, "A")


def test_an_ensemble_pushes_and_does_not_pull():
    adata, ensemble = cells(), MapEnsemble([by_name(), by_name()])
    np.testing.assert_allclose(push(ensemble, adata).X, expected(adata), rtol=1e-6)
    with pytest.raises(TypeError, match="MapEnsemble has no inverse: pull through a MongeMap"):
        pull(ensemble, adata)


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        (np.ones((3, 4)), {}, TypeError, r"cells must be AnnData or the path to an .h5ad file, got ndarray"),
        ("none.h5ad", {}, FileNotFoundError, "cells: there is no file 'none.h5ad'"),
        ("cells.csv", {}, ValueError, "'cells.csv' is no .h5ad file"),
        ("cells.h5ad::X", {}, ValueError, r"'::X' is not for here: give layer= or obsm="),
        (None, {"layer": "counts"}, ValueError, "cells has no layer 'counts'; there is 'logcounts'"),
        (None, {"obsm": "X_umap"}, ValueError, "cells has no embedding 'X_umap'; there is 'X_pca'"),
        (None, {"layer": "logcounts", "obsm": "X_pca"}, ValueError, "exclude each other"),
        (None, {"batch_size": 0}, ValueError, "batch_size"),
        (None, {"condition": "A"}, ValueError, "this map has no conditions"),
    ],
)
def test_what_cannot_be_pushed_is_refused(given, options, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cells.csv").write_text("a\n1\n")
    (tmp_path / "cells.h5ad").write_text("a\n1\n")
    with pytest.raises(error, match=message):
        push(
            by_name(), cells(layers=["logcounts"] if "layer" in options else ()) if given is None else given, **options
        )


def test_what_is_no_map_is_refused():
    with pytest.raises(TypeError, match="model must be a MongeMap, a MapEnsemble or a fitted transformer"):
        push(ResidualMLP(4), cells())
    with pytest.raises(ValueError, match="cells is empty"):
        push(by_name(), cells()[:0])
    adata = cells()
    adata.X[3, 1] = np.nan
    with pytest.raises(ValueError, match="cells holds NaN or infinity in 1 of 12 rows"):
        push(by_name(), adata)


def test_which_values_is_asked_where_there_are_layers():
    for move in (push, pull):
        with pytest.raises(
            ValueError, match="cells has X and the layers 'logcounts': say which one the map was trained"
        ):
            move(by_name(), cells(layers=["logcounts"]))


def test_optional_libraries_are_imported_where_they_are_needed():
    for path in Path(lightning_gap.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^(import|from) (anndata|pandas|h5py|scanpy|pertpy)", text, re.MULTILINE), path


def conditional():
    return MongeMap(map=Affine(conditions=2), condition_names=["a", "b"])


def test_a_series_of_conditions_goes_by_place_whatever_its_index():
    asked = pd.Series(["a", "b"] * 4, index=range(100, 108))
    pushed = push(conditional(), cells(8), asked, condition_key="asked")
    assert pushed.obs["asked"].tolist() == asked.tolist()
    np.testing.assert_array_equal(pushed.X, push(conditional(), cells(8), asked.tolist()).X)
    one = push(conditional(), cells(8), torch.tensor(1), condition_key="asked")
    assert one.obs["asked"].tolist() == [1] * 8
    with pytest.raises(ValueError, match=r"condition has shape \(3,\) for 8 cells"):
        push(conditional(), cells(8), ["a", "b", "a"], condition_key="asked")


@pytest.mark.parametrize("one", [torch.tensor(1), np.array("b"), "b", ["b"]])
def test_one_condition_serves_every_block(one, monkeypatch):
    monkeypatch.setattr(module, "_NUMBERS", 8)
    expected = conditional().transport(cells(8).X, "b")
    np.testing.assert_array_equal(push(conditional(), cells(8), one, batch_size=2).X, expected)


@pytest.mark.parametrize("wrong", [["a", "b"], torch.tensor([0, 1]), pd.Series(["a", "b"]), np.array(["a", "b", "a"])])
def test_conditions_of_a_block_are_none_of_the_cells(wrong, monkeypatch):
    monkeypatch.setattr(module, "_NUMBERS", 8)
    with pytest.raises(ValueError, match="condition h"):
        push(conditional(), cells(8), wrong, batch_size=2)


def test_a_view_of_backed_sparse_cells_is_read_or_refused_with_the_remedy(tmp_path):
    adata = at("csr", cells(), tmp_path)
    view, said = at("backed", adata, tmp_path)[[4, 1]], "cells.to_memory()[rows]"
    try:
        pushed = push(by_name(), view)
    except ValueError as error:  # of releases of anndata and SciPy that do not go together here
        said = str(error)
        pushed = push(by_name(), anndata.read_h5ad(view.filename)[[4, 1]])
    assert "cells.to_memory()[rows]" in said
    np.testing.assert_allclose(pushed.X, expected(cells()[[4, 1]]), rtol=1e-6)
