"""The batch that really comes against the plan: items that are batches, views, small data, loaders that do not tell."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regime_runs import EPOCH_SCHEDULES, Regression, dataset, loader, run
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_gap.regime import LargeBatchRegime
from lightning_gap.regime.loader import check_first_batch

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*have no .val_dataloader.*", "ignore:.*IterableDataset.*has .__len__.*"
)


class Batches(Dataset):
    """Items are whole batches, as in a data set of graphs or packed tokens."""

    def __len__(self):
        return 8

    def __getitem__(self, at):
        x = torch.randn(64, 4)
        return x, x.sum(1, keepdim=True)


def first(items):
    return items[0]


def two_views(items):
    x, y = (torch.stack(parts) for parts in zip(*items, strict=True))
    return torch.cat([x, x + 1]), torch.cat([y, y])


def test_items_that_are_batches_are_told_and_planned_as_given():
    data = DataLoader(Batches(), batch_size=1, collate_fn=first)
    module = Regression()
    with pytest.raises(MisconfigurationException, match=r"tells of 1 samples in a batch, and the first batch has 64"):
        run(module, data, LargeBatchRegime(4))
    assert module.trainer.global_step == 0
    with pytest.raises(MisconfigurationException, match=r"8 samples of an epoch.*pass batch_size= and samples="):
        run(module, data, LargeBatchRegime(16))
    regime = LargeBatchRegime(16, batch_size=64, samples=512)
    trainer, trace = run(Regression(), data, regime)
    assert (trainer.global_step, regime.plan.updates_per_epoch) == (6 * 32, 8)
    assert trace.rates[0][0] == pytest.approx(2e-3)


def test_views_that_a_collate_function_makes_are_told():
    data = loader(16, samples=64, collate_fn=two_views)
    with pytest.raises(MisconfigurationException, match=r"the first batch has 32.* pass batch_size= in samples"):
        run(Regression(), data, LargeBatchRegime(4))
    trainer, _ = run(Regression(), data, LargeBatchRegime(4, batch_size=16))
    assert trainer.global_step == 6 * 16


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_data_set_smaller_than_an_update_is_refused(accumulate):
    few = loader(64 // accumulate, samples=50)
    with pytest.raises(MisconfigurationException, match=r"=64 is more than the 50 samples of an epoch"):
        run(Regression(), few, LargeBatchRegime(4), accumulate_grad_batches=accumulate)
    with pytest.raises(MisconfigurationException, match=r"reference_batch_size=128 .* Pass reference_batch_size=50"):
        run(Regression(), loader(10, samples=50), LargeBatchRegime(128))
    trainer, _ = run(Regression(), loader(50, samples=50), LargeBatchRegime(10))
    assert trainer.global_step == 30


class Counted(IterableDataset):
    def __len__(self):
        return 60

    def __iter__(self):
        return iter(dataset())


class Own:
    """A batch sampler of one's own."""

    def __iter__(self):
        return iter([range(start, start + 30) for start in (0, 30)])

    def __len__(self):
        return 2


@pytest.mark.parametrize(
    ("data", "batch_size"),
    [
        (DataLoader(Counted(), batch_size=30), None),
        (DataLoader(dataset(), batch_sampler=Own()), 30),
        (DataLoader(Batches(), batch_size=None), 64),
    ],
    ids=["stream", "batch sampler", "unbatched"],
)
def test_samples_tell_the_length_where_the_loader_does_not(data, batch_size):
    samples = 512 if batch_size == 64 else 60
    with pytest.raises(MisconfigurationException, match="samples="):
        run(Regression(), data, LargeBatchRegime(4, batch_size=batch_size))
    regime = LargeBatchRegime(4, batch_size=batch_size, samples=samples)
    trainer, _ = run(Regression(), data, regime)
    assert trainer.global_step == 6 * samples // 4
    assert regime.plan.samples_seen == regime.plan.updates * regime.plan.batch_size


class Endless(IterableDataset):
    """A stream that does not tell its length."""

    def __iter__(self):
        yield from dataset()


def test_samples_tell_the_length_of_a_stream_without_one():
    def stream(batch_size):
        return DataLoader(Endless(), batch_size=batch_size)

    with pytest.raises(MisconfigurationException, match="samples="):
        run(Regression(), stream(30), LargeBatchRegime(4))
    for options, updates in (({}, 90), ({"max_epochs": -1, "max_steps": 77}, 77)):
        trainer, trace = run(
            Regression(EPOCH_SCHEDULES["StepLR"]), stream(30), LargeBatchRegime(4, samples=60), **options
        )
        assert trainer.global_step == updates
        _, reference = run(Regression(EPOCH_SCHEDULES["StepLR"]), stream(4), **options)
        torch.testing.assert_close(trace.tensor, 7.5**0.5 * reference.tensor, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(8, 3),
        [torch.zeros(8, 3), torch.zeros(8)],
        {"x": torch.zeros(8, 5), "y": {"z": torch.zeros(8)}, "names": ["a"] * 8},
        ([torch.zeros(3, 10, 12)] * 8, [{"boxes": torch.zeros(2, 4)}] * 8),  # images of their own sizes, with boxes
        {"ids": torch.zeros(8, 7), "total": torch.zeros(4)},
        ["a", "b"],  # nothing to count
        None,
        torch.tensor(1.0),
    ],
)
def test_a_batch_that_may_hold_its_samples_is_believed(batch):
    check_first_batch(batch, 8)


@pytest.mark.parametrize(
    "batch", [torch.zeros(16, 3), (torch.zeros(16), torch.zeros(16)), {"x": torch.zeros(7, 5)}, [torch.zeros(5, 2)] * 3]
)
def test_a_batch_of_other_samples_is_refused(batch):
    with pytest.raises(MisconfigurationException, match="tells of 8 samples"):
        check_first_batch(batch, 8)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create.*", "ignore:.*dataloader is not resumable.*")
def test_a_resumed_run_does_not_take_the_small_last_batch_for_the_first(tmp_path):
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    run(Regression(), loader(25), LargeBatchRegime(5), save, enable_checkpointing=True, max_epochs=1)
    trainer, _ = run(Regression(), loader(25), LargeBatchRegime(5), ckpt_path=tmp_path / "step=2.ckpt", max_epochs=1)
    assert trainer.global_step == 12


def test_the_loader_is_made_twice_at_most():
    class Counts(Regression):
        made = 0

        def train_dataloader(self):
            self.made += 1
            return loader(30)

    run(module := Counts(), None, LargeBatchRegime(4))
    assert module.made <= 2  # once for the plan, once by Lightning
