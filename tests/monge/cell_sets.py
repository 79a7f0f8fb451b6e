"""Cells that the tests of AnnData share, and maps of them that need no training."""

import anndata
import numpy as np
import pandas as pd
import torch
from scipy.sparse import csc_matrix, csr_matrix
from torch import nn

from lightning_gap import MongeMap

GENES = ["CD3", "CD4", "CD8", "IFNG"]
# Releases of anndata for Python 3.11 cannot write the strings of pandas 3.
pd.options.future.infer_string = False


def cells(n=12, genes=GENES, seed=0, layers=(), **columns):
    """Cells whose value of a gene tells which one it is."""
    values = np.random.default_rng(seed).random((n, len(genes))).astype(np.float32)
    values += 10 * np.array([GENES.index(gene) if gene in GENES else 9 for gene in genes], dtype=np.float32)
    obs = pd.DataFrame(
        {"drug": ["A", "B"] * (n // 2), "dose": [1, 1, 10, 10] * (n // 4), **columns}, index=[f"c{i}" for i in range(n)]
    )
    var = pd.DataFrame({"symbol": [f"{gene}-symbol" for gene in genes]}, index=list(genes))
    return anndata.AnnData(
        values, obs=obs, var=var, layers=dict.fromkeys(layers, values + 100), obsm={"X_pca": values[:, :2] - 5}
    )


def at(kind, adata, folder):
    """The same cells, as they may be given."""
    if kind == "memory":
        return adata
    if kind in ("csr", "csc"):
        adata = adata.copy()
        adata.X = (csr_matrix if kind == "csr" else csc_matrix)(adata.X)
        return adata
    if kind == "view":
        double = anndata.concat([adata, adata], index_unique="-", keys=["a", "b"], merge="same")
        return double[: adata.n_obs]
    adata.write_h5ad(folder / "cells.h5ad")
    return folder / "cells.h5ad" if kind == "path" else anndata.read_h5ad(folder / "cells.h5ad", backed="r")


KINDS = ["memory", "csr", "csc", "view", "path", "backed"]


class Affine(nn.Module):
    """Twice the samples, and a shift that tells the feature; by a condition, where there are some."""

    def __init__(self, dim=4, conditions=None, condition_dim=None):
        super().__init__()
        self.dim = dim
        self.conditional = conditions is not None or condition_dim is not None
        self.conditions, self.condition_dim = conditions, condition_dim
        self.shift = nn.Parameter(torch.arange(float(dim)) + 1)

    def forward(self, x, condition=None):
        y = 2 * x + self.shift
        if condition is None:
            return y
        return y + 1000 * (condition[:, None] if condition.dim() == 1 else condition.sum(-1, keepdim=True))


def by_name(genes=GENES, **options):
    return MongeMap(map=Affine(len(genes)), feature_names=genes, **options)
