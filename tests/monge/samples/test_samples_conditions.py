"""Batches by condition: labels, vectors, balance, and conditions that are small or missing."""

from itertools import chain

import numpy as np
import pytest
import torch

from lightning_gap import SamplesDataModule
from lightning_gap.monge.samples.batches import UnpairedBatches
from lightning_gap.monge.samples.combinations import condition_names
from lightning_gap.monge.samples.conditions import condition_vectors_of
from lightning_gap.monge.samples.draws import FiniteSamples

CODES = {"B": 0, "NK": 100, "T": 200}


def labelled(counts: dict[str, int]) -> tuple[torch.Tensor, list[str]]:
    """Samples that tell their condition and their row within it."""
    names = [name for name, count in counts.items() for _ in range(count)]
    values = [CODES[name] + i for name, count in counts.items() for i in range(count)]
    return torch.tensor(values, dtype=torch.float32)[:, None], names


def by_condition(source=None, target=None, **options) -> SamplesDataModule:
    (x, x_names), (y, y_names) = (
        labelled(source or dict.fromkeys(CODES, 20)),
        labelled(target or dict.fromkeys(CODES, 30)),
    )
    return SamplesDataModule(x, y, **{"batch_size": 6, "conditions": (x_names, y_names), **options})


def rows(samples: torch.Tensor) -> list[int]:
    return samples.flatten().int().tolist()


def test_every_condition_has_a_batch_of_its_own():
    data = by_condition()
    assert data.condition_names == ("B", "NK", "T")
    loader = data.train_dataloader()
    assert len(loader) == 27 // 6
    for batch in loader:
        assert batch.source.shape == batch.target.shape == (3, 6, 1)
        assert batch.condition.tolist() == [0, 1, 2]
        assert batch.condition.dtype == torch.long
        for side in (batch.source, batch.target):
            assert (side[..., 0] // 100).tolist() == [[k] * 6 for k in range(3)]
            assert all(len(set(rows(side[k]))) == 6 for k in range(3))


def test_a_condition_is_gone_through_like_a_set_of_its_own():
    counts = {"B": 24, "NK": 8, "T": 12}
    data = by_condition(counts, counts, batch_size=4, val_fraction=0)
    seen = [rows(torch.cat([batch.source[k] for batch in data.train_dataloader()])) for k in range(3)]
    assert sorted(seen[0]) == list(range(24))
    assert set(np.bincount(np.array(seen[1]) - 100)) == {3}
    assert set(np.bincount(np.array(seen[2]) - 200)) == {2}


def test_random_conditions_take_turns():
    data = by_condition(conditions_per_batch=2, batch_size=3)
    loader = data.train_dataloader()
    assert len(loader) == 27 // 3 * 3 // 2
    chosen = []
    for number in range(6):
        loader.sampler.set_epoch(number)
        for batch in loader:
            assert batch.source.shape == (2, 3, 1)
            assert (batch.source[:, 0, 0] // 100).tolist() == batch.condition.tolist()
            chosen.append(tuple(batch.condition.tolist()))
    assert set(chosen) == {(0, 1), (0, 2), (1, 2)}
    loader.sampler.set_epoch(0)
    assert [tuple(batch.condition.tolist()) for batch in loader] == chosen[: len(loader)]


@pytest.mark.parametrize("replicas", [2, 4])
@pytest.mark.parametrize("per_batch", [None, 2])
def test_processes_share_the_samples_of_a_condition(replicas, per_batch):
    pairs = [(FiniteSamples(labelled({name: 20})[0]), FiniteSamples(labelled({name: 9})[0])) for name in CODES]
    options = {"conditions": torch.arange(3), "per_batch": per_batch, "seed": 4}
    one = UnpairedBatches(pairs, 8, 3, **options)
    ranks = [UnpairedBatches(pairs, 8, 3, num_replicas=replicas, rank=r, **options) for r in range(replicas)]
    for number in ((0, 0), (5, 2)):
        parts = [batches[number] for batches in ranks]
        assert all(part.condition.tolist() == one[number].condition.tolist() for part in parts)
        for side in ("source", "target"):
            joined = torch.cat([getattr(part, side) for part in parts], dim=1)
            assert torch.equal(joined, getattr(one[number], side))


def test_held_out_samples_come_one_condition_at_a_time():
    data = by_condition(val_fraction=0.2)
    batches = list(data.val_dataloader())
    assert [batch.condition.tolist() for batch in batches] == [[0], [1], [2]]
    for k, batch in enumerate(batches):
        assert batch.source.shape == (1, 4, 1)
        assert batch.target.shape == batch.target_again.shape == (1, 6, 1)
        assert {row // 100 for row in chain(rows(batch.source), rows(batch.target), rows(batch.target_again))} == {k}
    assert len(data.splits["val"].target) == 18


def test_prediction_goes_with_its_conditions_in_order():
    x, names = labelled({"T": 3, "B": 2})
    data = SamplesDataModule(x, x, batch_size=1, conditions=(names, names), val_fraction=0, eval_batch_size=4)
    batches = list(data.predict_dataloader())
    assert rows(torch.cat([samples for samples, _ in batches])) == rows(x)
    assert torch.cat([condition for _, condition in batches]).tolist() == [1, 1, 1, 0, 0]


def test_a_source_without_labels_serves_every_condition():
    y, names = labelled({"B": 20, "T": 30})
    x = torch.arange(1000.0, 1040.0)[:, None]
    data = SamplesDataModule(x, y, batch_size=5, conditions=(None, names))
    batch = next(iter(data.train_dataloader()))
    assert batch.source.shape == batch.target.shape == (2, 5, 1)
    assert rows(batch.source[0]) != rows(batch.source[1])
    assert [len(b.source[0]) for b in data.val_dataloader()] == [4, 4]
    assert len(data.training_samples()[0]) == 36
    assert len(data.splits["val"].source) == 4
    predicted = list(data.predict_dataloader())
    assert rows(torch.cat([samples for samples, _ in predicted])) == rows(x) * 2
    assert torch.cat([condition for _, condition in predicted]).tolist() == [0] * 40 + [1] * 40


def test_weights_sum_to_one_in_every_condition():
    x, names = labelled({"B": 20, "T": 30})
    data = SamplesDataModule(x, x, batch_size=5, conditions=(names, names), weights=(1 + np.arange(50.0), None))
    batch = next(iter(data.train_dataloader()))
    torch.testing.assert_close(batch.source_weights.sum(1), torch.ones(2))
    place = torch.tensor([1.0, 1 - 200 + 20])[:, None]
    torch.testing.assert_close(
        batch.source_weights, torch.nn.functional.normalize(batch.source[..., 0] + place, p=1, dim=1)
    )


def test_vectors_take_the_place_of_labels(tmp_path):
    pd = pytest.importorskip("pandas")
    table = {"B": [0.0, 1], "NK": [2, 3.0], "T": [4, 5], "unused": [6, 7]}
    frame = pd.DataFrame.from_dict(table, orient="index")
    frame.to_csv(tmp_path / "vectors.csv")
    for given in (table, frame, tmp_path / "vectors.csv"):
        data = by_condition(condition_vectors=given, conditions_per_batch=2)
        batch = next(iter(data.train_dataloader()))
        assert batch.condition.dtype == torch.float32
        chosen = (batch.source[:, 0, 0] // 100).long()
        torch.testing.assert_close(batch.condition, torch.tensor([[0.0, 1], [2, 3], [4, 5]])[chosen])
        assert next(iter(data.predict_dataloader()))[1].shape == (60, 2)
    assert condition_vectors_of({10: 1, 2: 0.5}, ("2", "10"), torch.float32).tolist() == [[0.5], [1]]


def test_conditions_with_vectors_may_be_held_out_whole():
    x, names = labelled(dict.fromkeys(CODES, 20))
    vectors = {"B": 0.0, "NK": 1.0, "T": 2.0}
    options = {"batch_size": 4, "conditions": (names, names), "groups": (names, names), "test_groups": ["NK"]}
    data = SamplesDataModule(x, x, condition_vectors=vectors, **options)
    assert next(iter(data.train_dataloader())).condition.tolist() == [[0.0], [2.0]]
    (batch,) = data.test_dataloader()
    assert batch.condition.tolist() == [[1.0]]
    assert batch.target_again is None
    with pytest.raises(ValueError, match=r"condition 'NK' has no training samples: .* give condition_vectors"):
        SamplesDataModule(x, x, **options)


def test_names_are_ordered_by_number_or_by_text():
    assert condition_names([np.array(["10", "9", "1.5"]), None]) == ("1.5", "9", "10")
    assert condition_names([np.array(["10", "9"]), np.array(["a"])]) == ("10", "9", "a")


SMALL = {"B": 20, "NK": 3, "T": 20}


def test_small_conditions_are_refused():
    message = (
        r"batch_size=6 is larger than .* conditions 'NK' \(2 source, 27 target\): use batch_size <= 2, or small_cond"
    )
    with pytest.raises(ValueError, match=message):
        by_condition(SMALL)


def test_small_conditions_are_dropped_and_said():
    with pytest.warns(UserWarning, match=r"fewer than batch_size=6 .* are left out: 'NK' \(2 source, 27 target\)"):
        data = by_condition(SMALL, small_conditions="drop")
    assert data.condition_names == ("B", "T")
    batch = next(iter(data.train_dataloader()))
    assert (batch.source[:, 0, 0] // 200).tolist() == batch.condition.tolist() == [0, 1]
    assert len(list(data.val_dataloader())) == 2
    assert len(torch.cat([samples for samples, _ in data.predict_dataloader()])) == 40


def test_the_batch_shrinks_to_a_small_condition_and_says_so():
    with pytest.warns(UserWarning, match=r"batch_size=6 shrinks to 2, because of 'NK'"):
        data = by_condition(SMALL, small_conditions="shrink")
    assert data.batch_size == 2
    assert next(iter(data.train_dataloader())).source.shape == (3, 2, 1)


def test_a_condition_on_one_side_is_refused_or_dropped():
    source = {"B": 20, "T": 20}
    for policy in ("refuse", "shrink"):
        with pytest.raises(
            ValueError, match="condition 'NK' has 0 source and 27 target training samples: it must be on"
        ):
            by_condition(source, small_conditions=policy)
    with pytest.warns(UserWarning, match="left out: 'NK'"):
        assert by_condition(source, small_conditions="drop").condition_names == ("B", "T")


def test_explicit_validation_has_conditions_of_its_own():
    x, names = labelled({"B": 9, "T": 5})
    val = {"source": x, "target": x, "conditions": (names, names)}
    data = by_condition({"B": 20, "T": 20}, {"B": 20, "T": 20}, val=val)
    assert [batch.source.shape[1] for batch in data.val_dataloader()] == [9, 5]
    with pytest.raises(ValueError, match="val: the source needs conditions, as in training"):
        by_condition(val=(x, x))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"conditions": (["B"] * 60, ["B"] * 89)},
            ValueError,
            "conditions of the target has 89 entries, but target has 90",
        ),
        ({"conditions": (["B"] * 59 + [None], ["B"] * 90)}, ValueError, "missing in 1 of 60 rows, first in row 59"),
        ({"conditions": ["B"] * 60}, TypeError, r"conditions must be the name of a column, or a pair"),
        ({"conditions_per_batch": 4}, ValueError, "conditions_per_batch=4 is more than the 3 conditions"),
        ({"conditions_per_batch": 0}, ValueError, "conditions_per_batch must be at least 1"),
        ({"conditions": None, "conditions_per_batch": 2}, ValueError, "conditions_per_batch is for conditions"),
        ({"conditions": None, "condition_vectors": {}}, ValueError, "condition_vectors is for conditions"),
        ({"small_conditions": "ignore"}, ValueError, "small_conditions must be one of refuse, drop, shrink"),
        ({"condition_vectors": {"B": 1, "T": 2}}, ValueError, "no vector of the condition 'NK'; there is 'B', 'T'"),
        ({"condition_vectors": {"B": 1, "T": 2, "NK": [1, 2]}}, ValueError, "one length, got 1 for 'B' and 2 for 'NK'"),
        ({"condition_vectors": {"B": 1, "T": 2, "NK": np.nan}}, ValueError, r"\['NK'\] must be finite"),
        ({"condition_vectors": {"B": "x", "T": 2, "NK": 2}}, TypeError, r"\['B'\] must be numbers, got 'x'"),
        ({"condition_vectors": [1, 2]}, TypeError, "condition_vectors must be a table"),
        ({"batch_size": 50, "small_conditions": "drop"}, ValueError, "all conditions are smaller than batch_size=50"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        by_condition(**options)
