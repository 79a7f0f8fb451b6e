"""A trainer's limits, the user's and a run's; what becomes of schedulers and of a rate, in words and in checkpoints."""

from fractions import Fraction

import pytest
from regime_runs import trainer_of

from lightning_gap.regime import plan_regime
from lightning_gap.regime.clock import Fate, SchedulerFate
from lightning_gap.regime.limits import Limits, RunLimits
from lightning_gap.regime.resume import disagreements
from lightning_gap.regime.scaling import Rate

PLAN = plan_regime(reference_batch_size=4, batch_size=12, samples=60, max_epochs=6)


@pytest.mark.parametrize(("asked", "epochs", "updates"), [
    ({"max_epochs": 3}, 3, None),
    ({"max_epochs": -1, "max_steps": 7}, None, 7),
    ({"max_epochs": 3, "max_steps": 7}, 3, 7),
])  # fmt: skip
def test_limits_are_those_that_the_user_gave(asked, epochs, updates):
    limits = Limits.of(trainer_of(**asked))
    assert (limits.epochs, limits.updates, limits.only_updates) == (epochs, updates, epochs is None)


def test_a_runs_limits_take_the_place_of_the_users_once_and_are_given_back():
    trainer, limits = trainer_of(max_epochs=6, min_epochs=2), RunLimits()
    users = Limits.of(trainer)
    for _ in range(2):
        limits.set(trainer, PLAN)
        assert Limits.of(trainer) == (PLAN.epochs, PLAN.min_epochs, PLAN.max_steps)
    limits.lift_updates(trainer)
    limits.lift_epochs(trainer)
    assert Limits.of(trainer) == (-1, PLAN.min_epochs, -1)
    limits.begin(trainer, PLAN, changed=False)
    assert Limits.of(trainer) == (PLAN.epochs, PLAN.min_epochs, PLAN.max_steps)
    limits.give_back(trainer)
    limits.lift_epochs(trainer)  # nothing to lift: they are the user's
    assert Limits.of(trainer) == users


@pytest.mark.parametrize(("fate", "words"), [
    (Fate.AS_IT_WAS, "StepLR: every 2 epoch(s), as it was"),
    (Fate.THIS_RUNS, "StepLR: every 2 epoch(s), has this run's length"),
    (Fate.AT_EPOCH_END, "StepLR: every 2 reference epoch(s), at the end of an epoch of this run"),
    (Fate.BY_EPOCHS, "StepLR: every 2 reference epoch(s), 1.5 updates"),
    (Fate.BY_UPDATES, "StepLR: every 2 update(s), as in the reference run"),
    (Fate.BY_PACE, "StepLR: 1.5 times an update, through the reference run's length"),
])  # fmt: skip
def test_fates_in_words(fate, words):
    assert str(SchedulerFate("StepLR", fate, "epoch", 2, float(Fraction(3, 2)))) == words


def test_a_rate_that_was_found_is_a_word_in_checkpoints_of_any_age():
    found = PLAN.with_found_rate()
    saved = found.to_dict()
    assert saved["lr_rule"] == "found"
    assert (found.rate, found.lr_rule, found.lr_factor, found.moment_ratio) == (Rate.FOUND, "sqrt", 1.0, 1.0)
    assert PLAN.with_rate_of(saved) == found
    assert PLAN.with_rate_of(PLAN.to_dict()) is PLAN
    assert disagreements(found, saved) == []
    assert disagreements(PLAN, saved)[0] == "lr_rule was 'found' and is 'sqrt'"
