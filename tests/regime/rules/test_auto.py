"""The rule that chooses: what it chooses, and that runs under it are what they say."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regime_runs import Regression, SaveAt, loader, run

from lightning_gap.regime import GradientNoiseScale, LargeBatchRegime, plan_regime
from lightning_gap.regime.rules.auto import choose, gain

pytestmark = pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*", "ignore:.*callbacks used to create.*")
RUN = {"ratio": 32.0, "batch_size": 4096, "train_longer": 0.0, "updates": 750}


@pytest.mark.parametrize(
    ("optimizer", "changes", "factor", "warmup", "why"),
    [
        ("SGD", {}, 32**0.5, 75, "sqrt, with a warm-up over 10 %"),
        ("SGD", {"train_longer": 1.0, "updates": 23450}, 32**0.5, 2345, "sqrt, with a warm-up"),
        ("SGD", {"ratio": 8.0, "updates": 196}, 8**0.5, 20, "sqrt, with a warm-up"),
        ("AdamW", {}, 32**0.5, 75, "sqrt, with a warm-up"),
        ("AdamW", {"train_longer": 0.1}, 32**0.5, 75, "sqrt, with a warm-up"),
        ("AdamW", {"train_longer": 1.0}, 1.0, 0, "as it is: for AdamW at equal updates no rule is derived"),
        ("LARS", {}, 1.0, 0, "as it is: LARS has no square-root rule"),
        ("Unknown", {}, 1.0, 0, "as it is: Unknown has no square-root rule"),
        ("SGD", {"updates": None}, 1.0, 0, "as it is: the run has no length"),
        ("SGD", {"ratio": 0.25}, 0.5, 0, "a smaller batch needs no warm-up"),
        ("SGD", {"ratio": 1.0}, 1.0, 0, "one batch"),
        ("SGD", {"noise_scale": 1e9}, 32**0.5, 75, "a noise scale of 1e+09 saves"),
        ("SGD", {"noise_scale": 1.0}, 1.0036, 75, "a noise scale of 1 saves"),
    ],
)
def test_what_it_chooses(optimizer, changes, factor, warmup, why):
    choice = choose([optimizer], **RUN | changes)
    assert choice.factor == pytest.approx(factor, rel=1e-3)
    assert choice.warmup_updates == warmup
    assert why in choice.why


@given(ratio=st.floats(1, 1e4), batch=st.floats(1, 1e6), noise=st.floats(1e-3, 1e9), more=st.floats(1, 100))
def test_the_gain_is_between_one_and_the_ratio_and_grows_with_the_noise(ratio, batch, noise, more):
    assert 1 - 1e-9 <= gain(ratio, batch, noise) <= ratio * (1 + 1e-9)
    assert gain(ratio, batch, noise) <= gain(ratio, batch, more * noise) * (1 + 1e-9)


def test_a_run_is_that_of_the_rule_that_was_chosen():
    traces = []
    for options in ({"lr_rule": "auto"}, {"warmup_updates": 9}):
        regime = LargeBatchRegime(4, **options)
        module = Regression()
        _, trace = run(module, loader(30), regime)
        traces.append((trace.rates, [each.tolist() for each in module.parameters()]))
        facts = regime.plan.to_dict()
        assert (facts["lr_factor"], facts["warmup_updates"]) == (math.sqrt(7.5), 9)
    assert traces[0] == traces[1]
    regime = LargeBatchRegime(4, lr_rule="auto")
    run(Regression(), loader(30), regime)
    assert ('lr_rule="auto"', "", "sqrt, with a warm-up over 10 % of the updates") in regime.plan.rows()
    assert LargeBatchRegime(4, lr_rule="auto", noise_scale=30.0).rules.weight_decay == "timescale"


def test_adamw_at_equal_updates_stays_as_it_is_and_at_equal_samples_has_all_of_its_rule():
    for longer, expected in ((True, (1e-3, 0.01, 0.999)), (False, (2e-3, 0.02, 0.999**4))):
        regime = LargeBatchRegime(4, lr_rule="auto", train_longer=longer)
        trainer, _ = run(Regression(optimizer=torch.optim.AdamW), loader(16), regime)
        group = trainer.optimizers[0].param_groups[0]
        assert (group["lr"], group["weight_decay"], group["betas"][1]) == pytest.approx(expected)


def test_what_is_given_wins():
    regime = LargeBatchRegime(
        4, lr_rule="auto", train_longer=False, warmup_updates=3, weight_decay_rule="none", betas_rule="none"
    )
    trainer, _ = run(Regression(optimizer=torch.optim.AdamW), loader(16), regime)
    group = trainer.optimizers[0].param_groups[0]
    assert (group["weight_decay"], group["betas"], regime.plan.warmup_updates) == (0.01, (0.9, 0.999), 3)


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path):
    whole, part = Regression(), Regression()
    _, full = run(whole, loader(30), LargeBatchRegime(4, lr_rule="auto"), SaveAt(tmp_path))
    _, trace = run(part, loader(30), LargeBatchRegime(4, lr_rule="auto"), ckpt_path=tmp_path / "8.ckpt")
    assert trace.rates == full.rates[8:]
    for a, b in zip(whole.parameters(), part.parameters(), strict=True):
        assert torch.equal(a, b)
    other = LargeBatchRegime(4, lr_rule="auto", noise_scale=10.0)
    with pytest.raises(MisconfigurationException, match=r"multiplied the learning rate by 2.7.* Resume with the noise"):
        run(Regression(), loader(30), other, ckpt_path=tmp_path / "8.ckpt")


def test_a_loop_of_ones_own_decides_when_it_applies_the_plan():
    plan = plan_regime(reference_batch_size=4, batch_size=16, samples=64, max_epochs=5, lr_rule="auto")
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    clock = plan.apply(sgd)
    assert (clock.plan.lr_factor, clock.plan.warmup_updates, sgd.param_groups[0]["lr"]) == (2.0, 8, 0.2)
    assert not plan.decided
    assert clock.plan.decided


def test_a_noise_scale_is_for_it_alone():
    for options in ({"noise_scale": 10.0}, {"lr_rule": "auto", "noise_scale": 0.0}):
        with pytest.raises(ValueError, match=r"noise_scale=.* must be positive samples"):
            LargeBatchRegime(4, **options)
    with pytest.raises(ValueError, match=r"noise_scale=nan .* not averaged out: measure longer"):
        LargeBatchRegime(4, lr_rule="auto", noise_scale=GradientNoiseScale().estimate.critical_batch_size)


def test_what_is_measured_beside_it_is_told_and_is_for_the_next_run(capsys):
    def fitted(*callbacks, **options):
        module = Regression()
        _, trace = run(module, loader(30), *callbacks, LargeBatchRegime(4, lr_rule="auto", **options))
        said = " ".join(capsys.readouterr().out.split())
        return trace.rates, [each.tolist() for each in module.parameters()], said

    *alone, said = fitted()
    assert "GradientNoiseScale" not in said
    noise = GradientNoiseScale(every_n_updates=1)
    *beside, said = fitted(noise)
    assert beside == alone
    assert "what GradientNoiseScale measures in this run is for the next one, as noise_scale=." in said
    critical = noise.estimate.critical_batch_size
    factor = math.sqrt(gain(7.5, 30, critical))
    assert f'With noise_scale={critical:.4g}, lr_rule="auto" would multiply' in said
    assert f"the learning rate by {factor:.4g} instead of {7.5**0.5:.4g}." in said
    # The next run does what was told, and measures on.
    regime = LargeBatchRegime(4, lr_rule="auto", noise_scale=critical)
    run(Regression(), loader(30), GradientNoiseScale(every_n_updates=1), regime)
    said = " ".join(capsys.readouterr().out.split())
    assert regime.plan.lr_factor == pytest.approx(factor)
    assert "the updates that a noise scale of" in regime.plan.why
    assert "is for the next one" not in said
