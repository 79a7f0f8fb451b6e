"""The Tuner, and its finders as callbacks, beside a regime."""

import math

import pytest
from lightning.pytorch.callbacks import (
    LearningRateFinder,
)
from lightning.pytorch.tuner import Tuner
from regime_runs import SaveAt, Trace, Tunable, run, trainer_of

from lightning_gap.regime import LargeBatchRegime
from lightning_gap.regime.scaling import Rate

pytestmark = pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*", "ignore:.*callbacks used to create.*")


@pytest.mark.filterwarnings("ignore:.*The `batch_size`.*", "ignore:.*batch size.*")
def test_the_tuner_may_scale_the_batch_first(tmp_path):
    model, regime = Tunable(), LargeBatchRegime(4)
    trainer = trainer_of(trace := Trace(), regime, default_root_dir=tmp_path)
    Tuner(trainer).scale_batch_size(model, max_trials=3, steps_per_trial=1)
    assert model.batch_size in (8, 16)
    assert (trainer.max_epochs, trainer.max_steps) == (6, -1)
    trainer.fit(model)
    assert trainer.global_step == 90
    assert trace.rates[0][0] == pytest.approx(1e-3 * math.sqrt(model.batch_size / 4))


def test_the_tuner_may_find_a_rate_that_is_not_scaled(tmp_path):
    model, regime = Tunable(), LargeBatchRegime(4, lr_rule="none")
    model.batch_size = 30
    trainer = trainer_of(trace := Trace(), regime, default_root_dir=tmp_path)
    Tuner(trainer).lr_find(model, num_training=5, attr_name="learning_rate", update_attr=False)
    assert (trainer.max_epochs, trainer.max_steps, trainer.global_step) == (6, -1, 0)
    trainer.fit(model)
    assert trainer.global_step == 90
    assert trace.rates[-1][0] == 1e-3


@pytest.mark.parametrize("update", [True, False])
def test_a_rate_that_the_tuner_found_is_not_scaled(update, tmp_path):
    class Read(Tunable):
        def configure_optimizers(self):
            self.lr = self.learning_rate
            return super().configure_optimizers()

    model, regime = Read(), LargeBatchRegime(4)
    trainer = trainer_of(trace := Trace(), regime, default_root_dir=tmp_path, max_epochs=1)
    Tuner(trainer).lr_find(model, num_training=20, attr_name="learning_rate", update_attr=update)
    model.batch_size = 30
    model.learning_rate = 0.02 if update else 1e-3  # what was found may be any value
    if update:
        with pytest.warns(UserWarning, match="it is not scaled"):
            trainer.fit(model)
        assert regime.plan.rate is Rate.FOUND
    else:
        trainer.fit(model)
    assert trainer.global_step == 15
    assert trace.rates[-1][0] == pytest.approx(0.02 if update else 1e-3 * math.sqrt(7.5))


def test_a_rate_finder_beside_the_regime_finds_the_rate_that_runs(tmp_path):
    model = Tunable()
    model.batch_size = 30

    def finder():
        return LearningRateFinder(num_training_steps=20, attr_name="learning_rate")

    options = {"default_root_dir": tmp_path, "max_epochs": 2}
    with pytest.warns(UserWarning, match="it is not scaled"):
        trainer, trace = run(model, None, LargeBatchRegime(4), finder(), save := SaveAt(tmp_path), **options)
    assert trainer.global_step == 30
    assert trace.rates[0][0] == model.learning_rate != 1e-3
    resumed = Tunable()
    resumed.batch_size = 30
    _, rest = run(resumed, None, LargeBatchRegime(4), ckpt_path=tmp_path / f"{save.saved[3]}.ckpt", **options)
    assert rest.rates == trace.rates[save.saved[3] :]


def test_the_rate_is_scaled_where_a_finder_has_found_none(tmp_path):
    model = Tunable()
    model.batch_size = 30
    finder = LearningRateFinder(num_training_steps=5, attr_name="learning_rate")  # too few to say anything
    _, trace = run(model, None, regime := LargeBatchRegime(4), finder, default_root_dir=tmp_path, max_epochs=2)
    assert model.learning_rate == 1e-3
    assert regime.plan.rate is Rate.RULED
    assert trace.rates[0][0] == pytest.approx(1e-3 * 7.5**0.5)
