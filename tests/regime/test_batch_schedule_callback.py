"""Training at a batch that changes: trajectories, samples, resuming, and what is refused."""

import math
from functools import cache, partial

import pytest
import torch
from checkered import checkered
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regime_runs import EPOCHS, SAMPLES, SCHEDULES, Regression, SaveAt, dataset, loader, run
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_gap import BatchSizeSchedule, LargeBatchRegime
from lightning_gap.regime import PlateauBatches
from lightning_gap.regime.batches.base import AdaptiveBatches

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*have no .val_dataloader.*", "ignore:.*OneCycleLR. scheduler is using.*"
)
BASE = 4
PER_EPOCH = SAMPLES // BASE
STEPS = [(0, BASE), (100, 12), (200, 20)]


def scheduled(name, interval):
    unit = 1 if interval == "epoch" else PER_EPOCH
    return Regression(partial(SCHEDULES[name], unit=unit), interval=interval)


@cache
def reference_rates(name, interval):
    return run(scheduled(name, interval), loader(BASE))[1].rates


class Batches(SaveAt):
    """The samples before each batch and its size, as they were trained on."""

    def __init__(self):
        self.sizes, self.seen = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(sum(self.sizes))
        self.sizes.append(len(batch[0]))


@checkered(
    name=list(SCHEDULES), interval=["epoch", "step"], schedule=[STEPS, "seesaw", lambda samples: 4 + samples / 20]
)
def test_rate_is_the_reference_runs_at_the_same_samples_times_the_rule(name, interval, schedule):
    if schedule == "seesaw" and name in ("CyclicLR", "OneCycleLR", "LinearLR", "ConstantLR"):
        pytest.skip("its first rate is its lowest: there is a test of warm-ups below")
    reference = reference_rates(name, interval)
    batches = Batches()
    _, trace = run(
        scheduled(name, interval), loader(BASE), BatchSizeSchedule(schedule, lr_rule="sqrt", multiple_of=1), batches
    )
    assert sum(batches.sizes) == SAMPLES * EPOCHS
    highest = 0.0
    for samples, size, rates in zip(batches.seen, batches.sizes, trace.rates, strict=True):
        update = samples // BASE
        there = reference[update]
        highest = max(rates[0] for rates in reference[: update + 1])
        planned = {
            "seesaw": lambda there=there, highest=highest: BASE * highest / there[0] if there[0] > 0 else math.inf
        }.get(schedule if isinstance(schedule, str) else "", lambda: None)()
        if schedule is STEPS:
            planned = next(batch for start, batch in reversed(STEPS) if samples >= start)
        elif planned is None:
            planned = schedule(samples)
        planned, left = min(SAMPLES, math.floor(min(planned, SAMPLES) + 0.5)), SAMPLES - samples % SAMPLES
        # A last update has what is left, at its own rate; less than the reference run's batch joins the one before.
        assert size == (left if left - planned < BASE < planned else min(planned, left))
        wanted = [rate * math.sqrt(min(planned, max(size, BASE)) / BASE) for rate in there]
        assert rates == pytest.approx(wanted, rel=1e-12)


def test_seesaw_saves_updates_as_its_closed_form_says():
    samples, epochs, base = 4000, 20, 8
    per_epoch = samples // base
    data = TensorDataset(torch.zeros(samples, 1))
    for shape, saved in (
        (lambda x: math.cos(math.pi / 2 * x), 1 - 2 / math.pi),
        (lambda x: (1 + math.cos(math.pi * x)) / 2, 0.5),
    ):
        callback = BatchSizeSchedule("seesaw", multiple_of=1)
        module = Regression(
            lambda optimizer, shape=shape: schedulers.LambdaLR(optimizer, lambda t: shape(t / (epochs * per_epoch))),
            interval="step",
        )
        from lightning_gap.regime.batch_schedule_table import forecast

        found = []

        class Forecast(BatchSizeSchedule):
            def on_train_start(self, trainer, pl_module):
                found.append(len(forecast(self._run)))  # noqa: B023
                trainer.should_stop = True
                trainer.fit_loop.max_epochs = 0

        callback = Forecast("seesaw", multiple_of=1)
        run(module, DataLoader(data, batch_size=base), callback, max_epochs=epochs)
        assert 1 - found[0] / (epochs * per_epoch) == pytest.approx(saved, abs=0.01)


class Validated(Regression):
    """Validates on what it is trained on."""

    def val_dataloader(self):
        return loader(10)


# Within epochs, from every fifth update of an epoch's fifteen and fewer; from all of them takes longer.
@pytest.mark.parametrize(
    ("hook", "every"),
    [
        ("on_train_batch_end", 5),
        pytest.param("on_train_batch_end", 1, marks=pytest.mark.slow),
        ("on_train_epoch_end", 1),
        ("on_validation_end", 1),
    ],
)
@pytest.mark.parametrize("schedule", [STEPS, "seesaw"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, hook, every, schedule):
    def fit(*callbacks, ckpt_path=None):
        kind = Validated if hook == "on_validation_end" else Regression
        module = kind(partial(SCHEDULES["CosineAnnealingLR"], unit=PER_EPOCH), interval="step")
        callback = BatchSizeSchedule(schedule, max_device_batch_size=7, max_batch_size=24)
        options = {"val_check_interval": 0.5} if hook == "on_validation_end" else {}
        trainer, _ = run(
            module, loader(BASE, shuffle=True), callback, Batches(), *callbacks, ckpt_path=ckpt_path, **options
        )
        return module, trainer

    save = SaveAt(tmp_path, hook)
    if hook == "on_train_batch_end":
        setattr(save, hook, lambda trainer, module, *_: save.save(trainer, module))
    whole, trainer = fit(save)
    for update in sorted(set(save.saved))[::every]:
        module, again = fit(ckpt_path=tmp_path / f"{update}.ckpt")
        assert again.global_step == trainer.global_step
        assert torch.equal(module.layer.weight, whole.layer.weight), update


def test_a_run_that_was_resumed_at_an_epochs_end_is_resumed_again(tmp_path):
    def fit(*callbacks, ckpt_path=None):
        module = scheduled("CosineAnnealingLR", "step")
        callback = BatchSizeSchedule(STEPS, max_device_batch_size=7)
        trainer, _ = run(module, loader(BASE, shuffle=True), callback, *callbacks, ckpt_path=ckpt_path)
        return module, trainer

    def saves(folder):
        folder.mkdir()
        save = SaveAt(folder)
        save.on_train_batch_end = lambda trainer, module, *_: (
            None if trainer.global_step in save.saved else save.save(trainer, module)
        )
        return save

    whole, trainer = fit(saves(tmp_path / "first"))
    for end, within in ((15, (16, 22, 26)), (32, (33, 36, 37))):
        fit(saves(tmp_path / str(end)), ckpt_path=tmp_path / "first" / f"{end}.ckpt")
        for update in within:
            module, again = fit(ckpt_path=tmp_path / str(end) / f"{update}.ckpt")
            assert again.global_step == trainer.global_step, (end, update)
            assert torch.equal(module.layer.weight, whole.layer.weight), (end, update)


def test_parts_of_an_update_make_the_same_update_as_the_whole(tmp_path):
    ends = []
    for most in (None, 7, 3):
        module = scheduled("CosineAnnealingLR", "step").double()
        data = TensorDataset(*(tensor.double() for tensor in dataset().tensors))
        callback = BatchSizeSchedule(STEPS, max_device_batch_size=most)
        trainer, trace = run(module, DataLoader(data, batch_size=BASE), callback)
        ends.append((trainer.global_step, module.layer.weight.detach().clone(), trace.rates))
    for steps, weight, rates in ends[1:]:
        assert steps == ends[0][0]
        assert rates == ends[0][2]
        torch.testing.assert_close(weight, ends[0][1], rtol=1e-12, atol=1e-12)


def test_a_batch_that_stays_is_the_run_without_the_callback():
    plain, trace = run(scheduled("OneCycleLR", "step"), loader(BASE))
    module = scheduled("OneCycleLR", "step")
    ours, ours_trace = run(module, loader(BASE), BatchSizeSchedule([(0, BASE)]))
    assert ours.global_step == plain.global_step
    assert ours_trace.rates == trace.rates
    assert torch.equal(module.layer.weight, plain.lightning_module.layer.weight)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_draw_the_same_batches(workers):
    batches = Batches()
    data = loader(BASE, shuffle=True, num_workers=workers)
    module = scheduled("StepLR", "epoch")
    run(module, data, BatchSizeSchedule(STEPS), batches, max_epochs=4)
    assert batches.sizes == [4] * 15 + [4] * 10 + [12, 8] + [12] * 5 + [12, 12, 12, 12, 12] or sum(batches.sizes) == 240
    assert batches.sizes[:25] == [4] * 25


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(*dataset().tensors, strict=True))


def test_a_stream_is_accumulated_in_multiples_of_its_batch():
    module = Regression(lambda o: schedulers.ExponentialLR(o, 0.9), interval="step")
    callback = BatchSizeSchedule(STEPS, lr_rule="sqrt")
    trainer, trace = run(module, DataLoader(Stream(), batch_size=BASE), callback, max_epochs=5)
    # 25 updates of 4 until 100 samples, 9 of 12 (the last of a pass is cut to 8 or 4), then of 20
    assert trace.rates[0][0] == 1e-3
    assert trace.rates[25][0] == pytest.approx(1e-3 * 0.9**25 * math.sqrt(3), rel=1e-12)
    assert trainer.global_step < 5 * PER_EPOCH


def test_plateau_grows_the_batch_where_the_metric_stays():
    class Flat(Regression):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", torch.tensor(1.0))

    batches = Batches()
    callback = BatchSizeSchedule(PlateauBatches(patience=1), max_batch_size=16)
    module = Flat()
    from regime_runs import trainer_of

    trainer = trainer_of(callback, batches, max_epochs=7, num_sanity_val_steps=0)
    trainer.fit(module, loader(BASE), loader(BASE))
    assert sorted(set(batches.sizes)) == [4, 8, 12, 16]  # 12 is what is left of 60 after three of 16
    assert trainer.fit_loop.max_batches == math.inf


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"schedule": []}, ValueError, "must be pairs"),
        ({"schedule": [(1, 4)]}, ValueError, "must begin at 0"),
        ({"schedule": [(0, 4), (0, 8)]}, ValueError, "growing"),
        ({"schedule": [(0, 4.0)]}, TypeError, "batch must be an int"),
        ({"schedule": "growing"}, ValueError, "seesaw, plateau, noise"),
        ({"schedule": 3}, TypeError, "pairs"),
        ({"schedule": "noise"}, ValueError, "max_batch_size"),
        ({"schedule": STEPS, "lr_rule": "cube"}, ValueError, "lr_rule='cube'"),
        ({"schedule": STEPS, "lr_rule": "adam"}, ValueError, "end at a ratio"),
        ({"schedule": STEPS, "by": "hand"}, ValueError, "loader, accumulation"),
        ({"schedule": STEPS, "max_device_batch_size": 0}, ValueError, "at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        BatchSizeSchedule(**arguments)


@pytest.mark.parametrize(
    ("callbacks", "options", "words"),
    [
        ([LargeBatchRegime(4)], {}, "Leave one of them out"),
        ([GradientAccumulationScheduler({0: 2})], {}, "Leave it out"),
        ([], {"limit_train_batches": 3}, "Use a Subset"),
        ([], {"val_check_interval": 3}, "as a share"),
        ([], {"reload_dataloaders_every_n_epochs": 1}, "Leave it 0"),
    ],
)
def test_trainers_that_make_other_batches_are_refused(callbacks, options, words):
    with pytest.raises(MisconfigurationException, match=words):
        run(Regression(), loader(BASE), BatchSizeSchedule(STEPS), *callbacks, **options)


@pytest.mark.parametrize(
    ("optimizer", "factor", "others"),
    [
        (torch.optim.SGD, 5.0, {"weight_decay": 0.01}),
        (torch.optim.AdamW, 5**0.5, {"weight_decay": 0.01 * 5**0.5, "betas": (0.9, 0.999**5)}),
        (torch.optim.Adam, 5**0.5, {"weight_decay": 0.01, "betas": (0.9, 0.999**5)}),
    ],
)
def test_the_rule_is_the_optimizers_for_equal_samples(optimizer, factor, others):
    class Look(Batches):
        groups = ()

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.groups = [dict(group) for group in optimizer.param_groups]

    look = Look()
    module = Regression(optimizer=partial(optimizer, weight_decay=0.01))
    rules = {"weight_decay_rule": "timescale", "betas_rule": "half_life"}
    trainer, _ = run(module, loader(BASE), BatchSizeSchedule([(0, BASE), (60, 20)], **rules), look, max_epochs=2)
    assert look.groups[0]["lr"] == pytest.approx(1e-3 * factor)
    for key, value in others.items():
        assert look.groups[0][key] == pytest.approx(value)
    group = trainer.optimizers[0].param_groups[0]  # given back
    assert group["lr"] == 1e-3
    assert group["weight_decay"] == 0.01
    assert group.get("betas", (0.9, 0.999)) == (0.9, 0.999)


def test_an_optimizer_without_a_rule_is_refused():
    class Own(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

        def step(self, closure=None):
            return None if closure is None else closure()

    with pytest.raises(MisconfigurationException, match='"auto" knows no rule for Own'):
        run(Regression(optimizer=Own), loader(BASE), BatchSizeSchedule(STEPS))


def test_seesaw_without_a_scheduler_is_refused():
    with pytest.raises(MisconfigurationException, match="follows one scheduler"):
        run(Regression(), loader(BASE), BatchSizeSchedule("seesaw"))


def test_everything_is_given_back():
    module = scheduled("StepLR", "epoch")
    data = loader(BASE)
    callback = BatchSizeSchedule(STEPS, max_device_batch_size=5)
    trainer, _ = run(module, data, callback)
    assert trainer.accumulate_grad_batches == 1
    assert trainer.fit_loop._data_source.instance is data
    assert "_accumulated_batches_reached" not in vars(trainer.fit_loop.epoch_loop)
    assert type(trainer).__name__ == "Trainer"
    group = trainer.optimizers[0].param_groups[0]
    assert group["lr"] == pytest.approx(1e-3 * 0.3**3, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 14, 15, 16, 40, 90])
def test_max_steps_are_the_reference_runs(steps):
    batches = Batches()
    callback = BatchSizeSchedule(STEPS)
    run(Regression(), loader(BASE), callback, batches, max_epochs=-1, max_steps=steps)
    assert sum(batches.sizes) == steps * BASE


class Losses(Regression):
    """Validates to a loss that gets better for three epochs, and then stays."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.tensor(1.0 / min(self.current_epoch + 1, 3)))

    def val_dataloader(self):
        return loader(60)


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_end", "on_train_batch_end"])
def test_an_adaptive_schedule_goes_on_where_it_was(tmp_path, hook):
    def fit(*callbacks, ckpt_path=None):
        module, batches = Losses(), Batches()
        callback = BatchSizeSchedule(PlateauBatches(patience=0), max_batch_size=24)
        data = loader(BASE, shuffle=True, num_workers=0)
        trainer, _ = run(module, data, callback, batches, *callbacks, ckpt_path=ckpt_path, max_epochs=7)
        return module, trainer, batches

    save = SaveAt(tmp_path, hook)
    if hook == "on_train_batch_end":
        setattr(save, hook, lambda trainer, module, *_: save.save(trainer, module))
    whole, trainer, batches = fit(save)
    assert max(batches.sizes) == 24
    for update in sorted(set(save.saved))[::3]:
        module, again, _ = fit(ckpt_path=tmp_path / f"{update}.ckpt")
        assert again.global_step == trainer.global_step, update
        assert torch.equal(module.layer.weight, whole.layer.weight), update


class Counting(AdaptiveBatches):
    """Doubles at the tenth and the fifteenth update, while later batches have been drawn."""

    seen = 0

    def observe_noise(self, noise_scale):
        self.seen += 1
        if self.seen in (10, 15):
            self._ratio *= 2

    def state_dict(self):
        return {"ratio": self._ratio, "seen": self.seen}

    def load_state_dict(self, state):
        self._ratio, self.seen = state["ratio"], state["seen"]


@pytest.mark.parametrize("workers", [0, 1])
def test_what_has_been_drawn_ahead_is_drawn_again(tmp_path, workers):
    class Growing(BatchSizeSchedule):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._run.observe_noise(1.0)

    def fit(*callbacks, ckpt_path=None):
        module, batches = Regression(), Batches()
        data = loader(BASE, shuffle=True, num_workers=workers)
        callback = Growing(Counting(), max_batch_size=16)
        trainer, _ = run(module, data, callback, batches, *callbacks, ckpt_path=ckpt_path, max_epochs=3)
        return module, trainer, batches

    save = SaveAt(tmp_path)
    save.on_train_batch_end = lambda trainer, module, *_: save.save(trainer, module)
    whole, trainer, batches = fit(save)
    assert 8 in batches.sizes
    assert 16 in batches.sizes
    for update in (5, 9, 10, 11, 12, 13, 14, 15, 16, 17):
        module, again, resumed = fit(ckpt_path=tmp_path / f"{update}.ckpt")
        assert resumed.sizes == batches.sizes[update:]
        assert again.global_step == trainer.global_step
        assert torch.equal(module.layer.weight, whole.layer.weight), update
