"""What the private names of Lightning, torch and others do in the installed versions, one test a name.

A test that fails here says which name of which package has changed; its function in ``trainer/internals`` is to mend.
"""

import argparse
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
from torch import nn
from torch.optim import swa_utils
from torchmetrics import MeanMetric

from lightning_gap.trainer.internals import of_lightning as lightning
from lightning_gap.trainer.internals import of_others as others
from lightning_gap.trainer.internals import of_torch as internals
from lightning_gap.trainer.internals.guard import PrivateNameGoneError, bound, private, set_private


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


# ---------------------------------------------------------------- the guard


def test_a_name_that_is_gone_is_named_with_its_package_and_version():
    with pytest.raises(PrivateNameGoneError, match=rf"torch {torch.__version__.split('+')[0]}.* has no Linear\._gone"):
        private(nn.Linear(1, 1), "_gone", "torch")
    with pytest.raises(PrivateNameGoneError, match=r"has no Linear\._gone"):
        set_private(nn.Linear(1, 1), "_gone", 1, "torch")


def test_a_function_that_is_gone_says_so_when_it_is_called():
    gone = bound(torch, "_gone", "torch")
    with pytest.raises(PrivateNameGoneError, match=r"torch\._gone"):
        gone(1)


# ---------------------------------------------------------------- Lightning


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


# ------------------------------------------------------------- torchmetrics


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


# -------------------------------------------------------------------- torch


def test_every_batchnorm_has_one_base():
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LazyBatchNorm1d)
    assert all(issubclass(kind, internals.BatchNormBase) for kind in kinds)
    assert not issubclass(nn.InstanceNorm1d, internals.BatchNormBase)


def test_a_batchnorm_layer_refuses_other_dimensions():
    internals.check_input_dim(nn.BatchNorm2d(3), torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="expected 4D input"):
        internals.check_input_dim(nn.BatchNorm2d(3), torch.zeros(1, 3))


def test_trees_are_walked():
    tree = {"a": [1, (2, 3)]}
    assert internals.tree_leaves(tree) == [1, 2, 3]
    assert internals.tree_map(lambda leaf: leaf + 1, tree) == {"a": [2, (3, 4)]}


def test_a_module_keeps_its_parameters_and_parts_in_two_tables():
    module = nn.Sequential(nn.Linear(1, 1))
    assert all(name in vars(module) for name in internals.MODULE_TABLES)


def test_a_function_is_applied_to_a_module():
    layer = nn.BatchNorm1d(2)
    internals.apply_to_module(layer, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    assert layer.weight.dtype == layer.running_mean.dtype == torch.float64


def test_a_false_condition_is_an_error_with_its_message():
    internals.assert_async(torch.tensor(True), "fine")
    with pytest.raises(RuntimeError, match="not fine"):
        internals.assert_async(torch.tensor(False), "not fine")


def test_writing_changes_a_tensors_version():
    tensor = torch.zeros(2)
    before = internals.version_of(tensor)
    tensor.detach().add_(1)
    assert internals.version_of(tensor) > before


def test_transforms_and_forward_mode_are_seen():
    assert not internals.transforms_run()
    assert torch.func.vmap(lambda _: internals.transforms_run(), out_dims=None)(torch.ones(2))
    with torch.autograd.forward_ad.dual_level():
        assert internals.transforms_run()


def test_a_tensor_within_a_transform_is_seen():
    assert not internals.is_wrapped_by_transform(torch.ones(1))
    assert torch.func.vmap(internals.is_wrapped_by_transform, out_dims=None)(torch.ones(2))


def test_gradients_that_come_batched_are_seen():
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: seen.append(internals.is_batched(grad)))
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(2))
    assert seen == [True, False]


def test_distances_have_a_gradient_that_is_zero_at_zero():
    x, y, grad = torch.randn(4, 3), torch.randn(5, 3), torch.randn(4, 5)
    y[0] = x[0]
    distances = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    found = internals.distances_backward(grad, x, y, 2.0, distances)
    pulls = (x[:, None] - y) / distances.clamp(min=1e-30)[..., None]
    torch.testing.assert_close(found, (grad[..., None] * pulls).sum(1))


def test_batch_norm_writes_the_batchs_own_moments_with_momentum_one():
    x, weight, bias, eps = torch.randn(6, 3, 4), torch.rand(3), torch.randn(3), 1e-5
    y, running_mean, running_var = torch.empty_like(x), torch.zeros(3), torch.zeros(3)
    mean, invstd = torch.empty(3), torch.empty(3)
    internals.native_batch_norm_out(
        x, weight, bias, running_mean, running_var, True, 1.0, eps, out=y, save_mean=mean, save_invstd=invstd
    )
    rows = x.transpose(1, 2).reshape(-1, 3)
    torch.testing.assert_close(mean, rows.mean(0))
    torch.testing.assert_close(running_mean, mean)
    torch.testing.assert_close(running_var, rows.var(0))
    torch.testing.assert_close(invstd, (rows.var(0, correction=0) + eps).rsqrt())
    torch.testing.assert_close(y, nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=eps))

    grad = torch.randn_like(x)
    found = internals.native_batch_norm_backward(
        grad, x, weight, None, None, mean, invstd, True, eps, [True, True, True]
    )
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    out = nn.functional.batch_norm(leaves[0], None, None, *leaves[1:], training=True, eps=eps)
    for one, other in zip(found, torch.autograd.grad(out, leaves, grad), strict=True):
        torch.testing.assert_close(one, other)


def test_batch_norm_evaluates_with_what_it_is_given():
    x, mean, var = torch.randn(6, 3), torch.randn(3), torch.rand(3) + 0.5
    y, unused = torch.empty_like(x), torch.empty(2, 3).unbind()
    internals.native_batch_norm_out(
        x, None, None, mean, var, False, 0.0, 0.0, out=y, save_mean=unused[0], save_invstd=unused[1]
    )
    torch.testing.assert_close(y, (x - mean) / var.sqrt())


def test_squared_differences_are_written_each_and_their_gradient_is_twice_the_difference():
    a, b, grad = torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3)
    out = torch.empty(2, 3)
    internals.squared_differences_out(a, b, 0, out=out)
    torch.testing.assert_close(out, (a - b) ** 2)
    internals.squared_differences_backward_out(grad, a, b, 0, grad_input=out)
    torch.testing.assert_close(out, 2 * (a - b) * grad)


def sgd():
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)


def test_schedulers_keep_rates_milestones_and_parts():
    optimizer = sgd()
    step = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer)
    sequence = torch.optim.lr_scheduler.SequentialLR(optimizer, [constant, step], [3])
    chained = torch.optim.lr_scheduler.ChainedScheduler([constant, step], optimizer)
    assert all(getattr(step, name) == step.get_last_lr() for name in internals.SCHEDULER_RATES)
    assert [getattr(sequence, name) for name in internals.SCHEDULER_MILESTONES] == [[3]]
    assert internals.parts_of_scheduler(sequence) == [constant, step]
    assert internals.parts_of_scheduler(chained) == [constant, step]


def test_a_group_tells_how_long_it_waits(tmp_path):
    from torch import distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1, timeout=timedelta(seconds=77)
    )
    try:
        assert internals.group_timeout(dist.group.WORLD) == timedelta(seconds=77)
    finally:
        dist.destroy_process_group()


def test_a_scaler_tells_its_factor_on_the_device_once_it_has_one():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert internals.loss_scale_without_waiting(scaler) is None
    scaler.scale(torch.ones(1))
    assert internals.loss_scale_without_waiting(scaler) == 8.0
    assert internals.loss_scale_without_waiting(object()) is None


def test_fused_optimizers_take_the_loss_scale_off_in_their_step():
    parameters = [torch.zeros(1, requires_grad=True)]
    assert internals.unscales_in_step(torch.optim.Adam(parameters, fused=True))
    assert not internals.unscales_in_step(torch.optim.Adam(parameters))


def test_the_metadata_of_shards_name_a_layout_and_storage(tmp_path):
    import pickletools

    from torch.distributed.checkpoint.state_dict_saver import save

    save({"a": torch.zeros(2)}, checkpoint_id=tmp_path, no_dist=True)
    named = " ".join(str(arg) for _, arg, _ in pickletools.genops((tmp_path / ".metadata").read_bytes()))
    assert internals.METADATA_LAYOUT in named
    assert internals.METADATA_STORAGE in named


# ------------------------------------------------------------------- others


def test_a_parser_tells_its_options_and_commands():
    parser = argparse.ArgumentParser()
    parser.add_argument("--size")
    assert others.commands_of(parser) == {}
    fit = parser.add_subparsers().add_parser("fit")
    assert [action.dest for action in others.options_of(parser)] == ["help", "size"]
    assert others.commands_of(parser) == {"fit": fit}
    other = argparse.ArgumentParser()
    others.commands_of(parser)["fit"] = other
    assert others.commands_of(parser) == {"fit": other}


def test_a_workspace_tells_what_it_sends():
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")
    model = others.workspace_model(workspaces.Workspace(entity="a", project="b", name="c", sections=[]))
    assert '"c"' in model.model_dump_json(by_alias=True)


@pytest.mark.parametrize(
    "make", [{"avg_fn": swa_utils.get_ema_avg_fn}, {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn}]
)
def test_an_average_tells_its_decay_and_takes_another(make):
    ((name, function),) = make.items()
    model = nn.Linear(1, 1, bias=False)
    average = swa_utils.AveragedModel(model, **{name: function(decay=0.75)})
    assert internals.ema_decay(average) == 0.75
    internals.set_ema_decay(average, 0.5)
    assert internals.ema_decay(average) == 0.5
    for value in (1.0, 3.0):
        model.weight.data.fill_(value)
        average.update_parameters(model)
    assert average.module.weight.item() == 2.0


def test_another_average_has_no_decay():
    assert internals.ema_decay(swa_utils.AveragedModel(nn.Linear(1, 1))) is None
    given = swa_utils.AveragedModel(nn.Linear(1, 1), avg_fn=lambda old, new, count: new)
    assert internals.ema_decay(given) is None


def test_a_callback_keeps_its_average():
    found = answers(
        "on_train_start",
        lambda trainer, _: [lightning.averaged_model(each) for each in trainer.callbacks],
        [EMAWeightAveraging(decay=0.75)],
    )
    kept = [each for each in found[0] if each is not None]
    assert [internals.ema_decay(each) for each in kept] == [0.75]


def test_a_write_in_place_is_counted():
    tensor = torch.zeros(2)
    before = internals.times_written(tensor)
    assert internals.times_written(tensor) == before
    tensor.fill_(1.0)
    assert internals.times_written(tensor) == before + 1


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
