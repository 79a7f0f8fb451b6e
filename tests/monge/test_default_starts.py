"""What the default starts from: weights count, a batch freezes nothing, small conditions keep their own map."""

import pytest
import torch
from monge_runs import trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap import MongeMap, SamplesDataModule
from lightning_gap.monge import BrenierMap, ConditionalMap, ResidualMLP, StartPair
from lightning_gap.monge.costs import SqEuclidean
from lightning_gap.monge.maps.energy_fit import energy_gain


def normal(seed: int, n: int, dim: int = 2) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean"])
def test_weights_count_in_the_start(cost):
    x, y, w = normal(0, 80), normal(1, 80) + 3, torch.ones(80)
    y[:40] -= 50
    w[:40] = 1e-3
    model = MongeMap(cost=cost, hidden=(8,))
    trainer(max_epochs=1).fit(model, SamplesDataModule(x, y, weights=(torch.ones(80), w), batch_size=30))
    torch.testing.assert_close(model.transport(x).mean(0), w @ y / w.sum(), atol=0.6, rtol=0)


@pytest.mark.parametrize(
    "net", [BrenierMap(2, (8,)), ResidualMLP(2, (8,), start="plan"), ResidualMLP(2, (8,), start="gaussian"),
            ResidualMLP(2, (8,), start="mean")], ids=["brenier", "plan", "gaussian", "mean"],
)  # fmt: skip
def test_rows_of_weight_0_are_not_there(net):
    x, y = normal(0, 60), normal(1, 60) * 2 + 3
    far, w = torch.cat([y, torch.full((20, 2), -50.0)]), torch.cat([torch.ones(60), torch.zeros(20)])
    net.start(x, far, pairs=[StartPair(x, far, None, None, w / 60)])
    torch.testing.assert_close(net(x).mean(0), y.mean(0), atol=0.2, rtol=0)


def test_a_first_batch_does_not_decide_for_ever():
    x, y = normal(0, 640), normal(1, 640) + torch.where(torch.rand(640, 1) < 0.5, 4.0, -4.0)
    model = MongeMap(2, hidden=(8,))
    loader = DataLoader(TensorDataset(x, y), batch_size=64)
    trainer(max_steps=5).fit(model, loader, loader)
    assert isinstance(model.map, BrenierMap)
    assert float(model.map.share) == 1
    assert model.map.starts_at == "plan"


def test_a_condition_of_few_samples_keeps_its_affine_map():
    net = ConditionalMap(2, (16,), num_conditions=2, start="plan", plan_steps=100)
    x, y = normal(0, 400), normal(1, 400) * 3 + torch.where(normal(2, 400, 1) > 0, 4.0, -4.0)
    few, shifted = normal(3, 60), normal(4, 60) + 5
    pairs = [StartPair(x, y, torch.tensor(0)), StartPair(few, shifted, torch.tensor(1))]
    net.start(torch.cat([x, few]), torch.cat([y, shifted]), pairs=pairs)
    test = normal(5, 300)
    error = (net(test, torch.ones(300, dtype=torch.long)) - (test + 5)).square().mean().sqrt().detach()
    assert float(error) < 0.8


def test_a_state_without_a_gaussian_map_is_the_network_s(tmp_path):
    x, y = normal(0, 200), normal(1, 200) + 1
    old = BrenierMap(2, (8,), start="gaussian")
    old.start(x, y)
    state = {name: value for name, value in old.state_dict().items() if name not in ("linear", "share")}
    net = BrenierMap(2, (8,))
    net.start(x[:30], 5 * y[:30])
    assert float(net.share) == 0
    net.load_state_dict(state)
    torch.testing.assert_close(net(x), old(x))


def test_a_cost_by_name_and_as_an_object_are_one():
    by_name, as_object = MongeMap(2), MongeMap(2, fitting_cost=SqEuclidean())
    assert by_name.objective.fitting_loss == as_object.objective.fitting_loss == "semidual"


def test_weights_count_as_repetitions_where_maps_are_judged():
    x, y = normal(0, 40).double(), normal(1, 50).double()
    before, after = x + 1, x * 1.1
    times = torch.randint(1, 4, (50,), generator=torch.Generator().manual_seed(0))
    weighted = StartPair(x, y, None, None, times.double() / times.sum())
    repeated = StartPair(x, y.repeat_interleave(times, 0))
    gains = [energy_gain([before], [after], [pair])[0] for pair in (weighted, repeated)]
    assert gains[0] == pytest.approx(gains[1])
