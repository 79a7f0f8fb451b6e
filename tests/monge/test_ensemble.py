"""Several maps of one transport: mean, spread, files, bootstrap."""

from functools import partial

import pytest
import torch
from monge_runs import FAST, gaussians, samples, small, trainer, weights
from torch import nn

from lightning_gap import MongeMap
from lightning_gap.monge import MapEnsemble, ResidualMLP, SphereMap, Trajectory, fit_ensemble
from lightning_gap.monge.samples.bootstrap import bootstrap


def make(kind=MongeMap):
    return kind(map=ResidualMLP(2, (16,)), optimizer=FAST)


def shifted(*shifts, **options):
    maps = []
    for shift in shifts:
        net = ResidualMLP(2, start="mean")
        x = torch.zeros(3, 2)
        net.start(x, x + torch.tensor(shift))
        maps.append(MongeMap(map=net, **options))
    return maps


def test_mean_and_spread_of_translations():
    ensemble = MapEnsemble(shifted([0.0, 1.0], [6.0, 1.0], [3.0, 1.0]))
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    assert len(ensemble) == 3
    torch.testing.assert_close(ensemble.transport(x), x + torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(ensemble.spread(x), torch.full((5,), 6**0.5), rtol=1e-5, atol=1e-5)
    each = ensemble.spread(x, per_feature=True)
    torch.testing.assert_close(each, torch.tensor([6**0.5, 0.0]).expand(5, 2), rtol=1e-5, atol=1e-5)
    assert ensemble.images(x.numpy(), batch_size=2).shape == (3, 5, 2)


def test_means_stay_on_the_sphere():
    maps = []
    for seed in range(3):
        torch.manual_seed(seed)
        net = SphereMap(3, (8,))
        nn.init.normal_(net.displacement[-1].weight, std=0.3)
        maps.append(MongeMap(map=net, cost="geodesic", fitting_cost="geodesic"))
    x = nn.functional.normalize(torch.randn(20, 3), dim=1)
    torch.testing.assert_close(MapEnsemble(maps).transport(x).norm(dim=1), torch.ones(20))


def test_one_file_holds_all_and_paths_are_maps(tmp_path):
    ensemble, x = MapEnsemble([small(2), small(2)]), gaussians()[0]
    ensemble.save(tmp_path / "maps")
    torch.testing.assert_close(MapEnsemble.load(tmp_path / "maps").images(x), ensemble.images(x))
    with pytest.raises(ValueError, match="kind 'ensemble', and none"):
        Trajectory.load(tmp_path / "maps")
    model, run = small(2), trainer(max_steps=1)
    run.fit(model, samples())
    run.save_checkpoint(tmp_path / "map.ckpt")
    loaded = MapEnsemble([tmp_path / "map.ckpt", str(tmp_path / "map.ckpt")])
    torch.testing.assert_close(loaded.transport(x), model.transport(x))
    assert (loaded.spread(x) == 0).all()


@pytest.mark.parametrize(
    ("maps", "error", "message"),
    [
        ([], ValueError, "two at least"),
        ([small(2)], ValueError, "two at least"),
        ([small(2), small(3)], ValueError, "takes 3 features"),
        ([small(2), nn.Linear(2, 2)], TypeError, r"maps\[1\] must be"),
        ([small(2), MongeMap()], ValueError, "no network"),
    ],
)
def test_maps_fit_together(maps, error, message):
    with pytest.raises(error, match=message):
        MapEnsemble(maps)


def test_an_ensemble_differs_by_chance_and_agrees_on_the_means():
    torch.manual_seed(0)
    source, target = gaussians()
    ensemble = fit_ensemble(make, samples(standardize=True), n=3, max_steps=60)
    assert ((ensemble.spread(source) > 0) & (ensemble.spread(source) < 3)).all()
    torch.testing.assert_close(ensemble.transport(source).mean(0), target.mean(0), rtol=0, atol=1)
    first, *others = (model.representation.mean for model in ensemble.maps)
    assert all(torch.equal(first, other) for other in others)


def test_without_bootstrap_all_see_the_same_samples():
    seen = []

    class Keeping(MongeMap):
        def on_fit_start(self):
            seen.append(self.trainer.datamodule.training_samples()[0].sort(0).values)
            super().on_fit_start()

    data = samples()
    for bootstrapped in (False, True):
        seen.clear()
        fit_ensemble(partial(make, Keeping), data, n=2, bootstrap=bootstrapped, max_steps=1)
        assert torch.equal(seen[0], seen[1]) != bootstrapped


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n": 1}, ValueError, "n must be at least 2"),
        ({"max_steps": 0}, ValueError, "max_steps must be"),
        ({"data": gaussians()}, TypeError, "must be a SamplesDataModule"),
        ({"make_model": lambda: nn.Linear(2, 2)}, TypeError, "must return a new MongeMap"),
    ],
)
def test_what_cannot_be_fitted_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        fit_ensemble(**{"make_model": make, "data": samples(), **arguments})


def test_one_map_twice_is_refused():
    model = small(2)
    with pytest.raises(ValueError, match="fitted before"):
        fit_ensemble(lambda: model, samples(), n=2, max_steps=1)
    assert weights(model)


# --- the bootstrap ---


def test_rows_are_drawn_with_replacement_and_held_out_ones_are_not():
    data = samples(120)
    again, other = bootstrap(data, 0), bootstrap(data, 1)
    before, after = data.training_samples(), again.training_samples()
    for old, new, third in zip(before, after, other.training_samples(), strict=True):
        assert len(old) == len(new)
        known = {tuple(row) for row in old.tolist()}
        drawn = {tuple(row) for row in new.tolist()}
        assert drawn < known
        # 1 - 1/e of the rows are drawn at least once.
        assert 0.5 < len(drawn) / len(known) < 0.75
        assert drawn != {tuple(row) for row in third.tolist()}
    assert torch.equal(bootstrap(data, 0).training_samples()[0], after[0])
    assert torch.equal(again.splits["val"].source, data.splits["val"].source)
    assert torch.equal(data.training_samples()[0], before[0])


def test_each_condition_is_drawn_on_its_own_and_weights_go_along():
    source = gaussians(100)[0]
    kinds, weight = ["a", "b"] * 50, (1 + source[:, 0].abs()).tolist()
    data = samples(100, batch_size=20, conditions=(kinds, kinds), weights=(weight, weight))
    by_row = {
        tuple(row): w
        for (x, _) in data.training_pairs()
        for row, w in zip(x.samples.tolist(), x.weights.tolist(), strict=True)
    }
    again = bootstrap(data, 3)
    for (x, _), (old, _) in zip(again.training_pairs(), data.training_pairs(), strict=True):
        assert len(x.samples) == len(old.samples)
        assert {tuple(row) for row in x.samples.tolist()} <= {tuple(row) for row in old.samples.tolist()}
        assert [by_row[tuple(row)] for row in x.samples.tolist()] == x.weights.tolist()


def test_what_is_no_data_module_is_refused():
    with pytest.raises(TypeError, match="must be a SamplesDataModule"):
        bootstrap(gaussians(), 0)
    with pytest.raises(ValueError, match="seed must be at least 0"):
        bootstrap(samples(), -1)
