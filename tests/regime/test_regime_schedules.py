"""Every scheduler of torch under LargeBatchRegime: its learning rate at every update, and resumed from every epoch."""

import math
import warnings
from functools import cache, partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regime_runs import EPOCH_SCHEDULES, SCHEDULES, Regression, SaveAt, loader, run, trainer_of
from torch.optim import lr_scheduler as schedulers

from lightning_gap.regime import LargeBatchRegime

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*have no .val_dataloader.*",
    "ignore:.*OneCycleLR. scheduler is using.*",
    "ignore:.*reaches past the reference run.*",
)

SAMPLES, REFERENCE, EPOCHS = 72, 2, 6
UNIT = SAMPLES // REFERENCE
RATIOS = (2, 3, 7.5, 16, 32)


def module(name, interval, lr=1e-3):
    return Regression(partial(SCHEDULES[name], unit=1 if interval == "epoch" else UNIT), interval=interval, lr=lr)


@cache
def reference_run(name, interval):
    trainer, trace = run(module(name, interval), loader(REFERENCE, SAMPLES), max_epochs=EPOCHS)
    return trainer.global_step, trace.tensor


def hold_at(ratios, name, interval):
    updates, rates = reference_run(name, interval)
    assert updates == EPOCHS * UNIT
    for ratio in ratios:
        batch = int(REFERENCE * ratio)
        trainer, trace = run(
            module(name, interval), loader(batch, SAMPLES), LargeBatchRegime(REFERENCE), max_epochs=EPOCHS
        )
        assert trainer.global_step == updates
        torch.testing.assert_close(trace.tensor, math.sqrt(ratio) * rates, rtol=1e-9, atol=0)


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_at_a_ratio(name, interval):
    # Another for the next scheduler, and by epochs than by updates.
    hold_at([RATIOS[(2 * list(SCHEDULES).index(name) + (interval == "step")) % len(RATIOS)]], name, interval)


@pytest.mark.slow
@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_at_every_ratio(name, interval):
    hold_at(RATIOS, name, interval)


# ------------------------------------------------------------------------------------------------- part of the way


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("name", ["StepLR", "CosineAnnealingLR", "OneCycleLR", "MultiplicativeLR", "SequentialLR"])
def test_part_of_the_way_runs_through_the_whole_schedule(name, interval):
    _, rates = reference_run(name, interval)
    regime = LargeBatchRegime(REFERENCE, train_longer=0.25)
    trainer, trace = run(module(name, interval), loader(16, SAMPLES), regime, max_epochs=EPOCHS)
    # 36 updates an epoch in the reference run and 5 here: 5 + 31 / 4 = 12.75.
    assert trainer.global_step == len(trace.rates) == math.ceil(6 * 12.75) == 77
    at = [math.floor(update * 36 / 12.75 + 1e-9) for update in range(77)]
    if interval == "epoch":
        at = [reference // UNIT * UNIT for reference in at]
    torch.testing.assert_close(trace.tensor, math.sqrt(8) * rates[at], rtol=1e-9, atol=0)


def test_no_part_of_the_way_is_not_longer():
    trainer, _ = run(Regression(), loader(16), LargeBatchRegime(4, train_longer=0.0), max_epochs=2)
    assert trainer.global_step == 8


# --------------------------------------------------------------------------------------- lengths taken from the trainer


class FromTrainer(Regression):
    """A cosine over the trainer's own numbers."""

    def configure_optimizers(self):
        epochs = self.config["interval"] == "epoch"
        length = self.trainer.max_epochs if epochs else self.trainer.estimated_stepping_batches
        self.schedule = partial(schedulers.CosineAnnealingLR, T_max=length)
        return super().configure_optimizers()


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 1])
def test_the_trainer_answers_as_in_the_reference_run(interval, share):
    _, reference = run(FromTrainer(interval=interval), loader(4))
    regime = LargeBatchRegime(4, train_longer=share)
    trainer, trace = run(FromTrainer(interval=interval), loader(30), regime)
    assert trainer.lr_scheduler_configs[0].scheduler.T_max == (6 if interval == "epoch" else 90)
    at = [math.floor(regime.plan.pace * update) for update in range(trainer.global_step)]
    torch.testing.assert_close(trace.tensor, math.sqrt(7.5) * reference.tensor[at], rtol=1e-9, atol=0)
    assert type(trainer) is Trainer
    assert "configure_optimizers" not in vars(trainer.lightning_module)
    assert len(loader(30)) == 2


def test_lengths_may_be_declared():
    def cosine(length):
        return Regression(partial(schedulers.CosineAnnealingLR, T_max=length))

    _, ours = run(cosine(45), loader(30), LargeBatchRegime(4, stretch_schedulers=False))
    _, plain = run(cosine(45), loader(30), max_epochs=45)
    torch.testing.assert_close(ours.tensor, math.sqrt(7.5) * plain.tensor, rtol=1e-9, atol=0)
    _, ours = run(FromTrainer(), loader(30), LargeBatchRegime(4, stretch_schedulers=False))
    torch.testing.assert_close(ours.tensor, math.sqrt(7.5) * plain.tensor, rtol=1e-9, atol=0)
    with pytest.raises(MisconfigurationException, match=r"T_max = 45 looks like a length of this run"):
        run(cosine(45), loader(30), LargeBatchRegime(4))
    _, ours = run(cosine(45), loader(30), LargeBatchRegime(4, stretch_schedulers=True))
    _, reference = run(cosine(45), loader(4))
    torch.testing.assert_close(ours.tensor, math.sqrt(7.5) * reference.tensor, rtol=1e-9, atol=0)


# ------------------------------------------------------------------------------------------------------------ plateau


class Plateau(Regression):
    """Logs, as a validation metric, a given sequence by reference epochs of `unit` updates."""

    def __init__(self, *, unit, batch, frequency=1):
        plateau = partial(schedulers.ReduceLROnPlateau, patience=1, cooldown=1, factor=0.5, min_lr=1e-5)
        super().__init__(plateau, monitor="quality", frequency=frequency)
        self.unit, self.batch = unit, batch
        self.quality = [3.0, 2.0, 2.5, 2.4, 2.3, 1.0, 1.5, 1.4, 1.3, 1.2, 1.1, 1.1, 1.1, 1.1]

    def train_dataloader(self):
        return loader(self.batch)

    def val_dataloader(self):
        return loader(60)

    def validation_step(self, batch, batch_idx):
        self.log("quality", self.quality[max(0, self.trainer.global_step // self.unit - 1)])


@pytest.mark.parametrize("frequency", [1, 2])
@pytest.mark.parametrize(("batch", "here"), [(8, 8), (25, 3), (30, 2), (60, 1)])
def test_a_plateau_counts_reference_epochs(batch, here, frequency):
    _, reference = run(Plateau(unit=15, batch=4, frequency=frequency), None, max_epochs=12)
    assert len(set(map(tuple, reference.rates))) >= 2
    regime = LargeBatchRegime(4)
    trainer, trace = run(Plateau(unit=15, batch=batch, frequency=frequency), None, regime, max_epochs=12)
    assert trainer.global_step == 180
    # A new rate waits for the end of this run's epoch in which the reference epoch ends.
    at = [update // here * here // 15 * 15 for update in range(180)]
    torch.testing.assert_close(trace.tensor, math.sqrt(batch / 4) * reference.tensor[at], rtol=1e-9, atol=0)


def test_a_plateau_by_updates_follows_its_own_frequency():
    plateau = partial(schedulers.ReduceLROnPlateau, patience=0, threshold=10.0, factor=0.9)

    def by_updates(frequency):
        return Regression(plateau, monitor="loss", interval="step", frequency=frequency)

    _, plain = run(by_updates(1), loader(30), max_epochs=45)
    _, trace = run(by_updates(1), loader(30), LargeBatchRegime(4))
    assert len(set(map(tuple, plain.rates))) > 10
    torch.testing.assert_close(trace.tensor, math.sqrt(7.5) * plain.tensor, rtol=1e-9, atol=0)
    with pytest.raises(MisconfigurationException, match='interval="epoch"'):
        run(by_updates(2), loader(30), LargeBatchRegime(4))


# ------------------------------------------------------------------------------------------------------------- resume


def assert_resumes(module, regime, path, hook="on_train_epoch_end", *, which=slice(None), **options):
    """Compare runs resumed from every epoch of a run, or from some, with that run, bit for bit."""
    whole, save = module(), SaveAt(path, hook)
    trainer, full = run(whole, None, regime(), save, max_epochs=5, **options)
    assert (trainer.global_step, trainer.current_epoch) == (45, 12)
    assert len(save.saved) == (12 if hook == "on_train_epoch_end" else 5)
    for step in save.saved[which]:
        part = module()
        resumed, trace = run(part, None, regime(), ckpt_path=path / f"{step}.ckpt", max_epochs=5, **options)
        assert resumed.global_step == 45
        assert trace.rates == full.rates[step:]
        for a, b in zip(whole.parameters(), part.parameters(), strict=True):
            assert torch.equal(a, b)


class Data(Regression):
    def train_dataloader(self):
        return loader(16)


# From every third epoch, others for the next schedule; and from all, which is slow.
@pytest.mark.parametrize(
    ("name", "which"),
    [
        *((name, slice(at % 3, None, 3)) for at, name in enumerate(EPOCH_SCHEDULES)),
        *(pytest.param(name, slice(None), marks=pytest.mark.slow) for name in EPOCH_SCHEDULES),
    ],
    ids=[f"{name}-{part}" for part in ("some", "all") for name in EPOCH_SCHEDULES],
)
def test_every_schedule_resumes_from_every_epoch(name, which, tmp_path):
    assert_resumes(lambda: Data(EPOCH_SCHEDULES[name]), lambda: LargeBatchRegime(7), tmp_path, which=which)


@pytest.mark.parametrize("hook", ["on_validation_end", "on_train_epoch_end"])
def test_a_plateau_resumes_from_every_epoch(hook, tmp_path):
    def module():
        return Plateau(unit=9, batch=16)

    assert_resumes(module, lambda: LargeBatchRegime(7), tmp_path, hook)


def test_the_first_updates_resume_from_every_epoch(tmp_path):
    def regime():
        return LargeBatchRegime(7, clip_norm=0.5, clip_updates=20, warmup_updates=30)

    assert_resumes(lambda: Data(EPOCH_SCHEDULES["CosineAnnealingLR"]), regime, tmp_path)


def test_adams_moments_and_part_of_the_way_resume(tmp_path):
    def module():
        return Data(EPOCH_SCHEDULES["OneCycleLR"], optimizer=partial(torch.optim.AdamW, betas=(0.9, 0.99)))

    def regime():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of more updates than the rule is derived for
            return LargeBatchRegime(7, lr_rule="adam", train_longer=0.5)

    def run_(save, ckpt_path=None):
        model = module()
        trainer, trace = run(model, None, regime(), *save, max_epochs=5, ckpt_path=ckpt_path)
        return trainer, trace, model

    trainer, full, whole = run_([saver := SaveAt(tmp_path)])
    assert trainer.global_step == math.ceil(5 * 6.5)
    for step in saver.saved:
        _, trace, part = run_([], tmp_path / f"{step}.ckpt")
        assert trace.rates == full.rates[step:]
        assert torch.equal(whole.layer.weight, part.layer.weight)


@pytest.mark.parametrize("name", EPOCH_SCHEDULES)
def test_every_schedule_goes_on_at_another_batch(name, tmp_path):
    path = tmp_path / "first.ckpt"
    run(Regression(EPOCH_SCHEDULES[name]), loader(12), first := Stop(path, epochs=7), LargeBatchRegime(4))
    assert first.saved_at == 35
    _, reference = run(Regression(EPOCH_SCHEDULES[name]), loader(4))
    for batch in (30, 8):
        trainer, trace = run(Regression(EPOCH_SCHEDULES[name]), loader(batch), LargeBatchRegime(4), ckpt_path=path)
        assert trainer.global_step == 90
        torch.testing.assert_close(trace.tensor, math.sqrt(batch / 4) * reference.tensor[35:], rtol=1e-9, atol=0)


class Stop(Callback):
    def __init__(self, path, epochs):
        self.path, self.epochs = path, epochs

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch + 1 == self.epochs:
            trainer.save_checkpoint(self.path)
            self.saved_at, trainer.should_stop = trainer.global_step, True


def test_going_on_twice_at_other_batches(tmp_path):
    def part(batch, ckpt_path=None, epochs=100):
        stop = Stop(tmp_path / f"{batch}.ckpt", epochs)
        model = Regression(EPOCH_SCHEDULES["CosineAnnealingLR"])
        regime = LargeBatchRegime(4, lr_rule=float)
        return run(model, loader(batch), stop, regime, ckpt_path=ckpt_path, min_epochs=1)

    part(12, epochs=3)  # 15 updates
    _, second = part(30, tmp_path / "12.ckpt", epochs=8)  # 5 more epochs of 2
    trainer, third = part(8, tmp_path / "30.ckpt")
    assert trainer.global_step == 90
    _, reference = run(Regression(EPOCH_SCHEDULES["CosineAnnealingLR"]), loader(4))
    torch.testing.assert_close(second.tensor, 7.5 * reference.tensor[15:25], rtol=1e-9, atol=0)
    torch.testing.assert_close(third.tensor, 2 * reference.tensor[25:], rtol=1e-9, atol=0)


def test_more_epochs_may_be_over_than_the_run_would_have_had(tmp_path):
    run(Regression(EPOCH_SCHEDULES["StepLR"]), loader(60), Stop(tmp_path / "a.ckpt", 40), LargeBatchRegime(4))
    trainer, trace = run(
        Regression(EPOCH_SCHEDULES["StepLR"]), loader(8), LargeBatchRegime(4), ckpt_path=tmp_path / "a.ckpt"
    )
    assert trainer.global_step == 90
    _, reference = run(Regression(EPOCH_SCHEDULES["StepLR"]), loader(4))
    torch.testing.assert_close(trace.tensor, math.sqrt(2) * reference.tensor[40:], rtol=1e-9, atol=0)


def test_going_on_at_another_batch_scales_adams_moments_once(tmp_path):
    def adam():
        return Regression(optimizer=partial(torch.optim.Adam, betas=(0.9, 0.99), eps=1e-6))

    run(adam(), loader(8), Stop(tmp_path / "a.ckpt", 3), LargeBatchRegime(4, lr_rule="adam"))
    trainer, _ = run(adam(), loader(16), LargeBatchRegime(4, lr_rule="adam"), ckpt_path=tmp_path / "a.ckpt")
    for group, lr in zip(trainer.optimizers[0].param_groups, (2e-3, 1e-3), strict=True):
        assert group["lr"] == pytest.approx(lr)
        assert group["betas"] == pytest.approx((0.6, 0.96))
        assert group["eps"] == pytest.approx(5e-7)


def test_where_another_batch_cannot_go_on(tmp_path):
    path = tmp_path / "a.ckpt"
    trainer = trainer_of(LargeBatchRegime(4), max_epochs=2)
    trainer.fit(Regression(), loader(25))
    trainer.save_checkpoint(path)
    sized = LargeBatchRegime(4, stretch_schedulers=False)
    run(FromTrainer(), loader(12), Stop(tmp_path / "sized.ckpt", 2), sized)
    with pytest.raises(MisconfigurationException, match="has the length of a run at the batch 12"):
        run(FromTrainer(), loader(30), sized, ckpt_path=tmp_path / "sized.ckpt")
    by_update, same_samples = FromTrainer(interval="step"), LargeBatchRegime(4, train_longer=False)
    run(by_update, loader(12), Stop(tmp_path / "same.ckpt", 2), same_samples)
    with pytest.raises(MisconfigurationException, match="cannot go on at another batch"):
        run(FromTrainer(interval="step"), loader(30), same_samples, ckpt_path=tmp_path / "same.ckpt")
    run(Regression(), loader(12), Stop(tmp_path / "part.ckpt", 2), LargeBatchRegime(4, train_longer=0.5))
    with pytest.raises(MisconfigurationException, match="batch_size was 12 and is 30"):
        run(Regression(), loader(30), LargeBatchRegime(4, train_longer=0.5), ckpt_path=tmp_path / "part.ckpt")

    class Within(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 7:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    run(Regression(), loader(12), LargeBatchRegime(4), Within())
    with pytest.raises(MisconfigurationException, match="within an epoch"):
        run(Regression(), loader(30), LargeBatchRegime(4), ckpt_path=tmp_path / "within.ckpt")
