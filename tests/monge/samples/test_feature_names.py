"""Features go by their names: in the checkpoint, in tables, in files, and in the data of a trained map."""

import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from monge_runs import FAST, trainer

from lightning_gap import MongeMap, SamplesDataModule
from lightning_gap.cli import main
from lightning_gap.monge import ConditionalMap
from lightning_gap.monge.transport_files import load_map, transport_blocks, transport_file

pd = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")
anndata = pytest.importorskip("anndata")
sparse = pytest.importorskip("scipy.sparse")
pd.options.future.infer_string = False

RNG = np.random.default_rng(3)
NAMES = ["a", "b", "c"]
OTHER = ["c", "a", "b"]
S = pd.DataFrame((RNG.normal(size=(90, 3)) * [1, 2, 3] + [0, 5, 10]).astype(np.float32), columns=NAMES)
T = S.iloc[::-1].reset_index(drop=True) * [1, 1, 2] + [1, 2, 3]
T = T.astype(np.float32)
OPTIONS = {"raw": {}, "standardized": {"standardize": True}, "components": {"standardize": True, "components": 2}}


def data(source=S, target=T, **options):
    return SamplesDataModule(source, target, **{"batch_size": 32, "test_fraction": 0.2, **options})


@pytest.fixture(scope="module", params=OPTIONS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def path(kind, tmp_path_factory):
    torch.manual_seed(0)
    run, path = trainer(max_steps=4, max_epochs=-1), tmp_path_factory.mktemp("map") / "map.ckpt"
    run.fit(MongeMap(hidden=(8,), optimizer=FAST), data(**OPTIONS[kind]))
    run.save_checkpoint(path)
    return path


@pytest.fixture
def model(path):
    return load_map(path)


@pytest.fixture
def images(model):
    return model.transport(S.to_numpy())


def cells(frame):
    return anndata.AnnData(
        sparse.csr_matrix(frame.to_numpy()), obs=pd.DataFrame(index=[f"cell{i}" for i in range(len(frame))]),
        var=pd.DataFrame(index=list(map(str, frame.columns))),
    )  # fmt: skip


def test_the_checkpoint_holds_them_as_plain_python(path, model):
    assert model.feature_names == NAMES
    found = torch.load(path, weights_only=True)["hyper_parameters"]["feature_names"]
    assert found == NAMES
    assert type(found) is list


def arrow(frame):
    return pytest.importorskip("pyarrow").Table.from_pandas(frame)


def polars(frame):
    return pytest.importorskip("polars").DataFrame(frame.astype(float).to_dict("list"))


@pytest.mark.parametrize("make", [lambda frame: frame, cells, lambda frame: frame.astype(object), arrow, polars])
def test_tables_in_memory(model, images, make):
    assert not torch.allclose(images, model.transport(S[OTHER].to_numpy()))
    for order in (NAMES, OTHER, ["b", "a", "c"]):
        torch.testing.assert_close(model.transport(make(S[order])), images, rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="x has 'd', which the map does not know: ignored"):
        further = model.transport(make(S[OTHER].assign(d=np.float32(1))))
    torch.testing.assert_close(further, images, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"x has no 'b', which the map has among its features \('a', 'b', 'c'\)"):
        model.transport(make(S[["a", "c"]]))
    with pytest.raises(ValueError, match=r"x has no 'a', 'b', 'c', .*: to go by place, give an array"):
        model.transport(make(S.set_axis(["A", "B", "C"], axis=1)))


def test_arrays_go_by_place_and_their_number_is_checked(model, images):
    for x in (
        S.to_numpy(),
        torch.from_numpy(S.to_numpy().copy()),
        sparse.csr_matrix(S.to_numpy()),
        S.to_numpy().tolist(),
    ):
        torch.testing.assert_close(model.transport(x), images, rtol=1e-5, atol=1e-5)
    for x in (S.to_numpy()[:, :2], torch.zeros(2, 4), sparse.csr_matrix(np.zeros((3, 2)))):
        with pytest.raises(ValueError, match=r"x has \d columns, and the map takes 3 features \('a', 'b', 'c'\)"):
            model.transport(x)


def test_rows_that_are_not_finite_are_named(model):
    x = S.to_numpy().copy()
    x[[4, 17], 1] = np.nan, np.inf
    message = r"x holds NaN or infinity in 2 of 90 rows \(4, 17, first in 'b'\)"
    for given in (x, torch.from_numpy(x), pd.DataFrame(x, columns=NAMES)[OTHER], cells(pd.DataFrame(x, columns=NAMES))):
        with pytest.raises(ValueError, match=message):
            model.transport(given)
    with pytest.raises(ValueError, match=r"holds NaN or infinity in 2 of 90 rows \(4, 17"):
        trainer().predict(model, torch.utils.data.DataLoader(torch.from_numpy(x), batch_size=90))


@pytest.mark.parametrize("suffix", ["csv", "tsv.gz", "parquet", "feather"])
def test_tables_in_files(model, images, path, suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frame = S[OTHER].astype(np.float64)
    frame.insert(1, "id", [f"i{i:03d}" for i in range(len(S))])
    _write(frame, f"in.{suffix}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        main(["transport", str(path), f"in.{suffix}", f"out.{suffix}", "--device", "cpu", "--batch-size", "40"])
    out = _read(f"out.{suffix}")
    assert list(out.columns) == ["c", "id", "a", "b"]
    assert out["id"].tolist() == frame["id"].tolist()
    np.testing.assert_allclose(out[NAMES].to_numpy(dtype=np.float32), images.numpy(), rtol=1e-4, atol=1e-4)
    # Named by hand: in whatever order, where they are the map's own; by place, where they are others.
    _write(frame.rename(columns={"a": "x", "b": "y", "c": "z"}), f"other.{suffix}")
    for source, columns in ((f"in.{suffix}", "b,c,a"), (f"other.{suffix}", "x,y,z")):
        main(["transport", str(path), source, "out.npy", "--columns", columns, "--device", "cpu", "--overwrite"])
        np.testing.assert_allclose(np.load("out.npy"), images.numpy(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"IN .* has no 'a', 'b', 'c', .* it has 'z', 'x', 'y'.*by --columns"):
        transport_file(model, f"other.{suffix}", "no.npy")
    with pytest.raises(ValueError, match=r"IN .* has no 'c', which the map has among its features"):
        transport_file(model, f"in.{suffix}", "no.npy", columns=["a", "b"])
    _write(frame.assign(dose=1.0), f"more.{suffix}")
    with pytest.warns(UserWarning, match=r"IN .* has 'dose', which the map does not know: ignored"):
        transport_blocks(model, f"more.{suffix}", f"kept.{suffix}", block_size=40)
    assert _read(f"kept.{suffix}")["dose"].tolist() == [1.0] * len(S)


def _write(frame, name):
    if name.endswith("parquet"):
        frame.to_parquet(name, row_group_size=35)
    elif name.endswith("feather"):
        frame.to_feather(name)
    else:
        frame.to_csv(name, index=False, sep="\t" if "tsv" in name else ",")


def _read(name):
    if name.endswith(("parquet", "feather")):
        return pd.read_parquet(name) if name.endswith("parquet") else pd.read_feather(name)
    return pd.read_csv(name, sep="\t" if "tsv" in name else ",")


@pytest.mark.filterwarnings("ignore:.*which the map does not know")
@pytest.mark.parametrize("further", [False, True])
@pytest.mark.parametrize("matrix", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_genes_in_files(model, images, matrix, further, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frame = S[OTHER].assign(d=np.float32(7)) if further else S[OTHER]
    given = cells(frame)
    given.X = matrix(frame.to_numpy())
    given.write_h5ad("in.h5ad")
    for name in ("out.h5ad", "out.npy", "out.csv"):
        transport_blocks(model, "in.h5ad", name, batch_size=40, block_size=40)
    out = anndata.read_h5ad("out.h5ad")
    assert list(out.var_names) == list(frame.columns)
    np.testing.assert_allclose(out[:, NAMES].X, images.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.load("out.npy"), images.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(pd.read_csv("out.csv")[NAMES], images.numpy(), rtol=1e-4, atol=1e-4)
    if further:
        assert np.all(out[:, "d"].X == 7)
    cells(S[["a", "c"]]).write_h5ad("less.h5ad")
    with pytest.raises(ValueError, match=r"IN \(less.h5ad\) has no 'b', which the map"):
        transport_file(model, "less.h5ad", "no.npy")


def test_an_array_becomes_a_table_with_the_map_s_names(model, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("in.npy", S.to_numpy())
    transport_file(model, "in.npy", "out.csv")
    out = pd.read_csv("out.csv")
    assert list(out.columns) == NAMES
    np.testing.assert_allclose(out, images.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:the data module has")
@pytest.mark.parametrize("order", [OTHER, [*OTHER, "d"]], ids=["reordered", "further"])
def test_data_in_another_order_are_scored_and_mapped_alike(model, images, kind, order):
    options = OPTIONS[kind]
    source, target = S.assign(d=RNG.normal(size=90)), T.assign(d=RNG.normal(size=90))
    other = data(source[order], target[order], **options)
    if kind == "components" and "d" in order:
        with pytest.raises(MisconfigurationException, match=r"principal components .* by SamplesDataModule\(columns"):
            trainer().test(model, other, verbose=False)
        return
    (expected,) = trainer().test(model, data(**options), verbose=False)
    (found,) = trainer().test(model, other, verbose=False)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    (found,) = trainer().validate(model, other, verbose=False)
    assert found == pytest.approx(trainer().validate(model, data(**options), verbose=False)[0], rel=1e-3, abs=1e-4)
    torch.testing.assert_close(torch.cat(trainer().predict(model, other)), images, rtol=1e-4, atol=1e-4)
    assert other.feature_names == tuple(NAMES)
    # And for a map of their own order they are as they were read.
    other.match_features(order)
    assert other.feature_names == tuple(order)


def test_a_fresh_map_takes_the_order_of_the_checkpoint_it_loads(path, kind):
    fresh = MongeMap(hidden=(8,), optimizer=FAST)
    (found,) = trainer().test(fresh, data(S[OTHER], T[OTHER], **OPTIONS[kind]), ckpt_path=path, verbose=False)
    (expected,) = trainer().test(load_map(path), data(**OPTIONS[kind]), verbose=False)
    assert fresh.feature_names == NAMES
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_training_goes_on_with_data_in_another_order(path, kind):
    def resumed(order):
        torch.manual_seed(0)
        model = MongeMap(hidden=(8,), optimizer=FAST)
        trainer(max_steps=8, max_epochs=-1).fit(model, data(S[order], T[order], **OPTIONS[kind]), ckpt_path=path)
        return model

    expected, found = resumed(NAMES), resumed(OTHER)
    torch.testing.assert_close(found.transport(S), expected.transport(S), rtol=1e-2, atol=1e-2)


def test_data_that_lack_a_feature_are_refused(model, kind):
    short = data(S[["a", "b"]], T[["a", "b"]], **({"standardize": True} if kind == "standardized" else {}))
    with pytest.raises(MisconfigurationException, match="the data module has no 'c', which the map"):
        trainer().test(model, short, verbose=False)


def test_a_data_module_of_ones_own_must_have_the_order(model):
    class Own(LightningDataModule):
        feature_names = OTHER

        def predict_dataloader(self):
            return torch.utils.data.DataLoader(torch.zeros(2, 3))

    with pytest.raises(MisconfigurationException, match="the features of the data are 'c', 'a', 'b'"):
        trainer().predict(model, Own())


def test_samples_to_validate_on_and_known_images_are_matched_too():
    known = S * 2 + 1
    samples = data(val={"source": S[OTHER], "target": T[["b", "a", "c"]], "true_images": known[["b", "c", "a"]]},
                   true_images=known[OTHER])  # fmt: skip
    batch = next(iter(samples.train_dataloader()))
    torch.testing.assert_close(batch.true_images, batch.source * 2 + 1)
    (held_out,) = samples.val_dataloader()
    torch.testing.assert_close(held_out.true_images, held_out.source * 2 + 1)
    torch.testing.assert_close(held_out.source.sort(0).values, torch.from_numpy(np.sort(S.to_numpy(), 0)))
    torch.testing.assert_close(held_out.target.sort(0).values, torch.from_numpy(np.sort(T.to_numpy(), 0)))
    with pytest.raises(ValueError, match="true_images has no 'b', which source has among its features"):
        data(true_images=known.rename(columns={"b": "B"}))
    with pytest.raises(ValueError, match="val source has no 'b'"):
        data(val=(S.rename(columns={"b": "B"}), T))


def test_reference_samples_are_matched_too():
    def fitted(reference):
        torch.manual_seed(0)
        model = MongeMap(hidden=(8,), optimizer=FAST, gap_reference=reference)
        trainer(max_steps=3, max_epochs=-1).fit(model, data())
        return model

    expected = fitted(S.to_numpy())
    for reference in (S[OTHER], S[OTHER].assign(d=np.float32(0))):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="gap_reference has 'd'")
            model = fitted(reference)
        assert torch.equal(model.gap_reference, expected.gap_reference)
        assert model.hparams["gap_reference"] == {"shape": [90, 3]}
        torch.testing.assert_close(model.transport(S), expected.transport(S))
    with pytest.raises(ValueError, match="gap_reference has no 'b'"):
        fitted(S.rename(columns={"b": "B"}))


@pytest.mark.parametrize("labels", [[0, 1, 2], [10, 20, 30], [1.5, 2.5, 3.5], [("x", 1), ("y", 2), ("z", 3)]])
def test_labels_that_are_no_text(labels):
    source, target = (frame.set_axis(pd.Index(labels, tupleize_cols=False), axis=1) for frame in (S, T))
    model = MongeMap(hidden=(8,), optimizer=FAST)
    trainer(max_steps=1).fit(model, data(source, target[[labels[i] for i in (1, 2, 0)]]))
    assert model.feature_names == [str(label) for label in labels]
    assert torch.equal(model.transport(source[[labels[i] for i in (2, 0, 1)]]), model.transport(source))
    text = source.set_axis([str(label) for label in labels], axis=1)
    assert torch.equal(model.transport(text.iloc[:, ::-1]), model.transport(source))


def test_names_that_repeat():
    def twice(frame, names):
        given = cells(frame)
        given.var_names = names
        return given

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Vv]ariable names are not unique")
        names = ["g", "g", "h"]
        model = MongeMap(hidden=(8,), optimizer=FAST)
        trainer(max_steps=1).fit(model, data(twice(S, names), twice(T, names)))
        # In the same order there is nothing to match.
        assert torch.equal(model.transport(twice(S, names)), model.transport(S.to_numpy()))
        with pytest.raises(ValueError, match=r"the feature 'g' .* is there twice"):
            model.transport(twice(S[["c", "a", "b"]], ["h", "g", "g"]))
        other = MongeMap(hidden=(8,), optimizer=FAST)
        trainer(max_steps=1).fit(other, data())
        with pytest.raises(ValueError, match=r"the feature 'a' .* is there twice"):
            other.transport(twice(S.assign(d=1.0), ["a", "b", "c", "a"]))
    with pytest.raises(ValueError, match="is there twice"):
        other.transport(pd.concat([S, S[["a"]]], axis=1))


@pytest.mark.parametrize(("names", "error", "message"), [
    ("ab", TypeError, r"feature_names must be a list of names, got 'ab'"),
    (["a", "b", "c"], ValueError, "feature_names has 3 names for dim=2"),
])  # fmt: skip
def test_names_by_hand(names, error, message):
    with pytest.raises(error, match=message):
        MongeMap(2, feature_names=names)
    model = MongeMap(2, feature_names=["a", "b"])
    assert torch.equal(model.transport(S[["b", "a"]]), model.transport(S[["a", "b"]].to_numpy()))


@pytest.mark.parametrize("suffix", ["csv", "parquet", "feather"])
@pytest.mark.parametrize("names", [["0.1", "1"], ["control", "0.50", "2"]])
def test_numbers_that_are_conditions_in_files(names, suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = MongeMap(map=ConditionalMap(3, [8], conditions=len(names)), condition_names=names)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    chosen = [names[i % len(names)] for i in range(len(S))]
    doses = [float(name) for name in chosen] if names[0] == "0.1" else chosen
    _write(S.assign(dose=doses), f"in.{suffix}")
    expected = model.transport(S.to_numpy(), chosen)
    # A map without names: the column of conditions is no feature.
    transport_file(model, f"in.{suffix}", "out.npy", condition="dose")
    np.testing.assert_allclose(np.load("out.npy"), expected.numpy(), rtol=1e-4, atol=1e-4)
    transport_file(model, f"in.{suffix}", "all.npy", condition=f"{names[-1]}.0", columns=NAMES)
    np.testing.assert_allclose(np.load("all.npy"), model.transport(S.to_numpy(), names[-1]), rtol=1e-4, atol=1e-4)


def test_maps_without_names_go_by_place(tmp_path):
    model = MongeMap(hidden=(8,), optimizer=FAST)
    run = trainer(max_steps=1)
    run.fit(model, data(S.to_numpy(), T.to_numpy()))
    assert model.feature_names is None
    run.save_checkpoint(tmp_path / "map.ckpt")
    older = torch.load(tmp_path / "map.ckpt", weights_only=True)
    del older["hyper_parameters"]["feature_names"]
    torch.save(older, tmp_path / "older.ckpt")
    for loaded in (model, load_map(tmp_path / "map.ckpt"), load_map(tmp_path / "older.ckpt")):
        assert torch.equal(loaded.transport(S), loaded.transport(S.to_numpy()))
        trainer().test(loaded, data(), verbose=False)
        assert loaded.feature_names is None
        trainer(max_steps=1).fit(loaded, data())
        assert loaded.feature_names == NAMES
