"""What a trainer and its loader answer while the reference run is written, and to whom."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regime_runs import Regression, dataset, loader, run
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, IterableDataset

from lightning_gap.regime import LargeBatchRegime
from lightning_gap.regime.clock import ReferenceClock
from lightning_gap.regime.plan import RegimePlan
from lightning_gap.regime.planned import plan_regime
from lightning_gap.regime.rollout import follows_its_factor, hidden_lengths, roll_out, turns

pytestmark = pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*", "ignore:.*has .__len__. defined.*")
NAMES = ("max_epochs", "max_steps", "num_training_batches", "accumulate_grad_batches", "estimated_stepping_batches")


class Asks(Regression):
    """Asks for lengths wherever the reference run is written."""

    def __init__(self, data=None):
        super().__init__()
        self.data, self.told = data, {}

    def ask(self, where):
        trainer = self.trainer
        self.told[where] = {name: getattr(trainer, name) for name in NAMES}
        self.told[where]["devices"] = (trainer.world_size, trainer.num_devices, trainer.num_nodes)
        self.told[where]["len"] = len(self.data)
        self.told[where]["others"] = (len(loader(7)), len(loader(30, samples=90)))

    def setup(self, stage):
        self.ask("setup")

    def configure_optimizers(self):
        self.ask("configure_optimizers")
        return super().configure_optimizers()

    def on_train_start(self):
        self.ask("training")


REFERENCE = {
    "max_epochs": 6,
    "max_steps": -1,
    "num_training_batches": 15,
    "accumulate_grad_batches": 1,
    "estimated_stepping_batches": 90,
    "devices": (1, 1, 1),
    "len": 15,
    "others": (9, 3),
}


def test_lengths_are_the_reference_runs_where_it_is_written_and_nowhere_else():
    module = Asks(loader(10))
    trainer, _ = run(module, module.data, LargeBatchRegime(4), accumulate_grad_batches=3)
    assert module.told["setup"] == module.told["configure_optimizers"] == REFERENCE
    assert module.told["training"] == {
        "max_epochs": 45,
        "max_steps": -1,
        "num_training_batches": 6,
        "accumulate_grad_batches": 3,
        "estimated_stepping_batches": 90,
        "devices": (1, 1, 1),
        "len": 6,
        "others": (9, 3),
    }
    assert type(trainer) is Trainer
    assert "__len__" in vars(DataLoader)
    assert vars(DataLoader)["__len__"].__module__ == "torch.utils.data.dataloader"


def test_the_answers_are_this_runs_where_that_is_declared():
    module = Asks(loader(30))
    run(module, module.data, LargeBatchRegime(4, stretch_schedulers=False))
    assert module.told["configure_optimizers"] == module.told["training"]
    for where in ("setup", "configure_optimizers"):
        assert (module.told[where]["max_epochs"], module.told[where]["len"]) == (45, 2)


class Longer(DataLoader):
    """A loader with a length of its own."""

    def __len__(self):
        return super().__len__()


def test_a_loader_of_ones_own_class_answers_too():
    module = Asks(Longer(dataset(), batch_size=30))
    own = Longer.__len__
    run(module, module.data, LargeBatchRegime(4))
    assert module.told["configure_optimizers"]["len"] == 15
    assert Longer.__len__ is own


class Counted(IterableDataset):
    def __len__(self):
        return 60

    def __iter__(self):
        return iter(dataset())


def test_a_stream_answers_for_itself():
    module = Asks(DataLoader(Counted(), batch_size=30))
    run(module, module.data, LargeBatchRegime(4), max_epochs=-1, max_steps=5)
    assert module.told["configure_optimizers"]["len"] == 2
    assert module.told["configure_optimizers"]["max_steps"] == 5


@pytest.mark.parametrize("where", ["setup", "configure_optimizers", "on_fit_start"])
def test_all_is_given_back_after_an_error(where):
    def fail(*_, **__):
        raise RuntimeError("stop")

    module = Asks(loader(30))
    setattr(module, where, fail)
    regime = LargeBatchRegime(4)
    with pytest.raises(RuntimeError, match="stop"):
        run(module, module.data, regime)
    trainer = module.trainer
    assert (type(trainer), trainer.max_epochs, len(module.data)) == (Trainer, 6, 2)
    assert vars(module).get("configure_optimizers") is (fail if where == "configure_optimizers" else None)


def test_other_callbacks_and_lightning_see_the_truth():
    class Sees(Callback):
        def on_fit_start(self, trainer, pl_module):
            self.seen = trainer.num_training_batches, trainer.accumulate_grad_batches

    sees = Sees()
    run(Regression(), loader(10), LargeBatchRegime(4), sees, accumulate_grad_batches=3)
    assert sees.seen[1] == 3


# ----------------------------------------------------------------------------------------------------------- roll-out


def sgd(lr=1.0):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)


PLAN = RegimePlan(1, 1, "none", 1.0)


@pytest.mark.parametrize("make", [
    lambda o: schedulers.CosineAnnealingLR(o, 10),
    lambda o: schedulers.SequentialLR(o, [schedulers.LinearLR(o), schedulers.ExponentialLR(o, 0.9)], [5]),
    lambda o: schedulers.OneCycleLR(o, 2.0, total_steps=20),
    lambda o: schedulers.CyclicLR(o, 0.1, 1.0, step_size_up=3),
])  # fmt: skip
def test_a_roll_out_changes_nothing(make):
    optimizer = sgd()
    scheduler = make(optimizer)
    before = optimizer.param_groups[0]["lr"], repr(scheduler.state_dict())
    seen = roll_out(ReferenceClock(scheduler, "step", 1, 5, last=20))
    assert (optimizer.param_groups[0]["lr"], repr(scheduler.state_dict())) == before
    real = [optimizer.param_groups[0]["lr"]]
    for _ in range(20):
        optimizer.step()
        scheduler.step()
        real.append(optimizer.param_groups[0]["lr"])
    assert seen.rates == real
    assert follows_its_factor(ReferenceClock(make(sgd()), "step", 1, 5, last=20), 3.0)


def test_a_scheduler_that_fails_says_where():
    seen = roll_out(ReferenceClock(schedulers.OneCycleLR(sgd(), 1.0, total_steps=5), "step", 1, 5, last=20))
    assert len(seen.rates) == 6
    assert "Tried to step" in str(seen.error)


def test_a_scheduler_that_cannot_be_copied_is_not_rolled_out():
    class Stubborn(schedulers.StepLR):
        def __deepcopy__(self, memo):
            raise TypeError("no copies")

    clock = ReferenceClock(Stubborn(sgd(), 2), "step", 1, 5, last=20)
    assert follows_its_factor(clock, 2.0) is None
    assert roll_out(clock) == ([], None, False)


def test_where_lengths_hide():
    total = 48

    class Own:
        def __init__(self, length):
            self.length = length

        def __call__(self, step):
            return 1 - step / self.length

    optimizer = sgd()
    found = {}
    for function in (lambda step: 1 - step / total, lambda step, steps=48: 1 - step / steps, Own(48)):
        found |= hidden_lengths(schedulers.LambdaLR(optimizer, function))
    assert found == dict.fromkeys(("LambdaLR: total", "LambdaLR: steps", "LambdaLR: length"), 48)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([1.0, 0.5, 0.0, 0.0], {"end": 2}),
        ([1.0, 0.5, 0.1, 0.5, 1.0], {"lowest": 2}),
        ([0.1, 1.0, 1.0], {}),  # a warm-up
        ([0.1, 0.1, 1.0, 0.5, 0.2], {}),
        ([1.0, 0.5, 0.25], {}),
        ([1.0], {}),
        ([0.0, 0.0], {}),
    ],
)
def test_where_a_schedule_turns(rates, expected):
    assert turns(rates) == expected


# -------------------------------------------------------------------------------------------------- without a Trainer


def test_what_a_plan_refuses_to_be_applied_to():
    plan = plan_regime(reference_batch_size=4, batch_size=64, samples=320, max_epochs=5)
    optimizer = sgd()
    with pytest.raises(ValueError, match=r"interval='update' must be"):
        plan.apply(optimizer, interval="update")
    with pytest.raises(ValueError, match="T_max = 25 looks like a length of this run"):
        plan.apply(optimizer, schedulers.CosineAnnealingLR(optimizer, T_max=25), interval="step")
    with pytest.raises(ValueError, match="rule for SGD"):
        plan.apply(torch.optim.Adagrad([torch.zeros(1, requires_grad=True)]))
    with pytest.raises(ValueError, match="pass samples="):
        RegimePlan(4, 64, "sqrt", 4.0).apply(optimizer, schedulers.StepLR(optimizer, 5))
    assert optimizer.param_groups[0]["lr"] == 1.0
    plan.apply(optimizer)
    assert optimizer.param_groups[0]["lr"] == 4.0
    with pytest.raises(ValueError, match="scaled already"):
        plan.apply(optimizer)


def test_a_plan_without_a_length_says_what_to_pass():
    with pytest.raises(ValueError, match="pass samples="):
        plan_regime(reference_batch_size=4, batch_size=64, max_epochs=5)


def test_a_module_whose_lengths_cannot_be_told_is_refused_with_the_remedy():
    module = Regression()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match=r"plan_regime\(\.\.\.\)\.apply"):
        run(module, loader(30), LargeBatchRegime(4))


def test_a_plan_is_applied_to_what_fabric_wraps():
    from lightning.fabric import Fabric

    plan = plan_regime(reference_batch_size=4, batch_size=64, samples=320, max_epochs=5)
    module = torch.nn.Linear(2, 1)
    _, wrapped = Fabric(accelerator="cpu", devices=1).setup(module, torch.optim.SGD(module.parameters(), 0.1))
    clock = plan.apply(wrapped)
    assert wrapped.optimizer.param_groups[0]["lr"] == pytest.approx(0.4)
    module(torch.ones(1, 2)).sum().backward()
    wrapped.step()
    assert clock.warmups[0].made == 1
