"""The data module of unpaired samples: splits, shuffles, batches."""

from itertools import chain

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_gap import SamplesDataModule
from lightning_gap.monge import UnpairedBatch
from lightning_gap.monge.samples.batches import UnpairedBatches
from lightning_gap.monge.samples.draws import FiniteSamples


def numbered(n: int, start: int = 0) -> torch.Tensor:
    """Samples that tell their row."""
    return torch.arange(start, start + n, dtype=torch.float32)[:, None].repeat(1, 2)


def rows(samples: torch.Tensor) -> list[int]:
    return samples[:, 0].int().tolist()


def predicted(data: SamplesDataModule) -> torch.Tensor:
    return torch.cat(list(data.predict_dataloader()))


def epoch(data: SamplesDataModule, number: int = 0) -> list[tuple[list[int], list[int]]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return [(rows(batch.source), rows(batch.target)) for batch in loader]


def test_split_and_batches_follow_from_the_seed():
    def make(seed: int) -> SamplesDataModule:
        return SamplesDataModule(numbered(50), numbered(40), batch_size=8, seed=seed)

    assert epoch(make(3)) == epoch(make(3))
    assert epoch(make(3)) != epoch(make(4))
    held_out = [rows(next(iter(make(seed).val_dataloader())).source) for seed in (3, 3, 4)]
    assert held_out[0] == held_out[1] != held_out[2]


def test_the_global_random_state_is_neither_read_nor_changed():
    state = torch.get_rng_state()
    first = epoch(SamplesDataModule(numbered(50), numbered(40), batch_size=8, seed=3))
    torch.manual_seed(0)
    assert epoch(SamplesDataModule(numbered(50), numbered(40), batch_size=8, seed=3)) == first
    torch.set_rng_state(state)
    data = SamplesDataModule(numbered(9), numbered(9), batch_size=3)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.predict_dataloader()):
        list(loader)
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


def unpaired(n: int, m: int, size: int, **options) -> UnpairedBatches:
    return UnpairedBatches([(FiniteSamples(numbered(n)), FiniteSamples(numbered(m)))], size, 4, **options)


@pytest.mark.parametrize("replicas", [2, 4])
def test_ranks_joined_see_the_batches_of_one_process(replicas):
    one = unpaired(48, 30, 12, seed=1)
    ranks = [unpaired(48, 30, 12, seed=1, num_replicas=replicas, rank=rank) for rank in range(replicas)]
    for number in ((0, 0), (0, 3), (7, 2)):
        parts = [batches[number] for batches in ranks]
        assert all(len(part.source) == 12 // replicas for part in parts)
        for side in ("source", "target"):
            assert torch.equal(torch.cat([getattr(part, side) for part in parts]), getattr(one[number], side))


def test_held_out_samples_come_as_one_batch():
    data = SamplesDataModule(
        numbered(50), numbered(40), batch_size=8, val_fraction=0.2, test_fraction=0.1, eval_batch_size=9
    )
    (batch,) = data.val_dataloader()
    assert isinstance(batch, UnpairedBatch)
    assert (len(batch.source), len(batch.target)) == (9, 8)
    (batch,) = data.test_dataloader()
    assert (len(batch.source), len(batch.target)) == (5, 4)
    assert SamplesDataModule(numbered(9), numbered(9), batch_size=8, val_fraction=0).val_dataloader() == []


def test_further_target_samples_are_of_the_training_rows():
    data = SamplesDataModule(numbered(50), numbered(40), batch_size=8, val_fraction=0.2, test_fraction=0.2)
    trained = set(rows(data.training_samples()[1]))
    for loader in (data.val_dataloader(), data.test_dataloader()):
        (batch,) = loader
        again = rows(batch.target_again)
        assert len(set(again)) == len(again) == len(batch.target) == 8
        assert set(again) <= trained
        assert not set(rows(batch.target)) & trained
        assert torch.equal(next(iter(loader)).target_again, batch.target_again)


def test_training_samples_are_those_of_the_batches():
    data = SamplesDataModule(numbered(20), numbered(30), batch_size=8)
    source, target = data.training_samples()
    seen = epoch(data)
    assert {row for batch, _ in seen for row in batch} <= set(rows(source))
    assert (len(source), len(target)) == (18, 27)
    assert [len(x) for x in data.training_samples(5)] == [5, 5]


def test_prediction_maps_all_of_the_source_in_order():
    data = SamplesDataModule(numbered(50), numbered(40), batch_size=8, eval_batch_size=20)
    assert [len(x) for x in data.predict_dataloader()] == [20, 20, 10]
    assert rows(predicted(data)) == list(range(50))


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
    x, y = next(iter(data.train_dataloader()))[:2]
    assert x.dtype == y.dtype == dtype
    assert not x.requires_grad
    assert data.dim == 2
    expected = torch.as_tensor(np.array(samples.detach().float() if torch.is_tensor(samples) else samples, dtype="f8"))
    torch.testing.assert_close(predicted(data).double(), expected, rtol=1e-6, atol=0)


def test_sets_of_different_precision_meet_at_the_higher():
    data = SamplesDataModule(np.zeros((9, 2), np.float32), np.zeros((9, 2)), batch_size=4)
    assert [t.dtype for t in next(iter(data.train_dataloader()))[:2]] == [torch.float64] * 2


def test_later_changes_to_an_array_do_no_harm():
    array = np.zeros((10, 2))
    data = SamplesDataModule(array, array, batch_size=4)
    array[:] = 1
    assert not predicted(data).any()
    assert not data.training_samples()[0].any()


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
        (
            {"source": torch.zeros(1, 2), "batch_size": 1},
            ValueError,
            "of 1 samples of source leave nothing to train on",
        ),
    ],
)
def test_bad_data_are_refused(changes, error, message):
    arguments = {"source": torch.zeros(10, 2), "target": torch.zeros(10, 2), "batch_size": 4, **changes}
    with pytest.raises(error, match=message):
        SamplesDataModule(**arguments)


def test_the_batch_shrinks_to_a_small_set_if_asked_to():
    with pytest.warns(UserWarning, match="batch_size=32 shrinks to 9, the smaller training set"):
        data = SamplesDataModule(numbered(40), numbered(10), batch_size=32, small_conditions="shrink")
    assert data.batch_size == 9


def test_one_sample_of_each_is_enough():
    data = SamplesDataModule(torch.zeros(1, 2), torch.ones(1, 2), batch_size=1, val_fraction=0)
    assert [rows(t) for t in next(iter(data.train_dataloader()))[:2]] == [[0], [1]]


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
def test_overfitting_sees_the_first_batches_again_and_again():
    data = SamplesDataModule(numbered(32), numbered(20), batch_size=8)
    model = Recorder()
    fit(model, data, overfit_batches=2, max_epochs=3)
    seen = [(s, t) for _, s, t in model.seen]
    assert seen == epoch(data)[:2] * 3


def test_another_sampler_on_several_processes_is_refused():
    with pytest.raises(TypeError, match=r"the processes share each batch.*overfit_batches"):
        unpaired(48, 30, 12, num_replicas=2, rank=0)[0]


@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation_with_nothing_held_out_is_refused(stage):
    data = SamplesDataModule(numbered(9), numbered(9), batch_size=4, val_fraction=0)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    evaluate = trainer.validate if stage == "val" else trainer.test
    with pytest.raises(MisconfigurationException, match=f"{stage}_fraction=0 holds no samples out"):
        evaluate(Recorder(), data)


@pytest.mark.parametrize("kind", ["csr_matrix", "csc_matrix", "coo_array"])
def test_sparse_matrices_are_samples(kind):
    make = getattr(pytest.importorskip("scipy.sparse"), kind)
    x = np.random.default_rng(0).poisson(0.5, (40, 3)).astype(np.float32)
    data = SamplesDataModule(make(x), make(x + 1), batch_size=8)
    assert torch.equal(data.source, torch.as_tensor(x))
