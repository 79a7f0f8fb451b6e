"""Samples from arrays, data frames, AnnData, and files of them."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_gap import SamplesDataModule
from lightning_gap.monge.samples.files.arrays import dense_rows
from lightning_gap.monge.samples.files.h5ad import InFile, InMemory
from lightning_gap.monge.samples.files.read import FORMATS, open_table
from lightning_gap.monge.samples.files.write import Output

pd = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")
anndata = pytest.importorskip("anndata")
sparse = pytest.importorskip("scipy.sparse")
# Releases of anndata for Python 3.11 cannot write the strings of pandas 3.
pd.options.future.infer_string = False

RNG = np.random.default_rng(0)
N = 40
VALUES = RNG.normal(size=(N, 3)).astype(np.float32)
ARM = np.array(["control", "stim"] * (N // 2))
CELL = np.array(["B", "B", "T", "T"] * (N // 4))
PATIENT = np.repeat([101, 107], N // 2)
GENES = ["ISG15", "MX1", "MX2"]


def frame() -> "pd.DataFrame":
    return pd.DataFrame(VALUES, columns=GENES).assign(arm=ARM, cell=CELL, patient=PATIENT, mass=1.0 + np.arange(N) % 3)


def cells(x=VALUES, **parts) -> "anndata.AnnData":
    obs = frame()[["arm", "cell", "patient", "mass"]].set_axis([f"cell{i}" for i in range(N)])
    var = pd.DataFrame(index=GENES)
    return anndata.AnnData(
        x, obs=obs, var=var, layers={"counts": VALUES * 2}, obsm={"X_pca": VALUES[:, :2] * 3}, **parts
    )


def predicted(data: SamplesDataModule) -> np.ndarray:
    return torch.cat([x if torch.is_tensor(x) else x[0] for x in data.predict_dataloader()]).numpy()


def table_options(**options):
    return {"source_rows": {"arm": "control"}, "target_rows": {"arm": "stim"}, "batch_size": 4, **options}


def write(kind: str, folder) -> str:
    path = folder / f"cells.{kind}"
    if kind.startswith(("csv", "tsv")):
        frame().to_csv(path, index=False, sep="\t" if kind.startswith("tsv") else ",")
    elif kind == "parquet":
        frame().to_parquet(path)
    elif kind == "npz":
        np.savez(path, values=VALUES, arm=ARM, cell=CELL, patient=PATIENT, mass=frame()["mass"])
    else:
        cells().write_h5ad(path)
    return str(path)


LABELS = ["csv", "csv.gz", "tsv", "parquet", "npz", "h5ad"]


@pytest.mark.parametrize("kind", LABELS)
def test_one_file_holds_both_populations_and_all_labels(kind, tmp_path):
    path = write(kind, tmp_path)
    features = {} if kind in ("npz", "h5ad") else {"columns": GENES}
    options = table_options(conditions="cell", groups="patient", test_groups=[107], weights="mass", **features)
    data = SamplesDataModule(path, path, **options)
    np.testing.assert_allclose(predicted(data), VALUES[ARM == "control"], rtol=1e-6)
    assert data.condition_names == ("B", "T")
    assert data.feature_names == (None if kind == "npz" else tuple(GENES))
    held = torch.cat([batch.source[0] for batch in data.test_dataloader()]).numpy()
    expected = VALUES[(ARM == "control") & (PATIENT == 107)]
    np.testing.assert_allclose(np.sort(held, 0), np.sort(expected, 0), rtol=1e-6)
    batch = next(iter(data.train_dataloader()))
    assert batch.source.shape == (2, 4, 3)
    torch.testing.assert_close(batch.source_weights.sum(1).float(), torch.ones(2))


@pytest.mark.parametrize("kind", ["frame", "anndata", "backed"])
def test_tables_in_memory_are_read_like_files(kind, tmp_path):
    if kind == "backed":
        cells().write_h5ad(tmp_path / "cells.h5ad")
    given = {"frame": frame, "anndata": cells}.get(
        kind, lambda: anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    )()
    features = {"columns": GENES} if kind == "frame" else {}
    data = SamplesDataModule(given, given, **table_options(conditions="cell", **features))
    np.testing.assert_allclose(predicted(data), VALUES[ARM == "control"], rtol=1e-6)


def test_from_anndata_asks_for_columns_of_obs(tmp_path):
    for given in (cells(), write("h5ad", tmp_path)):
        data = SamplesDataModule.from_anndata(
            given, key="arm", source="control", target=["stim"], obsm="X_pca", condition_key="cell",
            group_key="patient", weights_key="mass", val_groups=["107"], batch_size=2,
        )  # fmt: skip
        np.testing.assert_allclose(predicted(data), VALUES[ARM == "control", :2] * 3, rtol=1e-6)
        assert data.condition_names == ("B", "T")
        assert [batch.source.shape for batch in data.val_dataloader()] == [(1, 5, 2)] * 2


@pytest.mark.parametrize("matrix", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
@pytest.mark.parametrize("stored", ["file", "memory", "backed"])
def test_sparse_and_dense_matrices_and_genes_by_name(matrix, stored, tmp_path):
    given = cells(matrix(VALUES))
    if stored != "memory":
        given.write_h5ad(tmp_path / "a.h5ad")
        given = tmp_path / "a.h5ad" if stored == "file" else anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    data = SamplesDataModule(given, given, **table_options(columns=["MX2", "ISG15"]))
    np.testing.assert_allclose(predicted(data), VALUES[ARM == "control"][:, [2, 0]], rtol=1e-6)
    assert data.feature_names == ("MX2", "ISG15")
    kept = InMemory(given) if stored != "file" else InFile(given)
    for rows, columns in ((None, None), (np.array([1, 2, 7, 30]), np.array([2, 0]))):
        some = dense_rows("x", kept.matrix(None, None), rows, columns, block=9)  # three rows at once
        expected = VALUES[slice(None) if rows is None else rows][:, slice(None) if columns is None else columns]
        np.testing.assert_allclose(some, expected, rtol=1e-6)


@pytest.mark.parametrize(("within", "factor", "d"), [("X", 1, 3), ("layers/counts", 2, 3), ("obsm/X_pca", 3, 2)])
def test_a_path_names_the_array_within(within, factor, d, tmp_path):
    path = write("h5ad", tmp_path)
    data = SamplesDataModule(f"{path}::{within}", f"{path}::{within}", batch_size=4)
    np.testing.assert_allclose(predicted(data), VALUES[:, :d] * factor, rtol=1e-6)
    group, _, name = within.partition("/")
    if name:
        options = {"layer" if group == "layers" else "obsm": name}
        np.testing.assert_array_equal(
            predicted(SamplesDataModule(path, path, batch_size=4, **options)), predicted(data)
        )


def test_plain_array_files(tmp_path):
    np.save(tmp_path / "a.npy", VALUES)
    np.savez(tmp_path / "ab.npz", a=VALUES, b=VALUES + 1, weights=np.ones(N))
    data = SamplesDataModule(
        tmp_path / "a.npy", f"{tmp_path}/ab.npz::b", batch_size=4, weights=(f"{tmp_path}/ab.npz::weights", "weights")
    )
    np.testing.assert_array_equal(predicted(data), VALUES)
    batch = next(iter(data.train_dataloader()))
    torch.testing.assert_close(batch.target_weights, torch.full((4,), 0.25))


def test_features_of_both_sides_are_matched_by_name():
    swapped = frame()[["MX2", "ISG15", "MX1"]]
    data = SamplesDataModule(frame()[GENES], swapped, batch_size=4, val_fraction=0)
    source, target = data.training_samples()
    torch.testing.assert_close(source.sort(0).values, target.sort(0).values)
    with pytest.raises(ValueError, match="the features of source and target differ: target has no 'MX1'"):
        SamplesDataModule(frame()[GENES], frame()[["MX2", "ISG15"]].assign(other=1.0), batch_size=4)


@pytest.mark.parametrize("dtype", ["Int64", "category", "object", "float64"])
def test_missing_labels_of_a_frame_are_refused(dtype):
    given = frame()[GENES].assign(donor=pd.array([1, None] * (N // 2), dtype="Int64").astype(dtype))
    with pytest.raises(ValueError, match=r"groups of the source \('donor'\) is missing in 20 of 40 rows, .*row 1: "):
        SamplesDataModule(given, given, batch_size=4, groups="donor", val_groups=[1])


def test_row_names_of_a_csv_file_are_no_feature(tmp_path):
    frame()[GENES].to_csv(tmp_path / "a.csv")
    assert SamplesDataModule(tmp_path / "a.csv", tmp_path / "a.csv", batch_size=4).feature_names == tuple(GENES)


def test_only_what_is_wanted_of_a_csv_file_is_read(tmp_path):
    path = write("csv", tmp_path)
    data = SamplesDataModule(path, path, **table_options(columns=["MX1"]))
    assert data.dim == 1


def test_true_images_go_with_the_chosen_rows(tmp_path):
    np.savez(tmp_path / "pair.npz", x=VALUES, image=VALUES * 10, arm=ARM)
    data = SamplesDataModule(
        f"{tmp_path}/pair.npz::x",
        f"{tmp_path}/pair.npz::x",
        true_images=f"{tmp_path}/pair.npz::image",
        **table_options(),
    )
    for batch in (next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))):
        torch.testing.assert_close(batch.true_images, batch.source * 10)


def bad_row() -> "pd.DataFrame":
    bad = frame()
    bad.loc[6, "MX1"] = np.inf
    return bad


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("nothing.csv", {}, FileNotFoundError, "source: there is no file 'nothing.csv' in"),
        ("cells.xlsx", {}, ValueError, r"source: cannot read 'cells.xlsx': the name must end in one of .npy, .npz"),
        ("empty.csv", {}, ValueError, "source: the file 'empty.csv' is empty"),
        ("broken.npy", {}, ValueError, r"source \(broken.npy\): cannot read 'broken.npy'"),
        ("broken.npz", {}, ValueError, r"source \(broken.npz\): cannot read 'broken.npz' as an .npz file"),
        ("broken.h5ad", {}, ValueError, "broken.h5ad: cannot read 'broken.h5ad' as AnnData"),
        ("broken.parquet", {}, ValueError, r"source \(broken.parquet\): cannot read"),
        ("pickled.npy", {}, ValueError, r"source \(pickled.npy\): cannot read 'pickled.npy': .*objects"),
        ("cells.csv", {}, TypeError, r"source \(cells.csv\): the columns 'arm', 'cell' hold no numbers: name those"),
        ("cells.csv", {"columns": ["MX9"]}, ValueError, r"source \(cells.csv\) has no column 'MX9'; there is"),
        ("cells.csv", {"columns": "MX1"}, TypeError, r"columns must be a list of names.*columns=\['MX1'\]"),
        ("cells.csv", {"columns": GENES, "conditions": "type"}, ValueError, "conditions: .* has no 'type'; there is "),
        ("cells.csv", {"columns": GENES, "layer": "counts"}, ValueError, "layer='counts' is for AnnData"),
        ("cells.csv::MX1", {}, ValueError, "only .npz and .h5ad files hold named arrays"),
        ("bad.csv", {"columns": GENES, "source_rows": {"arm": "control"}}, ValueError,
         r"source \(bad.csv\) holds NaN or infinity in 1 of 20 rows \(6, first in 'MX1'\)"),
        ("cells.csv", {"columns": GENES, "source_rows": {"arm": "stimulated"}}, ValueError,
         r"source_rows: 'arm' of source \(cells.csv\) is never 'stimulated'; there is 'control', 'stim'"),
        ("cells.csv", {"columns": GENES, "source_rows": {"arm": "stim", "cell": "x"}}, ValueError, "is never 'x'"),
        ("cells.csv", {"columns": GENES, "source_rows": "arm"}, TypeError, "source_rows must map a column"),
        ("cells.h5ad", {"layer": "raw"}, ValueError, r"source \(cells.h5ad\) has no layer 'raw'; there is 'counts'"),
        ("cells.h5ad", {"obsm": "X_umap"}, ValueError, "has no embedding 'X_umap'; there is 'X_pca'"),
        ("cells.h5ad", {"obsm": "X_pca", "layer": "counts"}, ValueError, "exclude each other"),
        ("cells.h5ad", {"obsm": "X_pca", "columns": ["MX1"]}, ValueError, "columns are genes, but obsm='X_pca'"),
        ("cells.h5ad", {"columns": ["IFI6"]}, ValueError, "has no gene 'IFI6'; there is 'ISG15'"),
        ("cells.h5ad", {"weights": "size"}, ValueError, "weights: .* has no 'size'; there is 'arm', 'cell'"),
        ("cells.h5ad::uns/x", {}, ValueError, "must be ::X, ::layers/NAME or ::obsm/NAME"),
        ("two.npz", {}, ValueError, r"holds several arrays \('a' \(40, 3\), 'b'.*as in 'two.npz::a'"),
        ("two.npz::c", {}, ValueError, r"source \(two.npz\) holds no array 'c'; there is 'a', 'b'"),
        ("two.npz::a", {"columns": ["a"]}, ValueError, "columns are names, but source"),
        ("flat.npy", {}, ValueError, r"source \(flat.npy\) must have shape \(n, d\), got \(40,\)"),
    ],
)  # fmt: skip
def test_files_are_refused_with_their_name_and_the_remedy(name, options, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for broken in ("broken.npy", "broken.npz", "broken.h5ad", "broken.parquet"):
        (tmp_path / broken).write_bytes(b"no such thing")
    (tmp_path / "empty.csv").touch()
    np.save("pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save("flat.npy", np.zeros(N))
    np.savez("two.npz", a=VALUES, b=VALUES)
    bad_row().to_csv("bad.csv", index=False)
    if name.startswith("cells."):
        write("h5ad" if "h5ad" in name else "csv", tmp_path)
    with pytest.raises(error, match=message):
        SamplesDataModule(name, VALUES, batch_size=4, **options)


@pytest.mark.parametrize(
    ("kind", "library"), [("csv", "pandas"), ("parquet", "pyarrow.parquet"), ("h5ad", "anndata.io")]
)
def test_a_missing_library_is_named_with_what_brings_it(kind, library, tmp_path, monkeypatch):
    path = write(kind, tmp_path)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        ModuleNotFoundError, match=rf"needs {library.split('.')[0]}.*pip install 'lightning_gap\[files\]'"
    ):
        SamplesDataModule(path, path, batch_size=4)


DATA = Path(os.environ.get("LIGHTNING_GAP_DATA", Path(__file__).parents[5] / "shared" / "data"))
real = pytest.mark.skipif(not (DATA / "kang_ifnb.npz").exists(), reason=f"no data at {DATA}; set LIGHTNING_GAP_DATA")


@real
@pytest.mark.filterwarnings("ignore:conditions with fewer than batch_size=64")
def test_a_patient_and_small_cell_types_of_the_interferon_data():
    cells = f"{DATA}/kang_ifnb.npz::logcounts"
    data = SamplesDataModule(
        cells, cells, source_rows={"treated": 0}, target_rows={"treated": 1}, conditions="cell_type",
        small_conditions="drop", groups="patient", test_groups=["107"], batch_size=64, standardize=True, components=20,
    )  # fmt: skip
    with np.load(DATA / "kang_ifnb.npz") as raw:
        types = {str(t) for t in np.unique(raw["cell_type"])}
        held = [
            [
                int(((raw["patient"] == 107) & (raw["treated"] == arm) & (raw["cell_type"] == int(name))).sum())
                for arm in (0, 1)
            ]
            for name in data.condition_names
        ]
    assert set(data.condition_names) < types
    assert [[b.source.shape[1], b.target.shape[1]] for b in data.test_dataloader()] == held
    batch = next(iter(data.train_dataloader()))
    assert batch.source.shape == (len(data.condition_names), 64, 20)
    assert bool(batch.source.isfinite().all())


@real
def test_the_ground_truth_of_the_benchmark_pairs():
    pair = f"{DATA}/w2_mix3to10_D2.npz"
    data = SamplesDataModule(
        f"{pair}::train_x", f"{pair}::train_y", batch_size=1024, eval_batch_size=4096, standardize=True,
        test={"source": f"{pair}::test_x", "target": f"{pair}::test_map", "true_images": f"{pair}::test_map"},
    )  # fmt: skip
    (batch,) = data.test_dataloader()
    decode = data.representation.decode
    with np.load(pair) as raw:
        error = np.square(decode(batch.true_images).numpy() - decode(batch.source).numpy()).sum(1).mean()
        expected = np.square(raw["test_map"] - raw["test_x"]).sum(1).mean()
    assert error == pytest.approx(expected, rel=1e-5)


def test_what_is_written_can_be_read(tmp_path):
    table = open_table("x", VALUES)
    for suffix, form in FORMATS.items():
        if form.writer is None or form.copies is not None:
            continue
        out = Output("OUT", str(tmp_path / f"x{suffix}"), table, overwrite=False)
        for block in table.blocks(7):
            out.write(block, block.samples().numpy())
        out.keep()
        np.testing.assert_allclose(open_table("x", tmp_path / f"x{suffix}").samples(), VALUES, rtol=1e-6)


@pytest.mark.parametrize("stored", [np.float32, np.int64])
@pytest.mark.parametrize("in_file", [False, True])
def test_counts_are_warned_of_once_and_with_the_layers_there_are(stored, in_file, tmp_path):
    counts = np.random.default_rng(0).poisson(3.0, VALUES.shape)
    data = cells(counts.astype(stored))
    data.layers["logcounts"] = np.log1p(counts)
    if in_file:
        data.write_h5ad(tmp_path / "cells.h5ad")
        data = str(tmp_path / "cells.h5ad")
    with pytest.warns(UserWarning, match="counts") as told:
        SamplesDataModule.from_anndata(data, key="arm", source="control", target="stim", batch_size=4)
    assert len([w for w in told if "hold" in str(w.message) and "'logcounts'" in str(w.message)]) == 1


def test_counts_are_warned_of_once_whatever_else_is_read_and_no_layer_is_named_that_is_no_help():
    counts = np.random.default_rng(0).poisson(3.0, VALUES.shape).astype(np.float32)
    some, other = cells(counts), cells(counts)
    some.layers["raw"], other.layers["raw"], other.layers["logcounts"] = counts, counts, np.log1p(counts)
    with pytest.warns(UserWarning, match="holds counts") as told:
        SamplesDataModule(some, other, layer="raw", val=(some, other), test=(other, some), batch_size=4)
    (message,) = [str(w.message) for w in told if "counts" in str(w.message)]
    assert "raw" not in message
    assert "logcounts" not in message  # one side has it
    normalized = cells(np.log1p(counts))
    with pytest.warns(UserWarning, match="val source holds counts"):
        SamplesDataModule(normalized, normalized, val=(some, other), batch_size=4)


def test_what_is_no_count_is_no_cause_of_a_warning(recwarn):
    presences = (np.arange(VALUES.size) % 2).reshape(VALUES.shape).astype(np.float32)
    counts = np.random.default_rng(0).poisson(3.0, VALUES.shape).astype(np.float32)
    data = cells(presences)
    data.obsm["X_bins"], data.layers["logcounts"] = counts, np.log1p(counts)
    for where in ({}, {"layer": "logcounts"}, {"obsm": "X_bins"}):
        SamplesDataModule.from_anndata(data, key="arm", source="control", target="stim", batch_size=4, **where)
    SamplesDataModule(counts, counts, batch_size=4)
    assert not [w for w in recwarn if "counts" in str(w.message)]
