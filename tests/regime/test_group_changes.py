"""A run under rules for weight decay and betas: what the groups hold, what is told, and what a checkpoint takes up."""

import dataclasses
import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regime_runs import EPOCH_SCHEDULES, Regression, SaveAt, loader, run

from lightning_gap.regime import LargeBatchRegime, plan_regime
from lightning_gap.regime.resume import disagreements

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*have no .val_dataloader.*",
    "ignore:.*callbacks used to create.*",
    "ignore:.*scales the learning rate of.*",
    "ignore:.*OneCycleLR. scheduler is using.*",
)
ADAMW = partial(torch.optim.AdamW, weight_decay=0.1, betas=(0.9, 0.99))
RULES = {"weight_decay_rule": "timescale", "betas_rule": "half_life"}


class Groups(Callback):
    """What the first group holds at each update."""

    def __init__(self, *keys):
        self.keys, self.seen = keys, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append([optimizer.param_groups[0][key] for key in self.keys])


@pytest.mark.parametrize(
    ("train_longer", "decay", "beta"),
    [(False, 0.1 * 2, 0.99**4), (True, 0.1 / 2, 0.99), (0.5, 0.1 * (15 / 9.5) / 2, 0.99 ** (15 / 9.5))],
)
def test_groups_and_defaults_follow_the_rules(train_longer, decay, beta):
    regime = LargeBatchRegime(4, train_longer=train_longer, **RULES)
    trainer, trace = run(Regression(optimizer=ADAMW), loader(16), regime)
    assert trace.rates[0] == pytest.approx([2e-3, 1e-3])
    optimizer = trainer.optimizers[0]
    for group in (*optimizer.param_groups, optimizer.defaults):
        assert group["weight_decay"] == pytest.approx(decay)
        assert group["betas"] == (0.9, pytest.approx(beta))
    told = {name: (there, float(here.split(", ")[-1])) for name, there, here in regime.plan.hyperparameters}
    assert told["weight_decay, group 0 (timescale)".replace("_", " ")] == ("0.1", pytest.approx(decay, rel=1e-5))
    assert ("betas, group 1 (half_life)" in told) == (train_longer is not True)
    assert [row for row in regime.plan.rows() if row[0].startswith("weight decay")] != []
    facts = regime.plan.to_dict()
    assert (facts["weight_decay_rule"], facts["betas_rule"], facts["ema_rule"]) == ("timescale", "half_life", "none")


def test_without_rules_nothing_but_the_rate_is_touched():
    for lr_rule, betas in (("sqrt", (0.9, 0.99)), ("none", (0.9, 0.99)), ("adam", (0.6, 0.96))):
        regime = LargeBatchRegime(4, lr_rule=lr_rule)
        trainer, _ = run(Regression(optimizer=ADAMW), loader(16), regime, max_epochs=1)
        group = trainer.optimizers[0].param_groups[0]
        assert group["weight_decay"] == 0.1
        assert group["betas"] == pytest.approx(betas)
        assert ("betas, group 0 (sde)" in [row[0] for row in regime.plan.rows()]) == (lr_rule == "adam")


def test_the_square_root_with_all_of_its_rule_is_not_doubted():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*scales the learning rate of.*")
        run(Regression(optimizer=ADAMW), loader(16), LargeBatchRegime(4, train_longer=False, **RULES), max_epochs=1)
    with pytest.warns(UserWarning, match="scales the learning rate of AdamW. betas_rule.* nobody's rule"):
        run(Regression(optimizer=ADAMW), loader(16), LargeBatchRegime(4, **RULES), max_epochs=1)


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
@pytest.mark.parametrize("rule", ["half_life", "halved"])
def test_a_first_beta_that_a_scheduler_moves(name, rule):
    def halved(key, beta, ratio):
        return beta / 2 if key == "beta1" else beta

    regime = LargeBatchRegime(4, train_longer=True, betas_rule=halved if rule == "halved" else rule)
    groups, reference = Groups("betas"), Groups("betas")
    schedule = EPOCH_SCHEDULES[name]
    run(Regression(schedule, optimizer=ADAMW), loader(8), regime, groups)
    run(Regression(schedule, optimizer=ADAMW), loader(4), reference)
    share = 0.5 if rule == "halved" else 1.0
    assert len({betas[0] for (betas,) in reference.seen}) > 3
    assert [betas[0] for (betas,) in groups.seen] == pytest.approx([share * betas[0] for (betas,) in reference.seen])


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path):
    def module():
        return Regression(EPOCH_SCHEDULES["StepLR"], optimizer=ADAMW)

    def regime():
        return LargeBatchRegime(4, train_longer=0.5, **RULES)

    whole, part = module(), module()
    trainer, full = run(whole, loader(16), regime(), SaveAt(tmp_path))
    saved = sorted(int(path.stem) for path in tmp_path.glob("*.ckpt"))
    at = saved[len(saved) // 2]
    resumed, trace = run(part, loader(16), regime(), ckpt_path=tmp_path / f"{at}.ckpt")
    assert trace.rates == full.rates[at:]
    for a, b in zip(whole.parameters(), part.parameters(), strict=True):
        assert torch.equal(a, b)
    for there, here in zip(trainer.optimizers[0].param_groups, resumed.optimizers[0].param_groups, strict=True):
        assert (there["weight_decay"], there["betas"]) == (here["weight_decay"], here["betas"])


@pytest.mark.parametrize("rules", [RULES, {"weight_decay_rule": lambda ratio: ratio**0.25}, {"lr_rule": "adam"}])
def test_going_on_at_another_batch_changes_the_groups_once(rules, tmp_path):
    def module():
        return Regression(optimizer=partial(torch.optim.AdamW, weight_decay=0.1, betas=(0.95, 0.99)))

    run(module(), loader(8), LargeBatchRegime(4, train_longer=False, **rules), SaveAt(tmp_path), max_epochs=3)
    found = []
    for path in (None, tmp_path / "16.ckpt"):
        regime = LargeBatchRegime(4, train_longer=False, **rules)
        trainer, _ = run(module(), loader(20), regime, ckpt_path=path)
        groups = (*trainer.optimizers[0].param_groups, trainer.optimizers[0].defaults)
        found.append([(each["lr"], each["weight_decay"], *each["betas"]) for each in groups])
    for there, here in zip(*found, strict=True):
        assert here == pytest.approx(there)


def test_a_function_of_betas_cannot_go_on_at_another_batch(tmp_path):
    regimes = [LargeBatchRegime(4, train_longer=False, betas_rule=lambda name, beta, ratio: 0.5) for _ in range(2)]
    run(Regression(optimizer=ADAMW), loader(8), regimes[0], SaveAt(tmp_path), max_epochs=3)
    with pytest.raises(MisconfigurationException, match="a function of betas cannot go on from another batch"):
        run(Regression(optimizer=ADAMW), loader(20), regimes[1], ckpt_path=tmp_path / "16.ckpt")


def test_another_rule_is_another_regime_and_older_checkpoints_had_none():
    lengths = {"reference_batch_size": 4, "batch_size": 16, "samples": 60, "max_epochs": 2}
    plain, ruled = plan_regime(**lengths), plan_regime(**lengths, **RULES)
    assert disagreements(ruled, plain.to_dict())[0] == "weight_decay_rule was 'none' and is 'timescale'"
    for plan in (plain, plan_regime(**lengths, lr_rule="adam")):
        older = plan.to_dict()
        for name in ("weight_decay_rule", "betas_rule", "ema_rule", "hyperparameters", "why"):
            del older[name]
        assert disagreements(plan, older) == []


class Unknown(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "weight_decay": 0.1})

    def step(self, closure=None):
        with torch.enable_grad():
            return closure()


def test_an_optimizer_that_a_rule_must_know_is_refused_before_anything_changes():
    module = Regression(optimizer=Unknown)
    with pytest.raises(MisconfigurationException, match=r"weight_decay='timescale' must know how Unknown"):
        run(module, loader(16), LargeBatchRegime(4, lr_rule="none", **RULES))
    optimizer = module.optimizers(use_pl_optimizer=False)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 5e-4]


def test_a_loop_of_ones_own_applies_the_same_rules():
    weight = torch.zeros(1, requires_grad=True)
    for train_longer, expected in ((0.0, (0.2, 0.99**4)), (1.0, (0.05, 0.99))):
        optimizer = ADAMW([weight], lr=1e-3)
        plan = plan_regime(
            reference_batch_size=4, batch_size=16, samples=64, max_epochs=2, train_longer=train_longer, **RULES
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            clock = plan.apply(optimizer)
        group = optimizer.param_groups[0]
        assert (group["weight_decay"], group["betas"][1]) == pytest.approx(expected)
        assert clock.plan.hyperparameters[0][0] == "weight decay, group 0 (timescale)"


@pytest.mark.parametrize("name", ["weight_decay_rule", "betas_rule", "ema_rule"])
def test_rules_that_are_not_known_are_refused_early(name):
    with pytest.raises(ValueError, match=name.removesuffix("_rule")):
        LargeBatchRegime(4, **{name: "cube"})


@pytest.mark.parametrize("train_longer", [0.0, 0.25, 0.5, 1.0])
def test_a_run_that_updates_limit_passes_as_one_that_epochs_do(train_longer):
    batches = {"reference_batch_size": 32, "batch_size": 256, "train_longer": train_longer}
    epochs = plan_regime(**batches, samples=5120, max_epochs=10)
    steps = dataclasses.replace(epochs, reference_updates_per_epoch=None, updates_per_epoch=None)
    assert steps.passed == pytest.approx(epochs.passed)
    assert steps.passed == pytest.approx(8 / (1 + 7 * train_longer))
