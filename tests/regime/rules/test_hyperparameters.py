"""What hyperparameters become at another batch: each formula, at every ratio, for every optimizer in the table."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gap.regime import OPTIMIZERS, OptimizerKind, OptimizerRules

ADAMW = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
RATIOS = st.floats(1 / 64, 1024)
W = [torch.zeros(2, 2, requires_grad=True)]


def test_the_rules_load_no_torch():
    code = "import sys; from lightning_gap.regime.rules import OptimizerRules; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"


@given(ratio=RATIOS, pace=RATIOS, lr=st.sampled_from(["sqrt", "linear", "none"]))
def test_the_time_scale_of_weight_decay_stays_a_share_of_the_run(ratio, pace, lr):
    rules = OptimizerRules(lr, weight_decay="timescale")
    for equal_samples, passed in ((True, ratio), (False, 1.0)):
        new = ADAMW | rules.at("AdamW", ADAMW, ratio, equal_samples=equal_samples)
        assert new["lr"] * new["weight_decay"] == pytest.approx(passed * 1e-3 * 0.1)
    new = ADAMW | rules.at("AdamW", ADAMW, ratio, equal_samples=True, pace=pace)
    assert new["lr"] * new["weight_decay"] == pytest.approx(pace * 1e-3 * 0.1)


@given(ratio=RATIOS)
def test_under_the_square_root_decay_grows_or_falls_as_the_root(ratio):
    rules = OptimizerRules("sqrt", weight_decay="timescale")
    decays = [(ADAMW | rules.at("AdamW", ADAMW, ratio, equal_samples=same))["weight_decay"] for same in (True, False)]
    assert decays == [pytest.approx(0.1 * ratio**0.5), pytest.approx(0.1 / ratio**0.5)]


@given(first=RATIOS, second=RATIOS, betas=st.sampled_from([None, "half_life"]))
def test_two_steps_are_one(first, second, betas):
    rules = OptimizerRules("sqrt", weight_decay="timescale", betas=betas)
    once = ADAMW | rules.at("AdamW", ADAMW, first * second, equal_samples=True)
    there = ADAMW | rules.at("AdamW", ADAMW, first, equal_samples=True)
    twice = there | rules.at("AdamW", there, second, equal_samples=True)
    for key in ADAMW:
        assert twice[key] == pytest.approx(once[key])


@given(ratio=RATIOS)
def test_a_second_moment_keeps_its_half_life_in_samples(ratio):
    rules = OptimizerRules("none", betas="half_life")
    for name, group, index in (
        ("AdamW", ADAMW, 1),
        ("RAdam", ADAMW, 1),
        ("RMSprop", {"lr": 1.0, "alpha": 0.99, "momentum": 0.9}, None),
    ):
        new = rules.at(name, group, ratio, equal_samples=True)
        key = "alpha" if index is None else "betas"
        before, after = (each[key] if index is None else each[key][index] for each in (group, group | new))
        assert ratio * math.log(before) == pytest.approx(math.log(after))
        assert set(new) <= {key}
        assert index is None or (group | new)["betas"][0] == 0.9  # first moments stay, as in the paper
        assert rules.at(name, group, ratio, equal_samples=False) == {}


def test_the_sde_rule_comes_with_adams_and_is_refused_where_it_does_not_hold():
    expected = {"lr": 2e-3, "betas": (0.6, 0.996), "eps": 5e-9}
    for rules in (OptimizerRules("adam"), OptimizerRules("sqrt", betas="sde")):
        new = rules.at("AdamW", ADAMW, 4, equal_samples=True)
        assert set(new) == set(expected)
        assert new["betas"] == pytest.approx(expected["betas"])
        assert (new["lr"], new["eps"]) == (expected["lr"], expected["eps"])
        with pytest.raises(ValueError, match=r"at the ratio 8 would turn betas=0.9 into 0.2"):
            rules.at("AdamW", ADAMW, 8, equal_samples=True)
    assert set(OptimizerRules("adam", betas="half_life").at("AdamW", ADAMW, 64, equal_samples=True)) == {"lr", "betas"}


def test_only_decay_beside_the_gradient_follows():
    rules = OptimizerRules("none", weight_decay="timescale")
    made = [
        (torch.optim.SGD(W, lr=0.1, weight_decay=0.125), False),
        (torch.optim.Adam(W, lr=0.1, weight_decay=0.125), False),
        (torch.optim.Adam(W, lr=0.1, weight_decay=0.125, decoupled_weight_decay=True), True),
        (torch.optim.AdamW(W, lr=0.1, weight_decay=0.125), True),
        (torch.optim.NAdam(W, lr=0.1, weight_decay=0.125, decoupled_weight_decay=True), True),
        (torch.optim.RAdam(W, lr=0.1, weight_decay=0.125), False),
        (torch.optim.Adamax(W, lr=0.1, weight_decay=0.125), False),
        (torch.optim.RMSprop(W, lr=0.1, weight_decay=0.125), False),
        (torch.optim.Muon(W, lr=0.1, weight_decay=0.125), True),
    ]
    for optimizer, follows in made:
        group = optimizer.param_groups[0]
        # Decay within the gradient cancels against a gradient of its size, and decay beside it does not.
        W[0].data.fill_(1.0)
        W[0].grad = torch.full((2, 2), -0.125)
        optimizer.step()
        assert bool((W[0] == 1.0).all()) != follows, type(optimizer)
        new = rules.at(type(optimizer), group, 4, equal_samples=True)
        assert new == ({"weight_decay": 0.5} if follows else {}), type(optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_line_of_the_table_takes_every_rule(name):
    group = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "betas": (0.9, 0.99), "alpha": 0.9, "eps": 1e-8}
    rules = OptimizerRules("sqrt", weight_decay="timescale", betas="half_life", momentum="half_life")
    new = rules.at(name, group, 4, equal_samples=True)
    kind = OPTIMIZERS[name]
    assert ("weight_decay" in new) == (kind.decoupled is True)
    assert new["momentum"] == pytest.approx(0.9**4)
    assert new["lr"] == pytest.approx(0.2 * ((1 - 0.9**4) / 0.1 if kind.heavy_ball else 1))
    changed = {(key, index) for key, index in kind.second_moments}
    assert ("betas" in new, "alpha" in new) == (("betas", 1) in changed, ("alpha", None) in changed)


def test_a_heavy_ball_of_another_memory_goes_as_far():
    group = {"lr": 0.01, "momentum": 0.9}
    new = group | OptimizerRules("linear", momentum="half_life").at("SGD", group, 3, equal_samples=True)
    weight = torch.zeros(1, requires_grad=True)
    ends = []
    for each, updates in ((group, 3000), (new, 1000)):
        sgd = torch.optim.SGD([weight], **each)
        weight.data.zero_()
        for _ in range(updates):
            weight.grad = torch.ones(1)
            sgd.step()
        ends.append(weight.item())
    assert ends[1] == pytest.approx(ends[0], rel=0.01)


def test_functions_decide_by_name():
    seen = []

    def told(name, beta, ratio):
        seen.append((name, beta, ratio))
        return beta / 2

    rules = OptimizerRules(lambda ratio: 3.0, weight_decay=lambda ratio: ratio, betas=told)
    group = ADAMW | {"max_momentum": 0.8, "base_momentum": 0.6}
    new = rules.at("AdamW", group, 2, equal_samples=True)
    assert new == {
        "lr": 0.003,
        "weight_decay": 0.2,
        "betas": (0.45, 0.4995),
        "max_momentum": 0.4,
        "base_momentum": 0.3,
    }
    assert set(seen) == {("beta1", 0.9, 2), ("beta2", 0.999, 2), ("beta1", 0.8, 2), ("beta1", 0.6, 2)}
    assert OptimizerRules("none", betas=told).at("SGD", {"momentum": 0.9}, 2, equal_samples=True) == {"momentum": 0.45}
    with pytest.raises(ValueError, match=r"betas gave 1.9 for beta1=0.9"):
        OptimizerRules(betas=lambda name, beta, ratio: beta + 1).at("AdamW", ADAMW, 2, equal_samples=True)
    with pytest.raises(ValueError, match="weight_decay gave the factor -1"):
        OptimizerRules(weight_decay=lambda ratio: -1).at("AdamW", ADAMW, 2, equal_samples=True)


def test_an_optimizer_is_known_by_its_nearest_ancestor_or_by_a_line_of_yours(monkeypatch):
    class Mine(torch.optim.AdamW):
        pass

    rules = OptimizerRules("none", weight_decay="timescale", betas="half_life")
    expected = rules.at("AdamW", ADAMW, 4, equal_samples=True)
    for asked in (Mine, Mine(W), ("Mine", "AdamW", "object"), torch.optim.AdamW.__mro__):
        assert rules.at(asked, ADAMW, 4, equal_samples=True) == expected
    with pytest.raises(
        ValueError, match=r"weight_decay='timescale' must know how Unknown .* OPTIMIZERS\[\"Unknown\"\]"
    ):
        rules.at("Unknown", ADAMW, 4, equal_samples=True)
    assert OptimizerRules("sqrt").at("Unknown", ADAMW, 4, equal_samples=True) == {"lr": 0.002}
    monkeypatch.setitem(OPTIMIZERS, "Unknown", OptimizerKind(decoupled=True, second_moments=(("betas", 1),)))
    assert rules.at("Unknown", ADAMW, 4, equal_samples=True) == expected


def test_all_rates_of_a_group_follow_and_nothing_is_changed_in_it():
    rates = {key: float(at + 1) for at, key in enumerate(("lr", "initial_lr", "max_lr", "min_lr", "swa_lr"))}
    group = rates | {"weight_decay": 0, "params": W}
    before = dict(group)
    new = OptimizerRules("linear", weight_decay="timescale").at("AdamW", group, 3, equal_samples=True)
    assert new == {key: 3 * value for key, value in rates.items()}
    assert group == before
    rate = torch.tensor(0.5)
    found = OptimizerRules("sqrt").at("SGD", {"lr": rate, "momentum": 0.0}, 4, equal_samples=False)["lr"]
    assert isinstance(found, torch.Tensor)
    assert (found.item(), rate.item()) == (1.0, 0.5)
    assert OptimizerRules("sqrt").at("SGD", {"lr": None}, 4, equal_samples=False) == {}
    for same in (True, False):
        assert OptimizerRules("sqrt", "timescale", "half_life").at("AdamW", ADAMW, 1, equal_samples=same) == {}


@pytest.mark.parametrize("ratio", [0, -1, math.inf, math.nan])
def test_what_is_no_ratio_is_refused(ratio):
    with pytest.raises(ValueError, match=r"ratio=.* must be positive and finite"):
        OptimizerRules().at("SGD", {"lr": 0.1}, ratio, equal_samples=True)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"lr": "cube"}, "lr_rule='cube' is not known"),
        ({"weight_decay": "cube"}, r"weight_decay, 'cube', is not known; pass one of \['none', 'timescale'\] or a"),
        ({"betas": "cube"}, "betas, 'cube', is not known"),
        ({"momentum": "cube"}, "momentum, 'cube', is not known"),
    ],
)
def test_rules_that_are_not_known_are_refused_when_they_are_given(arguments, match):
    with pytest.raises(ValueError, match=match):
        OptimizerRules(**arguments)
