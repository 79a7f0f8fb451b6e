"""One map for many conditions."""

import pytest
import torch
from torch import Tensor

from lightning_gap.monge import ConditionalMap, SphereMap, StructuredMap
from lightning_gap.monge.maps.conditioning import Conditioning


def fit(net: torch.nn.Module, x: Tensor, condition: Tensor, image: Tensor, steps: int = 200) -> float:
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (net(x, condition) - image).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConditionalMap(2, (32,), num_conditions=3),
        lambda: StructuredMap(2, "sqeuclidean", (32,), num_conditions=3),
        lambda: StructuredMap(2, "elastic(lam=0.2)", (32,), potential=True, num_conditions=3),
    ],
)
def test_each_label_learns_its_own_map_from_the_identity(make):
    torch.manual_seed(0)
    net = make()
    assert net.conditional
    x, label = torch.randn(300, 2), torch.arange(300) % 3
    torch.testing.assert_close(net(x, label), x)
    scale, shift = torch.tensor([1.0, 2.0, 0.5])[label, None], torch.tensor([0.0, 3.0, -2.0])[label, None]
    assert fit(net, x, label, scale * x + shift) < 0.03
    torch.testing.assert_close(net(x[:1], label[:1]), net(x, label)[:1])


def test_a_dose_is_interpolated():
    torch.manual_seed(0)
    net = ConditionalMap(2, (32,), condition_dim=1)
    x = torch.randn(400, 2)
    dose = torch.tensor([0.0, 0.5, 1.5, 2.0])[torch.arange(400) % 4][:, None]
    assert fit(net, x, dose, x + 3 * dose, 300) < 0.01
    unseen = net(x, torch.ones(400, 1))
    assert (unseen - x - 3).abs().mean().item() < 0.3


def test_a_condition_turns_the_sphere():
    torch.manual_seed(0)
    net = SphereMap(3, (32,), num_conditions=2)
    x, label = torch.nn.functional.normalize(torch.randn(200, 3), dim=-1), torch.arange(200) % 2
    image = torch.where(label[:, None] == 0, x, torch.stack([-x[:, 1], x[:, 0], x[:, 2]], dim=-1))
    assert fit(net, x, label, image) < 0.01


def test_the_network_is_shared_and_a_condition_costs_one_row():
    few, many = (
        ConditionalMap(2, (8,), num_conditions=2, embedding_dim=4),
        ConditionalMap(2, (8,), num_conditions=9, embedding_dim=4),
    )
    count = [sum(p.numel() for p in net.parameters()) for net in (few, many)]
    assert count[1] - count[0] == 7 * 4


def test_conditions_modulate_from_the_start_but_for_the_scale():
    torch.manual_seed(0)
    films, shift = Conditioning((8, 4), 2, num_conditions=3)(torch.tensor([0, 1, 2]))
    assert [tuple(f.shape) for pair in films for f in pair] == [(3, 8), (3, 8), (3, 4), (3, 4)]
    assert all(torch.equal(scale, torch.ones_like(scale)) for scale, _ in films)
    assert all(offset.std(0).min().item() > 0 for _, offset in films)
    assert torch.equal(shift, torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give num_conditions=, the number of categories, or condition_dim="),
        (
            {"num_conditions": 2, "condition_dim": 3},
            "give one of num_conditions=.*got num_conditions=2 and condition_dim=3",
        ),
        ({"num_conditions": 0}, "num_conditions must be at least 1, got 0"),
        ({"condition_dim": 1.5}, "condition_dim must be an int, got 1.5"),
        ({"num_conditions": 2, "embedding_dim": 0}, "embedding_dim must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ConditionalMap(2, **options)


@pytest.mark.parametrize(
    ("options", "condition", "message"),
    [
        (
            {"num_conditions": 3},
            torch.tensor([0, 1, 3, 0]),
            "condition has the label 3, but the map knows 3 conditions, 0 to 2",
        ),
        ({"num_conditions": 3}, torch.tensor([0, -1, 2, 0]), "condition has the label -1"),
        ({"num_conditions": 3}, torch.zeros(4), r"integer labels of shape \(4,\).*got torch.float32"),
        ({"num_conditions": 3}, torch.zeros(3).long(), r"integer labels of shape \(4,\).*of shape \(3,\)"),
        ({"condition_dim": 2}, torch.zeros(4, 3), r"vectors of shape \(4, 2\).*of shape \(4, 3\)"),
        ({"condition_dim": 2}, torch.zeros(4, 2).long(), r"vectors of shape \(4, 2\).*got torch.int64"),
        ({"condition_dim": 2}, torch.zeros(2), r"vectors of shape \(4, 2\)"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(options, condition, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ConditionalMap(2, **options)(torch.zeros(4, 2), condition)
