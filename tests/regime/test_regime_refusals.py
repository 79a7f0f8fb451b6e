"""What a regime cannot be right for, refused before any change, with a remedy that works."""

import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regime_runs import EPOCH_SCHEDULES, Listed, Regression, Tunable, dataset, loader, run, sharded, trainer_of
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from lightning_gap.regime import LargeBatchRegime

pytestmark = pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*", "ignore:.*callbacks used to create.*")


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


def test_a_strategy_with_optimizers_of_its_own_is_refused():
    trainer = sharded(trainer_of(regime := LargeBatchRegime(4)))
    with pytest.raises(MisconfigurationException, match=r"FSDPStrategy is not supported. Use one device, DDP"):
        regime.setup(trainer, Regression(), "fit")


def test_what_a_refusal_names_as_remedy_works():
    run(Regression(optimizer=torch.optim.Adagrad), loader(30), LargeBatchRegime(4, lr_rule="none"))
    run(Regression(optimizer=torch.optim.Adagrad), loader(30), LargeBatchRegime(4, lr_rule=math.sqrt))
    streamed = LargeBatchRegime(4, batch_size=30, train_longer=False)
    run(Regression(), DataLoader(Stream(), batch_size=30), streamed, max_epochs=1)
    several = LargeBatchRegime(4, batch_size=40, train_longer=False)
    run(Listed(), [loader(30), loader(10)], several, limit_train_batches=2)
    assert several.plan.ratio == 10
    for module, data in ((Listed(), [loader(30), loader(10)]),):
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
