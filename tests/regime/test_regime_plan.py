"""The pure parts: LR rules, what they scale, the reference run's clock, and the arithmetic of the plan."""

import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric import Fabric
from rich.console import Console
from torch.optim import SGD, lr_scheduler

from lightning_gap.regime import LR_RULES, RegimePlan, lr_factor, plan_regime
from lightning_gap.regime.clock import ReferenceClock, updates_in_epoch
from lightning_gap.regime.resume import disagreements
from lightning_gap.regime.rules.hyperparameters import Rescaling
from lightning_gap.regime.scaling import rule_name, scale_optimizer
from lightning_gap.regime.schedules import horizons, scale_scheduler

ratios = st.floats(0.01, 1000)


@given(ratios, ratios)
@settings(deadline=None, max_examples=50)
def test_the_rules_of_the_table_compose(a, b):
    for rule in LR_RULES:
        assert lr_factor(rule, 1.0) == 1.0
        assert lr_factor(rule, a * b) == pytest.approx(lr_factor(rule, a) * lr_factor(rule, b))


def test_the_rules_are_the_papers():
    assert lr_factor("sqrt", 32) == pytest.approx(5.656854249492381)  # batch 4096 against 128
    assert lr_factor("linear", 32) == 32
    assert lr_factor("none", 32) == 1
    assert rule_name(math.sqrt) == "sqrt()"  # the function, not the rule


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan, "2", True, None, torch.ones(1)])
def test_a_callable_must_give_a_finite_positive_number(bad):
    with pytest.raises(ValueError, match="finite positive"):
        lr_factor(lambda ratio: bad, 2.0)


def test_an_unknown_rule_names_the_known():
    with pytest.raises(ValueError, match=r"lr_rule='cube' .*'adam', 'linear', 'none', 'sqrt'"):
        lr_factor("cube", 2.0)


def one_cycle():
    optimizer = SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}], lr=torch.tensor(0.1))
    return optimizer, lr_scheduler.OneCycleLR(optimizer, max_lr=[1.0, 2.0], total_steps=10)


def test_every_learning_rate_is_scaled_once_and_tensors_are_not_shared():
    optimizer, scheduler = one_cycle()
    before = [dict(group) for group in optimizer.param_groups]
    scale_optimizer(optimizer, Rescaling(lr_factor=3.0))
    scale_scheduler(scheduler, Rescaling(lr_factor=3.0))
    for group, old in zip(optimizer.param_groups, before, strict=True):
        for key in ("lr", "initial_lr", "max_lr", "min_lr"):
            assert float(group[key]) == pytest.approx(3 * float(old[key]))
        for key in ("momentum", "weight_decay", "max_momentum", "base_momentum"):
            assert group[key] == old[key]
        assert group["lr"] is not old["lr"]
    assert optimizer.param_groups[0]["lr"] is not optimizer.param_groups[1]["lr"]
    assert [float(rate) for rate in scheduler.base_lrs] == pytest.approx([0.12, 0.24])


def test_a_group_added_later_starts_from_the_scaled_rate():
    optimizer = SGD([torch.zeros(1)], lr=0.1)
    scale_optimizer(optimizer, Rescaling(lr_factor=4.0))
    optimizer.add_param_group({"params": [torch.zeros(1)]})
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.4)


def test_a_plateau_is_homogeneous_in_its_rates():
    optimizer = SGD([torch.zeros(1)], lr=0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, min_lr=0.02, eps=1e-3)
    scale_scheduler(scheduler, Rescaling(lr_factor=4.0))
    assert (scheduler.min_lrs, scheduler.default_min_lr, scheduler.eps) == ([0.08], 0.08, 4e-3)


def test_horizons_are_found_in_parts():
    optimizer = SGD([torch.zeros(1)], lr=0.1)
    parts = [lr_scheduler.LinearLR(optimizer, total_iters=5), lr_scheduler.CosineAnnealingLR(optimizer, T_max=45)]
    found = horizons(lr_scheduler.SequentialLR(optimizer, parts, milestones=[5]))
    assert found == {"LinearLR.total_iters": 5, "CosineAnnealingLR.T_max": 45, "SequentialLR.milestones": 5}
    assert horizons(lr_scheduler.MultiStepLR(optimizer, [3, 9])) == {"MultiStepLR.milestones": 9}
    assert horizons(lr_scheduler.ConstantLR(optimizer, total_iters=0)) == {}


@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 6), st.sampled_from(["epoch", "step"]))
@settings(deadline=None, max_examples=60)
def test_the_clock_is_a_loop_over_reference_epochs(per_epoch, frequency, epochs, interval):
    expected, update = [], 0
    for epoch in range(epochs):
        for index in range(per_epoch):
            update += 1
            if interval == "step" and (index + 1) % frequency == 0:
                expected.append(update)
        if interval == "epoch" and (epoch + 1) % frequency == 0:
            expected.append(update)
    clock = ReferenceClock(None, interval, frequency, per_epoch)
    assert [t for t in range(1, update + 1) for _ in range(clock.steps(t))] == expected


def plan_of(samples, reference, batch, epochs, *, drop_last=False, **options):
    return plan_regime(
        reference_batch_size=reference,
        batch_size=batch,
        lr_rule="sqrt",
        lr_factor=lr_factor("sqrt", batch / reference),
        reference_updates_per_epoch=updates_in_epoch(samples, reference, drop_last=drop_last),
        updates_per_epoch=updates_in_epoch(samples, batch, drop_last=drop_last),
        max_epochs=epochs,
        **options,
    )


@given(st.integers(1, 3000), st.integers(1, 300), st.integers(1, 3000), st.integers(0, 40), st.integers(0, 40))
@settings(deadline=None, max_examples=150)
def test_the_plan_makes_the_reference_runs_updates(samples, reference, batch, epochs, min_epochs):
    plan = plan_of(samples, reference, batch, epochs, min_epochs=min_epochs)
    assert plan.updates == epochs * len(range(0, samples, reference))
    here = len(range(0, samples, batch))
    assert (plan.epochs - 1) * here < plan.updates <= plan.epochs * here or plan.epochs == plan.updates == 0
    assert plan.stops_within_epoch == (plan.updates != plan.epochs * here)
    assert plan.max_steps in (-1, plan.updates)
    if batch == reference:
        assert (plan.epochs, plan.min_epochs, plan.max_steps) == (epochs, min_epochs, -1)
        assert not plan.reclocked
    if min_epochs <= epochs:  # else the user asks for an error of Lightning's
        assert plan.min_epochs * here <= plan.updates


def test_the_papers_case_is_exact_where_multiplying_epochs_is_not():
    plan = plan_of(50_000, 128, 4096, 100)
    assert (plan.updates, plan.epochs, plan.ratio) == (39_100, 3008, 32)
    assert 100 * 32 * plan.updates_per_epoch == 41_600


@given(st.integers(1, 3000), st.integers(1, 300), st.integers(1, 3000), st.integers(0, 40), st.floats(0, 1))
@settings(deadline=None, max_examples=150)
def test_part_of_the_way_is_between(samples, reference, batch, epochs, share):
    none, part, all_ = (plan_of(samples, reference, batch, epochs, train_longer=s) for s in (0.0, share, 1.0))
    assert none.updates == epochs * none.updates_per_epoch
    assert min(none.updates, all_.updates) <= part.updates <= max(none.updates, all_.updates)
    assert part.reference_epochs_in(part.updates) >= epochs  # all epochs are over at the last update
    if part.updates:
        assert part.reference_epochs_in(part.updates - 1) < epochs
    assert all_.pace == 1
    assert none.pace * none.updates_per_epoch == none.reference_updates_per_epoch


def test_a_limit_of_updates_is_kept():
    assert plan_of(60, 4, 30, 6, max_steps=37).updates == 37
    assert plan_of(60, 4, 30, 6, max_steps=37).epochs == 19
    unlimited = plan_of(60, 4, 30, None, max_steps=37)
    assert (unlimited.epochs, unlimited.max_steps) == (None, 37)
    endless = plan_of(60, 4, 30, None)
    assert (endless.updates, endless.epochs, endless.max_steps) == (None, None, -1)
    with pytest.raises(ValueError, match="drop_last=False"):
        plan_of(20, 4, 30, 6, drop_last=True)


def test_a_plan_is_plain_python_and_compares_with_its_checkpoint():
    plan = plan_of(60, 4, 30, 6)
    assert disagreements(plan, plan.to_dict()) == []
    assert disagreements(plan_of(60, 4, 30, 99), plan.to_dict()) == []
    assert disagreements(plan_of(60, 4, 20, 6), plan.to_dict()) == []  # may go on at another batch
    part = plan_of(60, 4, 30, 6, train_longer=0.5)
    assert disagreements(plan_of(60, 4, 20, 6, train_longer=0.5), part.to_dict()) == ["batch_size was 30 and is 20"]
    assert disagreements(plan_of(120, 4, 30, 6), plan.to_dict()) == ["reference_updates_per_epoch was 15 and is 30"]
    other = {**plan.to_dict(), "lr_factor": 1.5}
    assert disagreements(plan, other) == [f"lr_factor was 1.5 and is {plan.lr_factor!r}"]
    assert disagreements(plan, {})[0] == "reference_batch_size was None and is 4"
    file = io.BytesIO()
    torch.save(plan.to_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == plan.to_dict()
    with pytest.raises(AttributeError):
        plan.updates = 3


def test_the_table_shows_both_runs():
    plan = RegimePlan(4, 30, "sqrt", 7.5**0.5, learning_rates=((0.1, 0.27),), schedulers=("StepLR: as it was",))
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(plan.table())
    text = console.export_text()
    for said in ("30", "7.5", "0.27", "StepLR", "as it was"):
        assert said in text
    assert "updates per epoch" not in text


@pytest.mark.parametrize(("reference", "batch"), [(4, 51), (51, 4)])
def test_a_batch_has_no_more_samples_than_there_are(reference, batch):
    with pytest.raises(ValueError, match=r"batch_size=51 is more than the 50 samples"):
        plan_regime(reference_batch_size=reference, batch_size=batch, samples=50, max_epochs=2)
    plan_regime(reference_batch_size=4, batch_size=50, samples=50, max_epochs=2)


def one():
    return SGD([torch.zeros(1, requires_grad=True)], lr=0.1)


@pytest.mark.parametrize("several", [list, tuple, iter])
def test_a_plan_is_applied_once_to_what_comes_twice(several):
    plan = plan_regime(reference_batch_size=4, batch_size=16, samples=96, max_epochs=2)
    optimizer = one()
    steps = lr_scheduler.StepLR(optimizer, 1)
    clock = plan.apply(several([optimizer, optimizer]), several([steps, steps]))
    assert optimizer.param_groups[0]["lr"] == 0.2
    assert len(clock.clocks) == 1
    plan.apply(bare := one(), None)
    assert bare.param_groups[0]["lr"] == 0.2


def test_a_scheduler_of_an_optimizer_that_is_not_scaled_is_refused():
    plan = plan_regime(reference_batch_size=4, batch_size=16, samples=96, max_epochs=2)
    optimizer, other = one(), one()
    with pytest.raises(ValueError, match="StepLR is of another optimizer"):
        plan.apply(optimizer, lr_scheduler.StepLR(other, 1))
    assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"] == 0.1


def test_a_scheduler_of_the_optimizer_that_fabric_wraps_is_taken():
    plan = plan_regime(reference_batch_size=4, batch_size=16, samples=96, max_epochs=2)
    optimizer = one()
    steps = lr_scheduler.StepLR(optimizer, 1)
    wrapped = Fabric(accelerator="cpu", devices=1).setup_optimizers(optimizer)
    clock = plan.apply(wrapped, steps)
    assert wrapped.param_groups[0]["lr"] == 0.2
    assert [each.scheduler for each in clock.clocks] == [steps]
