"""Maps x − ∇h*(F(x))."""

import pytest
import torch
from torch import Tensor, nn

from lightning_gap import costs, monge_gap
from lightning_gap.monge import StructuredMap
from lightning_gap.monge.costs import TranslationInvariantCost

COSTS = [
    costs.SqEuclidean(),
    costs.Mahalanobis([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]),
    costs.PNorm(1.2),
    costs.PNorm(2.0),
    costs.PNorm(3.0),
    costs.PNorm(8.0),
    costs.SqPNorm(1.5),
    costs.SqPNorm(3.0),
    costs.Elastic(0.0),
    costs.Elastic(0.7),
]
every_cost = pytest.mark.parametrize("cost", COSTS, ids=lambda cost: str(cost)[:20])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@every_cost
@pytest.mark.parametrize("potential", [False, True])
def test_it_starts_at_the_identity_or_the_mean_shift_and_leaves_it(cost, potential):
    x, shift = normal(30, 3), torch.tensor([1.5, 0.0, -0.5])
    torch.manual_seed(0)
    for start in ("identity", "mean"):
        net = StructuredMap(3, cost, (16,), potential=potential, start=start)
        assert torch.equal(net(x), x)
        net.start(x, x + shift)
        expected = x + shift if start == "mean" else x
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)
        # A translation is optimal for every such cost.
        assert float(monge_gap(x, net(x).detach(), cost=cost, solver="exact")) < 1e-4
        before = (net(x) - 2 * x).square().mean()
        before.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        for _ in range(80):
            optimizer.zero_grad()
            loss = (net(x) - 2 * x).square().mean()
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.7 * before.item()


@every_cost
def test_values_are_exact_and_so_are_slopes_out_of_training(cost):
    torch.manual_seed(0)
    net = StructuredMap(3, cost, (16,)).double()
    nn.init.normal_(net.field[-1].weight)
    x = normal(20, 3).double()
    expected = x - cost.grad_h_conjugate(net.field(x))
    torch.testing.assert_close(net(x), expected)
    torch.testing.assert_close(net.eval()(x), expected)
    assert torch.autograd.gradcheck(net, x[:4].clone().requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("p", [1.1, 1.5, 3.0, 6.0])
def test_slopes_of_a_power_are_bounded_in_training_and_exact_in_the_regular_range(p):
    cost = costs.PNorm(p)
    w = torch.cat([torch.zeros(1), torch.logspace(-12, 2, 200), -torch.logspace(-12, 2, 200)]).double()[:, None]
    near = cost.regular_point(w).requires_grad_()
    (slope,) = torch.autograd.grad(cost.grad_h_conjugate(near).sum(), near)
    true = w.abs().pow(1 / (p - 1) - 1) / (p - 1)
    # Flat powers are lifted to 0.1, steep ones are cut at 10; the other end is left as it is.
    expected = true.clamp_min(0.1) if p < 2 else true.clamp_max(10)
    torch.testing.assert_close(slope, expected)
    regular = slope == true
    assert torch.equal(near[regular], w[regular])
    assert torch.equal(near.sign()[1:], w.sign()[1:])


def test_the_elastic_cost_moves_few_coordinates_and_none_is_stuck():
    torch.manual_seed(0)
    x, shift = normal(200, 4), torch.tensor([2.0, 0.0, 0.0, -1.0])
    net = StructuredMap(4, costs.Elastic(0.5), (16,))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        (net(x) - x - shift).square().mean().backward()
        optimizer.step()
    moved = (net(x) - x).detach()
    torch.testing.assert_close(moved.mean(0), shift, atol=0.1, rtol=0)
    # Not small: zero.
    assert float((moved[:, 1:3] == 0).float().mean()) > 0.95


@pytest.mark.parametrize("activation", ["gelu", "silu", "softplus", "tanh"])
@pytest.mark.parametrize("hidden", [(8,), (8, 6, 4)])
def test_the_field_of_a_potential_is_its_gradient(activation, hidden):
    torch.manual_seed(0)
    net = StructuredMap(3, "sqeuclidean", hidden, activation, potential=True).double()
    nn.init.normal_(net.field.last)
    function = {"gelu": nn.GELU(), "silu": nn.SiLU(), "softplus": nn.Softplus(), "tanh": nn.Tanh()}[activation]

    def potential(x: Tensor) -> Tensor:
        for layer in net.field.layers:
            x = function(layer(x))
        return (x @ net.field.last).sum()

    x = normal(5, 3).double().requires_grad_()
    (expected,) = torch.autograd.grad(potential(x), x)
    torch.testing.assert_close(net.field(x), expected)
    torch.testing.assert_close(net(x), x - expected / 2)
    # The gradient of a convex function of x, where φ is not too large, has no gap.
    net.field.last.data.mul_(0.05)
    x = normal(200, 3).double()
    assert float(monge_gap(x, net(x).detach(), solver="exact")) < 1e-10


def test_the_gaussian_start_is_a_gradient_and_belongs_to_the_squared_cost():
    source, target = normal(500, 3) * torch.tensor([1.0, 2.0, 3.0]), normal(500, 3, seed=1) @ normal(3, 3, seed=2) + 1
    for potential in (False, True):
        net = StructuredMap(3, "sqeuclidean", (8,), potential=potential, start="gaussian")
        net.start(source, target)
        mapped = net(source).detach()
        torch.testing.assert_close(mapped.mean(0), target.mean(0), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(torch.cov(mapped.T), torch.cov(target.T), atol=0.2, rtol=0.05)
        assert float(monge_gap(source, mapped, solver="exact")) < 1e-4
    with pytest.raises(ValueError, match=r"start='gaussian' is optimal for the cost sqeuclidean only.*start='mean'"):
        StructuredMap(3, "pnorm(p=3)", start="gaussian")


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        ("euclidean", r"the cost euclidean has no ∇h\*: h is not strictly convex, so no map is structured by it"),
        ("pnorm(p=1)", r"the cost pnorm\(p=1.0\) has no ∇h\*"),
        (costs.Mahalanobis([[1.0, 0.0, 0.0]]), r"has no ∇h\*"),
        ("geodesic", r"cost geodesic is no function h\(x - y\).*SphereMap"),
        ("cosine", r"cost cosine is no function h\(x - y\)"),
        (lambda x, y: (x - y).abs().amax(-1), r"is no function h\(x - y\)"),
    ],
)
def test_costs_without_the_structure_are_refused(cost, message):
    with pytest.raises(ValueError, match=message):
        StructuredMap(3, cost)


def test_a_cost_of_another_dimension_is_refused():
    with pytest.raises(ValueError, match=r"dim=2.*3 columns"):
        StructuredMap(2, COSTS[1])


@pytest.mark.parametrize("activation", ["relu", lambda: nn.GELU()])
def test_potentials_need_smooth_activations_and_a_layer(activation):
    with pytest.raises(ValueError, match="smooth activation of known slope: choose one of gelu, silu, softplus, tanh"):
        StructuredMap(2, "sqeuclidean", (8,), activation, potential=True)
    with pytest.raises(ValueError, match="at least one hidden layer"):
        StructuredMap(2, "sqeuclidean", (), potential=True)


def test_a_cost_of_ones_own_structures_a_map():
    class Quartic(TranslationInvariantCost):
        name = "quartic"

        def h(self, z: Tensor) -> Tensor:
            return (z.square() / 2 + z.pow(4) / 4).sum(-1)

        def grad_h_conjugate(self, w: Tensor) -> Tensor:
            # z + z³ = w, by Cardano.
            root = (w / 2 + (w.square() / 4 + 1 / 27).sqrt()).pow(1 / 3)
            return root - 1 / (3 * root)

        def __str__(self) -> str:
            return "quartic"

    net = StructuredMap(2, Quartic(), (8,), start="mean")
    x, shift = normal(10, 2), torch.tensor([2.0, 1.0])
    net.start(x, x + shift)
    torch.testing.assert_close(net(x), x + shift, atol=1e-4, rtol=1e-4)
    assert net.hparams is None
