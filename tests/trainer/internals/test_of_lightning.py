"""What the private names of Lightning, and of torchmetrics, do in the installed versions, one test a name.

A test that fails here says which name of which package has changed; its function in ``trainer/internals`` is to mend.
"""

from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torchmetrics import MeanMetric

from lightning_gap.trainer.internals import of_lightning as lightning
from lightning_gap.trainer.internals import of_torch as internals


class Asks(Callback):
    """Asks a question in a hook of a run of two epochs of three updates, every second of which is logged."""

    def __init__(self, hook, question):
        self.answers = []
        setattr(self, hook, lambda trainer, module, *_: self.answers.append(question(trainer, module)))


def answers(hook, question, callbacks=()):
    asks = Asks(hook, question)
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = Trainer(
        max_epochs=2, limit_train_batches=3, limit_val_batches=0, log_every_n_steps=2, accelerator="cpu", logger=False,
        enable_checkpointing=saves, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[asks, *callbacks],
    )  # fmt: skip
    trainer.fit(BoringModel())
    return asks.answers


def test_batches_that_stepped_are_the_updates_before_this_one():
    assert answers("on_train_batch_end", lambda t, _: lightning.batches_that_stepped(t)) == [0, 1, 2, 3, 4, 5]


def test_the_source_of_training_data_is_known_before_they_are_loaded():
    data = BoringDataModule()

    class Sees(Callback):
        def setup(self, trainer, pl_module, stage):
            assert trainer.train_dataloader is None
            self.source = lightning.training_source(trainer)

    sees = Sees()
    trainer = Trainer(fast_dev_run=True, accelerator="cpu", callbacks=[sees], enable_progress_bar=False)
    trainer.fit(BoringModel(), datamodule=data)
    assert sees.source is data


def test_training_loaders_are_those_of_the_loop():
    found = answers("on_train_start", lambda t, _: (lightning.training_loaders(t), t.train_dataloader))
    (loaders, mode), public = found[0]
    assert loaders is public
    assert mode == "max_size_cycle"


def test_a_batch_is_prepared_by_the_modules_hook():
    class Module(BoringModel):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch + 1

    assert lightning.prepared_batch(Module(), torch.zeros(2)).tolist() == [1, 1]


def test_logs_are_updated_every_so_many_updates():
    assert answers("on_train_batch_end", lambda t, _: lightning.updates_logs(t)) == [False, True] * 3


@pytest.mark.parametrize(("interval", "seconds"), [(1.0, None), (2, None), (timedelta(seconds=90), 90.0)])
def test_validation_by_time_is_told_in_seconds(interval, seconds):
    trainer = Trainer(accelerator="cpu", val_check_interval=interval, logger=False)
    assert lightning.validation_seconds(trainer) == seconds


@pytest.mark.parametrize(("devices", "injects", "sharded"), [(1, True, False), (2, True, True), (2, False, False)])
def test_loaders_are_sharded_by_a_trainer_of_several_processes(devices, injects, sharded):
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", use_distributed_sampler=injects
    )
    assert lightning.shards_loaders(trainer) is sharded


def test_a_strategy_of_several_processes_replaces_batchnorm():
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", sync_batchnorm=True)
    assert lightning.replaces_batchnorm(trainer.strategy)
    assert not lightning.replaces_batchnorm(DDPStrategy())
    assert not lightning.replaces_batchnorm(SingleDeviceStrategy())


def test_a_compiled_module_is_known():
    from lightning.pytorch.utilities.compile import from_compiled

    assert lightning.is_compiled_by_lightning(from_compiled(torch.compile(BoringModel())))
    assert not lightning.is_compiled_by_lightning(BoringModel())


def test_a_module_without_a_trainer_has_none():
    module, trainer = BoringModel(), Trainer(accelerator="cpu", logger=False)
    assert lightning.trainer_if_any(module) is None
    module.trainer = trainer
    assert lightning.trainer_if_any(module) is trainer


def test_a_checkpoint_saves_in_the_epochs_that_it_is_told(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    assert lightning.checkpoint_epochs(checkpoint) == (1, True)

    def second_only(trainer, module):
        lightning.set_checkpoint_epochs(checkpoint, 2**62 if trainer.current_epoch == 0 else 1)

    answers("on_train_epoch_start", second_only, callbacks=[checkpoint])
    assert [path.stem for path in tmp_path.iterdir()] == ["epoch=1-step=6"]
    assert lightning.checkpoint_epochs(ModelCheckpoint(every_n_train_steps=5)) == (0, False)


def test_early_stopping_looks_in_the_epochs_that_it_is_told():
    looked = []

    class Looks(EarlyStopping):
        def _run_early_stopping_check(self, trainer):
            looked.append(trainer.current_epoch)

    stopping = Looks("loss", check_on_train_epoch_end=True)
    assert lightning.stops_at_epoch_end(stopping)
    answers(
        "on_train_epoch_start",
        lambda t, _: lightning.set_stops_at_epoch_end(stopping, t.current_epoch == 1),
        callbacks=[stopping],
    )
    assert looked == [1]
    assert not lightning.stops_at_epoch_end(EarlyStopping("loss", check_on_train_epoch_end=False))


def test_a_finder_tells_whether_it_sets_and_has_found_a_rate(tmp_path):
    class Module(BoringModel):
        lr = 1e-4

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    finder = LearningRateFinder(num_training_steps=20)
    assert lightning.sets_the_rate(finder)
    assert not lightning.sets_the_rate(LearningRateFinder(update_attr=False))
    assert not lightning.found_a_rate(finder)
    trainer = Trainer(
        max_steps=1, accelerator="cpu", logger=False, default_root_dir=tmp_path, callbacks=[finder],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Module()
    trainer.fit(module)
    assert lightning.found_a_rate(finder) is (module.lr != 1e-4)


@pytest.mark.parametrize("kind", [BatchSizeFinder, LearningRateFinder])
def test_a_finder_of_the_tuner_ends_fit(kind):
    finder = kind()
    assert not lightning.ends_tuning(finder)
    finder._early_exit = True  # as Tuner does
    assert lightning.ends_tuning(finder)


def test_the_tuner_says_that_it_ends_fit_by_that_name():
    import inspect

    from lightning.pytorch.tuner import tuning

    assert "_early_exit = True" in inspect.getsource(tuning)


def test_a_hyperparameter_names_what_made_a_model():
    import inspect

    from lightning.pytorch import cli as lightnings
    from lightning.pytorch.core import saving

    for source in (lightnings, saving):
        assert lightning.INSTANTIATOR in inspect.getsource(source), source.__name__


def test_a_restricted_class_method_is_refused_by_instances():
    class Module(BoringModel):
        @lightning.restricted_classmethod
        def make(cls):
            return cls

    assert Module.make() is Module
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        Module().make()


def test_a_metric_is_drawn():
    pytest.importorskip("matplotlib")
    import matplotlib.pyplot as plt

    figure, ax = lightning.plot_metric(MeanMetric(), torch.tensor(2.0), None)
    assert ax.figure is figure
    plt.close(figure)


def test_reset_gives_a_metrics_default_states_back():
    metric = MeanMetric()
    lightning.default_states(metric)["mean_value"] = torch.tensor(7.0)
    metric.reset()
    assert metric.mean_value == 7.0


def test_a_callback_keeps_its_average():
    found = answers(
        "on_train_start",
        lambda trainer, _: [lightning.averaged_model(each) for each in trainer.callbacks],
        [EMAWeightAveraging(decay=0.75)],
    )
    kept = [each for each in found[0] if each is not None]
    assert [internals.ema_decay(each) for each in kept] == [0.75]


def test_the_source_of_training_data_is_replaced_and_given_back():
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    before = lightning.replace_training_source(trainer, "another")
    assert lightning.replace_training_source(trainer, before) == "another"


def test_another_counting_of_accumulation_is_in_force_until_it_is_given_back():
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, accumulate_grad_batches=3)
    give_back = lightning.take_accumulation(trainer, lambda: False, lambda: True)
    epoch_loop = trainer.fit_loop.epoch_loop
    assert epoch_loop._accumulated_batches_reached()
    assert epoch_loop.automatic_optimization._make_zero_grad_fn(0, None) is None
    trainer.accumulate_grad_batches = 7
    give_back()
    assert trainer.accumulate_grad_batches == 3
    assert not epoch_loop.automatic_optimization.__dict__.get("_make_zero_grad_fn")


def test_batches_of_an_epoch_are_counted_anew():
    class Counts(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            lightning.count_batches(trainer, 2)

    trainer = Trainer(
        max_epochs=1, limit_val_batches=0, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Counts()],
    )  # fmt: skip
    trainer.fit(BoringModel())
    assert trainer.global_step == 2
    assert trainer.val_check_batch == 2
