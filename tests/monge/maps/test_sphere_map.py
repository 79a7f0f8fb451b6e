"""Maps of the sphere to itself."""

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_gap import costs
from lightning_gap.monge import SphereMap
from lightning_gap.monge.maps.sphere import circle


def sphere(n: int, d: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x / x.norm(dim=-1, keepdim=True)).to(dtype)


def constant(net: SphereMap, vector: Tensor) -> SphereMap:
    """Make the network return one vector everywhere."""
    net.displacement[-1].bias.data.copy_(vector)
    return net


@pytest.mark.parametrize("d", [2, 3, 50])
def test_images_are_on_the_sphere_at_the_length_of_the_tangent_vector(d):
    x = sphere(500, d, dtype=torch.float64)
    vector = torch.zeros(d).double()
    vector[0] = 2.5
    mapped = constant(SphereMap(d, (4,)).double(), vector)(x)
    torch.testing.assert_close(mapped.norm(dim=-1), torch.ones(500).double(), rtol=0, atol=1e-15)
    tangent = vector - x * x[:, :1] * 2.5
    torch.testing.assert_close(costs.Geodesic().paired(x, mapped), tangent.norm(dim=-1))
    # The image is in the plane of the point and the vector.
    along = (mapped * tangent).sum(-1) / tangent.norm(dim=-1)
    torch.testing.assert_close(along, tangent.norm(dim=-1).sin())


def test_images_in_float32_are_on_the_sphere_to_the_last_digit():
    x = sphere(2000, 16) * (1 + 5e-4)
    for length in (0.0, 1e-6, 0.1, 3.0, 100.0):
        mapped = constant(SphereMap(16, (4,)), torch.full((16,), length))(x).detach()
        assert float((mapped.double().norm(dim=-1) - 1).abs().max()) < 3e-7


def test_a_vector_of_length_pi_reaches_the_antipode():
    x = torch.tensor([[1.0, 0.0, 0.0]])
    mapped = constant(SphereMap(3, ()), torch.tensor([0.0, math.pi, 0.0]))(x)
    torch.testing.assert_close(mapped, -x, atol=1e-6, rtol=0)


def test_it_starts_at_the_identity_with_exact_first_and_second_derivatives():
    torch.manual_seed(0)
    net, x = SphereMap(3, (8,)).double(), sphere(4, dtype=torch.float64)
    torch.testing.assert_close(net(x), x, atol=1e-15, rtol=0)
    bias = net.displacement[-1].bias
    target = sphere(4, seed=1, dtype=torch.float64)

    def loss(value: Tensor) -> Tensor:
        called = torch.func.functional_call(net, {"displacement.2.bias": value}, (x,))
        return (called * target).sum()

    start = bias.detach().clone().requires_grad_()
    assert not start.any()
    # The first derivative of exp at 0 is the projection, the second is -x |v|².
    gradient = torch.autograd.functional.jacobian(loss, start)
    torch.testing.assert_close(gradient, (target - x * (x * target).sum(-1, keepdim=True)).sum(0))
    P = torch.eye(3).double() - x[:, :, None] * x[:, None, :]
    curvature = -((x * target).sum(-1)[:, None, None] * P).sum(0)
    torch.testing.assert_close(torch.autograd.functional.hessian(loss, start), curvature)


def test_the_series_meet_the_functions():
    square = torch.tensor([0.0, 1e-30, 1e-3, 0.0099, 0.0101, 1.0, 100.0], dtype=torch.float64)
    cosine, cardinal_sine = circle(square)
    torch.testing.assert_close(cosine, square.sqrt().cos(), rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(cardinal_sine, torch.sinc(square.sqrt() / math.pi), rtol=1e-14, atol=1e-15)
    assert torch.autograd.gradcheck(circle, torch.tensor([0.005, 0.0101, 2.0]).double().requires_grad_())


def test_a_rotation_is_learned():
    torch.manual_seed(0)
    c, s = math.cos(0.4), math.sin(0.4)
    R = torch.tensor([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
    x = sphere(256)
    net = SphereMap(3, (32,))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (net(x) - x @ R.T).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-4
    other = sphere(200, seed=1)
    assert float((net(other) - other @ R.T).norm(dim=-1).max().detach()) < 0.1


def test_points_off_the_sphere_are_refused_but_for_rounding():
    net = SphereMap(3, (8,))
    x = sphere(5)
    x[3] *= 1.01
    with pytest.raises(ValueError, match=r"x has 1 points off the unit sphere \(first at row 3\): divide the samples"):
        net(x)
    with pytest.raises(ValueError, match="5 points off the unit sphere"):
        net(torch.zeros(5, 3))
    half = sphere(100, 64).bfloat16()
    mapped = SphereMap(64, (8,)).bfloat16()(half)
    assert mapped.dtype == torch.bfloat16
    torch.testing.assert_close(mapped, half, atol=0.01, rtol=0.02)


def test_the_line_has_no_sphere_to_move_on():
    with pytest.raises(ValueError, match="dim must be at least 2, got 1"):
        SphereMap(1)


def test_an_activation_of_ones_own_works():
    net = SphereMap(3, (8,), lambda: nn.PReLU())
    assert net.hparams is None
    torch.testing.assert_close(net(sphere(4)), sphere(4))
