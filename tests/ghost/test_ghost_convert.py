import copy
import io
import pickle

import pytest
import torch
from ghost_reference import one_after_another
from lightning.pytorch.plugins import TorchSyncBatchNorm
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, update_bn

from lightning_gap.ghost import (
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    GhostNorm,
    convert_ghost_batchnorm,
    plan_ghost_batchnorm,
    recalibrate_batchnorm,
    revert_ghost_batchnorm,
)
from lightning_gap.ghost.layers import ghost_class


class ActivatedNorm(nn.BatchNorm2d):
    """A fused activation, as image libraries have it."""

    def forward(self, x):
        return super().forward(x).relu()


class NamedNorm(nn.BatchNorm1d):
    """A user's subclass that keeps the forward."""


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Sequential(nn.Flatten(), nn.LazyLinear(5)),
        nn.BatchNorm1d(5),
    )


def ghosts(module):
    return [name for name, layer in module.named_modules() if isinstance(layer, GhostNorm)]


def snapshot(module):
    """All that a module is: classes, attributes, and the identity of its tensors."""
    return [
        (name, type(layer), sorted(vars(layer)), [id(t) for t in (*layer.parameters(False), *layer.buffers(False))])
        for name, layer in module.named_modules()
    ]


def test_conversion_changes_classes_and_nothing_else():
    model = network()
    model(torch.randn(2, 3, 8, 8))
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    assert convert_ghost_batchnorm(model, 4) is model
    assert [type(model[1]), type(model[4])] == [GhostBatchNorm2d, GhostBatchNorm1d]
    assert [entry[3] for entry in snapshot(model)] == [entry[3] for entry in before]
    assert list(model.state_dict()) == list(state)
    assert revert_ghost_batchnorm(model) is model
    assert snapshot(model) == before
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


@pytest.mark.parametrize(
    ("plain", "ghost"),
    [(nn.BatchNorm1d, GhostBatchNorm1d), (nn.BatchNorm2d, GhostBatchNorm2d), (nn.BatchNorm3d, GhostBatchNorm3d)],
)
def test_a_layer_alone(plain, ghost):
    layer = convert_ghost_batchnorm(plain(3), 8, running_stats="per_step", grouping="strided")
    assert type(layer) is ghost
    assert isinstance(layer, plain)
    assert (layer.ghost_batch_size, layer.running_stats, layer.grouping) == (8, "per_step", "strided")
    assert repr(layer) == repr(ghost(3, ghost_batch_size=8, running_stats="per_step", grouping="strided"))
    with pytest.raises(ValueError, match="expected"):
        layer(torch.randn(4, 3, 2, 2, 2, 2))


def test_state_dicts_go_both_ways():
    plain, ghost = nn.BatchNorm2d(3), GhostBatchNorm2d(3, ghost_batch_size=4)
    ghost(torch.randn(8, 3, 2, 2))
    plain.load_state_dict(ghost.state_dict(), strict=True)
    ghost.load_state_dict(plain.state_dict(), strict=True)


def test_evaluation_is_plain_batchnorm_at_any_batch_size():
    for options in ({}, {"track_running_stats": False}):
        plain = nn.BatchNorm2d(3, **options)
        plain(torch.randn(8, 3, 2, 2))
        ghost = convert_ghost_batchnorm(copy.deepcopy(plain), 4).eval()
        plain.eval()
        for n in (1, 4, 9):
            x = torch.randn(n, 3, 2, 2)
            assert torch.equal(ghost(x), plain(x))


def test_frozen_layer_in_a_training_model():
    model = convert_ghost_batchnorm(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)), 4).train()
    model[0].eval()
    before = model[0].running_mean.clone()
    model(torch.randn(9, 3) + 5)
    assert torch.equal(model[0].running_mean, before)
    assert model[1].running_mean.abs().sum() > 0


def test_tracking_switched_off_while_the_buffers_are_there():
    layer = convert_ghost_batchnorm(nn.BatchNorm1d(3), 4)
    layer.track_running_stats = False
    y = layer(torch.randn(8, 3) + 5)
    assert y.mean().abs() < 1e-6
    assert int(layer.num_batches_tracked) == 0
    assert not layer.running_mean.any()


def test_optimizer_hooks_and_tied_layers_are_kept():
    norm = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = []
    norm.register_forward_hook(lambda *_: calls.append(1))
    convert_ghost_batchnorm(model, 4)
    assert model["a"] is model["b"][0] is norm
    before = norm.weight.clone()
    norm(torch.randn(8, 3)).pow(3).sum().backward()
    optimizer.step()
    assert calls == [1]
    assert not torch.equal(norm.weight, before)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, NamedNorm])
def test_copies_and_pickles(kind):
    layer = convert_ghost_batchnorm(kind(3), 4, grouping="strided")
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    x = torch.randn(9, 3)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
    for twin in twins:
        assert type(twin) is type(layer)
        assert twin.weight is not layer.weight
        assert torch.equal(twin(x), copy.deepcopy(layer)(x))
        assert type(revert_ghost_batchnorm(twin)) is kind


def test_lazy_layers_are_ghosts_from_the_first_forward():
    layer = convert_ghost_batchnorm(nn.Sequential(nn.LazyBatchNorm1d()), 4)
    layer(torch.randn(8, 3))
    assert type(layer[0]) is GhostBatchNorm1d
    assert int(layer[0].num_batches_tracked) == 2
    assert type(revert_ghost_batchnorm(layer)[0]) is nn.BatchNorm1d
    unused = revert_ghost_batchnorm(convert_ghost_batchnorm(nn.Sequential(nn.LazyBatchNorm2d()), 4))
    assert type(unused[0]) is nn.LazyBatchNorm2d


def test_parametrized_layer_stays_parametrized():
    class Positive(nn.Module):
        def forward(self, weight):
            return weight.exp()

    layer = nn.BatchNorm1d(3)
    parametrize.register_parametrization(layer, "weight", Positive())
    before = type(layer)
    convert_ghost_batchnorm(layer, 4)
    y = layer(torch.randn(8, 3))
    assert isinstance(layer, GhostNorm)
    torch.testing.assert_close(y.std(0, correction=0), torch.full((3,), torch.e), rtol=1e-3, atol=1e-3)
    assert type(revert_ghost_batchnorm(layer)) is before


def test_converting_again_changes_the_settings():
    model = convert_ghost_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), 4)
    convert_ghost_batchnorm(model, 8, running_stats="per_step")
    assert (model[0].ghost_batch_size, model[0].running_stats) == (8, "per_step")
    assert type(revert_ghost_batchnorm(model)[0]) is nn.BatchNorm1d


def test_undo_restores_layers_that_were_ghosts_already():
    model = nn.Sequential(GhostBatchNorm1d(3, ghost_batch_size=16), nn.BatchNorm1d(3))
    before = snapshot(model)
    undo = plan_ghost_batchnorm(model).apply(4, "per_step", "strided")
    assert model[0].ghost_batch_size == model[1].ghost_batch_size == 4
    undo()
    assert snapshot(model) == before
    assert (model[0].ghost_batch_size, model[0].running_stats, model[0].grouping) == (16, "sequential", "contiguous")


def test_what_lightning_leaves_of_a_syncbatchnorm_converts():
    sync = TorchSyncBatchNorm()
    model = sync.revert(sync.apply(nn.Sequential(nn.BatchNorm1d(3))))
    assert type(model[0]) is not nn.BatchNorm1d
    assert ghosts(convert_ghost_batchnorm(model, 4)) == ["0"]
    model(torch.randn(8, 3))
    assert int(model[0].num_batches_tracked) == 2


def test_other_norms_are_left_alone():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.InstanceNorm1d(3), nn.LayerNorm(3), nn.GroupNorm(3, 3))
    assert ghosts(convert_ghost_batchnorm(model, 4)) == ["0"]


@pytest.mark.parametrize("grouping", ["contiguous", "strided"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_own_forward_runs_over_ghosts(momentum, grouping):
    plain = ActivatedNorm(3, momentum=momentum).double()
    ghost = convert_ghost_batchnorm(copy.deepcopy(plain), 4, grouping=grouping)
    x = torch.randn(10, 3, 2, 2, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(ghost(x), one_after_another(plain, x, 4, grouping=grouping))
    for name, value in ghost.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name])
    assert isinstance(ghost, ActivatedNorm)
    assert type(pickle.loads(pickle.dumps(ghost))) is type(ghost)
    torch.testing.assert_close(ghost.eval()(x), plain.eval()(x))
    assert type(revert_ghost_batchnorm(ghost)) is ActivatedNorm


class FusedNorm(nn.BatchNorm2d):
    """A norm that calls the function itself and counts itself, as image libraries' fused layers do."""

    def __init__(self, features):
        super().__init__(features)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x):
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        training = self.training or self.running_mean is None
        x = nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training, factor, self.eps
        )
        return self.act(self.drop(x))


def test_fused_layers_of_image_libraries():
    plain = FusedNorm(3).double()
    ghost = convert_ghost_batchnorm(copy.deepcopy(plain), 4)
    x = torch.randn(11, 3, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(ghost(x), one_after_another(plain, x, 4))
    for name, value in ghost.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name])
    recalibrate_batchnorm(ghost, [x, x])
    assert ghost.momentum == 0.1
    assert int(ghost.num_batches_tracked) == 6


def test_forwards_that_cannot_be_led_over_ghosts():
    class Conditional(nn.BatchNorm1d):
        def forward(self, x, scale):
            return super().forward(x) * scale

    model = nn.Sequential(nn.BatchNorm1d(3), Conditional(3))
    with pytest.warns(UserWarning, match=r"'1' is left as it is: it is a Conditional, whose forward takes more"):
        convert_ghost_batchnorm(model, 4)
    assert ghosts(model) == ["0"]
    assert type(model[1]) is Conditional
    convert_ghost_batchnorm(model, 4, skip=Conditional)  # asked for, hence silent

    class Foreign(nn.BatchNorm1d):
        def forward(self, x):
            return (x - x.mean(0)) / x.std(0)

    with pytest.raises(RuntimeError, match=r"forward of Foreign does not call.*skip=Foreign"):
        convert_ghost_batchnorm(Foreign(3), 4)(torch.randn(8, 3))
    replaced = nn.BatchNorm1d(3)
    replaced.forward = lambda x: x
    with pytest.raises(ValueError, match="forward replaced"):
        convert_ghost_batchnorm(replaced, 4)


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ("stem", ["stem"]),
        ("body", ["body.0", "body.1"]),
        ("body.*", ["body.0", "body.1"]),
        (["stem", "body.1"], ["stem", "body.1"]),
        (nn.BatchNorm2d, ["body.1"]),
        (lambda name, layer: layer.num_features == 5, ["stem"]),
        ((), []),
    ],
)
def test_skip(skip, left):
    model = nn.ModuleDict(
        {
            "stem": nn.BatchNorm1d(5),
            "body": nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm2d(3)),
            "top": nn.BatchNorm1d(2),
        }
    )
    plan = plan_ghost_batchnorm(model, skip)
    assert list(plan.asked_to_skip) == left
    convert_ghost_batchnorm(model, 4, skip=skip)
    assert ghosts(model) == [name for name in ("stem", "body.0", "body.1", "top") if name not in left]


def test_nothing_to_convert_and_other_refusals_change_nothing():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.SyncBatchNorm(3))
    with pytest.raises(ValueError, match=r"'1' is a SyncBatchNorm.*add '1' to skip"):
        convert_ghost_batchnorm(model, 4)
    with pytest.raises(ValueError, match="skip='head' fits none"):
        convert_ghost_batchnorm(model, 4, skip=("1", "head"))
    for entry in (3, int, nn.BatchNorm1d(3)):
        with pytest.raises(TypeError, match="skip takes"):
            convert_ghost_batchnorm(model, 4, skip=[entry])
    for size, error in ((True, TypeError), (4.0, TypeError), ("4", TypeError), (0, ValueError), (-3, ValueError)):
        with pytest.raises(error, match="ghost_batch_size must be"):
            convert_ghost_batchnorm(model, size)
        with pytest.raises(error, match="ghost_batch_size must be"):
            GhostBatchNorm1d(3, ghost_batch_size=size)
    assert ghosts(model) == []
    convert_ghost_batchnorm(model, 4, skip="1")
    with pytest.raises(ValueError, match=r"holds no BatchNorm layer to convert \(it has none at all\)"):
        convert_ghost_batchnorm(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="1 that skip holds back"):
        convert_ghost_batchnorm(nn.BatchNorm1d(3), skip=nn.BatchNorm1d)


def test_a_class_derived_from_a_ghost_class_is_not_reverted():
    class Derived(GhostBatchNorm1d):
        pass

    layer = Derived(3, ghost_batch_size=4)
    with pytest.warns(UserWarning, match="Derived layer stays a ghost layer"):
        revert_ghost_batchnorm(layer)
    assert layer.ghost_batch_size == 4


def test_averaged_models_and_update_bn():
    model = convert_ghost_batchnorm(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), 4)
    averaged = AveragedModel(model)
    batches = [torch.randn(8, 3), torch.randn(8, 3)]
    update_bn(batches, averaged)
    with torch.no_grad():
        expected = model[0](torch.cat(batches)).mean(0)
    torch.testing.assert_close(averaged.module[1].running_mean, expected)
    assert averaged.module[1].momentum == 0.1


@pytest.mark.compiler
def test_conversion_after_compilation_takes_effect():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(8, 3)
    plain = compiled(x)
    assert list(plan_ghost_batchnorm(nn.ModuleDict({"net": compiled})).layers) == ["net.1"]
    convert_ghost_batchnorm(model, 4)
    ghost = compiled(x)
    assert not torch.allclose(ghost, plain)
    torch.testing.assert_close(ghost, model(x))
    revert_ghost_batchnorm(model)
    torch.testing.assert_close(compiled(x), plain)


def test_export_in_evaluation_and_script_after_revert():
    layer = convert_ghost_batchnorm(nn.BatchNorm2d(3), 4).eval()
    x = torch.randn(9, 3, 2, 2)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    torch.testing.assert_close(exported.module()(x[:5]), layer(x[:5]))
    torch.testing.assert_close(torch.jit.script(revert_ghost_batchnorm(layer))(x), layer(x))


@pytest.mark.compiler
@pytest.mark.parametrize("kind", [ActivatedNorm, FusedNorm])
def test_compiled_own_forwards_are_one_graph(kind):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = convert_ghost_batchnorm(nn.Sequential(*(kind(3) for _ in range(12))).double(), 4)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for n in (8, 11):
        x = torch.randn(n, 3, 2, 2, dtype=torch.float64).requires_grad_()
        outputs = [net(x) for net in (compiled, twin)]
        gradients = [torch.autograd.grad(y.pow(2).sum(), x)[0] for y in outputs]
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(*gradients)
    for mine, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert counter.frame_count <= 3  # for the first size, and for others


@pytest.mark.compiler
def test_compiled_layers_share_their_code():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layers = [convert_ghost_batchnorm(FusedNorm(3), 4) for _ in range(12)]
    for layer in layers:  # each by itself: torch compiles one function eight times at most
        torch.compile(layer, backend=counter, fullgraph=True)(torch.randn(8, 3, 2, 2))
    assert counter.frame_count == 1


def test_the_class_of_a_layer_is_made_where_torch_has_no_such():
    assert ghost_class(nn.BatchNorm2d) is GhostBatchNorm2d
    assert ghost_class(nn.LazyBatchNorm1d).__name__ == "GhostLazyBatchNorm1d"
    assert ghost_class(nn.LazyBatchNorm1d) is ghost_class(nn.LazyBatchNorm1d)
