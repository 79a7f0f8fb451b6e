"""A map that is asked for by drug and dose: names and numbers to vectors, in fits, checkpoints and files."""

import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_gap import MongeMap, SamplesDataModule
from lightning_gap.monge.transport_files import load_map, transport_file

DRUGS, DOSES = ["A", "B", "C, the third"], [1, 10, 100]
LABELS = {"drug": np.repeat(DRUGS, 60), "dose": np.tile(np.repeat(DOSES, 20), 3)}
EMBEDDINGS = {"A": [1.0, 0.0], "B": [0.0, 1.0], "C, the third": [1.0, 1.0], "never": [-1.0, 1.0]}
DRAWS = torch.Generator().manual_seed(0)
X, Y = torch.randn(50, 2, generator=DRAWS), torch.randn(180, 2, generator=DRAWS)


def crossed(**options) -> SamplesDataModule:
    return SamplesDataModule(X, Y, **{"conditions": (None, LABELS), "batch_size": 5, **options})


def fitted(data, model=None, steps=3, **options):
    model = MongeMap(hidden=(8,)) if model is None else model
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, data, **options)
    return model, trainer


@pytest.fixture(scope="module")
def trained():
    return fitted(crossed(condition_embeddings=EMBEDDINGS, test_conditions=["C, the third"]))


def silently(model, condition):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return model.transport(X, condition)


def each(drug, dose):
    pd = pytest.importorskip("pandas")
    return [
        f"{drug}, {dose}", (drug, dose), [drug, str(dose)], {"drug": drug, "dose": dose},
        {"dose": [dose] * 50, "drug": drug, "other": 3}, {"drug": [drug] * 50, "dose": torch.full((50,), float(dose))},
        [{"drug": drug, "dose": dose}] * 50, [f"{drug}, {dose}"] * 50, [(drug, dose)] * 50,
        np.array([[drug, dose]] * 50, dtype=object), pd.DataFrame({"dose": [dose] * 50, "drug": [drug] * 50}),
        {"drug": EMBEDDINGS[drug], "dose": dose}, {"drug": torch.tensor([EMBEDDINGS[drug]] * 50), "dose": dose},
    ]  # fmt: skip


def test_all_ways_to_ask_for_a_condition_are_one(trained):
    model, _ = trained
    vector = model.condition_encoding.encode([("B", "10")])
    expected = silently(model, vector)
    for condition in each("B", 10)[:-2]:
        assert torch.equal(silently(model, condition), expected), condition
    for condition in each("B", 10)[-2:]:  # a vector of its own, which has no name
        with pytest.warns(UserWarning, match="not trained on drug a vector: its vector stands for it"):
            assert torch.equal(model.transport(X, condition), expected)
    rows = {"drug": ["A", "B"] * 25, "dose": [1, 100] * 25}
    assert torch.equal(silently(model, rows)[::2], silently(model, "A, 1")[::2])
    assert torch.equal(silently(model, rows)[1::2], silently(model, "B, 100")[1::2])


@pytest.mark.parametrize(
    ("condition", "remark"),
    [
        ("never, 10", "the map was not trained on drug 'never': its vector stands for it"),
        ("C, the third, 10", "the map was not trained on drug 'C, the third'"),
        ({"drug": "A", "dose": 1e6}, r"dose=1e\+06, and the map was trained under A from 1 to 100"),
    ],
)
def test_what_was_not_trained_on_is_warned_of(trained, condition, remark):
    with pytest.warns(UserWarning, match=remark):
        trained[0].transport(X, condition)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("unknown, 10", "drug 'unknown' has no vector in condition_embeddings, where there is 'A', 'B'"),
        ("A", "condition 'A' does not tell 'drug', 'dose'"),
        ({"drug": "A"}, "condition has no 'dose'; the conditions of this map have the columns 'drug', 'dose'"),
        ({"drug": "A", "dose": "much"}, "dose must be a number, got 'much'"),
        ({"drug": "A", "dose": -1}, "dose=-1 is negative"),
        ({"drug": ["A"] * 3, "dose": 1}, "condition holds 3 conditions for 50 samples"),
        ({"drug": ["A"] * 3, "dose": [1, 2]}, "the columns have 2 and 3 entries"),
        ({"drug": [1.0, 2, 3], "dose": 1}, "the vector of drug must be 2 finite numbers"),
        ([("A", 1, 2)], "condition has 3 values, for the columns 'drug', 'dose'"),
        ({"drug": ["A", None], "dose": 1}, "condition is missing in row 1"),
    ],
)
def test_conditions_that_make_no_sense_are_refused(trained, condition, message):
    with pytest.raises(ValueError, match=message):
        trained[0].transport(X, condition)


def test_a_checkpoint_takes_the_same_names(trained, tmp_path):
    model, trainer = trained
    trainer.save_checkpoint(tmp_path / "map.ckpt")
    torch.load(tmp_path / "map.ckpt", weights_only=True)
    again = load_map(tmp_path / "map.ckpt")
    assert torch.equal(silently(again, "B, 10"), silently(model, "B, 10"))
    assert again.condition_encoding.trained == model.condition_encoding.trained
    # A run that resumes with other data keeps the vectors of the first.
    part = slice(0, 120)
    labels = {name: values[part] for name, values in LABELS.items()}
    data = SamplesDataModule(
        X, Y[part], conditions=(None, labels), batch_size=5, condition_embeddings={"A": [9.0, 9], "B": [8.0, 8]}
    )
    resumed, _ = fitted(data, steps=4, ckpt_path=tmp_path / "map.ckpt", weights_only=True)
    assert torch.equal(data.condition_vectors[:3, :2], torch.tensor([[1.0, 0]] * 3))
    assert torch.equal(
        resumed.condition_encoding.encode([("never", "10")]), model.condition_encoding.encode([("never", "10")])
    )


def test_the_columns_of_a_file_or_one_condition_for_it(trained, tmp_path):
    pd = pytest.importorskip("pandas")
    model, _ = trained
    frame = pd.DataFrame(X.numpy(), columns=["u", "v"]).assign(drug=["A", "B"] * 25, dose=[1, 100] * 25)
    frame.to_csv(tmp_path / "in.csv", index=False)
    options = {"columns": ["u", "v"], "overwrite": True}
    rows = {"drug": ["A", "B"] * 25, "dose": [1, 100] * 25}
    for condition, expected in (("drug,dose", rows), ("B, 100", "B, 100")):
        transport_file(model, tmp_path / "in.csv", tmp_path / "out.npy", condition=condition, **options)
        np.testing.assert_allclose(np.load(tmp_path / "out.npy"), model.transport(X, expected).numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="give --condition, values of 'drug', 'dose' with commas between"):
        transport_file(model, tmp_path / "in.csv", tmp_path / "other.npy", columns=["u", "v"])


def test_a_held_out_drug_is_scored_by_its_vector(trained):
    model, trainer = trained
    data = crossed(condition_embeddings=EMBEDDINGS, test_conditions=["C, the third"])
    (values,) = trainer.test(model, data, verbose=False)
    assert "lightning_gap/monge/test_energy_distance_floor" in values


def test_data_of_other_columns_are_refused(trained):
    model, trainer = trained
    with pytest.raises(MisconfigurationException, match="the conditions of the data have 'dose', and those of the map"):
        trainer.validate(model, crossed(conditions=(None, {"dose": LABELS["dose"]})), verbose=False)
    labelled, by_label = fitted(crossed(conditions=(None, LABELS["drug"])))
    with pytest.raises(MisconfigurationException, match="trained on labels or vectors"):
        by_label.validate(labelled, crossed(), verbose=False)


def test_a_single_column_goes_by_its_values():
    data = crossed(conditions=(None, LABELS["drug"]), condition_embeddings=EMBEDDINGS)
    model, _ = fitted(data, steps=1)
    expected = silently(model, torch.tensor(EMBEDDINGS["C, the third"]))
    for condition in ("C, the third", ["C, the third"] * 50, {"condition": "C, the third"}):
        assert torch.equal(silently(model, condition), expected)
    with pytest.warns(UserWarning, match="not trained on condition 'never'"):
        model.transport(X, "never")
    doses, _ = fitted(crossed(conditions=(None, {"dose": LABELS["dose"]})), steps=1)
    assert torch.equal(silently(doses, 10), silently(doses, np.full(50, 10)))
    with pytest.warns(UserWarning, match="dose=1e.06, and the map was trained from 1 to 100: so far"):
        doses.transport(X, 1e6)
