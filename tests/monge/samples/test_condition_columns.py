"""Conditions of several columns: their names and vectors, what is held out, and which rows serve which."""

import numpy as np
import pytest
import torch

from lightning_gap import SamplesDataModule
from lightning_gap.monge.samples.condition_encoding import ConditionEncoding

DRUGS, DOSES = ["A", "B", "C"], [1, 10, 100]
LABELS = {"drug": np.repeat(DRUGS, 3 * 20), "dose": np.tile(np.repeat(DOSES, 20), 3)}
# Samples tell their condition: 100 for each drug, 10 for each dose.
Y = torch.from_numpy(100.0 * np.repeat([0, 1, 2], 60) + 10 * np.tile(np.repeat([0, 1, 2], 20), 3)).float()[:, None]
X = torch.arange(1000.0, 1050.0)[:, None]
EMBEDDINGS = {"A": [1.0, 0.0], "B": [0.0, 1.0], "C": [1.0, 1.0], "never": [2.0, 2.0]}


def crossed(**options) -> SamplesDataModule:
    return SamplesDataModule(X, Y, **{"conditions": (None, LABELS), "batch_size": 5, **options})


def test_combinations_are_conditions_in_the_order_of_their_values():
    data = crossed()
    assert data.condition_names == tuple(f"{drug}, {dose}" for drug in DRUGS for dose in DOSES)
    batch = next(iter(data.train_dataloader()))
    assert batch.source.shape == batch.target.shape == (9, 5, 1)
    assert (batch.target[:, :, 0] == Y[::20].flatten()[:, None]).all()
    assert torch.equal(batch.condition, data.condition_vectors)


def test_texts_are_categories_and_numbers_that_span_a_decade_logarithms():
    vectors = crossed().condition_vectors
    assert torch.equal(vectors[:, :3], torch.eye(3).repeat_interleave(3, dim=0))
    logs = torch.log1p(torch.tensor([1.0, 10, 100])).repeat(3)
    torch.testing.assert_close(vectors[:, 3], (logs - logs.mean()) / logs.std(correction=0))


@pytest.mark.parametrize(
    ("doses", "kind", "expected"),
    [
        ([1.0, 3.0, 9.0], "number", [1.0, 3, 9]),
        ([-1.0, 10.0, 100.0], "number", [-1.0, 10, 100]),
        ([0.0, 0.001, 1.0], "log", np.log1p([0.0, 1, 1000])),
        ([5.0, 5.0, 5.0], "number", [0.0, 0, 0]),
    ],
)
def test_numbers_are_standardized_whatever_their_unit(doses, kind, expected):
    encoding = ConditionEncoding.fit(["dose"], [None], [(str(dose),) for dose in doses])
    assert encoding.columns[0]["kind"] == kind
    expected = np.asarray(expected)
    expected = (expected - expected.mean()) / (expected.std() or 1)
    np.testing.assert_allclose(encoding.encode([(str(dose),) for dose in doses])[:, 0], expected, atol=1e-6)


def test_kinds_may_be_said_by_hand():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"x": Y[:, 0], "patient": np.repeat([101, 7, 30], 60), "dose": LABELS["dose"]})
    data = SamplesDataModule(X, frame, condition_key={"patient": "category", "dose": "number"}, batch_size=5)
    assert [column["kind"] for column in data.condition_encoding.columns] == ["category", "number"]
    assert data.condition_vectors.shape == (9, 4)


def test_a_table_and_anndata_have_the_columns(tmp_path):
    pd, anndata = pytest.importorskip("pandas"), pytest.importorskip("anndata")
    obs = pd.DataFrame(
        {
            "drug": ["control"] * 50 + LABELS["drug"].tolist(),
            "dose": [np.nan] * 50 + LABELS["dose"].tolist(),
            "type": (["T", "B"] * 200)[:230],
        }
    )
    table = obs.assign(x=torch.cat([X, Y])[:, 0].numpy())
    table.to_csv(tmp_path / "cells.csv", index=False)
    options = {"source_rows": {"drug": "control"}, "target_rows": {"drug": DRUGS}, "batch_size": 3}
    file = tmp_path / "cells.csv"
    by_file = SamplesDataModule(file, file, condition_key=["drug", "dose"], columns=["x"], **options)
    assert by_file.condition_names == crossed().condition_names
    obs.index = obs.index.astype(str)
    cells = anndata.AnnData(torch.cat([X, Y]).numpy(), obs=obs)
    with pytest.warns(UserWarning, match="source holds counts"):  # whole numbers, that is
        data = SamplesDataModule.from_anndata(
            cells, key="drug", source="control", target=DRUGS, condition_key=["type", "drug", "dose"], batch_size=3
        )
    assert data.condition_names[:2] == ("B, A, 1", "B, A, 10")
    # The control knows its type, and serves each drug and dose of it.
    batch = next(iter(data.train_dataloader()))
    assert batch.source.shape == (18, 3, 1)
    assert (batch.source[:9] % 2 == 1).all()
    assert (batch.source[9:] % 2 == 0).all()
    samples, vectors = zip(*data.predict_dataloader(), strict=True)
    assert torch.equal(torch.cat(samples).flatten(), torch.cat([X[1::2].repeat(9, 1), X[::2].repeat(9, 1)]).flatten())
    assert torch.equal(torch.cat(vectors), data.condition_vectors.repeat_interleave(25, dim=0))


@pytest.mark.parametrize("asked", [["C"], [{"drug": "C"}], ["C, 1", "C, 10", "C, 100"], [{"drug": "C", "dose": DOSES}]])
def test_conditions_are_held_out_whole(asked):
    data = crossed(test_conditions=asked)
    assert set(data.train_dataloader().dataset.conditions[:, 0].tolist()) == {0.0, 1.0}
    batches = list(data.test_dataloader())
    assert len(batches) == 3
    training, held_out = data.splits["train"], data.splits["test"]
    assert (training.target < 200).all()
    assert (held_out.target >= 200).all()
    # Controls serve both, and some are held out with the conditions.
    assert len(held_out.source) == 5
    assert not set(training.source.flatten().tolist()) & set(held_out.source.flatten().tolist())
    for batch in batches:
        # Half of what is held out tells the floor; the drug stands at the mean of those that were trained on.
        assert batch.target.shape == batch.target_again.shape == (1, 10, 1)
        assert batch.condition[0, :2].tolist() == [0.5, 0.5]
    assert len(data.val_dataloader()) == 6


def test_a_new_combination_of_known_values_may_be_held_out():
    data = crossed(test_conditions=["B, 10"], val_conditions=[{"drug": "A", "dose": 1}])
    assert len(data.train_dataloader().dataset.pairs) == 7
    (test,), (val,) = data.test_dataloader(), data.val_dataloader()
    assert (test.target == 110).all()
    assert (val.target == 0).all()
    assert test.condition[0, :3].tolist() == [0, 1, 0]


def test_a_side_that_serves_few_conditions_is_held_out_with_them():
    types = {"type": np.array(["T", "B"] * 25)}
    labels = {"type": np.repeat(["T", "B"], 90), "drug": np.tile(np.repeat(DRUGS, 30), 2)}
    data = SamplesDataModule(X, Y, conditions=(types, labels), batch_size=5, test_conditions=["T"], val_fraction=0)
    assert (data.splits["test"].source % 2 == 0).all()
    assert len(data.splits["test"].source) == len(data.splits["train"].source) == 25
    data = SamplesDataModule(X, Y, conditions=(types, labels), batch_size=5, test_conditions=["T, A"], val_fraction=0)
    assert len(data.splits["test"].source) == 2
    assert len(data.splits["train"].source) == 48


def test_each_condition_is_left_out_in_turn():
    data = crossed(test_fraction=0.2)
    folds = dict(data.leave_one_condition_out())
    assert tuple(folds) == data.condition_names
    assert all(len(fold.test_dataloader()) == 1 and len(fold.val_dataloader()) == 8 for fold in folds.values())
    drugs = dict(data.leave_one_condition_out("drug"))
    assert {name: len(fold.test_dataloader()) for name, fold in drugs.items()} == {"A": 3, "B": 3, "C": 3}
    for k, fold in enumerate(drugs.values()):
        assert set((fold.splits["test"].target // 100).flatten().tolist()) == {k}
    # Nothing of the data is changed by it.
    assert len(data.test_dataloader()) == 9
    with pytest.raises(ValueError, match="by='type': the conditions have the columns 'drug', 'dose'"):
        next(data.leave_one_condition_out("type"))
    with pytest.raises(ValueError, match="no conditions to leave out"):
        next(SamplesDataModule(X, X, batch_size=5).leave_one_condition_out())
    plain = SamplesDataModule(X, Y, conditions=(None, LABELS["drug"]), batch_size=5)
    assert plain.condition_encoding is None
    with pytest.raises(ValueError, match="condition 'A' is held out, and a map learns nothing of a label"):
        next(plain.leave_one_condition_out())


def test_embeddings_take_the_place_of_categories(tmp_path):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame.from_dict(EMBEDDINGS, orient="index")
    frame.to_csv(tmp_path / "drugs.csv")
    expected = torch.tensor([EMBEDDINGS[drug] for drug in DRUGS])
    for given in (EMBEDDINGS, frame, tmp_path / "drugs.csv", {"drug": EMBEDDINGS}, {"drug": frame}):
        data = crossed(condition_embeddings=given, test_conditions=["C"])
        assert torch.equal(data.condition_vectors[:, :2], expected.repeat_interleave(3, dim=0))
        assert torch.equal(data.condition_encoding.encode([("never", "10")])[0, :2], torch.tensor([2.0, 2]))
    single = SamplesDataModule(
        X, Y, conditions=(None, LABELS["drug"]), batch_size=5, condition_embeddings=EMBEDDINGS, test_conditions=["C"]
    )
    assert torch.equal(single.condition_vectors, expected)
    assert single.condition_names == tuple(DRUGS)


def test_an_encoding_is_plain_python_and_tensors():
    encoding = crossed(condition_embeddings=EMBEDDINGS).condition_encoding
    again = ConditionEncoding(**encoding.hparams)
    assert not again.agrees_with(encoding)
    again.load_state_dict(encoding.state_dict())
    assert again.agrees_with(encoding)
    rows = [("A", "10"), ("never", "1000")]
    assert torch.equal(again.encode(rows), encoding.encode(rows))
    assert again.remarks(rows) == encoding.remarks(rows)


def test_other_data_are_encoded_as_the_first_were():
    first, part = crossed().condition_encoding, slice(60, 120)
    labels = {name: values[part] for name, values in LABELS.items()}
    data = SamplesDataModule(X, Y[part], conditions=(None, labels), batch_size=5, test_fraction=0.2)
    assert data.condition_vectors.shape == (3, 2)
    data.match_conditions(first)
    assert torch.equal(data.condition_vectors, crossed().condition_vectors[3:6])
    assert torch.equal(next(iter(data.train_dataloader())).condition, data.condition_vectors)
    assert torch.equal(torch.cat([batch.condition for batch in data.test_dataloader()]), data.condition_vectors)
    other = SamplesDataModule(X, Y, conditions=(None, {"dose": LABELS["dose"]}), batch_size=5)
    with pytest.raises(ValueError, match="have 'dose', and those of the map 'drug', 'dose'"):
        other.match_conditions(first)


@pytest.mark.parametrize(
    ("row", "remark"),
    [
        (("A", "10"), None),
        (("A", "120"), None),
        (("A", "10000"), "dose=10000, and the map was trained under A from 1 to 100: so far outside"),
        (("A", "-10"), None),  # refused where it is encoded
        (("C", "10"), "the map was not trained on drug 'C': the mean of the trained ones stands for it"),
        (("B", "10"), "dose=10, and the map was trained under B at 1 only"),
    ],
)
def test_what_was_not_trained_on_is_said(row, remark):
    trained = [("A", "1"), ("A", "10"), ("A", "100"), ("B", "1")]
    encoding = ConditionEncoding.fit(["drug", "dose"], ["category", None], trained, others=[("C", "10")])
    remarks = encoding.remarks([row])
    assert len(remarks) == (remark is not None)
    assert all(said.startswith(remark) for said in remarks)


def test_a_new_combination_is_said():
    trained = [("A", "T"), ("A", "B"), ("C", "T")]
    encoding = ConditionEncoding.fit(["drug", "type"], ["category", "category"], trained)
    assert encoding.remarks(trained) == []
    (said,) = encoding.remarks([("C", "B")])
    assert said.startswith("drug 'C' and type 'B' were not trained on together")
    encoding.note([("C", "B")])
    assert encoding.remarks([("C", "B")]) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"test_conditions": "C"}, TypeError, "test_conditions must be a list of conditions, got 'C'"),
        ({"test_conditions": ["D"]}, ValueError, "test_conditions names 'D', which is no condition; there is 'A, 1'"),
        ({"test_conditions": []}, ValueError, "test_conditions is empty"),
        ({"test_conditions": DRUGS}, ValueError, "test_conditions holds out all conditions"),
        ({"test_conditions": ["C"], "val_conditions": ["C, 1"]}, ValueError, "both hold out 'C, 1'"),
        ({"test_conditions": ["C"], "test_groups": ["C"]}, ValueError, "both say what is held out"),
        ({"test_conditions": [{"type": "C"}]}, ValueError, "asks for {'type': 'C'}, and the conditions have 'drug'"),
        ({"conditions": None, "test_conditions": ["C"]}, ValueError, "need conditions: give conditions="),
        ({"condition_key": ["drug"]}, ValueError, "conditions and condition_key both say"),
        ({"condition_embeddings": {"A": [1], "B": [2]}}, ValueError, "has no vector of the condition 'C'"),
        ({"condition_embeddings": {"type": EMBEDDINGS}}, ValueError, "for the column 'type', and the conditions have"),
        ({"conditions": None, "condition_embeddings": {}}, ValueError, "condition_embeddings is for conditions"),
        ({"conditions": None, "condition_key": []}, TypeError, "condition_key must be a column"),
        ({"conditions": None, "condition_key": {"a": "text"}}, ValueError, r"\['a'\] must be one of category, number"),
        ({"conditions": None, "condition_key": ["drug", "dose"]}, ValueError, "target has no 'drug'"),
        ({"conditions": (None, {"drug": ["A"] * 9})}, ValueError, r"conditions\['drug'\] of the target has 9 entries"),
    ],
)
def test_columns_that_do_not_fit_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        crossed(**options)


def test_combinations_of_one_name_are_refused():
    y, clash = Y[:4], {"drug": ["A, B", "A, B", "A", "A"], "line": ["C", "C", "B, C", "B, C"]}
    with pytest.raises(ValueError, match=r"columns 'drug', 'line' have one name, 'A, B, C'.*replace the commas"):
        SamplesDataModule(X, y, conditions=(None, clash), batch_size=2).setup("fit")
    # Of two sides, each of which has one of them.
    one, other = ({name: labels[rows] for name, labels in clash.items()} for rows in (slice(2), slice(2, 4)))
    with pytest.raises(ValueError, match=r"have one name, 'A, B, C'"):
        SamplesDataModule(y[:2], y[2:], conditions=(one, other), batch_size=2).setup("fit")
    # And of the names by which a side with fewer columns serves them.
    more = {**clash, "dose": [1, 1, 2, 2]}
    with pytest.raises(ValueError, match=r"columns 'drug', 'line' have one name, 'A, B, C'"):
        SamplesDataModule(y[:2], y, conditions=(one, more), batch_size=2).setup("fit")
