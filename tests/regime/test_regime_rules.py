"""Which optimizers a rule is for, what is doubtful of those it takes, and code that sets rates by hand."""

import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regime_runs import EPOCH_SCHEDULES, Regression, loader, run, trainer_of

from lightning_gap.regime import LargeBatchRegime
from lightning_gap.regime.refusals import sets_rate
from lightning_gap.regime.rules import OPTIMIZERS, RULES
from lightning_gap.regime.scaling import check_rule

pytestmark = pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*")

W = [torch.zeros(1, requires_grad=True)]


@pytest.mark.parametrize(("rule", "name"), [(rule.name, name) for rule in RULES.values() for name in rule.optimizers])
def test_a_rule_takes_the_optimizers_it_is_derived_for(rule, name):
    base = torch.optim.Adam if rule == "adam" else torch.optim.Optimizer
    kind = type(name, (base,), {})
    made = kind(W, lr=0.1) if rule == "adam" else kind(W, {"lr": 0.1})
    assert check_rule(made, rule, 2.0, 1.0) is None


@pytest.mark.parametrize("name", ["Adafactor", "SGDScheduleFree", "Prodigy", "Adagrad"])
def test_other_optimizers_are_refused_with_what_passes_and_run_under_none(name):
    made = type(name, (torch.optim.Optimizer,), {})(W, {"lr": 0.1})
    for rule in RULES.values():
        if rule.optimizers:
            with pytest.raises(ValueError, match=rf"rule for {rule.optimizers[0]}.*optimizer is {name}.*\"none\""):
                check_rule(made, rule.name, 2.0, 1.0)
    assert check_rule(made, "none", 2.0, 1.0) is None
    assert check_rule(made, "mine()", 2.0, 1.0) is None
    assert check_rule(made, "sqrt", 1.0, 1.0) is None  # nothing to scale


@pytest.mark.parametrize("name", [name for name, kind in OPTIMIZERS.items() if kind.adaptive])
def test_the_square_root_for_adaptive_optimizers_says_what_it_is(name):
    made = type(name, (torch.optim.Optimizer,), {})(W, {"lr": 0.1, "weight_decay": 0.1})
    longer, same = (check_rule(made, "sqrt", 4.0, share) for share in (1.0, 0.0))
    assert "betas and eps as they are" in longer
    assert "nobody's rule" in longer
    assert "nobody's rule" not in same
    assert ("its weight decay with it" in longer) == (OPTIMIZERS[name].decoupled is True)


class OwnRate(torch.optim.SGD):
    """An optimizer that finds its own rate, as Adafactor with ``relative_step``."""

    def __init__(self, params, lr=None):
        super().__init__(params, lr=0.1)
        for group in self.param_groups:
            group["lr"] = None

    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data.sub_(0.01 * weight.grad)
        return loss


class FindsItsRate(Regression):
    def configure_optimizers(self):
        return OwnRate(self.parameters())


def test_an_optimizer_without_a_rate_runs_under_none_alone():
    regime = LargeBatchRegime(4, lr_rule="none")
    trainer, _ = run_untraced(FindsItsRate(), regime)
    assert trainer.global_step == 90
    assert (regime.plan.learning_rates, regime.plan.curve) == ((), ())
    for rule in ("sqrt", float):
        with pytest.raises(MisconfigurationException, match=r'finds its own learning rate, .* lr_rule="none"'):
            run_untraced(FindsItsRate(), LargeBatchRegime(4, lr_rule=rule))


def run_untraced(module, regime, *others):
    trainer = trainer_of(regime, *others)
    trainer.fit(module, loader(30))
    return trainer, module


class Absolute(Regression):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step(closure=optimizer_closure)
        if self.trainer.global_step < 10:
            for group in optimizer.param_groups:
                group["lr"] = min(1.0, (self.trainer.global_step + 1) / 10) * self.lr


class Relative(Regression):
    def on_train_epoch_end(self):
        for group in self.optimizers().param_groups:
            group["lr"] = group["lr"] * 0.5


class AbsoluteCallback(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        trainer.optimizers[0].param_groups[0]["lr"] = 0.1


def test_a_rate_that_is_set_by_hand_is_refused_where_it_would_not_be_scaled():
    with pytest.raises(MisconfigurationException, match=r"Absolute.optimizer_step sets a learning rate .* LinearLR"):
        run(Absolute(), loader(30), LargeBatchRegime(4))
    with pytest.raises(MisconfigurationException, match=r"AbsoluteCallback.on_train_batch_start sets a learning rate"):
        run(Regression(), loader(30), AbsoluteCallback(), LargeBatchRegime(4))
    for module in (Absolute(), Regression()):
        run(module, loader(30), LargeBatchRegime(4, lr_rule="none"), AbsoluteCallback())
    run(Absolute(), loader(4), LargeBatchRegime(4))  # nothing to scale
    _, trace = run(Relative(), loader(30), LargeBatchRegime(4), max_epochs=1)
    assert trace.rates[-1][0] == pytest.approx(1e-3 * 7.5**0.5 * 0.5**7)


class LoopOfAnyName(Regression):
    def on_train_batch_start(self, batch, batch_idx):
        for each in self.optimizers().param_groups:
            each["lr"] = 0.1


class FallsInAnEpoch(Regression):
    def on_train_epoch_start(self):
        if self.current_epoch == 3:
            for group in self.optimizers().param_groups:
                group["lr"] *= 0.1


def test_a_rate_that_is_changed_in_an_epoch_of_this_run_is_warned_of():
    with pytest.warns(UserWarning, match=r"FallsInAnEpoch.on_train_epoch_start changes .* reference_epoch"):
        run(FallsInAnEpoch(), loader(30), LargeBatchRegime(4), max_epochs=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*current_epoch.*")
        run(FallsInAnEpoch(), loader(30), LargeBatchRegime(4, train_longer=False), max_epochs=1)


def test_a_group_is_known_by_what_it_is_taken_from():
    with pytest.raises(MisconfigurationException, match=r"LoopOfAnyName.on_train_batch_start sets a learning rate"):
        run(LoopOfAnyName(), loader(30), LargeBatchRegime(4))


class StepsByItself(Regression):
    def on_train_epoch_end(self):
        self.lr_schedulers().step()


class ReadsSchedulers(Regression):
    def on_train_epoch_end(self):
        assert self.lr_schedulers().get_last_lr()


def test_schedulers_that_are_stepped_by_hand_are_refused():
    schedule = EPOCH_SCHEDULES["StepLR"]
    with pytest.raises(MisconfigurationException, match=r"StepsByItself.on_train_epoch_end steps schedulers by itself"):
        run(StepsByItself(schedule), loader(30), LargeBatchRegime(4))
    run(StepsByItself(schedule), loader(4), LargeBatchRegime(4))  # the reference run itself
    run(ReadsSchedulers(schedule), loader(30), LargeBatchRegime(4))


def test_a_module_that_keeps_its_optimizer_is_warned_of():
    class Keeps(Regression):
        def configure_optimizers(self):
            self.mine = super().configure_optimizers()
            return self.mine

    with pytest.warns(UserWarning, match="keeps its optimizer as mine, whose learning rates stay scaled after fit"):
        run(Keeps(), loader(30), LargeBatchRegime(4), max_epochs=1)


def test_weight_decay_and_rate_of_adamw_are_told_at_run_time():
    adamw = partial(torch.optim.AdamW, weight_decay=0.1)
    with pytest.warns(UserWarning, match=r"weight decay with it.*nobody's rule"):
        run(Regression(optimizer=adamw), loader(30), LargeBatchRegime(4), max_epochs=1)


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        ('group["lr"] = 0.1', True),
        ("pg['lr'] = self.rate * 2", True),
        ('optimizer.param_groups[0]["lr"] = rate', True),
        ('for g in groups: g["lr"] = 1e-3', True),
        ('param_group.update({"lr": 0.1})', True),
        ("optimizer.param_groups[0].update(lr=rate)", True),
        ('group["lr"].fill_(0.1)', True),
        ('self.hparams.update({"lr": 0.1})', False),
        ("config.update(lr=0.1)", False),
        ('group["lr"] *= 0.1', False),
        ('group["lr"] = group["lr"] * 0.1', False),
        ('group["lr"] = group["initial_lr"] / 2', False),
        ('if group["lr"] == 0.1:', False),
        ('# group["lr"] = 0.1', False),
        ('self.hparams["lr"] = 0.1', False),
        ('config["lr"] = 0.1', False),
    ],
)
def test_which_lines_set_a_rate(line, refused):
    assert sets_rate(line) == refused
