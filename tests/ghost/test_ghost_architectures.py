import copy
import time

import pytest
import torch
from architectures import ARCHITECTURES, resnet50
from ghost_reference import one_after_another
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_gap import convert_ghost_batchnorm, revert_ghost_batchnorm
from lightning_gap.ghost import GhostNorm

GHOST, BATCH = 4, 11


class OneAfterAnother(nn.Module):
    """A plain layer that takes the place of a ghost layer, ghosts one at a time."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return one_after_another(self.layer, x, GHOST)


def twin_of(model):
    twin = copy.deepcopy(model)
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, _BatchNorm):
            parent, _, own = name.rpartition(".")
            setattr(twin.get_submodule(parent), own, OneAfterAnother(layer))
    return twin


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_converted_trained_evaluated_reverted_exported(name):
    build, shape, norms = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = build().double()
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0  # the twin would draw other masks
    plain, twin = copy.deepcopy(model), twin_of(model)
    x = torch.randn(BATCH, *shape, dtype=torch.float64)

    convert_ghost_batchnorm(model, GHOST)
    assert sum(isinstance(layer, GhostNorm) for layer in model.modules()) == norms
    for net in (model, twin):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        loss = net(x).pow(2).mean()
        loss.backward()
        optimizer.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)

    model.eval()
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(x), plain.eval()(x))
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(x[:3]), plain(x[:3]))

    revert_ghost_batchnorm(model)
    assert [type(layer) for layer in model.modules()] == [type(layer) for layer in plain.modules()]
    assert torch.equal(model(x), plain(x))


def test_resnet50_keeps_its_state_and_converts_at_once():
    model = resnet50()
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    convert_ghost_batchnorm(copy.deepcopy(model))  # classes are made on first use
    start = time.perf_counter()
    convert_ghost_batchnorm(model, 32)
    elapsed = time.perf_counter() - start
    print(f"ResNet-50 converted in {1e3 * elapsed:.1f} ms")
    assert sum(isinstance(layer, GhostNorm) for layer in model.modules()) == 53
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    state = model.state_dict()
    assert list(state) == list(before)
    for name, (pointer, value) in before.items():
        assert state[name].data_ptr() == pointer
        assert torch.equal(state[name], value)
