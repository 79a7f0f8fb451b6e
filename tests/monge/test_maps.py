"""Networks that map samples to samples."""

import pytest
import torch
from torch import nn

from lightning_gap.monge import ResidualMLP


@pytest.mark.parametrize("hidden", [(), [8, 4]])
def test_residual_mlp_starts_at_the_identity_and_learns(hidden):
    net = ResidualMLP(3, hidden)
    x = torch.randn(20, 3)
    assert torch.equal(net(x), x)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss = (net(x) - x - 1).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_residual_mlp_has_the_widths_and_the_activation_asked_for():
    net = ResidualMLP(2, (16, 4), nn.ReLU)
    assert [tuple(p.shape) for p in net.parameters()] == [(16, 2), (16,), (4, 16), (4,), (2, 4), (2,)]
    assert sum(isinstance(m, nn.ReLU) for m in net.modules()) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "positive integers, got 0"),
        ((2.0,), ValueError, "positive integers, got 2.0"),
        ((True,), ValueError, "positive integers, got True"),
        ((2, (8, -1)), ValueError, "positive integers, got -1"),
        ((2, 64), TypeError, r"hidden must be a sequence of widths, got 64: write hidden=\("),
    ],
)
def test_bad_widths_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        ResidualMLP(*arguments)


def test_samples_of_another_dimension_are_refused():
    with pytest.raises(ValueError, match="the samples have dimension 3, but the map was made with dim=2"):
        ResidualMLP(2)(torch.zeros(4, 3))
