"""What the private names of torch do in the installed version, one test a name.

A test that fails here says which name of which package has changed; its function in ``trainer/internals`` is to mend.
"""

from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

from lightning_gap.trainer.internals import of_torch as internals


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


def test_a_write_in_place_is_counted():
    tensor = torch.zeros(2)
    before = internals.times_written(tensor)
    assert internals.times_written(tensor) == before
    tensor.fill_(1.0)
    assert internals.times_written(tensor) == before + 1
