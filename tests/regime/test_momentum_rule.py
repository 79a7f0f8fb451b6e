"""Momentum that remembers as many samples: in groups, under schedulers, in checkpoints, and on a noisy quadratic."""

import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from planned_batches import BASE, STEPS, Planned
from regime_runs import EPOCH_SCHEDULES, SCHEDULES, Regression, SaveAt, loader, run

from benchmarks.science.large_batch.noisy_quadratic import MOMENTUM, RHO, TOLERANCE, covariance
from lightning_gap import BatchSizeSchedule, LargeBatchRegime
from lightning_gap.regime import OptimizerRules, ema_momentum, plan_regime

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*have no .val_dataloader.*",
    "ignore:.*callbacks used to create.*",
    "ignore:.*OneCycleLR. scheduler is using.*",
)
HALF_LIFE = {"lr_rule": "linear", "momentum_rule": "half_life"}


class Groups(Callback):
    """The rate and the momentum of the first group at each update."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(tuple(optimizer.param_groups[0][key] for key in ("lr", "momentum")))


def correction(ratio, momentum=0.9):
    return (1 - momentum**ratio) / (1 - momentum)


@pytest.mark.parametrize("name", [None, "StepLR", "CosineAnnealingLR", "SequentialLR", "SWALR"])
def test_momentum_and_every_rate_follow_at_equal_samples(name):
    schedule = None if name is None else EPOCH_SCHEDULES[name]
    regime = LargeBatchRegime(4, **HALF_LIFE)
    trainer, trace = run(Regression(schedule), loader(20), regime)
    _, plain = run(Regression(schedule), loader(20), LargeBatchRegime(4, lr_rule="linear"))
    torch.testing.assert_close(trace.tensor, correction(5) * plain.tensor, rtol=1e-12, atol=0)
    optimizer = trainer.optimizers[0]
    for group in (*optimizer.param_groups, optimizer.defaults):
        assert group["momentum"] == pytest.approx(0.9**5)
    rows = {row[0]: row[1:] for row in regime.plan.rows()}
    assert rows["momentum, group 1 (half_life)"] == ("0.9", f"{0.9**5:.6g}")
    label = f"learning rate, group 0 (linear, x5, x{correction(5):.4g} for the momentum)"
    assert float(rows[label][1]) == pytest.approx(float(rows[label][0]) * 5 * correction(5), rel=1e-5)
    if name == "CosineAnnealingLR":
        shown = rows["learning rate, 0 % of the way"][1].rpartition(" ")[2]
        assert float(shown) == pytest.approx(trace.rates[0][0], rel=1e-3)
    assert regime.plan.to_dict()["momentum_rule"] == "half_life"


def test_at_equal_updates_and_by_default_it_stays():
    weights = []
    for rule in ("half_life", "none"):
        module = Regression(EPOCH_SCHEDULES["StepLR"])
        trainer, _ = run(module, loader(20), LargeBatchRegime(4, momentum_rule=rule))
        assert trainer.optimizers[0].param_groups[0]["momentum"] == 0.9
        weights.append(module.layer.weight)
    assert torch.equal(*weights)
    trainer, _ = run(Regression(), loader(20), LargeBatchRegime(4, lr_rule="linear"))
    assert trainer.optimizers[0].param_groups[0]["momentum"] == 0.9


def deviation(lr, momentum, ratio):
    """Return how far the stationary covariance of weight and average is from the reference run's."""
    there = covariance(MOMENTUM, RHO, 1.0)
    here = covariance({"lr": lr, "momentum": momentum}, ema_momentum(RHO, ratio), 1 / ratio)
    return float((here / there - 1).abs().max())


@pytest.mark.parametrize("ratio", [2, 8, 64])
def test_on_a_noisy_quadratic_the_regime_keeps_the_covariance(ratio):
    for rule, kept in (("half_life", True), ("none", ratio <= 8)):
        groups, regime = Groups(), LargeBatchRegime(2, lr_rule="linear", momentum_rule=rule)
        run(Regression(lr=MOMENTUM["lr"]), loader(2 * ratio, samples=128), regime, groups, max_epochs=1)
        assert (deviation(*groups.seen[0], ratio) < TOLERANCE) == kept


@pytest.mark.parametrize(("rule", "limit"), [("none", 3.8 / 8), ("half_life", 2 * (1 + 0.9**8) / (8 * correction(8)))])
def test_momentum_by_half_life_bears_less_of_a_large_rate(rule, limit):
    for share, stable in ((0.95, True), (1.05, False)):
        group = {"lr": share * limit, "momentum": 0.9}
        group |= OptimizerRules("linear", momentum=rule).at("SGD", group, 8, equal_samples=True)
        weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
        sgd = torch.optim.SGD([weight], **group)
        for _ in range(1000):
            weight.grad = weight.detach().clone()
            sgd.step()
        assert (abs(weight.item()) < 1) == stable
    assert limit == pytest.approx({"none": 0.475, "half_life": 0.063}[rule], rel=0.01)


def test_on_a_noisy_quadratic_a_batch_that_grows_keeps_the_covariance():
    for rule, kept in (("half_life", True), ("none", False)):
        schedule = BatchSizeSchedule([(0, 2), (64, 16), (128, 128)], momentum_rule=rule)
        groups, planned = Groups(), Planned(schedule, base=2)
        data = loader(2, samples=128)
        run(Regression(lr=MOMENTUM["lr"]), data, schedule, groups, planned, max_epochs=2)
        found = {
            batch // 2: deviation(*seen, batch // 2)
            for seen, (_, batch) in zip(groups.seen, planned.planned, strict=True)
        }
        assert set(found) == {1, 8, 64}
        assert found[1] == 0
        assert found[8] < TOLERANCE
        assert (found[64] < TOLERANCE) == kept


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR", "StepLR"])
def test_a_growing_batch_follows_a_momentum_that_a_scheduler_moves(name):
    groups, reference = Groups(), Groups()
    schedule = BatchSizeSchedule(STEPS, momentum_rule="half_life")
    planned = Planned(schedule)
    by_updates = partial(Regression, partial(SCHEDULES[name], unit=15), interval="step")
    run(by_updates(), loader(BASE), schedule, groups, planned)
    run(by_updates(), loader(BASE), reference)
    assert len({momentum for _, momentum in reference.seen}) > 3 or name == "StepLR"
    for (lr, momentum), (samples, batch) in zip(groups.seen, planned.planned, strict=True):
        there, before = reference.seen[samples // BASE]
        ratio = batch / BASE
        assert momentum == pytest.approx(before**ratio)
        assert lr / (1 - momentum) == pytest.approx(ratio * there / (1 - before))


@pytest.mark.parametrize("callback", [partial(LargeBatchRegime, 4), partial(BatchSizeSchedule, STEPS)])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(callback, tmp_path):
    whole, part = (Regression(EPOCH_SCHEDULES["StepLR"]) for _ in range(2))
    size = 20 if callback.func is LargeBatchRegime else BASE
    trainer, full = run(whole, loader(size), callback(**HALF_LIFE), SaveAt(tmp_path))
    at = sorted(int(path.stem) for path in tmp_path.glob("*.ckpt"))[2]
    resumed, trace = run(part, loader(size), callback(**HALF_LIFE), ckpt_path=tmp_path / f"{at}.ckpt")
    assert trace.rates == full.rates[at:]
    assert torch.equal(whole.layer.weight, part.layer.weight)
    momenta = [each.optimizers[0].param_groups[0]["momentum"] for each in (trainer, resumed)]
    assert momenta[0] == momenta[1]
    with pytest.raises(MisconfigurationException, match="momentum"):
        run(Regression(EPOCH_SCHEDULES["StepLR"]), loader(size), callback(lr_rule="linear"),
            ckpt_path=tmp_path / f"{at}.ckpt")  # fmt: skip


def test_going_on_at_another_batch_changes_the_groups_once(tmp_path):
    run(Regression(), loader(8), LargeBatchRegime(4, **HALF_LIFE), SaveAt(tmp_path), max_epochs=3)
    found = []
    for path in (None, tmp_path / "16.ckpt"):
        trainer, _ = run(Regression(), loader(20), LargeBatchRegime(4, **HALF_LIFE), ckpt_path=path)
        found.append([(each["lr"], each["momentum"]) for each in trainer.optimizers[0].param_groups])
    for there, here in zip(*found, strict=True):
        assert here == pytest.approx(there)


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_schedulers_that_move_momentum_are_refused_by_the_regime(name):
    module = Regression(EPOCH_SCHEDULES[name])
    with pytest.raises(MisconfigurationException, match=f"cannot follow {name}.* cycle_momentum=False"):
        run(module, loader(20), LargeBatchRegime(4, **HALF_LIFE))
    assert module.optimizers(use_pl_optimizer=False).param_groups[0]["initial_lr"] <= 1e-3


def test_groups_of_different_momentum_are_refused_under_a_scheduler_alone():
    class Two(Regression):
        def configure_optimizers(self):
            groups = [{"params": [self.layer.weight]}, {"params": [self.layer.bias], "momentum": 0.0}]
            optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
            return optimizer if self.schedule is None else ([optimizer], [self.schedule(optimizer)])

    with pytest.raises(MisconfigurationException, match="Give the groups one momentum"):
        run(Two(EPOCH_SCHEDULES["StepLR"]), loader(20), LargeBatchRegime(4, **HALF_LIFE))
    trainer, _ = run(Two(), loader(20), LargeBatchRegime(4, **HALF_LIFE))
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    assert rates == pytest.approx([0.05 * correction(5), 0.05])


def test_rules_that_contradict_each_other_or_are_not_known_are_refused():
    with pytest.raises(ValueError, match="a function of betas decides momentum too"):
        LargeBatchRegime(4, **HALF_LIFE, betas_rule=lambda name, beta, ratio: beta)
    for make in (partial(LargeBatchRegime, 4), partial(BatchSizeSchedule, STEPS)):
        with pytest.raises(ValueError, match="the rule of momentum, 'cube', is not known"):
            make(momentum_rule="cube")
    rules = OptimizerRules("none", momentum="half_life")
    assert rules.at("SGD", {"lr": 0.1, "momentum": 1.0}, 4, equal_samples=True) == {}


def test_a_loop_of_ones_own_and_a_rate_that_has_no_rule():
    plan = plan_regime(
        reference_batch_size=4, batch_size=16, samples=64, max_epochs=2, train_longer=0.0, lr_rule="none",
        momentum_rule="half_life",
    )  # fmt: skip
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 2, eta_min=0.05)
    clock = plan.apply(sgd, cosine)
    group = sgd.param_groups[0]
    assert (group["momentum"], group["lr"]) == (0.0625, pytest.approx(0.1 * correction(4, 0.5)))
    while not clock.over:
        sgd.step()
        clock.step()
    assert group["lr"] == pytest.approx(0.05 * correction(4, 0.5))
    assert math.isclose(cosine.eta_min, 0.05 * correction(4, 0.5))
