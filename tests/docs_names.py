"""What the pages' code takes for granted: a model, a loader, the files that it names. Kept as small as it may be."""

from types import SimpleNamespace

import numpy as np
import pytest
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
    x = torch.randn(100, 2)
    held_out = {"source": x, "mapped": x + 1, "target": torch.randn(100, 2) + 1}
    return {"x": torch.randn(6, 50), "drug": torch.arange(6), "dose": torch.rand(6, 1), **held_out}


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
    pair = np.random.default_rng(0).normal(size=(4, 1500, 2)).astype(np.float32)
    np.savez(folder / "pair.npz", **dict(zip(("train_x", "train_y", "test_x", "test_map"), pair, strict=True)))
    write_cells(folder / "kang.h5ad")
    return {}


def write_cells(path):
    """A file of the form that the pages name; its values mean nothing."""
    anndata, pd = pytest.importorskip("anndata"), pytest.importorskip("pandas")
    rows, genes = 4000, 25
    values = np.random.default_rng(1).normal(size=(rows, genes)).astype(np.float32)
    # Releases of anndata for Python 3.11 cannot write the strings of pandas 3.
    with pd.option_context("future.infer_string", False):
        obs = pd.DataFrame({
            "treated": ["control", "stim"] * (rows // 2),
            "cell_type": ["B cells"] * (rows // 2) + ["CD14+ Monocytes"] * (rows // 2),
            "patient": ["101", "101", "107", "107"] * (rows // 4),
        }, index=[f"cell{i}" for i in range(rows)])  # fmt: skip
        var = pd.DataFrame(index=[f"gene{i}" for i in range(genes)])
        anndata.AnnData(values, obs=obs, var=var, layers={"logcounts": values}).write_h5ad(path)
