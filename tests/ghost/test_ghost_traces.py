"""Symbolic traces: a ghost layer is a leaf, as torch's own is, in training and in evaluation."""

import copy

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils import fuse_conv_bn_eval

from lightning_gap.ghost import GhostNorm, convert_ghost_batchnorm, revert_ghost_batchnorm


class Fused(nn.BatchNorm2d):
    def forward(self, x):
        training = self.training or self.running_mean is None
        x = nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training, 0.1, self.eps
        )
        return nn.functional.relu(x)


def network(last=nn.BatchNorm2d):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False), last(2))
    ).double()
    model(torch.randn(9, 3, 5, 5, dtype=torch.float64))
    return model


def images():
    return torch.randn(9, 3, 5, 5, dtype=torch.float64)


@pytest.mark.parametrize("last", [nn.BatchNorm2d, Fused])
@pytest.mark.parametrize("training", [True, False])
def test_traces_give_what_the_model_gives(training, last):
    model = convert_ghost_batchnorm(network(last), 4).train(training)
    traced = fx.symbolic_trace(copy.deepcopy(model))
    x = images()
    torch.testing.assert_close(traced(x), model(x), rtol=0, atol=0)
    for name, value in traced.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    leaves = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert "1" in leaves
    assert ("2.2" in leaves) == (training or last is nn.BatchNorm2d)  # in evaluation as the plain class has it


def test_a_trace_follows_its_layers_through_modes_and_back():
    model = convert_ghost_batchnorm(network(), 4).eval()
    traced, plain, x = fx.symbolic_trace(model), network().eval(), images()
    torch.testing.assert_close(traced(x), plain(x), rtol=0, atol=0)
    traced.train()
    assert not torch.allclose(traced(x), plain.train()(x))
    revert_ghost_batchnorm(traced)
    torch.testing.assert_close(traced(x), plain(x), rtol=0, atol=0)


def test_fusion_leaves_ghosts_and_folds_what_has_been_reverted():
    model, x = convert_ghost_batchnorm(network(), 4).eval(), images()
    fused = fuse(model)
    assert sum(isinstance(layer, GhostNorm) for layer in fused.modules()) == 2
    torch.testing.assert_close(fused(x), model(x))
    torch.testing.assert_close(fuse_conv_bn_eval(model[0], model[1])(x), model[1](model[0](x)))
    fused = fuse(revert_ghost_batchnorm(model))
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in fused.modules())
    torch.testing.assert_close(fused(x), model(x))
