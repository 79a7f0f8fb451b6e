"""What the pages' code takes for granted: a model, a loader, the files that it names. Kept as small as it may be."""

from types import SimpleNamespace

import numpy as np
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader


class Small(BoringModel):
    """A model with data of its own, in a given number of batches."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def train_dataloader(self):
        return DataLoader(torch.randn(self.batches, 32))

    val_dataloader = None


def ghost(folder):
    model = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.BatchNorm1d(8))
    return {"model": model, "loader": DataLoader(torch.randn(256, 32), batch_size=128)}


def diffusion(folder):
    x, y = torch.randn(64, 32), torch.randint(0, 2, (64,))
    return {
        "small_batch_model": Small(16),
        "large_batch_model": Small(4),
        "model": torch.nn.Linear(32, 2),
        "cross_entropy": torch.nn.functional.cross_entropy,
        "x": x,
        "y": y,
    }


def maps(folder):
    return {"x": torch.randn(6, 50), "drug": torch.arange(6), "dose": torch.rand(6, 1)}


def scores(folder):
    def sample():
        return torch.randn(40, 2)

    return {
        "source": sample(),
        "mapped": sample(),
        "target": sample(),
        "further_target": sample(),
        "X": sample().numpy(),
        "y": sample().numpy(),
        "dim": 2,
        "model": SimpleNamespace(map=torch.nn.Sequential(torch.nn.Linear(2, 2)), representation=None),
    }


def samples(folder):
    anndata = __import__("pytest").importorskip("anndata")
    pair = np.random.default_rng(0).normal(size=(4, 1500, 2)).astype(np.float32)
    np.savez(folder / "pair.npz", **dict(zip(("train_x", "train_y", "test_x", "test_map"), pair, strict=True)))
    rows = 4000
    cells = anndata.AnnData(np.random.default_rng(1).normal(size=(rows, 25)).astype(np.float32))
    cells.layers["logcounts"] = cells.X
    cells.obs["treated"] = ["control", "stim"] * (rows // 2)
    cells.obs["cell_type"] = ["B cells"] * (rows // 2) + ["CD14+ Monocytes"] * (rows // 2)
    cells.obs["patient"] = [name for name in ("101", "107", "1015", "1488") for _ in range(2)] * (rows // 8)
    cells.obs_names, cells.var_names = (np.array([f"{i}" for i in range(size)], dtype=object) for size in cells.shape)
    cells.write_h5ad(folder / "kang.h5ad")
    return {}
