"""Maps with costs that they are not made for, and costs that would be learned, are refused or said."""

from functools import partial

import pytest
import torch
from monge_runs import fit_batch, gaussians, samples, small, trainer
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_gap import MongeMap, SamplesDataModule, costs
from lightning_gap.monge import Anneal, BrenierMap, ConditionalMap, ResidualMLP, SphereMap, StructuredMap
from lightning_gap.monge.suitability import share_optimal_maps

SHEAR = [[1.0, 0.5], [0.0, 2.0]]


def squared(u: Tensor, v: Tensor) -> Tensor:
    return (u - v).square().sum(-1)


def less_the_product(u: Tensor, v: Tensor) -> Tensor:
    return -(u * v).sum(-1)


PROPORTIONAL = [
    ("sqeuclidean", "sqpnorm(p=2)"),
    ("sqeuclidean", "pnorm(p=2)"),
    ("sqeuclidean", costs.Mahalanobis([[3.0, 0.0], [0.0, 3.0]])),
    ("sqeuclidean", costs.Mahalanobis([[0.6, 0.8], [-0.8, 0.6]])),
    ("sqeuclidean", "elastic(lam=0)"),
    ("sqeuclidean", squared),
    ("sqeuclidean", less_the_product),
    (costs.Mahalanobis(SHEAR), costs.Mahalanobis(2 * torch.tensor(SHEAR))),
    ("pnorm(p=1.5)", lambda u, v: 3 * (u - v).abs().pow(1.5).sum(-1)),
]
DIFFERENT = [
    ("sqeuclidean", "euclidean"),
    ("sqeuclidean", "pnorm(p=1.5)"),
    ("sqeuclidean", "sqpnorm(p=3)"),
    ("sqeuclidean", "elastic(lam=0.5)"),
    ("sqeuclidean", "cosine"),
    ("sqeuclidean", costs.Mahalanobis(SHEAR)),
    ("sqeuclidean", lambda u, v: -squared(u, v)),
    (costs.Mahalanobis(SHEAR), costs.Mahalanobis([[1.0, 0.0], [0.0, 2.0]])),
    ("pnorm(p=1.5)", "pnorm(p=2.5)"),
    ("pnorm(p=1.5)", "sqpnorm(p=1.5)"),
]


@pytest.mark.parametrize(("pairs", "expected"), [(PROPORTIONAL, True), (DIFFERENT, False)], ids=["same", "other"])
def test_costs_with_the_same_optimal_maps(pairs, expected):
    state = torch.get_rng_state()
    for one, other in pairs:
        one, other = costs.resolve(one), costs.resolve(other)
        assert share_optimal_maps(one, other, 2) is expected, (one, other)
        assert share_optimal_maps(other, one, 2) is expected, (one, other)
        assert share_optimal_maps(one, one, 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_on_the_line_all_convex_costs_have_the_same():
    for other in ("euclidean", "pnorm(p=1.5)", "elastic(lam=1)"):
        assert share_optimal_maps(costs.SqEuclidean(), costs.resolve(other), 1)
        MongeMap(map=BrenierMap(1, (4,)), cost=other)


def test_a_cost_that_cannot_be_tried_is_not_judged():
    def fails(u, v):
        raise RuntimeError

    assert share_optimal_maps(costs.SqEuclidean(), costs.resolve(fails), 2) is None
    MongeMap(map=BrenierMap(2, (4,)), cost=fails)


@pytest.mark.parametrize(
    ("net", "cost"),
    [
        (lambda: BrenierMap(2, (4,), start="identity"), "euclidean"),
        (lambda: BrenierMap(2, (4,), start="identity"), "elastic(lam=1)"),
        (lambda: BrenierMap(2, (4,), start="identity"), costs.Mahalanobis(SHEAR)),
        (lambda: StructuredMap(2, "pnorm(p=1.5)", (4,)), "sqeuclidean"),
        (lambda: StructuredMap(2, "pnorm(p=1.5)", (4,), potential=True), "pnorm(p=1.6)"),
        (lambda: StructuredMap(2, hidden=(4,)), "elastic(lam=1)"),
    ],
)
def test_structures_of_another_cost_are_refused(net, cost):
    message = r"(Brenier|Structured)Map has the structure of .* give cost='.*', or gap_weight=0, or another map"
    for weight in (1.0, Anneal(0.1, 1.0, updates=5)):
        with pytest.raises(ValueError, match=message):
            MongeMap(map=net(), cost=cost, gap_weight=weight)
    # The gap is only measured then.
    trainer(max_steps=1).fit(MongeMap(map=net(), cost=cost, gap_weight=0), samples())


@pytest.mark.parametrize(
    ("net", "cost"),
    [
        (lambda: BrenierMap(2, (4,)), "pnorm(p=2)"),
        (lambda: BrenierMap(2, (4,)), less_the_product),
        (lambda: StructuredMap(2, costs.Mahalanobis(SHEAR), (4,)), costs.Mahalanobis(torch.tensor(SHEAR))),
        (lambda: StructuredMap(2, "elastic(lam=0.5)", (4,)), costs.Elastic(0.5)),
    ],
)
def test_pairs_that_suit_each_other_are_taken(net, cost):
    assert str(MongeMap(map=net(), cost=cost).cost) == str(costs.resolve(cost))


def test_a_map_brings_the_cost_that_it_is_made_for():
    assert MongeMap(map=StructuredMap(2, "pnorm(p=1.5)")).cost == costs.PNorm(1.5)
    assert MongeMap(map=BrenierMap(2)).cost == costs.SqEuclidean()
    assert MongeMap(2).cost == MongeMap(map=nn.Linear(2, 2)).cost == costs.SqEuclidean()


def test_a_checkpoint_of_a_pair_that_is_refused_today_can_be_used(tmp_path):
    model = MongeMap(map=BrenierMap(2, (4,), start="identity"), cost="euclidean", gap_weight=0)
    run = trainer(max_steps=1)
    run.fit(model, samples())
    model.hparams["gap_weight"] = 1.0  # as it was when such pairs were trained
    run.save_checkpoint(tmp_path / "map.ckpt")
    loaded = MongeMap.load_from_checkpoint(tmp_path / "map.ckpt", weights_only=True)
    x = gaussians(5)[0]
    assert torch.equal(loaded.transport(x), model.transport(x))
    with pytest.raises(ValueError, match="BrenierMap has the structure"):
        trainer(max_steps=1).fit(loaded, samples())


@pytest.mark.parametrize("make", [ResidualMLP, partial(ConditionalMap, num_conditions=2)])
def test_a_start_for_another_cost_is_said(make):
    with pytest.warns(UserWarning, match="starts at the map that is optimal for the cost sqeuclidean"):
        MongeMap(map=make(2, start="gaussian"), cost="euclidean")
    MongeMap(map=make(2, start="gaussian"), cost="sqpnorm(p=2)")
    MongeMap(map=make(2, start="mean"), cost="euclidean")
    MongeMap(map=make(2, start="gaussian"), cost="euclidean", gap_weight=0)


@pytest.mark.parametrize("argument", ["cost", "fitting_cost"])
def test_maps_off_the_sphere_are_told_of_the_one_on_it(argument):
    message = rf"{argument}='geodesic' is a distance on the unit sphere, .* take SphereMap, as in MongeMap\(map=SphereM"
    for options in ({"map": ResidualMLP(3)}, {"map": ConditionalMap(3, num_conditions=2)}):
        with pytest.raises(ValueError, match=message):
            MongeMap(**options, **{argument: "geodesic"})
    x = normalize(torch.randn(60, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    if argument == "fitting_cost":  # the map is chosen by the cost alone
        with pytest.raises(ValueError, match=message):
            MongeMap(3, fitting_cost="geodesic")
        with pytest.raises(ValueError, match=message):
            trainer().fit(MongeMap(fitting_cost="geodesic"), SamplesDataModule(x, x, batch_size=20))
    else:
        assert isinstance(MongeMap(3, cost="geodesic").map, SphereMap)
    MongeMap(map=SphereMap(3), cost="geodesic", fitting_cost="geodesic")
    MongeMap(map=nn.Identity(), cost="geodesic")  # one's own map may be on it


def test_a_map_on_the_sphere_is_told_of_costs_through_it():
    for cost in ("geodesic", "cosine", "sqeuclidean"):  # on the sphere the last two are one
        MongeMap(map=SphereMap(3), cost=cost)
    MongeMap(map=SphereMap(3), cost=lambda u, v: costs.Geodesic().elementwise(u, v).square())
    for cost in ("elastic(lam=1)", "pnorm(p=1.5)"):
        with pytest.warns(UserWarning, match="SphereMap moves points along the sphere"):
            MongeMap(map=SphereMap(3), cost=cost)


@pytest.mark.parametrize("net", [BrenierMap(2, (4,), start="identity"), nn.Linear(2, 2)])
def test_conditions_that_a_map_does_not_take_are_said(net):
    labels = ["a", "b"] * 60
    data = samples(conditions=(labels, labels), batch_size=10)
    with pytest.warns(
        UserWarning, match=rf"data have conditions, and {type(net).__name__} takes none: .*ConditionalMap"
    ):
        trainer(max_steps=1).fit(MongeMap(map=net), data)
    batch = next(iter(data.train_dataloader()))
    with pytest.warns(UserWarning, match="it is trained as one map for all"):
        fit_batch(MongeMap(map=ResidualMLP(2, (4,))), batch, max_steps=1)


class Embedded(nn.Module):
    """A squared distance of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 3)

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        return (self.net(u) - self.net(v)).square().sum(-1)


def learned_costs():
    W = torch.eye(2, requires_grad=True)
    net = nn.Linear(2, 3)

    class OfOnesOwn(costs.Cost):
        name = "own"

        def __init__(self) -> None:
            self.net = net

        def elementwise(self, x, y):
            return (self.net(x) - self.net(y)).square().sum(-1)

    return [
        Embedded(),
        OfOnesOwn(),
        lambda u, v: ((u - v) @ W.T).square().sum(-1),
        lambda u, v: (net(u) - net(v)).square().sum(-1),
        partial(lambda net, u, v: (net(u) - net(v)).square().sum(-1), net),
        Embedded().forward,
    ]


@pytest.mark.parametrize("argument", ["cost", "fitting_cost"])
def test_costs_with_parameters_to_train_are_refused(argument):
    for cost in learned_costs():
        with pytest.raises(
            ValueError, match=rf"{argument} has parameters that require a gradient, .*requires_grad_\(Fal"
        ):
            MongeMap(2, **{argument: cost})


EVERYWHERE = torch.eye(2)


def with_a_global(u: Tensor, v: Tensor) -> Tensor:
    return ((u - v) @ EVERYWHERE.T).square().sum(-1)


@pytest.mark.parametrize("argument", ["cost", "fitting_cost"])
@pytest.mark.parametrize("with_data_module", [True, False])
def test_parameters_out_of_sight_are_found_before_the_first_update(argument, with_data_module, monkeypatch):
    model = MongeMap(map=ResidualMLP(2, (4,), start="mean"), **{argument: with_a_global})
    monkeypatch.setitem(globals(), "EVERYWHERE", torch.eye(2, requires_grad=True))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="has parameters that require a gradient"):
        trainer().fit(model, samples()) if with_data_module else fit_batch(model, gaussians(20))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], equal_nan=True)


def test_a_frozen_network_is_a_cost_that_goes_where_the_map_goes(tmp_path):
    torch.manual_seed(0)
    cost = Embedded().requires_grad_(False)
    model = small(cost=cost)
    assert set(model.state_dict()) == set(small().state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())
    before = {name: value.clone() for name, value in cost.state_dict().items()}
    run = trainer(max_steps=3, max_epochs=-1)
    run.fit(model, samples())
    for name, value in cost.state_dict().items():
        assert torch.equal(value, before[name])
    run.save_checkpoint(tmp_path / "map.ckpt")
    with pytest.raises(ValueError, match=r"load_from_checkpoint\(path, cost=\.\.\.\)"):
        MongeMap.load_from_checkpoint(tmp_path / "map.ckpt", weights_only=True)
    loaded = MongeMap.load_from_checkpoint(tmp_path / "map.ckpt", weights_only=True, cost=cost)
    x = gaussians(5)[0]
    assert torch.equal(loaded.transport(x), model.transport(x))
    loaded.to("meta")
    assert cost.net.weight.device.type == "meta"
    cost = Embedded().requires_grad_(False)
    assert MongeMap(2, fitting_cost=lambda u, v: cost(u, v)).double()
    assert cost.net.weight.dtype == torch.float64
