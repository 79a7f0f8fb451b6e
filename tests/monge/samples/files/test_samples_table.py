"""One reader of tables: read whole or in blocks, the same columns, names and numbers are found."""

import numpy as np
import pytest
import torch

from lightning_gap import MongeMap
from lightning_gap.monge.samples.conditions import condition_vectors_of
from lightning_gap.monge.samples.files.read import open_file, open_table
from lightning_gap.monge.samples.files.table import Reading
from lightning_gap.monge.transport_files import transport_blocks

pd = pytest.importorskip("pandas")
arrow = pytest.importorskip("pyarrow")
anndata = pytest.importorskip("anndata")
pd.options.future.infer_string = False

RNG = np.random.default_rng(5)
N = 19
NUMBERS = RNG.normal(size=(N, 3)).round(3)


def plain():
    return pd.DataFrame(NUMBERS, columns=["b", "a", "c"])


FRAMES = {
    "plain": plain,
    "integers and booleans": lambda: plain().assign(i=np.arange(N), f=np.arange(N) % 2 == 0),
    "single precision": lambda: plain().astype(np.float32),
    "nullable": lambda: plain().astype("Float32").assign(i=pd.array(range(N), dtype="Int16")),
    "numbered columns": lambda: pd.DataFrame(NUMBERS, columns=["0", "1", "2"]),
    "a named index": lambda: plain().set_index(pd.Index([f"cell{i}" for i in range(N)], name="cell")),
    "an unnamed index": lambda: plain().set_index(pd.Index([f"cell{i}" for i in range(N)])),
    "an index of numbers": lambda: plain().iloc[::-1],
    "two indices": lambda: plain().set_index([pd.Index(range(N), name="i"), pd.Index(["x"] * N, name="j")]),
    "a filtered table": lambda: pd.concat([plain(), plain()]).iloc[3 : 3 + N],
    "very large and small": lambda: plain() * [1e300, 1e-300, 1],
}
KINDS = ["csv", "csv.gz", "tsv", "csv with row names", "parquet", "parquet in groups", "feather"]


def write(frame, kind, folder):
    path = folder / f"t.{kind.split()[0]}"
    if kind == "parquet in groups":
        frame.to_parquet(path, row_group_size=5)
    elif kind == "parquet":
        frame.to_parquet(path)
    elif kind == "feather":
        # pandas writes no index to such a file; arrow does.
        from pyarrow import feather

        feather.write_feather(arrow.Table.from_pandas(frame), path, chunksize=7)
    else:
        frame.to_csv(path, index=kind.endswith("names"), sep="\t" if kind == "tsv" else ",")
    return str(path)


def in_blocks(location, **options):
    table = open_file("IN", location, Reading(texts_pass="columns" not in options, **options))
    blocks = [(block, block.samples()) for block in table.blocks(4)]
    assert len(blocks) > 1
    lengths = [len(block) for block, _ in blocks]
    assert lengths == [len(samples) for _, samples in blocks]
    assert [block.start for block, _ in blocks] == np.cumsum([0, *lengths[:-1]]).tolist()
    return table.features, torch.cat([samples for _, samples in blocks])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FRAMES)
def test_tables_in_files(name, kind, tmp_path):
    frame = FRAMES[name]()
    location = write(frame, kind, tmp_path)
    # A text file does not tell an index with a name from a column of labels.
    labels = [name for name in frame.index.names if name is not None] if kind.endswith("names") else []
    expected = list(frame.columns)
    whole = open_table("source", location, Reading(labels=labels))
    features, samples = in_blocks(location, labels=labels)
    assert whole.features == features == tuple(expected)
    read = whole.read(None)
    assert samples.dtype == read.dtype
    assert torch.equal(samples, read)
    np.testing.assert_allclose(read, frame.to_numpy(dtype=np.float64), rtol=1e-6)
    # Whatever order is asked for, by name.
    for columns in (expected[::-1], expected[1:]):
        again, chosen = in_blocks(location, columns=columns)
        assert again == tuple(columns)
        assert torch.equal(chosen, open_table("source", location, Reading(columns)).read(None))
        assert torch.equal(chosen, read[:, [expected.index(name) for name in columns]])
        wanted = in_blocks(location, wanted=expected[::-1])
        assert wanted[0] == tuple(expected[::-1])
        assert torch.equal(wanted[1], read.flip(1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["parquet", "feather"])
@pytest.mark.parametrize("name", [name for name in FRAMES if not name.startswith("very")])
def test_a_copy_keeps_the_index_and_the_order(name, suffix, tmp_path):
    frame = FRAMES[name]().assign(note=[f"n{i}" for i in range(N)], day=pd.Timestamp("2024-01-01"))
    location = write(frame, suffix, tmp_path)
    model = MongeMap(map=torch.nn.Identity()).float()
    columns = ["0", "1", "2"] if name == "numbered columns" else ["b", "a", "c"]
    transport_blocks(model, location, f"{tmp_path}/out.{suffix}", columns=columns, batch_size=4, block_size=4)
    read = pd.read_parquet if suffix == "parquet" else arrow_frame
    given, out = read(location), read(f"{tmp_path}/out.{suffix}")
    assert list(out.columns) == list(given.columns)
    pd.testing.assert_index_equal(out.index, given.index)
    assert out["note"].tolist() == given["note"].tolist()
    assert out["day"].tolist() == given["day"].tolist()


def arrow_frame(location):
    from pyarrow import feather

    return feather.read_table(location).to_pandas()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("within", ["", "::X", "::layers/counts", "::obsm/pca", "::obsm/frame"])
@pytest.mark.parametrize("make", ["asarray", "csr_matrix", "csc_matrix"])
def test_anndata_in_files(within, make, tmp_path):
    import scipy.sparse

    matrix = getattr(scipy.sparse, make, np.asarray)(NUMBERS)
    names = [f"cell{i}" for i in range(N)]
    cells = anndata.AnnData(matrix, obs=pd.DataFrame(index=names), var=pd.DataFrame(index=["b", "a", "c"]),
                            layers={"counts": matrix * 2}, obsm={"pca": NUMBERS[:, :2]})  # fmt: skip
    cells.obsm["frame"] = pd.DataFrame(NUMBERS, columns=["x", "z", "y"], index=names)
    cells.write_h5ad(tmp_path / "t.h5ad")
    location = f"{tmp_path}/t.h5ad{within}"
    whole = open_table("source", location)
    features, samples = in_blocks(location)
    name = within.rpartition("/")[2]
    assert whole.features == features == {"pca": None, "frame": ("x", "z", "y")}.get(name, ("b", "a", "c"))
    assert torch.equal(samples, whole.read(None))
    if features is not None:
        again, chosen = in_blocks(location, wanted=sorted(features))
        assert list(again) == sorted(features)
        assert torch.equal(chosen, samples[:, [features.index(name) for name in sorted(features)]])


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_arrays_in_files(kind, tmp_path):
    if kind == "npy":
        np.save(tmp_path / "t.npy", NUMBERS)
    else:
        np.savez(tmp_path / "t.npz", x=NUMBERS, label=np.arange(N))
    features, samples = in_blocks(f"{tmp_path}/t.{kind}", wanted=["a", "b", "c"])
    assert features is None
    assert torch.equal(samples, open_table("source", f"{tmp_path}/t.{kind}").read(None))


def test_a_numeric_label_is_no_feature(tmp_path):
    frame = plain().assign(dose=np.tile([0.1, 1.0], N)[:N], note="x")
    frame.to_parquet(tmp_path / "t.parquet")
    frame.to_csv(tmp_path / "t.csv", index=False)
    for name in ("t.parquet", "t.csv"):
        assert in_blocks(str(tmp_path / name))[0] == ("b", "a", "c", "dose")
        assert in_blocks(str(tmp_path / name), labels=["dose"])[0] == ("b", "a", "c")
        with pytest.raises(TypeError, match="the columns 'note' hold no numbers"):
            open_table("source", str(tmp_path / name), Reading(labels=["dose"]))
        assert open_table("source", str(tmp_path / name), Reading(labels=["dose", "note"])).features == ("b", "a", "c")


@pytest.mark.parametrize("row", [0, 7, 1200])
@pytest.mark.parametrize("value", ["abc", "1,5", "1.2.3", "0x1F", "-"])
def test_something_else_in_a_column_of_numbers_is_named(value, row, tmp_path):
    frame = pd.DataFrame(RNG.normal(size=(1500, 2)), columns=["a", "b"]).astype(object)
    frame.loc[row, "b"] = value
    frame.to_csv(tmp_path / "t.csv", index=False)
    message = rf"holds '{value}' in row {row} of the column 'b', which is no number: correct it"
    for columns in (None, ["a", "b"], ["b"]):
        with pytest.raises(ValueError, match=message):
            open_table("source", str(tmp_path / "t.csv"), Reading(columns))
        with pytest.raises(ValueError, match=message):
            list(open_file("IN", str(tmp_path / "t.csv"), Reading(columns)).blocks(100))
    assert open_table("source", str(tmp_path / "t.csv"), Reading(["a"])).features == ("a",)


@pytest.mark.parametrize("missing", ["", "NA", "nan", "NULL", "n/a"])
def test_gaps_are_named_in_both(missing, tmp_path):
    text = "a,b\n" + "".join(f"{i},{missing if i == 9 else i}\n" for i in range(N))
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=r"holds NaN or infinity in 1 of 19 rows \(9, first in 'b'\)"):
        open_table("source", str(tmp_path / "t.csv")).samples(None)
    with pytest.raises(ValueError, match="holds NaN or infinity in row 9 of 'b'"):
        in_blocks(str(tmp_path / "t.csv"))


@pytest.mark.parametrize("header", ["a,b", ",a,b", '"","a","b"'])
def test_row_names_of_r_and_pandas_are_no_feature(header, tmp_path):
    (tmp_path / "t.csv").write_text(header + "\n" + "".join(f"r{i},{i},{i / 2}\n" for i in range(N)))
    assert open_table("source", str(tmp_path / "t.csv")).features == ("a", "b")
    features, samples = in_blocks(str(tmp_path / "t.csv"))
    assert features == ("a", "b")
    assert samples[:, 1].tolist() == [i / 2 for i in range(N)]


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "t.csv").write_text("a,b,a\n1,2,3\n4,5,6\n")
    (tmp_path / "u.csv").write_text("a,b\n1,2\n")
    for read in (open_table, open_file):
        with pytest.raises(ValueError, match="has two columns 'a': rename one"):
            read("IN", str(tmp_path / "t.csv"))
        with pytest.raises(ValueError, match="columns names 'b' twice"):
            read("IN", str(tmp_path / "u.csv"), Reading(["b", "b"]))


@pytest.mark.parametrize("kind", ["csv", "parquet", "feather"])
def test_a_table_without_rows_is_refused(kind, tmp_path):
    location = write(plain().iloc[:0], kind, tmp_path)
    for read in (open_table, open_file):
        with pytest.raises(ValueError, match=r"IN .* has no rows"):
            read("IN", location)


@pytest.mark.parametrize("kind", ["csv", "parquet", "feather"])
def test_vectors_of_conditions_go_by_the_names_of_rows(kind, tmp_path):
    frame = pd.DataFrame({"v0": [1.0, 2.0], "v1": [3.0, 4.0]}, index=["low", "high"])
    location = write(frame, "csv with row names" if kind == "csv" else kind, tmp_path)
    vectors = condition_vectors_of(location, ["high", "low"], torch.float64)
    assert vectors.tolist() == [[2.0, 4.0], [1.0, 3.0]]
