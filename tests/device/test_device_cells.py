"""AnnData through a map that is on a GPU: the images and the cells they are of come back to the CPU."""

import numpy as np
import pytest

pytest.importorskip("anndata")
from cell_sets import GENES, Affine, cells

from lightning_gap import MongeMap


def test_cells_go_through_a_map_on_the_device_and_back(device):
    adata = cells(genes=GENES[::-1])
    model = MongeMap(map=Affine(conditions=2), feature_names=GENES, condition_names=["A", "B"])
    expected = model.push(adata, condition_key="drug")
    model.to(device)
    pushed = model.push(adata, condition_key="drug")
    np.testing.assert_allclose(pushed.X, expected.X, rtol=1e-5)
    for options in ({}, {"near": adata}):
        np.testing.assert_allclose(model.pull(pushed, condition_key="drug", **options).X, adata.X, atol=1e-2)
