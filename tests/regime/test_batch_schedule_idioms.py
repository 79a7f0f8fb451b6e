"""BatchSizeSchedule under what users write: loaders in a dict, own samplers, skipped epochs, second fits, limits."""

import pickle
import random
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, EarlyStopping
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regime_runs import EPOCH_SCHEDULES, Regression, dataset, loader, run, trainer_of
from torch.utils.data import DataLoader, Sampler

from lightning_gap import BatchSizeSchedule
from lightning_gap.regime.scheduled_loader import draws_of, worker_seeds

pytestmark = pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*", "ignore:.*callbacks used to create.*")
BASE, STEPS = 4, [(0, 4), (100, 12), (200, 20)]


class Rows(Callback):
    """The rows of each batch, and the rate of each update."""

    def __init__(self):
        self.rows, self.rates = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch = batch["a"] if isinstance(batch, dict) else batch
        self.rows.append(batch[0])

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


class Wild(Sampler):
    """Draws with Python's own generator."""

    def __iter__(self):
        rows = list(range(60))
        random.shuffle(rows)
        return iter(rows)

    def __len__(self):
        return 60


def test_a_sampler_that_draws_with_pythons_random_is_drawn_alike_everywhere():
    draws = draws_of(DataLoader(dataset(), BASE, sampler=Wild()), seed=3)
    random.seed(1)
    first = draws(0)
    random.seed(2)
    state = random.getstate()
    assert draws(0) == first
    assert random.getstate() == state
    assert draws(1) != first
    other = draws_of(DataLoader(dataset(), BASE, shuffle=True), seed=4)
    again = draws_of(DataLoader(dataset(), BASE, shuffle=True), seed=3)
    assert other(0) != again(1)  # seeds of runs and epochs do not overlap


def test_workers_of_ranks_draw_differently_where_they_are_seeded(monkeypatch):
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    assert worker_seeds(1) is None
    monkeypatch.setenv("PL_SEED_WORKERS", "1")
    assert worker_seeds(1).keywords == {"rank": 1}


@pytest.mark.parametrize("wrap", [lambda data: {"a": data}, lambda data: [data]])
def test_a_loader_in_a_dict_or_a_list(wrap):
    class Wrapped(Regression):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"] if isinstance(batch, dict) else batch[0], batch_idx)

    trainer, _ = run(Wrapped(), wrap(loader(BASE)), BatchSizeSchedule(STEPS))
    assert trainer.global_step == 42


def test_what_the_trainer_accumulates_is_what_a_device_is_given():
    rows = Rows()
    trainer, _ = run(Regression(), loader(BASE), BatchSizeSchedule([(0, 8), (60, 24)]), rows, accumulate_grad_batches=2)
    assert max(map(len, rows.rows)) == BASE
    assert trainer.accumulate_grad_batches == 2


def test_a_run_without_the_callback_goes_on_as_the_reference_run(tmp_path):
    trainer, _ = run(Regression(), loader(BASE), BatchSizeSchedule([(0, BASE), (60, 16)]), max_epochs=2)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-3

    class Saves(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            assert trainer.optimizers[0].param_groups[0]["lr"] > 1e-3
            trainer.save_checkpoint(tmp_path / "at.ckpt")

    run(Regression(), loader(BASE), BatchSizeSchedule([(0, BASE), (30, 16)]), Saves(), max_epochs=1)
    rows = Rows()
    run(Regression(), loader(BASE), rows, max_epochs=2, ckpt_path=tmp_path / "at.ckpt")
    assert set(rows.rates) == {1e-3}


def test_an_epoch_that_is_left_early_steps_its_schedulers():
    class Leaves(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            return -1 if batch_idx == 3 else None

    class Left(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 3 else None

    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    rows, plain = Rows(), Rows()
    run(Left(schedule), loader(BASE), BatchSizeSchedule([(0, BASE)]), rows, max_epochs=4)
    run(Left(schedule), loader(BASE), plain, max_epochs=4)
    assert rows.rates == plain.rates


def test_least_numbers_of_updates_are_the_reference_runs():
    class Worse(Regression):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(self.current_epoch))

        def val_dataloader(self):
            return loader(60)

    stops = EarlyStopping("val_loss", patience=0)
    trainer, _ = run(
        Worse(), loader(BASE), BatchSizeSchedule([(0, 20)], reference_batch_size=4), stops, min_steps=40, max_epochs=9,
        num_sanity_val_steps=0,
    )  # fmt: skip
    assert trainer.current_epoch == 3  # 40 updates of 4 are within the third


def test_a_second_fit_of_the_trainer_goes_on():
    trainer = trainer_of(BatchSizeSchedule(STEPS), max_epochs=-1, max_steps=10)
    module = Regression()
    trainer.fit(module, loader(BASE))
    assert trainer.global_step == 10
    trainer.fit(module, loader(BASE))
    assert trainer.global_step == 10


def test_an_update_is_logged_with_the_rate_that_made_it():
    logged = []

    class Logged(Callback):
        def on_train_batch_end(self, trainer, *_):
            logged.append(float(trainer.callback_metrics["lightning_gap/regime/learning_rate"]))

    _, trace = run(
        Regression(EPOCH_SCHEDULES["StepLR"]), loader(BASE), BatchSizeSchedule(STEPS), Logged(), log_every_n_steps=1
    )
    assert logged == pytest.approx([rates[0] for rates in trace.rates])


class Validated(Regression):
    def val_dataloader(self):
        return loader(30)


def test_validations_by_time_and_a_callback_that_travels():
    callback = BatchSizeSchedule("seesaw")
    run(Validated(EPOCH_SCHEDULES["StepLR"]), loader(BASE), callback, val_check_interval="00:00:00:01", max_epochs=1)
    assert pickle.loads(pickle.dumps(callback)).schedule.name == "seesaw"


def test_drop_last_leaves_no_update_of_few_samples():
    rows = Rows()
    schedule = BatchSizeSchedule([(0, 8), (60, 21)])
    run(Regression(), loader(8, samples=67, drop_last=True), schedule, rows, max_epochs=3)
    assert min(map(len, rows.rows)) >= 8
    assert sum(map(len, rows.rows)) == 3 * 64


def test_a_change_by_hand_is_warned_of_and_groups_by_a_callback_are_refused():
    class Sets(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            trainer.optimizers[0].param_groups[0]["lr"] = 1e-4

    with pytest.warns(UserWarning, match="changes 'lr'"):
        run(Regression(EPOCH_SCHEDULES["StepLR"]), loader(BASE), BatchSizeSchedule([(0, 4), (60, 16)]), Sets())
    with pytest.raises(MisconfigurationException, match="freeze by requires_grad"):
        run(Regression(), loader(BASE), BatchSizeSchedule(STEPS), BackboneFinetuning())
    with pytest.raises(MisconfigurationException, match="validate by time"):
        run(Regression(), loader(BASE), BatchSizeSchedule("plateau", max_batch_size=8), val_check_interval=0.5)
