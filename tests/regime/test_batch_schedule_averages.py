"""Moving averages of the weights under a batch that grows: half-lives in samples, resuming, and given back."""

import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regime_runs import EPOCHS, SAMPLES, SCHEDULES, Regression, SaveAt, loader, run
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_avg_fn

from lightning_gap import BatchSizeSchedule
from lightning_gap.regime.weight_averages import FollowingAverages
from lightning_gap.trainer.internals.of_lightning import averaged_model
from lightning_gap.trainer.internals.of_torch import ema_decay

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*have no .val_dataloader.*", "ignore:.*callbacks used to create.*", "ignore:.*configure_model.*"
)
BASE, DECAY = 4, 0.9
STEPS = [(0, BASE), (100, 12), (200, 20)]


class Notes(Callback):
    """The samples of each update, the weights after it, and the average's at the end of each epoch."""

    def __init__(self, average, parts=1):
        self.average, self.sizes, self.weights, self.averages, self.ends = average, [], [], [], []
        self._samples = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._samples += len(batch[0])
        if trainer.global_step > len(self.sizes):
            self.sizes.append(self._samples)
            self.weights.append(pl_module.layer.weight.detach().clone())
            self._samples = 0

    def on_train_epoch_end(self, trainer, pl_module):
        self.ends.append(len(self.sizes))
        self.averages.append(averaged_model(self.average).module.layer.weight.detach().clone())


def module():
    return Regression(partial(SCHEDULES["StepLR"], unit=1), lr=0.02)


def averaging(multi=False):
    return WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(DECAY)) if multi else EMAWeightAveraging(decay=DECAY)


def twin(notes, rule):
    """The average in plain Python: of the weights after each update, by the samples that the update has."""
    average, found = None, []
    for number, (samples, weight) in enumerate(zip(notes.sizes, notes.weights, strict=True), start=1):
        decay = rule(DECAY, samples / BASE)
        average = weight.double() if average is None else decay * average + (1 - decay) * weight.double()
        if number in notes.ends:
            found.append(average)
    return found


@pytest.mark.parametrize("first", [False, True], ids=["average last", "average first"])
@pytest.mark.parametrize("most", [None, 5])
@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("schedule", [STEPS, "seesaw"])
def test_the_average_is_that_of_a_slow_twin(first, most, multi, schedule):
    average = averaging(multi)
    growing = BatchSizeSchedule(schedule, max_device_batch_size=most, multiple_of=1)
    notes = Notes(average)
    trained = module()
    run(trained, loader(BASE), *((average, growing) if first else (growing, average)), notes)
    assert sum(notes.sizes) == SAMPLES * EPOCHS
    assert len(set(notes.sizes)) > 2
    expected = twin(notes, lambda decay, ratio: decay**ratio)
    for there, wanted in zip(notes.averages, expected, strict=True):
        torch.testing.assert_close(there.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trained.layer.weight.detach().double(), expected[-1], rtol=1e-5, atol=1e-6)
    assert ema_decay(averaged_model(average)) == DECAY


@pytest.mark.parametrize(
    ("rule", "decay"),
    [("none", lambda decay, ratio: decay), (lambda decay, ratio: decay / ratio, lambda decay, ratio: decay / ratio)],
)
def test_other_rules(rule, decay):
    average = averaging()
    notes = Notes(average)
    run(module(), loader(BASE), BatchSizeSchedule(STEPS, ema_rule=rule), average, notes)
    for there, wanted in zip(notes.averages, twin(notes, decay), strict=True):
        torch.testing.assert_close(there.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", [False, True])
def test_an_average_of_epochs_keeps_its_decay(first):
    class OfEpochs(WeightAveraging):
        def should_update(self, step_idx=None, epoch_idx=None):
            return epoch_idx is not None

    average = OfEpochs(multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    growing, notes = BatchSizeSchedule(STEPS), Notes(average)
    run(module(), loader(BASE), *((average, growing) if first else (growing, average)), notes)
    wanted = None
    for there, number in zip(notes.averages, notes.ends, strict=True):
        weight = notes.weights[number - 1].double()
        wanted = weight if wanted is None else DECAY * wanted + (1 - DECAY) * weight
        torch.testing.assert_close(there.double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_batch_that_stays_has_the_users_decay_to_the_last_bit():
    ends = []
    for callbacks in ((), (BatchSizeSchedule([(0, BASE)]),)):
        trained = module()
        run(trained, loader(BASE), *callbacks, averaging())
        ends.append(trained.layer.weight.detach().clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end"])
@pytest.mark.parametrize("first", [False, True])
def test_a_resumed_average_is_bit_for_bit_the_uninterrupted_one(tmp_path, hook, first):
    def fit(*others, ckpt_path=None):
        trained = module()
        mine = [averaging(), BatchSizeSchedule(STEPS, max_device_batch_size=7)]
        run(trained, loader(BASE, shuffle=True), *(mine if first else mine[::-1]), *others, ckpt_path=ckpt_path)
        return trained

    saves = SaveAt(tmp_path, hook)
    if hook == "on_train_batch_end":  # within updates as well
        saves = EveryBatch(tmp_path)
    whole = fit(saves)
    # Of a run that is over Lightning trains nothing more, and leaves the average where it is.
    for name in saves.saved[: -1 : max(1, len(saves.saved) // 6)]:
        part = fit(ckpt_path=tmp_path / f"{name}.ckpt")
        for a, b in zip(whole.parameters(), part.parameters(), strict=True):
            assert torch.equal(a, b), name


class EveryBatch(Callback):
    def __init__(self, path):
        self.path, self.saved = path, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.saved.append(f"{trainer.current_epoch}-{batch_idx}")
        trainer.save_checkpoint(self.path / f"{self.saved[-1]}.ckpt")


def test_a_checkpoint_of_another_rule_is_refused_and_one_of_before_goes_on(tmp_path):
    run(module(), loader(BASE), BatchSizeSchedule(STEPS, ema_rule="none"), averaging(), SaveAt(tmp_path), max_epochs=1)
    (path,) = tmp_path.iterdir()
    with pytest.raises(MisconfigurationException, match=r"ema_rule='none' and not 'half_life'"):
        run(module(), loader(BASE), BatchSizeSchedule(STEPS), averaging(), ckpt_path=path)
    saved = torch.load(path, weights_only=True)
    del saved["callbacks"]["BatchSizeSchedule"]["ema_rule"]
    torch.save(saved, path)
    run(module(), loader(BASE), BatchSizeSchedule(STEPS, ema_rule="none"), averaging(), ckpt_path=path)


def test_the_decay_is_given_back_after_an_exception():
    class Fails(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 30:
                assert ema_decay(averaged_model(average)) == pytest.approx(DECAY**3)
                raise RuntimeError("on purpose")

    average = averaging()
    with pytest.raises(RuntimeError, match="on purpose"):
        run(module(), loader(BASE), BatchSizeSchedule(STEPS), average, Fails())
    assert ema_decay(averaged_model(average)) == DECAY


def test_the_table_has_the_decays(capsys):
    run(module(), loader(BASE), BatchSizeSchedule(STEPS), averaging())
    assert f"half_life, {DECAY**5:.6g}" in " ".join(capsys.readouterr().out.split())


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match=r"ema_rule='quarter_life' is not known"):
        BatchSizeSchedule(STEPS, ema_rule="quarter_life")
    for callbacks in ((), (WeightAveraging(avg_fn=get_swa_avg_fn()),)):
        with pytest.raises(MisconfigurationException, match=r"ema_rule=half_life finds no moving average .*EMAWeight"):
            run(module(), loader(BASE), BatchSizeSchedule(STEPS, ema_rule="half_life"), *callbacks)
        run(module(), loader(BASE), BatchSizeSchedule(STEPS), *callbacks, max_epochs=1)  # nothing to follow
    with pytest.raises(MisconfigurationException, match=r"gave 1.5 for the decay 0.9"):
        run(module(), loader(BASE), BatchSizeSchedule(STEPS, ema_rule=lambda decay, ratio: 1.5), averaging())
    for late in (lambda decay, ratio: decay if ratio < 3 else 1.5, lambda decay, ratio: None):
        with pytest.raises(MisconfigurationException, match=r"for the decay 0.9; from 0 to 1"):
            run(module(), loader(BASE), BatchSizeSchedule(STEPS, ema_rule=late), averaging())


def test_an_average_that_starts_at_an_update_is_warned_of():
    with pytest.warns(UserWarning, match=r"at update 30 of this run, and 27 of them see the samples that 30 of the"):
        run(
            module(),
            loader(BASE),
            BatchSizeSchedule(STEPS),
            EMAWeightAveraging(decay=DECAY, update_starting_at_step=30),
        )


def test_half_lives_in_samples():
    average = EMAWeightAveraging(decay=DECAY)
    average._average_model = torch.optim.swa_utils.AveragedModel(
        torch.nn.Linear(1, 1), avg_fn=torch.optim.swa_utils.get_ema_avg_fn(DECAY)
    )
    ours = Callback()
    (decay,) = FollowingAverages([average, ours], None, ours).at(7.5)
    assert math.log(0.5, decay) * 7.5 == pytest.approx(math.log(0.5, DECAY))


def test_a_module_that_holds_the_trainer_is_averaged():
    """As one does that a command line makes with an optimizer of its own: the average is a deep copy of it."""

    class Holds(Callback):
        def setup(self, trainer, pl_module, stage):
            pl_module.made = partial(print, trainer)

    average = averaging()
    notes, trained = Notes(average), module()
    run(trained, loader(BASE), BatchSizeSchedule(STEPS), Holds(), average, notes)
    expected = twin(notes, lambda decay, ratio: decay**ratio)
    torch.testing.assert_close(trained.layer.weight.detach().double(), expected[-1], rtol=1e-5, atol=1e-6)
