"""LargeBatchRegime against real reference-batch runs: updates, learning rates at every update, resume, refusals."""

import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regime_runs import EPOCH_SCHEDULES, EPOCHS, SAMPLES, Regression, SaveAt, Trace, dataset, loader, run, trainer_of
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from lightning_gap import UltraSlowDiffusion
from lightning_gap.regime import LargeBatchRegime, effective_batch_size
from lightning_gap.regime.fates import Rate

pytestmark = pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*", "ignore:.*callbacks used to create.*")


def assert_matches(module, *, batch, rule="sqrt", factor=None, reference=None, **options):
    """Compare a run at one batch with a real run at the reference batch of 4, update by update."""
    reference = reference or run(module(), loader(4))
    trainer, trace = run(module(), loader(batch), LargeBatchRegime(4, lr_rule=rule), **options)
    assert trainer.global_step == reference[0].global_step == EPOCHS * math.ceil(SAMPLES / 4)
    ratio = batch * options.get("accumulate_grad_batches", 1) / 4
    factor = math.sqrt(ratio) if factor is None else factor
    torch.testing.assert_close(trace.tensor, factor * reference[1].tensor, rtol=1e-9, atol=0)


@pytest.mark.parametrize("batch", [2, 12])
def test_smaller_and_other_batches_match(batch):
    module = partial(Regression, EPOCH_SCHEDULES["SequentialLR"])
    assert_matches(module, batch=batch)


@pytest.mark.parametrize(("interval", "frequency"), [("epoch", 2), ("step", 7)])
def test_frequencies_are_the_reference_runs(interval, frequency):
    exponential = EPOCH_SCHEDULES["ExponentialLR"]
    assert_matches(lambda: Regression(exponential, interval=interval, frequency=frequency), batch=30)


@pytest.mark.filterwarnings("ignore:.*OneCycleLR. scheduler is using.*")
def test_one_cycle_over_epochs_matches():
    assert_matches(lambda: Regression(partial(schedulers.OneCycleLR, max_lr=1e-2, total_steps=6)), batch=30)


@pytest.mark.parametrize("name", ["StepLR", "CosineAnnealingLR", "SequentialLR"])
def test_tensor_learning_rates_match(name):
    def module():
        return Regression(EPOCH_SCHEDULES[name], lr=torch.tensor(1e-3, dtype=torch.float64))

    assert_matches(module, batch=30)


@pytest.mark.parametrize(
    ("rule", "factor"), [(float, 7.5), ("none", 1.0), (lambda ratio: ratio**0.25, 7.5**0.25), ("sqrt", 7.5**0.5)]
)
def test_rules(rule, factor):
    assert_matches(lambda: Regression(EPOCH_SCHEDULES["StepLR"]), batch=30, rule=rule, factor=factor)


@pytest.mark.parametrize(("rule", "factor"), [("linear", 7.5), ("adam", math.sqrt(7.5))])
def test_rules_for_equal_samples_keep_the_epochs(rule, factor):
    kind = partial(torch.optim.Adam, betas=(0.95, 0.999)) if rule == "adam" else torch.optim.SGD
    module = partial(Regression, EPOCH_SCHEDULES["StepLR"], optimizer=kind)
    _, reference = run(module(), loader(4))
    trainer, trace = run(module(), loader(30), regime := LargeBatchRegime(4, lr_rule=rule))
    assert (trainer.global_step, regime.plan.train_longer) == (12, 0.0)
    torch.testing.assert_close(trace.tensor[::2], factor * reference.tensor[::15], rtol=1e-9, atol=0)
    with pytest.warns(UserWarning, match=f'lr_rule="{rule}" is derived for the same samples'):
        LargeBatchRegime(4, lr_rule=rule, train_longer=True)


@pytest.mark.parametrize("accumulate", [2, 4, 7])
def test_accumulation_counts_in_the_batch_and_not_in_the_updates(accumulate):
    assert_matches(lambda: Regression(EPOCH_SCHEDULES["StepLR"]), batch=6, accumulate_grad_batches=accumulate)


def test_two_schedulers_of_different_intervals_keep_their_order():
    class Both(Regression):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            epochs = {"scheduler": EPOCH_SCHEDULES["ExponentialLR"](optimizer), "interval": "epoch"}
            steps = {"scheduler": schedulers.MultiplicativeLR(optimizer, lambda step: 0.99), "interval": "step"}
            return [optimizer], [epochs, steps]

    assert_matches(Both, batch=30)


def test_dropped_last_batches_are_the_reference_runs():
    reference, _ = run(Regression(), loader(7, drop_last=True))
    trainer, _ = run(Regression(), loader(25, drop_last=True), LargeBatchRegime(7))
    assert trainer.global_step == reference.global_step == 6 * 8


def test_without_training_longer_only_the_rate_changes():
    plain, before = run(Regression(EPOCH_SCHEDULES["StepLR"]), loader(30))
    trainer, after = run(Regression(EPOCH_SCHEDULES["StepLR"]), loader(30), LargeBatchRegime(4, train_longer=False))
    assert (trainer.global_step, trainer.current_epoch) == (plain.global_step, plain.current_epoch)
    torch.testing.assert_close(after.tensor, math.sqrt(7.5) * before.tensor, rtol=1e-9, atol=0)


def test_without_training_longer_a_plateau_is_scaled():
    plateau = partial(schedulers.ReduceLROnPlateau, patience=0, factor=0.1, threshold=10.0, min_lr=2e-4)
    _, before = run(PlateauData(plateau), None)
    _, after = run(PlateauData(plateau), None, LargeBatchRegime(4, train_longer=False))
    assert before.tensor.min() == 2e-4
    torch.testing.assert_close(after.tensor, 2.0 * before.tensor, rtol=1e-9, atol=0)


class PlateauData(Regression):
    def __init__(self, schedule):
        super().__init__(schedule, monitor="val_loss")

    def train_dataloader(self):
        return loader(16)

    val_dataloader = train_dataloader


def test_the_same_batch_changes_nothing():
    _, plain = run(Regression(EPOCH_SCHEDULES["CosineAnnealingLR"]), loader(30))
    module = Regression(EPOCH_SCHEDULES["CosineAnnealingLR"], optimizer=None)
    trainer, trace = run(module, loader(30), LargeBatchRegime(30))
    assert trace.rates == plain.rates
    assert trainer.lr_scheduler_configs[0].interval == "epoch"


def test_sizes_taken_from_the_trainer_see_the_true_number_of_updates():
    class Sized(Regression):
        def configure_optimizers(self):
            self.steps = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    module = Sized()
    trainer, _ = run(module, loader(25), LargeBatchRegime(7))
    assert module.steps == trainer.global_step == 6 * 9


def test_max_steps_are_updates_already():
    trainer, trace = run(
        Regression(EPOCH_SCHEDULES["StepLR"]), loader(30), LargeBatchRegime(4), max_epochs=-1, max_steps=70
    )
    _, reference = run(Regression(EPOCH_SCHEDULES["StepLR"]), loader(4), max_epochs=-1, max_steps=70)
    assert trainer.global_step == 70
    torch.testing.assert_close(trace.tensor, math.sqrt(7.5) * reference.tensor, rtol=1e-9, atol=0)
    trainer, _ = run(Regression(), loader(30), LargeBatchRegime(4), max_steps=37)
    assert trainer.global_step == 37


def test_a_cut_last_epoch_ends_with_a_validation():
    class Data(LightningDataModule):
        def setup(self, stage):
            self.data = dataset()

        def train_dataloader(self):
            return DataLoader(self.data, batch_size=25)

        val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    # A reference epoch of 9 updates; epochs of 3 and of 2 updates here.
    trainer, trace = run(Regression(), Data(), LargeBatchRegime(7), max_epochs=5, min_epochs=5)
    assert trainer.global_step == 45
    assert trace.validated == [9, 18, 27, 36, 45]
    options = {"max_epochs": 5, "min_epochs": 5, "accumulate_grad_batches": 2}
    trainer, trace = run(Regression(), Data(), LargeBatchRegime(7), **options)
    assert trainer.global_step == 45
    assert trace.validated == [10, 18, 28, 36, 45]
    trainer, trace = run(Regression(), Data(), LargeBatchRegime(5), max_epochs=1, min_epochs=1)
    assert trainer.global_step == 12
    trainer, trace = run(Regression(), Data(), LargeBatchRegime(6), max_epochs=1, min_epochs=1)
    assert trainer.global_step == 10
    assert trace.validated == [10]


# ------------------------------------------------------------------------------------------------ resume, second fit


class Stateful(Regression):
    """Reads its loader from the module, unshuffled, so that a resumed run can be compared bit for bit."""

    def train_dataloader(self):
        return loader(16)

    val_dataloader = train_dataloader


class Batches(Callback):
    """The epoch and the index of each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((trainer.current_epoch, batch_idx))


def assert_resumes(path, at, **options):
    """Compare a run resumed from each of some checkpoints, by their updates, with the run that made them."""
    whole = Stateful(EPOCH_SCHEDULES["SequentialLR"])
    trainer, full = run(whole, None, LargeBatchRegime(7), SaveAt(path), **options)
    assert trainer.global_step == 54
    for step in at:
        part, batches = Stateful(EPOCH_SCHEDULES["SequentialLR"]), Batches()
        resumed, trace = run(part, None, LargeBatchRegime(7), batches, ckpt_path=path / f"{step}.ckpt", **options)
        assert resumed.global_step == 54
        assert trace.rates == full.rates[step:]
        assert trace.validated == [update for update in full.validated if update > step]
        assert batches.seen == [(update // 4, update % 4) for update in range(step, 54)]
        for a, b in zip(whole.parameters(), part.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("limit_val_batches", [0, None])
def test_resuming_from_every_epoch_equals_running_through(limit_val_batches, tmp_path):
    assert_resumes(tmp_path, [*range(4, 54, 4), 54], limit_val_batches=limit_val_batches)


def test_a_run_limited_by_updates_resumes(tmp_path):
    options = {"max_epochs": -1, "max_steps": 42, "limit_val_batches": 0}

    def module():
        return Stateful(EPOCH_SCHEDULES["StepLR"])

    whole, part = module(), module()
    _, full = run(whole, None, LargeBatchRegime(7), SaveAt(tmp_path), **options)
    _, rest = run(part, None, LargeBatchRegime(7), ckpt_path=tmp_path / "16.ckpt", **options)
    assert rest.rates == full.rates[16:]
    assert torch.equal(whole.layer.weight, part.layer.weight)
    done, none = run(module(), None, LargeBatchRegime(7), ckpt_path=tmp_path / "42.ckpt", **options)
    assert (done.global_step, none.rates, done.max_steps) == (42, [], 42)


def test_a_second_fit_is_planned_anew_and_the_limits_are_given_back():
    regime = LargeBatchRegime(4)
    trainer = trainer_of(regime, max_epochs=3, min_epochs=1)
    trainer.fit(Regression(EPOCH_SCHEDULES["StepLR"]), loader(30))
    assert trainer.global_step == 45
    assert (trainer.max_epochs, trainer.min_epochs, trainer.max_steps) == (3, 1, -1)
    first = regime.plan
    fresh = trainer_of(trace := Trace(), regime, max_epochs=3, min_epochs=1)
    fresh.fit(Regression(EPOCH_SCHEDULES["StepLR"]), loader(30))
    assert fresh.global_step == 45
    assert regime.plan == first
    assert trace.rates[0] == pytest.approx([1e-3 * 7.5**0.5, 5e-4 * 7.5**0.5])


@pytest.mark.filterwarnings("ignore:.*keeps its optimizer.*")
def test_an_optimizer_that_is_kept_is_not_scaled_again():
    class Keeps(Regression):
        kept = None

        def configure_optimizers(self):
            self.kept = self.kept or super().configure_optimizers()
            return self.kept

    model = Keeps()
    run(model, loader(30), LargeBatchRegime(4), max_epochs=1)
    with pytest.raises(MisconfigurationException, match="an optimizer of an earlier fit"):
        run(model, loader(30), LargeBatchRegime(4), max_epochs=1)
    assert model.kept.param_groups[0]["lr"] == pytest.approx(1e-3 * 7.5**0.5)
    run(model, loader(30), LargeBatchRegime(30), max_epochs=1)  # nothing to scale


@pytest.mark.filterwarnings("ignore:.*will run with no optimizer.*")
def test_a_module_without_an_optimizer_runs():
    class Without(Regression):
        def configure_optimizers(self):
            return None

    regime, diffusion = LargeBatchRegime(4, lr_rule="none"), UltraSlowDiffusion()
    trainer, _ = run(Without(), loader(30), regime, diffusion, max_epochs=1)
    assert trainer.global_step == 15
    assert diffusion.trace["distance"][-1] == 0.0


def test_the_same_trainer_fits_again():
    regime = LargeBatchRegime(7)
    trainer = trainer_of(trace := Trace(), regime, max_epochs=3)
    model = Regression(EPOCH_SCHEDULES["StepLR"])
    trainer.fit(model, loader(25))
    trainer.fit_loop.max_epochs = 8
    trainer.fit(model, loader(25))
    assert trainer.global_step == 8 * 9
    _, reference = run(Regression(EPOCH_SCHEDULES["StepLR"]), loader(7), max_epochs=5)
    expected = math.sqrt(25 / 7) * reference.tensor
    torch.testing.assert_close(trace.tensor[27:], expected, rtol=1e-9, atol=0)


def test_an_exception_gives_the_limits_back():
    class Fails(Callback):
        def on_train_batch_end(self, trainer, *args):
            raise RuntimeError("stop")

    trainer = trainer_of(LargeBatchRegime(7), Fails(), max_epochs=3)
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(Regression(), loader(25))
    assert (trainer.max_epochs, trainer.max_steps) == (3, -1)


def test_an_earlier_callback_that_saves_at_a_reference_epoch_loses_no_step(tmp_path):
    class Saves(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 36:
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    def module():
        return Stateful(EPOCH_SCHEDULES["StepLR"])

    _, full = run(module(), None, Saves(), LargeBatchRegime(7))
    _, rest = run(module(), None, LargeBatchRegime(7), ckpt_path=tmp_path / "early.ckpt")
    assert rest.rates == full.rates[36:]


@pytest.mark.parametrize("epochs", [1, 3, 4])
def test_more_epochs_may_be_asked_for_on_resume(epochs, tmp_path):
    def module():
        return Stateful(EPOCH_SCHEDULES["ExponentialLR"])

    trainer, _ = run(module(), None, LargeBatchRegime(7), max_epochs=epochs)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    _, full = run(module(), None, LargeBatchRegime(7), max_epochs=8)
    longer, rest = run(module(), None, LargeBatchRegime(7), max_epochs=8, ckpt_path=tmp_path / "last.ckpt")
    assert longer.global_step == 72
    assert rest.rates == full.rates[9 * epochs :]
    assert rest.validated[-1] == 72


def test_a_checkpoint_of_another_regime_is_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    trainer, _ = run(Regression(), loader(30), LargeBatchRegime(4), max_epochs=2)
    trainer.save_checkpoint(path)
    others = (
        (loader(30, samples=120), LargeBatchRegime(4)),
        (loader(30), LargeBatchRegime(4, lr_rule="linear")),
        (loader(30), LargeBatchRegime(4, train_longer=False)),
    )
    for data, regime in others:
        with pytest.raises(MisconfigurationException, match="another regime"):
            run(Regression(), data, regime, ckpt_path=path)
    trainer_of(LargeBatchRegime(4)).validate(Regression(), loader(60), ckpt_path=path, verbose=False)
    trainer.validate(Regression(), loader(60), ckpt_path=path, verbose=False)


def test_joining_a_run_of_another_callback_is_refused(tmp_path):
    trainer, _ = run(Regression(), loader(30), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(MisconfigurationException, match="without LargeBatchRegime"):
        run(Regression(), loader(30), LargeBatchRegime(4), ckpt_path=tmp_path / "plain.ckpt")
    run(Regression(), loader(30), LargeBatchRegime(30), ckpt_path=tmp_path / "plain.ckpt")  # changes nothing


def test_validate_test_and_predict_are_untouched():
    regime = LargeBatchRegime(4)
    trainer, model = trainer_of(regime), Regression()
    trainer.validate(model, loader(30), verbose=False)
    trainer.test(model, loader(30), verbose=False)
    trainer.predict(model, loader(30))
    assert regime.plan is None
    assert regime.state_dict() == {}
    assert trainer.max_epochs == 6


# ---------------------------------------------------------------------------------------------------- what it says


def test_every_logger_takes_the_plan(tmp_path):
    run(Regression(), loader(30), LargeBatchRegime(4), logger=TensorBoardLogger(tmp_path), max_epochs=1)
    assert "lightning_gap/regime/updates: 15" in next(tmp_path.rglob("hparams.yaml")).read_text()


def test_it_says_what_it_did(tmp_path, capsys):
    module = Regression(EPOCH_SCHEDULES["StepLR"])
    logger = CSVLogger(tmp_path)
    run(
        module, loader(30), LargeBatchRegime(4), LearningRateMonitor(), logger=logger, log_every_n_steps=1, max_epochs=2
    )
    table = capsys.readouterr().out
    assert table.count("Large-batch regime") == 1
    for said in ("7.5", "30", "StepLR", "0.00273861", "15 updates"):
        assert said in table
    hparams = {key.removeprefix("lightning_gap/regime/"): value for key, value in logger.experiment.hparams.items()}
    assert (hparams["updates"], hparams["epochs"], hparams["ratio"], hparams["batch_size"]) == (30, 15, 7.5, 30)
    assert any("lr-SGD" in row for row in logger.experiment.metrics) or (tmp_path / "lightning_logs").exists()


def test_a_column_of_the_monitor_follows_the_reference_epochs(tmp_path):
    import csv

    logger = CSVLogger(tmp_path)
    module = Regression(EPOCH_SCHEDULES["StepLR"])
    run(module, loader(30), LargeBatchRegime(4), LearningRateMonitor(), logger=logger, log_every_n_steps=1)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rates = [float(row["lr-SGD/pg1"]) for row in csv.DictReader(file) if row.get("lr-SGD/pg1")]
    assert len(rates) == 90
    assert len(set(rates)) == 3


@pytest.mark.parametrize("accumulate", [1, 3])
def test_effective_batch_size(accumulate):
    seen = []

    class Look(Callback):
        def setup(self, trainer, pl_module, stage):
            seen.append(effective_batch_size(trainer))

        def on_train_start(self, trainer, pl_module):
            seen.append(effective_batch_size(trainer))

    for data in (
        loader(10),
        [loader(10)],
        CombinedLoader(loader(10)),
        DataLoader(dataset(), batch_sampler=BatchSampler(RandomSampler(dataset()), 10, False)),
    ):
        trainer_of(Look(), max_epochs=1, accumulate_grad_batches=accumulate).fit(_Listed(), data)
    assert seen == [10 * accumulate] * 8
    with pytest.raises(MisconfigurationException, match="no training data"):
        effective_batch_size(trainer_of())


class _Listed(Regression):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch[0] if isinstance(batch[0], (list, tuple)) else batch, batch_idx)


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("value", [1.5, "128", True, None])
def test_a_reference_batch_that_is_not_an_int(value):
    with pytest.raises(TypeError, match="reference_batch_size"):
        LargeBatchRegime(value)


def test_bad_arguments():
    with pytest.raises(ValueError, match="reference_batch_size must be at least 1, got 0: the samples of one update"):
        LargeBatchRegime(0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got -1"):
        LargeBatchRegime(4, batch_size=-1)
    with pytest.raises(ValueError, match="lr_rule='cubic'"):
        LargeBatchRegime(4, lr_rule="cubic")


class Stream(IterableDataset):
    def __iter__(self):
        return iter(dataset())


class Ragged(BatchSampler):
    def __len__(self):
        return 7

    def __iter__(self):
        yield from [[0]] * 7


def weighted_batches():
    class Own:
        def __iter__(self):
            return iter([[0, 1], [2]])

        def __len__(self):
            return 2

    return DataLoader(dataset(), batch_sampler=Own())


class Tunable(Regression):
    def __init__(self):
        super().__init__(lr=1e-3)
        self.batch_size = 2
        self.learning_rate = 1e-3

    def train_dataloader(self):
        return loader(self.batch_size)

    def val_dataloader(self):
        return loader(30)


class Late(Regression):
    def setup(self, stage):
        self.data = dataset()

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=30)


class Manual(Regression):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class OwnStep(Regression):
    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step()


class TwoChildren(Regression):
    def __init__(self):
        super().__init__()
        self.other = torch.nn.Linear(2, 2)


REFUSALS = {
    "manual": (Manual, {}, "manual optimization"),
    "adagrad": (
        partial(Regression, optimizer=torch.optim.Adagrad),
        {},
        "rule for SGD, .* and the optimizer is Adagrad",
    ),
    "linear for adam": (
        partial(Regression, optimizer=torch.optim.AdamW),
        {"regime": LargeBatchRegime(4, lr_rule="linear")},
        "rule for SGD, .* and the optimizer is AdamW",
    ),
    "adam for sgd": (
        Regression,
        {"regime": LargeBatchRegime(4, lr_rule="adam")},
        "rule for Adam, AdamW, RMSprop, and the optimizer is SGD",
    ),
    "adam's moments": (
        partial(Regression, optimizer=torch.optim.AdamW),
        {"regime": LargeBatchRegime(4, lr_rule="adam")},
        r"betas=0.9 into 0.25; it holds .* Use a smaller batch",
    ),
    "one cycle's moments": (
        partial(
            Regression,
            partial(schedulers.OneCycleLR, max_lr=1e-2, total_steps=6, base_momentum=0.8),
            optimizer=partial(torch.optim.AdamW, betas=(0.95, 0.999)),
        ),
        {"regime": LargeBatchRegime(10, lr_rule="adam")},
        "base_momentum=0.8 into 0.4",
    ),
    "stream of epochs": (
        partial(Regression, EPOCH_SCHEDULES["StepLR"]),
        {"data": DataLoader(Stream(), batch_size=30), "max_epochs": -1, "max_steps": 10},
        "the loader does not tell how many updates",
    ),
    "limit": (Regression, {"limit_train_batches": 1}, "limit_train_batches=1"),
    "fraction": (Regression, {"limit_train_batches": 0.5}, "limit_train_batches=0.5"),
    "overfit": (Regression, {"overfit_batches": 2}, "overfit_batches=2"),
    "reload": (Regression, {"reload_dataloaders_every_n_epochs": 1}, "reload_dataloaders_every_n_epochs=1"),
    "accumulation schedule": (Regression, {"extra": GradientAccumulationScheduler({0: 2})}, "accumulate_grad_batches"),
    "batch finder": (Tunable, {"data": None, "extra": BatchSizeFinder()}, "Tuner.scale_batch_size"),
    "averaging": (Regression, {"extra": StochasticWeightAveraging(1e-3)}, "StochasticWeightAveraging"),
    "stream": (Regression, {"data": DataLoader(Stream(), batch_size=30)}, "map-style"),
    "ragged": (
        Regression,
        {"data": DataLoader(dataset(), batch_sampler=Ragged(SequentialSampler(dataset()), 30, False))},
        "vary in size",
    ),
    "own batch sampler": (Regression, {"data": weighted_batches()}, "does not tell|is unknown"),
    "unbatched": (Regression, {"data": DataLoader(dataset(), batch_size=None)}, "does not tell|is unknown"),
    "several": (Regression, {"data": [loader(30), loader(10)]}, "2 training loaders"),
    "all dropped": (Regression, {"data": loader(30, samples=3, drop_last=True)}, "at least 1"),
    "noise of a smaller batch": (
        Regression,
        {"regime": LargeBatchRegime(64, lr_rule="none", gradient_noise=True)},
        "noisier already",
    ),
    "noise of two children": (
        TwoChildren,
        {"regime": LargeBatchRegime(4, lr_rule="none", gradient_noise=True)},
        r"\['layer', 'other'\].* Name the last module",
    ),
    "noise of no child": (
        Regression,
        {"regime": LargeBatchRegime(4, lr_rule="none", gradient_noise="head")},
        "'head' is not a submodule of Regression",
    ),
    "bad callable": (Regression, {"regime": LargeBatchRegime(4, lr_rule=lambda ratio: -ratio)}, "finite positive"),
}


@pytest.mark.filterwarnings("ignore:.*overfit_batches.*", "ignore:.*OneCycleLR. scheduler is using.*")
@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_come_before_any_change(case):
    module, options, message = REFUSALS[case]
    options = dict(options)
    regime, data, extra = (
        options.pop("regime", LargeBatchRegime(4)),
        options.pop("data", loader(30)),
        options.pop("extra", None),
    )
    model = module()
    trainer = trainer_of(regime, *([extra] if extra else []), **options)
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        trainer.fit(model, data)
    assert trainer.max_epochs == options.get("max_epochs", 6)
    assert trainer.max_steps == options.get("max_steps", -1)
    assert trainer.global_step == 0
    for optimizer in trainer.optimizers:
        assert optimizer.param_groups[0].get("initial_lr", optimizer.param_groups[0]["lr"]) in (1e-3, 4e-4)
    for config in trainer.lr_scheduler_configs:
        assert config.frequency == 1


def test_an_unknown_strategy_is_refused(monkeypatch):
    monkeypatch.setattr("lightning_gap.regime.refusals.leaves_updates_to_torch", lambda trainer: False)
    with pytest.raises(MisconfigurationException, match=r"SingleDeviceStrategy is not supported. Use one device, DDP"):
        run(Regression(), loader(30), LargeBatchRegime(4))


def test_what_a_refusal_names_as_remedy_works():
    run(Regression(optimizer=torch.optim.Adagrad), loader(30), LargeBatchRegime(4, lr_rule="none"))
    run(Regression(optimizer=torch.optim.Adagrad), loader(30), LargeBatchRegime(4, lr_rule=math.sqrt))
    streamed = LargeBatchRegime(4, batch_size=30, train_longer=False)
    run(Regression(), DataLoader(Stream(), batch_size=30), streamed, max_epochs=1)
    several = LargeBatchRegime(4, batch_size=40, train_longer=False)
    run(_Listed(), [loader(30), loader(10)], several, limit_train_batches=2)
    assert several.plan.ratio == 10
    for module, data in ((_Listed(), [loader(30), loader(10)]),):
        limited = LargeBatchRegime(4, batch_size=30)
        with pytest.raises(MisconfigurationException, match="or pass batch_size=, and with it samples=, max_steps"):
            run(module, data, LargeBatchRegime(4), max_epochs=-1, max_steps=3)
        trainer, _ = run(module, data, limited, max_epochs=-1, max_steps=3)
        assert (trainer.global_step, limited.plan.ratio) == (3, 7.5)


def test_a_stream_is_limited_by_updates():
    step = partial(schedulers.StepLR, step_size=5, gamma=0.5)
    regime = LargeBatchRegime(15)
    trainer, trace = run(
        Regression(step, interval="step"), DataLoader(Stream(), batch_size=30), regime, max_epochs=-1, max_steps=13
    )
    assert (trainer.global_step, trainer.max_steps, regime.plan.updates) == (13, 13, 13)
    assert trace.rates[-1][0] == pytest.approx(1e-3 * math.sqrt(2) / 4)


def test_a_run_without_an_end_stops_when_it_is_told():
    class Enough(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.global_step >= 30

    regime = LargeBatchRegime(4)
    trainer, trace = run(Regression(EPOCH_SCHEDULES["StepLR"]), loader(30), regime, Enough(), max_epochs=-1)
    _, reference = run(Regression(EPOCH_SCHEDULES["StepLR"]), loader(4), max_epochs=2)
    assert (trainer.global_step, regime.plan.updates, trainer.max_epochs) == (30, None, -1)
    torch.testing.assert_close(trace.tensor, math.sqrt(7.5) * reference.tensor, rtol=1e-9, atol=0)


def test_a_run_limited_in_time_keeps_its_regime():
    regime = LargeBatchRegime(4)
    trainer, _ = run(Regression(EPOCH_SCHEDULES["StepLR"]), loader(30), regime, max_time={"hours": 1})
    assert trainer.global_step == 90
    run(Regression(), loader(30), regime, max_epochs=None, max_time={"seconds": 1})
    assert regime.plan.updates is None


def test_a_batch_size_that_is_given_wins():
    with pytest.warns(UserWarning, match="scales for batch_size=64, as asked; an update of this trainer sees 30"):
        trainer, trace = run(Regression(), loader(30), LargeBatchRegime(4, batch_size=64))
    assert trainer.global_step == 90
    assert trace.rates[0][0] == pytest.approx(4e-3)


def test_warnings_say_what_is_done_instead():
    with pytest.warns(UserWarning, match="T_max=7 reaches past"):
        run(Regression(partial(schedulers.CosineAnnealingLR, T_max=7)), loader(30), LargeBatchRegime(4))
    with pytest.warns(UserWarning, match=r"MultiStepLR.milestones=9 reaches past"):
        run(Regression(partial(schedulers.MultiStepLR, milestones=[1, 9])), loader(30), LargeBatchRegime(4))
    with pytest.warns(UserWarning, match="leaves its betas and eps as they are"):
        run(Regression(optimizer=torch.optim.AdamW), loader(30), LargeBatchRegime(4))
    with pytest.warns(UserWarning, match="fast_dev_run"):
        trainer, _ = run(Regression(), loader(30), LargeBatchRegime(4), fast_dev_run=True)
    assert trainer.global_step == 1


class Falls(schedulers.LRScheduler):
    """A scheduler of one's own, down to a rate that it keeps by a name."""

    def __init__(self, optimizer, name):
        vars(self)[name], self.name = 4e-4, name
        super().__init__(optimizer)

    def get_lr(self):
        return [max(vars(self)[self.name], base / (1 + self.last_epoch)) for base in self.base_lrs]


def test_a_scheduler_of_ones_own_is_scaled_or_refused():
    _, reference = run(Regression(partial(Falls, name="lr_floor")), loader(4))
    _, trace = run(Regression(partial(Falls, name="lr_floor")), loader(30), LargeBatchRegime(4))
    torch.testing.assert_close(trace.tensor, math.sqrt(7.5) * reference.tensor, rtol=1e-9, atol=0)
    with pytest.raises(MisconfigurationException, match=r'Falls keeps a learning rate by a name .* lr_rule="none"'):
        run(Regression(partial(Falls, name="floor")), loader(30), LargeBatchRegime(4))
    run(Regression(partial(Falls, name="floor")), loader(30), LargeBatchRegime(4, lr_rule="none"))


def test_a_loader_that_changes_after_setup_is_refused():
    class Changes(Regression):
        calls = 0

        def train_dataloader(self):
            self.calls += 1
            return loader(30 if self.calls == 1 else 20)

    with pytest.raises(MisconfigurationException, match="planned for 2 training batches"):
        run(Changes(), None, LargeBatchRegime(4))


# ---------------------------------------------------------------------------------------------------------- tuner


@pytest.mark.filterwarnings("ignore:.*The `batch_size`.*", "ignore:.*batch size.*")
def test_the_tuner_may_scale_the_batch_first(tmp_path):
    model, regime = Tunable(), LargeBatchRegime(4)
    trainer = trainer_of(trace := Trace(), regime, default_root_dir=tmp_path)
    Tuner(trainer).scale_batch_size(model, max_trials=3, steps_per_trial=1)
    assert model.batch_size in (8, 16)
    assert (trainer.max_epochs, trainer.max_steps) == (6, -1)
    trainer.fit(model)
    assert trainer.global_step == 90
    assert trace.rates[0][0] == pytest.approx(1e-3 * math.sqrt(model.batch_size / 4))


def test_the_tuner_may_find_a_rate_that_is_not_scaled(tmp_path):
    model, regime = Tunable(), LargeBatchRegime(4, lr_rule="none")
    model.batch_size = 30
    trainer = trainer_of(trace := Trace(), regime, default_root_dir=tmp_path)
    Tuner(trainer).lr_find(model, num_training=5, attr_name="learning_rate", update_attr=False)
    assert (trainer.max_epochs, trainer.max_steps, trainer.global_step) == (6, -1, 0)
    trainer.fit(model)
    assert trainer.global_step == 90
    assert trace.rates[-1][0] == 1e-3


@pytest.mark.parametrize("update", [True, False])
def test_a_rate_that_the_tuner_found_is_not_scaled(update, tmp_path):
    class Read(Tunable):
        def configure_optimizers(self):
            self.lr = self.learning_rate
            return super().configure_optimizers()

    model, regime = Read(), LargeBatchRegime(4)
    trainer = trainer_of(trace := Trace(), regime, default_root_dir=tmp_path, max_epochs=1)
    Tuner(trainer).lr_find(model, num_training=20, attr_name="learning_rate", update_attr=update)
    model.batch_size = 30
    model.learning_rate = 0.02 if update else 1e-3  # what was found may be any value
    if update:
        with pytest.warns(UserWarning, match="it is not scaled"):
            trainer.fit(model)
        assert regime.plan.rate is Rate.FOUND
    else:
        trainer.fit(model)
    assert trainer.global_step == 15
    assert trace.rates[-1][0] == pytest.approx(0.02 if update else 1e-3 * math.sqrt(7.5))


def test_a_rate_finder_beside_the_regime_finds_the_rate_that_runs(tmp_path):
    model = Tunable()
    model.batch_size = 30

    def finder():
        return LearningRateFinder(num_training_steps=20, attr_name="learning_rate")

    options = {"default_root_dir": tmp_path, "max_epochs": 2}
    with pytest.warns(UserWarning, match="it is not scaled"):
        trainer, trace = run(model, None, LargeBatchRegime(4), finder(), save := SaveAt(tmp_path), **options)
    assert trainer.global_step == 30
    assert trace.rates[0][0] == model.learning_rate != 1e-3
    resumed = Tunable()
    resumed.batch_size = 30
    _, rest = run(resumed, None, LargeBatchRegime(4), ckpt_path=tmp_path / f"{save.saved[3]}.ckpt", **options)
    assert rest.rates == trace.rates[save.saved[3] :]


def test_the_rate_is_scaled_where_a_finder_has_found_none(tmp_path):
    model = Tunable()
    model.batch_size = 30
    finder = LearningRateFinder(num_training_steps=5, attr_name="learning_rate")  # too few to say anything
    _, trace = run(model, None, regime := LargeBatchRegime(4), finder, default_root_dir=tmp_path, max_epochs=2)
    assert model.learning_rate == 1e-3
    assert regime.plan.rate is Rate.RULED
    assert trace.rates[0][0] == pytest.approx(1e-3 * 7.5**0.5)


# ------------------------------------------------------------------------------------------------------------ data


def test_looking_at_the_loader_leaves_the_random_numbers_alone():
    class Splits(Regression):
        def train_dataloader(self):
            torch.rand(3)
            return loader(30)

    def draw(*callbacks):
        class Draws(Callback):
            def on_fit_start(self, trainer, pl_module):
                self.value = torch.rand(1)

        run(Splits(), None, *callbacks, draws := Draws())
        return draws.value

    assert torch.equal(draw(), draw(LargeBatchRegime(4)))
