"""Distances between groups of cells: pair by pair, by pertpy's rules."""

import numpy as np
import pytest

pytest.importorskip("anndata")
from cell_sets import KINDS, at, cells

from lightning_gap.monge.cells import distances_by_condition, distances_to, pairwise_distances, to_anndata
from lightning_gap.monge.cells.groups import _groups_within
from lightning_gap.monge.cells.reading import read_cells
from lightning_gap.monge.scores import perturbation_distance


def of(adata, genes=None, **columns):
    chosen = np.ones(adata.n_obs, dtype=bool)
    for name, value in columns.items():
        chosen &= (adata.obs[name] == value).to_numpy()
    return adata[chosen, slice(None) if genes is None else genes]


@pytest.mark.parametrize("kind", KINDS)
def test_each_group_is_compared_with_the_reference(kind, tmp_path):
    adata = cells(n=20)
    found = distances_to(at(kind, adata, tmp_path), "dose", 1, metrics=["edistance", "mse"])
    assert (found.index.name, list(found.index), list(found.columns)) == ("dose", ["10"], ["edistance", "mse"])
    for metric in found:
        expected = perturbation_distance(of(adata, dose=10).X, of(adata, dose=1).X, metric)
        assert found.loc["10", metric] == pytest.approx(expected, rel=1e-12)


def test_groups_are_compared_within_others():
    adata = cells(n=20, layers=["logcounts"])
    options = {"layer": "logcounts", "genes": ["IFNG", "CD4"], "metrics": "mahalanobis"}
    found = distances_to(adata, "dose", "1", by="drug", **options)
    assert list(found.index.names) == ["drug", "dose"]
    assert list(found.index) == [("A", "10"), ("B", "10")]
    for drug in "AB":
        sides = [of(adata, options["genes"], drug=drug, dose=dose).layers["logcounts"] for dose in (10, 1)]
        assert found.loc[(drug, "10"), "mahalanobis"] == pytest.approx(perturbation_distance(*sides, "mahalanobis"))
    joint = distances_to(adata, "dose", 1, by=["drug"], **options)
    assert joint.equals(found)
    chosen = distances_to(adata, "drug", "A", groups=["B"], metrics="mmd", kernel="rbf", gamma=0.1)
    sides = of(adata, drug="B").X, of(adata, drug="A").X
    expected = perturbation_distance(*sides, "mmd", kernel="rbf", gamma=0.1)
    assert chosen.loc["B", "mmd"] == pytest.approx(expected)


def test_all_pairs():
    adata = cells(n=20, line=["x", "y", "z", "y"] * 5)
    found = pairwise_distances(adata, "line", obsm="X_pca")
    assert (found.index.name, found.columns.name, list(found.index), list(found)) == (
        ("line", "line", list("xyz"), list("xyz"))
    )
    assert np.array_equal(found, found.T)
    for a in "xyz":
        for b in "xyz":
            sides = of(adata, line=a).obsm["X_pca"], of(adata, line=b).obsm["X_pca"]
            assert found.loc[a, b] == pytest.approx(perturbation_distance(*sides), abs=1e-12)
    some = pairwise_distances(adata, "line", groups=["z", "x"], metric="r2_distance")
    sides = of(adata, line="z").X, of(adata, line="x").X
    assert some.loc["x", "z"] == some.loc["z", "x"] == pytest.approx(perturbation_distance(*sides, "r2_distance"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: distances_to(a, "drug", "C"), "'drug' of cells is never 'C'; there is 'A', 'B'"),
        (lambda a: distances_to(a, "drug", "A", groups=["C"]), "'drug' of cells is never 'C'"),
        (lambda a: distances_to(a, "line", "A"), "groupby: cells has no 'line'; there is 'drug', 'dose'"),
        (lambda a: distances_to(a, "drug", "A", by="line"), "by: cells has no 'line'"),
        (lambda a: distances_to(a, "drug", "A", by="drug"), "'drug' of cells is never 'A' within 'B'"),
        (lambda a: distances_to(a, "drug", "A", metrics=[]), "metrics is empty"),
        (lambda a: distances_to(a, "drug", "A", metrics=["mse", "emd"]), "metric must be one of edistance"),
        (lambda a: distances_to(a, "drug", "A", genes=["CD5"]), "cells has no 'CD5', which the argument genes has"),
        (lambda a: distances_to(a, "drug", "A", genes=["CD4"], obsm="X_pca"), "obsm='X_pca' has no genes"),
        (lambda a: distances_to(a[a.obs.drug == "A"], "drug", "A"), "has no other group than 'A'"),
        (lambda a: pairwise_distances(a, "drug", groups=["A", "C"]), "'drug' of cells is never 'C'"),
        (lambda a: pairwise_distances(a, "drug", metric="classifier_proba"), "draws another fifth of the cells"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(cells())


def test_combinations_of_one_name_are_refused():
    adata = cells(n=8, drug=["A, B", "A"] * 4, line=["C", "B, C"] * 4)
    for call in (
        lambda: distances_to(adata, "dose", 1, by=["drug", "line"]),
        lambda: distances_by_condition(adata, adata, by=["drug", "line"]),
    ):
        with pytest.raises(ValueError, match=r"columns 'drug', 'line' have one name, 'A, B, C'.*replace the commas"):
            call()


def test_groups_within_values_are_those_of_a_slow_twin():
    rng = np.random.default_rng(0)
    adata = cells(n=60 * 4, g=rng.choice(list("zyxw"), 240), a=rng.integers(0, 12, 240), b=rng.choice(["p", "q"], 240))
    read = read_cells("cells", adata)
    found = dict(_groups_within(read, "g", ["a", "b"]))
    names = sorted({f"{a}, {b}" for a, b in zip(adata.obs["a"], adata.obs["b"], strict=True)})
    assert list(found) == names
    for name, groups in found.items():
        a, b = name.split(", ")
        for group in sorted(set(adata.obs["g"])):
            chosen = (adata.obs["g"] == group) & (adata.obs["a"] == int(a)) & (adata.obs["b"] == b)
            assert groups.get(group, np.zeros(0)).tolist() == np.flatnonzero(chosen).tolist()
        assert list(groups) == sorted(groups)


def test_a_text_is_no_list_and_each_group_is_named_once():
    adata = cells()
    for call in (
        lambda: distances_to(adata, "drug", "A", genes="CD4"),
        lambda: pairwise_distances(adata, "drug", genes="CD4"),
        lambda: distances_by_condition(adata, adata, genes="CD4"),
        lambda: to_anndata(np.zeros((12, 1)), adata, genes="CD4"),
    ):
        with pytest.raises(TypeError, match=r"genes must be a list of names, got 'CD4': write genes=\['CD4'\]"):
            call()
    for groups, error, message in (
        (["A", "B", "A"], ValueError, "groups names 'A' twice"),
        ([], ValueError, "groups is empty"),
        ("AB", TypeError, r"write groups=\['AB'\]"),
    ):
        with pytest.raises(error, match=message):
            pairwise_distances(adata, "drug", groups=groups)
        with pytest.raises(error, match=message):
            distances_to(adata, "drug", "B", groups=groups)
