"""A plan applied in loops without a Trainer: plain torch, Lightning Fabric and accelerate do what the callback does."""

import inspect
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from regime_runs import SCHEDULES, trainer_of
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap.regime import LargeBatchRegime, plan_regime

pytestmark = pytest.mark.filterwarnings("ignore:.*OneCycleLR. scheduler is using.*")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import own_loop  # noqa: E402

SAMPLES, REFERENCE, EPOCHS = 74, 2, 6
UNIT = math.ceil(SAMPLES / REFERENCE)
LOOPS = ["torch", "fabric", "accelerate"]


def tools(name):
    if name == "accelerate":
        pytest.importorskip("accelerate")
    return own_loop.tools(name)


class Rates:
    """The learning rates of every update that any optimizer makes."""

    def __enter__(self):
        self.rates = []
        self.hook = register_optimizer_step_pre_hook(
            lambda optimizer, *_: self.rates.append([float(group["lr"]) for group in optimizer.param_groups])
        )
        return self.rates

    def __exit__(self, *_):
        self.hook.remove()


def loader(batch, width=4, classes=3, samples=SAMPLES):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, width, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(samples) % classes), batch_size=batch)


def network(width=4, classes=3):
    net = nn.Linear(width, classes)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    return net


def optimizer_of(net):
    return torch.optim.SGD([{"params": [net.weight]}, {"params": [net.bias], "lr": 0.01}], lr=0.02, momentum=0.9)


class Module(LightningModule):
    """The reference run, for a Trainer."""

    def __init__(self, net, optimizer, schedule=None, interval="epoch"):
        super().__init__()
        self.net, self.optimizer, self.schedule, self.interval = net, optimizer, schedule, interval

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = self.optimizer(self.net)
        scheduler = {"scheduler": self.schedule(optimizer), "interval": self.interval}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def by_trainer(module, data, regime, epochs):
    with Rates() as rates:
        trainer_of(regime, max_epochs=epochs).fit(module, data)
    return rates, module.net


def by_loop(plan, schedule, interval, data, prepare, backward):
    net = network()
    optimizer = optimizer_of(net)
    clock = plan.apply(optimizer, schedule(optimizer), interval=interval)
    net, optimizer, data = prepare(net, optimizer, data)
    with Rates() as rates:
        while not clock.over:
            for x, y in data:
                optimizer.zero_grad()
                backward(nn.functional.cross_entropy(net(x), y))
                optimizer.step()
                clock.step()
                if clock.over:
                    break
    return rates, net, clock


@pytest.mark.parametrize("share", [0.1, 1.0])
@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("name", ["LambdaLR", "OneCycleLR", "SequentialLR"])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_trains_as_the_callback_does(loop, name, interval, share):
    schedule = partial(SCHEDULES[name], unit=1 if interval == "epoch" else UNIT)
    regime = LargeBatchRegime(REFERENCE, train_longer=share)
    expected, net = by_trainer(Module(network(), optimizer_of, schedule, interval), loader(16), regime, EPOCHS)
    plan = plan_regime(
        reference_batch_size=REFERENCE, batch_size=16, samples=SAMPLES, max_epochs=EPOCHS, train_longer=share
    )
    rates, ours, clock = by_loop(plan, schedule, interval, loader(16), *tools(loop))
    assert len(rates) == len(expected) == plan.updates
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected), rtol=1e-12, atol=0)
    for a, b in zip(net.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert clock.reference_epoch == pytest.approx(EPOCHS, abs=1 / 2)


@pytest.mark.parametrize("update", [1, 7, 38, 52])
def test_a_loop_resumes_from_its_states(update):
    schedule = partial(SCHEDULES["SequentialLR"], unit=UNIT)
    plan = plan_regime(
        reference_batch_size=REFERENCE, batch_size=16, samples=SAMPLES, max_epochs=EPOCHS, train_longer=0.3
    )
    batches = [batch for _ in range(plan.updates) for batch in loader(16)]

    def start():
        net = network()
        optimizer = optimizer_of(net)
        scheduler = schedule(optimizer)
        return net, optimizer, scheduler, plan.apply(optimizer, scheduler, interval="step")

    def go(parts, first, last):
        net, optimizer, _, clock = parts
        with Rates() as rates:
            for x, y in batches[first:last]:
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x), y).backward()
                optimizer.step()
                clock.step()
        return rates

    whole, part = start(), start()
    expected = go(whole, 0, plan.updates)
    go(part, 0, update)
    states = [each.state_dict() for each in part]
    resumed = start()
    for each, state in zip(resumed, states, strict=True):
        each.load_state_dict(state)
    assert go(resumed, update, plan.updates) == expected[update:]
    assert resumed[3].over
    for a, b in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("loop", LOOPS)
def test_the_page_s_loop_trains_as_the_callback_does(loop):
    def sgd(net):
        return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)

    cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=3 * math.ceil(200 / 16))
    data = loader(96, samples=200)
    expected, net = by_trainer(Module(network(), sgd, cosine, "step"), data, LargeBatchRegime(16), 3)
    with Rates() as rates:
        trained = own_loop.train(network(), loader(96, samples=200), 3, *tools(loop))
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected), rtol=1e-12, atol=0)
    for a, b in zip(net.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_page_shows_the_loop_that_is_run():
    assert inspect.getsource(own_loop.train) in (ROOT / "docs" / "regime.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("loop", LOOPS)
def test_the_example_learns_the_digits(loop, capsys):
    pytest.importorskip("sklearn")
    tools(loop)
    own_loop.main(loop)
    assert float(capsys.readouterr().out.split()[-1]) > 0.9
