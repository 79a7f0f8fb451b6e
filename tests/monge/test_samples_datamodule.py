"""The data module of unpaired samples: splits, shuffles, batches."""

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_gap import SamplesDataModule
from lightning_gap.monge.data import UnpairedBatches, UnpairedSamples


def numbered(n: int, start: int = 0) -> torch.Tensor:
    """Samples that tell their row."""
    return torch.arange(start, start + n, dtype=torch.float32)[:, None].repeat(1, 2)


def rows(samples: torch.Tensor) -> list[int]:
    return samples[:, 0].int().tolist()


def epoch(data: SamplesDataModule, number: int = 0) -> list[tuple[list[int], list[int]]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return [(rows(x), rows(y)) for x, y in loader]


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(5, 60),
    m=st.integers(5, 60),
    val=st.floats(0, 0.4),
    test=st.floats(0, 0.3),
    seed=st.integers(0, 2**31),
)
def test_splits_partition_both_sets(n, m, val, test, seed):
    data = SamplesDataModule(numbered(n), numbered(m), batch_size=1, val_fraction=val, test_fraction=test, seed=seed)
    for side, total in (("source", n), ("target", m)):
        parts = {name: rows(getattr(split, side)) for name, split in data.splits.items()}
        assert sorted(chain.from_iterable(parts.values())) == list(range(total))
        assert len(parts["val"]) == (max(1, round(val * total)) if val else 0)
        assert len(parts["test"]) == (max(1, round(test * total)) if test else 0)


def test_split_and_batches_follow_from_the_seed():
    def make(seed: int) -> SamplesDataModule:
        return SamplesDataModule(numbered(50), numbered(40), batch_size=8, seed=seed)

    assert epoch(make(3)) == epoch(make(3))
    assert rows(make(3).splits["val"].source) == rows(make(3).splits["val"].source)
    assert epoch(make(3)) != epoch(make(4))
    assert rows(make(3).splits["val"].source) != rows(make(4).splits["val"].source)


def test_the_global_random_state_is_neither_read_nor_changed():
    state = torch.get_rng_state()
    first = epoch(SamplesDataModule(numbered(50), numbered(40), batch_size=8, seed=3))
    torch.manual_seed(0)
    assert epoch(SamplesDataModule(numbered(50), numbered(40), batch_size=8, seed=3)) == first
    torch.set_rng_state(state)
    list(UnpairedBatches(UnpairedSamples(numbered(9), numbered(9)), 3))
    assert torch.equal(torch.get_rng_state(), state)


def test_source_and_target_are_shuffled_independently():
    data = SamplesDataModule(numbered(200), numbered(200), batch_size=200, val_fraction=0)
    ((source, target),) = epoch(data)
    assert source != target
    assert np.mean(np.array(source) == np.array(target)) < 0.05
    assert abs(np.corrcoef(source, target)[0, 1]) < 0.25


def test_an_epoch_visits_the_larger_set_once_and_cycles_the_smaller():
    data = SamplesDataModule(numbered(64), numbered(20), batch_size=16, val_fraction=0)
    batches = epoch(data)
    assert len(batches) == len(data.train_dataloader()) == 4
    assert sorted(chain.from_iterable(s for s, _ in batches)) == list(range(64))
    visits = np.bincount([*chain.from_iterable(t for _, t in batches)], minlength=20)
    assert set(visits) == {3, 4}


def test_a_last_incomplete_batch_is_left_for_the_next_epoch():
    data = SamplesDataModule(numbered(50), numbered(50), batch_size=16, val_fraction=0)
    assert [len(s) for s, _ in epoch(data)] == [16, 16, 16]


def test_epochs_differ_and_come_back():
    data = SamplesDataModule(numbered(32), numbered(32), batch_size=8, val_fraction=0)
    assert epoch(data, 0) != epoch(data, 1)
    assert epoch(data, 1) == epoch(data, 1)


def test_ranks_share_an_epoch_without_overlap():
    samples = UnpairedSamples(numbered(64), numbered(64))
    ranks = [list(UnpairedBatches(samples, 8, num_replicas=2, rank=r, seed=5)) for r in (0, 1)]
    assert [len(r) for r in ranks] == [4, 4]
    for side in (0, 1):
        seen = [set(torch.cat([batch[side] for batch in rank]).tolist()) for rank in ranks]
        assert not seen[0] & seen[1]
        assert len(seen[0] | seen[1]) == 64


def test_two_ranks_see_the_batches_of_one_at_the_same_global_size():
    samples = UnpairedSamples(numbered(48), numbered(30))
    one = [[t.tolist() for t in batch] for batch in UnpairedBatches(samples, 12, seed=1)]
    two = [list(UnpairedBatches(samples, 6, num_replicas=2, rank=r, seed=1)) for r in (0, 1)]
    joined = [[torch.cat(sides).tolist() for sides in zip(a, b, strict=True)] for a, b in zip(*two, strict=True)]
    assert joined == one


def test_held_out_samples_come_as_one_batch():
    data = SamplesDataModule(
        numbered(50), numbered(40), batch_size=8, val_fraction=0.2, test_fraction=0.1, eval_batch_size=9
    )
    ((x, y),) = data.val_dataloader()
    assert (len(x), len(y)) == (9, 8)
    ((x, y),) = data.test_dataloader()
    assert (len(x), len(y)) == (5, 4)
    assert SamplesDataModule(numbered(9), numbered(9), batch_size=8, val_fraction=0).val_dataloader() == []


def test_prediction_maps_all_of_the_source_in_order():
    data = SamplesDataModule(numbered(50), numbered(40), batch_size=8, eval_batch_size=20)
    assert [len(x) for x in data.predict_dataloader()] == [20, 20, 10]
    assert rows(torch.cat(list(data.predict_dataloader()))) == list(range(50))


READ_ONLY = np.random.default_rng(0).normal(size=(20, 2))
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("samples", "dtype"),
    [
        (READ_ONLY, torch.float64),
        (READ_ONLY.astype(np.float32), torch.float32),
        (READ_ONLY.astype(np.float16), torch.float32),
        (READ_ONLY.astype(">f4")[::-1], torch.float32),
        (READ_ONLY.tolist(), torch.float64),
        (np.arange(40).reshape(20, 2), torch.float32),
        ((READ_ONLY > 0), torch.float32),
        (torch.randn(20, 2, requires_grad=True), torch.float32),
        (torch.randn(20, 2).bfloat16(), torch.float32),
        (torch.arange(40).reshape(20, 2), torch.float32),
    ],
    ids=lambda value: str(getattr(value, "dtype", type(value).__name__)),
)
def test_arrays_lists_and_tensors_are_samples(samples, dtype):
    data = SamplesDataModule(samples, samples, batch_size=4)
    x, y = next(iter(data.train_dataloader()))
    assert x.dtype == y.dtype == dtype
    assert not x.requires_grad
    assert data.dim == 2
    expected = torch.as_tensor(np.array(samples.detach().float() if torch.is_tensor(samples) else samples, dtype="f8"))
    torch.testing.assert_close(data.source.double(), expected, rtol=1e-6, atol=0)


def test_sets_of_different_precision_meet_at_the_higher():
    data = SamplesDataModule(np.zeros((9, 2), np.float32), np.zeros((9, 2)), batch_size=4)
    assert [t.dtype for t in next(iter(data.train_dataloader()))] == [torch.float64] * 2


def test_later_changes_to_an_array_do_no_harm():
    array = np.zeros((10, 2))
    data = SamplesDataModule(array, array, batch_size=4)
    array[:] = 1
    assert not data.source.any()


BAD_ROW = torch.zeros(10, 2)
BAD_ROW[4] = float("nan")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"source": BAD_ROW}, ValueError, r"source holds NaN or infinity in 1 of 10 rows \(4\)"),
        ({"target": BAD_ROW.numpy()}, ValueError, r"target holds NaN or infinity in 1 of 10 rows \(4\)"),
        ({"source": torch.zeros(10)}, ValueError, r"source must have shape \(n, d\), got \(10,\)"),
        ({"source": torch.zeros(10, 3)}, ValueError, "source has dimension 3 but target has 2"),
        ({"source": torch.zeros(0, 2)}, ValueError, "source is empty"),
        ({"source": [["a", "b"]]}, TypeError, "source must hold real numbers, got an array of <U1"),
        ({"source": np.zeros((10, 2), complex)}, TypeError, "source must hold real numbers"),
        ({"target": torch.zeros(10, 2, dtype=torch.complex64)}, TypeError, "target must hold real numbers"),
        ({"batch_size": 11}, ValueError, r"batch_size=11 is larger .*\(9 source and 9 target.*batch_size <= 9"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 4.0}, TypeError, "batch_size must be an int, got 4.0"),
        ({"batch_size": True}, TypeError, "batch_size must be an int, got True"),
        ({"num_workers": -1}, ValueError, "num_workers must be at least 0"),
        ({"seed": None}, TypeError, "seed must be an int"),
        ({"val_fraction": 1.0}, ValueError, r"val_fraction must be in \[0, 1\), got 1.0"),
        ({"val_fraction": "0.1"}, ValueError, r"val_fraction must be in \[0, 1\), got '0.1'"),
        ({"test_fraction": -0.1}, ValueError, r"test_fraction must be in \[0, 1\), got -0.1"),
        ({"test_fraction": float("nan")}, ValueError, r"test_fraction must be in \[0, 1\)"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, ValueError, "leaves nothing to train on"),
        ({"source": torch.zeros(1, 2), "batch_size": 1}, ValueError, "of 1 samples leave nothing to train on"),
    ],
)
def test_bad_data_are_refused(changes, error, message):
    arguments = {"source": torch.zeros(10, 2), "target": torch.zeros(10, 2), "batch_size": 4, **changes}
    with pytest.raises(error, match=message):
        SamplesDataModule(**arguments)


def test_one_sample_of_each_is_enough():
    data = SamplesDataModule(torch.zeros(1, 2), torch.ones(1, 2), batch_size=1, val_fraction=0)
    assert [rows(t) for t in next(iter(data.train_dataloader()))] == [[0], [1]]


class Recorder(LightningModule):
    """Sees batches, and learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.seen: list[tuple[int, list[int], list[int]]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, rows(batch[0]), rows(batch[1])))

    def validation_step(self, batch, batch_idx):
        pass

    test_step = validation_step

    def configure_optimizers(self):
        return None


def fit(model: Recorder, data: SamplesDataModule, **options) -> None:
    Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    ).fit(model, data)


NO_VALIDATION = "ignore:Total length of `list` across ranks is zero"


@pytest.mark.filterwarnings("ignore:.*returned `None`.*", NO_VALIDATION)
def test_the_trainer_sees_each_epoch_in_its_own_order():
    data = SamplesDataModule(numbered(32), numbered(20), batch_size=8, val_fraction=0)
    model = Recorder()
    fit(model, data, max_epochs=2)
    for number in (0, 1):
        assert [(s, t) for e, s, t in model.seen if e == number] == epoch(data, number)


@pytest.mark.filterwarnings("ignore:.*returned `None`.*", "ignore:.*turning off the .* dataloader shuffling.*")
def test_a_foreign_sampler_is_refused():
    data = SamplesDataModule(numbered(32), numbered(20), batch_size=8)
    with pytest.raises(TypeError, match=r"unpaired samples are read by batches of rows.*overfit_batches"):
        fit(Recorder(), data, overfit_batches=1, max_epochs=1)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation_with_nothing_held_out_is_refused(stage):
    data = SamplesDataModule(numbered(9), numbered(9), batch_size=4, val_fraction=0)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    evaluate = trainer.validate if stage == "val" else trainer.test
    with pytest.raises(MisconfigurationException, match=f"{stage}_fraction=0 holds no samples out"):
        evaluate(Recorder(), data)
