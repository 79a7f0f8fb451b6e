"""Maps applied to files: every format, blocks, conditions, and nothing left behind by what fails."""

import os
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_gap import MongeMap
from lightning_gap.cli import main
from lightning_gap.monge import ConditionalMap, ResidualMLP
from lightning_gap.monge.samples.standardize import AffineRepresentation
from lightning_gap.monge.transport_files import load_map, transport_blocks, transport_file

N = 23


def saved(model, path="map.ckpt"):
    """Write a checkpoint as a trainer does."""
    from lightning.pytorch import Trainer

    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", barebones=True)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return path


def moved(model):
    """Let no map be the identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(N, 2)).astype(np.float32)


@pytest.fixture
def model():
    return moved(MongeMap(map=ResidualMLP(2, [8])))


def run(model, source, output, **options):
    """Map in blocks of eight rows, so that a file has several."""
    return transport_blocks(model, source, output, batch_size=8, block_size=8, **options)


def images(model, x, condition=None):
    return model.transport(x, condition).numpy()


@pytest.mark.parametrize("dtype", ["<f4", "<f8", ">f4", "<i2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays(model, x, dtype, order):
    x = (10 * x).astype(dtype)
    np.save("in.npy", np.asarray(x, order=order))
    assert run(model, "in.npy", "out.npy") == N
    out = np.load("out.npy")
    assert out.dtype == np.float32
    assert np.allclose(out, images(model, x.astype("f4")), atol=1e-5)
    assert os.listdir() == ["in.npy", "out.npy"] or sorted(os.listdir()) == ["in.npy", "out.npy"]


def test_double_precision_stays(x):
    model = moved(MongeMap(map=ResidualMLP(2, [8]))).double()
    np.save("in.npy", x.astype(np.float64))
    run(model, "in.npy", "out.npy")
    assert np.load("out.npy").dtype == np.float64


def test_an_array_among_several(model, x):
    np.savez("in.npz", x=x, y=x + 1)
    run(model, "in.npz::y", "out.npy")
    assert np.allclose(np.load("out.npy"), images(model, x + 1), atol=1e-6)


def test_batches_and_blocks_change_nothing(model, x):
    np.save("in.npy", x)
    for batch_size in (1, 8, 1000):
        transport_file(model, "in.npy", "out.npy", batch_size=batch_size, overwrite=True)
        assert np.allclose(np.load("out.npy"), images(model, x), atol=1e-6)


def test_blocks_are_opened_anew_and_progress_is_told(model, x):
    np.save("in.npy", x)
    told = []
    run(model, "in.npy", "out.npy", progress=lambda done, total: told.append((done, total)))
    assert told == [(8, N), (16, N), (N, N)]


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet"])
def test_an_array_becomes_a_table(model, x, suffix):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    np.save("in.npy", x)
    run(model, "in.npy", f"out{suffix}")
    read = pandas.read_parquet if suffix == ".parquet" else pandas.read_csv
    frame = read(f"out{suffix}", **({"sep": "\t"} if "tsv" in suffix else {}))
    assert list(frame.columns) == ["x0", "x1"]
    assert np.allclose(frame.to_numpy(), images(model, x), atol=1e-6)


def table(x):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pandas.DataFrame(x, columns=["u", "v"])
    frame.insert(1, "id", [f"{i:03d}" for i in range(N)])
    frame["drug"] = ["a", "b"] * (N // 2) + ["a"]
    return frame


def test_a_text_table_keeps_what_is_no_sample(model, x):
    frame = table(x)
    frame["note"] = ['said "so", twice', "", "NA"] + ["0.10"] * (N - 3)
    frame.to_csv("in.csv", index=False)
    run(model, "in.csv", "out.csv", columns=["u", "v"])
    pandas = pytest.importorskip("pandas")
    out = pandas.read_csv("out.csv", dtype={"id": str, "note": str}, keep_default_na=False)
    assert list(out.columns) == ["u", "id", "v", "drug", "note"]
    assert out["id"].tolist() == frame["id"].tolist()
    assert out["note"].tolist() == frame["note"].tolist()
    assert np.allclose(out[["u", "v"]].to_numpy(), images(model, x), atol=1e-6)


def test_a_parquet_table_keeps_its_types(model, x):
    frame = table(x)
    pandas = pytest.importorskip("pandas")
    frame["count"] = pandas.array([1] * 8 + [None] + [3] * (N - 9), dtype="Int16")
    frame["day"] = pandas.to_datetime("2024-01-01")
    frame.to_parquet("in.parquet")
    run(model, "in.parquet", "out.parquet", columns=["u", "v"])
    parquet = pytest.importorskip("pyarrow.parquet")
    given, out = parquet.read_table("in.parquet"), parquet.read_table("out.parquet")
    assert out.column_names == given.column_names
    for name in ("count", "day"):
        assert out[name].type == given[name].type
        assert out[name].to_pylist() == given[name].to_pylist()
    assert out["id"].to_pylist() == frame["id"].tolist()
    assert np.allclose(np.stack([out["u"], out["v"]], axis=1), images(model, x), atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("within", ["", "::X", "::obsm/pca", "::layers/counts"])
@pytest.mark.parametrize("sparse", [False, True])
def test_anndata_is_copied_with_the_images_in_it(model, x, within, sparse):
    anndata, pandas = pytest.importorskip("anndata"), pytest.importorskip("pandas")
    from scipy.sparse import csr_matrix

    matrix = csr_matrix(x) if sparse else x
    # Files of AnnData do not hold pandas' new strings.
    with pandas.option_context("future.infer_string", False):
        names = {"obs": [f"c{i}" for i in range(N)], "var": ["g", "h"]}
        obs = pandas.DataFrame({"drug": pandas.Categorical(["a"] * N)}, index=names["obs"])
        data = anndata.AnnData(
            X=matrix, obs=obs, var=pandas.DataFrame(index=names["var"]), obsm={"pca": x + 1, "other": x},
            layers={"counts": matrix.copy()}, uns={"note": "kept"},
        )  # fmt: skip
        data.write_h5ad("in.h5ad")
    run(model, f"in.h5ad{within}", "out.h5ad")
    out = anndata.read_h5ad("out.h5ad")
    place = {"::obsm/pca": out.obsm["pca"], "::layers/counts": out.layers["counts"]}.get(within, out.X)
    assert np.allclose(place, images(model, x + 1 if "pca" in within else x), atol=1e-6)
    assert np.allclose(out.obsm["other"], x)
    assert out.obs.equals(anndata.read_h5ad("in.h5ad").obs)
    assert out.uns["note"] == "kept"
    if "pca" in within:
        kept = out.X.toarray() if sparse else out.X
        assert np.allclose(kept, x)


def test_raw_samples_are_encoded_and_decoded(x):
    wide = np.concatenate([x, x[:, ::-1] * 3 + 1], axis=1)
    representation = AffineRepresentation.fit(torch.from_numpy(wide), standardize=True, components=2)
    model = moved(MongeMap(map=ResidualMLP(2, [8]), representation=representation))
    np.save("in.npy", wide)
    run(model, "in.npy", "out.npy")
    assert np.load("out.npy").shape == (N, 4)
    assert np.allclose(np.load("out.npy"), images(model, wide), atol=1e-5)
    np.save("in.npy", x)
    with pytest.raises(ValueError, match=r"the map takes 4 features, and IN .* has 2"):
        run(model, "in.npy", "out2.npy")


@pytest.fixture
def conditional():
    return moved(MongeMap(map=ConditionalMap(2, [8], num_conditions=2), condition_names=["a", "b"]))


def test_one_condition_for_all(conditional, x):
    np.save("in.npy", x)
    for name in ("a", "b"):
        run(conditional, "in.npy", "out.npy", condition=name, overwrite=True)
        assert np.allclose(np.load("out.npy"), images(conditional, x, name), atol=1e-6)
    assert not np.allclose(images(conditional, x, "a"), images(conditional, x, "b"))


@pytest.mark.parametrize("kind", ["csv", "parquet", "npz"])
def test_each_row_s_condition_by_a_column(conditional, x, kind):
    frame = table(x)
    if kind == "csv":
        frame.to_csv("in.csv", index=False)
    elif kind == "parquet":
        frame.to_parquet("in.parquet")
    else:
        np.savez("in.npz", x=x, drug=frame["drug"].to_numpy(dtype=str))
    columns = None if kind == "npz" else ["u", "v"]
    run(conditional, f"in.{kind}", "out.npy", condition="drug", columns=columns)
    assert np.allclose(np.load("out.npy"), images(conditional, x, frame["drug"].tolist()), atol=1e-6)


def test_a_row_without_a_condition_is_refused_with_its_place(conditional, x):
    pd = pytest.importorskip("pandas")
    drug = ["a"] * 10 + [None] + ["b"] * (N - 11)
    pd.DataFrame({"x0": x[:, 0], "x1": x[:, 1], "drug": drug}).to_csv("in.csv", index=False)
    with pytest.raises(ValueError, match=r"--condition drug: .*in.csv.* has nothing there in row 10: fill it in, or"):
        run(conditional, "in.csv", "out.npy", condition="drug", columns=["x0", "x1"])


def test_vectors_as_conditions(x):
    model = moved(MongeMap(map=ConditionalMap(2, [8], condition_dim=2)))
    np.savez("in.npz", x=x, dose=x[:, 0], time=x[:, 1])
    run(model, "in.npz", "out.npy", condition="0.5, 2")
    assert np.allclose(np.load("out.npy"), images(model, x, torch.tensor([0.5, 2.0])), atol=1e-6)
    run(model, "in.npz", "out.npy", condition="dose,time", overwrite=True)
    assert np.allclose(np.load("out.npy"), images(model, x, torch.from_numpy(x)), atol=1e-6)
    with pytest.raises(ValueError, match="2 numbers, got 1"):
        run(model, "in.npz", "out2.npy", condition="0.5")
    with pytest.raises(ValueError, match="neither 2 numbers nor columns"):
        run(model, "in.npz", "out2.npy", condition="dose,when")


def test_what_fails_midway_leaves_nothing(model, x):
    x[20] = np.nan
    np.save("in.npy", x)
    Path("out.npy").write_text("earlier")
    with pytest.raises(ValueError, match="in row 20:"):
        run(model, "in.npy", "out.npy", overwrite=True)
    assert Path("out.npy").read_text() == "earlier"
    assert sorted(os.listdir()) == ["in.npy", "out.npy"]


def test_sizes_are_checked_before_anything_is_read(model):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        transport_file(model, "none.npy", "out.npy", batch_size=0)


@pytest.mark.parametrize("block_size", [1, 7, 8, 23, 1000, None])
def test_blocks_of_any_size_give_the_same_images(model, x, block_size):
    np.save("in.npy", x)
    assert transport_blocks(model, "in.npy", "out.npy", block_size=block_size) == N
    assert np.allclose(np.load("out.npy"), images(model, x), atol=1e-6)


def test_large_finite_samples_are_no_infinity(model):
    np.save("in.npy", np.full((N, 2), 3e38, dtype=np.float32))
    run(MongeMap(map=torch.nn.Identity()), "in.npy", "out.npy")
    assert np.isfinite(np.load("out.npy")).all()


def test_no_file_is_replaced_without_being_asked(model, x):
    np.save("in.npy", x)
    run(model, "in.npy", "out.npy")
    with pytest.raises(FileExistsError, match="--overwrite"):
        run(model, "in.npy", "out.npy")
    run(model, "in.npy", "in.npy", overwrite=True)
    assert np.allclose(np.load("in.npy"), images(model, x), atol=1e-6)


def test_the_checkpoint_makes_the_map_again(model, x, capsys):
    np.save("in.npy", x)
    loaded = load_map(saved(model))
    assert np.array_equal(images(loaded, x), images(model, x))
    main(["transport", "map.ckpt", "in.npy", "out.npy", "--device", "cpu", "--batch-size", "8"])
    assert np.allclose(np.load("out.npy"), images(model, x), atol=1e-6)
    out, err = capsys.readouterr()
    assert "23 rows mapped to out.npy" in out
    assert err == ""


def test_memory_does_not_grow_with_the_file():
    """What is alive at once is a few blocks, whatever the number of blocks."""
    alive, most = set(), 0

    class Watched(MongeMap):
        def transport(self, x, condition=None, **options):
            nonlocal most
            name = len(seen)
            seen.append(len(x))
            alive.add(name)
            weakref.finalize(x, alive.discard, name)
            most = max(most, len(alive))
            return super().transport(x, condition, **options)

    seen = []
    np.save("in.npy", np.zeros((800, 2), dtype=np.float32))
    run(Watched(map=torch.nn.Identity()), "in.npy", "out.npy")
    assert seen == [8] * 100
    assert 1 <= most <= 4
