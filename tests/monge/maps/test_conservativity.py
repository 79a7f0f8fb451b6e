"""How far a vector field is from a gradient."""

import pytest
import torch
from torch import Tensor, nn

from lightning_gap.monge import ConditionalMap, StructuredMap, conservativity


def linear(A: Tensor) -> nn.Linear:
    net = nn.Linear(len(A), len(A)).to(A)
    net.weight.data.copy_(A)
    return net


def signs(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randint(0, 2, shape, generator=generator) - 1


def test_a_linear_field_has_the_closed_form_with_its_gradient():
    A = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    net, x = linear(A), torch.randn(4000, 5)
    value = conservativity(net, x, probes=8)
    torch.testing.assert_close(value.detach(), (A - A.T).square().sum(), rtol=0.05, atol=0)
    # With the same signs it is exact, and so is the gradient.
    v = signs(7, 3, 5)
    value = conservativity(net, x[:3], generator=torch.Generator().manual_seed(7))
    asymmetry = v @ (A - A.T).T
    torch.testing.assert_close(value.detach(), asymmetry.square().sum(-1).mean())
    value.backward()
    outer = 2 * asymmetry.T @ v / 3
    torch.testing.assert_close(net.weight.grad, outer - outer.T)


def test_it_is_the_mean_of_the_jacobians_asymmetry_whose_gradient_agrees_with_differences():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    J = torch.func.vmap(torch.func.jacrev(net))(x)
    estimate = conservativity(net, x, probes=400).detach()
    torch.testing.assert_close(estimate, (J - J.mT).square().sum((-1, -2)).mean().detach(), rtol=0.1, atol=0)
    parameters = dict(net.named_parameters())

    class Called(nn.Module):
        def __init__(self, values: tuple[Tensor, ...]) -> None:
            super().__init__()
            self.values = values

        def forward(self, x: Tensor) -> Tensor:
            return torch.func.functional_call(net, dict(zip(parameters, self.values, strict=True)), (x,))

    def f(*values: Tensor) -> Tensor:
        return conservativity(Called(values), x, generator=torch.Generator().manual_seed(1))

    assert torch.autograd.gradcheck(f, tuple(parameters.values()), fast_mode=True)


@pytest.mark.parametrize("conditions", [None, 3])
@pytest.mark.parametrize("activation", ["gelu", "silu", "softplus", "tanh"])
def test_gradients_of_potentials_have_none(activation, conditions):
    torch.manual_seed(0)
    net = StructuredMap(4, "sqeuclidean", (16, 8), activation, potential=True, num_conditions=conditions).double()
    for p in net.parameters():
        p.data.add_(torch.randn_like(p))
    x = torch.randn(10, 4, dtype=torch.float64)
    condition = None if conditions is None else torch.arange(10) % 3
    assert net.field(x, condition).abs().mean().item() > 0.1
    assert float(conservativity(net.field, x, condition, probes=3).detach()) < 1e-20


def test_a_conditional_field_is_differentiated_in_the_samples_alone():
    class Turn(nn.Module):
        def forward(self, x: Tensor, angle: Tensor) -> Tensor:
            return angle * torch.stack([-x[:, 1], x[:, 0]], dim=-1) * self.scale

        scale = nn.Parameter(torch.tensor(1.0))

    angle = torch.tensor([[1.0], [2.0], [3.0]])
    value = conservativity(Turn(), torch.randn(3, 2), angle)
    torch.testing.assert_close(value.detach(), 8 * angle.square().mean())
    net = ConditionalMap(2, (8,), num_conditions=2)
    assert conservativity(net.displacement, torch.randn(4, 2), torch.tensor([0, 1, 0, 1])).item() == 0


def test_it_draws_from_the_generator_given_and_needs_no_gradient_mode():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(5, 2)
    before = torch.get_rng_state()
    first = conservativity(net, x, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.requires_grad
    with torch.no_grad():
        second = conservativity(net, x, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        third = conservativity(net, x + 0, generator=torch.Generator().manual_seed(3))
    assert not second.requires_grad
    assert float(first.detach()) == float(second) == float(third) > 0


def test_dropout_is_the_same_in_both_products():
    torch.manual_seed(0)
    A = torch.randn(6, 6)
    net = nn.Sequential(linear(A + A.T), nn.Dropout(0.5)).train()
    # D (A + Aᵀ) with one mask: were the masks of the two products different, unmasked rows would not cancel.
    x = torch.randn(1, 6)
    torch.manual_seed(1)
    value = conservativity(net, x, generator=torch.Generator().manual_seed(3)).detach()
    torch.manual_seed(1)
    mask = nn.functional.dropout(torch.ones(1, 6), 0.5)
    J = mask.T * (A + A.T)
    torch.testing.assert_close(value, ((J - J.T) @ signs(3, 1, 6).T).square().sum())


def test_a_constant_field_and_autocast():
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones_like(x)

    assert float(conservativity(Constant(), torch.randn(3, 2))) == 0
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8)), torch.randn(200, 8)
    exact = conservativity(net, x, generator=torch.Generator().manual_seed(3)).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = conservativity(net, x, generator=torch.Generator().manual_seed(3))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.detach(), exact, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conservativity(nn.Linear(2, 2), torch.zeros(0, 2)), r"x must hold at least one sample.*\(0, 2\)"),
        (lambda: conservativity(nn.Linear(2, 2), torch.zeros(2)), r"of shape \(n, d\), got \(2,\)"),
        (lambda: conservativity(nn.Linear(2, 3), torch.zeros(4, 2)), r"the field returned \(4, 3\) for samples of"),
        (lambda: conservativity(nn.Linear(2, 2), torch.zeros(4, 2), probes=0), "probes must be at least 1"),
    ],
)
def test_what_has_no_square_jacobian_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
