"""What is held out: rows, groups, and samples that are given apart."""

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gap import SamplesDataModule
from lightning_gap.monge.samples.draws import generator
from lightning_gap.monge.samples.splits import SplitRule, named_groups, split_rows


@settings(deadline=None, max_examples=50)
@given(
    n=st.integers(10, 60),
    strata=st.integers(1, 3),
    val=st.floats(0, 0.4),
    test=st.floats(0, 0.3),
    seed=st.integers(0, 2**40),
    dropped=st.integers(0, 3),
)
def test_rows_are_divided_in_every_stratum(n, strata, val, test, seed, dropped):
    labels = np.arange(n) % strata
    usable = np.arange(n) >= dropped
    rows = split_rows("source", labels, None, usable, SplitRule(val, test, seed=seed), 0, strict=False)
    assert sorted(chain.from_iterable(part.tolist() for part in rows.values())) == list(range(dropped, n))
    for stratum in range(strata):
        total = int((usable & (labels == stratum)).sum())
        held = [sum(labels[rows[stage]] == stratum) for stage in ("val", "test")]
        expected = [max(1, round(share * total)) if share else 0 for share in (val, test)]
        assert held == (expected if sum(expected) < total else [0, 0])


@settings(deadline=None, max_examples=50)
@given(groups=st.lists(st.sampled_from("abcd"), min_size=8, max_size=40), seed=st.integers(0, 99))
def test_a_held_out_group_is_in_one_stage_only(groups, seed):
    names = np.array([*groups, "a", "b", "c", "c"])
    rule = SplitRule(0.2, 0.0, val_groups=(), test_groups=("a", "b"), seed=seed)
    rows = split_rows("source", np.zeros(len(names), int), names, np.ones(len(names), bool), rule, 0)
    assert sorted(chain.from_iterable(part.tolist() for part in rows.values())) == list(range(len(names)))
    assert sorted(rows["test"]) == np.flatnonzero(np.isin(names, ["a", "b"])).tolist()
    assert len(rows["val"]) == max(1, round(0.2 * int((~np.isin(names, ["a", "b"])).sum())))


def test_generators_differ_by_seed_and_by_key():
    keys = [(0,), (0, 0), (0, 0, 0), (1,), (0, 1), (1, 0), (2**70, 5)]
    draws = {int(torch.randint(2**60, (1,), generator=generator(*key))) for key in keys}
    assert len(draws) == len(keys)
    assert torch.equal(torch.rand(3, generator=generator(3, 1)), torch.rand(3, generator=generator(3, 1)))


def test_groups_by_share_are_chosen_by_the_seed():
    names = [f"p{i}" for i in range(10)]
    val, test = named_groups(0.2, 0.3, names, 0)
    assert (len(val), len(test)) == (2, 3)
    assert not set(val) & set(test)
    assert named_groups(0.2, 0.3, names, 0) == (val, test)
    assert len({named_groups(0.2, 0.3, names, seed) for seed in range(5)}) > 1
    assert named_groups([1, 2.0], None, ["1", "2", "3"], 0) == (("1", "2"), ())
    assert named_groups(0.01, ["p1"], names, 0)[1] == ("p1",)


def grouped(**options) -> SamplesDataModule:
    """Twelve rows of each side, whose value tells their patient."""
    patients = [101, 107, 1015] * 4
    values = np.array(patients, dtype=np.float32)[:, None]
    return SamplesDataModule(values, values, **{"batch_size": 2, "groups": (patients, patients), **options})


def test_a_patient_is_held_out_by_name():
    data = grouped(test_groups=["107"])
    assert set(data.splits["test"].source.flatten().tolist()) == {107}
    assert set(data.splits["train"].target.flatten().tolist()) == {101, 1015}
    (batch,) = data.test_dataloader()
    assert batch.source.shape == (4, 1)
    assert set(batch.target_again.flatten().tolist()) <= {101, 1015}
    assert len(data.splits["val"].source) == 1  # a tenth of the other rows, at least one


def test_validation_and_test_patients():
    data = grouped(val_groups=[101], test_groups=1 / 3)
    assert set(data.splits["val"].source.flatten().tolist()) == {101}
    assert len(set(data.splits["train"].source.flatten().tolist())) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"test_groups": ["108"]}, ValueError, "test_groups names '108', which is no group; there is '101', '1015'"),
        (
            {"test_groups": "107"},
            TypeError,
            r"test_groups must be a list of names or a share, got '107': write \['107'\]",
        ),
        ({"test_groups": []}, ValueError, "test_groups is empty"),
        ({"test_groups": [107, 107]}, ValueError, "test_groups names '107' twice"),
        ({"test_groups": [107], "val_groups": [107]}, ValueError, "both name '107'"),
        ({"val_groups": [101, 107, 1015]}, ValueError, "hold out all groups"),
        ({"val_groups": 1.5}, ValueError, r"val_groups must be names or a share in \(0, 1\), got 1.5"),
        ({"val_groups": [101], "val_fraction": 0.1}, ValueError, "val_fraction and val_groups both say"),
        ({}, ValueError, "groups are for val_groups and test_groups"),
        ({"groups": None, "val_groups": [1]}, ValueError, "need the groups of both sides"),
        ({"groups": ([1] * 12, None), "val_groups": [1]}, ValueError, "need the groups of both sides"),
        (
            {"groups": ([1] * 11, [1] * 12), "val_groups": [1]},
            ValueError,
            "groups of the source has 11 entries, but .* 12",
        ),
        (
            {"groups": ([1, None] * 6, [1] * 12), "val_groups": [1]},
            ValueError,
            r"missing in 6 of 12 rows, first in row 1",
        ),
        (
            {"groups": ([1, 2] * 6, [2, 3] * 6), "val_groups": [1]},
            ValueError,
            "val: the groups '1' hold nothing of both",
        ),
        ({"groups": [1] * 12, "val_groups": [1]}, TypeError, r"groups must be the name of a column, or a pair"),
    ],
)
def test_groups_that_do_not_fit_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        grouped(**options)


def test_samples_to_validate_and_test_on_may_be_given_apart():
    x = torch.arange(20.0)[:, None]
    data = SamplesDataModule(
        x, x, batch_size=4, val=(x + 100, x + 200), standardize=True,
        test={"source": x[:5] + 300, "target": x, "true_images": -x[:5], "weights": (np.arange(5), None)},
    )  # fmt: skip
    assert len(data.training_samples()[0]) == 20
    decode = data.representation.decode
    (batch,) = data.val_dataloader()
    torch.testing.assert_close(decode(batch.source).sort(0).values, x + 100)
    torch.testing.assert_close(decode(batch.target).sort(0).values, x + 200)
    (batch,) = data.test_dataloader()
    torch.testing.assert_close(decode(batch.source).sort(0).values, x[1:5] + 300)
    torch.testing.assert_close(decode(batch.true_images), 300 - decode(batch.source))
    torch.testing.assert_close(batch.source_weights, (decode(batch.source)[:, 0] - 300) / 10)
    assert batch.target_weights is None
    assert set(decode(batch.target_again).round().flatten().tolist()) <= set(range(20))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"val": torch.zeros(4, 1)}, TypeError, r"val must be a pair \(source, target\), or a mapping"),
        ({"val": {"source": [[1.0]]}}, TypeError, "got dict with 'source'"),
        (
            {"val": {"source": [[1.0]], "target": [[1.0]], "group": 1}},
            TypeError,
            "any of weights, conditions, true_images",
        ),
        ({"val": ([[1.0]], [[1.0, 2.0]])}, ValueError, "val source has dimension 1 but val target has 2"),
        ({"val": ([[1.0, 2]], [[1.0, 2.0]])}, ValueError, "source has dimension 1 but val source has 2"),
        ({"val": ([[1.0]], [[1.0]]), "val_fraction": 0.2}, ValueError, "val_fraction and val both say"),
        ({"test": ([[np.nan]], [[1.0]])}, ValueError, "test source holds NaN or infinity in 1 of 1 rows"),
        ({"test": (lambda n, g: None, [[1.0]])}, TypeError, "test: source must be samples, got function"),
        (
            {"val": {"source": [[1.0]], "target": [[1.0]], "conditions": (["a"], ["a"])}},
            ValueError,
            "takes no conditions",
        ),
    ],
)
def test_explicit_samples_that_do_not_fit_are_refused(options, error, message):
    x = torch.arange(20.0)[:, None]
    with pytest.raises(error, match=message):
        SamplesDataModule(x, x, batch_size=4, **options)


@pytest.mark.parametrize("weighted", [0, 1])
def test_weights_go_with_their_rows_and_sum_to_one(weighted):
    x = torch.arange(30.0)[:, None]
    mass = np.arange(30)
    weights = (mass, None) if weighted == 0 else (None, mass)
    data = SamplesDataModule(x, x, batch_size=8, weights=weights)
    side, field = ("source", "source_weights") if weighted == 0 else ("target", "target_weights")
    batches = [*data.train_dataloader(), *data.val_dataloader()]
    for batch in batches:
        rows, found = getattr(batch, side)[:, 0], getattr(batch, field)
        torch.testing.assert_close(found, rows / rows.sum())
        assert batch[3 - weighted] is None
        assert rows.min() > 0  # a weight of 0 leaves the sample out
    if weighted == 1:
        assert not bool((batches[-1].target_again == 0).any())


def test_weights_of_ranks_are_those_of_the_global_batch():
    from lightning_gap.monge.samples.batches import UnpairedBatches
    from lightning_gap.monge.samples.draws import FiniteSamples

    x = torch.arange(1.0, 31.0)[:, None]
    pairs = [(FiniteSamples(x, x[:, 0]), FiniteSamples(x))]
    one = UnpairedBatches(pairs, 8, 3)[0, 1]
    parts = [UnpairedBatches(pairs, 8, 3, num_replicas=2, rank=rank)[0, 1] for rank in (0, 1)]
    torch.testing.assert_close(torch.cat([part.source_weights for part in parts]), one.source_weights)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (
            (np.full(30, -1.0), None),
            ValueError,
            "weights of the source must be finite and non-negative, got -1.0 in row 0",
        ),
        ((None, [np.nan] * 30), ValueError, "weights of the target must be finite and non-negative, got nan in row 0"),
        ((np.zeros(30), None), ValueError, "weights of the source must not all be 0"),
        ((["a"] * 30, None), TypeError, "weights of the source must be numbers"),
        ((np.ones((30, 2)), None), ValueError, r"weights of the source must have one entry a row, got shape \(30, 2\)"),
        ("mass", ValueError, "weights: source has no 'mass'"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, error, message):
    x = torch.arange(30.0)[:, None]
    with pytest.raises(error, match=message):
        SamplesDataModule(x, x, batch_size=8, weights=weights)


@pytest.mark.parametrize("true_images", [lambda x: 2 * x + 1, "array"])
def test_known_images_follow_their_samples(true_images):
    x = torch.arange(30.0)[:, None]
    images = 2 * x + 1 if true_images == "array" else true_images
    data = SamplesDataModule(x, x, batch_size=8, true_images=images, test_fraction=0.2, standardize=True)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            decode = data.representation.decode
            torch.testing.assert_close(decode(batch.true_images), 2 * decode(batch.source) + 1)


@pytest.mark.parametrize(
    ("true_images", "message"),
    [
        (torch.zeros(29, 1), "true_images has 29 rows and source 30"),
        (torch.zeros(30, 2), r"true_images has shape \(30, 2\) and source \(30, 1\)"),
        (torch.full((30, 1), torch.inf), "true_images holds NaN or infinity in 30 of 30 rows"),
        (lambda x: x[:, :0], r"true_images returned shape \(30, 0\)"),
    ],
)
def test_known_images_that_do_not_fit_are_refused(true_images, message):
    x = torch.arange(30.0)[:, None]
    with pytest.raises(ValueError, match=message):
        SamplesDataModule(x, x, batch_size=8, true_images=true_images)


def test_the_representation_is_fitted_on_training_rows_only():
    x = torch.cat([torch.zeros(50, 1), torch.full((10, 1), 1e6)])
    groups = [0] * 50 + [1] * 10
    data = SamplesDataModule(x, x + 2, batch_size=8, standardize=True, groups=(groups, groups), test_groups=[1])
    assert float(data.representation.mean) == 1
    assert float(data.representation.scale) == 1
    assert float(data.splits["test"].source.min()) == 1e6 - 1
    assert data.source.max() == 1e6
    assert torch.equal(torch.cat(list(data.predict_dataloader())), x)


def test_components_set_the_dimension():
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    data = SamplesDataModule(x, x + 1, batch_size=8, components=2, standardize=True)
    batch = next(iter(data.train_dataloader()))
    assert data.dim == batch.source.shape[1] == batch.target.shape[1] == 2
    assert data.representation.hparams == {"dim": 5, "components": 2}
    assert SamplesDataModule(x, x, batch_size=8).representation is None
