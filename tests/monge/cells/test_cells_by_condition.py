"""Images beside treated cells, condition by condition: the scores are those of the metrics on the cells at hand."""

import numpy as np
import pytest
import torch

pytest.importorskip("anndata")
from cell_sets import at, cells

from lightning_gap.monge import PerturbationScores
from lightning_gap.monge.cells import distances_by_condition, scores_by_condition
from lightning_gap.monge.scores import perturbation_distance

GENES = ["CD8", "IFNG", "CD3", "CD4"]
SCORES = ["r2", "drug_signature", "mmd", "wasserstein", "sinkhorn_divergence"]


def of(adata, drug, dose=None):
    chosen = (adata.obs["drug"] == drug).to_numpy()
    return adata[chosen if dose is None else chosen & (adata.obs["dose"] == dose).to_numpy()].to_df()


@pytest.mark.parametrize("kind", ["memory", "path"])
def test_the_five_scores_of_each_condition(kind, tmp_path):
    mapped, treated, again = cells(20), cells(24, genes=[*GENES, "MT-1"], seed=1), cells(16, genes=GENES, seed=2)
    found = scores_by_condition(mapped, at(kind, treated, tmp_path), by="drug")
    assert list(found.columns) == [*SCORES, *(f"{name}_floor" for name in SCORES)]
    assert (found.index.name, list(found.index)) == ("drug", ["A", "B"])
    with_floor = scores_by_condition(mapped, treated, by="drug", treated_again=again)
    for drug in "AB":
        x = of(mapped, drug)
        sets = [torch.tensor(of(adata, drug)[list(x.columns)].to_numpy()).double() for adata in (treated, again)]
        x = torch.tensor(x.to_numpy()).double()
        for table, target_again in ((found, None), (with_floor, sets[1])):
            metric = PerturbationScores()
            metric.update(x, x, sets[0], target_again=target_again)
            for name, value in metric.compute().items():
                assert table.loc[drug, name] == pytest.approx(float(value), rel=1e-9), name
    assert (with_floor[SCORES].to_numpy() == found[SCORES].to_numpy()).all()
    assert not with_floor.equals(found)


def test_conditions_of_several_columns_and_none():
    mapped, treated = cells(24), cells(24, seed=1)
    found = scores_by_condition(mapped, treated, by=["drug", "dose"], genes=["CD4", "CD8"])
    assert (found.index.name, list(found.index)) == ("drug, dose", ["A, 1", "A, 10", "B, 1", "B, 10"])
    means = [of(adata, "B", 10)[["CD4", "CD8"]].mean() for adata in (mapped, treated)]
    assert found.loc["B, 10", "drug_signature"] == pytest.approx(np.linalg.norm(means[0] - means[1]), rel=1e-5)
    whole = scores_by_condition(mapped, treated, obsm="X_pca")
    assert list(whole.index) == ["all"]
    means = [adata.obsm["X_pca"].astype(float).mean(0) for adata in (mapped, treated)]
    assert whole.loc["all", "drug_signature"] == pytest.approx(np.linalg.norm(means[0] - means[1]), rel=1e-6)


def test_distances_of_each_condition():
    mapped, treated = cells(20), cells(24, genes=GENES, seed=1)
    found = distances_by_condition(mapped, treated, by="drug", metrics=["edistance", "mahalanobis"])
    for drug in "AB":
        x, y = of(mapped, drug), of(treated, drug)
        for metric in found:
            expected = perturbation_distance(x, y[list(x.columns)], metric)
            assert found.loc[drug, metric] == pytest.approx(expected, rel=1e-9)
    assert distances_by_condition(mapped, treated).loc["all", "edistance"] > 0


def test_conditions_that_are_on_one_side_only():
    mapped, treated = cells(20), cells(20, seed=1)
    some = mapped[mapped.obs["drug"] == "A"]
    with pytest.warns(UserWarning, match="treated has cells of 'B', and mapped has none: these are not scored"):
        assert list(scores_by_condition(some, treated, by="drug").index) == ["A"]
    with pytest.raises(ValueError, match="treated has no cells of 'B'; there is 'A'"):
        scores_by_condition(mapped, treated[treated.obs["drug"] == "A"], by="drug")
    with pytest.raises(ValueError, match="treated_again has no cells of 'B'"):
        scores_by_condition(mapped, treated, by="drug", treated_again=treated[treated.obs["drug"] == "A"])
    with pytest.raises(ValueError, match="treated has no 'CD3', which mapped has"):
        distances_by_condition(mapped, treated[:, ["CD4", "CD8", "IFNG"]])
    with pytest.raises(ValueError, match=r"obsm='X_pca' has no genes"):
        distances_by_condition(mapped, treated, genes=["CD4"], obsm="X_pca")
    treated.obsm["X_pca"] = treated.obsm["X_pca"][:, :1]
    with pytest.raises(ValueError, match="treated has 1 features, and mapped 2"):
        scores_by_condition(mapped, treated, obsm="X_pca")
