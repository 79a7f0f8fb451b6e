"""Batch normalization that a conversion cannot reach is named."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import batch_norm

from lightning_gap.ghost import convert_ghost_batchnorm, plan_ghost_batchnorm
from lightning_gap.ghost.hidden import calls_batch_norm


class ByModule(nn.Module):
    def forward(self, x):
        return F.batch_norm(x, None, None, training=True)


class ByPath(nn.Module):
    def forward(self, x):
        return self.normalized(x)

    def normalized(self, x):
        return torch.nn.functional.batch_norm(x, None, None, training=True)


class ByName(nn.Module):
    def forward(self, x):
        return batch_norm(x, None, None, training=True)


class ByTorch(nn.Module):
    def forward(self, x):
        return torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)


class Inherits(ByModule):
    pass


class Named(nn.Module):
    """A layer of the same name is seen as the layer that it is."""

    def __init__(self):
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.batch_norm(x)


@pytest.mark.parametrize("kind", [ByModule, ByPath, ByName, ByTorch, Inherits])
def test_modules_that_call_the_function(kind):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(kind()))
    with pytest.warns(UserWarning, match=rf"'1.0' is left as it is: it is a {kind.__name__}, which calls batch_norm"):
        convert_ghost_batchnorm(model, 4)
    assert int(model[0].ghost_batch_size) == 4
    for skip in ("1", kind, lambda name, layer: layer.num_features == 7):  # functions are asked of norms alone
        plan = plan_ghost_batchnorm(model, skip)
        assert (list(plan.unable), list(plan.asked_to_skip)) == (
            (["1.0"], []) if not isinstance(skip, str | type) else ([], ["1.0"])
        )
    with pytest.raises(ValueError, match="which calls batch_norm itself"):
        convert_ghost_batchnorm(kind(), 4)


@pytest.mark.parametrize("kind", [Named, nn.BatchNorm2d, nn.InstanceNorm1d, nn.Linear, nn.Module])
def test_modules_that_do_not(kind):
    assert not calls_batch_norm(kind)


def block():
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3)))


@pytest.mark.parametrize("compiled", [torch.jit.script, lambda net: torch.jit.trace(net.eval(), torch.randn(4, 3))])
def test_blocks_of_torch_jit(compiled):
    model = nn.ModuleDict({"eager": block(), "block": compiled(block()), "head": torch.jit.script(nn.Linear(3, 3))})
    with pytest.warns(UserWarning, match=r"'block' is left.*torch.jit, with 2 BatchNorm layers in it; convert first"):
        convert_ghost_batchnorm(model, 4)
    assert list(plan_ghost_batchnorm(model, "block").layers) == ["eager.1", "eager.2.0"]


class FrozenBatchNorm2d(nn.Module):
    """As in detection backbones."""


def test_frozen_norms_are_named_where_nothing_else_is():
    with pytest.raises(ValueError, match=r"its 2 FrozenBatchNorm2d have fixed statistics"):
        convert_ghost_batchnorm(nn.Sequential(FrozenBatchNorm2d(), FrozenBatchNorm2d()), 4)
