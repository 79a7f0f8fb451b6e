"""Validation, early stopping, checkpoints and weight averaging beside LargeBatchRegime."""

import csv
import math
from functools import cache
from pathlib import Path

import pytest
from checkered import checkered
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regime_runs import Regression, SaveAt, loader, run

from lightning_gap.regime import LargeBatchRegime

pytestmark = pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*")


class Scored(Regression):
    """Logs a score by reference epochs of 15 updates, that is best at the fourth."""

    scores = (5.0, 4.0, 3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0)

    def __init__(self, batch):
        super().__init__()
        self.batch = batch

    def train_dataloader(self):
        return loader(self.batch)

    def val_dataloader(self):
        return loader(60)

    def score(self):
        return self.scores[max(0, self.trainer.global_step // 15 - 1)]

    def validation_step(self, batch, batch_idx):
        self.log("score", self.score())

    def on_train_epoch_end(self):
        self.log("training_score", self.score())


@pytest.mark.parametrize(("batch", "here"), [(8, 8), (30, 2), (60, 1)])
@pytest.mark.parametrize("every", [1, 2])
def test_validations_fall_on_reference_epochs(batch, here, every):
    trainer, trace = run(Scored(batch), None, LargeBatchRegime(4), check_val_every_n_epoch=every)
    ends = [15 * epoch for epoch in range(every, 7, every)]
    assert trace.validated == [min(90, -(-end // here) * here) for end in ends]
    assert trainer.check_val_every_n_epoch == every


WITHIN = [
    {"val_check_interval": 0.5},
    {"val_check_interval": 0.25, "check_val_every_n_epoch": 2},
    {"val_check_interval": 6},
    {"val_check_interval": 15},
    {"val_check_interval": 12, "check_val_every_n_epoch": None},
    {"val_check_interval": 20, "check_val_every_n_epoch": None},
]


@cache
def validated_by_the_reference_run(**options):
    return run(Scored(4), None, **options)[1].validated


@checkered(options=WITHIN, batches=[(8, 1), (30, 1), (60, 1), (10, 3)])
def test_validations_within_epochs_count_updates_of_the_reference_run(options, batches):
    batch, accumulate = batches
    reference = validated_by_the_reference_run(**options)
    assert reference
    trainer, trace = run(Scored(batch), None, LargeBatchRegime(4), accumulate_grad_batches=accumulate, **options)
    assert trace.validated == reference
    for name, value in options.items():
        assert getattr(trainer, name) == value
    share = LargeBatchRegime(4, train_longer=0.25)
    _, trace = run(Scored(batch), None, share, accumulate_grad_batches=accumulate, **options)
    due = [math.ceil(update / share.plan.pace) for update in reference]
    assert trace.validated == sorted(set(due))


def test_an_interval_of_validations_that_no_reference_epoch_has_is_refused():
    with pytest.raises(MisconfigurationException, match="val_check_interval=16 is more than the 15 updates"):
        run(Scored(30), None, LargeBatchRegime(4), val_check_interval=16)


@pytest.mark.parametrize("batch", [8, 30, 60])
def test_early_stopping_and_checkpoints_follow_validations_within_epochs(batch, tmp_path):
    def stopped(batch, *callbacks):
        save = ModelCheckpoint(tmp_path / str(batch), "{step}", save_top_k=-1, every_n_epochs=2)
        stop = EarlyStopping("score", patience=4)
        options = {"val_check_interval": 0.2, "max_epochs": 12, "enable_checkpointing": True}
        trainer, _ = run(Scored(batch), None, stop, save, *callbacks, **options)
        return trainer.global_step, sorted(path.name for path in (tmp_path / str(batch)).glob("*.ckpt"))

    assert stopped(batch, LargeBatchRegime(4)) == stopped(4)


def test_the_reference_epoch_is_told(tmp_path):
    seen = {}

    class Reads(Regression):
        def training_step(self, batch, batch_idx):
            seen.setdefault(int(self.regime.reference_epoch), self.trainer.global_step)
            return super().training_step(batch, batch_idx)

    for options, here in (({}, 15), ({"train_longer": 0.2}, 5), ({"train_longer": False}, 2)):
        seen.clear()
        module = Reads()
        module.regime = LargeBatchRegime(4, **options)
        assert module.regime.reference_epoch == 0
        logger = CSVLogger(tmp_path, name=str(here))
        trainer, _ = run(module, loader(30), module.regime, logger=logger, log_every_n_steps=1)
        epoch = float(module.regime.plan.stretched_epoch)
        assert seen == {number: math.ceil(number * epoch) for number in range(6)}
        assert module.regime.reference_epoch == trainer.global_step / epoch
        rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()))
        key = "lightning_gap/regime/reference_epoch"
        told = [float(row[key]) for row in rows if row.get(key)]
        assert told == pytest.approx([update / epoch for update in range(1, trainer.global_step + 1)])


@pytest.mark.parametrize(
    ("monitor", "at_epoch_end"),
    [("score", None), ("score", True), ("score", False), ("training_score", None), ("training_score", True)],
)
def test_patience_counts_reference_epochs(monitor, at_epoch_end):
    stop = EarlyStopping(monitor, patience=3, check_on_train_epoch_end=at_epoch_end)
    trainer, _ = run(Scored(4), None, stop, max_epochs=12)
    assert trainer.global_step == 7 * 15  # best at the fourth epoch, and three more
    for batch, end in ((8, 112), (30, 106), (60, 105)):
        for order in (0, 1):
            stop = EarlyStopping(monitor, patience=3, check_on_train_epoch_end=at_epoch_end)
            callbacks = [LargeBatchRegime(4), stop] if order else [stop, LargeBatchRegime(4)]
            trainer, _ = run(Scored(batch), None, *callbacks, max_epochs=12)
            assert trainer.global_step == end
            assert stop._check_on_train_epoch_end in ((True,) if at_epoch_end is None else (at_epoch_end,))


def test_early_stopping_without_validation():
    stop = EarlyStopping("training_score", patience=3)
    trainer, _ = run(Scored(30), None, LargeBatchRegime(4), stop, max_epochs=12, limit_val_batches=0)
    assert trainer.global_step == 106


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({}, [1, 2, 3, 4]),
        ({"every_n_epochs": 2}, [2, 4]),
        ({"save_on_train_epoch_end": True}, [1, 2, 3, 4]),
        ({"every_n_epochs": 2, "save_on_train_epoch_end": False}, [2, 4]),
        ({"every_n_train_steps": 15}, [1, 2, 3, 4]),
        ({"monitor": "score"}, [1, 2, 3, 4]),
    ],
)
def test_checkpoints_count_reference_epochs(options, epochs, tmp_path):
    for batch, here in ((4, 15), (30, 2)):
        save = ModelCheckpoint(tmp_path / str(batch), filename="{step}", save_top_k=-1, **options)
        every = save._every_n_epochs
        run(Scored(batch), None, save, *([] if batch == 4 else [LargeBatchRegime(4)]), max_epochs=4,
            enable_checkpointing=True)  # fmt: skip
        steps = sorted(int(path.stem.removeprefix("step=")) for path in (tmp_path / str(batch)).glob("*.ckpt"))
        exact = "every_n_train_steps" in options
        assert steps == [15 * epoch if exact else -(-15 * epoch // here) * here for epoch in epochs]
        assert save._every_n_epochs == every


@pytest.mark.filterwarnings("ignore:.*averaged weights.*", "ignore:.*WeightAveraging.*")
def test_averaging_by_updates_runs_beside_the_regime():
    averaging = EMAWeightAveraging(decay=0.9, update_starting_at_step=10)
    trainer, trace = run(Scored(30), None, averaging, LargeBatchRegime(4))
    assert trainer.global_step == 90
    assert trace.rates[0][0] == pytest.approx(1e-3 * 7.5**0.5)


def test_companions_resume(tmp_path):
    def callbacks():
        return LargeBatchRegime(4), EarlyStopping("score", patience=3)

    trainer, full = run(Scored(30), None, *callbacks(), save := SaveAt(tmp_path), max_epochs=12)
    assert trainer.global_step == 106
    for step in save.saved[::7]:
        resumed, trace = run(Scored(30), None, *callbacks(), ckpt_path=tmp_path / f"{step}.ckpt", max_epochs=12)
        assert resumed.global_step == 106
        assert trace.validated == [update for update in full.validated if update > step]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create.*")
def test_companions_resume_from_the_last_batch_of_an_epoch(tmp_path):
    def callbacks():
        return LargeBatchRegime(4), EarlyStopping("score", patience=3)

    def saving():
        return ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)

    options = {"enable_checkpointing": True, "max_epochs": 12}
    trainer, full = run(Scored(30), None, *callbacks(), saving(), **options)
    assert trainer.global_step == 106
    for step in (14, 16, 104):  # before, at the end of and after an epoch with a validation; one before the last
        resumed, trace = run(Scored(30), None, *callbacks(), ckpt_path=tmp_path / f"step={step}.ckpt", max_epochs=12)
        assert resumed.global_step == 106
        # The validation at the end of that very epoch is lost, as in Lightning.
        assert trace.validated == [update for update in full.validated if update > step]


def test_a_stopped_run_gives_everything_back():
    class Fails(Callback):
        def on_train_batch_end(self, trainer, *args):
            raise RuntimeError("stop")

    save, stop = ModelCheckpoint(every_n_epochs=3), EarlyStopping("score")
    with pytest.raises(RuntimeError, match="stop"):
        run(Scored(30), None, LargeBatchRegime(4), save, stop, Fails(), enable_checkpointing=True)
    assert (save._every_n_epochs, stop._check_on_train_epoch_end) == (3, True)
