"""Checkpoints of a regime, second fits, and limits that are given back."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regime_runs import EPOCH_SCHEDULES, Regression, SaveAt, Trace, loader, run, trainer_of

from lightning_gap import UltraSlowDiffusion
from lightning_gap.regime import LargeBatchRegime

pytestmark = pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*", "ignore:.*callbacks used to create.*")


class Stateful(Regression):
    """Reads its loader from the module, unshuffled, so that a resumed run can be compared bit for bit."""

    def train_dataloader(self):
        return loader(16)

    val_dataloader = train_dataloader


class Batches(Callback):
    """The epoch and the index of each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((trainer.current_epoch, batch_idx))


def assert_resumes(path, at, **options):
    """Compare a run resumed from each of some checkpoints, by their updates, with the run that made them."""
    whole = Stateful(EPOCH_SCHEDULES["SequentialLR"])
    trainer, full = run(whole, None, LargeBatchRegime(7), SaveAt(path), **options)
    assert trainer.global_step == 54
    for step in at:
        part, batches = Stateful(EPOCH_SCHEDULES["SequentialLR"]), Batches()
        resumed, trace = run(part, None, LargeBatchRegime(7), batches, ckpt_path=path / f"{step}.ckpt", **options)
        assert resumed.global_step == 54
        assert trace.rates == full.rates[step:]
        assert trace.validated == [update for update in full.validated if update > step]
        assert batches.seen == [(update // 4, update % 4) for update in range(step, 54)]
        for a, b in zip(whole.parameters(), part.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("limit_val_batches", [0, None])
def test_resuming_from_every_epoch_equals_running_through(limit_val_batches, tmp_path):
    assert_resumes(tmp_path, [*range(4, 54, 4), 54], limit_val_batches=limit_val_batches)


def test_a_run_limited_by_updates_resumes(tmp_path):
    options = {"max_epochs": -1, "max_steps": 42, "limit_val_batches": 0}

    def module():
        return Stateful(EPOCH_SCHEDULES["StepLR"])

    whole, part = module(), module()
    _, full = run(whole, None, LargeBatchRegime(7), SaveAt(tmp_path), **options)
    _, rest = run(part, None, LargeBatchRegime(7), ckpt_path=tmp_path / "16.ckpt", **options)
    assert rest.rates == full.rates[16:]
    assert torch.equal(whole.layer.weight, part.layer.weight)
    done, none = run(module(), None, LargeBatchRegime(7), ckpt_path=tmp_path / "42.ckpt", **options)
    assert (done.global_step, none.rates, done.max_steps) == (42, [], 42)


def test_a_second_fit_is_planned_anew_and_the_limits_are_given_back():
    regime = LargeBatchRegime(4)
    trainer = trainer_of(regime, max_epochs=3, min_epochs=1)
    trainer.fit(Regression(EPOCH_SCHEDULES["StepLR"]), loader(30))
    assert trainer.global_step == 45
    assert (trainer.max_epochs, trainer.min_epochs, trainer.max_steps) == (3, 1, -1)
    first = regime.plan
    fresh = trainer_of(trace := Trace(), regime, max_epochs=3, min_epochs=1)
    fresh.fit(Regression(EPOCH_SCHEDULES["StepLR"]), loader(30))
    assert fresh.global_step == 45
    assert regime.plan == first
    assert trace.rates[0] == pytest.approx([1e-3 * 7.5**0.5, 5e-4 * 7.5**0.5])


@pytest.mark.filterwarnings("ignore:.*keeps its optimizer.*")
def test_an_optimizer_that_is_kept_is_not_scaled_again():
    class Keeps(Regression):
        kept = None

        def configure_optimizers(self):
            self.kept = self.kept or super().configure_optimizers()
            return self.kept

    model = Keeps()
    run(model, loader(30), LargeBatchRegime(4), max_epochs=1)
    with pytest.raises(MisconfigurationException, match="an optimizer of an earlier fit"):
        run(model, loader(30), LargeBatchRegime(4), max_epochs=1)
    assert model.kept.param_groups[0]["lr"] == pytest.approx(1e-3 * 7.5**0.5)
    run(model, loader(30), LargeBatchRegime(30), max_epochs=1)  # nothing to scale


@pytest.mark.filterwarnings("ignore:.*will run with no optimizer.*")
def test_a_module_without_an_optimizer_runs():
    class Without(Regression):
        def configure_optimizers(self):
            return None

    regime, diffusion = LargeBatchRegime(4, lr_rule="none"), UltraSlowDiffusion()
    trainer, _ = run(Without(), loader(30), regime, diffusion, max_epochs=1)
    assert trainer.global_step == 15
    assert diffusion.trace["distance"][-1] == 0.0


def test_the_same_trainer_fits_again():
    regime = LargeBatchRegime(7)
    trainer = trainer_of(trace := Trace(), regime, max_epochs=3)
    model = Regression(EPOCH_SCHEDULES["StepLR"])
    trainer.fit(model, loader(25))
    trainer.fit_loop.max_epochs = 8
    trainer.fit(model, loader(25))
    assert trainer.global_step == 8 * 9
    _, reference = run(Regression(EPOCH_SCHEDULES["StepLR"]), loader(7), max_epochs=5)
    expected = math.sqrt(25 / 7) * reference.tensor
    torch.testing.assert_close(trace.tensor[27:], expected, rtol=1e-9, atol=0)


def test_an_exception_gives_the_limits_back():
    class Fails(Callback):
        def on_train_batch_end(self, trainer, *args):
            raise RuntimeError("stop")

    trainer = trainer_of(LargeBatchRegime(7), Fails(), max_epochs=3)
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(Regression(), loader(25))
    assert (trainer.max_epochs, trainer.max_steps) == (3, -1)


def test_an_earlier_callback_that_saves_at_a_reference_epoch_loses_no_step(tmp_path):
    class Saves(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 36:
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    def module():
        return Stateful(EPOCH_SCHEDULES["StepLR"])

    _, full = run(module(), None, Saves(), LargeBatchRegime(7))
    _, rest = run(module(), None, LargeBatchRegime(7), ckpt_path=tmp_path / "early.ckpt")
    assert rest.rates == full.rates[36:]


@pytest.mark.parametrize("epochs", [1, 3, 4])
def test_more_epochs_may_be_asked_for_on_resume(epochs, tmp_path):
    def module():
        return Stateful(EPOCH_SCHEDULES["ExponentialLR"])

    trainer, _ = run(module(), None, LargeBatchRegime(7), max_epochs=epochs)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    _, full = run(module(), None, LargeBatchRegime(7), max_epochs=8)
    longer, rest = run(module(), None, LargeBatchRegime(7), max_epochs=8, ckpt_path=tmp_path / "last.ckpt")
    assert longer.global_step == 72
    assert rest.rates == full.rates[9 * epochs :]
    assert rest.validated[-1] == 72


def test_a_checkpoint_of_another_regime_is_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    trainer, _ = run(Regression(), loader(30), LargeBatchRegime(4), max_epochs=2)
    trainer.save_checkpoint(path)
    others = (
        (loader(30, samples=120), LargeBatchRegime(4)),
        (loader(30), LargeBatchRegime(4, lr_rule="linear")),
        (loader(30), LargeBatchRegime(4, train_longer=False)),
    )
    for data, regime in others:
        with pytest.raises(MisconfigurationException, match="another regime"):
            run(Regression(), data, regime, ckpt_path=path)
    trainer_of(LargeBatchRegime(4)).validate(Regression(), loader(60), ckpt_path=path, verbose=False)
    trainer.validate(Regression(), loader(60), ckpt_path=path, verbose=False)


def test_joining_a_run_of_another_callback_is_refused(tmp_path):
    trainer, _ = run(Regression(), loader(30), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(MisconfigurationException, match="without LargeBatchRegime"):
        run(Regression(), loader(30), LargeBatchRegime(4), ckpt_path=tmp_path / "plain.ckpt")
    run(Regression(), loader(30), LargeBatchRegime(30), ckpt_path=tmp_path / "plain.ckpt")  # changes nothing


def test_validate_test_and_predict_are_untouched():
    regime = LargeBatchRegime(4)
    trainer, model = trainer_of(regime), Regression()
    trainer.validate(model, loader(30), verbose=False)
    trainer.test(model, loader(30), verbose=False)
    trainer.predict(model, loader(30))
    assert regime.plan is None
    assert regime.state_dict() == {}
    assert trainer.max_epochs == 6
