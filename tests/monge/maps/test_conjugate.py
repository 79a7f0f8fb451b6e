"""The convex potential of a Brenier map, its Hessian, its inverse and its conjugate."""

import pytest
import torch

from lightning_gap.monge import BrenierMap, gaussian_map


def _map(dim: int, seed: int = 0) -> tuple[BrenierMap, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(60, dim, dtype=torch.double) @ torch.randn(dim, dim, dtype=torch.double) + 3
    y = 5 * torch.randn(80, dim, dtype=torch.double).abs() - 2
    net = BrenierMap(dim, (12, 9, 7)).double()
    net.start(x, y)
    return net, x, y


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_the_map_is_the_gradient_of_its_potential_and_the_hessian_its_jacobian(dim: int) -> None:
    net, x, _ = _map(dim)
    x.requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(net.potential(x).sum(), x)[0], net(x))
    rows = [torch.autograd.grad(net(x)[:, i].sum(), x)[0] for i in range(dim)]
    torch.testing.assert_close(net.hessian(x), torch.stack(rows, 1))
    assert bool((torch.linalg.eigvalsh(net.hessian(x)) > 0).all())


@pytest.mark.parametrize("dim", [1, 2, 5, 20])
@pytest.mark.parametrize("far", [1.0, 30.0])
def test_the_inverse_is_found_from_anywhere(dim: int, far: float) -> None:
    net, x, y = _map(dim)
    wanted = far * y
    found = net.inverse(wanted)
    scale = float(net.image_scale)
    torch.testing.assert_close(net(found), wanted, rtol=0, atol=2e-5 * scale)
    torch.testing.assert_close(net.inverse(net(x)), x, rtol=1e-3, atol=1e-3)
    assert net.inverse(y[:0]).shape == (0, dim)


def test_the_conjugate_is_the_greatest_value_and_its_gradient_the_inverse() -> None:
    net, x, y = _map(3)
    y = y[:20].requires_grad_()
    value = net.conjugate(y)
    others = (y @ x.mT - net.potential(x)).amax(1)
    assert bool((value >= others - 1e-8).all())
    torch.testing.assert_close(torch.autograd.grad(value.sum(), y)[0], net.inverse(y.detach()))
    # Young's equality holds at the images, and the weights' gradient is that of the potential at the points found.
    images = net(x).detach()
    torch.testing.assert_close(net.conjugate(images) + net.potential(x), (x * images).sum(1), rtol=1e-6, atol=1e-6)


def test_the_conjugate_of_a_gaussian_map_is_that_of_its_quadratic() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(500, 2).double(), torch.randn(500, 2).double() * 2 + 1
    net = BrenierMap(2, (16,)).double()
    net.start(x, y)
    A, b = gaussian_map(x, y)
    torch.testing.assert_close(net.inverse(x @ A + b), x, atol=0.15, rtol=0)
